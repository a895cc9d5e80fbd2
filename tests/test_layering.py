"""Imports point down only, optional libraries stay out of module tops, and a layer stays short to read."""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.walks import count_returns, not_compiled, trace_layer, walk_in_child
from megatron_hammer.kernels.native import cpu

PACKAGE = Path(__file__).parent.parent / "megatron_hammer"
ROWS = [  # what stands above may import what stands below
    {"__main__", "api", "command", "launch", "verify"},
    {"profile", "supervise", "evaluation", "publish", "report"},
    {"train", "megatron"},
    {"metrics"},
    {"huggingface", "costs"},
    {"checkpoint"},
    {"sampling", "model", "optim"},
    {"dataset", "kernels"},
    {"corpus", "tokenizer"},
    {"config"},
    {"parallel"},
    {"base"},
]
LEVEL = {part: len(ROWS) - i for i, row in enumerate(ROWS) for part in row}
OPTIONAL = {"transformer_engine", "flash_attn", "apex", "triton", "ray"}
ROOMS_WITHOUT_TORCH = {"base", "config", "corpus", "tokenizer", "dataset", "sampling"}
"""Where no module loads torch. In every other room a module that loads none says so in its docstring."""
NO_TORCH = re.compile(r"\b(no|neither)\s+torch\b")
HEAVY = {"torch", "transformers", "matplotlib"}


def _modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield ".".join(path.relative_to(PACKAGE).with_suffix("").parts), path


def _imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(imported module, whether at module top) of one file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        names = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else ([node.module or ""] if isinstance(node, ast.ImportFrom) else [])
        )
        for name in names:
            yield name, id(node) in top


@pytest.mark.parametrize("name, path", list(_modules()), ids=lambda x: x if isinstance(x, str) else "")
def test_imports_point_down(name: str, path: Path) -> None:
    part = name.split(".")[0]
    for imported, at_top in _imports(path):
        assert not (at_top and imported.split(".")[0] in OPTIONAL), f"{name} imports {imported} at its top"
        if not imported.startswith("megatron_hammer."):
            continue
        other = imported.split(".")[1]
        if part == other:
            continue
        if part != "__init__":
            assert LEVEL[other] < LEVEL[part], (
                f"{name} (row {part}) imports {imported}: the arrow points up or sideways"
            )


@pytest.mark.parametrize("name, path", list(_modules()), ids=lambda x: x if isinstance(x, str) else "")
def test_only_parallel_calls_torch_distributed(name: str, path: Path) -> None:
    """However it is written: imported at the top, in a function or for typing, or reached as ``torch.distributed``."""
    if name.split(".")[0] == "parallel":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        found = (isinstance(node, ast.Import) and any(a.name.startswith("torch.distributed") for a in node.names)) or (
            isinstance(node, ast.ImportFrom)
            and (
                (node.module or "").startswith("torch.distributed")
                or (node.module == "torch" and any(a.name == "distributed" for a in node.names))
            )
        )
        found |= isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed"
        assert not found, f"{name}: only parallel/ calls torch.distributed ({ast.unparse(node)})"


def _graph(top_only: bool) -> dict[str, set[str]]:
    """Module (without the package's name) -> what it imports: modules of ours, and the heavy libraries.

    Args:
        top_only: what is loaded with the module; else imports in functions and for typing count as well.
    """
    files = {name.removesuffix(".__init__"): path for name, path in _modules()}
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        tree, found = ast.parse(path.read_text(encoding="utf-8")), set[str]()
        for node in tree.body if top_only else ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                inner = {f"{base}.{alias.name}" for alias in node.names}
                known = {i for i in inner if i.removeprefix("megatron_hammer.") in files}
                found |= known if known == inner else known | {base}
        ours = {f.removeprefix("megatron_hammer.") for f in found if f.startswith("megatron_hammer.")}
        assert ours <= files.keys(), f"{name} imports {ours - files.keys()}"
        graph[name] = ours - {name} | {f.split(".")[0] for f in found} & HEAVY
    return graph


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    """Everything that ``start`` imports, over any number of steps."""
    seen: set[str] = set()
    left = [start]
    while left:
        new = graph.get(left.pop(), set()) - seen
        seen |= new
        left += new
    return seen


def test_no_circles_between_modules() -> None:
    """Imports inside functions and for typing count: what needs each other belongs together or to a third."""
    graph = _graph(top_only=False)
    reached = {name: _reached(graph, name) for name in graph}
    circles: list[set[str]] = []
    for name in sorted(graph):
        if name in reached[name] and not any(name in circle for circle in circles):
            circles.append({other for other in reached[name] & graph.keys() if name in reached[other]})
    assert not circles, f"these modules import each other: {[sorted(circle) for circle in circles]}"


def _says_no_torch(path: Path) -> bool:
    return NO_TORCH.search(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "") is not None


def test_a_room_says_what_each_of_its_modules_is_for() -> None:
    """The docstring of every package names all its modules, and none that is elsewhere without its folder."""
    for name, path in _modules():
        if path.name != "__init__.py" or path.parent == PACKAGE:
            continue
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        named = {found.removesuffix(".py") for found in re.findall(r"(?<![\w/])(\w+\.py)\b", text)}
        there = {module.stem for module in path.parent.glob("*.py")} - {"__init__", "__main__"}
        assert named == there, f"{name}: not named {sorted(there - named)}, not there {sorted(named - there)}"


