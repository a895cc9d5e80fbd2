"""What a reader must open to follow one thing through the package, counted by tracing real runs.

    cd WORKTREE && PYTHONPATH=. python benchmarks/walks.py [layer] [sample] [checkpoint] [jsonl] [--list] [--json]

It measures the tree that it is started in and holds to what moves seldom (command lines, ``tests/model/tiny.py``, two
names in the training loop), so one copy of this file, named by its path, can count several trees. Compiled modules must
lie in the tree: what stands in for them is other code. It takes half a minute of CPU time; each walk is a process of
its own.

layer
    One decoder layer, the last of two, forward and backward on rank 0 of two, with sequence parallelism, fp32, and the
    fused CPU kernels. The gradient hooks of the optimizer run during backward, and count.
sample
    The first step of ``python -m megatron_hammer.train``, from the loop's call of ``next_batches`` to the return of
    ``forward_backward``: reading, forward, loss and backward, one rank, the fused CPU kernels.
checkpoint
    ``tools/checkpoint_to_hf.py`` on a checkpoint of three steps. The tokenizer and the proof have a process of their
    own, and do not count.
jsonl
    ``tools/preprocess_data.py`` on 200 short documents with a sentencepiece model, one worker.

Counted are the functions and methods of the package that the run enters, in all its threads. A function inside another
belongs to the outer one; lambdas and comprehensions do so too. Not counted are module and class bodies, what they call
while a module is imported, generated methods (of dataclasses), and ``cli.py`` and ``signals.py``, which every program
has at its edge.

files
    that hold these functions.
lines
    of these functions, from the def (decorators stand above it) to the end, docstrings included.
returns
    Go through the functions in the order of their first call: how often the next one is in another file than the one
    before, and that file has been open already. So each function is turned to once. The main thread is read to its end,
    then the other threads in the order in which they were started; else the count would depend on who was faster.

Before modules were moved (commit 7ac276c):

    walk          files    lines  returns
    layer            11      404       30
    sample           24      933       42
    checkpoint       17    1,613       51
    jsonl            10    1,105       37
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path.cwd()
PACKAGE = ROOT / "megatron_hammer"
COMPILED = ("_cpu", "_encoder", "_index")
EDGE = ("cli.py", "signals.py")  # files, in whatever folder, that are not counted; the second was part of the first
CONFIG = ROOT / "examples" / "configs" / "tiny.yaml"


def not_compiled() -> list[str]:
    """The modules without which a walk would go another way, of those that are not built here."""
    return [name for name in COMPILED if not any(PACKAGE.rglob(f"{name}.*.so"))]


# ---- counting ----


@dataclass(frozen=True)
class Function:
    """A function or method of the package that lies in no other one."""

    file: str
    """Its path below the package."""
    name: str
    """With its class, if it is a method."""
    first_line: int
    """That of the def."""
    lines: int


@cache
def functions_in(file: str) -> dict[tuple[str, int], Function]:
    """Every def of a file, by name and first line as code objects have them -> the outermost function around it."""
    found: dict[tuple[str, int], Function] = {}

    def visit(node: ast.AST, classes: tuple[str, ...], outer: Function | None) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                assert child.end_lineno is not None
                name, lines = ".".join((*classes, child.name)), child.end_lineno - child.lineno + 1
                function = outer or Function(str(Path(file).relative_to(PACKAGE)), name, child.lineno, lines)
                # A code object begins at the first decorator.
                first_line = min([child.lineno, *(decorator.lineno for decorator in child.decorator_list)])
                found[child.name, first_line] = function
                visit(child, classes, function)
            else:
                inner = (*classes, child.name) if isinstance(child, ast.ClassDef) else classes
                visit(child, inner, outer)

    visit(ast.parse(Path(file).read_text(encoding="utf-8")), (), None)
    return found


class Recorder:
    """Notes which functions of the package are entered, in this thread and those that start while it runs.

    Args:
        begin, end: names of functions. Recording begins with the first call of ``begin`` and is over when ``end``
            returns; None: as long as ``running``.
    """

    def __init__(self, begin: str | None = None, end: str | None = None) -> None:
        self._begin, self._end = begin, end
        self._on = False
        self._over = False
        self._entered: dict[int, dict[CodeType, None]] = {}
        """Thread, by its number in Linux, which grows with each new one -> code, in order of first calls."""
        self._package = str(PACKAGE) + os.sep

    @contextmanager
    def running(self) -> Iterator[None]:
        """Trace what the block does; more than one block adds up."""
        self._on = self._begin is None
        threading.setprofile(self._note)
        sys.setprofile(self._note)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]  # the way to end it
            self._on = False

    def _note(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if not code.co_filename.startswith(self._package):
            return
        if event == "call":
            self._on = self._on or (code.co_name == self._begin and not self._over)
            if self._on:
                entered = self._entered.setdefault(threading.get_native_id(), {})
                if code not in entered and not self._is_importing(frame):
                    entered[code] = None
        elif event == "return" and self._on and code.co_name == self._end:
            self._on, self._over = False, True

    def _is_importing(self, frame: FrameType | None) -> bool:
        """Whether a module of the package is being executed."""
        while frame is not None:
            if frame.f_code.co_name == "<module>" and frame.f_code.co_filename.startswith(self._package):
                return True
            frame = frame.f_back
        return False

    def functions(self) -> list[Function]:
        """Those entered, each once, thread by thread in order of their first calls.

        Raises:
            SystemExit: the functions where recording should begin and end were not called.
        """
        if self._end is not None and not self._over:
            raise SystemExit(f"no call of {self._begin} and return of {self._end}: have they been renamed?")
        codes = [code for thread in sorted(self._entered) for code in self._entered[thread]]
        found = (functions_in(code.co_filename).get((code.co_name, code.co_firstlineno)) for code in codes)
        counted = (function for function in found if function is not None and Path(function.file).name not in EDGE)
        return list(dict.fromkeys(counted))


def count_returns(files: Iterable[str]) -> int:
    """How often the next file is another than the one before, and not new."""
    returns, before, opened = 0, "", set[str]()
    for file in files:
        returns += file != before and file in opened
        opened.add(file)
        before = file
    return returns


# ---- the walks: each takes an empty folder ----


def walk_layer(folder: Path) -> list[Function]:
    """One layer, forward and backward, in two ranks."""
    from tests.distributed import run_distributed

    functions: list[Function] = run_distributed(2, trace_layer)[0]
    return functions


def trace_layer(rank: int) -> list[Function]:
    """On one rank: give the last layer what the model gives it, and trace only that."""
    import torch

    from tests.model.tiny import build, make_context, rank_batches, tiny_config

    config = tiny_config(parallel__tensor_model_parallel_size=2, parallel__sequence_parallel=True)
    ctx = make_context(config)
    model, optimizer = build(config, ctx)
    layer, given = [*model.layers.children()][-1], list[Any]()
    hook = layer.register_forward_pre_hook(lambda module, arguments: given.extend(arguments))
    batch = rank_batches(config, 1, ctx)[0]
    with torch.no_grad():
        model(*(batch[:2] if isinstance(batch, tuple) else (batch.tokens, batch.labels)))
    hook.remove()
    arguments = [x.detach().requires_grad_() if isinstance(x, torch.Tensor) else x for x in given]
    begin = optimizer.store.begin if hasattr(optimizer, "store") else optimizer.start_micro_batch  # of older trees
    begin(first=True, last=True)
    recorder = Recorder()
    with recorder.running():
        outputs = layer(*arguments)
    loss = sum(output.sum() for output in outputs)
    with recorder.running():  # backward of CPU tensors runs in the thread that asks for it
        loss.backward()
    return recorder.functions()


def walk_sample(folder: Path) -> list[Function]:
    """From a dataset to the gradients of the first step."""
    arguments = prepare_run(folder)
    from megatron_hammer.train.__main__ import main

    recorder = Recorder(begin="next_batches", end="forward_backward")
    with recorder.running():
        call(main, arguments)
    return recorder.functions()


def walk_checkpoint(folder: Path) -> list[Function]:
    """From a checkpoint to a Hugging Face folder."""
    run_python("-m", "megatron_hammer.train", *prepare_run(folder))
    return trace_tool("checkpoint_to_hf.py", ["--load", f"{folder}/run", "--output", f"{folder}/hf"])


def walk_jsonl(folder: Path) -> list[Function]:
    """From JSON lines to an indexed dataset."""
    return trace_tool("preprocess_data.py", prepare_text(folder))


WALKS = {"layer": walk_layer, "sample": walk_sample, "checkpoint": walk_checkpoint, "jsonl": walk_jsonl}


# ---- what the walks need ----


def prepare_text(folder: Path) -> list[str]:
    """Write documents and a sentencepiece model; return the arguments of preprocess_data.py for them."""
    import sentencepiece

    words = [a + b + c for a in "bdfgklmn" for b in "aeiou" for c in "rstvz"]
    documents = [" ".join(words[i * k % len(words)] for k in range(5, 45)) for i in range(1, 201)]
    (folder / "text.txt").write_text("\n".join(documents) + "\n", encoding="utf-8")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(  # as tools/train_tokenizer.py would, in less time
        input=f"{folder}/text.txt", model_prefix=f"{folder}/tokenizer", vocab_size=400, model_type="bpe",
        byte_fallback=True, add_dummy_prefix=False, remove_extra_whitespaces=False, split_digits=True,
        normalization_rule_name="identity", allow_whitespace_only_pieces=True, minloglevel=2,
    )  # fmt: skip
    return [
        "--input", f"{folder}/text.jsonl", "--tokenizer-model", f"{folder}/tokenizer.model",
        "--output-prefix", f"{folder}/data", "--append-eod", "--workers", "1",
    ]  # fmt: skip


def prepare_run(folder: Path) -> list[str]:
    """Make a dataset; return the arguments of a run of three steps on it, which writes to ``run`` in the folder."""
    run_python("tools/preprocess_data.py", *prepare_text(folder))
    return [
        str(CONFIG), f"data.train={folder}/data_text_document", f"tokenizer.path={folder}/tokenizer.model",
        f"train.output={folder}/run", "train.device=cpu", "train.num_steps=3", "train.global_batch_size=4",
        "data.seq_length=32", "schedule.warmup_steps=1", "log.tensorboard=false",
    ]  # fmt: skip


def run_python(*arguments: str) -> None:
    """Run a program of this tree, untraced; what it says is shown only if it fails."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}\n{done.stdout}{done.stderr}")


