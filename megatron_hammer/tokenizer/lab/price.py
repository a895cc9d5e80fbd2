"""The best size of a vocabulary for a model: the one with which training reads most bytes of text a second.

    config, vocabulary size --> cost.py   --> FLOPs of a token, logits, parameters     (exact)
    tokenizer, texts        --> curve.py  --> tokens a byte against vocabulary size    (measured on a sample)
    cost, curve             --> here      --> size of most bytes per FLOP, for each tokenizer and domain, as tables

A larger vocabulary makes every token more expensive (the head grows) and needs fewer tokens for a byte of text. Bytes
a second are taken as proportional to 1 / (tokens a byte x FLOPs a token): an equal share of the device's peak for all
matrix products. FLOPs of one token, forward and backward (``count_cost``), with the shape letters of ``model/``::

    6 x weights in matrix products + causal attention
      = 6 L (h (n + 2g) d + n d h + 3 h f)     layers
      + 6 v h                                  head; the embedding is a look-up and multiplies nothing
      + 6 L n d s                              scores and values of half the square, forward (x 2) and backward (x 4)

v is the true size, not the padded one. For HammerLLM's 1.4B at s = 2048: 5.8133 + 1.2999 + 0.5536 GFLOP.

Without torch. The model's config is asked for sizes only, so that this package need not know the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_hammer.config import Config
from megatron_hammer.tokenizer.interface import Tokenizer
from megatron_hammer.tokenizer.lab.analyze import OVERALL, count_usage
from megatron_hammer.tokenizer.lab.cost import ModelCost, check_priced_config, count_cost, token_flops
from megatron_hammer.tokenizer.lab.curve import BestSize, CompressionCurve, TextSample, find_best, measure_curve
from megatron_hammer.tokenizer.lab.report import Table

FORMULA = (
    "FLOPs of one token, forward and backward: 6 x weights in matrix products (layers, and the head of vocabulary x "
    "hidden_size; the embedding is a look-up) + causal attention, 6 x layers x heads x head_dim x seq_length."
)


@dataclass(frozen=True)
class Price:
    """Cost and saving of one tokenizer."""

    cost: ModelCost
    tokens_per_byte: dict[str, float]
    """By domain and overall."""
    flops_per_byte: dict[str, float]
    curve: CompressionCurve | str
    """Or why there is none."""
    best: dict[str, BestSize] | None
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
        ConfigError: as ``check_priced_config``.
        DataError: E322 a domain without text.
    """
    check_priced_config(config)

    def flops(sizes: np.ndarray) -> np.ndarray:
        return token_flops(config, sizes)

    usage = count_usage(tokenizers, sample.texts, threads, progress=progress)
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
