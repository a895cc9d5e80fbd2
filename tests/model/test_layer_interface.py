"""Both modules of layers against the interface that the decoder is written for. mypy compares the types too."""

from __future__ import annotations

import inspect
from types import ModuleType

import pytest
from torch import nn

from megatron_hammer.model import layers, layers_te
from megatron_hammer.model.layer_interface import HeadsLinear, LayerModule, Linear, Norm

MODULES = [layers, layers_te]
INTERFACE = {
    name: member for name, member in vars(LayerModule).items() if inspect.isfunction(member) and name[0] != "_"
}
CLASSES = {"RMSNorm": Norm, "ColumnParallelLinear": Linear, "RowParallelLinear": Linear, "QKVLinear": HeadsLinear}


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("name", [name for name in INTERFACE if name != "__init__"])
def test_names_and_arguments(module: ModuleType, name: str) -> None:
    expected = [*inspect.signature(INTERFACE[name]).parameters][1:]  # without self
    assert [*inspect.signature(getattr(module, name)).parameters] == expected


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("name, protocol", list(CLASSES.items()))
def test_layers_are_modules_with_the_same_forward(module: ModuleType, name: str, protocol: type) -> None:
    layer = getattr(module, name)
    assert issubclass(layer, nn.Module)
    assert [*inspect.signature(layer.forward).parameters] == [*inspect.signature(protocol.forward).parameters]  # type: ignore[attr-defined]


def test_the_interface_is_whole() -> None:
    """Every class of the interface is compared above, and the decoder asks for nothing else of a module."""
    assert CLASSES.keys() == {name for name in INTERFACE if name[0].isupper()}
    assert INTERFACE.keys() - CLASSES.keys() == {"operations", "forward_region"}
