"""The numbers a run reports: FLOP counts, peaks, evaluation."""

from __future__ import annotations

import errno
import itertools
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_hammer.base.errors import from_exception
from megatron_hammer.config import Config, ModelConfig
from megatron_hammer.model.initialise import initialise
from megatron_hammer.model.llama import build_stage
from megatron_hammer.model.parameters import count_parameters, parameter_table
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.sampling.samples import ValidData
from megatron_hammer.train.build import build
from megatron_hammer.train.evaluate import evaluate
from megatron_hammer.train.metrics import Reporter, board_folder, flops_per_token, peak_tflops
from megatron_hammer.train.source_sums import Sources
from megatron_hammer.train.step import train_step
from tests.distributed import run_distributed
from tests.host_waits import OperationNames
from tests.model.tiny import make_context, rank_batches, tiny_config

HAMMERLLM = ModelConfig(2048, 5632, 22, 32, 4, vocab_size=105_789)


def test_flops_of_hammerllm() -> None:
    """6 x 1,185,540,096 matrix weights, plus 12 (6) L H s: 8.2205 (7.6669) GFLOP a token."""
    full, causal = flops_per_token(HAMMERLLM, 2048)
    assert full == 6 * 1_185_540_096 + 12 * 22 * 2048 * 2048
    assert causal == 6 * 1_185_540_096 + 6 * 22 * 2048 * 2048
    assert count_parameters(HAMMERLLM) == 1_402_288_128
    tied = ModelConfig(2048, 5632, 22, 32, 4, vocab_size=105_789, tie_word_embeddings=True)
    assert flops_per_token(tied, 2048) == (full, causal), "a tied table is still multiplied with"


def test_peaks() -> None:
    bf16 = tiny_config(train__precision="bf16")
    assert peak_tflops(bf16, "NVIDIA H100 80GB HBM3") == 989 and peak_tflops(bf16, "NVIDIA A100-SXM4-80GB") == 312
    assert peak_tflops(bf16, "NVIDIA H100 PCIe") == 756 and peak_tflops(bf16, "cpu") is None
    assert peak_tflops(tiny_config(), "NVIDIA H200") is None, "no fp32 peak is claimed"
    assert peak_tflops(tiny_config(log__peak_tflops=1.5), "cpu") == 1.5


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 NVL", 835.5), ("NVIDIA H200 NVL", 835.5), ("NVIDIA H200", 989), ("NVIDIA H800", 989),
        ("NVIDIA H20", 148), ("NVIDIA L20", 119.5), ("NVIDIA L40S", 362.05), ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA B200", 2250), ("NVIDIA B300 SXM6 AC", 2250), ("AMD Instinct MI300X", 1307.4), ("NVIDIA L4", None),
        ("NVIDIA GH200 480GB", 989), ("Tesla T4", None),
    ],
)  # fmt: skip
def test_peaks_by_whole_words_of_the_name(name: str, peak: float | None) -> None:
    """H20 is no H200, and an H100 NVL no H100 SXM."""
    assert peak_tflops(tiny_config(train__precision="bf16"), name) == peak


@pytest.mark.parametrize("micro_batch_size", [1, 3, 64])
def test_evaluation_counts_each_target_once(data: Path, micro_batch_size: int) -> None:
    """Against a plain sum over the whole file; the padded end of the last window does not count."""
    config = tiny_config()
    ctx = ParallelContext.single()
    model = build_stage(config.model, ctx)
    initialise(model, parameter_table(config.model), seed=1)
    valid = ValidData("x", data / "x", 32)
    stream = np.concatenate([valid.dataset.read(i) for i in range(len(valid.dataset.lengths))]).astype(np.int64)
    sizes = torch.arange(301) % 5 << 32 | torch.arange(301) % 3  # ids 0, 5, 10 ... stand for no bytes, as specials do
    total, targets = 0.0, 0
    for start in range(0, len(stream) - 1, 32):
        window = torch.from_numpy(stream[start : start + 33])
        logits = model.logits(window[None, :-1])[0]
        total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
        targets += len(window) - 1
    result = evaluate(model, valid, micro_batch_size, sizes, ctx)
    assert targets == len(stream) - 1
    assert result.loss == pytest.approx(total / targets, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(total / targets), rel=1e-4)
    expected_bytes = int((stream[1:] % 5).sum())
    assert result.bits_per_byte == pytest.approx(total / math.log(2) / expected_bytes, rel=1e-5)
    expected_characters = int((stream[1:] % 3).sum())
    assert result.bits_per_character == pytest.approx(total / math.log(2) / expected_characters, rel=1e-5)
    plain = evaluate(model, valid, micro_batch_size, None, ctx)
    assert plain.bits_per_byte is None and plain.bits_per_character is None


