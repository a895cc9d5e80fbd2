"""Recompute (activation checkpointing): what the layers keep for backward, and what backward computes again instead.

``train.recompute`` trades time for memory; the results are the same, bit for bit. What a layer keeps of a token, in
elements, with h hidden, n query heads of d, g groups and f the feed-forward width::

                sums     normed   qkv          attention   gate, up   product     done again in backward
    none        2h       2h       (n + 2g) d   n d         2f         f
    selective   2h                (n + 2g) d               2f                     no matrix product but attention's
    full        h                                                                 the layer's forward

selective leaves ``model/llama.py`` as it is. Norm, attention and SwiGLU become operations that save their inputs only,
and mark their output. Hooks around the layers see every tensor that is saved for backward: where a marked one would be
saved (by the linear layer that reads it), they save a note in its place. When backward reads the note, the operation
runs again, once: its result serves the reader, and its recorded graph its own backward, which comes next::

    forward     gate_up [kept] -> product [marked] -> down saves a note
    backward    down reads the note: product again, from gate_up; dW = dy^T product
                swiglu: d gate_up, from that record

The residual sum that a norm returns beside its output is kept, for the next norm reads it; the norm is made from the
sum. full keeps the input of a layer and runs the layer again.

Where layers are compiled (``kernels.compile=layers``), full is the same around the compiled layer, and selective is
an instruction to the compiler: keep what matrix products and sums over ranks give, make the rest again.

Why selective exists twice: a compiler sees no hooks and no marks, so inside its graph only torch's selective checkpoint
works. Outside of a graph that would do too, with the same loss after 8 steps, but it watches every single operation of
a layer, and imports torch's compiler. Measured on 2 Xeon cores, one thread, bf16, one micro-batch a step: CPU time of a
step, and peak memory above that after the imports at the start (29 Nov. 2026; torch's checkpoint was put around the
layers as in ``SelectiveInGraph.body``)::

    shape of benchmarks/shapes.py     none               marks              torch's checkpoint
    quick                             260 ms   196 MB    282 ms   215 MB    328 ms   315 MB
    mid                             3,467 ms 1,260 MB  3,751 ms 1,210 MB  4,188 ms 1,225 MB

A mark is found by the address of a storage because what is saved is often a view (attention's output with its heads
flattened), another object than the one that the operation returned.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megatron_hammer.config import Config
from megatron_hammer.kernels.attention import AttentionFunction
from megatron_hammer.kernels.backend import Backend
from megatron_hammer.kernels.libraries import te
from megatron_hammer.kernels.linear import Gradient
from megatron_hammer.kernels.norm import AddRMSNormFunction
from megatron_hammer.kernels.operations import Operations
from megatron_hammer.kernels.packed_sequences import PackedSequences
from megatron_hammer.kernels.swiglu import SwiGLUFunction
from megatron_hammer.parallel.sequence_split import split

Region = Callable[[], AbstractContextManager[Any]]
Layer = Callable[..., tuple[Tensor, Tensor]]


class Recompute:
    """What a model is built with in place of what is plain. Here the same, for nothing is recomputed: the base of the
    other two, and the default.
    """

    def operations(self, plain: Operations) -> Operations:
        """The operations of the layers."""
        return plain

    def region(self, plain: Region) -> Region:
        """What to run a forward of all layers in."""
        return plain

    def layer(self, index: int, plain: Layer, region: Region) -> Layer:
        """What runs layer ``index`` where gradients are recorded; ``region``: what this method made of it."""
        return plain

    @staticmethod
    def body(layer: Layer, *arguments: Any) -> tuple[Tensor, Tensor]:
        """What is compiled where layers are."""
        return layer(*arguments)


def plan_recompute(config: Config) -> Recompute:
    """What ``train.recompute`` asks for; the config has been validated."""
    fp8_by_library = config.kernels.layers == "te" and config.kernels.fp8 != "off"
    if config.train.recompute == "selective":
        return SelectiveInGraph() if config.kernels.compile == "layers" else Selective(norms=not fp8_by_library)
    if config.train.recompute == "full":
        return Full(config.train.recompute_layers or config.model.num_layers, fp8_by_library)
    return Recompute()


def keys_seen(config: Config, cp_rank: int = 0) -> int:
    """Keys that attention of a context-parallel rank is given of a micro-batch in which each sample is one document.

    Of the ranks the first has most; with shorter documents it has fewer.
    """
    b, s, cp = config.train.micro_batch_size, config.data.seq_length, config.parallel.context_parallel_size
    return _keys_seen(b, s, cp, config.data.attention_mask == "document", cp_rank)


@lru_cache(maxsize=64)  # a search for layouts asks for the same many times
def _keys_seen(samples: int, seq_length: int, shards: int, keep_whole: bool, rank: int) -> int:
    mine = split(np.arange(samples + 1) * seq_length, shards, keep_whole)[rank]
    return sum(span.stop - span.document_start for span in mine)


def activation_bytes(config: Config, backends: Mapping[str, Backend], cp_rank: int = 0, stage: int = 0) -> int:
    """What the decoder layers of one stage keep of a micro-batch until its backward, by the table above.

    The reference of an operation ("torch") keeps what lies between its steps; every other backend is taken to keep its
    inputs and the few numbers a row that its backward needs, and so are compiled ones. Under context parallelism a rank
    has its share of the tokens, but attention keeps the keys and values that it was given of all.
    """
    model, train, at = config.model, config.train, config.placement()
    size = 4 if train.precision == "fp32" else 2
    references = {name for name, row in backends.items() if row.name == "torch"}
    plain = references if config.kernels.compile == "none" else set()
    if config.kernels.layers == "te":
        plain = plain - {"norm"}
    h = model.hidden_size // at.sequence_shards
    n, g, d, f = at.heads_local, at.groups_local, model.head_size, at.ffn_local
    inputs = size * (2 * h + (n + 2 * g) * d + 2 * f)
    rotated = size * (n + g) * d if "rope" in references else 0  # once more: not turned in place
    outputs = (1 if config.kernels.fp8 != "off" else size) * (2 * h + n * d + f)  # in 8 bits they cannot be made again
    inner = 4 * (2 / at.sequence_shards + n)  # fp32 statistics: of each norm, and of each head's softmax
    # The normalised rows before the weight; and in 16 bits an fp32 copy of the sum in the place of the sum.
    inner += 2 * h * 4 if "norm" in plain else 0
    inner += size * f if "swiglu" in plain else 0  # silu(gate)
    normed = 0.0  # what the norms of heads read; they write what RoPE turns
    if model.qk_norm:
        normed = (n + g) * (size * d + 4 + (4 * d if "norm" in plain else 0))
    whole = inputs + rotated + normed + outputs + inner
    selective = inputs + rotated + normed + (outputs if config.kernels.fp8 != "off" else 0)
    if config.kernels.compile == "layers":  # both summands of the first norm; what is quantised is quantised again
        selective = inputs + size * h
    again = {"none": 0, "selective": model.num_layers, "full": train.recompute_layers or model.num_layers}
    recomputed = again[train.recompute]
    each = selective if train.recompute == "selective" else size * h
    rows, gathered = config.tokens_per_rank, 0
    if config.parallel.context_parallel_size > 1:
        gathered = size * 2 * g * d * keys_seen(config, cp_rank)
    start, stop = config.placement(stage=stage).layers
    fewer = max(0, min(stop, recomputed) - start)
    return round(fewer * rows * each + (stop - start - fewer) * (rows * whole + gathered))


# ---- full -------------------------------------------------------------------------------------------------------


class Full(Recompute):
    """The first ``layers`` layers keep their input alone.

    Args:
        fp8_by_library: Transformer Engine computes in fp8: its own checkpoint runs a layer again with the scales that
            the layer had.
    """

    def __init__(self, layers: int, fp8_by_library: bool = False) -> None:
        self.layers, self.fp8_by_library = layers, fp8_by_library

    def layer(self, index: int, plain: Layer, region: Region) -> Layer:
        return partial(self._run, plain, region) if index < self.layers else plain

    def _run(self, layer: Layer, region: Region, x: Tensor, branch: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        if branch is not None:
            x = x + branch  # one tensor to keep instead of two
        if self.fp8_by_library:
            return te.checkpoint(lambda x: layer(x, None, *rest), x)  # type: ignore[no-any-return]

        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            with region():
                return layer(x, None, *rest)

        return _Again.apply(run, x)  # type: ignore[no-any-return, no-untyped-call]


class _Again(torch.autograd.Function):
    """A layer that keeps its input only. Its weights get their gradients from the backward inside of this one.

    No layer draws random numbers, so nothing else has to be as it was. (``torch.utils.checkpoint``, which cares for
    more, imports torch's compiler: 140 MB.)
    """

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        ctx.run = run
        # With a record, which is dropped: with none at all, torch may choose another kernel, and layers that are
        # compiled would not be.
        _, outputs = _run(run, (x,))
        return tuple(output.detach() for output in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, Tensor | None]:
        (x,), outputs = _run(ctx.run, ctx.saved_tensors)
        torch.autograd.backward(*_arrived(outputs, grads))
        return None, x.grad


# ---- selective --------------------------------------------------------------------------------------------------


class SelectiveInGraph(Recompute):
    """For layers that are compiled: torch's selective checkpoint, which tells the compiler what it may keep."""

    @staticmethod
    def body(layer: Layer, *arguments: Any) -> tuple[Tensor, Tensor]:
        return checkpoint(  # type: ignore[no-any-return]
            layer, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=_keep_products
        )


def _keep_products() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(ctx: Any, operation: Any, *arguments: Any, **more: Any) -> CheckpointPolicy:
    """Keep matrix products and what was communicated; make the rest again."""
    return CheckpointPolicy.MUST_SAVE if operation.name() in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


KEPT = {
    *("aten::mm", "aten::_scaled_mm", "megatron_hammer::wide_fprop"),
    *("_c10d_functional::all_reduce", "_c10d_functional::reduce_scatter_tensor"),
}


class Selective(Recompute):
    """Outputs of norm, attention and SwiGLU are made again.

    Args:
        norms: false where Transformer Engine computes in fp8. Then its linear layers keep the norms' outputs in 8 bits,
            so nothing is left to make again; and the scales of a micro-batch's gradients are updated in the backward of
            the first of the library's modules that ran, the first norm, which must be the one of the forward pass.
    """

    def __init__(self, norms: bool = True) -> None:
        self.norms = norms
        self.marks: dict[int, _Mark] | None = None
        """Storage -> the operation that wrote it; None where no layer runs or nothing is recorded."""

    def operations(self, plain: Operations) -> Operations:
        return replace(
            plain,
            add_rms_norm=partial(self._add_rms_norm, plain.add_rms_norm),
            swiglu=partial(self._swiglu, plain.swiglu),
            attention=partial(self._attention, plain.attention),
        )

    def region(self, plain: Region) -> Region:
        return partial(self._marking, plain)

    @contextmanager
    def _marking(self, plain: Region) -> Iterator[None]:
        with plain():
            if not torch.is_grad_enabled():
                yield
                return
            self.marks = {}
            try:
                with saved_tensors_hooks(self._pack, _unpack):
                    yield
            finally:
                self.marks = None

    def _add_rms_norm(
        self, plain: AddRMSNormFunction, x: Tensor, branch: Tensor | None, weight: Tensor, eps: float,
        gradient: Gradient | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if self.marks is None or not self.norms:
            return plain(x, branch, weight, eps, gradient)
        return _RecomputedNorm.apply(self.marks, plain, eps, gradient, x, branch, weight)  # type: ignore[no-any-return, no-untyped-call]

    def _swiglu(self, plain: SwiGLUFunction, gate_up: Tensor) -> Tensor:
        if self.marks is None:
            return plain(gate_up)
        return _Recomputed.apply(self.marks, plain, gate_up)  # type: ignore[no-any-return, no-untyped-call]

    def _attention(
        self, plain: AttentionFunction, q: Tensor, k: Tensor, v: Tensor, documents: PackedSequences | None
    ) -> Tensor:
        if self.marks is None:
            return plain(q, k, v, documents)

        def flat(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            """Laid out so that the model flattens the heads without a copy, which would be kept."""
            out = plain(q, k, v, documents)
            return out if out.stride(2) == out.shape[3] * out.stride(3) else out.contiguous()

        return _Recomputed.apply(self.marks, flat, q, k, v)  # type: ignore[no-any-return, no-untyped-call]

    def _pack(self, tensor: Tensor) -> Any:
        """A note in place of a marked tensor or a view of it, else the tensor.

        Cut off from the graph: an operation that saves its own output would hold itself alive.
        """
        if self.marks is None or type(tensor) is not Tensor:
            return tensor.detach()
        mark = self.marks.get(tensor.untyped_storage()._cdata)
        if mark is None or tensor.dtype != mark.dtype or tensor._version != mark.version:
            return tensor.detach()
        return _Note(mark, tensor.shape, tensor.stride(), int(tensor.storage_offset()) - mark.offset)


@dataclass(frozen=True)
class _Mark:
    """The operation that wrote a storage, and how.

    Neither the storage nor the operation is kept alive. The weak reference to the storage holds its address, so no
    other storage can get that while the mark is there; the version tells whether somebody wrote over the contents.
    """

    node: weakref.ref[Any]
    storage: StorageWeakRef
    dtype: torch.dtype
    stride: tuple[int, ...]
    offset: int
    version: int

    def again(self) -> Tensor:
        """The tensor, from the operation's record: its own backward has not run yet, or the graph would be gone."""
        node = self.node()
        assert node is not None, "the operation behind a saved tensor is a part of the same graph"
        output: Tensor = _record(node)[1][0].detach()
        assert output.stride() == self.stride, "an operation laid its output out in another way the second time"
        return output


@dataclass(frozen=True)
class _Note:
    """What is saved in place of a marked tensor: how it lay over what the operation wrote."""

    mark: _Mark
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        output = self.mark.again()
        return output.as_strided(self.shape, self.stride, output.storage_offset() + self.offset)


def _unpack(packed: Any) -> Tensor:
    return packed.tensor() if isinstance(packed, _Note) else packed


class _Recomputed(torch.autograd.Function):
    """An operation of one output that keeps its inputs only."""

    @staticmethod
    def forward(ctx: Any, marks: dict[int, _Mark], function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        _prepare(ctx, lambda *kept: (function(*kept),))
        (output,) = _run(ctx.again, inputs)[1]
        return _marked(ctx, output.detach(), marks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *_gradients(ctx, grads)


class _RecomputedNorm(torch.autograd.Function):
    """Residual add and RMSNorm: keeps the sum, which it returns, and makes the norm again from that."""

    @staticmethod
    def forward(
        ctx: Any,
        marks: dict[int, _Mark],
        function: AddRMSNormFunction,
        eps: float,
        gradient: Gradient | None,
        x: Tensor,
        branch: Tensor | None,
        weight: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.branches = branch is not None
        if branch is None:
            outputs = _run(lambda x: function(x, None, weight, eps, gradient), (x,))[1]
            normed, summed = outputs[0].detach(), x  # x as it is: autograd makes it an output of this node
        else:
            outputs = _run(lambda x, branch: function(x, branch, weight, eps, gradient), (x, branch))[1]
            normed, summed = (output.detach() for output in outputs)
        ctx.save_for_backward(summed)
        _prepare(ctx, lambda summed: function(summed, None, weight, eps, gradient), weight)
        return _marked(ctx, normed, marks), summed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_sum, grad_weight = _gradients(ctx, grads)
        return None, None, None, None, grad_sum, grad_sum if ctx.branches else None, grad_weight


def _prepare(ctx: Any, again: Callable[..., tuple[Tensor, ...]], *leaves: Tensor) -> None:
    """``again`` makes the outputs from what is saved, the marked one first, and reads ``leaves`` besides.

    Those stay what they are: a library's norm has its weight from us as its parameter.
    """
    ctx.again, ctx.record, ctx.leaves = again, None, leaves
    ctx.set_materialize_grads(False)


def _run(function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> tuple[list[Tensor], Any]:
    """Inputs cut off from the graph, and outputs with the record from one to the other.

    Forward takes the outputs and drops the record: with no record at all, torch may choose another kernel.
    """
    cut = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        return cut, function(*cut)


def _marked(ctx: Any, output: Tensor, marks: dict[int, _Mark]) -> Tensor:
    storage = StorageWeakRef(output.untyped_storage())
    offset = int(output.storage_offset())
    marks[storage.cdata] = _Mark(weakref.ref(ctx), storage, output.dtype, output.stride(), offset, output._version)
    return output


def _record(node: Any) -> tuple[list[Tensor], Any]:
    """The operation run again with its record, for whoever comes first; the others find it."""
    if node.record is None:
        node.record = _run(node.again, node.saved_tensors)
    return node.record  # type: ignore[no-any-return]


def _gradients(ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Gradients of what is saved and of the leaves, and the end of the record."""
    inputs, outputs = _record(ctx)
    ctx.record = None
    reached, arrived = _arrived(outputs, grads)
    return torch.autograd.grad(reached, (*inputs, *ctx.leaves), arrived, allow_unused=True)


def _arrived(outputs: Sequence[Tensor], grads: Sequence[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs that a gradient has come for, and those gradients."""
    pairs = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if grad is not None]
    return [output for output, _ in pairs], [grad for _, grad in pairs]
