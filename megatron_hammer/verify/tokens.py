"""Compares the loss of each token before the first step, and infers the cause from which tokens differ.

A token that is the first of its document attends to itself alone. So if those are right and later ones are wrong, it is
the positions or the keys; if a first token is wrong and others are right, it sees what is not its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_hammer.verify.compare import Deviation, LayoutSizes, off_by_log
from megatron_hammer.verify.outcome import Outcome
from megatron_hammer.verify.points import first_wrong

BEHIND = "hidden states are right: what is wrong is the head, the loss or the labels"


def compare_tokens(
    ranks: Sequence[Outcome], expected: Outcome, positions: np.ndarray, bound: float, sizes: LayoutSizes
) -> tuple[float, list[Deviation]]:
    """The largest difference, relative to the largest loss, and what is beyond the bound; every token on some rank.

    Args:
        positions: place in its document of each token of the global batch.
    """
    reference = np.empty(len(positions))
    reference[expected.tokens] = expected.token_losses
    differences, seen, scale, at = np.zeros(len(positions)), np.zeros(len(positions), int), reference.max(), set()
    shifts = np.zeros(len(positions))
    for number, rank in enumerate(ranks):
        shift = rank.token_losses - reference[rank.tokens]
        distance = np.where(np.isfinite(shift), np.abs(shift) / scale, np.inf)
        shifts[rank.tokens] = np.where(distance >= differences[rank.tokens], shift, shifts[rank.tokens])
        differences[rank.tokens] = np.maximum(differences[rank.tokens], distance)
        seen[rank.tokens] = 1
        if (distance > bound).any():
            at.add(number)
    worst, findings = float(differences.max()), []
    if at:
        wrong = differences > bound
        of_labels = expected.points and not first_wrong(ranks, expected, bound)
        cause = BEHIND if of_labels else cause_of_tokens(wrong, shifts, positions, sizes)
        what = f"loss of {int(wrong.sum())} of {len(wrong)} tokens before the first step"
        findings.append(Deviation(what, tuple(sorted(at)), worst, cause))
    if not seen.all():
        missing = f"{int((seen == 0).sum())} of {len(seen)} tokens are on no rank"
        findings.append(Deviation("loss of the tokens before the first step", (), np.inf, missing))
    return worst, findings


def cause_of_tokens(wrong: np.ndarray, shifts: np.ndarray, positions: np.ndarray, sizes: LayoutSizes) -> str:
    """What the places of the tokens that are wrong say; shifts: by how much each loss is off."""
    first = positions == 0
    if wrong.all():
        even = float(np.ptp(shifts)) <= 1e-3 * float(np.abs(shifts).max())
        return off_by_log(float(shifts.mean()), sizes) if even else ""
    if not wrong[first].any():
        return "the first token of each document is right and later ones are not: positions (RoPE), or missing keys"
    if wrong[first].any() and not wrong[first].all():
        return "first tokens of documents see other tokens: a boundary of documents, or the order of gathered keys"
    return ""
