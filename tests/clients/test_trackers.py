"""The clients of the experiment trackers, offline: what they wrote is read back."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.clients.conftest import CACHE

ROOT = Path(__file__).parents[2]
LOSS = 0.1 + 0.2  # a float that fewer than 17 digits do not tell

START = """
import sys
from megatron_hammer.config import load_config
from megatron_hammer.metrics.starts import environment_of
from megatron_hammer.metrics.trackers import Trackers, check_trackers
name, output, first, last = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
check_trackers([name])
config = load_config("examples/configs/tiny.yaml", [f"log.trackers={name}", "log.trackers_offline=true",
    "log.tracker_run_name=锤子 1", "data.train={/a//数据 (1): 1}", f"train.output={output}", f"train.num_steps={last}"])
said = []
trackers = Trackers(config, first > 1, environment_of("cpu", 1), said.append)
for step in range(first, last + 1):
    trackers.log({"step": step, "loss": 0.1 + 0.2, "skipped": False, "mfu": None, "samples_digest": f"digest{step}",
                  "valid/zh/loss": float(step), "valid/金融 (A)/loss": 0.5})
trackers.close()
assert not said, said
"""

READ_MLFLOW = """
import json, sys
from mlflow.tracking import MlflowClient
client = MlflowClient(f"sqlite:///{sys.argv[1]}/mlflow.db")
experiment, = [e for e in client.search_experiments() if e.name == "megatron_hammer"]
run, = client.search_runs([experiment.experiment_id])
history = [[m.step, m.value] for m in client.get_metric_history(run.info.run_id, "valid/zh/loss")]
print(json.dumps([run.info.run_id, run.info.status, run.info.run_name, run.data.metrics, run.data.params, run.data.tags,
                  history, sorted(f.path for f in client.list_artifacts(run.info.run_id))]))
"""


@pytest.fixture(scope="module", params=["wandb", "swanlab", "mlflow"])
def client(request: pytest.FixtureRequest) -> tuple[str, Path]:
    """Name and interpreter."""
    name: str = request.param
    python = CACHE / f"tracker-{name}" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(python.parents[1])], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", name, "PyYAML", "xxhash", "numpy"], check=True)
    return name, python


@pytest.mark.timeout(900)
def test_offline_files_of_the_real_client(client: tuple[str, Path], tmp_path: Path) -> None:
    name, python = client
    output = tmp_path / "run"
    ids = []
    for first, last in ((1, 3), (4, 5)):
        words = [str(python), "-c", START, name, str(output), str(first), str(last)]
        done = subprocess.run(
            words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr + (output / "trackers" / f"{name}.log").read_text()
        ids.append(json.loads((output / "trackers" / f"{name}.json").read_text())["run_id"])
    assert ids[0] == ids[1]
    folder = output / "trackers"
    if name == "mlflow":
        words = [str(python), "-c", READ_MLFLOW, str(folder)]
        read = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
        run_id, status, run_name, metrics, params, tags, history, files = read
        assert (run_id, status, run_name) == (ids[0], "FINISHED", "锤子 1")
        assert metrics == {"loss": LOSS, "skipped": 0.0, "valid/zh/loss": 5.0, "valid/金融 _A_/loss": 0.5}
        assert tags["samples_digest"] == "digest5"
        assert history == [[step, float(step)] for step in range(1, 6)]
        assert params["model.hidden_size"] == "64" and params["train.num_steps"] == "3"
        assert len(files) == 2 and all(f.startswith("start-") for f in files)
        return
    pattern = (
        f"wandb/offline-run-*-{ids[0]}/run-{ids[0]}.wandb" if name == "wandb" else f"swanlab/*/run-{ids[0]}.swanlab"
    )
    first, second = (path.read_bytes() for path in sorted(folder.glob(pattern)))
    number = repr(LOSS).encode() if name == "wandb" else struct.pack("<d", LOSS)
    times = 2 if name == "wandb" else 1  # in the history and in the summary
    assert (first.count(number), second.count(number)) == (3 * times, 2 * times)
    for content, digest in ((first, b"digest3"), (second, b"digest5")):
        assert b"valid/zh/loss" in content and "锤子 1".encode() in content
        if name == "wandb":
            assert digest in content and b"hidden_size" in content and b"python" in content
    if name == "swanlab":
        configs = [path.read_text() for path in sorted(folder.glob("swanlab/*/files/config.yaml"))]
        assert (
            all("hidden_size: 64" in text for text in configs) and "digest3" in configs[0] and "digest5" in configs[1]
        )


MONITORING = ("prometheus_client", "opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http", "promql-parser")


@pytest.mark.timeout(900)
def test_prometheus_and_opentelemetry(tmp_path: Path) -> None:
    """The endpoint as it is scraped, the textfile, OTLP as a collector gets it; every query of examples/ is PromQL."""
    python = CACHE / "tracker-monitoring" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(python.parents[1])], check=True)
        pip = [str(python), "-m", "pip", "install", "-q", *MONITORING, "PyYAML", "xxhash", "numpy", "orjson"]
        subprocess.run(pip, check=True)
    examples = ROOT / "examples" / "monitoring"
    rules = yaml.safe_load((examples / "alerts.yaml").read_text(encoding="utf-8"))["groups"][0]["rules"]
    panels = json.loads((examples / "dashboard.json").read_text(encoding="utf-8"))["panels"]
    queries = [rule["expr"] for rule in rules] + [t["expr"] for panel in panels for t in panel["targets"]]
    words = [str(python), str(ROOT / "tests/clients/monitoring_client.py"), str(tmp_path), *queries]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    scraped = {name: (labels, value) for name, labels, value in found["scraped"]}
    labels, value = scraped["hammer_valid_loss"]
    assert value == 2.5 and labels["set"] == '金融 "q"\n' and labels["run"] == "锤子 1" and "step" not in labels
    assert scraped["megatron_training_loss"][1] == LOSS and scraped["hammer_step"][1] == 2
    assert scraped["megatron_training_skipped_iters_total"][1] == 1
    assert scraped["hammer_consumed_tokens_total"][1] == 4096
    assert found["ended"], "the endpoint goes with the run"
    written = {name: value for name, _, value in found["textfile"]}
    assert (written["hammer_step"], written["hammer_run_active"], written["hammer_run_failed"]) == (3, 0, 1)
    metrics = found["offline"]["resource_metrics"][0]["scope_metrics"][0]["metrics"]
    assert {m["name"] for m in metrics if m["data"].get("is_monotonic")} == {
        "megatron.training.skipped_iters",
        "hammer_consumed_tokens",
    }
    assert found["otlp"] == sorted(m["name"] for m in metrics)
    assert found["resource"]["hammer.run.name"] == "锤子 1" and found["resource"]["service.instance.id"]
