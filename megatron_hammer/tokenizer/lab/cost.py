"""What a vocabulary of some size costs a model: FLOPs of a token, memory of the logits, parameters.

Exact counts from the config; ``price.py`` explains the formula. Only sizes are read from the config, so that this room
need not know the model; no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_hammer.config import Config
from megatron_hammer.parallel.placement import padded_vocab_size

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class ModelCost:
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
        """FLOPs of a token, forward and backward."""
        return self.layer_flops + self.head_flops + self.attention_flops

    @property
    def head_share(self) -> float:
        """What share of these the head has."""
        return self.head_flops / self.flops

    @property
    def parameter_share(self) -> float:
        """What share of all parameters the vocabulary has."""
        return self.vocabulary_parameters / self.parameters


def count_cost(config: Config, vocab_size: int) -> ModelCost:
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
    return ModelCost(
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


def check_priced_config(config: Config) -> None:
    """Check the groups that are read here; the others may be of a machine that is not this one.

    Raises:
        ConfigError: E204.
    """
    for group in (config.model, config.data, config.train, config.parallel):
        group.check()
