"""Texts that an exported folder continues, each as prompt and continuation in one, for the tests of exports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_hammer.huggingface.generate import Sampling, continue_texts
from megatron_hammer.huggingface.text_model import open_folder


def generate(
    folder: Path,
    prompts: Sequence[str],
    max_new_tokens: int = 48,
    temperature: float = 0.7,
    top_k: int = 40,
    seed: int = 0,
) -> Iterator[str]:
    """Continue each prompt with the model of a Hugging Face folder."""
    sampling = Sampling(max_new_tokens, temperature, top_k, seed=seed)
    sampling.check()
    for found in continue_texts(open_folder(folder), prompts, sampling):
        yield found.whole
