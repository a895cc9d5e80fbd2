"""What the planner proposes can be built and computes what one process computes.

Questions are drawn: a preset, changed in its context, mask, tying, optimizer and batch, on up to eight GPUs of a kind
and memory, and one row of the answer's table. The number of a proposal is its seed. A few are put together here, and
one of them on ranks; ``HAMMER_PROPOSALS=0:24`` has ``verify_parallel`` prove those with these numbers.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_hammer.base.errors import ConfigError, MemoryShortage
from megatron_hammer.config import Config, load_config, preset_names, to_yaml
from megatron_hammer.costs.gpus import GPUS
from megatron_hammer.costs.layouts import name_of
from megatron_hammer.costs.planner import PlanRequest, chosen_config, plan_layouts
from megatron_hammer.train.prepare import prepare
from megatron_hammer.verify.parallel import Proof, prove_layout
from megatron_hammer.verify.shrink import shrink
from tests.distributed import run_distributed
from tests.model.tiny import exact_steps
from tests.verify.grid import findings_of

NUMBERS = os.environ.get("HAMMER_PROPOSALS", "")
COUNTS = (2, 2, 3, 4, 4, 6, 8, 8)
KINDS = [name for name, gpu in GPUS.items() if gpu.peak_tflops is not None]


def drawn(number: int, presets: Sequence[str], counts: Sequence[int]) -> tuple[str, Config, int]:
    """A proposal by its number: what was asked and answered in a line, its config, its ranks."""
    rng = random.Random(number)
    while True:
        preset, gpus, gpu = rng.choice(presets), rng.choice(counts), rng.choice(KINDS)
        precision = rng.choice(("bf16", "bf16", "fp32", "fp16", *(["fp8"] if GPUS[gpu].fp8 else [])))
        length = rng.choice((128, 512, 2048, 8192))
        settings = [
            f"model.vocab_size={rng.choice((301, 32_000, 105_789, 151_936))}",
            f"model.max_position_embeddings={length}",
            f"model.tie_word_embeddings={str(rng.random() < 0.3).lower()}",
            f"data.seq_length={length}",
            f"data.attention_mask={rng.choice(('causal', 'document'))}",
            f"optimizer.style={rng.choice(('adamw', 'adamw', 'muon'))}",
            f"train.global_batch_size={gpus * rng.choice((4, 8, 32))}",
        ]
        share = rng.choice((1.0, 1.0, 0.25))  # of the GPU's memory: less is left to someone else's processes
        request = PlanRequest(gpus, gpu.replace(" ", "-"), GPUS[gpu].memory_gib * share, precision=precision)
        try:
            config = load_config(preset, settings)
            plan = plan_layouts(config, request)
        except (ConfigError, MemoryShortage):  # no class of transformers, no layout: an answer that proposes nothing
            continue
        row = rng.randrange(len(plan.found.ranked))
        chosen = chosen_config(plan, config, 1 + row)
        question = f"{preset} {' '.join(settings)}, {gpus} x {gpu} with {request.memory:g} GiB"
        return f"{question}: row {1 + row} of {len(plan.found.ranked)}, {name_of(chosen, gpus)}", chosen, gpus


def written(config: Config, gpus: int, path: Path) -> Config:
    """The config as a run reads it from the file that ``plan.py --write`` makes, checked as a run checks it."""
    path.write_text(to_yaml(config), encoding="utf-8")
    return prepare(load_config(path, ["train.dry_run=true"]), gpus).config


def test_proposals_can_be_built_and_one_is_proved(tmp_path: Path) -> None:
    """Of presets whose layouts are found within a second."""
    of_ranks = {}
    for number in range(3):
        said, config, gpus = drawn(number, ("tiny", "quick_start"), (2, 4))
        small, _ = shrink(written(config, gpus, tmp_path / "plan.yaml"), gpus)
        small.validate(gpus)
        of_ranks[gpus] = (said, small)
    assert set(of_ranks) == {2, 4}
    said, small = of_ranks[4]
    findings = findings_of(small, run_distributed(4, exact_steps, small))
    assert not findings, (said, findings[:5])


@pytest.mark.slow
@pytest.mark.skipif(not NUMBERS, reason="the proof of drawn proposals, half a minute each: HAMMER_PROPOSALS=0:24")
@pytest.mark.timeout(0)
def test_every_proposal_passes_verify_parallel(tmp_path: Path) -> None:
    first, _, end = NUMBERS.partition(":")
    wrong = []
    for number in range(int(first), int(end)):
        said, config, gpus = drawn(number, preset_names(), COUNTS)
        proof = prove_layout(written(config, gpus, tmp_path / "plan.yaml"), gpus, lambda note: None)
        equal = isinstance(proof, Proof) and not proof.findings
        print(number, said, "equal" if equal else proof, flush=True)
        wrong += [] if equal else [number]
    assert not wrong
