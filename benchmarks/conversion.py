"""Conversion between checkpoints and Hugging Face folders: against this disk, and against what people do by hand.

    python benchmarks/conversion.py [--rounds N] [--proof] [--folder SCRATCH] [--small]

Makes a random Llama of HammerLLM's size (1.4B, bf16) as a Hugging Face folder, as a checkpoint of two tensor-parallel
ranks and as Megatron-like pickles of two partitions, and a smaller model with its whole training state in fp32. Then,
in rounds, each a process of its own, in turning order:

disk     writing and syncing as many bytes through the page cache and past it (O_DIRECT), reading past it and from it
import   Hugging Face folder -> checkpoint of step 0, which is read back        (ours; the peer: -> two pickles)
export   checkpoint of two ranks -> Hugging Face folder, without the proof      (ours; the peer: two pickles ->)

with the source in the page cache, and then with the source on the disk alone. The peer is ``from_pretrained``, split,
``torch.save``; and ``torch.load``, merge, a ``LlamaForCausalLM`` without initialisation, ``save_pretrained``. It
neither syncs nor hashes nor reads back; the seconds until its bytes are on the disk are given beside. ``--proof`` adds
one export with its certificate. Last, C8: the start of every tool, and what tools that need no torch import.

The share of the disk is the time that the disk needs at least for the bytes that have to pass through it, at the faster
of its rates (measured anew in each half of a round), over the time that was taken. Memory is the peak above what was
resident after the imports (VmHWM), and of it, sampled, anonymous memory: mapped files count as resident but can be
dropped at any time.

Needs 15 GB of free disk, and 9 GB of memory for the peer. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import math
import mmap
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sides import Measured, memory_mb, run

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

BLOCK = 4 * 2**20
MIB = 2**20 / 1e6  # in MB
SHAPE = {"hidden_size": 2048, "ffn_hidden_size": 5632, "num_layers": 22, "num_attention_heads": 32,
         "num_query_groups": 4, "vocab_size": 105_789, "max_position_embeddings": 2048}  # fmt: skip
SMALL = {**SHAPE, "hidden_size": 64, "ffn_hidden_size": 96, "num_layers": 2, "num_attention_heads": 4,
         "num_query_groups": 2, "vocab_size": 511}  # fmt: skip
STATE_LAYERS = 2  # of the model whose whole state is kept: 6.3 GB instead of 16.8
SOURCES = {"import": "hf", "export": "tp2", "state": "state", "peer-import": "hf", "peer-export": "pickles"}


def model_of(small: bool, num_layers: int | None = None) -> Any:
    """The model's config."""
    from megatron_hammer.config import ModelConfig

    shape = dict(SMALL if small else SHAPE)
    return ModelConfig(**{**shape, "num_layers": num_layers or shape["num_layers"]})  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------------
# What is converted
# ---------------------------------------------------------------------------------------------------------------------


