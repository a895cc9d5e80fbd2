"""Whole runs: resume is exact, order does not depend on the layout, a stop saves, mistakes are one line."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from megatron_hammer.base import environment as variables
from megatron_hammer.base.errors import HammerError
from megatron_hammer.checkpoint import folder, retention
from megatron_hammer.checkpoint.folder import find_checkpoints, newest_checkpoint
from megatron_hammer.checkpoint.manifest import Manifest
from megatron_hammer.kernels.native import cpu
from megatron_hammer.metrics.reporter import BOARD_GROUPS
from megatron_hammer.train.course import course_of
from megatron_hammer.train.prepare import prepare
from megatron_hammer.train.run import announcement, run_rank
from tests.distributed import run_distributed
from tests.train.runs import (
    checkpoint_bytes,
    command,
    config_for,
    environment,
    metrics,
    overrides,
    run,
    train_here,
    write_dataset,
)

LAYOUTS = {
    "one rank, bf16": (1, ["train.precision=bf16"]),
    "DP 2": (2, []),
    "TP 2 + SP, bf16": (2, ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true",
                            "train.precision=bf16"]),
}  # fmt: skip


def _kill_after(ranks: int, arguments: list[str], metrics_file: Path, lines: int, how: signal.Signals) -> int:
    """Start a run, send ``how`` to its launcher once so many steps are on disk, and return its exit code."""
    process = subprocess.Popen(command(ranks, arguments), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               env=environment())  # fmt: skip
    deadline = time.monotonic() + 90
    while not (metrics_file.exists() and metrics_file.read_bytes().count(b"\n") >= lines):
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(how)
    return process.wait(timeout=60)


@pytest.mark.parametrize("name", LAYOUTS)
def test_killed_and_resumed_is_bit_equal(name: str, data: Path, tmp_path: Path) -> None:
    """SIGKILL somewhere after step 4, then the same command again: metrics and every tensor byte are equal.

    The run that nobody stops is one of the pool's processes, not the launcher's: that makes no difference either.
    """
    ranks, extra = LAYOUTS[name]
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    steps = ["train.num_steps=16"]  # long enough that the kill falls inside
    assert set(run_distributed(ranks, train_here, overrides(data, whole, *extra, *steps))) == {0}
    code = _kill_after(ranks, overrides(data, torn, *extra, *steps), torn / "metrics.jsonl", 5, signal.SIGKILL)
    assert code == -signal.SIGKILL
    resumed = newest_checkpoint(torn)
    assert resumed is not None and len(metrics(whole)) == 16
    again = run(ranks, overrides(data, torn, *extra, *steps))
    assert again.returncode == 0, again.stderr
    assert f"resuming from {resumed.folder}" in again.stdout
    assert metrics(torn) == metrics(whole)
    assert checkpoint_bytes(torn, 16) == checkpoint_bytes(whole, 16)
    assert "valid/x/loss" in metrics(whole)[3] and "valid/y/perplexity" in metrics(whole)[15]
    assert [p.name for p in find_checkpoints(torn)] == [p.name for p in find_checkpoints(whole)]


def test_sigterm_saves_and_exits_75(data: Path, tmp_path: Path) -> None:
    arguments = overrides(data, tmp_path / "run", "train.num_steps=3000", "train.eval_interval_steps=null",
                          "checkpoint.save_interval_steps=null", "schedule.style=constant")  # fmt: skip
    code = _kill_after(2, arguments, tmp_path / "run" / "metrics.jsonl", 3, signal.SIGTERM)
    assert code == 75
    saved = newest_checkpoint(tmp_path / "run")
    assert saved is not None
    step = saved.step
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, step + 1)), "every line up to the checkpoint, none beyond"
    assert 3 <= step < 3000
    more = f"train.num_steps={step + 4}"
    again = run(2, [*arguments, more])
    assert again.returncode == 0, again.stderr
    straight = [*arguments, more, f"train.output={tmp_path / 'straight'}"]
    assert run_distributed(2, train_here, straight) == [0, 0]
    assert metrics(tmp_path / "run") == metrics(tmp_path / "straight")


def test_sample_digests_do_not_depend_on_the_layout(data: Path, tmp_path: Path) -> None:
    """DP 1 and 2, and TP, PP and CP 2 x DP 2 consume the same samples in the same order, and learn the same."""
    layouts = {"dp1": (1, []), "dp2": (2, []), "tp2dp2": (4, ["parallel.tensor_model_parallel_size=2"]),
               "pp2dp2": (4, ["parallel.pipeline_model_parallel_size=2"]),
               "cp2dp2": (4, ["parallel.context_parallel_size=2"])}  # fmt: skip
    seen = {}
    for name, (ranks, extra) in layouts.items():
        arguments = overrides(data, tmp_path / name, *extra)
        codes = run_distributed(ranks, train_here, arguments) if ranks > 1 else [train_here(0, arguments)]
        assert codes == [0] * ranks
        seen[name] = metrics(tmp_path / name)
    for lines in seen.values():
        assert [x["samples_digest"] for x in lines] == [x["samples_digest"] for x in seen["dp1"]]
        assert [x["consumed_samples"] for x in lines] == [8 * (i + 1) for i in range(12)]
        for mine, reference in zip(lines, seen["dp1"], strict=True):
            assert mine["loss"] == pytest.approx(reference["loss"], rel=1e-4)
            if "valid/x/loss" in reference:
                assert mine["valid/x/loss"] == pytest.approx(reference["valid/x/loss"], rel=1e-4)
                assert mine["valid/y/loss"] == pytest.approx(reference["valid/y/loss"], rel=1e-4)
    assert len({x["samples_digest"] for x in seen["dp1"]}) == 12


def test_another_layout_goes_on(data: Path, tmp_path: Path) -> None:
    """A few steps on each of some layouts, and on one rank: the loss goes on as if nothing had happened."""
    out, tp, pp = tmp_path / "moved", "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"
    cp = "parallel.context_parallel_size=2"
    for steps, ranks, extra in ((2, 2, [cp]), (5, 2, [pp]), (7, 2, [tp]), (10, 4, [pp, tp]), (12, 1, [])):
        arguments = overrides(data, out, "schedule.style=constant", f"train.num_steps={steps}", *extra)
        codes = run_distributed(ranks, train_here, arguments) if ranks > 1 else [train_here(0, arguments)]
        assert codes == [0] * ranks
    assert train_here(0, overrides(data, tmp_path / "still", "schedule.style=constant")) == 0
    for moved, still in zip(metrics(out), metrics(tmp_path / "still"), strict=True):
        assert moved["samples_digest"] == still["samples_digest"]
        assert moved["loss"] == pytest.approx(still["loss"], rel=1e-4)


def test_another_batch_size_goes_on_in_the_same_order(data: Path, tmp_path: Path) -> None:
    """Consumed samples, not steps, are the loader's state."""
    assert train_here(0, overrides(data, tmp_path / "a", "train.num_steps=4")) == 0
    larger = ("train.num_steps=6", "train.global_batch_size=16", "--accept=train.global_batch_size")
    assert train_here(0, overrides(data, tmp_path / "a", *larger)) == 0
    assert [line["consumed_samples"] for line in metrics(tmp_path / "a")] == [8, 16, 24, 32, 48, 64]
    smaller = overrides(data, tmp_path / "a", "train.num_steps=8", "train.global_batch_size=4")
    course = course_of(config_for(smaller), newest_checkpoint(tmp_path / "a"))
    assert [course.samples(n) for n in range(9)] == [0, 8, 16, 24, 32, 48, 64, 68, 72] and course.num_samples == 72
    assert [course.steps(sample) for sample in (32, 33, 48, 49, 64, 65, 69)] == [4, 5, 5, 6, 6, 7, 8]


