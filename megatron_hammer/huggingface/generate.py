"""Continues prompts with a ``TextModel``: one after the other, in batches, or piece by piece while they are generated.

Shorter rows of a batch get padding on the left, which no row attends to and no penalty counts. Without sampling a
prompt has the same continuation in any batch, up to rounding. With sampling the seed is set anew before each batch, so
that the texts depend on how many prompts a batch has. Needs no torch until it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_hammer.base.errors import ConfigError, DataError
from megatron_hammer.base.progress import say
from megatron_hammer.corpus.documents import read_texts
from megatron_hammer.huggingface.text_model import TextModel

Shown = Callable[[str], None]
"""Gets the pieces of a continuation as they come."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and how many are."""

    max_new_tokens: int = 48
    """Longest continuation; it ends earlier at an id that ends a text."""
    temperature: float = 0.7
    """Divides the logits before sampling; 0: always the likeliest token."""
    top_k: int = 40
    """Sample among so many likeliest tokens; 0: among all."""
    top_p: float | None = None
    """Sample among the likeliest tokens that together have this probability; None: as the model's
    generation_config.json says, or all."""
    repetition_penalty: float | None = None
    """Divides the logits, where positive, of tokens that were there before, prompt included, and multiplies negative
    ones; None: as generation_config.json says, or 1."""
    seed: int = 0

    def check(self) -> None:
        """Raise ``ConfigError`` E245 for values outside their range."""
        for name, value, low in (
            ("--max-new-tokens", self.max_new_tokens, 1),
            ("--temperature", self.temperature, 0),
            ("--top-k", self.top_k, 0),
        ):
            if not low <= value < float("inf"):
                raise ConfigError(45, f"{name}={value}", f"must be at least {low}", f"raise {name}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            rule = "must be above 0 and at most 1"
            raise ConfigError(45, f"--top-p={self.top_p}", rule, "use 0.9, or 1 for all tokens")
        penalty = self.repetition_penalty
        if penalty is not None and not 0 < penalty < float("inf"):
            rule = "must be positive"
            raise ConfigError(45, f"--repetition-penalty={penalty}", rule, "use 1 for none, 1.1 for a mild one")

    def words(self) -> dict[str, Any]:
        """Arguments for transformers' ``generate``; what is None is left to the model's own configuration."""
        chosen: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "use_cache": True}
        if self.temperature > 0:
            chosen |= {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        else:  # the values of the others that transformers takes for not given
            chosen |= {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0}
        chosen["repetition_penalty"] = self.repetition_penalty
        return {name: value for name, value in chosen.items() if value is not None}


@dataclass(frozen=True)
class Continuation:
    """What a model made of a prompt."""

    prompt: str
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    """The new ones, with the one that ends the text."""
    text: str
    """Of the new ones."""
    whole: str
    """Prompt and continuation as the tokenizer decodes them together."""
    ended: Literal["end", "length"]
    """By an id that ends a text, or because ``max_new_tokens`` was reached."""

    def to_tree(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "prompt": self.prompt,
            "continuation": self.text,
            "ended": self.ended,
            "prompt_ids": list(self.prompt_ids),
            "ids": list(self.ids),
        }


def continue_texts(
    model: TextModel, prompts: Sequence[str], sampling: Sampling, batch_size: int = 1
) -> Iterator[Continuation]:
    """Continue each prompt, ``batch_size`` at a time.

    Raises:
        ConfigError: E245 a value out of range; E246 an empty prompt, and a tokenizer without bos and eos.
    """
    sampling.check()
    if batch_size < 1:
        raise ConfigError(45, f"--batch-size={batch_size}", "must be at least 1", "raise --batch-size")
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        rows = [prompt_ids(model, prompt) for prompt in batch]
        seed_everything(sampling.seed)
        for prompt, row, new in zip(batch, rows, continue_rows(model, rows, sampling)):
            yield continuation_of(model, prompt, row, new)


def read_prompts(path: Path, key: str) -> list[str]:
    """The prompts of a file: a field of JSON lines, or each line of a text that is not empty.

    Raises:
        DataError: E301 and on: it is missing or damaged, or has no prompt.
    """
    found = [text for texts, _ in read_texts(path, key, text_documents="line") for text in texts]
    if not found:
        raise DataError(2, str(path), "has no prompt", "write one a line, or a JSON object a line into a .jsonl")
    return found


def prompt_ids(model: TextModel, prompt: str) -> list[int]:
    """The ids of a prompt, which begins as documents did in training.

    Raises:
        ConfigError: E246 there is nothing to begin with.
    """
    ids = [*model.start, *model.encode(prompt)] or list(model.boundary)
    if not ids:
        raise ConfigError(46, "--prompt ''", "is empty and the tokenizer has neither bos nor eos", "give a prompt")
    return ids


def continuation_of(model: TextModel, prompt: str, row: Sequence[int], new: Sequence[int]) -> Continuation:
    """The text of new ids behind those of a prompt."""
    whole = model.decode([*row, *new])
    before = model.decode(row)
    text = whole[len(before) :] if whole.startswith(before) else model.decode(new)
    ended: Literal["end", "length"] = "end" if new and new[-1] in model.end_ids else "length"
    return Continuation(prompt, tuple(row), tuple(new), text, whole, ended)


def seed_everything(seed: int) -> None:
    """The same seed, the same texts."""
    import torch

    torch.manual_seed(seed)


def continue_rows(
    model: TextModel, rows: Sequence[Sequence[int]], sampling: Sampling, show: Shown | None = None
) -> list[list[int]]:
    """The new ids of each row, with the one that ends it.

    Args:
        show: gets the text as it comes; for one row only.
    """
    import torch
    from transformers import LogitsProcessorList

    longest = max(map(len, rows))
    if model.context is not None and longest + sampling.max_new_tokens > model.context:
        say(f"note: {longest} tokens and {sampling.max_new_tokens} new ones are more than the {model.context} "
            "that the model was made for: what comes beyond them may be poor")  # fmt: skip
    missing = [longest - len(row) for row in rows]
    tokens = torch.tensor([[model.pad_id] * gap + list(row) for gap, row in zip(missing, rows)])
    attended = torch.arange(longest) >= torch.tensor(missing)[:, None]
    words = sampling.words()
    processors = LogitsProcessorList()
    if any(missing):
        penalty = words.pop("repetition_penalty", model.model.generation_config.repetition_penalty) or 1.0
        words["repetition_penalty"] = 1.0
        if penalty != 1.0:
            processors.append(_penalty_without_padding(penalty, missing))
    device = model.model.device
    streamer = None if show is None else _Streamer(model, rows[0], show)
    with torch.inference_mode():
        output = model.model.generate(
            tokens.to(device), attention_mask=attended.long().to(device), pad_token_id=model.pad_id,
            logits_processor=processors, streamer=streamer, **words,
        )  # fmt: skip
    return [_until_end(row[longest:], model.end_ids) for row in output.tolist()]


def _until_end(new: list[int], ends: Sequence[int]) -> list[int]:
    """Without the padding that stands behind the end of a text."""
    last = next((place for place, token in enumerate(new) if token in ends), len(new) - 1)
    return new[: last + 1]


def _penalty_without_padding(penalty: float, missing: Sequence[int]) -> Any:
    """transformers' repetition penalty, for which padding on the left is a repetition of a row's first token."""
    from transformers import LogitsProcessor, RepetitionPenaltyLogitsProcessor

    inner: Any = RepetitionPenaltyLogitsProcessor(penalty)

    class Penalty(LogitsProcessor):  # type: ignore[misc]
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            seen = input_ids.clone()
            for row, gap in enumerate(missing):
                seen[row, :gap] = seen[row, gap]
            return inner(seen, scores)

    return Penalty()


class _Streamer:
    """Hands on what is decided of a continuation: whole characters, in the order in which transformers puts tokens."""

    def __init__(self, model: TextModel, row: Sequence[int], show: Shown) -> None:
        self._model, self._show = model, show
        self._ids, self._shown, self._is_prompt = list(row), len(model.decode(row)), True

    def put(self, tokens: Any) -> None:
        """The prompt first, then token by token."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self._ids += tokens.flatten().tolist()
        text = self._model.decode(self._ids)
        whole = len(text.rstrip("\ufffd"))  # a character of which the last bytes are still to come
        if whole > self._shown:
            self._show(text[self._shown : whole])
            self._shown = whole

    def end(self) -> None:
        """What never became a whole character is shown as it is."""
        if rest := self._model.decode(self._ids)[self._shown :]:
            self._show(rest)
