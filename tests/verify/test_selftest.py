"""The self-test: its light parts pass and fail here; how a part ends, and what a report must not say, by stand-ins.

``HAMMER_SELFTEST=1`` runs all of it as a user does, in a read-only folder, with Chinese and blanks in TMPDIR.
"""

from __future__ import annotations

import getpass
import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hammer.base import system
from megatron_hammer.base.errors import ConfigError, RefusedError
from megatron_hammer.base.signals import Stopped, StopRequest
from megatron_hammer.base.versions import installed_versions
from megatron_hammer.config import config_from_tree
from megatron_hammer.sampling import index_builder
from megatron_hammer.verify import bug_report, golden, selftest, selftest_parts
from megatron_hammer.verify.anonymous import Anonymiser
from megatron_hammer.verify.selftest import PartResult
from megatron_hammer.verify.selftest_parts import PARTS, SelftestPart

ROOT = Path(__file__).parents[2]


# ---- the parts -------------------------------------------------------------------------------------------------------


def test_the_index_part_passes_and_names_a_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not index_builder.BACKEND.startswith("C++"):
        pytest.skip("nothing is compiled here")
    assert "equal those of its NumPy twin" in selftest_parts.try_index(tmp_path)
    right = index_builder.sample_index
    monkeypatch.setattr(index_builder, "sample_index", lambda *given: right(*given) + 1)
    with pytest.raises(RefusedError, match=r"E542.*sample_index of the compiled index builder differs"):
        selftest_parts.try_index(tmp_path)
    monkeypatch.setattr(index_builder, "BACKEND", "NumPy (missing)")
    assert selftest_parts.try_index(tmp_path) == "nothing to compare: NumPy (missing)"


def test_on_another_system_the_parts_of_several_ranks_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "IS_LINUX", False)
    for part in (selftest_parts.try_resume, selftest_parts.try_layout):
        assert part(tmp_path) == "not tried: 2 ranks need Linux (E292)" and not list(tmp_path.iterdir())


def test_the_known_losses_are_met_here(tmp_path: Path) -> None:
    """Data and samples are those that were recorded, and the run's losses; then each that is off is named."""
    assert "20 known losses on cpu" in selftest_parts.try_training(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "cpu/metrics.jsonl").read_text().splitlines()]
    for wrong in (lines[7]["loss"] * (1 + 1e-5), float("nan")):
        changed = [*lines[:7], lines[7] | {"loss": wrong}, *lines[8:]]
        with pytest.raises(RefusedError, match=r"E542.* at step 8, not 5\.7634406: off by "):
            golden.compare_with_golden(changed, "cpu")
    with pytest.raises(RefusedError, match="other samples"):
        golden.compare_with_golden([*lines[:-1], lines[-1] | {"samples_digest": "0"}], "cpu")
    with pytest.raises(RefusedError, match="other samples"):
        golden.compare_with_golden(lines[:-1], "cpu")


# ---- how a part ends -------------------------------------------------------------------------------------------------

CHILD = """
import json, os, pathlib, signal, sys, time
name, folder = sys.argv[1], pathlib.Path(sys.argv[2])
print("a line of", name, flush=True)
if name == "crash": os.kill(os.getpid(), signal.SIGILL)
if name == "hang": time.sleep(60)
if name == "raise": raise ValueError("no such thing")
error = {"exit_code": 5 if name == "wrong" else 6, "number": 42 if name == "wrong" else 1, "what": "x",
         "rule": "is wrong", "remedy": "free space"}
right = name in ("right", "late")
verdict = {"found": "1 = 1, by " + os.environ["OMP_NUM_THREADS"]} if right else {"error": error}
(folder / "verdict.json").write_text(json.dumps(verdict))
if name == "late": os.kill(os.getpid(), signal.SIGSEGV)
"""


def run_part(name: str, folder: Path, stop: StopRequest | None = None) -> PartResult:
    (folder / name).mkdir()
    part = SelftestPart(name, lambda folder: "", "the cure")
    command = [sys.executable, "-I", "-S", "-c", CHILD]
    return selftest.run_part(part, command, folder / name, stop or StopRequest())


