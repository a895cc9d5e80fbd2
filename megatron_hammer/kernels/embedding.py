"""Looks up rows of an embedding table, and sums the gradients of a micro-batch's tokens into the row of each token.

In text a few tokens are much more frequent than all others: of 16,384 tokens several hundred are the same one. A GPU's
``index_put_(accumulate=True)`` sorts and then adds the rows of one token one after the other, so that one token decides
how long all of it takes (a benchmark with random tokens, which rarely repeat, hides that). Here tokens are sorted, cut
into blocks of ``BLOCK`` neighbours; the rows of one token in one block are summed by a small matrix product, and only
one row a token and block is then added::

    sorted tokens  [ 5 5 5 7 | 7 7 7 7 | 7 8 9 9 ]         sums, at the first of each  [ 5 . . 7 | 7 . . . | 7 8 9 . ]

so 800 rows of one token become 13 additions in turn, at the price of one read and one write of the rows. The order is
fixed, so the result is the same from run to run, and nothing waits for the device. A row that is not finite makes its
whole block NaN, and the step is left out as it would be for the row alone. On a CPU ``index_add_`` adds the rows in the
order of the tokens, at the speed of memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_hammer.kernels.linear import Gradient, direct, once_differentiable

BLOCK = 64  # the product costs 2 * BLOCK * h operations a token, 1 % of a layer's at h 2048; chains of 800 become 13


class _Embedding(torch.autograd.Function):
    """Rows of ``weight`` [v, h] by their numbers, [..] -> [.., h]; their gradient touches these rows and no others.

    A gradient of the whole table would be written, read and added (2 x 32,000 x 512 in bf16 on 2 Xeon cores: 50 ms
    against 0.5).
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, gradient: Gradient | None, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.gradient, ctx.rows = gradient, len(weight)
        return F.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        tokens, grad = ctx.saved_tensors[0].flatten(), grads[0].flatten(0, -2)
        if ctx.gradient is None:
            return torch.ops.aten.embedding_dense_backward(grad, tokens, ctx.rows, -1, False), None, None

        def write(place: Tensor, begun: bool) -> None:
            if not begun:
                place.zero_()
            add_rows(place, tokens, grad)

        ctx.gradient.add(write)
        return None, None, None


look_up = direct(_Embedding)


def add_rows(place: Tensor, tokens: Tensor, rows: Tensor) -> None:
    """place[tokens[i]] += rows[i], in fp32 whatever the type of the rows; deterministic.

    Args:
        place: [v, h] fp32. tokens: [n] int64. rows: [n, h].
    """
    if place.is_cuda:
        keys, sums = sum_in_blocks(tokens, rows, len(place))
        place.index_put_((keys,), sums.to(place.dtype), accumulate=True)
    else:
        place.index_add_(0, tokens, rows.to(place.dtype))


def sum_in_blocks(tokens: Tensor, rows: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Keys [m] and sums [m, h], m >= n a multiple of ``BLOCK``: added up by key they give what tokens and rows give.

    A key stands for a token once in each block that holds the token. What is left over is zero, and its keys are spread
    over the vocabulary.
    """
    n, h = rows.shape
    ordered, order = tokens.sort(stable=True)
    rows = F.pad(rows[order], (0, 0, 0, -n % BLOCK))
    blocks = F.pad(ordered, (0, -n % BLOCK), value=vocabulary).view(-1, BLOCK)  # as if of a token that nobody has
    first = F.pad(blocks[:, 1:] != blocks[:, :-1], (1, 0), value=True)
    same = (blocks.unsqueeze(2) == blocks.unsqueeze(1)) & first.unsqueeze(2)  # row i: where i is first, its token's
    wide: dict[str, Any] = {}
    if rows.is_cuda and rows.dtype != torch.float32:
        wide["out_dtype"] = torch.float32  # else the sums would be rounded to 16 bits
    elif rows.dtype != torch.float64:
        rows = rows.float()
    sums = torch.bmm(same.to(rows.dtype), rows.view(-1, BLOCK, h), **wide)
    spread = torch.arange(blocks.numel(), device=tokens.device) % vocabulary
    keys = torch.where((first & (blocks < vocabulary)).flatten(), blocks.flatten(), spread)
    return keys, sums.view(-1, h)
