"""The Llama (arXiv 2302.13971) with grouped-query attention: heads, groups and shapes, nothing of ranks.

::

    tokens [b, s] -> embedding [s/t, b, h] -> num_layers x DecoderLayer -> final norm -> head -> loss [b, s]

    DecoderLayer:  x + attention(norm(x));  x + mlp(norm(x))

Inside the model the sequence comes first (``[s, b, h]``): shards of it are contiguous. Only the embedding and the loss
change the order. The mathematics is that of ``LlamaForCausalLM`` in transformers, and ``tests/model/test_llama.py``
holds it to that. A layer reads from here through ``layers.py`` and ``kernels/operations.py``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from megatron_hammer.config import ModelConfig, padded_vocab_size
from megatron_hammer.kernels.operations import Operations
from megatron_hammer.model import layers
from megatron_hammer.model.layers import LayerOptions
from megatron_hammer.model.loss import vocab_parallel_cross_entropy
from megatron_hammer.parallel.collectives import all_gather_rows
from megatron_hammer.parallel.context import ParallelContext

Rope = tuple[Tensor, Tensor]  # cos and sin, [s, 1, 1, d] each


class Attention(nn.Module):
    """Causal self-attention: [s/t, b, h] -> [s/t, b, h]."""

    def __init__(self, config: ModelConfig, options: LayerOptions) -> None:
        super().__init__()
        h, n, g, d = config.hidden_size, config.num_attention_heads, config.query_groups, config.head_size
        self.operations = options.operations
        self.qkv = layers.QKVLinear(h, n, g, d, options)
        self.output = layers.RowParallelLinear(n * d, h, options)

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        q, k, v = self.qkv(x)  # [s, b, heads, d]
        q, k = self.operations.rope(q, *rope), self.operations.rope(k, *rope)
        return self.output(self.operations.causal_attention(q, k, v).flatten(2))


class MLP(nn.Module):
    """SwiGLU feed-forward: [s/t, b, h] -> [s/t, b, h]."""

    def __init__(self, config: ModelConfig, options: LayerOptions) -> None:
        super().__init__()
        self.swiglu = options.operations.swiglu
        self.gate_up = layers.ColumnParallelLinear(config.hidden_size, 2 * config.ffn_hidden_size, options)
        self.down = layers.RowParallelLinear(config.ffn_hidden_size, config.hidden_size, options)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.swiglu(self.gate_up(x)))


class DecoderLayer(nn.Module):
    """One layer with its two residual connections: [s/t, b, h] -> [s/t, b, h]."""

    def __init__(self, config: ModelConfig, options: LayerOptions) -> None:
        super().__init__()
        self.attention_norm = layers.RMSNorm(config.hidden_size, config.norm_eps, options)
        self.attention = Attention(config, options)
        self.mlp_norm = layers.RMSNorm(config.hidden_size, config.norm_eps, options)
        self.mlp = MLP(config, options)

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    """The whole model of one rank; its parameters are those of ``parameter_table``, by name and local shape."""

    def __init__(self, config: ModelConfig, options: LayerOptions) -> None:
        super().__init__()
        assert config.vocab_size is not None, "model.vocab_size must be resolved before a model is built"
        self.config, self.options = config, options
        self.embedding = layers.VocabParallelEmbedding(config.vocab_size, config.hidden_size, options)
        self.layers = nn.ModuleList(DecoderLayer(config, options) for _ in range(config.num_layers))
        self.final_norm = layers.RMSNorm(config.hidden_size, config.norm_eps, options)
        if not config.tie_word_embeddings:
            padded = padded_vocab_size(config.vocab_size, options.tp.size)
            self.head = layers.ColumnParallelLinear(config.hidden_size, padded, options)
        self.rope_frequencies = rope_frequencies(config).to(options.device)  # [d/2] fp32; not saved
        self.rope_cache: dict[int, Rope] = {}

    def rope(self, length: int) -> Rope:
        """cos and sin of every position below ``length``, computed in fp32 and then rounded, as in Hugging Face."""
        if length not in self.rope_cache:
            positions = torch.arange(length, dtype=torch.float32, device=self.options.device)
            angles = torch.outer(positions, self.rope_frequencies).repeat(1, 2)[:, None, None, :]  # [s, 1, 1, d]
            self.rope_cache[length] = (angles.cos().to(self.options.dtype), angles.sin().to(self.options.dtype))
        return self.rope_cache[length]

    def local_logits(self, tokens: Tensor) -> Tensor:
        """[b, s] int64 -> this rank's columns [s, b, v/t], padding columns included."""
        rope = self.rope(tokens.shape[1])
        x = self.embedding(tokens.t())  # [s/t, b, h]
        for layer in self.layers:
            x = layer(x, rope)
        x = self.final_norm(x)
        table = self.embedding.weight if self.config.tie_word_embeddings else self.head.weight
        return layers.column_parallel(x, table, self.options)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Loss of every token.

        Args:
            tokens, labels: [b, s] int64; label i is the token after token i.

        Returns:
            [b, s] fp32, the same on all tensor-parallel ranks.
        """
        logits, vocab_size = self.local_logits(tokens), self.config.vocab_size
        assert vocab_size is not None
        return vocab_parallel_cross_entropy(logits, labels.t(), vocab_size, self.options.tp).t()

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """[b, s] int64 -> [b, s, v] over the true vocabulary, gathered on every rank: for proofs, not for training."""
        columns = self.local_logits(tokens).permute(2, 1, 0)  # [v/t, b, s]
        return all_gather_rows(columns, self.options.tp)[: self.config.vocab_size].permute(1, 2, 0)


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Angle per position of each pair of dimensions: [d/2] fp32, theta^(-2i/d), stretched as Llama 3 does if asked.

    Llama 3 divides the frequencies of long wavelengths by ``factor``, leaves short ones, and interpolates between
    (the ``llama3`` RoPE type of transformers).
    """
    d = config.head_size
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, d, 2, dtype=torch.int64).float() / d)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    context, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (context / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    stretched = torch.where(wavelengths > context / low, frequencies / scaling.factor, between)
    return torch.where(wavelengths < context / high, frequencies, stretched)


def build_llama(
    config: ModelConfig,
    ctx: ParallelContext,
    *,
    dtype: torch.dtype = torch.float32,
    sequence_parallel: bool = False,
    operations: Operations | None = None,
) -> Llama:
    """This rank's part of the model, all weights zero until ``initialise`` or a checkpoint fills them.

    A second implementation of the layers (Transformer Engine) is a module with the class names of ``layers.py``,
    chosen here.
    """
    options = LayerOptions(dtype, ctx.device, ctx.tp, sequence_parallel, operations or Operations())
    return Llama(config, options)
