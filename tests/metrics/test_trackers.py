"""Trackers: a stand-in for a service's library takes down what it is told, fails, hangs or is missing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.config import config_to_tree, load_config, to_yaml
from megatron_hammer.metrics import trackers
from megatron_hammer.metrics.reporter import Reporter
from megatron_hammer.metrics.tracker_process import mlflow_name
from megatron_hammer.metrics.trackers import Trackers, check_trackers
from megatron_hammer.train.run import run_rank
from tests.model.tiny import tiny_config
from tests.train.runs import TINY, config_for, metrics, overrides, train_here

WANDB = r"""
# Takes down every call in $TOLD; $TROUBLE makes it fail or hang somewhere.
import json, os, time
def tell(*words):
    with open(os.environ["TOLD"], "a") as told: told.write(json.dumps(words) + "\n")
def trouble(place):
    if os.environ.get("TROUBLE") == f"{place} fails": raise ConnectionError(f"no route\nto {place}")
    if os.environ.get("TROUBLE") == f"{place} hangs": time.sleep(600)
    if os.environ.get("TROUBLE") == f"{place} dies": os._exit(9)
def Settings(**settings): return settings
class Config:
    def update(self, values, allow_val_change): tell("config", values)
class Run:
    config = Config()
    def log(self, values, step): trouble("log"); tell("log", step, values)
    def finish(self, exit_code): trouble("finish"); tell("finish", exit_code)
def init(**options):
    print("noise of the client")
    trouble("init"); tell("init", options); return Run()
"""


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[list[Any]]]:
    """The stand-in is found by processes that are started; what it was told so far."""
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "wandb.py").write_text(WANDB)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}/library:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    (tmp_path / "told").touch()
    return lambda: [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]


def test_config_takes_one_or_several() -> None:
    assert load_config(TINY, ["log.trackers=wandb"]).log.trackers == ("wandb",)
    config = load_config(TINY, ["log.trackers=[wandb, swanlab]", "log.tracker_project=计划"])
    assert config.log.trackers == ("wandb", "swanlab") and "- swanlab" in to_yaml(config)
    json.dumps(config_to_tree(config))  # goes into checkpoints
    with pytest.raises(ConfigError, match=r"error\[E203\]: log\.trackers=swan .*did you mean swanlab"):
        load_config(TINY, ["log.trackers=[swan]"])
    with pytest.raises(ConfigError, match=r"error\[E204\]: log\.trackers=.*once"):
        tiny_config(log__trackers=("wandb", "wandb")).validate(1)


@pytest.mark.parametrize(
    ("service", "project", "words"),
    [("swanlab", "计划", "1 to 100 letters, digits"), ("swanlab", "a b", "1 to 100"), ("swanlab", "", "1 to 100"),
     ("wandb", "a/b", "1 to 128 characters"), ("wandb", "x" * 129, "1 to 128"), ("mlflow", "", "not empty")],
)  # fmt: skip
def test_a_project_name_that_the_service_refuses_is_refused_at_once(service: str, project: str, words: str) -> None:
    config = tiny_config(log__trackers=(service,), log__tracker_project=project)
    with pytest.raises(ConfigError, match=rf"E204.*log\.tracker_project='{project}' must be {words}.* for {service}"):
        config.validate(1)
    tiny_config(log__tracker_project=project).validate(1)  # nobody reads it


def test_names_that_mlflow_takes() -> None:
    assert mlflow_name("valid/金融 (A)/loss") == "valid/金融 _A_/loss" and mlflow_name("a.b-c_d:e") == "a.b-c_d:e"
    assert mlflow_name("data.train./tmp//x/../y/") == "data.train./tmp/x/y" and mlflow_name("/..") == "_"


def test_a_run_tells_what_metrics_jsonl_has_and_goes_on_under_its_id(
    data: Path, tmp_path: Path, told: Callable[[], list[list[Any]]]
) -> None:
    run, arguments = (
        tmp_path / "运行",
        ["log.trackers=[wandb]", "log.trackers_offline=true", "log.tracker_project=计划"],
    )
    assert train_here(0, overrides(data, run, *arguments, "train.num_steps=6")) == 0
    assert train_here(0, overrides(data, run, *arguments, "train.num_steps=9")) == 0
    calls = told()
    first, second = (options for kind, options in (c for c in calls if c[0] == "init") if kind == "init")
    assert first["id"] == second["id"] == json.loads((run / "trackers" / "wandb.json").read_text())["run_id"]
    assert (first["name"], first["project"], first["mode"], first["resume"]) == ("运行", "计划", "offline", "allow")
    configs = [values for kind, values in (c for c in calls if c[0] == "config")]
    assert len(configs) == 2, "once a start"
    environment = configs[1].pop("environment")
    assert environment["ranks"] == 1 and environment["device"] == "cpu" and environment["versions"]["torch"]
    wanted = config_for(overrides(data, run, *arguments, "train.num_steps=9", "schedule.decay_steps=6"))  # it is held
    assert configs[1] == json.loads(json.dumps(config_to_tree(wanted)))
    logged = [{"step": c[1], **c[2]} for c in calls if c[0] == "log"]
    written = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert logged == [{k: v for k, v in line.items() if v is not None} for line in written]
    assert "valid/x/perplexity" in logged[3] and [line["step"] for line in logged] == list(range(1, 10))
    assert [c[1] for c in calls if c[0] == "finish"] == [0, 0]
    assert "noise of the client" in (run / "trackers" / "wandb.log").read_text()
    assert train_here(0, overrides(data, tmp_path / "other", *arguments, "train.num_steps=1")) == 0
    assert told()[-4][1]["id"] != first["id"], "another run, another id"


@pytest.mark.parametrize("trouble", ["init fails", "log fails", "log dies", "finish fails"])
def test_a_service_that_fails_costs_one_warning(
    data: Path, tmp_path: Path, told: Callable[[], list[list[Any]]], trouble: str, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("TROUBLE", trouble)
    arguments = overrides(data, tmp_path / "run", "log.trackers=wandb")
    assert train_here(0, arguments) == 0
    out, err = capfd.readouterr()
    (warning,) = [line for line in err.splitlines() if line]
    reason = (
        "its process ended with 9" if trouble == "log dies" else f"ConnectionError: no route to {trouble.split()[0]}"
    )
    assert warning.startswith(
        f"warning: log.trackers: wandb failed ({reason}); the run goes on, metrics.jsonl has every"
    )
    assert "noise" not in out and len(metrics(tmp_path / "run")) == 12


@pytest.mark.parametrize("trouble", ["init hangs", "log hangs", "finish hangs"])
def test_a_service_that_hangs_costs_one_warning(
    data: Path, tmp_path: Path, told: Callable[[], list[list[Any]]], trouble: str, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("TROUBLE", trouble)
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 1.0 if trouble == "finish hangs" else 0.0)
    assert train_here(0, overrides(data, tmp_path / "run", "log.trackers=wandb")) == 0
    (warning,) = [line for line in capfd.readouterr().err.splitlines() if line]
    assert re.match(r"warning: log.trackers: wandb had not taken everything \d s after the end of the run; ", warning)
    assert len(metrics(tmp_path / "run")) == 12


def test_a_full_list_costs_one_warning_and_no_wait(
    tmp_path: Path, told: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TROUBLE", "log hangs")
    monkeypatch.setattr(trackers, "KEPT_LINES", 20)
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.0)
    said: list[str] = []
    config = tiny_config(log__trackers=("wandb",), train__output=str(tmp_path / "run"))
    all_trackers = Trackers(config, False, {}, said.append)
    filler = {"step": 1, "text": "x" * 70_000}  # more than a pipe holds
    for _ in range(100):
        all_trackers.log(filler)
    all_trackers.close()
    (warning,) = said
    assert "wandb has not taken the last 20 lines: later ones are left out" in warning


@pytest.mark.parametrize("given_up", ["before", "while"])
def test_a_service_given_up_before_its_process_has_started_never_serves(
    tmp_path: Path, told: Callable[[], list[list[Any]]], given_up: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed, asked = threading.Event(), threading.Event()
    started: list[subprocess.Popen[str]] = []
    start, serve = subprocess.Popen, trackers.Tracker._serve

    def start_late(*arguments: Any, **options: Any) -> Any:
        asked.set()
        assert closed.wait(60)
        started.append(start(*arguments, **options))
        return started[0]

    def serve_late(self: trackers.Tracker) -> str:
        asked.set()
        assert closed.wait(60)
        return serve(self)

    if given_up == "while":
        monkeypatch.setattr(trackers.subprocess, "Popen", start_late)
    else:
        monkeypatch.setattr(trackers.Tracker, "_serve", serve_late)
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.0)
    said: list[str] = []
    run = Trackers(tiny_config(log__trackers=("wandb",), train__output=str(tmp_path / "run")), False, {}, said.append)
    assert asked.wait(60)
    run.close()
    closed.set()
    (tracker,) = run.trackers
    tracker._thread.join(60)
    assert [process.returncode for process in started] == ([-9] if given_up == "while" else [])
    assert told() == [] and len(said) == 1


def test_a_run_that_fails_is_told_as_failed(tmp_path: Path, told: Callable[[], list[list[Any]]]) -> None:
    config = tiny_config(log__trackers=("wandb",), log__tensorboard=False, train__output=str(tmp_path / "run"))
    with pytest.raises(RuntimeError), Reporter(config, 0, (1.0, 1.0), None, 1):
        raise RuntimeError("a rank fails")
    assert told()[-1] == ["finish", 1]


def test_a_run_that_is_killed_is_told_as_failed(tmp_path: Path, told: Callable[[], list[list[Any]]]) -> None:
    code = f"""
