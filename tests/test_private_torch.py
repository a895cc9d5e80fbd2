"""Private names of torch: each use in the package is listed here with the versions that were looked at.

A name that begins with an underscore may go or change without notice. So a new one fails a test until it is written
down, and a torch in which one is gone, or takes other arguments, fails here and not in a run.
"""

from __future__ import annotations

import ast
import inspect

import pytest

from tests.page_blocks import ROOT

# Name -> the arguments that we pass, with the file. Looked at in torch 2.11.0, 2.13.0 and 2.15.0: no change.
PRIVATE = {
    "torch._scaled_mm": ("self", "mat2", "scale_a", "scale_b", "out_dtype", "use_fast_accum"),  # kernels/fp8.py
    "torch._assert_async": ("self", "assert_msg"),  # model/head_loss.py
    "torch.distributed._functional_collectives": (),  # parallel/collectives.py, in graphs of torch.compile
    "torch.distributed._functional_collectives.all_reduce": ("self", "reduceOp", "group"),
    "torch.distributed._functional_collectives.all_gather_tensor": ("self", "gather_dim", "group"),
    "torch.distributed._functional_collectives.reduce_scatter_tensor": ("self", "reduceOp", "scatter_dim", "group"),
    "torch.testing._internal.distributed.fake_pg.FakeStore": (),  # parallel/fake_world.py
    "torch.utils._python_dispatch.TorchDispatchMode": (),  # verify/one_rank.py, as is the next
    "torch.utils._pytree.tree_leaves": (),
}


def private_names(source: str) -> set[str]:
    """Dotted names below torch with a part that begins with one underscore, as a file names them."""
    tree, found = ast.parse(source), set[str]()
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "torch" and any(p.startswith("_") and not p.startswith("__") for p in parts[1:]):
                found.add(name)
    return found


def test_a_private_name_is_found_however_it_is_written() -> None:
    text = "import torch._a\nfrom torch._b import c\nfrom torch.d import _e\ntorch.f._g(torch.__version__)\n"
    assert private_names(text) == {"torch._a", "torch._b.c", "torch.d._e", "torch.f._g"}


def test_the_package_uses_no_other() -> None:
    for path in sorted((ROOT / "megatron_hammer").rglob("*.py")):
        unknown = private_names(path.read_text(encoding="utf-8")) - set(PRIVATE)
        assert not unknown, f"{path}: {sorted(unknown)} must be listed in {__file__}"


@pytest.mark.parametrize("name, wanted", PRIVATE.items(), ids=list(PRIVATE))
def test_this_torch_has_it(name: str, wanted: tuple[str, ...]) -> None:
    """With every argument that we pass, by the names of the public signature or of the operation's schema."""
    import torch.distributed._functional_collectives
    import torch.testing._internal.distributed.fake_pg
    import torch.utils._python_dispatch
    import torch.utils._pytree

    found = torch
    for part in name.split(".")[1:]:
        found = getattr(found, part)
    if not wanted:
        return
    if inspect.isfunction(found):
        taken = [{list(inspect.signature(found).parameters)[i]} for i in range(len(wanted))]
    else:
        packet = getattr(torch.ops.aten, name.rpartition(".")[2])
        schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
        taken = [{argument.name for schema in schemas for argument in schema.arguments}] * len(wanted)
    for argument, place in zip(wanted, taken, strict=True):
        assert argument in place, f"{name} takes {sorted(place)}, not {argument}, in torch {torch.__version__}"