def test_every_end_of_a_part_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_STEP_TASKS_PER_NODE": "8", "RANK": "3", "OMP_NUM_THREADS": "64"}.items():
        monkeypatch.setenv(name, value)
    given = selftest.environment(tmp_path)
    assert not {"SLURM_STEP_TASKS_PER_NODE", "RANK"} & given.keys()
    assert given["TMPDIR"] == str(tmp_path), "what libraries leave there goes with the folder"
    right, wrong, disk, crash, raised = (run_part(n, tmp_path) for n in ("right", "wrong", "disk", "crash", "raise"))
    late = run_part("late", tmp_path)
    monkeypatch.setattr(selftest, "PART_SECONDS", 0.3)
    hang = run_part("hang", tmp_path)
    assert (right.exit_code, right.found) == (0, "1 = 1, by 1") and len(right.lines()) == 1
    assert (wrong.exit_code, wrong.found, wrong.cure) == (5, "[E542] x is wrong", "the cure")
    assert (disk.exit_code, disk.cure) == (6, "free space")
    assert (crash.exit_code, raised.exit_code, hang.exit_code) == (5, 5, 5)
    assert "crashed with SIGILL" in crash.found and crash.output == ("a line of crash",)
    assert late.exit_code == 5 and "crashed with SIGSEGV" in late.found, "though its results were right"
    assert raised.found == "crashed with exit code 1: ValueError: no such thing"
    assert hang.found == "did not end within 0.3 s" and hang.lines()[1].endswith("-> the cure")
    assert selftest.selftest_exit_code([right, disk, wrong]) == 5 and selftest.selftest_exit_code([right, disk]) == 6
    assert selftest.selftest_exit_code([right]) == 0 and selftest.selftest_summary([right]).startswith(
        "all 1 parts passed"
    )
    assert selftest.selftest_summary([right, disk, wrong]).endswith("failed: disk, wrong")


def test_a_stop_signal_ends_the_part(tmp_path: Path) -> None:
    with StopRequest((signal.SIGUSR1,)) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(Stopped):
            run_part("hang", tmp_path, stop)


def test_the_others_run_after_one_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(part: SelftestPart, command: object, folder: Path, stop: StopRequest) -> PartResult:
        assert folder.is_dir()
        return PartResult(part.name, 1.0, "x", 5 * (part.name == "index"))

    monkeypatch.setattr(selftest, "run_part", ended)
    results = list(selftest.run_parts(selftest.chosen([]), tmp_path, StopRequest()))
    assert [result.name for result in results] == [part.name for part in PARTS]
    assert [part.name for part in selftest.chosen(["export", "index"])] == ["index", "export"]


# ---- the report ------------------------------------------------------------------------------------------------------