def trace_tool(name: str, arguments: list[str]) -> list[Function]:
    """Trace ``main`` of a program in tools/."""
    sys.path.insert(0, str(ROOT / "tools"))  # as where it is started by its name
    main, recorder = runpy.run_path(str(ROOT / "tools" / name))["main"], Recorder()
    with recorder.running():
        call(main, arguments)
    return recorder.functions()


def call(main: Callable[[], int | None], arguments: list[str]) -> None:
    """Call a program's ``main`` with a command line."""
    sys.argv = ["walks.py", *arguments]
    if code := main():
        raise SystemExit(f"the traced program ended with {code}")


# ---- the command line ----


def walk_in_child(name: str) -> list[Function]:
    """Take one walk in a process of its own, so that nothing is cached or imported by the one before."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory(prefix="walks-") as folder:
        command = [sys.executable, __file__, name, "--here", folder]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"the walk {name} failed\n{done.stdout}{done.stderr}")
        return [Function(**fields) for fields in json.loads(Path(folder, "functions.json").read_text())]


def walk_here(name: str, folder: Path) -> None:
    """The child's side: leave what was entered in functions.json."""
    import megatron_hammer

    assert megatron_hammer.__file__ is not None and Path(megatron_hammer.__file__).parent == PACKAGE
    (folder / "work").mkdir()
    functions = WALKS[name](folder / "work")
    (folder / "functions.json").write_text(json.dumps([asdict(function) for function in functions]))


