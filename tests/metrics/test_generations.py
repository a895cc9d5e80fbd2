"""generations.jsonl: written a line a text, read whatever the file holds."""

from __future__ import annotations

import types
from pathlib import Path

import pytest

from megatron_hammer.huggingface import generate, text_model
from megatron_hammer.metrics.generations import GENERATIONS, Generation, read_generations, write_generations


def test_texts_of_a_checkpoint_are_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def continued(model: object, prompts: list[str], sampling: generate.Sampling) -> list[types.SimpleNamespace]:
        asked.extend([model, sampling])
        return [types.SimpleNamespace(prompt=prompt, text=f"，{prompt}") for prompt in prompts]

    monkeypatch.setattr(text_model, "open_text_model", lambda checkpoint, device: (checkpoint, device))
    monkeypatch.setattr(generate, "continue_texts", continued)
    write_generations("step-5", 5, ["今天", "The"], tmp_path, 9, "cuda:1")
    assert asked == [("step-5", "cuda:1"), generate.Sampling(max_new_tokens=9)]
    with (tmp_path / GENERATIONS).open("rb") as file:
        assert list(read_generations(file)) == [Generation(5, "今天", "，今天"), Generation(5, "The", "，The")]


def test_what_is_no_text_is_passed_over() -> None:
    good = b'{"step": 1, "prompt": "a", "text": "old"}', b'{"step": 1, "prompt": "a", "text": "new"}'
    bad = (
        b'{"step": true, "prompt": "a", "text": ""}',
        b'{"step": 1, "prompt": 3, "text": ""}',
        b"{",
        b"[]",
        b"3",
        b"\xff",
    )
    lines = [good[0], *bad, good[1]]
    assert list(read_generations(lines)) == [Generation(1, "a", "new")]
