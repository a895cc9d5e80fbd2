"""The benchmark of preprocessing works at toy size: what it measures is no business of a test."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "data_preprocess.py"


def test_ours_and_the_peer_write_the_same_bytes(tmp_path: Path, tokenizer: Path) -> None:
    spec = importlib.util.spec_from_file_location("data_preprocess", BENCHMARK)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    for name in ("zh", "en", "code"):
        lines = (json.dumps({"text": f"model {name} world {k} 世界"}, ensure_ascii=False) + "\n" for k in range(200))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    parser = argparse.ArgumentParser()
    benchmark.add_arguments(parser)
    arguments = ["--corpus", tmp_path, "--tokenizer-model", tokenizer, "--megabytes", "0.001", "--rounds", "1",
                 "--starts", "1", "--folder", tmp_path]  # fmt: skip
    facts = benchmark.measure(parser.parse_args(list(map(str, arguments))))
    assert facts["same_bytes"] and facts["ratio"] > 0 and facts["start_seconds"] > 0 and facts["ours_peak_mb"] > 10
    assert 0 < facts["text_bytes"] < 20_000
    json.dumps(facts)
