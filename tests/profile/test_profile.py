"""A profile's parts sum to the step, every part is found, and a GPU's trace is read as it should be."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.config import load_config
from megatron_hammer.costs import budget
from megatron_hammer.costs.flops import flops_per_token
from megatron_hammer.kernels.ranges import GRADIENT, HEAD, LINEAR
from megatron_hammer.parallel.board import StatusSlot
from megatron_hammer.parallel.context import ParallelContext, build_parallel_context
from megatron_hammer.profile.plots import draw_profile
from megatron_hammer.profile.profile import ProfileOptions, _profile, for_profiling, profile_step, profile_table
from megatron_hammer.profile.trace import PREFIX, Traffic, memory_of_step, parts_of_trace, read_trace, traffic
from megatron_hammer.profile.workload import RecordedRanges, record_waits
from megatron_hammer.train.build import build
from tests.distributed import run_distributed
from tests.train.runs import ROOT, TINY, environment

ALWAYS = (
    budget.LAYER_PRODUCTS, budget.HEAD_PRODUCTS, budget.ATTENTION, budget.NORM, budget.ROPE, budget.SWIGLU,
    budget.EMBEDDING, budget.LOSS, budget.GRADIENTS, budget.OPTIMIZER,
)  # fmt: skip

WORK = re.compile(
    "mm$|mm_|linear|attention|norm|rope|silu|swiglu|softmax|embedding|sqrt|addc|lerp|rsqrt|adam", re.IGNORECASE
)
"""Operations that belong to a part."""


def _check(report: dict[str, Any], folder: Path) -> None:
    """What holds for every profile on a CPU."""
    parts = {part["name"]: part for part in report["parts"]}
    for name in ALWAYS:
        assert parts[name]["ms"] > 0 and parts[name]["limit_ms"] > 0, name
    total = sum(part["ms"] for part in parts.values()) + report["left_out_ms"]
    assert total == pytest.approx(report["step_ms"], rel=1e-6), "the parts are the step"
    assert report["limit_ms"] == pytest.approx(sum(part["limit_ms"] or 0 for part in parts.values()))
    assert report["step_ms"] > 0 and report["step_ms_without_profiler"] > 0

    events = read_trace(folder / "trace.json.gz")
    others = {name for name in parts_of_trace(events, "cpu").operations[budget.OTHER] if WORK.search(name)}
    assert not others, "operations without a part are the small ones about weights, sums and losses"
    assert sum(e["name"] == "hammer/step" and e.get("cat") == "user_annotation" for e in events) == report["steps"]
    assert json.loads((folder / "profile.json").read_text()) == report
    width, height = _png_size(folder / "profile.png")
    assert 1000 < width < 2000 and 600 < height < 3000
    assert sorted(p.name for p in folder.iterdir()) == ["profile.json", "profile.png", "trace.json.gz"]
    for name in parts:
        assert name in profile_table(report)


def _png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_random_tokens_on_torch_kernels(tmp_path: Path) -> None:
    """In fp32, with a vocabulary that needs no padding: the products seen are the products needed."""
    kernels = [f"kernels.{name}=torch" for name in ("norm", "rope", "swiglu", "adamw", "loss")]
    config = load_config(TINY, ["model.vocab_size=384", "train.device=cpu", *kernels])
    lines: list[str] = []
    report = profile_step(config, ProfileOptions(tmp_path, steps=2, flops=1e11), lines.append)
    _check(report, tmp_path)
    assert report["rates"]["tflops"] == 0.1 and report["rates"]["measured"] == ["bandwidth"]
    assert any("profiling 2 steps" in line for line in lines) and "wrote" in lines[-1]

    per_token, tokens = flops_per_token(config.model, config.data.seq_length)[1], config.tokens_per_step
    assert report["flops_needed"] == pytest.approx(per_token * tokens, rel=1e-12)
    assert report["product_flops_counted"] == pytest.approx(report["product_flops_needed"], rel=1e-12)

    memory = {kind["name"]: kind["mib"] * 2**20 for kind in report["memory"]["kinds"]}
    assert memory["gradients"] == memory["weights"] == memory["optimizer state"] / 2, "fp32: the master is the weight"
    assert memory["weights"] >= 4 * report["parameters"]
    h, layers, rows = config.model.hidden_size, config.model.num_layers, 2 * config.data.seq_length
    assert memory["activations"] > 4 * rows * h * layers * 4, "at least input, qkv, gate and up of each layer"
    assert memory["temporary"] > 0


def test_a_run_with_sources_phases_and_a_ramp(data: Path, tmp_path: Path) -> None:
    """What is reported is of the steps that are profiled: those of the first phase, of full size."""
    kernels = [f"kernels.{name}=torch" for name in ("norm", "rope", "swiglu", "adamw", "loss")]
    first = f"{{train: {{{data}/a: 1, {data}/x: 1}}, samples: 802, seq_length: 32}}"
    phases = f"data.phases=[{first}, {{train: {{{data}/b: 1}}}}]"
    ramp, epochs = "train.batch_size_ramp={start: 2, increment: 2, samples: 1000}", "data.max_epochs=30"
    config = load_config(TINY, ["model.vocab_size=384", "train.device=cpu", phases, ramp, epochs, *kernels])
    report = profile_step(config, ProfileOptions(tmp_path, steps=1, flops=1e11, bandwidth=1e10), lambda text: None)
    assert (report["seq_length"], report["micro_batches"], report["micro_batch_size"]) == (32, 4, 2)
    assert report["product_flops_counted"] == pytest.approx(report["product_flops_needed"], rel=1e-12)


def test_real_documents_in_bf16_by_the_program(data: Path, tmp_path: Path) -> None:
    """The second config: masks, halves, tied embeddings, whatever kernels are chosen; through the command line."""
    out = tmp_path / "profile"
    command = [sys.executable, "tools/profile_step.py", str(TINY), f"data.train={data}/a", "model.vocab_size=301",
               "data.attention_mask=document", "train.precision=bf16", "model.tie_word_embeddings=true",
               "train.device=cpu", "train.recompute=selective", "kernels.swiglu=torch",
               f"train.output={tmp_path / 'untouched'}", "--out", str(out), "--steps", "1",
               "--bandwidth", "20", "--peak-tflops", "0.2"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment(), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "profile.json").read_text())
    _check(report, out)
    assert report["data"] == "data.train" and report["kernels"]["attention"] in ("fused", "sdpa-documents")
    needed, counted = report["product_flops_needed"], report["product_flops_counted"]
    assert 1 < counted / needed < 384 / 301, "the head's padding"
    attention = next(p for p in report["parts"] if p["name"] == budget.ATTENTION)
    assert attention["limit_ms"] > 0 and "at the peak" in done.stdout
    products = parts_of_trace(read_trace(out / "trace.json.gz"), "cpu").operations[budget.LAYER_PRODUCTS]
    again = [name for name in products if "silu" in name.lower() or "scaled_dot_product" in name]
    assert not again, "what is recomputed for a linear layer's backward counts for the operation's part"
    assert "USDT" not in done.stderr and not (tmp_path / "untouched").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(tmp_path: Path) -> None:
    config = load_config(TINY, ["model.vocab_size=384", "train.device=cuda", "train.precision=bf16"])
    report = profile_step(config, ProfileOptions(tmp_path, steps=2))
    parts = {part["name"]: part["ms"] for part in report["parts"]}
    assert all(parts[name] > 0 for name in ALWAYS) and parts[budget.OTHER] < 0.1 * report["step_ms"]
    assert sum(parts.values()) + report["left_out_ms"] == pytest.approx(report["step_ms"], rel=1e-6)
    assert report["product_flops_counted"] == pytest.approx(report["product_flops_needed"], rel=1e-12)
    memory = {kind["name"]: kind["mib"] for kind in report["memory"]["kinds"]}
    assert memory["optimizer state"] == 3 * memory["gradients"] and memory["activations"] > 0


def test_ranges_are_recorded_in_their_block_only() -> None:
    """A step looks the same to a profiler as without ranges, until they are recorded; then every part has its own."""
    config = load_config(TINY, ["model.vocab_size=300", "train.device=cpu"])
    ranges = RecordedRanges()
    model, optimizer = build(config, ParallelContext.single(), ranges)
    tokens = torch.randint(300, (2, 9))

    def names() -> set[str]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorder:
            optimizer.store.begin(first=True, last=True)
            model(tokens[:, :-1], tokens[:, 1:]).sum().backward()
            optimizer.clip_grad_norm(1.0)
            optimizer.step(1e-3)
        return {event.name.removeprefix(PREFIX) for event in recorder.events() if event.name.startswith(PREFIX)}

    assert names() == set()
    with pytest.raises(RuntimeError), ranges.recorded():
        assert names() == {
            budget.EMBEDDING, LINEAR, budget.ATTENTION, budget.NORM, budget.ROPE, budget.SWIGLU, HEAD, GRADIENT,
            budget.OPTIMIZER,
        }  # fmt: skip
        raise RuntimeError
    assert names() == set()


def test_a_status_slot_that_shows_waits_still_says_that_the_rank_waits() -> None:
    """The launcher's: of ranks that failed, those that were waiting are not to blame."""
    status, ranges = StatusSlot(), RecordedRanges()
    record_waits(status, ranges)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorder, ranges.recorded():
        for _ in range(2):
            with status.waits("all_reduce"):
                assert status.is_waiting
                status.mark("a phase")  # another note within the same wait
            status.mark("no wait")
    names = [event.name for event in recorder.events() if event.name.startswith(PREFIX)]
    assert names == 2 * [PREFIX + budget.COMMUNICATION] and not status.is_waiting


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"flops": -1.0}, {"bandwidth": float("nan")}])
def test_numbers_are_checked(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"E247.*must be positive"):
        profile_step(load_config(TINY), ProfileOptions(tmp_path / "none", **wrong))
    assert not (tmp_path / "none").exists()


