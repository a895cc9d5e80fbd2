"""NVIDIA's Transformer Engine as a backend: whether it can run here, its attention and norm, and its fp8 region.

Three settings use it: ``kernels.layers=te`` (``model/layers_te.py``), ``kernels.attention=te`` and ``kernels.norm=te``.
To find out whether it can run takes an import of many seconds and a GPU. So the launcher tries that in a child process
before any rank starts, and shows the library's own message: its import fails with RuntimeError, OSError or
FileNotFoundError as readily as with ImportError.

Written against the Python sources of ``transformer-engine`` 2.20.2. ``USED`` states every name and argument that we
use. At start it is compared with the installed version, and in ``tests/model/test_te_contract.py`` against those
sources. Imports neither torch nor Transformer Engine until it is asked something.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import copy
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.config import Config

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_hammer.kernels.packed_sequences import PackedSequences
    from megatron_hammer.parallel.context import Group

IMPORT_SECONDS = 300  # for a first import from a slow file system; the usual one takes 10 to 30

USED: Mapping[str, tuple[str, ...]] = {  # in transformer_engine.pytorch: name, or class and method -> arguments
    "Linear": (
        "in_features",
        "out_features",
        "sequence_parallel",
        "fuse_wgrad_accumulation",
        "tp_group",
        "tp_size",
        "init_method",
        "bias",
        "params_dtype",
        "parallel_mode",
        "device",
    ),
    "Linear.forward": ("inp", "is_first_microbatch"),
    "RMSNorm": ("normalized_shape", "eps", "device"),
    "RMSNorm.forward": ("input",),
    "DotProductAttention": ("num_attention_heads", "kv_channels", "num_gqa_groups", "qkv_format", "attn_mask_type"),
    "DotProductAttention.forward": (
        "query_layer",
        "key_layer",
        "value_layer",
        "qkv_format",
        "cu_seqlens_q",
        "cu_seqlens_kv",
        "max_seqlen_q",
        "max_seqlen_kv",
        "attn_mask_type",
    ),
    "autocast": ("enabled", "recipe", "amax_reduction_group"),
    "is_fp8_available": ("return_reason",),
    "checkpoint": ("function",),  # and what it takes out of **kwargs: use_reentrant
}
USED_RECIPES: Mapping[str, tuple[str, ...]] = {"DelayedScaling": (), "Float8CurrentScaling": ()}  # in common.recipe


def check_before_start(config: Config) -> None:
    """Ask a child process whether this node can run what the config wants of Transformer Engine.

    Raises:
        ConfigError: it cannot, and why.
    """
    if not _asked_for(config):
        return
    wants_fp8 = config.kernels.fp8 != "off"
    code = f"import {__name__} as te\nprint('answer: ' + te.unavailable({wants_fp8}))"
    try:
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=IMPORT_SECONDS)
    except subprocess.TimeoutExpired:
        refuse(config, f"its import took more than {IMPORT_SECONDS} seconds")
    answers = [line for line in child.stdout.splitlines() if line.startswith("answer: ")]
    if not answers:  # a library that ends the process, as a missing symbol in a C++ extension does
        last = (child.stderr.strip().splitlines() or [""])[-1]
        refuse(config, f"its import ended with exit code {child.returncode} {last}".strip())
    refuse(config, answers[-1].removeprefix("answer: "))


def check_here(config: Config) -> None:
    """As ``check_before_start``, in this process: for each rank, before its first collective.

    Raises:
        ConfigError: Transformer Engine cannot run here, and why.
    """
    if _asked_for(config):
        refuse(config, unavailable(config.kernels.fp8 != "off"))


def _asked_for(config: Config) -> str:
    """The first setting in the group kernels that asks for Transformer Engine, or an empty string."""
    return next((name for name in ("layers", "attention", "norm") if getattr(config.kernels, name) == "te"), "")


def refuse(config: Config, why: str) -> None:
    """Raise the error of whichever setting asked for Transformer Engine, unless ``why`` is empty."""
    if not why:
        return
    setting = _asked_for(config)
    remedy = "use kernels.layers=torch" if setting == "layers" else f"use kernels.{setting}=auto"
    if why.startswith("fp8: "):
        what, rule = f"kernels.fp8={config.kernels.fp8}", f"cannot run here ({why.removeprefix('fp8: ')})"
        raise ConfigError(13, what, rule, "use kernels.fp8=off")
    raise ConfigError(
        12,
        f"kernels.{setting}=te",
        f"needs Transformer Engine, which cannot run here ({why})",
        f"install transformer-engine[pytorch] 2.20 beside a CUDA torch, or {remedy}",
    )


def unavailable(fp8: bool = False) -> str:
    """Why Transformer Engine, with or without fp8, cannot run in this process, or an empty string. Imports it."""
    try:
        import torch
        import transformer_engine.pytorch as te
        from transformer_engine.common import recipe
    except Exception as error:  # ImportError, RuntimeError, OSError, FileNotFoundError: all have been seen
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    lacking = missing_names(te, USED) + missing_names(recipe, USED_RECIPES)
    if lacking:
        return f"the installed version has no {', '.join(lacking)}"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if fp8:
        able, reason = te.is_fp8_available(return_reason=True)
        return "" if able else f"fp8: {reason}"
    return ""


def missing_names(module: Any, used: Mapping[str, Sequence[str]]) -> list[str]:
    """What of ``used`` a module lacks: names, or ``name(argument)``."""
    lacking = []
    for name, arguments in used.items():
        found = module
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is None:
            lacking.append(name)
            continue
        # A constructor may pass arguments on to its bases, so all of them count; a function whose decorator hides its
        # arguments is given the benefit of the doubt.
        functions = [vars(c).get("__init__") for c in found.__mro__] if inspect.isclass(found) else [found]
        known = [p for f in functions if inspect.isroutine(f) for p in inspect.signature(f).parameters.values()]
        if inspect.isclass(found) or any(p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in known):
            lacking += [f"{name}({a})" for a in arguments if a not in {p.name for p in known}]
    return lacking


# ---- attention: a backend of kernels/attention.py ---------------------------------------------------------------


@cache
def _core_attention(heads: int, groups: int, head_size: int) -> Any:
    """One module for all layers of a shape: it holds no parameters, and outside of fp8 no state."""
    import transformer_engine.pytorch as te

    # Local sizes and no tensor-parallel group: heads never communicate, and with more ranks than query groups the
    # library would divide the groups down to none.
    return te.DotProductAttention(
        num_attention_heads=heads,
        kv_channels=head_size,
        num_gqa_groups=groups,
        qkv_format="sbhd",
        attn_mask_type="causal",
    )


def attention(q: Tensor, k: Tensor, v: Tensor, documents: PackedSequences | None) -> Tensor:
    """Backend "te": flash-attn or cuDNN, as Transformer Engine chooses; causal, within documents where given."""
    import transformer_engine.pytorch as te

    core = _core_attention(q.shape[2], k.shape[2], q.shape[3])
    with te.autocast(enabled=False):  # in 16 bits under fp8 too, as the recipes have it unless told otherwise
        assert documents is None or documents.keys is None, "not for context parallelism"
        if documents is None:
            out = core(q, k, v)  # [s, b, n d]
        else:
            out = core(
                q.squeeze(1),  # [b s, n, d]
                k.squeeze(1),
                v.squeeze(1),
                qkv_format="thd",
                attn_mask_type="padding_causal",
                cu_seqlens_q=documents.cu_seqlens,
                cu_seqlens_kv=documents.cu_seqlens,
                max_seqlen_q=documents.max_length,  # known on the host, or the library would wait for the device
                max_seqlen_kv=documents.max_length,
            )
    result: Tensor = out.reshape(q.shape)
    return result


def not_installed(device: Any) -> str:
    """For the tables of attention and norm, which every run on a GPU asks: so without the import of many seconds.

    Whoever names the backend gets the whole answer of ``check_here``.
    """
    return "" if find_spec("transformer_engine") else "transformer_engine is not installed"


# ---- norm: a backend of kernels/norm.py -------------------------------------------------------------------------


def add_rms_norm(x: Tensor, branch: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Backend "te": as ``norm.add_rms_norm``; the residual is added before, by torch."""
    import transformer_engine.pytorch as te

    summed = x if branch is None else x + branch
    # The library offers a module that owns its weight and reads it again in backward, so each call has one of its own:
    # a shallow copy, which shares everything else.
    module = copy(_norm(te, weight.shape[0], eps))
    module._parameters = {"weight": weight}
    return module(summed), summed


