"""The process that runs the client of one experiment tracker (W&B, SwanLab or MLflow), and those clients.

``trackers.py`` starts it as ``python -m megatron_hammer.metrics.tracker_process NAME`` and writes JSON lines to its
standard input: first the run, then an object a step, last how the run ended. A client in a process of its own can hang,
crash, print and start threads as it likes: the run does not notice. What it prints goes to OUT/trackers/NAME.log.

A client is a class with three methods (``Client``); another service is one more of them and a row in ``CLIENTS``. Those
of monitoring systems are in ``monitoring.py``. All get the same: config and environment once, and of each step what
metrics.jsonl has under the same names. Where metrics.jsonl has null there is no point; text (``samples_digest``) goes
where a service has a place for text. Needs no torch.

The run's name at the service is kept in OUT/trackers/NAME.json, so that a run that goes on from a checkpoint goes on
there too. A run that begins at step 1 is a new one.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from megatron_hammer.base.files import replace_file
from megatron_hammer.base.reading import parse_json, read_regular
from megatron_hammer.metrics.monitoring import OpenTelemetryClient, PrometheusClient
from megatron_hammer.metrics.tracked_run import Line, TrackedRun

END_SECONDS = 60  # how long a client may take after the run has gone away: twice what the run itself waits for it


class Client(Protocol):
    """One service's client, made at the start of the run."""

    def __init__(self, library: Any, run: TrackedRun, run_id: str | None) -> None:
        """Begin the run, or go on with the one of this id."""

    @property
    def run_id(self) -> str:
        """The id by which a later start finds the run again."""

    def log(self, step: int, line: Line) -> None:
        """One step."""

    def close(self, failed: bool) -> None:
        """The run has ended; return when all is delivered."""


def numbers(line: Line) -> dict[str, float]:
    """The values that are numbers; true and false are 1 and 0."""
    return {key: float(value) for key, value in line.items() if isinstance(value, bool | int | float)}


def texts(line: Line) -> dict[str, str]:
    """The values that are text."""
    return {key: value for key, value in line.items() if isinstance(value, str)}


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"train": {"seed": 1}}`` as ``{"train.seed": 1}``."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, dict) and value
        values |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return values


class WandbClient:
    """Weights & Biases. A step that the service has already is not taken again: it has the same values."""

    def __init__(self, library: Any, run: TrackedRun, run_id: str | None) -> None:
        self.run_id = run_id or secrets.token_hex(4)  # as long as the ids that the library draws
        settings = library.Settings(console="off", silent=True, disable_git=True, save_code=False)
        self.run = library.init(
            project=run.project, name=run.name, id=self.run_id, resume="allow", dir=run.folder,
            mode="offline" if run.offline else None, settings=settings,
        )  # fmt: skip
        self.run.config.update(run.config | {"environment": run.environment}, allow_val_change=True)

    def log(self, step: int, line: Line) -> None:
        """All values, text too."""
        self.run.log({key: value for key, value in line.items() if value is not None}, step=step)

    def close(self, failed: bool) -> None:
        """Deliver the rest."""
        self.run.finish(exit_code=int(failed))


class SwanLabClient:
    """SwanLab. Text is no metric there: the last one goes into the run's config."""

    def __init__(self, library: Any, run: TrackedRun, run_id: str | None) -> None:
        self.run_id = run_id or secrets.token_hex(11)[:21]  # the service wants 21 lower-case letters and digits
        self.library, self.texts = library, dict[str, str]()
        library.init(
            project=run.project, name=run.name, id=self.run_id, resume="allow", log_dir=f"{run.folder}/swanlab",
            mode="offline" if run.offline else None, config=run.config | {"environment": run.environment},
        )  # fmt: skip

    def log(self, step: int, line: Line) -> None:
        """All numbers."""
        self.library.log(numbers(line), step=step)
        self.texts |= texts(line)

    def close(self, failed: bool) -> None:
        """Deliver the rest."""
        self.library.config.update(self.texts)
        self.library.finish(**({"state": "crashed", "error": "the run failed"} if failed else {}))


def mlflow_name(key: str) -> str:
    """A key as MLflow takes it for a metric or parameter: a clean relative path of letters, digits and a few marks."""
    parts = [part for part in re.sub(r"[^\w\-. :/]", "_", key).split("/") if part not in ("", ".", "..")]
    return "/".join(parts) or "_"


