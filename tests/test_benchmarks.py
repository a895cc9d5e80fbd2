"""The benchmark programs work; what they measure is no business of a test."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_hammer.config import config_from_tree
from megatron_hammer.costs.flops import flops_per_token
from megatron_hammer.model.parameters import logical_shapes

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SECONDS = 240
PARTS = {
    "tests",
    "ceilings",
    "matmul",
    "kernels",
    "attention",
    "head",
    "step",
    "loop",
    "choices",
    "optimizer",
    "tables",
    "memory",
}


def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARKS / program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment)


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, dict[str, Any]], str, Path]:
    """Results of every part at toy size, the report, the folder of both."""
    folder = tmp_path_factory.mktemp("suite")
    done = run("gpu_suite.py", "--small", "--report", "--results", folder, "--part", *PARTS)
    assert done.returncode == 0, done.stderr
    results = {r["part"]: r["items"] for r in (json.loads(p.read_text()) for p in folder.glob("*.json"))}
    (report,) = folder.glob("*.md")
    return results, report.read_text(), folder


@pytest.fixture
def benchmark_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the programs see them: their folder is on the path."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_the_gpu_suite_runs_every_part_at_toy_size(suite: Any) -> None:
    results, _, _ = suite
    assert set(results) == PARTS
    for part, items in results.items():
        for name, entry in items.items():
            assert "error" not in entry, f"{part}, {name}: {entry['error']}"
    assert not results["tests"]["tests marked gpu"].keys() & {"FAILED", "CRASHED", "TIME"}
    for name in ("HammerLLM's recipe", "HammerLLM's recipe tuned", "ours bf16"):
        assert results["step"][f"{name} (round 1)"]["tokens_per_second"] > 0, name
    assert "needs a GPU" in results["step"]["ours fp8 (round 1)"]["missing"]
    assert "Megatron core's model does not run on a CPU" in results["step"]["Megatron core, local (round 2)"]["missing"]
    for part, name, key in (
        ("ceilings", "copy", "tb_per_second"),
        ("matmul", "wgrad head, odd vocabulary", "tflops"),
        ("kernels", "norm: torch", "backward_gb_per_second"),
        ("attention", "document: sdpa-documents", "backward_tflops"),
        ("head", "ours: torch", "tflops"),
        *[("head", "torch's linear_cross_entropy, padded", "tflops")] * hasattr(torch.nn, "LinearCrossEntropyOptions"),
        ("step", "FSDP2 (round 1)", "tokens_per_second"),
        ("step", "ours bf16, 32,000 pieces (round 2)", "tokens_per_second"),
        ("loop", "ours", "step_s_p99"),
        ("loop", "ours", "wait_ms"),
        ("optimizer", "ours", "update_ms"),
        ("optimizer", "torch", "update_ms"),
        ("tables", "both, 32,000 pieces", "tokens_per_second"),
        ("memory", "full", "step_s"),
    ):
        assert results[part][name][key] > 0, (part, name)


def test_the_report_of_the_gpu_suite(suite: Any) -> None:
    """Every goal has a line, every part a section, and toy figures are called so."""
    _, report, _ = suite
    goals = set(re.findall(r"^\| (G\d+) \|", report, re.MULTILINE))
    assert goals == {f"G{n}" for n in range(1, 14)} and set(re.findall(r"^## (\w+)", report, re.MULTILINE)) >= PARTS
    assert "Toy shapes" in report
    tables = re.findall(r"((?:^\|.*\n)+)", report, re.MULTILINE)
    for table in tables:
        lines = table.splitlines()
        assert len({line.count("|") for line in lines}) == 1, lines[:3]


@pytest.mark.usefixtures("benchmark_modules")
def test_goals_are_judged_by_the_ceilings_of_the_session() -> None:
    """Figures made up so that each of the three verdicts comes out, for goals of either direction."""
    from gpu.report import Session, goals, predictions
    from roofline import memory_gib
    from shapes import HAMMERLLM

    def entry(rate: float, **more: Any) -> dict[str, Any]:
        seconds = HAMMERLLM.tokens / rate
        sizes = {"micro_batch": 8, "accumulation": 4, "vocabulary": HAMMERLLM.vocabulary, "peak_gib": None}
        return {"tokens_per_second": rate, "step_s": seconds, "step_s_each": [seconds], **sizes, **more}

    parts = {
        "ceilings": {"bf16 burst": {"tflops": 790.0}, "copy": {"tb_per_second": 4.3}},
        "step": {
            "ours bf16 (round 1)": entry(68_000, peak_gib=47.0),
            "ours bf16 (round 2)": entry(70_000, peak_gib=47.0),
            "HammerLLM's recipe (round 1)": entry(65_000, micro_batch=4, accumulation=8, wanted=8),
            "ours bf16, 32,000 pieces (round 1)": entry(80_000, vocabulary=32_000),
        },
        "kernels": {"norm: fused": {"forward_gb_per_second": 3700.0, "backward_gb_per_second": 3900.0}},
        "optimizer": {"ours": {"ms": 12.5}, "torch": {"ms": 20.0}},
        "loop": {"ours": {"step_s": 1.0, "step_s_p99": 1.03, "wait_percent": 0.04}},
        "memory": {"full": entry(60_000, peak_gib=30.0)},
    }
    session = Session(parts, HAMMERLLM)
    lines = [re.split(r" *\| *", line)[1:-1] for line in goals(session) if line.startswith("| G")]
    found = {(number, what): (value, reached) for number, what, value, _, _, reached in lines}
    percent = 100 * 68_986 * 7.6669e9 / 790e12  # of the median step
    assert float(found["G1", "% of burst ceiling, causal"][0].split()[0]) == pytest.approx(percent, rel=1e-3)
    assert found["G2", "against HammerLLM's recipe"] == ("1.061 x", "**no**")
    assert found["G8", "slowest memory-bound kernel (norm forward), % of copy"] == ("86.05", "goal")
    beside = "; here 12.5 ms, torch's fused AdamW, clipping and copy 20.0 ms"
    assert found["G9", f"clip + AdamW + bf16 copy, ms at 4.3 TB/s{beside}"] == ("12.5", "goal")
    assert found["G6", "105,789 against 32,000 pieces"][0] == "0.8623 x"
    assert found["G12", "step time p99 / median of the real loop"] == ("1.03", "must")
    assert found["G12", "GPU waits for data, % of the real loop's time"] == ("0", "goal")
    told = "\n".join(predictions(session))
    assert f"| 47 | {sum(memory_gib(HAMMERLLM).values()):.4g} |" in told
    assert "| ours, recompute full | | | | 30 |" in told
    assert found["G10", "peak memory, GiB"] == ("47", "must")
    assert found["G4", "against torchtitan, its better loss"] == ("not measured", "")


def test_the_gpu_suite_goes_on_where_it_was_cut_off(suite: Any) -> None:
    """What is there is not measured again, what is missing is."""
    _, _, folder = suite
    (path,) = folder.glob("gpu_suite-ceilings-*.json")
    tree = json.loads(path.read_text())
    del tree["items"]["copy"]
    tree["items"]["bf16 burst"]["tflops"] = 123.0
    path.write_text(json.dumps(tree))
    done = run("gpu_suite.py", "--small", "--results", folder, "--part", "ceilings")
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())["items"]
    assert found["copy"]["tb_per_second"] > 0 and found["bf16 burst"]["tflops"] == 123.0
    assert done.stdout.count("ceilings | ") == 1


SERVER = """
import json, os, sys, time
for line in sys.stdin:
    question = json.loads(line)
    entry = question.get("entry")
    print("some library's words without an end of line", end="")
    if entry == "hangs":
        time.sleep(100)
    if entry == "crashes":
        print("an illegal memory access", file=sys.stderr)
        os._exit(7)
    answer = {"process": os.getpid(), "device_works": True}
    if entry is None:
        answer = ["crashes", "hangs", "loses the device", "large", "works"]
    if entry == "loses the device":
        answer |= {"error": "an illegal access", "device_works": False}
    if entry == "large":
        tried = question["known"].get("large", {}).get("did_not_fit", 8) // 2
        answer |= {"micro_batch": tried} if tried == 2 else {"error": "out of memory", "did_not_fit": tried}
    print("\\nresult of the entry: " + json.dumps(answer), flush=True)