def test_a_run_in_megatron_s_order_goes_on_with_smaller_batches(data: Path, tmp_path: Path) -> None:
    """The order has as many samples as will be read: those behind the run, and the smaller steps to come."""
    of_megatron = ("data.order=megatron", "schedule.style=constant")
    assert train_here(0, overrides(data, tmp_path / "a", *of_megatron, "train.num_steps=6")) == 0
    smaller = ("train.num_steps=8", "train.global_batch_size=2")
    accepted = [f"--accept={name.partition('=')[0]}" for name in smaller]
    assert train_here(0, overrides(data, tmp_path / "a", *of_megatron, *smaller, *accepted)) == 0
    assert [line["consumed_samples"] for line in metrics(tmp_path / "a")][5:] == [48, 50, 52]


DOCUMENT = "data.attention_mask=document"


def test_document_masks_resume_bit_equal(data: Path, tmp_path: Path) -> None:
    """4 + 4 steps equal 8; the samples are those of a causal run, the losses are not; a resumed run keeps its mask."""
    constant = ("schedule.style=constant", DOCUMENT)
    whole, parts, causal = tmp_path / "whole", tmp_path / "parts", tmp_path / "causal"
    assert train_here(0, overrides(data, whole, *constant, "train.num_steps=8")) == 0
    for steps in (4, 8):
        assert train_here(0, overrides(data, parts, *constant, f"train.num_steps={steps}")) == 0
    assert train_here(0, overrides(data, causal, "schedule.style=constant", "train.num_steps=8")) == 0
    assert metrics(parts)[7]["valid/x/loss"] == metrics(whole)[7]["valid/x/loss"]
    assert checkpoint_bytes(parts, 8) == checkpoint_bytes(whole, 8)
    both = [metrics(out) for out in (whole, causal)]
    assert len({tuple(line["samples_digest"] for line in lines) for lines in both}) == 1
    assert len({tuple(line["loss"] for line in lines) for lines in both}) == 2
    newest = newest_checkpoint(whole)
    assert newest is not None and newest.config["data"]["attention_mask"] == "document"
    for run_folder, changed in ((whole, "causal"), (causal, "document")):
        with pytest.raises(HammerError, match=rf"error\[E580\].*data\.attention_mask={changed}"):
            prepare(config_for(overrides(data, run_folder, f"data.attention_mask={changed}")), 1)


