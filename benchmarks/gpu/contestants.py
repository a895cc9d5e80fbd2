"""Who trains the model end to end: one function each, ``(bench, shape, steps) -> begin and end of each step``.

A step is ``shape.accumulation`` micro-batches of random tokens, clipping and AdamW; nothing waits for the device within
it. A peer that is not here raises ``Missing``. Megatron core and torchtitan get the loop that ours gets, with the same
frozen garbage collector; Hugging Face's Trainer is itself the loop.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from roofline import GIB, padded, parameters
from shapes import Shape
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu.measure import Bench, Missing, Span, needed
from megatron_hammer.config import Config, config_from_tree
from megatron_hammer.kernels import fp8
from megatron_hammer.kernels.attention import causal_attention
from megatron_hammer.kernels.libraries import te
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.sampling.batch import Batch
from megatron_hammer.train.build import build
from megatron_hammer.train.cuda_graph import micro_batch_runner
from megatron_hammer.train.step import train_step

Contestant = Callable[[Bench, Shape, int], list[Span]]
LEARNING_RATE, CLIP = 1e-4, 1.0
TITAN_LOSS_CHUNKS = 8  # the number that torchtitan 0.3 takes


def _timed(bench: Bench, step: Callable[[list[tuple[Tensor, Tensor]]], object], shape: Shape, steps: int) -> list[Span]:
    """Each step on fresh random tokens and labels, [b, s] each."""
    spans = []
    gc.collect()
    gc.freeze()
    try:
        for _ in range(steps):
            windows = [
                bench.tokens(shape.micro_batch, shape.sequence + 1, vocabulary=shape.vocabulary)
                for _ in range(shape.accumulation)
            ]
            batches = [(w[:, :-1].contiguous(), w[:, 1:].contiguous()) for w in windows]
            bench.synchronise()
            start = time.perf_counter()
            step(batches)
            bench.synchronise()
            spans.append((start, time.perf_counter()))
    finally:
        gc.unfreeze()
    return spans


# ---- ours ------------------------------------------------------------------------------------------------------------


def our_config(shape: Shape, **groups: dict[str, Any]) -> Config:
    """The config of a step of this shape; ``groups`` are settings beyond the defaults."""
    train = {
        "precision": "bf16",
        "micro_batch_size": shape.micro_batch,
        "global_batch_size": shape.micro_batch * shape.accumulation,
    }
    tree: dict[str, Any] = {"model": shape.model_fields, "data": {"seq_length": shape.sequence}, "train": train}
    for group, fields in groups.items():
        tree[group] = {**tree.get(group, {}), **fields}
    return config_from_tree(tree)


def ours(**groups: dict[str, Any]) -> Contestant:
    """This project, with these settings."""

    def run(bench: Bench, shape: Shape, steps: int) -> list[Span]:
        config, ctx = our_config(shape, **groups), ParallelContext.single(bench.device)
        te.check_here(config)
        fp8.check_here(config.kernels, bench.device)
        if config.kernels.cuda_graph and not bench.cuda:
            raise Missing("CUDA graphs need a GPU")
        model, optimizer = build(config, ctx)
        micro_batch = micro_batch_runner(config.kernels, optimizer.store)
        done = 0

        def step(batches: list[tuple[Tensor, Tensor]]) -> None:
            nonlocal done
            done += 1
            train_step(model, optimizer, [Batch(*pair) for pair in batches], config, done, ctx, micro_batch)

        return _timed(bench, step, shape, steps)

    return run


# ---- Hugging Face: HammerLLM's own way to train ----------------------------------------------------------------------


MASKLESS = (
    "maskless_sdpa"  # its name among Hugging Face's attention functions: no mask is made for one it does not know
)


def maskless_sdpa(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, scaling: float, dropout: float = 0.0, **kw: Any
) -> tuple[Tensor, None]:
    """[b, heads, s, d] each -> [b, s, n, d], causal."""
    assert mask is None, "Hugging Face made a mask"
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous(), None


def hugging_face(attention: str, compiled: bool = True, tuned: bool = False) -> Contestant:
    """The Trainer on LlamaForCausalLM, bf16 by autocast, fused AdamW, clipping at 1: the Trainer's defaults.

    attention: eager; flash or cudnn: SDPA with that kernel (cudnn: flash where it cannot). As HammerLLM's flash-attn
    did, they get no mask: Hugging Face's own "sdpa" builds one when it is compiled (seen in 5.17), and then neither
    kernel can run.
    tuned: the vocabulary is padded, and the Trainer does not look at every loss, for which it waits for the device.
    """

    def run(bench: Bench, shape: Shape, steps: int) -> list[Span]:
        needed("transformers")
        needed("accelerate")
        from hf_trainer import Clock, RandomTokens, llama
        from transformers import AttentionInterface, Trainer, TrainingArguments

        AttentionInterface.register(MASKLESS, maskless_sdpa)
        rows = padded(shape.vocabulary) if tuned else shape.vocabulary
        with torch.device(bench.device):
            model = llama(replace(shape, vocabulary=rows), "eager" if attention == "eager" else MASKLESS)
        order = {
            "flash": [SDPBackend.FLASH_ATTENTION],
            "cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION],
        }
        kernels = (
            sdpa_kernel(order[attention], set_priority=True) if attention in order and bench.cuda else nullcontext()
        )
        clock = Clock(bench.synchronise)
        with tempfile.TemporaryDirectory() as folder, kernels:
            arguments = TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=shape.micro_batch,
                gradient_accumulation_steps=shape.accumulation,
                max_steps=steps,
                learning_rate=LEARNING_RATE,
                max_grad_norm=CLIP,
                bf16=True,
                use_cpu=not bench.cuda,
                report_to=[],
                save_strategy="no",
                logging_steps=10**6,
                logging_nan_inf_filter=not tuned,
                torch_compile=compiled,
                disable_tqdm=True,
            )
            data = RandomTokens(shape.vocabulary, shape.sequence)
            Trainer(model=model, train_dataset=data, callbacks=[clock], args=arguments).train()
        return clock.spans

    return run


def hugging_face_memory_gib(shape: Shape, eager_attention: bool, compiled: bool) -> float:
    """About what it needs: a guess from counted tensors, at which the search for its largest micro-batch begins.

    A parameter takes 18 bytes (fp32 weight, gradient and two moments, a bf16 copy); a layer keeps of a token, in hidden
    tensors of 2 bytes, 19 compiled and 40 eager, and the loss 14 and 20 bytes of a logit; attention that stores its
    scores keeps 4 bytes of each compiled and 6 eager.
    """
    everything, _ = parameters(shape)
    tokens = shape.micro_batch * shape.sequence
    layer = tokens * shape.hidden * 2 * (19 if compiled else 40)
    if eager_attention:
        layer += tokens * shape.sequence * shape.heads * (4 if compiled else 6)
    loss = tokens * shape.vocabulary * (14 if compiled else 20)
    return (18 * everything + shape.layers * layer + loss) / GIB


# ---- Megatron core ---------------------------------------------------------------------------------------------------


def megatron_core(fused_attention: bool) -> Contestant:
    """GPTModel of the local back end in Megatron's own bf16, data-parallel and optimizer wrappers, on one rank.

    Without Transformer Engine and apex it takes torch's AdamW, which gets its fused kernel here.
    fused_attention: its local attention stores the scores; True puts torch's SDPA in that place, with cuDNN's kernel
    where that can run, as its Transformer Engine back end would have it.
    """

    def run(bench: Bench, shape: Shape, steps: int) -> list[Span]:
        if not bench.cuda:
            raise Missing("Megatron core's model does not run on a CPU")
        needed("megatron.core")
        import torch.distributed as dist
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        if not dist.is_initialized():
            store = dist.FileStore(tempfile.mkstemp()[1], 1)
            dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=bench.device)
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
        model_parallel_cuda_manual_seed(1)
        return _timed(bench, megatron_step(bench, shape, fused_attention), shape, steps)

    return run


class SDPA(torch.nn.Module):
    """In the place of Megatron core's attention: q [s, b, n, d], k and v [s, b, g, d] -> [s, b, n d]."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
            return causal_attention(query, key, value).flatten(2)


