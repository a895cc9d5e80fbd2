"""What a vocabulary costs a model and what it saves: the size at which training reads most bytes a second.

    config, vocabulary size --> count_cost     --> FLOPs of a token, logits, parameters     (exact)
    texts                   --> sample_texts   --> some megabytes of each domain            (chosen by hash)
    tokenizer, sample       --> measure_curve  --> tokens a byte against vocabulary size    (encoded again at each size)
    cost, curve             --> find_best      --> size of most bytes per FLOP

A larger vocabulary makes every token dearer (the head grows) and needs fewer tokens for a byte of text. Bytes a second
are taken as proportional to 1 / (tokens a byte x FLOPs a token): an equal share of the device's peak for all matrix
products. FLOPs of one token, forward and backward (``count_cost``), with the shape letters of ``model/``::

    6 x weights in matrix products + causal attention
      = 6 L (h (n + 2g) d + n d h + 3 h f)     layers
      + 6 v h                                  head; the embedding is a look-up and multiplies nothing
      + 6 L n d s                              scores and values of half the square, forward (x 2) and backward (x 4)

v is the true size, not the padded one. For HammerLLM's 1.4B at s = 2048: 5.8133 + 1.2999 + 0.5536 GFLOP.

*The curve.* Training of BPE adds pieces one by one, so a vocabulary of size V' is the best-ranked part of a larger one:
the same model without its worst-scored pieces (sentencepiece) or last merges (``tokenizer.json``). Byte, control and
user-defined pieces and single characters stay, since a training to V' would have them too; so do runs of spaces that
rank behind everything else (Llama-2's were put in by hand). The sample is encoded with every cut-down tokenizer, by the
same code as ever, and a monotone cubic goes through the points, in logarithms of tokens a byte and of the pieces that
may go. Sizes beyond the tokenizer's own cannot be known from it. Of a merged vocabulary (HammerLLM's) the curve is that
of cutting it down, not of training and merging anew. A unigram vocabulary is no part of a larger one: no curve.

Without torch. The model's config is asked for sizes only, so that this package need not know the model.
"""

from __future__ import annotations

import copy
import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_hammer.config import Config
from megatron_hammer.parallel.placement import padded_vocab_size
from megatron_hammer.tokenizer.huggingface_backend import HuggingFaceTokenizer
from megatron_hammer.tokenizer.interface import Tokenizer
from megatron_hammer.tokenizer.lab.analyze import OVERALL, Table, Usage, count_tokens
from megatron_hammer.tokenizer.load import load_tokenizer
from megatron_hammer.tokenizer.pieces import SPACE
from megatron_hammer.tokenizer.sentencepiece_backend import SentencePieceTokenizer, parse_model
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
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}

FORMULA = (
    "FLOPs of one token, forward and backward: 6 x weights in matrix products (layers, and the head of vocabulary x "
    "hidden_size; the embedding is a look-up) + causal attention, 6 x layers x heads x head_dim x seq_length."
)


# ---- what it costs ----


@dataclass(frozen=True)
class Cost:
    """What a model of some vocabulary size costs."""

    vocab_size: int
    layer_flops: int
    """Matrix products of the layers, a token, forward and backward."""
    head_flops: int
    attention_flops: int
    """Causal: half the square."""
    logits_bytes: int
    """Of one micro-batch in the training precision, padded, over all tensor-parallel ranks."""
    vocabulary_parameters: int
    """Embedding and head (once where they are tied), without padding."""
    parameters: int
    """Of the whole model."""

    @property
    def flops(self) -> int:
        return self.layer_flops + self.head_flops + self.attention_flops

    @property
    def head_share(self) -> float:
        return self.head_flops / self.flops

    @property
    def parameter_share(self) -> float:
        return self.vocabulary_parameters / self.parameters


def count_cost(config: Config, vocab_size: int) -> Cost:
    """Count FLOPs, logits and parameters of the config's model with a vocabulary of this size.

    Reads ``model`` (not its ``vocab_size``), ``data.seq_length``, ``train.micro_batch_size``, ``train.precision`` and
    ``parallel.tensor_model_parallel_size`` (for padding).
    """
    model = config.model
    h, f, layers = model.hidden_size, model.ffn_hidden_size, model.num_layers
    query_width, key_width = (heads * model.head_size for heads in (model.num_attention_heads, model.query_groups))
    layer = h * (query_width + 2 * key_width) + query_width * h + 3 * h * f
    padded = padded_vocab_size(vocab_size, config.parallel.tensor_model_parallel_size)
    vocabulary = vocab_size * h * (1 if model.tie_word_embeddings else 2)
    return Cost(
        vocab_size=vocab_size,
        layer_flops=6 * layers * layer,
        head_flops=6 * vocab_size * h,
        attention_flops=6 * layers * query_width * config.data.seq_length,
        logits_bytes=config.train.micro_batch_size * config.data.seq_length * padded * _BYTES[config.train.precision],
        vocabulary_parameters=vocabulary,
        parameters=layers * (layer + 2 * h) + h + vocabulary,
    )


