"""The peer: transformers' Trainer on LlamaForCausalLM, random tokens, the same sizes; same arguments as our_step.py."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from shapes import SHAPES, Shape, peak_mb, report
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments


class RandomTokens(torch.utils.data.Dataset):
    """Sequences of random ids, made on the fly."""

    def __init__(self, vocabulary: int, length: int) -> None:
        self.vocabulary, self.length = vocabulary, length

    def __len__(self) -> int:
        return 100_000

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, self.vocabulary, (self.length,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": tokens, "labels": tokens}


class Clock(TrainerCallback):
    """When every optimizer step began and ended, in seconds of ``time.perf_counter``."""

    def __init__(self, synchronise: Callable[[], None] = lambda: None) -> None:
        self.synchronise = synchronise
        self.spans: list[tuple[float, float]] = []
        self.start = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.synchronise()
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.synchronise()
        self.spans.append((self.start, time.perf_counter()))


def llama(shape: Shape, attention: str) -> LlamaForCausalLM:
    """The peer's model of this shape, fp32, on torch's default device; ``attention`` by transformers' name."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        max_position_embeddings=shape.sequence,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation=attention,  # type: ignore[call-arg]
    )
    return LlamaForCausalLM(config)


def main() -> None:
    """Time one configuration."""
    size, mode, precision = sys.argv[1:4]
    imported, shape, clock = peak_mb(), SHAPES[size], Clock()
    model = llama(shape, "sdpa")
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=shape.micro_batch,
            gradient_accumulation_steps=shape.accumulation,
            max_steps=shape.steps,
            learning_rate=5e-4,
            bf16=precision == "bf16",
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1000,
            torch_compile=mode == "compile",
            disable_tqdm=True,
        )
        data = RandomTokens(shape.vocabulary, shape.sequence)
        Trainer(model=model, train_dataset=data, callbacks=[clock], args=arguments).train()
    report("transformers Trainer", size, mode, precision, [end - start for start, end in clock.spans], imported)


if __name__ == "__main__":
    main()
