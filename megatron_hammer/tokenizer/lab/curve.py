"""Tokens a byte against vocabulary size, measured on a sample of texts, and the size of most bytes per FLOP.

    texts                 --> sample_texts   --> some megabytes of each domain            (chosen by hash)
    tokenizer, sample     --> measure_curve  --> tokens a byte against vocabulary size    (encoded again at each size)
    curve, FLOPs a token  --> find_best      --> size of most bytes per FLOP

Training of BPE adds pieces one by one, so a vocabulary of size V' is the best-ranked part of a larger one:
the same model without its worst-scored pieces (sentencepiece) or last merges (``tokenizer.json``). Byte, control and
user-defined pieces and single characters stay, since a training to V' would have them too; so do runs of spaces that
rank behind everything else (Llama-2's were put in by hand). The sample is encoded with every cut-down tokenizer, by the
same code as ever, and a monotone cubic goes through the points, in logarithms of tokens a byte and of the pieces that
may go. Sizes beyond the tokenizer's own cannot be known from it. Of a merged vocabulary (HammerLLM's) the curve is that
of cutting it down, not of training and merging anew. A unigram vocabulary is no part of a larger one: no curve.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_hammer.tokenizer.interface import Tokenizer
from megatron_hammer.tokenizer.lab.analyze import OVERALL, Usage, count_usage
from megatron_hammer.tokenizer.lab.prefixes import find_prefixes
from megatron_hammer.tokenizer.sentences import HashSample

SAMPLE_BYTES = 8_000_000
"""Text of each domain that is encoded at each size. Such samples of 27 MB of Chinese, 131 MB of English and 524 MB of
code had tokens a byte within 0.5 % of those of the whole, for three tokenizers (2 MB: within 3 %)."""
STRETCH_CHARACTERS = 8192
"""Longest stretch of a document that is sampled as one. Shorter ones make a fairer sample, and a cut may cost a token:
one in some two thousand."""
GRID_SIZES = 10
"""Sizes measured first: the pieces that may go in equal ratios, from GRID_START of them to all."""
GRID_START = 0.01
REFINED_SIZES = 4
"""Sizes measured then, between the neighbours of the best one."""
NEAR_BEST = 0.99
"""Share of the best bytes a second that sizes of the reported range reach: the curve is flat at its top."""


# ---- texts ----


@dataclass(frozen=True)
class TextSample:
    """Some text of each domain, and how much there was."""

    texts: dict[str, list[str]]
    kept_bytes: dict[str, int]
    seen_bytes: dict[str, int]

    def tokens_per_byte(self, usage: Mapping[str, Usage]) -> dict[str, float]:
        """By domain; overall each domain counts by the bytes that were seen of it, not by those kept."""
        found = {domain: usage[domain].tokens / usage[domain].bytes for domain in self.texts}
        total = sum(self.seen_bytes.values())
        return found | {OVERALL: sum(self.seen_bytes[domain] / total * found[domain] for domain in self.texts)}


def sample_texts(
    texts: Mapping[str, Iterable[str]],
    sample_bytes: int = SAMPLE_BYTES,
    progress: Callable[[int], None] = lambda done_bytes: None,
) -> TextSample:
    """Keep at most ``sample_bytes`` of each domain, chosen by a hash of place and content: the same for the same texts.

    Long documents are cut into stretches at line breaks, so that no single one decides. Of a domain with less text than
    asked for, all is kept and uncut.
    """
    kept: dict[str, list[str]] = {}
    kept_bytes, seen_bytes = {}, {}
    for domain, documents in texts.items():
        sample = HashSample(sample_bytes)
        whole: list[str] = []  # all of it, for as long as it fits
        place = 0
        for document in documents:
            before = sample.seen_bytes
            for stretch in _stretches(document, max(1, min(STRETCH_CHARACTERS, sample_bytes // 16))):
                sample.add(stretch.encode("utf-8", "surrogatepass"), place.to_bytes(8, "little"))
                place += 1
            if sample.seen_bytes <= sample_bytes:
                whole.append(document)
            progress(sample.seen_bytes - before)
        if sample.seen_bytes > sample_bytes:
            whole = [stretch.decode("utf-8", "surrogatepass") for stretch in sample.sentences]
        kept[domain], kept_bytes[domain], seen_bytes[domain] = whole, sample.kept_bytes, sample.seen_bytes
    return TextSample(kept, kept_bytes, seen_bytes)


def _stretches(text: str, characters: int) -> Iterator[str]:
    while len(text) > characters:
        cut = text.rfind("\n", characters // 2, characters) + 1 or characters
        yield text[:cut]
        text = text[cut:]
    if text:
        yield text


# ---- the curve and its best size ----


@dataclass(frozen=True)
class CompressionCurve:
    """Tokens a byte at measured vocabulary sizes."""

    fixed: int
    """Pieces that every size has."""
    sizes: tuple[int, ...]
    """Increasing; the last is the full vocabulary."""
    tokens_per_byte: tuple[dict[str, float], ...]
    """By domain and overall, of each size."""

    def at(self, sizes: np.ndarray, domain: str = OVERALL) -> np.ndarray:
        """[n] float64: tokens a byte at sizes from the first to the last measured one."""
        measured = np.log([found[domain] for found in self.tokens_per_byte])
        x, at = (np.log(np.asarray(of, dtype=np.float64) - self.fixed) for of in (self.sizes, sizes))
        tokens: np.ndarray = np.exp(interpolate_monotone(x, measured, at))
        return tokens


@dataclass(frozen=True)
class BestSize:
    """The vocabulary size of most bytes per FLOP."""

    size: int
    tokens_per_byte: float
    gain: float
    """Bytes a second there / those of the full vocabulary."""
    near: tuple[int, int]
    """Sizes from and to which bytes a second are at least NEAR_BEST of the best."""
    edge: Literal["", "or more", "or fewer"]
    """The best size is the last of the curve, or the first: there may be a better one beyond."""


def measure_curve(
    tokenizer: Tokenizer,
    full: Mapping[str, float],
    sample: TextSample,
    flops: Callable[[np.ndarray], np.ndarray],
    threads: int = 1,
    progress: Callable[[int], None] = lambda done_bytes: None,
) -> CompressionCurve | str:
    """Encode the sample with smaller vocabularies; first on a grid, then closer to the best size.

    Args:
        tokenizer: any.
        full: its own tokens a byte on the sample.
        sample: what to encode.
        flops: FLOPs of a token of vocabulary sizes, to know where to look closer.
        threads: of the encoding.
        progress: as in ``count_usage``.

    Returns:
        The curve, or why there is none.
    """
    prefixes = find_prefixes(tokenizer)
    if isinstance(prefixes, str):
        return prefixes
    measured = {prefixes.full: dict(full)}

    def measure(sizes: Iterable[float]) -> None:
        for size in sorted({round(size) for size in sizes} - measured.keys()):
            with tempfile.TemporaryDirectory(prefix="price-") as folder:
                smaller = prefixes.cut(size, Path(folder))
                usage = count_usage({"": smaller}, sample.texts, threads, progress=progress)[""]
            measured[size] = sample.tokens_per_byte(usage)

    def curve() -> CompressionCurve:
        sizes = sorted(measured)
        return CompressionCurve(prefixes.fixed, tuple(sizes), tuple(measured[size] for size in sizes))

    def measure_between(first: int, last: int, count: int) -> None:
        measure(prefixes.fixed + np.geomspace(first - prefixes.fixed, last - prefixes.fixed, count))

    may_go = prefixes.full - prefixes.fixed
    measure_between(prefixes.fixed + max(1, round(GRID_START * may_go)), prefixes.full, GRID_SIZES)
    sizes = np.array(curve().sizes)
    best = int(np.argmin(curve().at(sizes) * flops(sizes)))
    measure_between(sizes[max(0, best - 1)], sizes[min(len(sizes) - 1, best + 1)], REFINED_SIZES + 2)
    return curve()


def find_best(curve: CompressionCurve, flops: Callable[[np.ndarray], np.ndarray], domain: str = OVERALL) -> BestSize:
    """The size of most bytes per FLOP among all from the first to the last of the curve."""
    sizes = np.arange(curve.sizes[0], curve.sizes[-1] + 1)
    tokens = curve.at(sizes, domain)
    rates = 1 / (tokens * flops(sizes))
    best = int(np.argmax(rates))
    near = sizes[rates >= NEAR_BEST * rates[best]]
    return BestSize(
        size=int(sizes[best]),
        tokens_per_byte=float(tokens[best]),
        gain=float(rates[best] / rates[-1]),
        near=(int(near[0]), int(near[-1])),
        edge="or more" if best == len(sizes) - 1 else "or fewer" if best == 0 else "",
    )


def interpolate_monotone(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """A smooth curve through points that rises and falls only where they do.

    Piecewise cubic with harmonic means of the neighbouring slopes as derivatives (Fritsch and Butland, SIAM J. Sci.
    Stat. Comput. 5, 1984; at the ends the slope of the outer interval).

    Args:
        x: [n] increasing, n >= 2.
        y: [n].
        at: [m], each within x.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    step, slope = np.diff(x), np.diff(y) / np.diff(x)
    derivative = np.concatenate([slope[:1], np.zeros(len(x) - 2), slope[-1:]])
    same = slope[:-1] * slope[1:] > 0
    weight = (step[:-1] + 2 * step[1:]) / (3 * (step[:-1] + step[1:]))
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = slope[:-1] * slope[1:] / (weight * slope[1:] + (1 - weight) * slope[:-1])
    derivative[1:-1] = np.where(same, mean, 0.0)
    i = np.clip(np.searchsorted(x, at, side="right") - 1, 0, len(x) - 2)
    t = (at - x[i]) / step[i]
    values: np.ndarray = (
        y[i] * (1 + 2 * t) * (1 - t) ** 2
        + y[i + 1] * t**2 * (3 - 2 * t)
        + step[i] * (derivative[i] * t * (1 - t) ** 2 - derivative[i + 1] * t**2 * (1 - t))
    )
    return values
