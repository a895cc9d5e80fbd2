"""Prometheus and OpenTelemetry by stand-ins of their libraries; names that dashboard and alerts read are exported."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.config import config_to_tree
from megatron_hammer.metrics.monitoring import (
    COUNTERS,
    HISTOGRAMS,
    OpenTelemetryClient,
    PrometheusClient,
    Series,
    exported,
    series_of,
)
from megatron_hammer.metrics.tracked_run import TrackedRun
from megatron_hammer.metrics.tracker_process import CLIENTS, is_not_installed
from tests.model.tiny import tiny_config

MONITORING = Path(__file__).parents[2] / "examples" / "monitoring"
LINE: dict[str, Any] = {
    "loss": 2.5, "grad_norm": 0.5, "lr": 1e-3, "skipped": False, "consumed_samples": 16, "consumed_tokens": 4096,
    "tokens_per_second": 9e3, "memory_bytes": 3 * 2**29, "mfu": 0.4, "mfu_causal": None, "samples_digest": "ab",
    "step_seconds": 0.25, "tflops_causal": 310.5,
    "valid/金融/loss": 2.6, "valid/金融/bits_per_byte": 0.9, "source/zh.wiki/loss": 2.4, "source/zh.wiki/tokens": 1000,
    "source/en/tokens": 3096, "source/en/loss": float("nan"), "evaluation/ceval/acc": 0.3,
}  # fmt: skip


def run_of(tmp_path: Path, offline: bool = False, **log: Any) -> TrackedRun:
    config = config_to_tree(tiny_config(**{f"log__{name}": value for name, value in log.items()}))
    return TrackedRun(str(tmp_path), "project", "运行", offline, False, config, {"ranks": 2})


class FakePrometheus:
    """What the client uses of prometheus_client; the textfile has a sample a line, as the library writes them."""

    class CollectorRegistry:
        def register(self, collector: Any) -> None:
            self.collector = collector

    class Family:
        def __init__(self, name: str, documentation: str, labels: list[str]) -> None:
            self.name, self.labels, self.samples = name, labels, list[tuple[list[str], float]]()

        def add_metric(self, labels: list[str], value: float) -> None:
            assert len(labels) == len(self.labels)
            self.samples.append((labels, value))

    class Counter(Family):
        def __init__(self, name: str, documentation: str, labels: list[str]) -> None:
            super().__init__(name + "_total", documentation, labels)

    class Histogram(Family):
        def add_metric(self, labels: list[str], buckets: list[tuple[str, int]], total: float) -> None:
            assert buckets[-1][0] == "+Inf"
            for bound, count in buckets:
                self.samples.append(([*labels, bound], count))
            self.labels, self.total = [*self.labels, "le"], total

    metrics_core = SimpleNamespace(
        GaugeMetricFamily=Family, CounterMetricFamily=Counter, HistogramMetricFamily=Histogram
    )

    def __init__(self) -> None:
        self.served: list[Any] = []

    def write_to_textfile(self, path: str, registry: Any) -> None:
        Path(path).write_text("\n".join(lines_of(registry)), encoding="utf-8")

    def start_http_server(self, port: int, addr: str, registry: Any) -> Any:
        self.served.append((addr, port, registry))
        end = SimpleNamespace(shutdown=lambda: self.served.append("shutdown"), server_close=lambda: None)
        return end, SimpleNamespace(join=lambda: None)


def lines_of(registry: Any) -> list[str]:
    return [
        f"{family.name}{dict(zip(family.labels, labels))} {value:g}"
        for family in registry.collector.collect()
        for labels, value in family.samples
    ]


@pytest.mark.parametrize(
    ("key", "name", "labels"),
    [("loss", "loss", ()), ("valid/a/b/loss", "valid_loss", (("set", "a/b"),)),
     ("evaluation/step", "evaluation_step", ()),
     ("source/zh.wiki/tokens", "source_tokens", (("source", "zh.wiki"),)), ("Odd Key-1", "odd_key_1", ()),
     ("评测", "value", ())],
)  # fmt: skip
def test_names_are_plain_and_names_of_sets_are_labels(key: str, name: str, labels: Any) -> None:
    assert series_of(key) == (name, labels)
    assert re.fullmatch(r"[a-z][a-z0-9_]*", name)


def test_a_textfile_has_the_last_values_and_says_how_the_run_ended(tmp_path: Path) -> None:
    library = FakePrometheus()
    client = PrometheusClient(library, run_of(tmp_path, prometheus_textfile=str(tmp_path)), "id1")
    (file,) = tmp_path.glob("*.prom")
    assert "id1" in file.name and "hammer_run_active" in file.read_text(), "there before the first step"
    client.log(3, LINE)
    client.log(4, LINE | {"skipped": True, "loss": 2.25, "step_seconds": 0.2501})
    client.log(4, {"step_seconds": 600.0})
    client.close(failed=True)
    said = file.read_text(encoding="utf-8").splitlines()
    run = {"run": "运行", "run_id": "id1"}
    for name, labels, value in (
        ("megatron_training_loss", {}, "2.25"), ("hammer_step", {}, "4"),
        ("megatron_training_skipped_iters_total", {}, "1"), ("megatron_training_memory_allocated_gb", {}, "1.5"),
        ("hammer_consumed_tokens_total", {}, "4096"), ("hammer_valid_loss", {"set": "金融"}, "2.6"),
        ("hammer_source_tokens_total", {"source": "zh.wiki"}, "1000"), ("hammer_run_active", {}, "0"),
        ("hammer_source_tokens_total", {"source": "en"}, "3096"), ("hammer_run_failed", {}, "1"),
        ("megatron_training_throughput_tflops", {}, "310.5"),
        ("megatron_training_step_duration_ms", {"le": "100"}, "0"),
        ("megatron_training_step_duration_ms", {"le": "250"}, "1"),
        ("megatron_training_step_duration_ms", {"le": "500"}, "2"),
        ("megatron_training_step_duration_ms", {"le": "10000"}, "2"),
        ("megatron_training_step_duration_ms", {"le": "+Inf"}, "3"),
    ):  # fmt: skip
        assert f"{name}{run | labels} {value}" in said
    assert not any("nan" in line or "digest" in line or "mfu_causal" in line for line in said)
    assert not any("'step'" in line for line in said), "the step is never a label"
    assert library.served == []


def test_an_endpoint_is_for_this_machine_unless_the_config_says_otherwise(tmp_path: Path) -> None:
    library = FakePrometheus()
    client = PrometheusClient(library, run_of(tmp_path), None)
    (addr, port, registry), *_ = library.served
    assert (addr, port) == ("127.0.0.1", 9464) and not list(tmp_path.iterdir())
    client.log(1, LINE)
    assert any(line.startswith("megatron_training_loss{") for line in lines_of(registry))
    client.close(failed=False)
    assert library.served[-1] == "shutdown"
    PrometheusClient(library, run_of(tmp_path, prometheus_address="[::]:1"), None)
    assert library.served[-1][:2] == ("::", 1)
    PrometheusClient(library, run_of(tmp_path, offline=True), "x")
    assert [path.name for path in tmp_path.iterdir()] == ["hammer-x.prom"], "offline: a file, no endpoint"
    for address in ("9464", "host:", "host:0", "host:99999", "host:x", ":1"):
        with pytest.raises(ConfigError, match=r"E204\]: log\.prometheus_address=.*HOST:PORT"):
            tiny_config(log__prometheus_address=address).validate(1)


def test_opentelemetry_gets_instruments_and_the_run_as_its_resource(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, Any] = {}
    told: list[Any] = []

    def instrument(kind: str) -> Any:
        return lambda name, callbacks: made.update({name: (kind, callbacks[0])})

    recorded: dict[tuple[str, str], list[float]] = {}
    meter = SimpleNamespace(
        create_observable_counter=instrument("counter"), create_observable_gauge=instrument("gauge"),
        create_histogram=lambda name, unit: SimpleNamespace(record=recorded.setdefault((name, unit), []).append),
    )  # fmt: skip
    provider = SimpleNamespace(get_meter=lambda name: meter, shutdown=lambda: told.append("shutdown"))
    library = SimpleNamespace(MeterProvider=lambda resource, metric_readers: told.append(resource) or provider)
    stand_ins = {
        "sdk.metrics.export": {"ConsoleMetricExporter": lambda **k: k, "PeriodicExportingMetricReader": lambda e: e},
        "sdk.resources": {"Resource": SimpleNamespace(create=dict)},
        "exporter.otlp.proto.http.metric_exporter": {"OTLPMetricExporter": lambda: "otlp"},
        "metrics": {"Observation": lambda value, attributes: (value, attributes)},
    }
    for name in stand_ins:
        parts = ["opentelemetry", *name.split(".")]
        for end in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), SimpleNamespace(__path__=[]))
    for name, content in stand_ins.items():
        monkeypatch.setitem(sys.modules, f"opentelemetry.{name}", SimpleNamespace(__path__=[], **content))
    client = OpenTelemetryClient(library, run_of(tmp_path), "id1")
    client.log(7, LINE)
    client.log(8, LINE | {"valid/en/loss": 3.0})
    assert told[0]["service.instance.id"] == "id1" and told[0]["hammer.run.name"] == "运行"
    kind, observe = made["hammer_valid_loss"]
    assert kind == "gauge" and observe(None) == [(2.6, {"set": "金融"}), (3.0, {"set": "en"})]
    kind, observe = made["hammer_consumed_tokens"]
    assert kind == "counter" and observe(None) == [(4096.0, {})]
    assert made["hammer_step"][1](None) == [(8.0, {})]
    theirs = {name: (kind, *observe(None)) for name, (kind, observe) in made.items() if name.startswith("megatron.")}
    assert theirs == {  # names and kinds of Megatron-LM's core/telemetry/training_metrics.py (d98e8a6)
        "megatron.training.loss": ("gauge", (2.5, {})), "megatron.training.grad_norm": ("gauge", (0.5, {})),
        "megatron.training.learning_rate": ("gauge", (1e-3, {})),
        "megatron.training.tokens_per_sec": ("gauge", (9e3, {})),
        "megatron.training.memory_allocated_gb": ("gauge", (1.5, {})),
        "megatron.training.skipped_iters": ("counter", (0.0, {})),
        "megatron.training.throughput_tflops": ("gauge", (310.5, {})),
    }  # fmt: skip
    assert recorded == {("megatron.training.step_duration_ms", "ms"): [250.0, 250.0]}
    client.close(failed=False)
    assert told[-1] == "shutdown" and made["hammer_run_active"][1](None) == [(0.0, {})]


def exported_names() -> set[str]:
    """What Prometheus sees of a run that has everything."""
    series = Series()
    series.update(1, LINE | {"mfu_causal": 0.3})
    names = {exported(name)[0] + ("_total" if name in COUNTERS else "") for name in series.values}
    return names | {exported(name)[0] + part for name in HISTOGRAMS for part in ("_bucket", "_count", "_sum")}


def test_dashboard_and_alerts_read_names_that_are_exported() -> None:
    board = json.loads((MONITORING / "dashboard.json").read_text(encoding="utf-8"))
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    rules = yaml.safe_load((MONITORING / "alerts.yaml").read_text(encoding="utf-8"))["groups"][0]["rules"]
    assert {rule["alert"] for rule in rules} >= {"TrainingStalled", "LossSpike"}
    known = exported_names()
    for query in [*queries, *(rule["expr"] for rule in rules)]:
        found = set(re.findall(r"(?:hammer|megatron)_\w+", query))
        assert found and found <= known, query
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids) and all(panel["title"] for panel in board["panels"])


@pytest.mark.parametrize("alert", ["LossSpike", "GradientSpike"])
def test_a_jump_that_lasts_raises_an_alert_and_noise_does_not(alert: str) -> None:
    """By the numbers of the rule, on a value every 15 s: a jump stays above the threshold as long as ``for`` says."""
    rules = yaml.safe_load((MONITORING / "alerts.yaml").read_text(encoding="utf-8"))["groups"][0]["rules"]
    (rule,) = (rule for rule in rules if rule["alert"] == alert)
    ((window, offset),) = set(re.findall(r"_over_time\(\w+\[(\d+)h\](?: offset (\d+)m)?\)", rule["expr"]))
    (factor,) = re.findall(r"\+ (\d+) \* stddev_over_time", rule["expr"])
    length, back, lasting = int(window) * 240, int(offset or 0) * 4, int(rule["for"].removesuffix("m")) * 4

    def above(values: np.ndarray) -> int:
        """The longest stretch of values above the threshold."""
        found = most = 0
        for now in range(length + back, len(values)):
            past = values[now - back - length + 1 : now - back + 1]
            found = found + 1 if values[now] > past.mean() + int(factor) * past.std() else 0
            most = max(most, found)
        return most

    quiet = 2.5 + 0.05 * np.random.default_rng(0).standard_normal(2 * (length + back))
    jump = quiet + (np.arange(len(quiet)) >= length + back + 40)
    assert above(quiet) < lasting < above(jump)


def test_what_a_missing_library_is() -> None:
    for name, module in (("prometheus", "prometheus_client"), ("opentelemetry", "opentelemetry"),
                         ("opentelemetry", "opentelemetry.exporter"), ("wandb", "wandb")):  # fmt: skip
        assert is_not_installed(name, ModuleNotFoundError(f"No module named {module!r}", name=module))
    assert not is_not_installed("wandb", ModuleNotFoundError("No module named 'x'", name="x"))
    assert not is_not_installed("wandb", ImportError("x"))
    assert "opentelemetry-exporter-otlp-proto-http" in CLIENTS["opentelemetry"].packages