def make(folder: Path, small: bool) -> dict[str, Any]:
    """``hf``, ``tp2``, ``pickles`` and ``state`` in ``folder``; values drawn from a normal distribution."""
    import torch

    from megatron_hammer.base.files import dump_json, write_durably
    from megatron_hammer.checkpoint.write import chunks_of
    from megatron_hammer.huggingface.config import hf_config_from_model
    from megatron_hammer.huggingface.weights import HfWeights, write_weight_files
    from megatron_hammer.model.parameters import logical_shapes

    model, generator = model_of(small), torch.Generator().manual_seed(1)
    shapes = logical_shapes(model)
    noise = torch.randn(2**24 if not small else 2**16, generator=generator)  # repeated at other places

    def values(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        count, start = torch.Size(shape).numel(), int(torch.randint(len(noise), (1,), generator=generator))
        drawn = noise.roll(start).repeat(-(-count // len(noise)))[:count].view(shape)
        return (1 + 0.02 * drawn if len(shape) == 1 else 0.02 * drawn).to(dtype)

    hf = folder / "hf"
    hf.mkdir()
    write_durably(hf / "config.json", dump_json(hf_config_from_model(model, {}, "bfloat16")))
    write_weight_files(
        hf,
        {name: ("bfloat16", shape) for name, shape in shapes.items()},
        lambda name: chunks_of(values(shapes[name], torch.bfloat16)),
    )
    with HfWeights(hf) as weights:
        write_ranks(folder / "tp2", model, lambda name, kind: weights.read(name), ("weight",))
    few = model_of(small, STATE_LAYERS)
    few_shapes = logical_shapes(few)
    write_ranks(
        folder / "state",
        few,
        lambda name, kind: values(few_shapes[name], torch.float32),
        ("weight", "exp_avg", "exp_avg_sq"),
    )
    peer_import(hf, folder / "pickles")
    return {"parameters": sum(torch.Size(s).numel() for s in shapes.values())}


def write_ranks(folder: Path, model: Any, value: Callable[[str, str], Any], kinds: tuple[str, ...]) -> None:
    """A checkpoint as two tensor-parallel ranks write it, one after the other."""
    from megatron_hammer.base.files import staging_path
    from megatron_hammer.checkpoint.commit import SliceToWrite, commit, write_rank
    from megatron_hammer.checkpoint.dtypes import DTYPE_NAMES
    from megatron_hammer.checkpoint.first import chunks_from
    from megatron_hammer.checkpoint.manifest import SavedLayout
    from megatron_hammer.model.parameters import parameter_table
    from megatron_hammer.parallel.placement import place

    target = folder / "checkpoints" / "step-00000001"
    staging = staging_path(target)
    staging.mkdir(parents=True)
    dtype = DTYPE_NAMES[value("model.norm.weight", "weight").dtype]

    def part(piece: Any, kind: str) -> Callable[[], Iterator[Any]]:
        def load() -> Iterator[Any]:
            rows = value(piece.tensor, kind)[slice(*piece.rows)]
            yield rows if piece.cols is None else rows[:, slice(*piece.cols)].contiguous()

        return load

    for rank in range(2):
        owned = [s for p in parameter_table(model, place(model, rank, 2)) for s in p.slices if s.owned]
        shapes = [
            (s.rows[1] - s.rows[0], *(() if s.cols is None else (s.cols[1] - s.cols[0],)))
            for s in owned
        ]  # fmt: skip
        pieces = [
            SliceToWrite(s.tensor, kind, s.rows, s.cols, shape, dtype, chunks_from(part(s, kind)))
            for kind in kinds
            for s, shape in zip(owned, shapes)
        ]
        write_rank(staging, rank, pieces)
    tree = {"model": asdict(model)}
    commit(staging, target, step=1, model=model, config_tree=tree, state={}, weights_dtype="bfloat16",
           layout=SavedLayout(2, 2), tokenizer=None)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The peer: a conversion as it is usually written
# ---------------------------------------------------------------------------------------------------------------------


def peer_import(hf: Path, output: Path) -> None:
    """Hugging Face -> two partitions as Megatron keeps them: fused qkv by query group, fused gate and up."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        hf, dtype=torch.bfloat16, trust_remote_code=False, use_safetensors=True
    )
    config, state = model.config, model.state_dict()
    groups, per_group = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    output.mkdir()
    for rank in range(2):
        part = {}
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            rows = -(-len(state[name]) // 2)
            part[name] = state[name][rank * rows : (rank + 1) * rows].clone()
        part["model.norm.weight"] = state["model.norm.weight"]
        for i in range(config.num_hidden_layers):
            layer = f"model.layers.{i}."
            q, k, v = (state[f"{layer}self_attn.{x}_proj.weight"] for x in "qkv")
            h = q.shape[1]
            heads = [q.view(groups, per_group, -1, h), k.view(groups, 1, -1, h), v.view(groups, 1, -1, h)]
            qkv = torch.cat(heads, 1).chunk(2)[rank]
            part[f"{layer}qkv"] = qkv.reshape(-1, h).clone()
            gate, up = (state[f"{layer}mlp.{x}_proj.weight"].chunk(2)[rank] for x in ("gate", "up"))
            part[f"{layer}fc1"] = torch.cat([gate, up])
            for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
                part[layer + name] = state[layer + name].chunk(2, 1)[rank].clone()
            for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
                part[layer + name] = state[layer + name]
        torch.save(part, output / f"mp_rank_{rank:02d}.pt")
    shutil.copy(hf / "config.json", output)


def peer_export(pickles: Path, output: Path) -> None:
    """Two partitions -> Hugging Face: load both, merge along the right axes, ``save_pretrained``."""
    import torch
    from transformers import AutoConfig, LlamaForCausalLM

    config = AutoConfig.from_pretrained(pickles, trust_remote_code=False, use_safetensors=True)
    parts = [torch.load(pickles / f"mp_rank_{rank:02d}.pt", map_location="cpu", weights_only=True) for rank in range(2)]
    groups, per_group = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    h, d = config.hidden_size, config.hidden_size // config.num_attention_heads
    state = {}
    for name in parts[0]:
        pair = [part[name] for part in parts]
        layer = name.rsplit(".", 1)[0] + "."
        if name.endswith(".qkv"):
            heads = torch.cat(pair).view(groups, per_group + 2, d, h)
            for x, part in zip("qkv", heads.split([per_group, 1, 1], 1)):
                state[f"{layer}self_attn.{x}_proj.weight"] = part.reshape(-1, h)
        elif name.endswith(".fc1"):
            gates, ups = zip(*(x.chunk(2) for x in pair))
            state[f"{layer}mlp.gate_proj.weight"], state[f"{layer}mlp.up_proj.weight"] = map(torch.cat, (gates, ups))
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            state[name] = torch.cat(pair, 1)
        elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
            state[name] = torch.cat(pair)
        else:
            state[name] = pair[0]
    with torch.device("meta"):  # what is loaded anyway is not initialised
        model = LlamaForCausalLM(config)
    model.load_state_dict(state, assign=True)
    model.save_pretrained(output)


# ---------------------------------------------------------------------------------------------------------------------
# One measurement, in a process of its own
# ---------------------------------------------------------------------------------------------------------------------


def measure(task: str, folder: Path, output: Path) -> dict[str, Any]:
    """Run one task; seconds, peak memory above that after the imports, and seconds until the disk has it all."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM  # lazy there: imported by name

    assert transformers and AutoConfig and AutoModelForCausalLM and LlamaForCausalLM
    import megatron_hammer.huggingface.certificate
    from megatron_hammer.huggingface.export import export_hf
    from megatron_hammer.huggingface.importing import import_hf

    def certify(checkpoint: Path, exported: Path, dtype: str) -> None:
        (exported / "certificate.json").write_text("{}")

    source, quiet = folder / SOURCES[task.removesuffix("-proof")], lambda text: None
    work: dict[str, Callable[[], Any]] = {
        "import": lambda: import_hf(source, output, note=quiet),
        "export": lambda: export_hf(source, output, "bfloat16", prove=certify, note=quiet),  # type: ignore[arg-type]
        "export-proof": lambda: export_hf(source, output, "bfloat16", note=quiet),
        "state": lambda: export_hf(source, output, "bfloat16", prove=certify, note=quiet),  # type: ignore[arg-type]
        "peer-import": lambda: peer_import(source, output),
        "peer-export": lambda: peer_export(source, output),
    }
    assert megatron_hammer and torch
    with Memory() as memory:
        work[task]()
    start = time.perf_counter()
    os.sync()
    return {"seconds": memory.seconds, "cpu": memory.cpu_seconds, "sync": time.perf_counter() - start,
            "peak_mb": memory.peak, "anonymous_mb": memory.anonymous}  # fmt: skip


class Memory(Measured):
    """Also samples anonymous memory, every 5 ms; both peaks above what the block began with, MB."""

    def __enter__(self) -> Memory:
        super().__enter__()
        self._anonymous_before, self.anonymous, self._over = memory_mb("RssAnon"), 0.0, threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._over.wait(0.005):
            self.anonymous = max(self.anonymous, MIB * (memory_mb("RssAnon") - self._anonymous_before))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._over.set()
        self._thread.join()
        self.peak = MIB * (self.peak_mb - self.before)


def measure_disk(size: int, folder: Path) -> dict[str, float]:
    """GB/s of this disk for ``size`` bytes: written and synced both ways, read past the page cache and from it."""
    path = folder / "disk"
    source = mmap.mmap(-1, 16 * BLOCK)
    source[:] = os.urandom(16 * BLOCK)
    view, rates = memoryview(source), {}

    def write(flags: int) -> None:
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | flags)
        for start in range(0, size, BLOCK):
            os.write(descriptor, view[start % len(view) :][:BLOCK])
        os.fsync(descriptor)
        os.close(descriptor)

    def read(flags: int) -> None:
        """Two readers, as the disk is faster with two."""

        def half(first: int) -> None:
            block = mmap.mmap(-1, BLOCK)
            for start in range(first, size, 2 * BLOCK):
                os.preadv(descriptor, [block], start)

        descriptor = os.open(path, os.O_RDONLY | flags)
        threads = [threading.Thread(target=half, args=(k * BLOCK,)) for k in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        os.close(descriptor)

    for name, work, flags in (
        ("write", write, 0), ("read_cached", read, 0), ("write_direct", write, os.O_DIRECT), ("read", read, os.O_DIRECT)
    ):  # fmt: skip
        start = time.perf_counter()
        work(flags)
        rates[name] = size / (time.perf_counter() - start) / 1e9
    path.unlink()
    return rates


def place(source: Path, cached: bool) -> None:
    """Have all files below ``source`` in the page cache, or nothing of them."""
    for path in (p for p in source.rglob("*") if p.is_file()):
        with open(path, "rb", buffering=0) as file:
            if cached:
                block = bytearray(BLOCK)
                while file.readinto(block):
                    pass
            else:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def same_weights(hf: Path, exported: Path) -> bool:
    """Whether both folders hold the same tensors, bit for bit."""
    from megatron_hammer.huggingface.weights import HfWeights

    with HfWeights(hf) as a, HfWeights(exported) as b:
        return set(a.where) == set(b.where) and all(a.hash_of(name) == b.hash_of(name) for name in a.where)


# ---------------------------------------------------------------------------------------------------------------------
# C8: start of the tools
# ---------------------------------------------------------------------------------------------------------------------

START = """
import os, runpy, sys
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print("\\nHEAVY", *sorted({"torch", "transformers", "numpy"} & set(sys.modules)))
"""


def measure_starts(folder: Path, rounds: int) -> dict[str, tuple[float, str]]:
    """Median seconds of each command, and which heavy packages it imported."""
    import sentencepiece

    text = folder / "text.jsonl"
    words = [f"word{i % 97} and {i * 7919 % 1009}" for i in range(400)]
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in words))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_prefix=str(folder / "tokenizer"), vocab_size=200, model_type="bpe",
        byte_fallback=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    tokenizer, data = folder / "tokenizer.model", folder / "data_text_document"
    prepared = ["--tokenizer-model", tokenizer, "--output-prefix", folder / "data"]
    commands: list[list[Any]] = [[p.name, "--help"] for p in sorted((ROOT / "tools").glob("*.py"))]
    commands += [
        ["preprocess_data.py", "--input", text, *prepared, "--restart"],
        ["inspect_dataset.py", "stats", data],
        ["inspect_dataset.py", "verify", data],
        ["count_tokens.py", f"x={data}"],
        ["count_tokens.py", f"x={text}", "--tokenizer", tokenizer],
        ["build_index.py", "--prefix", data, "--seq-length", 8, "--seed", 1, "--samples", 20,
         "--index-folder", folder / "index"],
        ["shuffle_corpus.py", text, "--output", folder / "shuffled.jsonl", "--seed", 1],
        ["merge_datasets.py", data, data, "--output", folder / "merged"],
    ]  # fmt: skip
    found = {}
    for command in commands:
        words = [str(part) for part in command]
        seconds = []
        for _ in range(rounds):
            for made in (*folder.glob("shuffled*"), *folder.glob("merged*")):
                made.unlink()
            start = time.perf_counter()
            told = subprocess.run(
                [sys.executable, "-c", START, ROOT / "tools" / words[0], *words[1:]],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            seconds.append(time.perf_counter() - start)
        shown = " ".join([words[0], *(w for w in words[1:2] if w != "--help" and "/" not in w and w[:1] != "-")])
        shown = shown if words[1] != "--help" else f"{words[0]} --help"
        key = shown if shown not in found else f"{shown} (text)"
        found[key] = statistics.median(seconds), told.stdout.rpartition("HEAVY")[2].strip() or "none"
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The whole
# ---------------------------------------------------------------------------------------------------------------------


def least_seconds(task: str, cached: bool, size: dict[str, int], disk: dict[str, float]) -> float:
    """What the disk needs for the bytes that have to pass through it."""
    written = size["state_out"] if task == "state" else size["out"]
    read = 0 if cached else size["state_in"] if task == "state" else size["out"]
    if task == "import":
        read += written  # it is read back
    return written / max(disk["write"], disk["write_direct"]) / 1e9 + read / disk["read"] / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--proof", action="store_true", help="also one export with its proof: a minute or two")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where there is room")
    parser.add_argument("--small", action="store_true", help="a toy model, to see that all of it runs")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # a task, its folder, its output: in a child
    args = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}  # of the children, too
    if args.one:
        task, folder, output = args.one[0], Path(args.one[1]), Path(args.one[2])
        print(json.dumps(make(folder, args.small) if task == "make" else measure(task, folder, output)))
        return
    with tempfile.TemporaryDirectory(prefix="conversion-", dir=args.folder) as scratch:
        print(report(Path(scratch), args.rounds, args.proof, args.small))