def test_a_class_has_a_name_of_its_own() -> None:
    """One word, one thing: only the layers of the two layer modules share theirs, behind one interface."""
    places: dict[str, list[str]] = {}
    for name, path in _modules():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(name)
    shared = {name: found for name, found in places.items() if len(found) > 1}
    assert all(found == ["model.layers", "model.layers_te"] for found in shared.values()), shared


def test_modules_without_torch_are_known() -> None:
    """A module loads no torch, or no heavy library at all, exactly where its room or its docstring says so."""
    graph = _graph(top_only=True)
    for name, path in _modules():
        if path.name == "__init__.py":
            continue
        heavy = _reached(graph, name) & HEAVY
        if name.split(".")[0] in ROOMS_WITHOUT_TORCH:
            assert not heavy, f"{name} loads {heavy}; no module of this room does"
        elif heavy:
            assert not _says_no_torch(path), f"{name} loads {heavy}; its docstring says that it needs no torch"
        else:
            assert _says_no_torch(path), f"{name} loads no torch: say 'Needs no torch.' in its docstring and keep to it"


def test_light_modules_do_without_torch() -> None:
    """One child imports them all, so that --help of every program is quick, whatever other libraries import."""
    light = [
        name.removesuffix(".__init__")
        for name, path in _modules()
        if name.split(".")[0] in ROOMS_WITHOUT_TORCH or _says_no_torch(path)
    ]
    assert len(light) > 60, "the rule finds fewer modules than there were when it was written"
    code = "import sys\n" + "".join(f"import megatron_hammer.{m}\n" for m in light)
    code += f"heavy = {HEAVY!r} & set(sys.modules)\nassert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_everything_imports_without_optional_libraries() -> None:
    code = f"import sys, importlib\nfor m in {sorted(OPTIONAL)!r}: sys.modules[m] = None\n"
    code += "".join(f"importlib.import_module('megatron_hammer.{m}')\n" for m, _ in _modules() if not m.endswith("__"))
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def _functions_reached(run: Any) -> set[tuple[str, int]]:
    """(file, first line) of our functions that a call enters."""
    reached: set[tuple[str, int]] = set()

    def trace(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            reached.add((frame.f_code.co_filename, frame.f_code.co_firstlineno))

    sys.setprofile(trace)
    try:
        run()
    finally:
        sys.setprofile(None)
    return reached


def _length(file: str, first_line: int) -> int:
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            start = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            if start == first_line or node.lineno == first_line:
                assert node.end_lineno is not None
                return node.end_lineno - start + 1
    return 1  # a lambda or comprehension inside a function that is counted


def _sequence_parallel_forward(rank: int) -> set[tuple[str, int]]:
    from tests.model.tiny import build, make_context, rank_batches, tiny_config

    config = tiny_config(parallel__tensor_model_parallel_size=2, parallel__sequence_parallel=True)
    ctx = make_context(config)
    model, _ = build(config, ctx)
    batch = rank_batches(config, 1, ctx)[0]
    return _functions_reached(lambda: model(batch.tokens, batch.labels))


def test_one_forward_reads_in_600_lines() -> None:
    """All functions that a tensor- and sequence-parallel forward enters, docstrings included."""
    from tests.distributed import run_distributed

    reached = run_distributed(2, _sequence_parallel_forward)[0]
    lines = sum(_length(file, line) for file, line in reached)
    assert 100 < lines <= 600, lines


@pytest.mark.skipif(bool(cpu.unavailable(torch.device("cpu"))), reason="the CPU kernels are not compiled")
def test_one_layer_reads_in_seven_files_and_300_lines() -> None:
    """Forward and backward with TP 2 and sequence parallelism, counted as benchmarks/walks.py does."""
    from tests.distributed import run_distributed

    functions = run_distributed(2, trace_layer)[0]
    files, lines = [function.file for function in functions], sum(function.lines for function in functions)
    assert 5 <= len(set(files)) <= 7 and 200 < lines <= 300 and count_returns(files) <= 12, (files, lines)


@pytest.mark.skipif(bool(not_compiled()), reason="not all is compiled")
def test_a_dataset_reads_in_twenty_files_and_1_120_lines() -> None:
    """From JSON lines to a published dataset, by the program, counted as benchmarks/walks.py does."""
    functions = walk_in_child("jsonl")
    files, lines = [function.file for function in functions], sum(function.lines for function in functions)
    # One return more where the system begins again at small numbers of threads.
    assert 15 <= len(set(files)) <= 20 and 900 < lines <= 1_120 and count_returns(files) <= 27, (files, lines)


def test_one_step_reads_on_one_screen() -> None:
    from megatron_hammer.train import step

    lines = (Path(step.__file__)).read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("def train_step"))
    assert len(lines) - start <= 24


def test_reports_are_device_scalars() -> None:
    """A step returns tensors: reading them, and so waiting for the device, is the loop's business."""
    from megatron_hammer.train.step import StepReport

    types = {f.name: f.type for f in dataclasses.fields(StepReport)}
    assert {types[n] for n in ("loss", "grad_norm", "applied")} == {"Tensor"}
    assert torch.Tensor.__name__ == "Tensor"
