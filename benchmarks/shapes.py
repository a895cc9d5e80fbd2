"""The sizes that all sides of a benchmark train, and what a run of the CPU step prints."""

from __future__ import annotations

import json
import resource
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shape:
    """A Llama and a step: h, f, layers, heads, groups, s, v, micro-batch, accumulation, timed steps."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    groups: int
    sequence: int
    vocabulary: int
    micro_batch: int
    accumulation: int
    steps: int

    @property
    def tokens(self) -> int:
        """In one step."""
        return self.micro_batch * self.accumulation * self.sequence

    def at(self, micro_batch: int) -> Shape:
        """As many tokens a step, in other micro-batches: so the optimizer's share of a step stays what it was."""
        return replace(self, micro_batch=micro_batch, accumulation=self.micro_batch * self.accumulation // micro_batch)

    @property
    def model_fields(self) -> dict[str, int]:
        """Group ``model`` of our config."""
        return {
            "hidden_size": self.hidden,
            "ffn_hidden_size": self.ffn,
            "num_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_query_groups": self.groups,
            "vocab_size": self.vocabulary,
        }

    @property
    def flops_per_token(self) -> int:
        """6 x matrix weights + causal attention."""
        h, g = self.hidden, self.groups
        layer = 2 * h * h + 2 * h * h * g // self.heads + 3 * h * self.ffn
        return 6 * (self.layers * layer + self.vocabulary * h) + 6 * self.layers * h * self.sequence


SHAPES = {
    "quick": Shape(256, 704, 4, 8, 2, 256, 8192, 4, 2, 24),
    "mid": Shape(512, 1408, 8, 8, 2, 512, 32000, 4, 2, 10),
}
HAMMERLLM = Shape(
    2048, 5632, 22, 32, 4, 2048, 105_789, 8, 4, 10
)  # on a GPU; accumulation 16 only dilutes the optimizer
TOY = Shape(64, 176, 2, 8, 2, 64, 301, 2, 2, 2)  # tries the GPU suite itself
WARM_UP_STEPS = 3


def peak_mb() -> int:
    """Largest resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def report(who: str, size: str, mode: str, precision: str, seconds: Sequence[float], imported_mb: int) -> None:
    """Print one JSON line: rate of the median step after the warm-up, memory peak above that of the imports."""
    shape = SHAPES[size]
    median = statistics.median(seconds[WARM_UP_STEPS:])
    line = {
        "who": who,
        "size": size,
        "mode": mode,
        "precision": precision,
        "tokens_per_second": round(shape.tokens / median, 1),
        "gflops": round(shape.tokens / median * shape.flops_per_token / 1e9, 1),
        "first_step_s": round(seconds[0], 1),
        "memory_mb": peak_mb() - imported_mb,
    }
    print(json.dumps(line), flush=True)
