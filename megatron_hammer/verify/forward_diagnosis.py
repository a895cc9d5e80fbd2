"""Explains why the losses of tokens differ from one process: which tokens, and which known fault gives these losses.

``diagnosis.py`` asks this first. Where no known fault (``what_if.py``) gives the losses, the explanation says what the
tokens that differ have in common, and what follows from their order or their places.
"""

from __future__ import annotations

import numpy as np

from megatron_hammer.config import Config
from megatron_hammer.verify.compare import Evidence, off_by_log
from megatron_hammer.verify.patterns import EXPLAINED, NOISE, explains, listed, whose
from megatron_hammer.verify.points import first_wrong
from megatron_hammer.verify.token_inputs import TokenInputs, TokenOwners
from megatron_hammer.verify.tokens import BEHIND, cause_of_tokens
from megatron_hammer.verify.what_if import losses_with_faults


def diagnose_tokens(evidence: Evidence, step: int = 1) -> list[str]:
    """Sentences on the losses before the first step; empty where they are right.

    Args:
        step: whose samples these are. Of the first alone known faults are tried: they begin with the initial weights.
    """
    config, world_size, ranks, expected = evidence.config, evidence.world_size, evidence.ranks, evidence.expected
    grid, sizes = config.grid(world_size), evidence.sizes
    right = np.empty(len(expected.tokens))
    right[expected.tokens] = expected.token_losses
    limit, got = evidence.bound * right.max(), right.copy()
    at = set()
    for rank, outcome in enumerate(ranks):
        off = ~(np.abs(outcome.token_losses - right[outcome.tokens]) <= limit)
        got[outcome.tokens[off]] = outcome.token_losses[off]
        at |= {rank} if off.any() else set()
    wrong = got != right
    seen = np.bincount(np.concatenate([outcome.tokens for outcome in ranks]), minlength=len(right))
    if missing := _missing_samples(config, seen):
        return [missing]
    if not wrong.any():
        return []
    computing = [rank for rank, outcome in enumerate(ranks) if len(outcome.tokens)]
    sentences = [f"losses are wrong on {place}" for place in [whose(at, computing, grid)] if place]
    if (own := _which_tokens(config, world_size, wrong, step)) and not sentences:
        sentences.append(own)
    shift, off = (got - right)[wrong], np.abs(got - right)[wrong]
    if np.isfinite(off).all():
        if np.ptp(shift) <= 1e-3 * float(off.max()) and (by := off_by_log(float(shift.mean()), sizes)):
            return [*sentences, f"losses are {by}"]
        if others := _of_other_samples(config, got, right, wrong):
            return [*sentences, others]
        for name, losses in losses_with_faults(config, world_size, evidence.initial) if step == 1 else ():
            left = np.abs(losses - got)[wrong]
            if float(left.max()) <= EXPLAINED * float(off.max()) and explains(left, off, NOISE * right.max()):
                return [*sentences, f"the numbers are those where {name}"]
    if np.abs(np.sort(got) - np.sort(right)).max() <= limit * 10:
        return [
            *sentences,
            "the losses are right and belong to other tokens: samples or tokens are in another order",
        ]
    if not (place := first_wrong(ranks, expected, evidence.bound)):
        return [*sentences, BEHIND]
    shifts = np.where(wrong, got - right, 0.0)
    positions = TokenInputs.of(config, step).positions.ravel()
    if not sentences and (cause := cause_of_tokens(wrong, shifts, positions, sizes)):
        sentences = [cause]
    return [*sentences, place]


def _missing_samples(config: Config, seen: np.ndarray) -> str:
    """Samples that no rank computes, or not all of their tokens; seen: on how many ranks each token is."""
    shape = -1, config.data.seq_length
    missing = np.flatnonzero((seen.reshape(shape) == 0).any(1))
    if not len(missing):
        return ""
    if (seen.reshape(shape) > 0).any(1).all():
        twice = int((seen > np.bincount(seen).argmax()).sum())
        return (
            f"{int((seen == 0).sum())} of {len(seen)} tokens are on no rank and {twice} on one more than others: ranks "
            "divide samples otherwise than one another"
        )
    most = np.flatnonzero((seen.reshape(shape) > np.bincount(seen).argmax()).any(1))
    more = f", and sample {most[0]} is read more often than others" if len(most) else ""
    return f"{len(missing)} of {seen.size // shape[1]} samples are read by no rank: {listed(missing[:6])}{more}"


def _of_other_samples(config: Config, got: np.ndarray, right: np.ndarray, wrong: np.ndarray) -> str:
    """Whether whole samples have the losses of others."""
    shape = -1, config.data.seq_length
    found, have, off = got.reshape(shape), right.reshape(shape), wrong.reshape(shape)
    taken = []
    for sample in np.flatnonzero(off.any(1)):
        alike = np.abs(have - found[sample]).max(1) <= 1e-9 * right.max()
        if off[sample].mean() < 0.5 or not alike.any():
            return ""
        taken.append((int(sample), int(np.flatnonzero(alike)[0])))
    each = [f"sample {a} has the losses of sample {b}" for a, b in taken]
    return listed(each[:3]) + (", ..." if len(each) > 3 else "") + ": a rank computes other samples than its own"


def _which_tokens(config: Config, world_size: int, wrong: np.ndarray, step: int) -> str:
    """The tokens that differ by what they have in common, where the others have not."""
    if wrong.all():
        return ""
    inputs = TokenInputs.of(config, step)
    owners = TokenOwners.of(config, world_size, inputs)
    local = config.placement().vocab_rows_local(config.model.vocab_size or 1)
    tokens, labels = inputs.tokens.numpy(), inputs.labels.numpy()
    have = {
        "of data-parallel rank": owners.dp,
        "of micro-batch": owners.micro_batch + 1,
        "of context-parallel rank": owners.cp,
        "whose label is in the vocabulary of tensor-parallel rank": labels // local,
    }
    for what, of in have.items():
        of = of.ravel()
        values = np.unique(of[wrong])
        if len(values) < len(np.unique(of)) and wrong[np.isin(of, values)].mean() > 0.9:
            return f"only losses of tokens {what} {', '.join(map(str, values))} are wrong"
    # What is wrong with a token's embedding is wrong from it on to the end of its document.
    ids, first_ids, whole = tokens // local, [], True
    for sample, part in inputs.parts():
        off = np.flatnonzero(wrong.reshape(tokens.shape)[sample, part])
        whole &= len(off) == 0 or len(off) == part.stop - part.start - off[0]
        first_ids += [int(ids[sample, part][off[0]])] if len(off) else []
        whole &= len(off) == 0 or not (ids[sample, part][: off[0]] == first_ids[-1]).any()
    values = np.unique(first_ids)
    if whole and len(values) == 1 < len(np.unique(ids)):
        return (
            "losses are wrong from the first token on whose embedding is in the vocabulary of tensor-parallel rank "
            f"{values[0]}"
        )
    positions = inputs.positions.ravel()
    first = int(positions[wrong].min())
    if first and wrong[positions >= first].mean() > 0.9:
        reach = ": positions (RoPE), or keys" if first == 1 else ""
        return f"only losses of tokens from place {first} of their document on are wrong{reach}"
    return ""
