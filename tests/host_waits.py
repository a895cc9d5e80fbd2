"""Which operations a region runs, and for which of them the host would wait for a GPU. It is all seen on a CPU."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# They turn a tensor into a Python value, or return a shape that depends on values.
WAITING = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "unique", "_unique2"}


class OperationNames(TorchDispatchMode):
    """Names of all of torch's operations that a region runs, such as ``aten::mm``; compiled kernels are not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket._qualified_op_name)
        return func(*args, **(kwargs or {}))

    def waits(self) -> set[str]:
        """Those for which the host waits."""
        return {name for name in self.names if name.split("::")[-1] in WAITING}
