"""What we use of Transformer Engine exists in it: by syntax tree, against the Python sources of the pinned version.

The wheel ``transformer-engine`` carries those sources whole (1.2 MB). It is downloaded once into a cache folder and
never installed: it cannot be imported without a GPU, and it would break megatron-core's imports.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_hammer.config import FP8_MULTIPLE
from megatron_hammer.kernels.libraries import te as door
from megatron_hammer.model import layers, layers_te
from tests.model import te_double

OURS = [Path(module.__file__) for module in (door, layers_te) if module.__file__]
# Calls of the library's modules, by the text of the callee in our sources.
INSTANCES = {
    ("attention", "core"): "DotProductAttention.forward",
    ("add_rms_norm", "module"): "RMSNorm.forward",
    ("_Linear", "self.hidden[0]"): "Linear.forward",
}


class Sources:
    """Definitions in a package that is read and not imported."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.trees: dict[Path, ast.Module] = {}

    def tree(self, module: str) -> tuple[Path, ast.Module]:
        path = self.root.joinpath(*module.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if path not in self.trees:
            self.trees[path] = ast.parse(path.read_text(encoding="utf-8"))
        return path, self.trees[path]

    def find(self, module: str, name: str) -> tuple[str, ast.ClassDef | ast.FunctionDef] | None:
        """(module, definition) of a name, followed through ``from x import y``."""
        path, tree = self.tree(module)
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
                return module, node
            if not isinstance(node, ast.ImportFrom):
                continue
            for alias in node.names:
                if alias.name == "*" or name == (alias.asname or alias.name):
                    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
                    for _ in range(node.level - 1):
                        package = package.rpartition(".")[0]
                    target = ".".join(filter(None, [package if node.level else "", node.module or ""]))
                    found = self.find(target, name if alias.name == "*" else alias.name)
                    if found or alias.name != "*":
                        return found
        return None

    def function(self, module: str, dotted: str) -> list[ast.arguments]:
        """Arguments of a function, a method or a constructor; of a constructor, those of the bases after it."""
        name, _, method = dotted.partition(".")
        found = self.find(module, name)
        if found is None:
            return []
        home, node = found
        if isinstance(node, ast.FunctionDef):
            return [node.args]
        own = [f.args for f in node.body if isinstance(f, ast.FunctionDef) and f.name == (method or "__init__")]
        if own and (method or own[0].kwarg is None):
            return own
        bases = [f"{base.id}.{method}".strip(".") for base in node.bases if isinstance(base, ast.Name)]
        return own + [args for base in bases for args in self.function(home, base)]

    def popped(self, module: str, name: str) -> set[str]:
        """Arguments that a function takes out of its ``**kwargs`` by name."""
        found = self.find(module, name)
        calls = [c for c in ast.walk(found[1]) if isinstance(c, ast.Call)] if found else []
        return {ast.literal_eval(c.args[0]) for c in calls if ast.unparse(c.func) == "kwargs.pop"}

    def lacking(self, module: str, used: Mapping[str, tuple[str, ...]]) -> list[str]:
        """What of ``used`` does not exist."""
        found = {name: self.function(module, name) for name in used}
        names = {name: {a.arg for args in lists for a in _named(args)} for name, lists in found.items()}
        absent = [name for name in used if not found[name] and self.find(module, name) is None]
        return absent + [f"{n}({a})" for n, arguments in used.items() for a in arguments if a not in names[n]]


def _named(args: ast.arguments) -> list[ast.arg]:
    return [a for a in (*args.posonlyargs, *args.args, *args.kwonlyargs) if a.arg != "self"]


def _positional(args: ast.arguments) -> list[str]:
    return [a.arg for a in (*args.posonlyargs, *args.args) if a.arg != "self"]


TE, RECIPES = "transformer_engine.pytorch", "transformer_engine.common.recipe"


def test_everything_that_we_use_exists(sources: Path) -> None:
    read = Sources(sources)
    assert read.lacking(TE, door.USED) == []
    assert read.lacking(RECIPES, door.USED_RECIPES) == []
    # And the check can fail.
    wrong = {"Linear": ("in_features", "tp_grup"), "Linear.forward": ("first",), "RMSNorm": ("epsilon",), "Lin": ()}
    assert read.lacking(TE, wrong) == ["Lin", "Linear(tp_grup)", "Linear.forward(first)", "RMSNorm(epsilon)"]


def _calls() -> Iterator[tuple[str, ast.Call]]:
    """(name in the library, call) of every use in our sources; each must be one that we can name."""
    for path in OURS:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for scope in tree.body:
            if not isinstance(scope, ast.ClassDef | ast.FunctionDef):
                continue
            for node in ast.walk(scope):
                if not isinstance(node, ast.Call):
                    continue
                callee = ast.unparse(node.func)
                if callee.startswith(("te.", "recipe.")):
                    yield callee, node
                elif (scope.name, callee) in INSTANCES:
                    yield "te." + INSTANCES[scope.name, callee], node


def test_the_table_is_what_the_code_uses(sources: Path) -> None:
    read, used = Sources(sources), dict[str, set[str]]()
    for callee, call in _calls():
        library, _, name = callee.partition(".")
        first = read.function({"te": TE, "recipe": RECIPES}[library], name)
        popped = read.popped({"te": TE, "recipe": RECIPES}[library], name) if "." not in name else set()
        arguments = [k.arg for k in call.keywords if k.arg not in popped]
        assert None not in arguments and not any(isinstance(a, ast.Starred) for a in call.args), ast.unparse(call)
        used.setdefault(name, set()).update(_positional(first[0])[: len(call.args)] if call.args else (), arguments)  # type: ignore[arg-type]
    expected = {name: set(arguments) for name, arguments in (*door.USED.items(), *door.USED_RECIPES.items())}
    assert used == expected
    touched = {
        node.attr
        for path in OURS
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("te", "recipe")
    }
    assert touched == {name for name in expected if "." not in name}


DOUBLES: dict[str, tuple[str, Any]] = {
    "Linear": (TE, te_double.Linear.__init__),
    "Linear.forward": (TE, te_double.Linear.forward),
    "RMSNorm": (TE, te_double.RMSNorm.__init__),
    "RMSNorm.forward": (TE, te_double.RMSNorm.forward),
    "DotProductAttention": (TE, te_double.DotProductAttention.__init__),
    "DotProductAttention.forward": (TE, te_double.DotProductAttention.forward),
    "autocast": (TE, te_double.autocast.__init__),
    "is_fp8_available": (TE, te_double.is_fp8_available),
    "checkpoint": (TE, te_double.checkpoint),
    "DelayedScaling": (RECIPES, te_double.DelayedScaling.__init__),
    "Float8CurrentScaling": (RECIPES, te_double.Float8CurrentScaling.__init__),
}


@pytest.mark.parametrize("name", list(DOUBLES))
def test_the_double_has_the_library_s_signatures(name: str, sources: Path) -> None:
    """Its arguments are the library's, by name, by place where they can be given by place, and by default."""
    module, double = DOUBLES[name]
    assert {*door.USED, *door.USED_RECIPES} == set(DOUBLES)
    lists = Sources(sources).function(module, name)
    known = {a.arg for args in lists for a in _named(args)}
    defaults: dict[str, Any] = {}
    for args in reversed(lists):
        given = (*args.posonlyargs, *args.args)
        pairs = [*zip(given[len(given) - len(args.defaults) :], args.defaults, strict=True)]
        pairs += [(a, d) for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True) if d is not None]
        defaults |= {a.arg: d for a, d in pairs}
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    own = [p for p in inspect.signature(double).parameters.values() if p.name != "self" and p.kind not in variable]
    assert {p.name for p in own} <= known
    assert {*door.USED.get(name, ()), *door.USED_RECIPES.get(name, ())} <= {p.name for p in own}
    by_place = [p for p in own if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in by_place] == (_positional(lists[0])[: len(by_place)] if by_place else [])
    for p in own:
        library = defaults.get(p.name)
        if p.default is not inspect.Parameter.empty and isinstance(library, ast.Constant):
            assert library.value == p.default, f"{name}({p.name}={p.default}), in the library {library.value}"


