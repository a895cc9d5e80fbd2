"""Fill-in-the-middle: pieces of documents rearranged, so that a model learns to write what stands between two texts.

Of the document pieces in the samples of a source in ``data.fim``, a share of ``rate`` is cut at two places, drawn
evenly, into prefix, middle and suffix, and becomes one of these (Bavarian et al. 2022, arXiv 2207.14255; SPM in the
form that StarCoder, arXiv 2305.06161, trains beside PSM)::

    PSM    <fim_prefix> prefix <fim_suffix> suffix <fim_middle> middle
    SPM    <fim_prefix> <fim_suffix> suffix <fim_middle> prefix middle

That is done with the tokens of a sample, after it has been cut from its documents (the paper's context level, which it
finds ahead of whole documents; StarCoder does so, too). The cuts lie between tokens, not characters, so that nothing is
tokenized again: a model learns less of completing half a word than with cuts between characters. A piece keeps its
length, and so its place under document masks: the three sentinels take the place of the last three tokens of the
suffix. bos at its start and eos at its end stay there. Pieces of fewer than ``SMALLEST`` tokens are left alone.

What is done is a pure function of (seed, content of the source, window, number of the piece in it): the order of
samples does not change, a run that goes on sees the same, and another epoch, whose windows are others, sees other cuts.
Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.config import Config
from megatron_hammer.config.settings import FimConfig
from megatron_hammer.sampling.order import derive_key
from megatron_hammer.tokenizer.interface import Tokenizer
from megatron_hammer.tokenizer.load import load_tokenizer

SENTINELS = 3
SMALLEST = 8  # tokens of a piece without bos and eos: fewer leave nothing to fill in beside the sentinels
DRAWS = 4  # of each piece: whether, which form, two cuts


@dataclass(frozen=True)
class Infill:
    """What was done with a piece of a sample."""

    row: int
    piece: int
    """Its number in the sample."""
    form: str
    """PSM or SPM."""
    prefix: int
    """Tokens of it, as of the others."""
    middle: int
    suffix: int


@dataclass(frozen=True)
class FillInTheMiddle:
    """What is done with the pieces of one source."""

    rate: float
    spm_rate: float
    ids: tuple[int, int, int]
    """Of the sentinels of prefix, middle and suffix."""
    bos_id: int | None = None
    eos_id: int | None = None

    def apply(
        self, samples: np.ndarray, rows: np.ndarray, windows: np.ndarray, lengths: np.ndarray, counts: np.ndarray,
        key: int,
    ) -> list[Infill]:  # fmt: skip
        """Rearrange pieces in place.

        Args:
            samples: [n, s + 1] token ids.
            rows: of the samples of this source; windows: of each of them, which one it is.
            lengths: of all their pieces, one sample after the other; counts: pieces of each sample.
            key: of the source (``source_key``).
        """
        before = np.cumsum(counts) - counts
        numbers = np.arange(len(lengths)) - np.repeat(before, counts)  # of a piece in its sample
        ends = np.cumsum(lengths)
        starts = ends - lengths - np.repeat((ends - lengths)[before], counts)
        draws = uniform(key, np.repeat(windows, counts), numbers)
        found = []
        for i in np.flatnonzero((draws[0] < self.rate) & (lengths >= SMALLEST)).tolist():
            row, start = int(rows[np.searchsorted(before, i, side="right") - 1]), int(starts[i])
            piece = samples[row, start : start + int(lengths[i])]
            begin, end = int(piece[0] == self.bos_id), len(piece) - int(piece[-1] == self.eos_id)
            body, size = piece[begin:end], end - begin - SENTINELS
            if len(body) < SMALLEST:
                continue
            a, b = sorted(int(u * (size + 1)) for u in draws[2:, i])
            is_spm = bool(draws[1, i] < self.spm_rate)
            self._rearrange(body, a, b, size, is_spm)
            found.append(Infill(row, int(numbers[i]), "SPM" if is_spm else "PSM", a, b - a, size - b))
        return found

    def _rearrange(self, body: np.ndarray, a: int, b: int, size: int, is_spm: bool) -> None:
        """Prefix is [0, a), middle [a, b), suffix [b, size), and behind it stands what the sentinels replace."""
        prefix, middle, suffix = body[:a].copy(), body[a:b].copy(), body[b:size].copy()
        of_prefix, of_middle, of_suffix = ([i] for i in self.ids)
        parts: tuple[Any, ...]
        if is_spm:
            parts = (of_prefix, of_suffix, suffix, of_middle, prefix, middle)
        else:
            parts = (of_prefix, prefix, of_suffix, suffix, of_middle, middle)
        body[:] = np.concatenate(parts)


def source_key(seed: int, fingerprint: str) -> int:
    """What the draws of a source follow from, beside window and piece."""
    return derive_key(seed, "fill in the middle", fingerprint)


def uniform(key: int, windows: np.ndarray, pieces: np.ndarray) -> np.ndarray:
    """[DRAWS, n] float64 in [0, 1), a pure function of its arguments: two rounds of SplitMix64's finalizer (Steele, Lea
    and Flood 2014), the first over key, window and piece, the second over the number of the draw."""
    with np.errstate(over="ignore"):  # arithmetic is modulo 2^64
        state = np.uint64(key) + windows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        state = _mixed(state) + pieces.astype(np.uint64)
        numbers = np.arange(1, DRAWS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        bits = _mixed(_mixed(state)[None, :] + numbers[:, None])
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed


def open_fim(config: Config, tokenizer: Tokenizer | None = None) -> dict[str, FillInTheMiddle]:
    """What ``data.fim`` asks for, by prefix; loads the tokenizer where the config names some and none is given.

    Raises:
        ConfigError: E268 there is no tokenizer, or a sentinel is no token of it, or one with a meaning of its own.
    """
    wanted: Mapping[str, FimConfig] = config.data.fim or {}
    if not wanted:
        return {}
    if tokenizer is None:
        if config.tokenizer.path is None:
            raise ConfigError(68, "data.fim", "needs a tokenizer, which knows the sentinels", "set tokenizer.path")
        tokenizer = load_tokenizer(config.tokenizer.path)
    found = {}
    for prefix, fim in wanted.items():
        names = {name: getattr(fim, name) for name in ("prefix", "middle", "suffix")}
        ids: Any = {name: tokenizer.find_id(token) for name, token in names.items()}
        for name, token in names.items():
            if ids[name] is None:
                raise ConfigError(
                    68,
                    f"data.fim[{prefix}].{name}={token}",
                    f"is no token of {tokenizer.path}",
                    "name tokens that it has (Qwen2.5 has <|fim_prefix|>, <|fim_middle|>, <|fim_suffix|>), or add them "
                    "to it and give the model rows for them (tools/extend_embeddings.py)",
                )
            role = next((of for of in ("bos", "eos", "unk") if getattr(tokenizer, f"{of}_id") == ids[name]), "")
            if role:
                what, remedy = f"data.fim[{prefix}].{name}={token}", "name a token that stands for nothing else"
                raise ConfigError(68, what, f"is {role} of {tokenizer.path}, which means something already", remedy)
        sentinels = ids["prefix"], ids["middle"], ids["suffix"]
        found[prefix] = FillInTheMiddle(fim.rate, fim.spm_rate, sentinels, tokenizer.bos_id, tokenizer.eos_id)
    return found