def token_flops(config: Config, sizes: np.ndarray) -> np.ndarray:
    """[n] float64: FLOPs of a token at each vocabulary size, a straight line."""
    without, one = (count_cost(config, size).flops for size in (0, 1))
    return without + np.asarray(sizes, dtype=np.float64) * (one - without)


def check_config(config: Config) -> None:
    """Check the groups that are read here; the others may be of a machine that is not this one.

    Raises:
        ConfigError: E204.
    """
    for group in (config.model, config.data, config.train, config.parallel):
        group.check()


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


# ---- smaller vocabularies of the same tokenizer ----


class Prefixes(ABC):
    """The vocabularies that are the best-ranked part of a tokenizer's; made by ``find_prefixes``."""

    fixed: int
    """Pieces that always stay."""
    full: int
    """``vocab_size`` of the tokenizer."""

    @abstractmethod
    def cut(self, size: int, folder: Path) -> Tokenizer:
        """The tokenizer with ``full - size`` of its pieces left out. Its ids are its own: good for counting only.

        Args:
            size: from fixed to full.
            folder: existing; its files are written there, and may be removed when it is loaded.
        """


def find_prefixes(tokenizer: Tokenizer) -> Prefixes | str:
    """The smaller vocabularies of a BPE tokenizer, or why there are none (as the predicate of its name)."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        proto = parse_model(tokenizer.model_bytes, tokenizer.path)
        if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
            name = proto.trainer_spec.ModelType.Name(proto.trainer_spec.model_type).lower()
            return f"is a {name} model, and a smaller one of that kind is no part of it"
        found: Prefixes = _ModelPrefixes(proto, tokenizer.vocab_size)
    else:
        assert isinstance(tokenizer, HuggingFaceTokenizer), type(tokenizer)
        kind = tokenizer.definition["model"].get("type") or "BPE"
        if kind != "BPE" or not tokenizer.definition["model"].get("merges"):
            return f"is a {kind} tokenizer without merges, and a smaller one of that kind is no part of it"
        found = _DefinitionPrefixes(tokenizer.definition, tokenizer.vocab_size)
    return found if found.fixed < found.full else "has no piece that can be left out"


def _count_ranked(pieces: list[str]) -> int:
    """How many pieces, best first, are left without the runs of spaces at the end."""
    count = len(pieces)
    while count and not pieces[count - 1].strip(SPACE):
        count -= 1
    return count


class _ModelPrefixes(Prefixes):
    def __init__(self, proto: Any, vocab_size: int) -> None:
        self._proto = proto
        merged = [i for i, piece in enumerate(proto.pieces) if piece.type == piece.NORMAL and len(piece.piece) > 1]
        # Best score first; of equal ones the lower id was there first.
        merged.sort(key=lambda i: (-proto.pieces[i].score, i))
        self._merged = merged[: _count_ranked([proto.pieces[i].piece for i in merged])]
        self.full = vocab_size
        self.fixed = vocab_size - len(self._merged)

    def cut(self, size: int, folder: Path) -> Tokenizer:
        assert self.fixed <= size <= self.full, f"{self.fixed} <= {size} <= {self.full}"
        dropped = set(self._merged[size - self.fixed :])
        proto = type(self._proto)()
        proto.CopyFrom(self._proto)
        del proto.pieces[:]
        proto.pieces.extend(piece for i, piece in enumerate(self._proto.pieces) if i not in dropped)
        path = folder / "tokenizer.model"
        path.write_bytes(proto.SerializeToString())
        return load_tokenizer(path)


class _DefinitionPrefixes(Prefixes):
    def __init__(self, definition: dict[str, Any], vocab_size: int) -> None:
        self._definition = definition
        model = definition["model"]
        pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"])
        skipped = len(model.get("continuing_subword_prefix") or "")
        self._merges = [(left, right, left + right[skipped:]) for left, right in pairs]
        added = {token["content"] for token in definition.get("added_tokens") or []}
        products = dict.fromkeys(product for _, _, product in self._merges)  # in order of the first merge to each
        merged = [product for product in products if product not in added]
        self._merged = merged[: _count_ranked(merged)]
        self.full = vocab_size
        self.fixed = vocab_size - len(self._merged)

    def cut(self, size: int, folder: Path) -> Tokenizer:
        assert self.fixed <= size <= self.full, f"{self.fixed} <= {size} <= {self.full}"
        dropped = set(self._merged[size - self.fixed :])
        definition = copy.copy(self._definition)
        model = definition["model"] = copy.copy(self._definition["model"])
        model["vocab"] = {token: index for token, index in model["vocab"].items() if token not in dropped}
        model["merges"] = [[left, right] for left, right, product in self._merges
                           if not dropped & {left, right, product}]  # fmt: skip
        path = folder / "tokenizer.json"
        path.write_text(json.dumps(definition), encoding="utf-8")
        return load_tokenizer(path)


# ---- the curve and its best size ----


@dataclass(frozen=True)
class Curve:
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
        return np.exp(interpolate_monotone(x, measured, at))


@dataclass(frozen=True)
class Best:
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
) -> Curve | str:
    """Encode the sample with smaller vocabularies; first on a grid, then closer to the best size.

    Args:
        tokenizer: any.
        full: its own tokens a byte on the sample.
        sample: what to encode.
        flops: FLOPs of a token of vocabulary sizes, to know where to look closer.
        threads: of the encoding.
        progress: as in ``count_tokens``.

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
                usage = count_tokens({"": smaller}, sample.texts, threads, progress=progress)[""]
            measured[size] = sample.tokens_per_byte(usage)

    def curve() -> Curve:
        sizes = sorted(measured)
        return Curve(prefixes.fixed, tuple(sizes), tuple(measured[size] for size in sizes))

    def measure_between(first: int, last: int, count: int) -> None:
        measure(prefixes.fixed + np.geomspace(first - prefixes.fixed, last - prefixes.fixed, count))

    may_go = prefixes.full - prefixes.fixed
    measure_between(prefixes.fixed + max(1, round(GRID_START * may_go)), prefixes.full, GRID_SIZES)
    sizes = np.array(curve().sizes)
    best = int(np.argmin(curve().at(sizes) * flops(sizes)))
    measure_between(sizes[max(0, best - 1)], sizes[min(len(sizes) - 1, best + 1)], REFINED_SIZES + 2)
    return curve()