def main() -> None:
    """Print the table, or what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("walks", nargs="*", metavar="WALK", help=f"of {', '.join(WALKS)} (default: all)")
    parser.add_argument("--list", action="store_true", help="also print the functions in order: file, name, lines")
    parser.add_argument("--json", action="store_true", help="print one JSON object with numbers and functions instead")
    parser.add_argument("--here", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.walks) - set(WALKS):
        parser.error(f"no such walk: {', '.join(sorted(unknown))}")
    if not PACKAGE.is_dir():
        parser.error(f"{ROOT} is not the root of the repository")
    if missing := not_compiled():
        parser.error(f"not compiled in this tree: {', '.join(missing)}; see setup.py")
    if options.here is not None:
        walk_here(options.walks[0], options.here)
        return
    results: dict[str, dict[str, Any]] = {}
    for name in options.walks or WALKS:
        functions = walk_in_child(name)
        files = [function.file for function in functions]
        results[name] = {
            "files": len(set(files)),
            "lines": sum(function.lines for function in functions),
            "returns": count_returns(files),
            "functions": [asdict(function) for function in functions],
        }
        if options.list and not options.json:
            print(f"{name}:", *(f"  {f.file:34} {f.name:44} {f.lines:4}" for f in functions), "", sep="\n")
    if options.json:
        print(json.dumps(results, indent=1))
        return
    print(f"{'walk':12} {'files':>6} {'lines':>8} {'returns':>8}")
    for name, result in results.items():
        print(f"{name:12} {result['files']:6} {result['lines']:8,} {result['returns']:8}")


if __name__ == "__main__":
    main()