"""


@pytest.mark.usefixtures("benchmark_modules")
def test_the_gpu_suite_goes_on_after_an_entry_that_crashes_hangs_or_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a process that does all this: each is a line with its reason, and what does not fit gets half."""
    import gpu_suite

    part = dataclasses.replace(gpu_suite.PARTS["kernels"], minutes=0.0, stop_seconds=2.0)
    monkeypatch.setitem(gpu_suite.PARTS, "kernels", part)
    server = gpu_suite.Server([sys.executable, "-c", SERVER])
    arguments = argparse.Namespace(results=tmp_path, small=False, again=False)
    gpu_suite.run_part("kernels", server, {"device": "a GPU", "versions": {}}, arguments, time.monotonic() + 100)
    server.end()
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text())["items"]
    assert found["crashes"]["error"] == "exit code 7: an illegal memory access"
    assert found["hangs"]["error"] == "not done after 2 s"
    assert found["large"]["micro_batch"] == 2 and "error" not in found["large"]
    assert found["loses the device"]["process"] != found["large"]["process"] == found["works"]["process"]


@pytest.mark.usefixtures("benchmark_modules")
def test_a_part_that_cannot_begin_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next part is measured and the report written, and the exit code says that something is missing."""
    import gpu_suite

    class Machine:
        def __init__(self, command: Any) -> None: ...
        def end(self) -> str:
            return ""

        def ask(self, seconds: float, **question: Any) -> Any:
            if "part" not in question:
                return {"device": "a GPU", "versions": {"torch": "2"}}
            if question["part"] == "matmul":
                return {"error": "exit code 1: ImportError: no such module"}
            return {"device_works": True, "limit": question["limit"]} if "entry" in question else ["tests marked gpu"]

    monkeypatch.setattr(gpu_suite, "Server", Machine)
    monkeypatch.setattr(sys, "argv", ["suite", "--report", "--results", str(tmp_path), "--part", "matmul", "tests"])
    with pytest.raises(SystemExit, match="matmul: exit code 1: ImportError"):
        gpu_suite.main()
    assert list(tmp_path.glob("a_GPU-*.md"))
    (path,) = tmp_path.glob("gpu_suite-tests-*.json")
    limit = json.loads(path.read_text())["items"]["tests marked gpu"]["limit"]
    assert limit == gpu_suite.PARTS["tests"].stop_seconds


@pytest.mark.usefixtures("benchmark_modules")
def test_tests_without_time_left_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has run is told, what has not is an error, which is tried again."""
    from gpu.marked_tests import SPARE_SECONDS, run_tests
    from gpu.measure import Bench
    from gpu.report import Session, tests
    from shapes import TOY

    from tests.kernels import gpu_check

    now = [1000.0]

    def run(root: Path, name: str, seconds: float) -> gpu_check.Outcome:
        now[0] += 30  # the second is longer than the time there is
        if name == "test_a":
            return gpu_check.Outcome(name, "FAILED", 30.0, "one is not two", "")
        return gpu_check.Outcome(name, "TIME", seconds, f"not done after {seconds:.0f} s", "")

    monkeypatch.setattr(gpu_check, "functions", lambda root, word: ["test_a", "test_b", "test_c"])
    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setattr("gpu.marked_tests.PROCESSES", 1)
    for module in ("gpu.marked_tests", "tests.kernels.gpu_check"):
        monkeypatch.setattr(f"{module}.time", SimpleNamespace(monotonic=lambda: now[0]))
    found = run_tests(Bench(torch.device("cpu"), False, limit_seconds=SPARE_SECONDS + 40))
    assert found["error"] == "no time for 2 of 3 functions" and (found["FAILED"], found["TIME"]) == (1, 2)
    told = "\n".join(tests(Session({"tests": {"it": found}}, TOY)))
    assert "no time for 2 of 3 functions" in told and "FAILED test_a: one is not two" in told