def megatron_step(bench: Bench, shape: Shape, fused_attention: bool) -> Callable[[list[tuple[Tensor, Tensor]]], object]:
    """Build the model in the process group that is there."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module

    config = TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_query_groups=shape.groups,
        normalization="RMSNorm",
        layernorm_epsilon=1e-5,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        bias_activation_fusion=True,
        bias_dropout_fusion=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        masked_softmax_fusion=False,  # its kernels come with Megatron's own extension, which no wheel has
        cross_entropy_loss_fusion=True,
        cross_entropy_fusion_impl="native",
        bf16=True,
        params_dtype=torch.bfloat16,
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    if fused_attention:
        spec.submodules.self_attention.submodules.core_attention = SDPA
    model = GPTModel(
        config,
        spec,
        vocab_size=padded(shape.vocabulary),
        max_sequence_length=shape.sequence,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    wrapped = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True),
        Float16Module(config, model.to(bench.device)),
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=LEARNING_RATE,
            weight_decay=0.0,
            bf16=True,
            params_dtype=torch.bfloat16,
            use_distributed_optimizer=True,
            clip_grad=CLIP,
        ),
        [wrapped],
        use_gloo_process_groups=False,
    )
    for group in optimizer.param_groups:
        if "fused" in group:  # torch's AdamW, before its first step
            group["fused"] = bench.cuda
    positions = torch.arange(shape.sequence, device=bench.device).expand(shape.micro_batch, -1)

    def step(batches: list[tuple[Tensor, Tensor]]) -> None:
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        for i, (tokens, labels) in enumerate(batches):
            with nullcontext() if i == len(batches) - 1 else wrapped.no_sync():
                losses = wrapped(tokens, positions, None, labels=labels)
                (losses.float().mean() / len(batches)).backward()
        wrapped.finish_grad_sync()
        optimizer.step()

    return step


# ---- torchtitan ------------------------------------------------------------------------------------------------------


def torchtitan(tuned: bool = False) -> Contestant:
    """torchtitan 0.2.2's Llama and its recipe on one GPU: fp32 weights under autocast, each block compiled, cuDNN SDPA
    first, the compiled loss, fused AdamW. Its loop is ours: torchtitan's own wants its data and tokenizer.

    tuned: the vocabulary is padded; the residual stream is in bf16, which its FSDP makes it on several GPUs and
    autocast on one does not; and the loss is computed a chunk of the sequence at a time, as it is from 0.3 on, which
    needs a newer torch than 2.11: so this piece is written here after its description, and is named so in the report.
    """

    def run(bench: Bench, shape: Shape, steps: int) -> list[Span]:
        bench.add_packages_of("torchtitan")
        needed("torchtitan.models.llama3.model.model")
        from torchtitan.components.loss import cross_entropy_loss
        from torchtitan.models.llama3.model.args import TransformerModelArgs
        from torchtitan.models.llama3.model.model import Transformer

        multiple = 16 if bench.small else 256
        arguments = TransformerModelArgs(
            dim=shape.hidden,
            n_layers=shape.layers,
            n_heads=shape.heads,
            n_kv_heads=shape.groups,
            vocab_size=padded(shape.vocabulary) if tuned else shape.vocabulary,
            multiple_of=multiple,  # 4 x dim x 2/3, rounded up to it: 5632
            max_seq_len=shape.sequence,
        )
        with torch.device(bench.device), torch.no_grad():
            model = Transformer(arguments)
            model.init_weights(buffer_device=bench.device)
        width = model.layers["0"].feed_forward.w1.out_features
        assert width == shape.ffn, f"torchtitan's rule gives a feed-forward width of {width}, not {shape.ffn}"
        head = model.output
        model.output = None  # its forward then returns what the head reads
        for name, block in model.layers.named_children():
            model.layers.register_module(name, torch.compile(block, fullgraph=True))
        if tuned:
            model.tok_embeddings.register_forward_hook(lambda module, inputs, out: out.bfloat16())
        loss_of = torch.compile(cross_entropy_loss)
        parameters = [*model.parameters(), *head.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)

        def backward(tokens: Tensor, labels: Tensor, count: int) -> None:
            with torch.autocast(bench.device.type, torch.bfloat16):
                hidden = model(tokens)
                if not tuned:
                    loss = loss_of(head(hidden), labels) / count
                    loss.backward()
                    return
                leaf = hidden.detach().requires_grad_()
                for x, y in zip(leaf.chunk(TITAN_LOSS_CHUNKS, 1), labels.chunk(TITAN_LOSS_CHUNKS, 1)):
                    (loss_of(head(x), y) / count).backward()
            hidden.backward(leaf.grad)

        def step(batches: list[tuple[Tensor, Tensor]]) -> None:
            optimizer.zero_grad()
            count = sum(labels.numel() for _, labels in batches)
            for tokens, labels in batches:
                backward(tokens, labels, count)
            torch.nn.utils.clip_grad_norm_(parameters, CLIP, foreach=True)
            optimizer.step()

        return _timed(bench, step, shape, steps)

    return run


# ---- FSDP2: what torch alone has -------------------------------------------------------------------------------------


class WithLoss(torch.nn.Module):
    """Hugging Face's model up to the head, then torch's own head and loss in one where it has them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        hidden, weight = self.model.model(input_ids=tokens).last_hidden_state.flatten(0, 1), self.model.lm_head.weight
        if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            return F.cross_entropy(F.linear(hidden, weight).float(), labels.flatten())
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(hidden, weight, labels.flatten(), options=options)  # type: ignore[attr-defined]


