"""The peer: transformers' Trainer on LlamaForCausalLM, random tokens, the same sizes; same arguments as our_step.py."""

from __future__ import annotations

import sys
import tempfile
import time
from typing import Any

import torch
from shapes import SHAPES, peak_mb, report
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
    """Seconds of every optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.start = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def main() -> None:
    """Time one configuration."""
    size, mode, precision = sys.argv[1:4]
    imported, shape, clock = peak_mb(), SHAPES[size], Clock()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.groups,
            max_position_embeddings=shape.sequence,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
        )
    )
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
    report("transformers Trainer", size, mode, precision, clock.seconds, imported)


if __name__ == "__main__":
    main()