def test_a_layout_needs_its_ranks(tmp_path: Path) -> None:
    config = load_config(TINY, ["model.vocab_size=384", "parallel.tensor_model_parallel_size=2"])
    with pytest.raises(ConfigError, match=r"E248.*tensor_model_parallel_size=2 .*--nproc 2 .*parallel_size=1 "):
        profile_step(config, ProfileOptions(tmp_path))


def _profiled(rank: int, overrides: list[str], folder: Path) -> dict[str, Any] | None:
    options, ranges, status = ProfileOptions(folder, steps=1, ranks=2), RecordedRanges(), StatusSlot()
    config = for_profiling(load_config(TINY, ["model.vocab_size=384", "train.device=cpu", *overrides]), options)
    config.validate(2)
    record_waits(status, ranges)
    ctx = build_parallel_context(config.grid(2), torch.device("cpu"), status=status)
    return _profile(config, options, ctx, ranges, lambda text: None)


@pytest.mark.parametrize(
    "overrides, kinds",
    [
        (["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true",
          "parallel.tp_comm_overlap=chunks"], {"send", "recv", "all_gather", "all_reduce"}),
        (["parallel.shard=weights"], {"broadcast", "send", "recv", "all_reduce"}),
        (["parallel.context_parallel_size=2", "data.attention_mask=document"],
         {"broadcast", "send", "recv", "all_gather", "all_reduce"}),
        (["parallel.pipeline_model_parallel_size=2"], {"send", "recv", "all_reduce"}),
    ],
    ids=["tp", "weights", "cp", "pp"],
)  # fmt: skip
def test_what_two_ranks_communicate(overrides: list[str], kinds: set[str], tmp_path: Path) -> None:
    """Each rank leaves a trace; waiting is the part "communication", and no more than all of it is beside work."""
    report, _ = run_distributed(2, _profiled, overrides, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "profile.json", "profile.png", "trace-rank0.json.gz", "trace-rank1.json.gz",
    ]  # fmt: skip
    rows = {row["name"]: row for row in report["communication"]}
    assert set(rows) == kinds
    assert all(row["count"] > 0 and 0 <= row["beside_ms"] <= row["ms"] for row in rows.values())
    assert sum(row["beside_ms"] for row in rows.values()) > 0
    parts = {part["name"]: part["ms"] for part in report["parts"]}
    assert parts[budget.COMMUNICATION] > 0 and report["limit_ms"] is None
    assert sum(parts.values()) + report["left_out_ms"] == pytest.approx(report["step_ms"], rel=1e-6)
    assert "rank 0 of 2" in profile_table(report) and all(name in profile_table(report) for name in kinds)


