"""OUT/generations.jsonl: how each checkpoint continues fixed prompts, one line a text, for people to compare.

A line is ``{"step": 500, "prompt": "The", "text": " cat sat"}``, the text without its prompt. A run with
``train.evaluator.prompts`` has them written as it trains, ``tools/report.py --prompt`` by the checkpoints that are
there. Every prompt and step has the same seed, so that texts differ by the weights alone. Needs no torch until a model
is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_hammer.base.reading import parse_json
from megatron_hammer.metrics.metrics_file import append_line

GENERATIONS = "generations.jsonl"
MOST_GENERATIONS = 20_000
"""Read of one file."""


@dataclass(frozen=True)
class Generation:
    """One line of the file: how a checkpoint continues a prompt."""

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


def write_generations(
    checkpoint: str | Path, step: int, prompts: Sequence[str], output: Path, new_tokens: int, device: str = "cpu"
) -> None:
    """Have a checkpoint continue prompts, and add a line for each to ``output``/generations.jsonl.

    Raises:
        HammerError: the checkpoint cannot be loaded, has no tokenizer, or a prompt is none.
    """
    from megatron_hammer.huggingface.generate import Sampling, continue_texts
    from megatron_hammer.huggingface.text_model import open_text_model

    model = open_text_model(checkpoint, device=device)
    for found in continue_texts(model, prompts, Sampling(max_new_tokens=new_tokens)):
        append_line(output / GENERATIONS, asdict(Generation(step, found.prompt, found.text)))
