"""What composes with what: the tables of docs/parallelism.md are what the config accepts, pair by pair."""

from __future__ import annotations

import itertools
import os
import re
from functools import cache
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
OTHERS: dict[str, list[str]] = {  # which nearly everything goes with: listed with what they are refused with
    "Muon": ["optimizer.style=muon"],
    "shard_size": ["parallel.shard_size=2"],
    "weights kept after forward": ["parallel.shard=weights", "parallel.reshard_after_forward=false"],
    "selective recompute": ["train.recompute=selective"],
    "without overlap": ["parallel.overlap_param_gather=false", "parallel.overlap_grad_reduce=false"],
    "fp8=delayed": ["kernels.fp8=delayed", "kernels.layers=te"],
    "z-loss": ["train.z_loss=1e-4"],
    "phases": ["data.train=null",
               "data.phases=[{train: {a: 1.0}, samples: 128, seq_length: 256}, {train: {a: 1.0}}]"],
    "batch ramp": ["train.batch_size_ramp={start: 32, increment: 16, samples: 640}"],
    "FIM": ["data.fim={a: {rate: 0.5}}"],
    "order=megatron": ["data.order=megatron"],
    "drift check": ["train.drift_check_interval_steps=10"],
    "rewind": ["train.on_spike=rewind"],
    "background saves": ["checkpoint.mode=background", "checkpoint.save_interval_steps=5"],
    "evaluator": ["data.valid={v: v}", "checkpoint.save_interval_steps=5", "train.evaluator={interval_steps: 5}"],
}  # fmt: skip
BOTH = FEATURES | OTHERS
ORDER = list(BOTH)
TRIPLES = {("PP", "fp8", "layers=te"): "E205", ("interleaved", "fp8", "layers=te"): "E205"}
"""Refused though each two of them are accepted."""
FULL_GRID = os.environ.get("HAMMER_FULL_GRID", "")
MODEL = """
model:
  {hidden_size: 256, ffn_hidden_size: 768, num_layers: 8, num_attention_heads: 8, num_query_groups: 4, vocab_size: 512}
data: {seq_length: 512, train: {a: 1.0}}
train: {num_steps: 10, global_batch_size: 64, device: cuda}
"""


@cache
def refusal(path: Path, *features: str) -> str:
    """The line that refuses the features together; empty where nothing does."""
    settings = dict.fromkeys(setting for name in features for setting in BOTH[name])
    try:
        load_config(path, list(settings)).validate(16)
    except ConfigError as error:
        return str(error)
    return ""


def answer(path: Path, *features: str) -> str:
    """ "yes", or the number of the error that refuses the features together."""
    line = refusal(path, *features)
    return line.split("[")[1].split("]")[0] if line else "yes"


def table(path: Path, corner: str) -> list[str]:
    """The lines of the page's first table: below its diagonal every pair once."""
    names = list(FEATURES)
    lines = [f"| {corner} | {' | '.join(names[:-1])} |", "|---" * len(names) + "|"]
    for i, row in enumerate(names[1:], start=1):
        cells = [answer(path, column, row) if j < i else "" for j, column in enumerate(names[:-1])]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return lines


def second_table(path: Path) -> list[str]:
    """Of the other features: what each is refused with, of all."""
    lines = ["| setting | refused with |", "|---|---|"]
    for name in OTHERS:
        refused = {other: answer(path, *sorted((other, name), key=ORDER.index)) for other in BOTH if other != name}
        cells = [f"{other} {number}" for other, number in refused.items() if number != "yes"]
        lines.append(f"| {name} | {', '.join(cells) or '-'} |")
    return lines


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("composition") / "preset.yaml"
    path.write_text(MODEL, encoding="utf-8")
    return path


def test_the_tables_are_what_the_config_accepts(preset: Path) -> None:
    assert {answer(preset, name) for name in BOTH} == {"yes"}
    first, second = "\n".join(table(preset, "with")), "\n".join(second_table(preset))
    for page in ("parallelism.md", "parallelism.zh-CN.md"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        assert first in text, "\n" + first
        assert second in text, "\n" + second


def test_what_is_refused_is_refused_by_name(preset: Path) -> None:
    """The line names a setting of each of the two."""
    for pair in itertools.combinations(BOTH, 2):
        line = refusal(preset, *pair)
        named = [any(setting.split("=")[0] in line for setting in BOTH[name]) for name in pair]
        assert not line or all(named), (pair, line)


def test_three_settings_that_go_two_by_two(preset: Path) -> None:
    for three, number in TRIPLES.items():
        assert {answer(preset, *pair) for pair in itertools.combinations(three, 2)} == {"yes"}
        assert answer(preset, *three) == number


@pytest.mark.parametrize("page", ["parallelism.md", "parallelism.zh-CN.md"])
def test_the_page_names_a_file_for_each_dimension(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    named = re.findall(
        r"\((?:DP|TP|SP|CP|PP)\).*\| `(\S+\.py)` \|$|（(?:DP|TP|SP|CP|PP)）.*\| `(\S+\.py)` \|$", text, re.M
    )
    assert len(named) == 5
    assert all((ROOT / "megatron_hammer" / (a or b)).is_file() for a, b in named), named


@pytest.mark.slow
@pytest.mark.skipif(not FULL_GRID, reason="all threes of settings, 20 s: HAMMER_FULL_GRID=1 tries them")
def test_no_other_three_are_refused(preset: Path) -> None:
    refused = {pair for pair in itertools.combinations(BOTH, 2) if refusal(preset, *pair)}
    for three in itertools.combinations(BOTH, 3):
        if not refused.intersection(itertools.combinations(three, 2)):
            assert answer(preset, *three) == TRIPLES.get(three, "yes"), three