@pytest.mark.usefixtures("benchmark_modules")
def test_what_does_not_fit_gets_half_the_micro_batch() -> None:
    """And as many tokens a step; a second round takes what fitted in the first."""
    from gpu.measure import Bench, attempt
    from gpu.step import measure
    from shapes import TOY

    def greedy(bench: Any, shape: Any, steps: int) -> list[tuple[float, float]]:
        if shape.micro_batch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [(float(i), i + 1.0) for i in range(steps)]

    known: dict[str, Any] = {}
    bench, shape = Bench(torch.device("cpu"), True, known), dataclasses.replace(TOY, micro_batch=8)
    for tried in (8, 4):
        known["it"] = measure(bench, "it", greedy, shape)
        assert known["it"]["error"] == f"out of memory at micro-batch {tried}" and known["it"]["did_not_fit"] == tried
    known["it"] = measure(bench, "it", greedy, shape)
    assert {k: known["it"][k] for k in ("micro_batch", "accumulation", "wanted")} == {
        "micro_batch": 2,
        "accumulation": 8,
        "wanted": 8,
    }
    assert known["it"]["tokens_per_second"] == 8 * TOY.accumulation * TOY.sequence
    assert measure(bench, "second round", greedy, shape, former="it")["micro_batch"] == 2

    def faulty(bench: Any, shape: Any, steps: int) -> list[tuple[float, float]]:
        warnings.warn("no kernel takes this", stacklevel=1)
        raise RuntimeError("CUDA error: an illegal\nmemory access")

    result = attempt(lambda: measure(bench, "other", faulty, TOY))
    assert result["error"] == "RuntimeError: CUDA error: an illegal memory access"
    assert result["warnings"] == ["no kernel takes this"] and "faulty" in result["where"][-1]


