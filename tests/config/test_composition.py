"""What composes with what: the table of docs/parallelism.md is what the config accepts, pair by pair."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.config import load_config

ROOT = Path(__file__).parents[2]
TP, PP = "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"

FEATURES: dict[str, list[str]] = {  # as the page names them: settings
    "TP": [TP],
    "SP": [TP, "parallel.sequence_parallel=true"],
    "chunks": [TP, "parallel.sequence_parallel=true", "parallel.tp_comm_overlap=chunks"],
    "PP": [PP],
    "interleaved": [PP, "parallel.virtual_pipeline_stages=2"],
    "CP": ["parallel.context_parallel_size=2"],
    "gradients": ["parallel.shard=gradients"],
    "weights": ["parallel.shard=weights"],
    "document masks": ["data.attention_mask=document"],
    "tied weights": ["model.tie_word_embeddings=true"],
    "recompute": ["train.recompute=full"],
    "fp16": ["train.precision=fp16"],
    "compile=layers": ["kernels.compile=layers"],
    "cuda_graph": ["kernels.cuda_graph=true"],
    "fp8": ["kernels.fp8=current"],
    "layers=te": ["kernels.layers=te"],
    "attention=te": ["kernels.attention=te"],
    "tree": ["train.deterministic_reduction=tree"],
    "run twice": ["train.sdc_check_interval_steps=100", "kernels.deterministic=true"],
}
MODEL = """
model:
  {hidden_size: 256, ffn_hidden_size: 768, num_layers: 8, num_attention_heads: 8, num_query_groups: 4, vocab_size: 512}
data: {seq_length: 512}
train: {num_steps: 10, global_batch_size: 64, device: cuda}
"""


def answer(path: Path, *features: str) -> str:
    """ "yes", or the number of the error that refuses the features together."""
    try:
        load_config(path, [setting for name in features for setting in FEATURES[name]]).validate(16)
    except ConfigError as error:
        return str(error).split("[")[1].split("]")[0]
    return "yes"


def table(path: Path, corner: str) -> list[str]:
    """The lines of the page's table: below its diagonal every pair once."""
    names = list(FEATURES)
    lines = [f"| {corner} | {' | '.join(names[:-1])} |", "|---" * len(names) + "|"]
    for i, row in enumerate(names[1:], start=1):
        cells = [answer(path, row, column) if j < i else "" for j, column in enumerate(names[:-1])]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return lines


@pytest.mark.parametrize("page", ["parallelism.md", "parallelism.zh-CN.md"])
def test_the_table_is_what_the_config_accepts(page: str, tmp_path: Path) -> None:
    preset = tmp_path / "preset.yaml"
    preset.write_text(MODEL, encoding="utf-8")
    assert {answer(preset, name) for name in FEATURES} == {"yes"}
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert "\n".join(table(preset, "with")) in text, "\n" + "\n".join(table(preset, "with"))
