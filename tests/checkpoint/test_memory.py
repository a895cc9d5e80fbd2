"""Exporting, importing, saving: a few blocks; loading: one tensor; measured as resident memory of a child."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_hammer.huggingface.export import export_hf
from megatron_hammer.model.parameters import logical_shapes
from tests.checkpoint.layouts import random_logical, tiny_model, write_layout

MB = 2**20
# Two matrices of 125 MB and layers of 3 MB each.
MODEL = tiny_model(hidden_size=256, ffn_hidden_size=512, num_layers=8, head_dim=32, vocab_size=128001)
LARGEST, TOTAL = 125 * MB, 4 * sum(torch.Size(s).numel() for s in logical_shapes(MODEL).values())
LITTLE = 16 * MB  # two blocks of 4 MiB being written or four of 2 being read, a chunk of 4, the allocator's slack

CHILD = """
import resource, sys
import torch, numpy, tqdm, megatron_hammer.huggingface.certificate
from pathlib import Path
from megatron_hammer.checkpoint.folder import open_checkpoint
from megatron_hammer.checkpoint.manifest import read_manifest
from megatron_hammer.huggingface.export import export_hf
from megatron_hammer.huggingface.importing import import_hf
from megatron_hammer.checkpoint.manifest import saved_model
from megatron_hammer.checkpoint.read import load_shards
from megatron_hammer.checkpoint.write import save_checkpoint
from megatron_hammer.model.parameters import parameter_table
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.parallel.sharding import Shard

def certify(checkpoint, folder, dtype):
    (folder / "certificate.json").write_text("{}")

def peak():
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmHWM"))

def reset():
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts from what is resident now

def growth(task, source, target):
    manifest = open_checkpoint(source) if task != "import" else None
    if task in ("load", "save"):
        model = saved_model(manifest)
        shards = [Shard(p, 0, p.numel, {"weight": torch.ones(p.numel)}) for p in parameter_table(model)]
    reset()
    before = peak()
    if task == "export":
        export_hf(source, target, "bfloat16", prove=certify, note=lambda text: None)
    elif task == "import":
        import_hf(source, target, note=lambda text: None)
    elif task == "load":
        load_shards(manifest, shards, model=model, kinds=("weight",), ctx=ParallelContext.single())
    else:
        save_checkpoint(target, 1, shards, model=model, config_tree=manifest.config, state={}, tokenizer=None,
                        ctx=ParallelContext.single())
    return peak() - before

task, warm_source, source, target = sys.argv[1:]
growth(task, warm_source, target + "-warm")  # libraries and thread pools become resident
print(growth(task, source, target))
"""


def certify(checkpoint: Path, folder: Path, dtype: str) -> None:
    """No proof: it is the writing that is measured."""
    (folder / "certificate.json").write_text("{}")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A checkpoint of TP 2 (so that tensors have to be put together) and a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("memory")
    tensors = {(n, "weight"): torch.full(s, 0.5) for n, s in logical_shapes(MODEL).items()}
    write_layout(folder / "run", MODEL, tensors, 2, 1)
    tiny = tiny_model()
    write_layout(folder / "tiny-run", tiny, random_logical(tiny), 2, 1)
    for name in ("run", "tiny-run"):
        export_hf(folder / name, folder / name.replace("run", "hf"), "float32", prove=certify, note=lambda text: None)
    return folder


@pytest.mark.parametrize("task, source, allowed", [
    ("export", "run", LITTLE + 48 * MB),  # reads two files while it writes: 32 MB in use, the rest malloc keeps
    ("import", "hf", LITTLE + 8 * MB),  # reads while it writes
    ("load", "run", LARGEST + LITTLE),  # beside the state itself
    ("save", "run", LITTLE),
])  # fmt: skip
def test_peak_memory_is_a_few_blocks_or_one_tensor(places, tmp_path, task, source, allowed):
    command = [sys.executable, "-c", CHILD, task, str(places / f"tiny-{source}"), str(places / source)]
    command.append(str(tmp_path / "out"))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout)
    assert allowed < TOTAL * 0.7, "the bound must tell one tensor from the whole model"
    assert grown < allowed, f"{task} grew by {grown / MB:.0f} MB, the model has {TOTAL / MB:.0f} MB"