import os, time
from tests.model.tiny import tiny_config
from megatron_hammer.metrics.tracker_process import mlflow_name
from megatron_hammer.metrics.trackers import Trackers
config = tiny_config(log__trackers=('wandb',), train__output={str(tmp_path / "run")!r})
Trackers(config, False, {{}}, print).log({{'step': 1}})
while '"log"' not in open(os.environ["TOLD"]).read(): time.sleep(0.01)
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    end = time.monotonic() + 60
    while not any(call[0] == "finish" for call in told()) and time.monotonic() < end:
        time.sleep(0.05)
    assert told()[-1] == ["finish", 1]


def test_a_missing_or_broken_library_ends_the_start(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: object
) -> None:
    (tmp_path / "swanlab").mkdir()  # as W&B leaves a folder of its own name: no library, though it can be imported
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ['PYTHONPATH']}")
    check_trackers(["wandb"])
    for name in ("swanlab", "mlflow"):
        with pytest.raises(ConfigError) as caught:
            run_rank(config_for(overrides(data, tmp_path / "run", f"log.trackers=[wandb, {name}]")), 0, 0, 1, None)
        assert str(caught.value) == (
            f"error[E217]: log.trackers: {name} is named and its library is not installed here; pip install {name} "
            f'(or pip install -e ".[{name}]"), or take {name} out of log.trackers'
        )
        assert not (tmp_path / "run").exists()
    (tmp_path / "library" / "wandb.py").write_text("import surely_absent")
    with pytest.raises(ConfigError, match=r"E217.*cannot be imported \(ModuleNotFoundError: No module named 'surely_"):
        check_trackers(["wandb"])
