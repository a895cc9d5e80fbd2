"""A small run with its export, made once; a tokenizer of another room's tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_hammer.huggingface.certificate import prove
from megatron_hammer.huggingface.export import export_hf
from tests.checkpoint.conftest import tokenizer_model  # noqa: F401
from tests.checkpoint.layouts import tiny_model, write_layout
from tests.huggingface.test_certificate import realistic

MODEL = tiny_model(hidden_size=16, vocab_size=700)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: Path) -> Path:  # noqa: F811
    """A run with a checkpoint of step 7, its metrics and its export; to be copied."""
    from megatron_hammer.tokenizer.load import load_tokenizer

    run = tmp_path_factory.mktemp("runs") / "mine"
    saved = write_layout(run / "checkpoints", MODEL, realistic(MODEL), tokenizer=load_tokenizer(tokenizer_model))
    lines: list[dict[str, Any]] = [
        {"step": step, "loss": 5.0 - step / 10, "lr": 1e-3, "consumed_tokens": 2048 * step, "skipped": False}
        for step in range(1, 10)  # two steps after the checkpoint
    ]
    lines[4] |= {"valid/zh/loss": 4.25, "valid/zh/perplexity": 70.1, "valid/zh/bits_per_byte": 1.5}
    lines[3] |= {"source/zh/tokens": 5000, "source/en/tokens": 5336}  # en gave nothing to a later step
    lines[6] |= {"source/zh/tokens": 9000}
    lines[8] |= {"valid/zh/loss": 1.0}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "evaluations.jsonl").write_text('{"step": 6, "evaluation/ceval/acc": 0.26, "evaluation/x": null}\n')
    export_hf(saved.folder, run / "hf", prove=prove, note=lambda text: None)
    return run