def _class(read: Sources, name: str) -> str:
    found = read.find(TE, name)
    assert found is not None
    return ast.unparse(found[1])


def test_the_protocol_of_main_grad_is_the_library_s(sources: Path) -> None:
    """Where the library reads the attribute of a weight that layers_te.py sets, and how it behaves without others."""
    text = ast.unparse(Sources(sources).tree(f"{TE}.module.linear")[1])
    for line in (
        "getattr(weight, 'overwrite_main_grad', False)",
        "lambda: weight.main_grad",
        "hasattr(origin_weight_python_object, 'grad_added_to_main_grad')",
        "origin_weight_python_object.grad_added_to_main_grad = True",
        "elif bwd_args.fuse_wgrad_accumulation:\n            wgrad = None",
        "accumulate_wgrad_into_param_main_grad if not origin_weight_overwrites_main_grad else False",
        "bwd_args.fuse_wgrad_accumulation and (not bwd_args.is_first_microbatch)",
        "'out': main_grad if bwd_args.fuse_wgrad_accumulation else None",
    ):
        assert line in text, line


def test_names_and_limits_that_no_signature_states(sources: Path) -> None:
    read = Sources(sources)
    linear, core = _class(read, "Linear"), _class(read, "DotProductAttention")
    assert "self.weight_names = ['weight']" in linear, "the weight's name"
    norm = read.find(f"{TE}.ops.basic.rmsnorm", "RMSNorm")
    assert norm is not None and "self.register_parameter('weight', weight)" in ast.unparse(norm[1])
    assert "if self.parallel_mode == 'column':\n            self.out_features = divide(" in linear, "global sizes"
    assert "elif self.parallel_mode == 'row':\n            self.in_features = divide(" in linear
    constants = ast.unparse(read.tree(f"{TE}.constants")[1])
    assert "GemmParallelModes = ('row', 'column', None)" in constants
    masks = constants[constants.index("AttnMaskTypes = ") :].split(")")[0]
    assert "'causal'" in masks and "'padding_causal'" in masks
    assert "['sbhd', 'bshd', 'thd']" in core and "cu_seqlens_q.dtype == torch.int32" in core
    sizes = read.find(f"{TE}.utils", "assert_dim_for_fp8_exec")
    assert sizes is not None and "% 8 != 0 or tensor.shape[-1] % 16 != 0" in ast.unparse(sizes[1])
    assert FP8_MULTIPLE == 16
    for name in door.USED_RECIPES:
        found = read.find(RECIPES, name)
        assert found is not None
        text = ast.unparse(found[1])
        assert "fp8_dpa: bool = False" in text, "attention stays in 16 bits"
        assert "reduce_amax: bool = True" in text or name != "DelayedScaling"
    region = _class(read, "autocast")
    assert "autocast_exit(self._enabled" in region and "fp8_group=self._amax_reduction_group" in region
    group = ast.unparse(read.tree(f"{TE}.module.linear")[1])
    assert "tp_group if sequence_parallel and parallel_mode == 'column' else None" in group, "current scaling's group"


def test_both_modules_of_layers_have_the_same_names_and_arguments() -> None:
    for name in layers_te.__all__:
        ours, theirs = getattr(layers_te, name), getattr(layers, name)
        assert [*inspect.signature(ours).parameters] == [*inspect.signature(theirs).parameters], name
    defined = {n for n, c in vars(layers).items() if getattr(c, "__module__", "") == layers.__name__ and n[0] != "_"}
    shared = {"Bias", "ready_after"}
    assert defined == {*layers_te.__all__} | shared, "what layers are made of, and what tells the store of a gradient"