def test_evaluation_reads_each_document_alone(data: Path) -> None:
    """With document masks: against each piece of a document run by itself; the target of its last token counts too."""
    config = tiny_config(data__attention_mask="document")
    ctx = ParallelContext.single()
    model, _ = build(config, ctx)
    causal = build_stage(config.model, ctx)
    causal.load_state_dict(model.state_dict())
    valid = ValidData("x", data / "x", 32, document_mask=True)
    total, targets = 0.0, 0
    for j in range(len(valid)):
        window = valid.read([j])
        assert window.loss_weights is not None and isinstance(window.documents, np.ndarray)
        for start, stop in itertools.pairwise(window.documents.tolist()):
            tokens, labels = (torch.from_numpy(x[:, start:stop]) for x in (window.tokens, window.labels))
            counted = torch.from_numpy(window.loss_weights[0, start:stop])
            total += float((causal(tokens, labels)[0].detach() * counted).sum())
            targets += int(counted.sum())
    assert targets == valid.dataset.num_tokens - 1
    for micro_batch_size in (1, 3):
        result = evaluate(model, valid, micro_batch_size, None, ctx)
        assert result.loss == pytest.approx(total / targets, rel=1e-5)
    shared = tiny_config(data__attention_mask="document", parallel__context_parallel_size=2)
    for loss in run_distributed(2, _evaluated, shared, data / "x"):
        assert loss == pytest.approx(total / targets, rel=1e-5)


def _evaluated(rank: int, config: Config, prefix: Path) -> float:
    """Loss of this set with the initial weights."""
    ctx = make_context(config)
    model, _ = build(config, ctx)
    return evaluate(model, ValidData("x", prefix, 32, document_mask=True), 3, None, ctx).loss


@pytest.mark.parametrize(
    "precision, mask", [("fp32", "causal"), ("bf16", "causal"), ("fp16", "causal"), ("bf16", "document")]
)
def test_a_step_never_waits_for_the_device(precision: str, mask: str) -> None:
    """No operation of a step turns a tensor into a Python value or has a shape that depends on values."""
    config = tiny_config(
        train__precision=precision,
        model__hidden_size=32,
        model__ffn_hidden_size=64,
        data__seq_length=16,
        data__attention_mask=mask,
        # A CPU's compiled kernels read divisor and skip where they lie; a GPU's do not, but this mode sees torch only.
        **{f"kernels__{name}": "torch" for name in ("norm", "rope", "swiglu", "loss", "adamw")},
    )
    ctx = ParallelContext.single()
    model, optimizer = build(config, ctx)
    batches = rank_batches(config, 1, ctx)
    with OperationNames() as seen:
        train_step(model, optimizer, batches, config, 1, ctx, sources=Sources(2, torch.arange(301)))
    assert not seen.waits()
    assert "aten::_fused_adamw_" in seen.names or "aten::_fused_adamw" in seen.names, "the mode must see the update too"


def test_tensorboard_calls_a_run_by_its_name(tmp_path: Path) -> None:
    """Also one that older versions began, and one whose folder was renamed since."""
    run, old = tmp_path / "中文 run", tmp_path / "old"
    assert board_folder(run) == run / "tensorboard" / "中文 run" and not run.exists()
    (old / "tensorboard").mkdir(parents=True)
    (old / "tensorboard" / "events.out.tfevents.1.host.2.0").write_bytes(b"x")
    assert board_folder(old) == old / "tensorboard" / "old"
    assert [path.name for path in (old / "tensorboard").iterdir()] == ["old"]
    assert (old / "tensorboard" / "old" / "events.out.tfevents.1.host.2.0").read_bytes() == b"x"
    renamed = old.rename(tmp_path / "new")
    assert board_folder(renamed) == renamed / "tensorboard" / "old"


class FullBoard:
    """A writer of TensorBoard on a full disk: torch's own names no file, and fails again when it is closed."""

    def __init__(self, folder: Path) -> None:
        self.log_dir = str(folder)

    def close(self) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def flush(self) -> None:
        self.close()

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.close()


def test_a_full_disk_of_tensorboard_names_its_folder(tmp_path: Path) -> None:
    config = tiny_config(train__output=str(tmp_path), log__tensorboard=False)
    line = {"step": 1, "loss": 2.0, "grad_norm": 1.0, "lr": 0.1, "tokens_per_second": 1.0}
    for act in (lambda reporter: reporter.step(line, {}), Reporter.sync):
        reporter = Reporter(config, 0, (1.0, 1.0), None, 1)
        with pytest.raises(OSError) as caught, reporter:
            reporter.board = FullBoard(tmp_path / "tensorboard")
            act(reporter)
        said = str(from_exception(caught.value, "rank 0"))
        assert f"{tmp_path}/tensorboard could not be used" in said and "100 bytes needed" in said and "MB free" in said
        assert reporter.file.file.closed