def test_the_attention_backend_is_said_or_refused_at_the_start(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for mask, backend in (("causal", "sdpa"), ("document", "sdpa-documents")):
        backend = "fused" if cpu.attention_is_fast(torch.float32) else backend
        arguments = overrides(data, tmp_path / mask, f"data.attention_mask={mask}", "train.num_steps=1")
        assert run_rank(config_for(arguments), 0, 0, 1, None) == 0
        out = capsys.readouterr().out
        assert f" on cpu, data.attention_mask={mask}:\n" in out
        assert [line.split()[1] for line in out.splitlines() if line.startswith("  attention ")] == [backend]
    # That sdpa knows no documents is seen in the config; that varlen needs a GPU only by a rank, on all of them.
    for name, why in (("sdpa", "cannot do data.attention_mask=document"), ("varlen", "does not run on cpu")):
        refused = run(2, overrides(data, tmp_path / "no", DOCUMENT, f"kernels.attention={name}", "train.device=cpu"))
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1
        assert refused.stderr.startswith(f"error[E209]: kernels.attention={name} {why}; use auto or ")
        assert not (tmp_path / "no").exists()


def test_a_gpu_that_torch_cannot_use_is_spoken_of(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver too old for torch's CUDA: 1.4B parameters went on a CPU without a word."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for device, file, visible, told in (
        ("auto", "/dev/null", None, True), ("auto", "/dev/null", "", False), ("auto", "/dev/no-gpu", None, False),
        ("cpu", "/dev/null", None, False),
    ):  # fmt: skip
        prepared = prepare(config_for(overrides(data, tmp_path / "run", f"train.device={device}")), 1)
        monkeypatch.setattr(variables, "GPU_FILES", (file,))
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        said = announcement(prepared, 1, torch.device("cpu"), "")
        assert ("WARNING: a GPU is here, but torch" in said) == told, (device, file, visible)
        assert ("WARNING: mostly the driver is older" in said) == told
    monkeypatch.setattr(torch.version, "cuda", None)
    prepared = prepare(config_for(overrides(data, tmp_path / "run")), 1)
    monkeypatch.setattr(variables, "GPU_FILES", ("/dev/null",))
    assert "it is built for CPUs; without TORCH_INDEX_URL" in announcement(prepared, 1, torch.device("cpu"), "")


def test_a_dataset_of_one_document_is_noted(data: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "one", 1, seed=0)
    arguments = [*overrides(data, tmp_path / "run"), f"data.train={tmp_path}/one"]
    assert not any("single document" in note for note in prepare(config_for(arguments), 1).data_notes)
    long = [*arguments, "data.seq_length=4000", "model.max_position_embeddings=4000"]
    assert any(
        "data.seq_length=4,000 is longer than all of" in note for note in prepare(config_for(long), 1).data_notes
    )
    noted = prepare(config_for([*arguments, DOCUMENT]), 1).data_notes
    assert any(f"{tmp_path}/one is a single document" in note for note in noted)


def test_init_from_takes_weights_only(data: Path, tmp_path: Path) -> None:
    first = overrides(data, tmp_path / "first")
    assert train_here(0, first) == 0
    second = overrides(data, tmp_path / "second", f"checkpoint.init_from={tmp_path / 'first'}", "train.num_steps=2")
    assert train_here(0, second) == 0
    trained, fresh = metrics(tmp_path / "first"), metrics(tmp_path / "second")
    assert fresh[0]["samples_digest"] == trained[0]["samples_digest"], "a new run starts with its first sample"
    assert fresh[0]["loss"] < trained[0]["loss"] - 0.3, "but not with new weights"


def test_metrics_are_cut_back_to_the_checkpoint(data: Path, tmp_path: Path) -> None:
    """Lines of steps that were lost, and a torn line, go; without a checkpoint all lines go."""
    out = tmp_path / "run"
    arguments = overrides(data, out, "schedule.style=constant")
    assert train_here(0, [*arguments, "train.num_steps=6"]) == 0
    before = metrics(out)
    with (out / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(before[5] | {"step": 7, "loss": 1.0, "tokens_per_second": 1}) + '\n{"step": 8, "lo')
    assert train_here(0, arguments) == 0
    assert metrics(out)[:6] == before and [x["step"] for x in metrics(out)] == list(range(1, 13))
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / "metrics.jsonl").write_text('{"step": 1, "tokens_per_second": 1}\n')
    assert train_here(0, overrides(data, fresh, "train.num_steps=1")) == 0
    assert len(metrics(fresh)) == 1 and "loss" in metrics(fresh)[0]