def find_best(curve: Curve, flops: Callable[[np.ndarray], np.ndarray], domain: str = OVERALL) -> Best:
    """The size of most bytes per FLOP among all from the first to the last of the curve."""
    sizes = np.arange(curve.sizes[0], curve.sizes[-1] + 1)
    tokens = curve.at(sizes, domain)
    rates = 1 / (tokens * flops(sizes))
    best = int(np.argmax(rates))
    near = sizes[rates >= NEAR_BEST * rates[best]]
    return Best(
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
    return (
        y[i] * (1 + 2 * t) * (1 - t) ** 2
        + y[i + 1] * t**2 * (3 - 2 * t)
        + step[i] * (derivative[i] * t * (1 - t) ** 2 - derivative[i + 1] * t**2 * (1 - t))
    )


# ---- all of it, and tables ----


@dataclass(frozen=True)
class Price:
    """Cost and saving of one tokenizer."""

    cost: Cost
    tokens_per_byte: dict[str, float]
    """By domain and overall."""
    flops_per_byte: dict[str, float]
    curve: Curve | str
    """Or why there is none."""
    best: dict[str, Best] | None
    """By domain and overall, where there is a curve."""


def price_tokenizers(
    tokenizers: Mapping[str, Tokenizer],
    config: Config,
    sample: TextSample,
    threads: int = 1,
    progress: Callable[[int], None] = lambda done_bytes: None,
) -> dict[str, Price]:
    """Price each tokenizer for the config's model on the same text.

    Raises:
        ConfigError: as ``check_config``.
        DataError: E322 a domain without text.
    """
    check_config(config)

    def flops(sizes: np.ndarray) -> np.ndarray:
        return token_flops(config, sizes)

    usage = count_tokens(tokenizers, sample.texts, threads, progress=progress)
    prices = {}
    for name, tokenizer in tokenizers.items():
        cost = count_cost(config, tokenizer.vocab_size)
        tokens = sample.tokens_per_byte(usage[name])
        curve = measure_curve(tokenizer, tokens, sample, flops, threads, progress)
        prices[name] = Price(
            cost=cost,
            tokens_per_byte=tokens,
            flops_per_byte={domain: found * cost.flops for domain, found in tokens.items()},
            curve=curve,
            best=None if isinstance(curve, str) else {domain: find_best(curve, flops, domain) for domain in tokens},
        )
    return prices


def describe_prices(prices: Mapping[str, Price], config: Config, reference: str) -> dict[str, dict[str, Any]]:
    """Tokenizer -> plain values, for JSON."""
    described = {}
    for name, price in prices.items():
        cost = price.cost
        domains = {
            domain: {
                "tokens_per_byte": tokens,
                "flops_per_byte": price.flops_per_byte[domain],
                "relative_time_per_byte": price.flops_per_byte[domain] / prices[reference].flops_per_byte[domain],
            }
            for domain, tokens in price.tokens_per_byte.items()
        }
        described[name] = {
            "flops_per_token": {
                "layers": cost.layer_flops,
                "head": cost.head_flops,
                "attention": cost.attention_flops,
                "all": cost.flops,
            },
            "head_share": cost.head_share,
            "logits_bytes": cost.logits_bytes,
            "vocabulary_parameters": cost.vocabulary_parameters,
            "parameters": cost.parameters,
            "vocabulary_parameter_share": cost.parameter_share,
            "domains": domains,
            "best": None if price.best is None else {
                domain: {
                    "vocab_size": best.size,
                    "tokens_per_byte": best.tokens_per_byte,
                    "relative_bytes_per_second": best.gain,
                    "within_1_percent": list(best.near),
                    "edge": best.edge,
                }
                for domain, best in price.best.items()
            },
            "curve": None if isinstance(price.curve, str) else [
                {
                    "vocab_size": size,
                    "tokens_per_byte": found,
                    "flops_per_token": (flops := count_cost(config, size).flops),
                    "relative_bytes_per_second": price.flops_per_byte[OVERALL] / (found[OVERALL] * flops),
                }
                for size, found in zip(price.curve.sizes, price.curve.tokens_per_byte)
            ],
            "no_curve_because": price.curve if isinstance(price.curve, str) else None,
        }  # fmt: skip
    return described


def price_tables(prices: Mapping[str, Price], config: Config, reference: str) -> list[Table]:
    """What it costs, what it saves, and the best size."""
    b, s, precision = config.train.micro_batch_size, config.data.seq_length, config.train.precision
    costs, savings, sizes = [], [], []
    for name, price in prices.items():
        cost = price.cost
        costs.append([
            name, f"{cost.vocab_size:,}", f"{100 * cost.head_share:.2f}%", f"{cost.flops / 1e9:.4f}",
            f"{cost.logits_bytes / 2**30:.2f} GiB", f"{cost.vocabulary_parameters:,}",
            f"{100 * cost.parameter_share:.2f}%",
        ])  # fmt: skip
        row = [name]
        for domain, flops in price.flops_per_byte.items():
            row += [f"{price.tokens_per_byte[domain]:.4f}", f"{flops / prices[reference].flops_per_byte[domain]:.4f}"]
        savings.append([*row, f"{price.flops_per_byte[OVERALL] / 1e9:.4f}"])
        row = [name, f"{cost.vocab_size:,}"]
        if price.best is None:
            row += ["-"] * (3 + len(price.tokens_per_byte))
        else:
            best = price.best[OVERALL]
            shown = {domain: f"{found.size:,} {found.edge}".strip() for domain, found in price.best.items()}
            row += [shown.pop(OVERALL), f"{best.near[0]:,} to {best.near[1]:,}"]
            row += [f"{best.tokens_per_byte:.4f}", f"{best.gain:.4f}", *shown.values()]
        sizes.append(row)
    domains = list(next(iter(prices.values())).tokens_per_byte)
    header = ["tokenizer", *(f"{d} {what}" for d in domains for what in ("tokens/byte", "time")), "GFLOP/byte"]
    best_header = ["best size", "within 1%", "its tokens/byte", "its bytes/s", *(f"{d} only" for d in domains[:-1])]
    return [
        Table(
            f"What the vocabulary costs (logits of a micro-batch of {b} x {s} in {precision})",
            ["tokenizer", "pieces", "head of FLOPs", "GFLOP/token", "logits", "embedding + head", "of parameters"],
            costs,
        ),
        Table(
            f"What it saves; time: FLOPs of a byte / those with {reference}, lower is better", header, savings
        ),
        Table(
            "Vocabulary size at which bytes a second of training are best (full vocabulary: 1), overall and by domain",
            ["tokenizer", "pieces", *best_header],
            sizes,
        ),
    ]  # fmt: skip


def price_notes(prices: Mapping[str, Price], sample: TextSample) -> list[str]:
    """How the figures were made, and what is missing, a sentence or two each."""
    kept = ", ".join(
        f"{domain} {sample.kept_bytes[domain] / 1e6:.2f} of {sample.seen_bytes[domain] / 1e6:.2f} MB"
        for domain in sample.texts
    )
    notes = [
        FORMULA,
        f"Text encoded: {kept}; overall weighs each by all its bytes. Bytes a second at an equal share of peak FLOPs.",
    ]
    for name, price in prices.items():
        if isinstance(price.curve, str):
            notes.append(f"{name} {price.curve}: what it costs is given, a best size is not.")
        elif price.best and price.best[OVERALL].edge == "or more":
            notes.append(f"{name}: best at its full size; a larger vocabulary may be better still.")
        elif price.best and price.best[OVERALL].edge:
            notes.append(f"{name}: best at the smallest size measured; a smaller vocabulary may be better still.")
    return notes