def fsdp2() -> Contestant:
    """LlamaForCausalLM under ``fully_shard``: fp32 weights that each layer casts to bf16, gradients reduced in fp32,
    each layer compiled, cuDNN's SDPA first, a padded vocabulary, ``F.linear_cross_entropy``, fused AdamW. On one rank
    it gathers from itself: what FSDP2 costs beside communication.
    """

    def run(bench: Bench, shape: Shape, steps: int) -> list[Span]:
        needed("transformers")
        import torch.distributed as dist
        from hf_trainer import llama
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        from transformers import AttentionInterface

        AttentionInterface.register(MASKLESS, maskless_sdpa)
        if not dist.is_initialized():
            store, device = dist.FileStore(tempfile.mkstemp()[1], 1), {"device_id": bench.device} if bench.cuda else {}
            dist.init_process_group("nccl" if bench.cuda else "gloo", store=store, rank=0, world_size=1, **device)
        mesh = init_device_mesh(bench.device.type, (1,))
        with torch.device(bench.device):
            model = WithLoss(llama(replace(shape, vocabulary=padded(shape.vocabulary)), MASKLESS))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in model.model.model.layers:
            layer.compile()
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
        order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]

        def step(batches: list[tuple[Tensor, Tensor]]) -> None:
            optimizer.zero_grad()
            with sdpa_kernel(order, set_priority=True):
                for i, (tokens, labels) in enumerate(batches):
                    model.set_requires_gradient_sync(i == len(batches) - 1)
                    (model(tokens, labels) / len(batches)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP, foreach=True)
            optimizer.step()

        return _timed(bench, step, shape, steps)

    return run