def test_one_step_run_and_tensorboard(data: Path, tmp_path: Path) -> None:
    """num_steps=1 with a longer warm-up is valid; TensorBoard gets the same numbers."""
    out = tmp_path / "run"
    assert train_here(0, overrides(data, out, "train.num_steps=1", "log.tensorboard=true")) == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard" / "run"))
    events.Reload()
    assert min(tag for tag in events.Tags()["scalars"]) == "loss"  # TensorBoard opens the first group
    line = metrics(out)[0]
    for key in ("loss", "grad_norm", "lr", "valid/x/loss", "valid/y/perplexity"):
        assert events.Scalars(BOARD_GROUPS.get(key, "") + key)[0].value == pytest.approx(line[key], rel=1e-6)
    assert newest_checkpoint(out) is not None


def test_dry_run_prints_and_writes_nothing(data: Path, tmp_path: Path) -> None:
    result = run(2, overrides(data, tmp_path / "run", "train.dry_run=true", "parallel.tensor_model_parallel_size=2"))
    assert result.returncode == 0, result.stderr
    for expected in ("vocab_size: 301", "parameters: ", "2 ranks = TP 2 x DP 1", "8 samples x 32 tokens = 256 tokens"):
        assert expected in result.stdout, result.stdout
    assert not (tmp_path / "run").exists()


MISTAKES = [
    (["optimizer.lrr=1"], "E202", 2),
    (["data.train=null"], "E207", 2),
    (["model.vocab_size=null"], "E207", 2),
    (["parallel.tensor_model_parallel_size=3"], "E205", 2),
    (["data.train={data}/absent"], "E3", 3),
    (["model.vocab_size=300"], "E3", 3),
    (["tokenizer.path={data}/absent.model"], "E3", 3),
    (["checkpoint.init_from={data}/absent"], "E4", 4),
]


