"""Run by prometheus_client and OpenTelemetry's SDK: what the trackers' clients make of a run, read back by them.

The first argument is a folder for the textfile and the offline exporter, the others are queries that must be PromQL.
Standard output is one JSON object.
"""

import gzip
import http.server
import json
import os
import sys
import threading
import urllib.request
from pathlib import Path

import promql_parser
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from prometheus_client.parser import text_string_to_metric_families

from megatron_hammer.metrics.tracked_run import TrackedRun
from megatron_hammer.metrics.tracker_process import import_library, open_client

folder, *queries = sys.argv[1:]
LINE = {"loss": 0.1 + 0.2, "skipped": False, "consumed_tokens": 4096, "mfu": None, 'valid/金融 "q"\n/loss': 2.5}


def run(offline: bool = False, **log: object) -> TrackedRun:
    config = {"log": {"prometheus_address": "127.0.0.1:19464", "prometheus_textfile": None} | log}
    return TrackedRun(folder, "project", "锤子 1", offline, True, config, {"ranks": 2})


def samples(text: str) -> list:
    return [[s.name, s.labels, s.value] for family in text_string_to_metric_families(text) for s in family.samples]


import_library("prometheus"), import_library("opentelemetry")
client = open_client("prometheus", run())
client.log(1, LINE)
client.log(2, LINE | {"skipped": True})
scraped = urllib.request.urlopen("http://127.0.0.1:19464/metrics").read().decode()
client.close(failed=False)
try:
    urllib.request.urlopen("http://127.0.0.1:19464/metrics")
    ended = False
except OSError:
    ended = True
client = open_client("prometheus", run(prometheus_textfile=folder))
client.log(3, LINE)
client.close(failed=True)

client = open_client("opentelemetry", run(offline=True))
client.log(1, LINE)
client.close(failed=False)
sent: list[bytes] = []


class Collector(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        sent.append(gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *words: object) -> None:
        pass


server = http.server.HTTPServer(("127.0.0.1", 0), Collector)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
client = open_client("opentelemetry", run())
client.log(1, LINE)
client.close(failed=False)
(resource,) = ExportMetricsServiceRequest.FromString(sent[-1]).resource_metrics
for query in queries:
    promql_parser.parse(query)
print(json.dumps({
    "scraped": samples(scraped),
    "ended": ended,
    "textfile": [sample for path in Path(folder).glob("*.prom") for sample in samples(path.read_text())],
    "offline": json.loads((Path(folder) / "opentelemetry.jsonl").read_text().splitlines()[-1]),
    "otlp": sorted(metric.name for metric in resource.scope_metrics[0].metrics),
    "resource": {a.key: a.value.string_value for a in resource.resource.attributes},
}))  # fmt: skip
