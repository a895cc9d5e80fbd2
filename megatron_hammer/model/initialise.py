"""Initial weights as a pure function of (seed, logical tensor, element): the same model for every layout.

Each logical tensor is drawn in blocks of rows, each from a generator of its own, so that a rank makes only the blocks
it holds a part of and no rank ever holds a whole vocabulary table.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import groupby

import torch
from torch import Tensor

from megatron_hammer.config import ModelConfig
from megatron_hammer.model.llama import Stage
from megatron_hammer.model.parameters import Parameter, Slice, logical_shapes

BLOCK_ROWS = 256  # small enough that sharing a block between two ranks is cheap; part of the definition: never change


@torch.no_grad()
def initialise(model: Stage, table: Sequence[Parameter], seed: int) -> None:
    """Fill the model in place: norms with one, biases with zero, matrices with N(0, init_std) drawn on the CPU in fp32.

    One part of the model at a time, since its store may have no more of it at once.
    """
    weights, store = dict(model.named_parameters()), model.options.store
    for part, parameters in groupby(table, key=lambda parameter: parameter.part):
        with store.writing(part) if store is not None else nullcontext():
            for parameter in parameters:
                _fill(weights[parameter.name], parameter, model.config, seed)


def _fill(weight: Tensor, parameter: Parameter, config: ModelConfig, seed: int) -> None:
    assert tuple(weight.shape) == parameter.shape, f"{parameter.name} is {tuple(weight.shape)}, not {parameter.shape}"
    shapes = logical_shapes(config)
    for s in parameter.slices:
        rows = weight[s.local_row : s.local_row + s.num_rows]
        if parameter.initial != "normal":
            rows.fill_(1.0 if parameter.initial == "ones" else 0.0)
        else:
            _fill_normal(rows, s, shapes[s.tensor][1], seed, config.init_std)


def _fill_normal(rows: Tensor, s: Slice, logical_cols: int, seed: int, std: float) -> None:
    """Fill a local [rows, cols] view with its rectangle of the logical tensor."""
    assert s.cols is not None
    first, last = s.rows[0] // BLOCK_ROWS, (s.rows[1] - 1) // BLOCK_ROWS
    for block in range(first, last + 1):
        values = _normal_block(seed, s.tensor, block, logical_cols, std)
        start, stop = max(s.rows[0], block * BLOCK_ROWS), min(s.rows[1], (block + 1) * BLOCK_ROWS)
        chosen = values[start - block * BLOCK_ROWS : stop - block * BLOCK_ROWS, s.cols[0] : s.cols[1]]
        rows[start - s.rows[0] : stop - s.rows[0]].copy_(chosen)


def _normal_block(seed: int, tensor: str, block: int, cols: int, std: float) -> Tensor:
    digest = hashlib.blake2b(f"{seed}/{tensor}/{block}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(BLOCK_ROWS, cols, generator=generator) * std