class MlflowClient:
    """MLflow. Parameters cannot change there: a later start's config is a file beside the first one's."""

    def __init__(self, library: Any, run: TrackedRun, run_id: str | None) -> None:
        from mlflow.entities import Metric, Param, RunTag

        self.metric, self.tag = Metric, RunTag
        folder = Path(run.folder).resolve()
        self.client = library.tracking.MlflowClient(f"sqlite:///{folder}/mlflow.db" if run.offline else None)
        if run_id is None:
            run_id = self.client.create_run(self._experiment(run, folder), run_name=run.name).info.run_id
            params = list(
                {mlflow_name(k): Param(mlflow_name(k), str(v)[:6000]) for k, v in flat(run.config).items()}.values()
            )
            for start in range(0, len(params), 100):  # the service's limit of a request, as 6,000 is of a value
                self.client.log_batch(run_id, params=params[start : start + 100])
        self.run_id: str = run_id
        self.client.update_run(run_id, status="RUNNING")
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        self.client.log_dict(run_id, {"config": run.config, "environment": run.environment}, f"start-{stamp}.json")

    def _experiment(self, run: TrackedRun, folder: Path) -> str:
        found = self.client.get_experiment_by_name(run.project)
        if found is not None:
            return str(found.experiment_id)
        place = (folder / "mlflow").as_uri() if run.offline else None
        return str(self.client.create_experiment(run.project, artifact_location=place))

    def log(self, step: int, line: Line) -> None:
        """Numbers as metrics, text as tags, which keep the last."""
        now = int(time.time() * 1000)
        metrics = [self.metric(mlflow_name(key), value, now, step) for key, value in numbers(line).items()]
        self.client.log_batch(
            self.run_id, metrics=metrics, tags=[self.tag(mlflow_name(key), value) for key, value in texts(line).items()]
        )

    def close(self, failed: bool) -> None:
        """All is delivered already: each call waits for the service."""
        self.client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")


@dataclass(frozen=True)
class Service:
    """One row of the table of services."""

    client: Callable[[Any, TrackedRun, str | None], Client]
    modules: tuple[str, ...]
    """The client library's; the first is handed to the client."""
    attribute: str
    """What the first must have. A folder of its name in the working directory, as W&B leaves one, imports too."""
    packages: str
    """What pip installs for it."""


CLIENTS = {
    "wandb": Service(WandbClient, ("wandb",), "init", "wandb"),
    "swanlab": Service(SwanLabClient, ("swanlab",), "init", "swanlab"),
    "mlflow": Service(MlflowClient, ("mlflow",), "tracking", "mlflow"),
    "prometheus": Service(PrometheusClient, ("prometheus_client",), "CollectorRegistry", "prometheus_client"),
    "opentelemetry": Service(
        OpenTelemetryClient,
        ("opentelemetry.sdk.metrics", "opentelemetry.exporter.otlp.proto.http.metric_exporter"),
        "MeterProvider",
        "opentelemetry-sdk opentelemetry-exporter-otlp-proto-http",
    ),
}


def import_library(name: str) -> Any:
    """The client library.

    Raises:
        ImportError: it is not installed.
    """
    service = CLIENTS[name]
    library, *_ = [import_module(module) for module in service.modules]
    if not hasattr(library, service.attribute):
        raise ModuleNotFoundError(f"No module named {service.modules[0]!r}", name=service.modules[0])
    return library


def is_not_installed(name: str, error: BaseException) -> bool:
    """Whether the library itself, not something that it needs, is not installed."""
    absent = error.name if isinstance(error, ModuleNotFoundError) else None
    return absent is not None and any(f"{module}.".startswith(f"{absent}.") for module in CLIENTS[name].modules)


def _kept_id(path: Path) -> str:
    """The id that an earlier start kept; ``ValueError`` where the file is damaged."""
    kept = parse_json(read_regular(path, follow=False))
    if not isinstance(kept, dict) or not isinstance(kept.get("run_id"), str):
        raise ValueError(f"{path} does not hold the id of a run: remove it to begin a new one at the service")
    return str(kept["run_id"])


def open_client(name: str, run: TrackedRun) -> Client:
    """Begin or go on with the run at the service, and keep its id."""
    path = Path(run.folder) / f"{name}.json"
    run_id = None
    if run.resumed and path.exists():
        run_id = _kept_id(path)
    client = CLIENTS[name].client(import_library(name), run, run_id)
    kept = {"project": run.project, "name": run.name, "run_id": client.run_id}
    replace_file(path, json.dumps(kept, ensure_ascii=False).encode() + b"\n")
    return client


def serve(name: str, run: TrackedRun) -> None:
    """Hand on the lines of standard input until the run ends, or has gone away."""
    client = open_client(name, run)
    for text in sys.stdin:
        line = json.loads(text)
        if "close" in line:
            client.close(line["close"] == "failed")
            return
        client.log(line["step"], {key: value for key, value in line.items() if key != "step"})
    signal.alarm(END_SECONDS)
    client.close(failed=True)


def main() -> int:
    """``NAME --check`` imports the library; ``NAME`` serves a run. Why it fails is a line on standard output."""
    name = sys.argv[1]
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the library prints must not stand before the answer
    try:
        if sys.argv[2:] == ["--check"]:
            import_library(name)
        else:
            serve(name, TrackedRun(**json.loads(sys.stdin.readline())))
    except BaseException as error:
        reason = "missing" if is_not_installed(name, error) else " ".join(f"{type(error).__name__}: {error}".split())
        answer.write(reason[:500] + "\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.stdin.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    sys.exit(main())
