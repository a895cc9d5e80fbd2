"""What one rank holds of a model: which layers, whether the embedding and the head, and its share of each matrix.

Two axes of the grid (``grid.py``) divide the weights. The pipeline axis divides the stack of layers into *stages*, and
the tensor-parallel axis divides every matrix of a layer. Rank 1 of TP 2 in the second of two stages, of a model with 4
layers, 8 query heads and 2 query groups::

    embedding | layer 0 | layer 1 | layer 2 | layer 3 | final norm, head
                                  '---------- this stage --------------'
    of each of its layers:   query heads [4, 8)   query groups [1, 2)   feed-forward columns [f/2, f)
    of the head:             the second half of the vocabulary's rows, padding included

All formulas of local sizes are here and nowhere else. The parameter table (``model/parameters.py``) says with them
which rectangle of which tensor a rank holds, the model builds its layers of these sizes, and settings are checked with
them.

Pure arithmetic on the sizes of a model. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_hammer.parallel.grid import kv_copies

Range = tuple[int, int]
"""From the first up to, and without, the second."""

VOCAB_PADDING_MULTIPLE = 128  # rows a tensor-parallel rank: an odd vocabulary forces a slow matrix kernel


class ModelSizes(Protocol):
    """What the formulas need of ``config.ModelConfig``: global sizes."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def query_groups(self) -> int: ...
    @property
    def ffn_hidden_size(self) -> int: ...


@dataclass(frozen=True)
class Placement:
    """One rank's part of a model. Ranges count in the whole model; ``_local`` is a number on this rank."""

    layers: Range
    has_embedding: bool
    """Whether this is the first stage, which looks up the tokens."""
    has_head: bool
    """Whether this is the last stage, which has the final norm, the head and the loss."""
    heads: Range
    """Query heads."""
    groups: Range
    """Query groups: the key and value heads."""
    owns_groups: bool
    """False where a lower tensor-parallel rank holds the same query groups: this rank's are a copy."""
    kv_copies: int
    """Tensor-parallel ranks that hold the same query groups."""
    ffn: Range
    """Columns of the feed-forward layer."""
    tp_rank: int
    tp_size: int
    sequence_parallel: bool
    """Whether a rank has only its share of the sequence between the matrices."""

    @property
    def layers_local(self) -> int:
        """Number of layers."""
        return self.layers[1] - self.layers[0]

    @property
    def heads_local(self) -> int:
        """Number of query heads."""
        return self.heads[1] - self.heads[0]

    @property
    def groups_local(self) -> int:
        """Number of query groups; at least one."""
        return self.groups[1] - self.groups[0]

    @property
    def ffn_local(self) -> int:
        """Columns of the feed-forward layer."""
        return self.ffn[1] - self.ffn[0]

    @property
    def sequence_shards(self) -> int:
        """Into how many parts the sequence is cut between the matrices."""
        return self.tp_size if self.sequence_parallel else 1

    def vocab_rows_local(self, vocab_size: int) -> int:
        """Rows of the embedding and of the head in memory, padding included."""
        return padded_vocab_size(vocab_size, self.tp_size) // self.tp_size

    def vocab_rows(self, vocab_size: int) -> Range:
        """Ids whose rows this rank holds; empty where its rows are padding only."""
        rows = self.vocab_rows_local(vocab_size)
        return min(rows * self.tp_rank, vocab_size), min(rows * (self.tp_rank + 1), vocab_size)


def place(
    model: ModelSizes,
    tp_rank: int = 0,
    tp_size: int = 1,
    *,
    sequence_parallel: bool = False,
    stage: int = 0,
    num_stages: int = 1,
    split: Sequence[int] | None = None,
) -> Placement:
    """What a rank holds of ``model``; without further arguments, the whole of it.

    Args:
        tp_size: must be possible for the model (``Config.validate``).
        stage: number of the stage, counted from 0; a stage may be one of several on a rank.
        split: layers of each stage (``pipeline.py`` finds good ones); None: stages differ by at most one layer.
    """
    if split is None:
        ends = [model.num_layers * i // num_stages for i in range(num_stages + 1)]
    else:
        assert len(split) == num_stages and sum(split) == model.num_layers, f"{split} are not {num_stages} stages"
        ends = [sum(split[:i]) for i in range(num_stages + 1)]
    copies = kv_copies(tp_size, model.query_groups)
    return Placement(
        layers=(ends[stage], ends[stage + 1]),
        has_embedding=stage == 0,
        has_head=stage == num_stages - 1,
        heads=_share(model.num_attention_heads, tp_rank, tp_size),
        groups=_share(model.query_groups, tp_rank // copies, tp_size // copies),
        owns_groups=tp_rank % copies == 0,
        kv_copies=copies,
        ffn=_share(model.ffn_hidden_size, tp_rank, tp_size),
        tp_rank=tp_rank,
        tp_size=tp_size,
        sequence_parallel=sequence_parallel,
    )


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Rows of embedding and head in the memory of all tensor-parallel ranks: the next multiple of 128 x TP."""
    multiple = VOCAB_PADDING_MULTIPLE * tp_size
    return -(-vocab_size // multiple) * multiple


def _share(total: int, rank: int, size: int) -> Range:
    """One of ``size`` equal shares of ``total``."""
    assert total % size == 0, f"{total} cannot be divided over {size} ranks"
    return total // size * rank, total // size * (rank + 1)
