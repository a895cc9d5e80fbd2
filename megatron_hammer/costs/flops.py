"""The FLOPs of training a token, and the peak of a device in a run's precision: what MFU is made of.

MFU (model FLOPs utilisation) is stated twice, because two counts are in use::

    mfu         full:   6 N + 12 L (n d) s  FLOPs a token (arXiv 2204.02311 appendix B)
    mfu_causal  causal: 6 N +  6 L (n d) s  (half of the attention is masked away)

with N the weights that take part in matrix products (head included, embedding look-up not), over the devices' dense
peak; null where no peak is known. ``tflops_causal`` is what each device does by the second count, as Megatron-LM's
``num_floating_point_operations`` counts a Llama, but for the padding of the vocabulary, which it adds. Both count whole
samples: with data.attention_mask=document less attention is computed, and the true utilisation is lower than either
says. Needs no torch.
"""

from __future__ import annotations

from functools import lru_cache

from megatron_hammer.config import Config, ModelConfig
from megatron_hammer.costs.gpus import find_gpu
from megatron_hammer.model.parameters import EMBEDDING, logical_shapes


def peak_tflops(config: Config, device_name: str) -> float | None:
    """Dense peak of one device in the run's precision: the config's, else the table's, else None."""
    if config.log.peak_tflops is not None:
        return config.log.peak_tflops
    gpu = find_gpu(device_name)
    return None if gpu is None else gpu.peak(config.train.precision)


@lru_cache(maxsize=8)  # a search for layouts asks for the same many times
def flops_per_token(model: ModelConfig, seq_length: int) -> tuple[float, float]:
    """Training FLOPs of one token, forward and backward: (full, causal)."""
    shapes = logical_shapes(model)
    weights = sum(
        s[0] * s[1] for name, s in shapes.items() if len(s) == 2 and (name != EMBEDDING or model.tie_word_embeddings)
    )
    attention = 6 * model.num_layers * model.num_attention_heads * model.head_size * seq_length
    return 6.0 * weights + 2 * attention, 6.0 * weights + attention