@pytest.mark.parametrize("arguments, code, exit_code", MISTAKES, ids=[" ".join(m[0]) for m in MISTAKES])
def test_mistakes_are_found_before_any_rank(
    arguments: list[str], code: str, exit_code: int, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(HammerError) as caught:
        prepare(config_for(overrides(data, tmp_path / "run", *(a.format(data=data) for a in arguments))), 2)
    assert str(caught.value).startswith(f"error[{code}") and caught.value.exit_code == exit_code
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_mistake_is_one_line_and_its_exit_code(data: Path, tmp_path: Path) -> None:
    result = run(2, overrides(data, tmp_path / "run", "model.vocab_size=300"))
    assert result.returncode == 3
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error[E3")
    assert not (tmp_path / "run").exists()


def test_resume_refuses_another_order_and_another_model(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train_here(0, overrides(data, out, "train.num_steps=2")) == 0
    for change, code in (("train.seed=5", 5), ("data.seq_length=16", 5), ("model.num_layers=3", 4)):
        with pytest.raises(HammerError) as caught:
            prepare(config_for(overrides(data, out, change)), 1)
        assert caught.value.exit_code == code and change.split("=")[0] in str(caught.value)


def test_a_run_reads_each_manifest_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest at the start; none of its own at any save, however many are kept; the older ones once."""
    arguments = overrides(data, tmp_path / "run", "checkpoint.save_interval_steps=1", "schedule.style=constant")
    assert train_here(0, [*arguments, "train.num_steps=4", "checkpoint.keep_last=4"]) == 0
    read, original = list[int](), folder.read_manifest

    def counted(path: str | Path) -> Manifest:
        manifest = original(path)
        read.append(manifest.step)
        return manifest

    monkeypatch.setattr(folder, "read_manifest", counted)
    monkeypatch.setattr(retention, "read_manifest", counted)
    assert train_here(0, [*arguments, "train.num_steps=10", "checkpoint.keep_last=3"]) == 0
    assert read[0] == 4 and sorted(read) == [3, 4], "one at the start, and one that was there before, when it counted"


def test_endless_skips_end_the_run(data: Path, tmp_path: Path) -> None:
    """fp16 with a loss scale that can never fit: exit code 9, and no checkpoint of it."""
    arguments = overrides(data, tmp_path / "run", "train.precision=fp16", "optimizer.initial_loss_scale=1e38",
                          "train.max_consecutive_skips=3", "train.num_steps=30")  # fmt: skip
    with pytest.raises(HammerError, match=r"error\[E901\].*3 steps"):
        train_here(0, arguments)
    lines = metrics(tmp_path / "run")
    assert [line["skipped"] for line in lines] == [True] * 3
    assert all(line["grad_norm"] is None for line in lines), "not finite is null"
    assert len({json.dumps(line["loss"]) for line in lines}) == 3, "samples go on; weights do not"


def test_the_plan_is_printed_once_and_guards_the_start(data: Path, tmp_path: Path) -> None:
    """Before the ranks start; a source beyond data.max_epochs is refused there; epochs decide what is drawn."""
    out = tmp_path / "run"
    with pytest.raises(HammerError, match=r"error\[E293\].*data\.max_epochs=0\.01"):
        prepare(config_for(overrides(data, out, "data.max_epochs=0.01")), 1)
    assert prepare(config_for(overrides(data, out, "data.max_epochs=0.01", "train.dry_run=true")), 1).plan is None
    weights = [f"data.train={{{data}/a: 1, {data}/b: 3}}", "data.weights=epochs", "train.num_steps=2"]
    result = run(2, overrides(data, out, *weights))
    assert result.returncode == 0, result.stderr
    plan, ranks = result.stdout.index("plan of 2 steps"), result.stdout.index("parameters in")
    assert plan < ranks and result.stdout.count("plan of") == 1 and "weight (epochs)" in result.stdout
    assert "data.weights=epochs asks for" in result.stdout
    before = metrics(out), checkpoint_bytes(out, 2)
    finished = run(2, overrides(data, out, *weights))
    assert finished.returncode == 0 and "finished" in finished.stdout and "plan of" not in finished.stdout
    assert (metrics(out), checkpoint_bytes(out, 2)) == before, "a finished run changes nothing"
    changed = prepare(config_for(overrides(data, out, *weights[:1], "train.num_steps=3")), 1, accepted=["data.weights"])
    assert any("data.weights: epochs -> share" in line for line in changed.changes) and changed.plan is not None


def test_training_goes_on_without_anybody_who_reads(data: Path, tmp_path: Path) -> None:
    """``| head -1`` and closed streams: every step is made and saved, under the launcher and without it."""
    for name, ranks, redirected in (("head", 2, "2>&1 | head -1"), ("closed", 0, "<&- >&- 2>&-")):
        arguments = command(ranks, overrides(data, tmp_path / name, "train.eval_interval_steps=null"))
        if ranks == 0:
            arguments = [arguments[0], "-m", "megatron_hammer.train", *arguments[5:]]
        line = shlex.join(arguments) + f" {redirected}; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", line], stdout=subprocess.PIPE, timeout=120, env=environment())
        assert done.returncode == 0, (name, done.stdout)
        assert len(metrics(tmp_path / name)) == 12
        newest = newest_checkpoint(tmp_path / name / "checkpoints")
        assert newest is not None and newest.step == 12


def test_text_in_place_of_a_dataset_is_named_before_a_tokenizer_is_missed(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')
    for named in (tmp_path / "x.jsonl", tmp_path):
        with pytest.raises(HammerError, match=r"E330.*preprocess_data\.py --input"):
            prepare(config_for([f"data.train={named}"]), 1)