# ---- traces written by hand ------------------------------------------------------------------------------------------


def _event(name: str, start: float, stop: float, category: str = "cpu_op", thread: int = 1, **args: Any) -> dict:
    return {"ph": "X", "name": name, "cat": category, "tid": thread, "ts": start, "dur": stop - start, "args": args}


def _range(name: str, start: float, stop: float) -> dict:
    return _event(f"hammer/{name}", start, stop, "user_annotation")


def _node(name: str, start: float, stop: float, sequence: int, thread: int = 1) -> dict:
    return _event(name, start, stop, thread=thread, **{"Sequence number": sequence, "Fwd thread id": 1})


def _made(name: str, start: float, stop: float, sequence: int) -> dict:
    return _event(name, start, stop, **{"Sequence number": sequence, "Fwd thread id": 0})


def _sorted(events: list[dict]) -> list[dict]:
    return sorted(events, key=lambda e: (e["ts"], -e["dur"]))


FORWARD = [
    _range("step", 0, 100),
    _range("linear", 10, 20),
    _made("_Linear", 11, 19, 7),
    _event("aten::mm", 12, 18, **{"Input Dims": [[4, 5], [5, 6]]}),
    _range("head", 20, 30),
    _made("_HeadLoss", 20, 30, 8),
    _event("aten::mm", 21, 24, **{"Input Dims": [[4, 5], [5, 2]]}),
    _range("weight gradient", 25, 29),
    _event("aten::addmm", 26, 28, **{"Input Dims": [[5, 2], [5, 4], [4, 2]]}),
]


