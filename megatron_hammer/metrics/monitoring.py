"""Exports the figures of metrics.jsonl to Prometheus and OpenTelemetry, as gauges and counters.

::

    a step's line --Series.update--> megatron_training_loss 2.31               gauge: the last value
                                     hammer_valid_loss{set="zh"} 2.44
                                     hammer_consumed_tokens_total 1.2e9        counter: never falls
                                     megatron_training_step_duration_ms_bucket{le="250"} 7    histogram of all steps

    prometheus     OUT.prom in the folder of node_exporter's textfile collector, or an HTTP endpoint that is scraped
    opentelemetry  OTLP over HTTP, where OTEL_EXPORTER_OTLP_ENDPOINT says

What Megatron-LM exports has its names (``MEGATRON``), so that a dashboard of its runs shows ours; other names are those
of metrics.jsonl behind ``hammer_``. The names of sets and sources are labels, so that one query shows them all. The
step is a value (``hammer_step``) and never a label: a label's every new value is a series of its own. The run is a
resource (OpenTelemetry: ``service.instance.id``) or one constant label (Prometheus, where two runs on a node must
differ). ``hammer_run_active`` is 1 until the run ends, so that an alert for a stalled run ends with it. The
dashboard and the alerts in ``examples/monitoring/`` read these names. Needs no torch.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_hammer.metrics.metrics_file import split_key
from megatron_hammer.metrics.tracked_run import Line, TrackedRun

PREFIX = "hammer_"
MEGATRON_PREFIX = "megatron.training."
MEGATRON = {
    "loss": ("loss", 1.0),
    "grad_norm": ("grad_norm", 1.0),
    "lr": ("learning_rate", 1.0),
    "tokens_per_second": ("tokens_per_sec", 1.0),
    "memory_bytes": ("memory_allocated_gb", 2.0**-30),  # of GiB, by its source
    "step_seconds": ("step_duration_ms", 1e3),
    "tflops_causal": ("throughput_tflops", 1.0),  # of a device
    "skipped_steps": ("skipped_iters", 1.0),
}
"""Ours -> the name in Megatron-LM's core/telemetry/training_metrics.py, and its unit in ours."""
HISTOGRAMS = ("step_seconds",)
BOUNDS = (0.0, 5.0, 10.0, 25.0, 50.0, 75.0, 100.0, 250.0, 500.0, 750.0, 1000.0, 2500.0, 5000.0, 7500.0, 10000.0)
"""Upper ends of a histogram's buckets, in its exported unit: OpenTelemetry's own, which Megatron-LM's has."""
COUNTERS = ("consumed_tokens", "consumed_samples", "source_tokens", "skipped_steps")
KINDS = {"valid": "set", "source": "source", "evaluation": "set"}
"""First part of a key -> the label that its name becomes."""
TEXTFILE_SECONDS = 5.0  # between two versions of the file: Prometheus asks every 15 s or more seldom

Labels = tuple[tuple[str, str], ...]


def series_of(key: str) -> tuple[str, Labels]:
    """The name, without prefix, and the labels of a key of metrics.jsonl: ``valid/zh/loss`` is valid_loss{set="zh"}."""
    kind, name, figure = split_key(key)
    if kind in KINDS and name:
        return plain_name(f"{kind}_{figure}"), ((KINDS[kind], name),)
    return plain_name(key), ()


def plain_name(text: str) -> str:
    """Lower-case letters, digits and ``_``, as every monitoring system takes them."""
    return re.sub(r"_+", "_", re.sub(r"[^a-z0-9]", "_", text.lower())).strip("_") or "value"


def exported(name: str, has_dots: bool = False) -> tuple[str, float]:
    """How a figure is called outside, and what its value is multiplied with.

    Args:
        has_dots: as OpenTelemetry separates the parts of a name; a collector makes ``_`` of them for Prometheus.
    """
    if name not in MEGATRON:
        return PREFIX + name, 1.0
    theirs, unit = MEGATRON[name]
    found = MEGATRON_PREFIX + theirs
    return found if has_dots else found.replace(".", "_"), unit


