"""Where a forward pass goes wrong, by hidden states that are made up: the words for each pattern."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_hammer.verify.outcome import Outcome
from megatron_hammer.verify.patterns import BORDER
from megatron_hammer.verify.points import first_wrong

NAMES = [
    "embedding",
    "layers.0.attention_norm",
    "layers.0.attention",
    "layers.0.mlp_norm",
    "layers.0.mlp",
    "final_norm",
]
TOKENS = np.arange(12)
RIGHT = {name: np.random.default_rng(i).normal(size=(12, 2)) for i, name in enumerate(NAMES)}


def outcome(points: dict[str, np.ndarray], tokens: np.ndarray = TOKENS) -> Outcome:
    return Outcome([], [], [], points=points, point_tokens=tokens)


def said(*ranks: Outcome) -> str:
    return first_wrong(ranks, outcome(RIGHT), 1e-10)


def test_right_ones_say_nothing_whoever_has_which_tokens() -> None:
    order = np.random.default_rng(9).permutation(12)
    halves = [outcome({name: at[half] for name, at in RIGHT.items()}, half) for half in (order[:7], order[7:])]
    assert said(*halves) == said(outcome(RIGHT), outcome(RIGHT)) == ""


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (RIGHT["layers.0.attention"] * 2, ": they are 2 times what they should be"),
        (RIGHT["layers.0.attention"][::-1], ": they are those of other tokens, of token 11 for token 0 and so on"),
        (RIGHT["layers.0.attention"] + 0.5, ""),
        (
            RIGHT["layers.0.attention"] + 1e-4 * np.sin(TOKENS)[:, None],
            ": the differences are small, 4e-05 of the largest: rounded to fewer bits?",
        ),
        (RIGHT["layers.0.attention"] * np.nan, ": they are not finite for 12 of 12 tokens"),
    ],
)
def test_the_first_wrong_part_and_what_its_numbers_are(values: np.ndarray, words: str) -> None:
    later = {"layers.0.mlp": RIGHT["layers.0.mlp"] + 1}
    wrong = outcome(RIGHT | later | {"layers.0.attention": values})
    where = "hidden states are right up to layers.0.attention_norm and wrong from layers.0.attention on"
    assert said(outcome(RIGHT), wrong) == f"{where}, on rank 1 alone{words}"
    assert said(wrong, wrong) == where + words


def test_parts_of_a_sum_and_the_border_of_a_stage() -> None:
    part = 0.25 * RIGHT["layers.0.mlp"]
    ranks = [outcome(RIGHT | {"layers.0.mlp": at}) for at in (part, RIGHT["layers.0.mlp"] - part)]
    assert said(*ranks).endswith("wrong from layers.0.mlp on: each rank has a part of them, whose sum is missing")
    first, second = ({name: RIGHT[name] for name in names} for names in (NAMES[:3], NAMES[3:]))
    at_border = outcome(second | {"layers.0.mlp_norm": RIGHT["layers.0.mlp_norm"] - 3})
    assert said(outcome(first), at_border).endswith(f"wrong from layers.0.mlp_norm on{BORDER}")
