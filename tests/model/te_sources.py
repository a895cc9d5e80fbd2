"""Transformer Engine's own Python code on a CPU, over a stub of its C++ extension.

What ``te_double.py`` promises by reading, this runs: the library's Linear with its autograd function, collectives and
``main_grad`` protocol, its RMSNorm operation, and fp8's recipes, quantizers, copies of weights and reductions are the
sources of the pinned wheel. Ours are the two things that they cannot have here: the extension (matrix product, RMSNorm
and the cast to 8 bits in torch; everything else is a mock that must not matter), and a device (the text of each module
is read with ``cuda`` replaced by ``cpu``). Kernels and attention are not reached this way.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib.machinery
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

# Packages that the sources import and that no test machine has; pydantic's dataclass is one of the standard library
# with type checks.
ABSENT = ("onnx", "onnxscript", "nvdlfw_inspect", "cudnn", "transformer_engine_torch", "pydantic", "einops",
          "transformer_engine.common", "transformer_engine.debug", "transformer_engine.pytorch.triton")  # fmt: skip
PRESENT = ("transformer_engine.common.recipe",)


class _Mock(ModuleType):
    """A module in which every name exists."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


def _under(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


class _Finder:
    """Finds ``transformer_engine`` in the sources, as text for a CPU, and mocks in place of what is absent."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name == "transformer_engine" or (_under(name, ABSENT) and not _under(name, PRESENT)):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]
        if not name.startswith("transformer_engine."):
            return None
        file = self.root.joinpath(*name.split("."))
        is_package = file.is_dir()
        file = file / "__init__.py" if is_package else file.with_suffix(".py")
        if not file.is_file():
            return None
        return importlib.machinery.ModuleSpec(name, self, origin=str(file), is_package=is_package)  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None if spec.origin else _Mock(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        if module.__spec__.origin is None:
            if module.__name__ == "transformer_engine_torch":
                _extension(module, self.root)
            elif module.__name__ == "pydantic.dataclasses":
                module.dataclass = dataclasses.dataclass  # type: ignore[attr-defined]
            elif module.__name__ == "transformer_engine.debug.pytorch.debug_state":
                module.TEDebugState.debug_enabled = False  # type: ignore[attr-defined]
            elif module.__name__ == "transformer_engine.debug.pytorch.debug_quantization":
                for name in ("DebugQuantizer", "DebugQuantizedTensor"):
                    setattr(module, name, type(name, (), {}))
            return
        text = Path(module.__spec__.origin).read_text(encoding="utf-8")
        text = text.replace(".is_cuda", ".is_cpu").replace(".cuda()", ".cpu()").replace('"cuda"', '"cpu"')
        text = text.replace('torch.device("cpu", torch.cuda.current_device())', 'torch.device("cpu")')
        text = text.replace("torch.cuda.current_device()", 'torch.device("cpu")')
        text = re.sub(r"torch\.cuda\.nvtx\.range_(push|pop)\(.*\)", "None", text)
        exec(compile(text, module.__spec__.origin, "exec"), vars(module))


def _extension(module: Any, root: Path) -> None:
    """The C++ extension: its two enumerations, a matrix product and RMSNorm."""
    constants = (root / "transformer_engine/pytorch/constants.py").read_text(encoding="utf-8")
    attention = (root / "transformer_engine/pytorch/cpp_extensions/fused_attn.py").read_text(encoding="utf-8")
    types = dict.fromkeys(re.findall(r"int\(tex\.DType\.(\w+)\)", constants))
    backends = dict.fromkeys(re.findall(r"NVTE_Fused_Attn_Backend\.(NVTE_\w+)", attention))
    module.DType = enum.IntEnum("DType", {name: i for i, name in enumerate(types)})  # type: ignore[misc]
    module.NVTE_Fused_Attn_Backend = enum.IntEnum("Backend", {name: i for i, name in enumerate(backends)})  # type: ignore[misc]
    module.generic_gemm, module.rmsnorm_fwd, module.rmsnorm_bwd = _generic_gemm, _rmsnorm_fwd, _rmsnorm_bwd
    module.quantize, module.create_empty_quantized_tensor = _quantize, _empty_quantized
    module.fp8_transpose = lambda data, dtype, out=None: _columns_first(data)


def _generic_gemm(A: Tensor, transa: bool, B: Tensor, transb: bool, out: Tensor | None, *rest: Any, **more: Any) -> Any:
    """cuBLAS counts columns first, so in rows: op(B) op(A). Summed in fp32, as the tensor cores do."""
    _quantizer, out_dtype, *_, accumulate, _split = rest
    shape = B.size()[:-1]
    a, b = (x if isinstance(x, Tensor) and not hasattr(x, "_scale_inv") else _from_8_bits(x) for x in (A, B))
    a, b = (x.flatten(0, -2).to(torch.promote_types(x.dtype, torch.float32)) for x in (a, b))
    product = (b.t() if transb else b) @ (a.t() if transa else a)
    if out is None:
        dtype = {"kFloat32": torch.float32, "kBFloat16": torch.bfloat16, "kFloat16": torch.float16}[out_dtype.name]
        out = product.to(dtype)
        if not transb:
            out = out.view(*shape, -1)
    elif accumulate:
        out += product
    else:
        out.copy_(product)
    return out, None, None, None


_LARGEST = {"kFloat8E4M3": (torch.float8_e4m3fn, 448.0), "kFloat8E5M2": (torch.float8_e5m2, 57344.0)}
AMAX_GROUPS: list[int] = []  # sizes of the groups over which a tensor's own largest value was reduced


def _columns_first(data: Tensor) -> Tensor:
    """[..., n] -> [n, ...], as the library keeps a transpose."""
    return data.movedim(-1, 0).contiguous()


def _empty_quantized(quantizer: Any, shape: list[int], dtype: torch.dtype, *rest: Any) -> Any:
    """A Float8Tensor, or the storage alone inside of a layer."""
    from transformer_engine.pytorch.tensor import Float8Tensor, Float8TensorStorage

    data = torch.empty(shape, dtype=torch.uint8)
    transposed = _columns_first(data) if quantizer.columnwise_usage else None
    common = {"data": data if quantizer.rowwise_usage else None, "fp8_scale_inv": torch.ones(1), "quantizer": quantizer,
              "fp8_dtype": quantizer.dtype, "data_transpose": transposed}  # fmt: skip
    if quantizer.internal:
        return Float8TensorStorage(fake_dtype=dtype, **common)
    return Float8Tensor(shape=shape, dtype=dtype, device=torch.device("cpu"), **common)


def _quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Any = None) -> Any:
    """Scale so that the largest value is the format's, and round; delayed scaling notes it and uses an older scale."""
    wide = tensor.detach().float()
    largest, (kind, limit) = wide.abs().max(), _LARGEST[quantizer.dtype.name]
    if hasattr(quantizer, "scale"):
        quantizer.amax.copy_(torch.maximum(quantizer.amax, largest))
        scale = quantizer.scale.clone()
    else:
        if quantizer.with_amax_reduction:
            AMAX_GROUPS.append(torch.distributed.get_world_size(quantizer.amax_reduction_group))
            torch.distributed.all_reduce(
                largest, op=torch.distributed.ReduceOp.MAX, group=quantizer.amax_reduction_group
            )
        scale = (limit / largest).reshape(1) if largest > 0 else torch.ones(1)
    data = (wide * scale).clamp(-limit, limit).to(kind).view(torch.uint8)
    out = output if output is not None else _empty_quantized(quantizer, list(tensor.shape), tensor.dtype)
    if out._data is not None:
        out._data.copy_(data)
    if out._transpose is not None:
        out._transpose.copy_(_columns_first(data))
        out._transpose_invalid = False
    out._scale_inv.copy_(1 / scale)
    return out


def _from_8_bits(x: Any) -> Tensor:
    """Whichever of the two orders is there, as fp32 in the usual one."""
    data = x._data if x._data is not None else x._transpose.movedim(0, -1).contiguous()
    return data.view(_LARGEST[x._fp8_dtype.name][0]).float() * x._scale_inv


def _rmsnorm_fwd(x: Tensor, weight: Tensor, eps: float, *rest: Any) -> tuple[Tensor, None, Tensor]:
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    return (wide * rstd.unsqueeze(1) * weight.float()).to(x.dtype), None, rstd


def _rmsnorm_bwd(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The derivative of y_i = x_i r w_i with r = (mean x^2 + eps)^(-1/2)."""
    normed, scaled = x.float() * rstd.unsqueeze(1), dy.float() * weight.float()
    dx = rstd.unsqueeze(1) * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), (dy.float() * normed).sum(0).to(weight.dtype)


@contextmanager
def imported(root: Path) -> Iterator[Any]:
    """``import transformer_engine.pytorch`` finds those sources under ``root``; gives that module."""
    before = {name for name in sys.modules if _under(name, (*ABSENT, "transformer_engine"))}
    assert not before, f"already imported: {before}"
    finder: Any = _Finder(root)
    sys.meta_path.insert(0, finder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_properties", lambda *_: MagicMock(major=9, minor=0))
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setenv("NVTE_UNFUSED_FP8_UPDATE", "1")  # delayed scaling's update in Python
        patch.setenv("NVTE_TORCH_COMPILE", "0")  # and not compiled for a GPU
        try:
            import transformer_engine.pytorch as te

            yield te
        finally:
            sys.meta_path.remove(finder)
            for name in [n for n in sys.modules if _under(n, (*ABSENT, "transformer_engine"))]:
                del sys.modules[name]
