"""OUT/generations.jsonl: what each checkpoint made of fixed prompts, one line a text, for people to compare.

A line is ``{"step": 500, "prompt": "The", "text": " cat sat"}``, the text without its prompt. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_hammer.base.reading import parse_json

GENERATIONS = "generations.jsonl"
MOST_GENERATIONS = 20_000
"""Read of one file."""


@dataclass(frozen=True)
class Generation:
    """One line."""

    step: int
    prompt: str
    text: str


def read_generations(lines: Iterable[bytes]) -> Iterator[Generation]:
    """The lines that can be read; of the same step and prompt the last one counts."""
    found: dict[tuple[int, str], Generation] = {}
    for line, _ in zip(lines, range(MOST_GENERATIONS), strict=False):
        try:
            value = parse_json(line)
            step, prompt, text = value["step"], value["prompt"], value["text"]
        except (ValueError, TypeError, KeyError):
            continue
        if type(step) is int and isinstance(prompt, str) and isinstance(text, str):
            found[step, prompt] = Generation(step, prompt, text)
    yield from found.values()