def report(folder: Path, rounds: int, proof: bool, small: bool) -> str:
    """Measure and tell, in Markdown."""

    def one(task: str) -> dict[str, Any]:
        """In a process of its own, whose memory is that of the task; a toy has none to speak of."""
        return measure(task, folder, output) if small else run("conversion.py", "--one", task, str(folder), str(output))

    facts = make(folder, small) if small else run("conversion.py", "--one", "make", str(folder), str(folder))
    size = {"out": 2 * facts["parameters"]}
    few = model_of(small, STATE_LAYERS)
    from megatron_hammer.model.parameters import logical_shapes

    size["state_out"] = 2 * sum(map(math.prod, logical_shapes(few).values()))
    size["state_in"] = 2 * size["state_out"]  # the fp32 weights; moments are passed over
    tasks = ["import", "peer-import", "export", "peer-export", "state"]
    runs: dict[tuple[str, bool], list[dict[str, Any]]] = {(t, c): [] for c in (True, False) for t in tasks}
    disks, output, equal = [], folder / "out", []
    for number in range(rounds):
        for cached in (True, False):
            disks.append(measure_disk(-(-size["out"] // BLOCK) * BLOCK, folder))
            for task in tasks if number % 2 == 0 else reversed(tasks):
                os.sync()
                place(folder / SOURCES[task], cached)
                result = one(task)
                result["share"] = least_seconds(task, cached, size, disks[-1]) / result["seconds"]
                runs[task, cached].append(result)
                if task.endswith("export") and number == 0 and cached:
                    equal.append(same_weights(folder / "hf", output))
                shutil.rmtree(output)
    proved = None
    if proof:
        place(folder / "tp2", True)
        proved = one("export-proof")
        shutil.rmtree(output)
    starts = measure_starts(folder, min(rounds, 3))
    return tell(facts["parameters"], size, disks, runs, all(equal), proved, starts)


def tell(
    parameters: int,
    size: dict[str, int],
    disks: list[dict[str, float]],
    runs: dict[tuple[str, bool], list[dict[str, Any]]],
    equal: bool,
    proved: dict[str, Any] | None,
    starts: dict[str, tuple[float, str]],
) -> str:
    """The tables."""
    import torch
    import transformers

    def median(task: str, cached: bool, figure: str) -> float:
        return statistics.median(r[figure] for r in runs[task, cached])

    def rate(name: str) -> str:
        values = sorted(d[name] for d in disks)
        return f"{statistics.median(values):.2f} ({values[0]:.2f} to {values[-1]:.2f})"

    plain = statistics.median(d["write"] for d in disks)
    lines = [
        f"{parameters:,} parameters, {size['out'] / 1e9:.2f} GB in bf16; {os.cpu_count()} cores, "
        f"{platform.release()}; Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}; medians of {len(disks) // 2} rounds",
        "",
        "| this disk, GB/s | median (least to most) |",
        "|---|---|",
        f"| write + fsync through the page cache | {rate('write')} |",
        f"| write + fsync past it | {rate('write_direct')} |",
        f"| read past it | {rate('read')} |",
        f"| read from the page cache | {rate('read_cached')} |",
        "",
        "| conversion | source in | seconds (least to most) | CPU s | share of the disk | bytes written a second, of "
        "plain write + fsync | peak MB (anonymous) | peer s | + sync | times the peer, + sync | peer's peak MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    names = {
        "import": "Hugging Face -> checkpoint, read back",
        "export": "checkpoint of TP 2 -> Hugging Face",
        "state": f"the same, whole state of {size['state_in'] * 3 / 1e9:.1f} GB, {size['state_out'] / 1e9:.2f} GB out",
    }
    for task, name in names.items():
        for cached in (True, False):
            seconds = [r["seconds"] for r in runs[task, cached]]
            taken = statistics.median(seconds)
            written = size["state_out"] if task == "state" else size["out"]
            cells = [
                name,
                "page cache" if cached else "disk",
                f"{taken:.2f} ({min(seconds):.2f} to {max(seconds):.2f})",
                f"{median(task, cached, 'cpu'):.1f}",
                f"{median(task, cached, 'share'):.0%}",
                f"{written / taken / 1e9 / plain:.0%}",
                f"{median(task, cached, 'peak_mb'):.0f} ({median(task, cached, 'anonymous_mb'):.0f})",
            ]
            if task == "state":
                cells += ["", "", "", ""]
            else:
                peer = f"peer-{task}"
                theirs, sync = median(peer, cached, "seconds"), median(peer, cached, "sync")
                cells += [
                    f"{theirs:.2f}",
                    f"{theirs + sync:.2f}",
                    f"**{theirs / taken:.1f}**, {(theirs + sync) / taken:.1f}",
                    f"{median(peer, cached, 'peak_mb'):.0f} ({median(peer, cached, 'anonymous_mb'):.0f})",
                ]
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"All exported tensors bit-equal to the first folder, on both sides: {'yes' if equal else 'NO'}."]
    if proved is not None:
        lines += [f"With its proof the export took {proved['seconds']:.0f} s (the proof is a process of its own)."]
    lines += ["", "| command | seconds | imports of torch, transformers, numpy |", "|---|---|---|"]
    lines += [f"| {name} | {seconds:.2f} | {heavy} |" for name, (seconds, heavy) in starts.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