def test_a_cpu_trace() -> None:
    """Backward is found by its sequence number; Python in a range is the part's, outside of all it is a gap."""
    backward = [
        _node("autograd::engine::evaluate_function: _LinearBackward", 40, 60, 7),
        _event("aten::mm", 42, 50, **{"Input Dims": [[4, 6], [6, 5]]}),
        _range("weight gradient", 50, 58),
        _event("aten::mm", 51, 54),
        _event("aten::add_", 54, 58),
        _event("autograd::engine::evaluate_function: torch::autograd::AccumulateGrad", 60, 63),
        _event("aten::add_", 70, 72),
        _range("optimizer, clipping", 80, 95),
        _event("aten::mul", 85, 90, thread=2),  # another thread's: not the step's time
    ]
    measured = parts_of_trace(_sorted(FORWARD + backward), "cpu")
    expected = {
        budget.LAYER_PRODUCTS: 10 + 20 - 1 - 4,  # Python and views included
        budget.GRADIENTS: 2 + 5 + 3,  # in the head; in the layer, around its product; AccumulateGrad
        budget.HEAD_PRODUCTS: 3 + 2,
        budget.LOSS: 10 - 3 - 4,
        budget.OPTIMIZER: 15,
        budget.OTHER: 2,
        budget.GAPS: 10 + 10 + 7 + 8 + 5,
    }
    assert {k: v for k, v in measured.parts.items() if v} == expected and measured.wall == 100 == sum(expected.values())
    assert measured.flops[budget.LAYER_PRODUCTS] == 2 * 4 * 5 * 6 * 2
    assert measured.flops[budget.HEAD_PRODUCTS] == 2 * 4 * 5 * 2 * 2
    assert measured.operations[budget.GAPS]["hammer/step"] == 40
    assert measured.longest(budget.LAYER_PRODUCTS, 1) == [("aten::mm", 6 + 8 + 3)]


def test_a_gpu_trace() -> None:
    """Kernels belong to what launched them, from the thread of backward too; communication counts where it is alone."""

    def launch(at: float, correlation: int, thread: int = 1) -> dict:
        return _event("cudaLaunchKernel", at, at + 0.5, "cuda_runtime", thread, correlation=correlation)

    def kernel(name: str, start: float, stop: float, correlation: int, stream: int = 7) -> dict:
        return _event(name, start, stop, "kernel", stream, correlation=correlation)

    events = [
        *FORWARD,
        launch(13, 1),
        launch(22, 2),
        launch(24.2, 3),
        _node("autograd::engine::evaluate_function: _LinearBackward", 31, 39, 7, thread=2),
        launch(32, 4, thread=2),
        _event("c10d::allreduce_", 35, 38, thread=2),
        launch(36, 5, thread=2),
        kernel("gemm", 15, 35, 1),
        kernel("gemm", 36, 50, 2),
        kernel("softmax", 50, 60, 3),
        kernel("memset", 60, 70, 4),
        kernel("ncclDevKernel_AllReduce", 65, 85, 5, stream=8),
        kernel("unknown", 90, 93, 99),
        kernel("before", -5, 2, 98),
    ]
    measured = parts_of_trace(_sorted(events), "cuda")
    expected = {
        budget.LAYER_PRODUCTS: 20 + 10,
        budget.HEAD_PRODUCTS: 14,
        budget.LOSS: 10,
        budget.COMMUNICATION: 15,
        budget.OTHER: 3 + 2,
        budget.GAPS: 13 + 1 + 5 + 7,
    }
    assert measured.parts == expected and sum(expected.values()) == 100
    casts = parts_of_trace(_sorted(events), "cuda", casts=True)
    assert casts.parts[budget.CASTS] == 10, "the kernel of backward that no product launched"