@dataclass
class Histogram:
    """How many values of a run lay in which bucket; they and ``BOUNDS`` are in the exported unit."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    """Of each bucket up to and with its bound; the last is of what lies above all."""
    total: float = 0.0

    def add(self, value: float) -> None:
        """Count one."""
        self.counts[bisect.bisect_left(BOUNDS, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, int]]:
        """Each bound with the number of values that do not exceed it, as Prometheus has them."""
        bounds = [*(f"{bound:g}" for bound in BOUNDS), "+Inf"]
        return list(zip(bounds, itertools.accumulate(self.counts), strict=True))


def counted_in(line: Line) -> Iterator[tuple[str, float]]:
    """What a line has for histograms, in the exported unit."""
    for name in HISTOGRAMS:
        if isinstance(value := line.get(name), int | float) and math.isfinite(value):
            yield name, value * exported(name)[1]


@dataclass
class Series:
    """The last value of every series of a run; what ``HISTOGRAMS`` names is none."""

    values: dict[str, dict[Labels, float]] = field(default_factory=dict)
    """Name without prefix -> labels -> value."""

    def __post_init__(self) -> None:
        self._set("run_active", 1)
        self._set("run_failed", 0)
        self._set("skipped_steps", 0)

    def update(self, step: int, line: Line) -> None:
        """Take in one line; text and null have no value here."""
        self._set("step", step)
        self._set("last_step_timestamp_seconds", time.time())
        for key, value in line.items():
            if key == "skipped":
                self._set("skipped_steps", self.values["skipped_steps"][()] + bool(value))
            elif isinstance(value, bool | int | float) and math.isfinite(value):
                name, labels = series_of(key)
                if name not in HISTOGRAMS:
                    self._set(name, float(value), labels)

    def end(self, failed: bool) -> None:
        """The run is over."""
        self._set("run_active", 0)
        self._set("run_failed", failed)

    def _set(self, name: str, value: float, labels: Labels = ()) -> None:
        self.values.setdefault(name, {})[labels] = float(value)


class PrometheusClient:
    """Prometheus: a file for node_exporter's textfile collector, or an endpoint on this machine.

    ``log.prometheus_textfile`` names the collector's folder; without it ``log.prometheus_address`` is listened on. With
    ``log.trackers_offline`` the file lies in OUT/trackers/.
    """

    def __init__(self, library: Any, run: TrackedRun, run_id: str | None) -> None:
        self.run_id = run_id or secrets.token_hex(8)
        self._library, self._series, self._server, self._written = library, Series(), None, 0.0
        self._histograms = {name: Histogram() for name in HISTOGRAMS}
        self._labels = {"run": run.name, "run_id": self.run_id}
        self._registry = library.CollectorRegistry()
        self._registry.register(self)
        log = run.config.get("log", {})
        folder = run.folder if run.offline else log.get("prometheus_textfile")
        self._file = None if folder is None else Path(folder) / f"hammer-{self.run_id}.prom"
        if self._file is None:
            host, _, port = str(log["prometheus_address"]).rpartition(":")
            self._server = library.start_http_server(int(port), addr=host.strip("[]"), registry=self._registry)
        else:
            self._write(0.0)

    def collect(self) -> Iterator[Any]:
        """All series, as the library asks for them."""
        core = self._library.metrics_core
        for name, series in list(self._series.values.items()):
            counter = name in COUNTERS
            kind = core.CounterMetricFamily if counter else core.GaugeMetricFamily
            keys = [key for key, _ in next(iter(series))]
            called, unit = exported(name)
            family = kind(called, f"{name} of metrics.jsonl", labels=[*self._labels, *keys])
            for labels, value in list(series.items()):
                family.add_metric([*self._labels.values(), *(text for _, text in labels)], value * unit)
            yield family
        for name, histogram in self._histograms.items():
            family = core.HistogramMetricFamily(
                exported(name)[0], f"{name} of metrics.jsonl", labels=list(self._labels)
            )
            family.add_metric(list(self._labels.values()), histogram.cumulative(), histogram.total)
            yield family

    def log(self, step: int, line: Line) -> None:
        """Keep the values until they are asked for."""
        self._series.update(step, line)
        for name, value in counted_in(line):
            self._histograms[name].add(value)
        self._write(TEXTFILE_SECONDS)

    def close(self, failed: bool) -> None:
        """The run's last word; an endpoint ends with the run."""
        self._series.end(failed)
        self._write(0.0)
        if self._server is not None:
            server, thread = self._server
            server.shutdown()
            server.server_close()
            thread.join()

    def _write(self, seconds: float) -> None:
        """Replace the file, if there is one that is older."""
        if self._file is not None and time.monotonic() - self._written >= seconds:
            self._library.write_to_textfile(str(self._file), self._registry)
            self._written = time.monotonic()


class OpenTelemetryClient:
    """OpenTelemetry: OTLP over HTTP, set by its own variables (OTEL_EXPORTER_OTLP_ENDPOINT, _HEADERS, ...).

    With ``log.trackers_offline`` each export is a line of JSON in OUT/trackers/opentelemetry.jsonl.
    """

    def __init__(self, library: Any, run: TrackedRun, run_id: str | None) -> None:
        from opentelemetry.sdk.metrics.export import ConsoleMetricExporter, PeriodicExportingMetricReader
        from opentelemetry.sdk.resources import Resource

        self.run_id = run_id or secrets.token_hex(16)
        self._series, self._known = Series(), set[str]()
        self._out: Any = None
        if run.offline:
            self._out = (Path(run.folder) / "opentelemetry.jsonl").open("a", encoding="utf-8")
            exporter = ConsoleMetricExporter(
                out=self._out, formatter=lambda found: json.dumps(json.loads(found.to_json())) + "\n"
            )
        else:
            from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter

            exporter = OTLPMetricExporter()
        resource = Resource.create({
            "service.name": run.project, "service.instance.id": self.run_id, "hammer.run.name": run.name,
            "nemo.run.id": self.run_id,  # as Megatron-LM calls it
            "hammer.run.ranks": run.environment.get("ranks", 1),
        })  # fmt: skip
        self._provider = library.MeterProvider(
            resource=resource, metric_readers=[PeriodicExportingMetricReader(exporter)]
        )
        self._meter = self._provider.get_meter("megatron_hammer")
        self._histograms = {
            name: self._meter.create_histogram(exported(name, True)[0], unit="ms") for name in HISTOGRAMS
        }
        self._instruments()

    def _instruments(self) -> None:
        """One observable instrument for each name, made when the name is first seen."""
        for name in [name for name in self._series.values if name not in self._known]:
            self._known.add(name)
            make = self._meter.create_observable_counter if name in COUNTERS else self._meter.create_observable_gauge
            make(exported(name, True)[0], callbacks=[lambda options, name=name: self._observed(name)])

    def _observed(self, name: str) -> list[Any]:
        from opentelemetry.metrics import Observation

        unit = exported(name)[1]
        return [Observation(value * unit, dict(labels)) for labels, value in list(self._series.values[name].items())]

    def log(self, step: int, line: Line) -> None:
        """Keep the values until the next export."""
        self._series.update(step, line)
        for name, value in counted_in(line):
            self._histograms[name].record(value)
        self._instruments()

    def close(self, failed: bool) -> None:
        """Deliver the last values."""
        self._series.end(failed)
        self._provider.shutdown()
        if self._out is not None:
            self._out.close()
