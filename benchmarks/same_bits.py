"""Digests of what small runs compute, bit by bit, to show that a change of the code has not changed the numbers.

    cd TREE && python .../benchmarks/same_bits.py [--cases SUBSTRING ...] [--out FILE] [--against FILE]

Run it in the root of the tree to examine; the script itself may be that of another tree, since it only uses command
lines (training, launcher, tools) and ``examples/configs/tiny.yaml``. Before a change ``--out before.json``, after it
``--against before.json``: exit code 1 and one line for each difference, naming case, field and, for metrics, the step.

::

    corpus, written here -> train_tokenizer -> preprocess_data -> trainings -> checkpoint_to_hf -> hf_to_checkpoint
       cases:                  tokenizer          data               one each     export              import

Digested: datasets, tokenizer, and of each training of 8 steps every number in ``metrics.jsonl`` but those about time
(as the text that stands there), the checkpoints of steps 4 and 8 file by file, and their manifests. All commands run in
a temporary folder and name relative paths, so that not even paths differ: whole manifests are compared, the settings
(``config``) apart from the rest, because a new setting changes those and no number.

The digests hold for one machine and one build of torch. Both trees need the compiled extensions, or both none: other
kernels give other last bits. About one minute on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG = "examples/configs/tiny.yaml"
STEPS, MIDDLE = 8, 4
TIMING = {
    "tokens_per_second",
    "mfu",
    "mfu_causal",
    "tflops_causal",
    "memory_bytes",
    "seconds",
    "step_seconds",
}  # of metrics.jsonl
VOCABULARY = 512  # 256 of them bytes
LIMIT_SECONDS, COMPILE_LIMIT_SECONDS = 180, 60  # of one command; the compiled case is left out where it takes longer
SHOWN_DIFFERENCES = 2  # of each part of a case

SETTINGS = [
    "data.train={data/zh_text_document: 0.6, data/en_text_document: 0.4}",
    "data.valid={mixed: data/valid_text_document}",
    "tokenizer.path=tokenizer/tokenizer.model",
    f"train.num_steps={STEPS}",
    f"schedule.decay_steps={STEPS}",  # stated, so that a run that ends in the middle has the same learning rates
    "schedule.warmup_steps=2",
    f"train.eval_interval_steps={MIDDLE}",
    "train.eval_samples=8",
    f"checkpoint.save_interval_steps={MIDDLE}",
    "train.device=cpu",
    "log.tensorboard=false",
]

Digest = dict[str, Any]
"""Field -> text, or fields again."""


@dataclass(frozen=True)
class Training:
    """A case that trains."""

    name: str
    overrides: tuple[str, ...] = ()
    nproc: int = 1
    stop_at_middle: bool = False
    """End at the middle checkpoint, then go on in a new process; must equal the case ``fp32``."""
    may_be_slow: bool = False
    """Left out, and said so, where it takes longer than ``COMPILE_LIMIT_SECONDS``."""


BF16, FP16 = "train.precision=bf16", "train.precision=fp16"
TP2 = ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")
TORCH_KERNELS = tuple(f"kernels.{name}=torch" for name in ("norm", "rope", "swiglu", "adamw", "loss"))
OVERFLOWING = ("optimizer.initial_loss_scale=4194304", "optimizer.loss_scale_window=3")  # skips and doublings

TRAININGS = [  # the longest first, two run at a time
    Training("compile-layers", (BF16, "kernels.compile=layers"), may_be_slow=True),
    Training("resumed", stop_at_middle=True),
    Training("tp2-sp-fp32", TP2, nproc=2),
    Training("tp2-one-group", (*TP2, BF16, "model.num_query_groups=1"), nproc=2),
    Training("tp2-plain-documents", (TP2[0], BF16, "data.attention_mask=document"), nproc=2),
    Training("tp2-sp-recompute", (*TP2, BF16, "train.recompute=full", "train.recompute_layers=1"), nproc=2),
    Training("tp2-sp-chunks", (*TP2, BF16, "parallel.tp_comm_overlap=chunks"), nproc=2),
    Training("dp2-bf16", (BF16, "parallel.gradient_bucket_bytes=65536"), nproc=2),
    Training("fp32"),
    Training("bf16", (BF16,)),
    Training("fp16", (FP16, *OVERFLOWING)),
    Training("documents-zloss", (BF16, "data.attention_mask=document", "train.z_loss=1.0e-3")),
    Training("tied", (BF16, "model.tie_word_embeddings=true")),
    Training("recompute-selective", (BF16, "train.recompute=selective")),
    Training("recompute-full", (BF16, "train.recompute=full")),
    Training("torch-kernels", (BF16, *TORCH_KERNELS, "kernels.attention=sdpa")),
    Training(
        "torch-kernels-documents",
        (*TORCH_KERNELS, "kernels.attention=sdpa-documents", "data.attention_mask=document", "train.z_loss=1.0e-3"),
    ),
    Training("order-megatron", ("data.order=megatron",)),
]
CASES = ["tokenizer", "data", *(t.name for t in TRAININGS), "export", "import"]


class CommandFailed(Exception):
    """A command ended with an error, or took longer than allowed; the text says which."""


class TooSlow(CommandFailed):
    """It took longer than allowed."""


# ---------------------------------------------------------------------------------------------------------------------
# Commands of the tree
# ---------------------------------------------------------------------------------------------------------------------


class Tree:
    """The tree to examine, and the temporary folder in which its commands run."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder = root, folder
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("HAMMER_")} | {
            "PYTHONPATH": str(root),
            "OMP_NUM_THREADS": "1",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no pool of processes that outlives a run
        }

    def python(self, *arguments: str, limit_seconds: float = LIMIT_SECONDS) -> str:
        """Run the interpreter with these arguments to its end; its output.

        Raises:
            CommandFailed: it failed, or took longer than ``limit_seconds``.
        """
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that a whole family can be ended
        )
        try:
            output, _ = process.communicate(timeout=limit_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise TooSlow(f"took more than {limit_seconds:g} s: {' '.join(arguments)}") from None
        if process.returncode:
            raise CommandFailed(f"exit code {process.returncode}: {' '.join(arguments)}\n{output[-2000:]}")
        return output

    def tool(self, name: str, *arguments: str) -> None:
        """Run a program of ``tools/``."""
        self.python(str(self.root / "tools" / name), *arguments)

    def train(self, nproc: int, output: str, overrides: Sequence[str], limit_seconds: float) -> None:
        """Train in one process, or with the launcher in several."""
        start = (
            ["-m", "megatron_hammer.launch", "--nproc", str(nproc)] if nproc > 1 else ["-m", "megatron_hammer.train"]
        )
        settings = [*SETTINGS, f"train.output={output}", *overrides]
        self.python(*start, str(self.root / CONFIG), *settings, limit_seconds=limit_seconds)

    def check(self) -> None:
        """End the program unless the commands will run this tree's code; warn where it is not compiled."""
        if not (self.root / CONFIG).is_file():
            raise SystemExit(f"{self.root} has no {CONFIG}: run this in the root of a tree")
        imported = self.python("-c", "import megatron_hammer; print(megatron_hammer.__file__)").strip()
        if not Path(imported).is_relative_to(self.root):
            raise SystemExit(f"megatron_hammer is imported from {imported}, not from {self.root}")
        for extension in ("_cpu", "_index", "_encoder"):
            if not any((self.root / "megatron_hammer").rglob(f"{extension}*.so")):
                print(f"note: {extension} is not compiled in {self.root}; compare with such trees only", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The corpus
# ---------------------------------------------------------------------------------------------------------------------

CHINESE = "我们 今天 学习 模型 训练 数据 中文 语言 很好 大家 一起 看见 山水 城市 时间 问题 方法 结果 开始 工作"
ENGLISH = "the model reads a line of text and learns which word comes next while every small step lowers its loss"
NAMES = "total index value row item count left right"


def chinese_line(draw: random.Random) -> str:
    """A sentence or two of common words."""
    return "".join(
        "".join(draw.choices(CHINESE.split(), k=draw.randint(3, 9))) + "。" for _ in range(draw.randint(1, 2))
    )


def english_line(draw: random.Random) -> str:
    """Some words and a full stop."""
    return " ".join(draw.choices(ENGLISH.split(), k=draw.randint(4, 14))) + "."


def code_line(draw: random.Random) -> str:
    """A line of a loop, indented."""
    a, b, c = draw.choices(NAMES.split(), k=3)
    return f"    for {a} in range({draw.randint(2, 999)}):\n        {b}[{a}] += {c} * {draw.randint(0, 99)}  # {a}"


def write_corpus(folder: Path) -> None:
    """``zh.jsonl``, ``en.jsonl`` (with code) and ``valid.jsonl``; documents of 5 to 200 tokens."""
    kinds = {"zh": (chinese_line,), "en": (english_line, code_line), "valid": (chinese_line, english_line, code_line)}
    for name, lines in kinds.items():
        draw = random.Random(f"same bits {name}")
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for _ in range(60 if name == "valid" else 240):
                text = "\n".join(draw.choice(lines)(draw) for _ in range(draw.randint(1, 6)))
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Digests
# ---------------------------------------------------------------------------------------------------------------------


def digest_of(content: bytes) -> str:
    """A hash short enough to read."""
    return hashlib.sha256(content).hexdigest()[:24]


def files_digest(folder: Path, *patterns: str) -> Digest:
    """The bytes of the files, by name; at least one must fit each pattern."""
    found: Digest = {}
    for pattern in patterns:
        paths = sorted(folder.glob(pattern))
        if not paths:
            raise CommandFailed(f"no {pattern} was written")
        found |= {str(path.relative_to(folder)): digest_of(path.read_bytes()) for path in paths}
    return found


def metrics_digest(path: Path) -> Digest:
    """``step N`` -> every field but those about time, numbers as the text in the file."""
    steps: Digest = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text, parse_float=str, parse_int=str)
        steps[f"step {line['step']}"] = {k: v for k, v in line.items() if k not in TIMING}
    return steps


def manifest_digest(path: Path) -> Digest:
    """A checkpoint's manifest by its fields; the settings apart, without the run's folder, which differs by case, and
    what the state says of the next step, which a run that ends there does not have."""
    tree = json.loads(path.read_bytes())
    tree.pop("digest", None)  # of the whole text
    tree["config"].get("train", {}).pop("output", None)
    if (following := tree.get("state", {}).pop("next", None)) is not None:
        tree["next step"] = following
    return {name: digest_of(json.dumps(value, sort_keys=True).encode()) for name, value in sorted(tree.items())}


def checkpoint_digest(folder: Path) -> Digest:
    """A checkpoint's tensors and tokenizer as bytes, its manifest by fields."""
    return files_digest(folder, "rank-*.safetensors") | {"manifest": manifest_digest(folder / "manifest.json")}


def run_digest(folder: Path) -> Digest:
    """All that a training leaves."""
    checkpoints = sorted((folder / "checkpoints").glob("step-*"))
    metrics = metrics_digest(folder / "metrics.jsonl")
    if len(metrics) != STEPS or len(checkpoints) != 2:
        raise CommandFailed(f"{len(metrics)} steps and {len(checkpoints)} checkpoints, not {STEPS} and 2")
    return {"metrics": metrics, "checkpoints": {path.name: checkpoint_digest(path) for path in checkpoints}}


def leaves(tree: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """(path of fields, value) of a digest, in its order."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from leaves(value, f"{where} / {name}" if where else name)
    else:
        yield where, str(tree)


def differences(before: Digest, after: Digest) -> list[str]:
    """A line for each value that differs or is on one side only, in the order of the digest: first steps first."""
    old, new = dict(leaves(before)), dict(leaves(after))
    return [
        f"{name}: {old.get(name, 'absent')} -> {new.get(name, 'absent')}"
        for name in old | new
        if old.get(name) != new.get(name)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Cases
# ---------------------------------------------------------------------------------------------------------------------


def make_data(tree: Tree) -> dict[str, Digest]:
    """Tokenizer and datasets, which all other cases need."""
    write_corpus(tree.folder)
    tree.tool(
        "train_tokenizer.py", "--input", "zh.jsonl", "en.jsonl", "--output", "tokenizer",
        "--vocab-size", str(VOCABULARY),
    )  # fmt: skip
    for name in ("zh", "en", "valid"):
        tree.tool(
            "preprocess_data.py", "--input", f"{name}.jsonl", "--tokenizer-model", "tokenizer/tokenizer.model",
            "--output-prefix", f"data/{name}", "--append-eod", "--prepend-bos", "--workers", "2",
        )  # fmt: skip
    return {
        "tokenizer": files_digest(tree.folder / "tokenizer", "*.model", "*.json"),
        "data": files_digest(tree.folder / "data", "*.bin", "*.idx", "*.meta.json"),
    }


def train_case(tree: Tree, case: Training) -> Digest:
    """Train, in two processes one after the other where the case says so."""
    output, limit = f"runs/{case.name}", COMPILE_LIMIT_SECONDS if case.may_be_slow else LIMIT_SECONDS
    if case.stop_at_middle:
        tree.train(case.nproc, output, [*case.overrides, f"train.num_steps={MIDDLE}"], limit)
    tree.train(case.nproc, output, case.overrides, limit)
    return run_digest(tree.folder / output)


def export_cases(tree: Tree) -> dict[str, Digest]:
    """The last checkpoint of two ranks as a Hugging Face folder, and that folder as a checkpoint."""
    tree.tool("checkpoint_to_hf.py", "--load", "runs/tp2-sp-fp32", "--output", "hf")
    tree.tool("hf_to_checkpoint.py", "--hf", "hf", "--save", "imported")
    return {
        "export": files_digest(tree.folder / "hf", "*.safetensors", "config.json", "generation_config.json"),
        "import": checkpoint_digest(tree.folder / "imported/checkpoints/step-00000000"),
    }


def guarded(work: Any, *arguments: Any, may_be_slow: bool = False) -> Digest:
    """What ``work`` returns, or the reason why there is nothing."""
    try:
        return work(*arguments)  # type: ignore[no-any-return]
    except TooSlow as error:
        return {"skipped" if may_be_slow else "failed": str(error)}
    except (CommandFailed, OSError, KeyError, ValueError) as error:
        return {"failed": f"{type(error).__name__}: {error}"}


def run_cases(tree: Tree, wanted: set[str], jobs: int) -> dict[str, Digest]:
    """Every case that is wanted, and what those need; a line is printed for each."""
    results: dict[str, Digest] = {}

    def done(name: str, digest: Digest, start: float) -> None:
        if name in wanted:
            results[name] = digest
            print(f"{name:24} {summary(digest)}  ({time.monotonic() - start:.0f} s)", flush=True)

    def trained(case: Training) -> None:
        start = time.monotonic()
        done(case.name, guarded(train_case, tree, case, may_be_slow=case.may_be_slow), start)

    start = time.monotonic()
    made = guarded(make_data, tree)
    if "failed" in made:
        raise SystemExit(f"the data could not be made: {made['failed']}")
    for name, digest in made.items():
        done(name, digest, start)
    exports = bool(wanted & {"export", "import"})
    needed = wanted | ({"tp2-sp-fp32"} if exports else set())
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(trained, (case for case in TRAININGS if case.name in needed)))
    if exports:
        start = time.monotonic()
        made = guarded(export_cases, tree)
        for name in ("export", "import"):
            done(name, made if "failed" in made else made[name], start)
    return {name: results[name] for name in CASES if name in results}


def summary(digest: Digest) -> str:
    """One line: the digest of everything, of a training also those of its parts and the last loss."""
    for reason in ("failed", "skipped"):
        if reason in digest:
            return f"{reason}: {digest[reason]}"
    whole = digest_of(json.dumps(digest, sort_keys=True).encode())
    if "metrics" not in digest:
        return whole
    parts = {name: digest_of(json.dumps(digest[name], sort_keys=True).encode())[:12] for name in sorted(digest)}
    skipped = sum(bool(line["skipped"]) for line in digest["metrics"].values())
    told = f"loss {digest['metrics'][f'step {STEPS}']['loss']}" + (f", {skipped} steps skipped" if skipped else "")
    return f"{whole}  {'  '.join(f'{k} {v}' for k, v in parts.items())}  {told}"


def compare(name: str, before: Digest, after: Digest) -> bool:
    """Print where two digests of a case differ; whether they are equal. A case left out for its time is only noted."""
    for side, digest in (("before", before), ("now", after)):
        if "skipped" in digest:
            print(f"NOT COMPARED {name}: {side} {digest['skipped']}")
            return True
    found = differences(before, after)
    parts: dict[str, list[str]] = {}
    for line in found:
        parts.setdefault(line.split(" / ")[0].split(":")[0], []).append(line)
    for part, lines in parts.items():
        for line in lines[:SHOWN_DIFFERENCES]:
            print(f"DIFFERS {name}: {line}")
        if len(lines) > SHOWN_DIFFERENCES:
            print(f"DIFFERS {name}: and {len(lines) - SHOWN_DIFFERENCES} more values of {part}")
    return not found


def main() -> int:
    """Run the cases, compare, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", metavar="SUBSTRING", help=f"of: {' '.join(CASES)}")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the digests as JSON")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with what --out wrote elsewhere")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at the same time (default: %(default)s)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work in this new folder and leave it there")
    arguments = parser.parse_args()
    wanted = {name for name in CASES if not arguments.cases or any(part in name for part in arguments.cases)}
    if "resumed" in wanted:
        wanted.add("fp32")  # with which it is compared
    if not wanted:
        parser.error(f"no case has any of {arguments.cases} in its name")
    before: dict[str, Digest] | None = json.loads(arguments.against.read_text()) if arguments.against else None
    if arguments.keep:
        arguments.keep.mkdir(parents=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="same_bits.") as temporary:
        tree = Tree(Path.cwd(), (arguments.keep or Path(temporary)).resolve())
        tree.check()
        results = run_cases(tree, wanted, arguments.jobs)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")

    bad = {name for name, digest in results.items() if "failed" in digest}
    if "resumed" in results and not compare(
        "resumed (from uninterrupted)", run_end(results["fp32"]), run_end(results["resumed"])
    ):
        bad.add("resumed")
    for name, digest in results.items():
        if before is None:
            continue
        if name not in before:
            print(f"NOT COMPARED {name}: not in {arguments.against}")
        elif not compare(name, before[name], digest):
            bad.add(name)
    good = "ran" if before is None else "equal where compared"
    verdict = f"failed or different: {', '.join(n for n in results if n in bad)}" if bad else good
    print(f"{len(results)} cases, {time.monotonic() - start:.0f} s; {verdict}")
    return 1 if bad else 0


def run_end(digest: Digest) -> Digest:
    """What a resumed run shares with an uninterrupted one: of the middle manifest all but the settings (``num_steps``)
    and the next step, which the first half did not have."""
    if "checkpoints" not in digest:
        return digest
    first, *others = digest["checkpoints"].items()
    name, middle = first
    manifest = {k: v for k, v in middle["manifest"].items() if k not in ("config", "next step")}
    return digest | {"checkpoints": {name: middle | {"manifest": manifest}, **dict(others)}}


if __name__ == "__main__":
    sys.exit(main())