def test_what_is_under_way_while_something_else_is_done() -> None:
    """On a CPU: not while the main thread waits. Messages lie over what it does, and belong to no part."""
    events = [
        *FORWARD,
        _event("gloo:all_reduce", 15, 45, "user_annotation", thread=9),  # waited for from 40 on
        _event("gloo:recv", 50, 70, "user_annotation"),  # in the main thread, which goes on with a product
        _event("aten::mm", 52, 60),
        _range("communication", 40, 45),
        _range("communication", 60, 69),
        _event("gloo:all_reduce", 140, 150, "user_annotation", thread=9),  # after the step
    ]
    assert traffic(_sorted(events), "cpu") == {"all_reduce": Traffic(1, 30, 25), "recv": Traffic(1, 20, 11)}
    parts = parts_of_trace(_sorted(events), "cpu").parts
    assert parts[budget.COMMUNICATION] == 5 + 9 and parts[budget.OTHER] == 8


def test_a_compiled_layer() -> None:
    events = [
        _range("step", 0, 100),
        _event("Torch-Compiled Region: 0/0", 10, 50),
        _made("CompiledFunction", 12, 48, 3),
        _event("aten::mm", 15, 25),
        _event("aten::_scaled_dot_product_flash_attention_for_cpu", 30, 37),
        _range("norm, residual", 50, 55),
        _event("Torch-Compiled Region: 1/0", 51, 54),
        _node("autograd::engine::evaluate_function: CompiledFunctionBackward", 60, 90, 3),
        _event("aten::mm", 70, 76),
    ]
    measured = parts_of_trace(_sorted(events), "cpu")
    expected = {
        budget.LAYER_PRODUCTS: 16, budget.ATTENTION: 7, budget.ELEMENTWISE: 40 - 17 + 30 - 6, budget.NORM: 5,
        budget.GAPS: 25,
    }  # fmt: skip
    assert measured.parts == expected
    measured.merge([budget.NORM, budget.ROPE], budget.ELEMENTWISE)
    assert measured.parts[budget.ELEMENTWISE] == 52 and sum(measured.parts.values()) == 100
    assert budget.NORM not in measured.parts


def test_memory_of_a_trace() -> None:
    """Activations are what is there at the head; frees count; the other device's memory does not."""

    def memory(at: float, size: int, device: int = 1) -> dict:
        return {"ph": "i", "name": "[memory]", "cat": "cpu_instant_event", "ts": at, "dur": 0,
                "args": {"Bytes": size, "Device Type": device}}  # fmt: skip

    events = [
        memory(-1, 999), _range("step", 0, 100), memory(1, 100), memory(2, 50), memory(3, -20), memory(4, 7, 0),
        _range("head", 10, 20), memory(11, 200), memory(19, -200), memory(40, -130), memory(60, 90),
        _range("head", 70, 80), memory(101, 5000),
    ]  # fmt: skip
    assert memory_of_step(_sorted(events), "cuda") == (130, 330)
    assert memory_of_step(_sorted(events), "cpu") == (7, 7)


OF_A_STEP: dict[str, Any] = {
    "device": "device " * 20, "processor": "words " * 30, "torch": "2.14", "date": "2026-11-30", "precision": "bf16",
    "parameters": 7_014_656, "micro_batch_size": 4, "micro_batches": 2, "seq_length": 256, "ranks": 1,
    "data": "random tokens", "kernels": {f"kernel{i}": "fused" for i in range(30)}, "recompute": "none",
    "tokens_per_second": 1.0, "step_ms_without_profiler": 1.0,
    "rates": {"tflops": 0.3, "gb_per_second": 13.0, "measured": ["flops"]},
}  # fmt: skip


def test_pictures_with_few_parts_and_with_all(tmp_path: Path) -> None:
    """Nothing of a limit, a part of no length, names without room, long lines: still a picture."""
    memory = {"peak_mib": 0.0, "source": "none", "kinds": [{"name": "weights", "mib": 0.0, "share": 0.0}]}
    sizes = []
    for names in ((budget.GAPS,), budget.PARTS):
        parts = [{"name": n, "ms": float(i), "share": 0.1, "limit_ms": None if i % 2 else i / 3, "of_limit": None}
                 for i, n in enumerate(names, start=len(names) > 1)]  # fmt: skip
        parts[0]["ms"] = 1e-4
        sums = {key: sum(p[part] or 0 for p in parts) for key, part in (("step_ms", "ms"), ("limit_ms", "limit_ms"))}
        draw_profile(OF_A_STEP | {"parts": parts, "memory": memory, **sums}, tmp_path / "p.png")
        sizes.append(_png_size(tmp_path / "p.png"))
    assert sizes[0][0] == sizes[1][0] and sizes[0][1] + 15 * 30 < sizes[1][1], "a row a part"