PRIVATE = {
    "HF_TOKEN": "hf_AbCdEf123456", "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG", "MY_PASSWORD": "pa55",
    "DATABASE_URL": "postgres://anna:geheim1@db.corp.example:5432/runs", "HOME": "/home/anna.karenina",
    "USER": "anna.karenina", "HOSTNAME": "gpu-node-17.corp.example", "PROJECT": "operation-sunflower",
    "TMPDIR": "/scratch/安娜 的/tmp", "SSH_CONNECTION": "10.20.30.40 51022 10.20.30.41 22",
    "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip
LEAKS = (
    "hf_AbCdEf123456", "wJalrXUtnFEMI", "pa55", "geheim1", "corp.example", "inside.example", "anna", "karenina",
    "gpu-node-17",
    "sunflower", "安娜", "scratch", "10.20.30.4", "/data", "secret-client", "fe80::1", "aa:bb:cc", "prod_zh",
    "C:\\Users", "%E5%AE%89",
    str(ROOT), "evaluate_for_client", "my_project",
)  # fmt: skip
SAID = (
    'File "/home/anna.karenina/.venv/lib/python3.11/site-packages/torch/nn/functional.py", line 7, in linear',
    f'File "{ROOT}/megatron_hammer/train/loop.py", line 12, in train',
    "OSError: [Errno 13] Permission denied: '/scratch/安娜 的/tmp/selftest-x/corpus/zh.jsonl'",
    "cannot open file:///data/secret-client/zh.bin nor ~/secret-client/x, nor C:\\Users\\anna\\x",
    "401 for token hf_AbCdEf123456 at https://anna:pa55@hub.corp.example/api?key=pa55 (gpu-node-17, 10.20.30.41:22)",
    "anna.karenina@corp.example at db.inside.example:5432 on GPU-NODE-17, fe80::1:2:3, aa:bb:cc:dd:ee:ff",
    "operation-sunflower",
    "quoted /scratch/%E5%AE%89%E5%A8%9C%20%E7%9A%84/tmp/x and /scratch/\\u5b89\\u5a1c \\u7684/tmp/x",
)


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PRIVATE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(platform, "node", lambda: "gpu-node-17")
    monkeypatch.setattr(getpass, "getuser", lambda: "anna.karenina")


def test_a_report_says_what_helps_and_nothing_private(hostile: None, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_from_tree({
        "model": {"hidden_size": 64, "ffn_hidden_size": 192, "num_layers": 2, "num_attention_heads": 4},
        "tokenizer": {"path": "/data/secret-client/tokenizer.model"},
        "data": {"train": {"/data/secret-client/prod_zh": 0.5}, "valid": {"anna": "/data/valid"}},
        "train": {"output": "runs/anna", "precision": "fp16", "evaluator": {"command": ["evaluate_for_client"]}},
        "log": {"trackers": ["wandb"], "tracker_project": "my_project"},
    })  # fmt: skip
    results = [PartResult("index", 0.5, "1 result"), PartResult("export", 9.0, " ".join(SAID), 5, "cure", SAID)]
    text = bug_report.bug_report_text(results, config)
    assert [leak for leak in LEAKS if leak.lower() in text.lower()] == []
    for helps in ("| index | passed | 0.5 | 1 result |", "| export | FAILED (5) |", "- torch: ", "- processor: ",
                  "precision: fp16", "hidden_size: 64", "{'(name 1)': 0.5}", "trackers: ['wandb']", "line 7, in linear",
                  'File "torch/nn/functional.py"', 'File "megatron_hammer/train/loop.py", line 12',
                  "Permission denied", "- compiled parts: ", "1 of 2 parts passed"):  # fmt: skip
        assert helps in text, helps
    assert "<value>" not in text.partition("## Output")[0].partition("## Versions")[2]


def test_a_report_leaves_the_versions_of_checkpoints_as_they_are() -> None:
    """What is installed is looked up once for all who ask."""
    before = dict(installed_versions())
    assert {"triton", "implementation"} & {name for name, _ in bug_report.versions()} and before == installed_versions()


def test_ordinary_words_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    private = Anonymiser(
        {"USER": "root", "HOME": "/root", "N": "2", "DEBUG_TOKEN": "true", "V": "3.11.7", "MODE": "auto"}
    )
    for text in ("5.76 tokens/s and 1/2 at step 20 of 20, true or auto", "rank 0: norm differs by 1e-5 (bound 2e-6)",
                 "kernels.attention=auto, torch 2.13.0 on Python 3.11.7, 9e-08"):  # fmt: skip
        assert private.text(text) == text


def test_a_user_without_a_name_and_a_home_gets_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a number of its own."""

    def nobody(*_: object) -> str:
        raise KeyError("getpwuid(): uid not found: 4711")

    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert Anonymiser().text("no such file: /data/x") == "no such file: <path>"


def test_a_report_replaces_reports_only(tmp_path: Path) -> None:
    path = tmp_path / "report.md"
    bug_report.check_place(path)
    bug_report.write_bug_report(path, [PartResult("index", 0.5, "x")], None)
    bug_report.check_place(path)
    assert path.read_text(encoding="utf-8").startswith(bug_report.HEADING)
    (tmp_path / "mine.md").write_text("mine")
    for place in (tmp_path / "mine.md", tmp_path):
        with pytest.raises(ConfigError, match="is no report of the self-test"):
            bug_report.check_place(place)
    with pytest.raises(OSError):
        bug_report.check_place(tmp_path / "absent" / "report.md")


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("HAMMER_SELFTEST"), reason="set HAMMER_SELFTEST=1: minutes")
def test_the_whole_self_test(tmp_path: Path) -> None:
    scratch, place = tmp_path / "张 三 #1: 'x'", tmp_path / "read-only"
    scratch.mkdir()
    place.mkdir()
    place.chmod(0o555)
    command = [sys.executable, str(ROOT / "tools/selftest.py"), "--report", str(tmp_path / "report.md")]
    done = subprocess.run(command, cwd=place, env=os.environ | {"TMPDIR": str(scratch)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("passed")] == [
        p.name for p in PARTS
    ]
    assert list(scratch.iterdir()) == list(place.iterdir()) == []
    assert "张" not in (tmp_path / "report.md").read_text(encoding="utf-8")