@pytest.mark.usefixtures("benchmark_modules")
def test_wheels_are_seen_by_all_or_by_one_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_suite

    for path in ("wheels/seen_by_all-1-py3-none-any.whl", "wheels/titan/seen_by_one-1-py3-none-any.whl"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(tmp_path / path, "w") as wheel:
            wheel.writestr(f"{Path(path).name.split('-')[0]}.py", "here = True\n")
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS))
    monkeypatch.setattr(tempfile, "mkdtemp", lambda prefix: str(tmp_path / prefix))
    packages = gpu_suite.unpack(tmp_path / "wheels")
    code = "import torch, seen_by_all; from gpu.measure import Bench; b = Bench(torch.device('cpu'), True, {}, {!r})\n"
    code += "import importlib.util as u; assert u.find_spec('seen_by_one') is None; b.add_packages_of('titan')\n"
    code += "import seen_by_one"
    done = subprocess.run(
        [sys.executable, "-c", code.replace("{!r}", repr(packages))], capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("benchmark_modules")
def test_the_roofline_counts_what_the_package_counts() -> None:
    """FLOPs and parameters against the package, memory and predictions against the tables of performance.md."""
    from roofline import HAMMERLLM, SCENARIOS, Ceilings, memory_gib, parameters, predict, products
    from roofline import flops_per_token as roofline_flops

    model = config_from_tree({"model": HAMMERLLM.model_fields}).model
    assert roofline_flops(HAMMERLLM) == flops_per_token(model, HAMMERLLM.sequence)
    count = sum(int(torch.Size(s).numel()) for s in logical_shapes(model).values())
    assert parameters(HAMMERLLM)[0] == count == 1_402_288_128
    tokens = HAMMERLLM.micro_batch * HAMMERLLM.sequence
    matrices = sum(p.flops * p.calls for p in products(HAMMERLLM, pad=False)) / tokens
    assert matrices + 6 * HAMMERLLM.layers * HAMMERLLM.hidden * HAMMERLLM.sequence == roofline_flops(HAMMERLLM)[1]
    predicted = {name: predict(HAMMERLLM, Ceilings(), s).tokens_per_second for name, s in SCENARIOS.items()}
    table = {"floor": 103_040, "best kernels": 81_307, "ours": 73_825, "ours fp8": 86_665, "ours fp8 + head": 92_168,
             "torchtitan": 68_594, "Megatron core": 64_949, "HF tuned": 61_072, "HammerLLM": 51_000}  # fmt: skip
    assert predicted == pytest.approx(table, rel=1e-4)
    assert memory_gib(HAMMERLLM)["activations"] == pytest.approx(19.94, abs=0.01)
    assert memory_gib(HAMMERLLM, "selective")["activations"] == pytest.approx(13.41, abs=0.01)


def test_two_processes_equal_one_at_toy_size(suite: Any) -> None:
    _, _, folder = suite
    done = run("gpu_parallel.py", "--small", "--results", folder)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {(x["layout"], x["precision"]) for x in lines} == {
        (a, b) for a in ("TP 2", "DP 2") for b in ("fp32", "bf16")
    }
    assert all(x["right"] for x in lines)
    done = run("gpu_suite.py", "--report", "--results", folder)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^\| [TD]P 2 \|.*\| True \|$", Path(done.stdout.strip()).read_text(), re.MULTILINE)) == 4


@pytest.mark.usefixtures("benchmark_modules")
@pytest.mark.parametrize("hangs", [False, True])
def test_a_layout_that_fails_or_hangs_hides_no_other(hangs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_parallel
    from shapes import TOY

    class Ranks:
        def __init__(self, function: Any, given: Any, *others: Any, **named: Any) -> None:
            self.layouts, self.results, self.processes = *given[-2:], []

        def join(self, timeout: float) -> bool:
            if "TP 2" not in self.layouts:
                for precision in gpu_parallel.TOLERANCES:
                    self.results.put(("DP 2", precision, [(1.0, 2.0)]))
                return True
            if not hangs:
                raise RuntimeError("-- Process 1 terminated\nValueError: no such kernel\n")
            return False

    monkeypatch.setattr(torch.multiprocessing, "start_processes", Ranks)
    monkeypatch.setattr(gpu_parallel, "SECONDS_EACH", 0)
    monkeypatch.setattr(gpu_parallel, "train", lambda config, ctx, steps: [(1.0, 2.0)])
    right = {(x["layout"], x["precision"]): x for x in gpu_parallel.compare(torch.device("cpu"), TOY)}
    assert len(right) == 4 and all(x["right"] == (layout == "DP 2") for (layout, _), x in right.items())
    says = "not done after 0 s" if hangs else "ValueError: no such kernel"
    assert right["TP 2", "bf16"]["error"] == says


def test_document_masks_are_measured_at_toy_size() -> None:
    done = run("document_mask.py", "--seq-lengths", "48", "--steps", "1", "--small")
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout)
    assert line["causal_ms"] > 0 and line["documents_of_100"]["ms"] > 0


def test_figures_of_each_source_are_measured_at_toy_size() -> None:
    done = run("source_figures.py", "toy", "--pairs", "1", "--sources", "2")
    assert done.returncode == 0, done.stderr
    assert re.search(r"alone, CPU ms: one sum [\d.]+, by source and written [\d.]+: ", done.stdout), done.stdout


def test_loss_parity_runs_at_toy_size(tmp_path: Path) -> None:
    options = ["--steps", 2, "--sides", "fp32", "fp8-head", "--output", tmp_path]
    done = run("loss_parity.py", *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| fp") == 2
    assert all((tmp_path / f"loss_parity{language}.png").stat().st_size > 1000 for language in ("", ".zh-CN"))