@cache
def _norm(te: Any, size: int, eps: float) -> Any:
    """The module that those of a size are copied from, without a weight."""
    module = te.RMSNorm(size, eps=eps, device="meta")
    module._parameters = {}
    return module


# ---- fp8 --------------------------------------------------------------------------------------------------------


def fp8_region(fp8: str, world: Group) -> Callable[[], AbstractContextManager[None]]:
    """What to run a forward of the layers in: fp8 while gradients are recorded, off in evaluation.

    Args:
        fp8: ``kernels.fp8``, not "off". delayed: scales from the largest values of past steps, whose maxima are reduced
            over the world when the region ends, since data- and tensor-parallel ranks must scale alike. current:
            scales from the tensor itself; those that a sequence-parallel layer gathers are reduced over its group by
            the layer.
        world: all ranks.
    """
    import transformer_engine.pytorch as te
    from torch import is_grad_enabled
    from transformer_engine.common import recipe

    chosen = recipe.DelayedScaling() if fp8 == "delayed" else recipe.Float8CurrentScaling()
    group = None if world.size == 1 else world.process_group

    def region() -> AbstractContextManager[None]:
        return te.autocast(enabled=is_grad_enabled(), recipe=chosen, amax_reduction_group=group)  # type: ignore[no-any-return]

    return region


def checkpoint(function: Callable[[Tensor], Any], x: Tensor) -> Any:
    """Keep x only and run ``function`` again in backward, in fp8 with the scales it had before."""
    import transformer_engine.pytorch as te

    return te.checkpoint(function, x, use_reentrant=False)
