"""RMSNorm and AdamW of NVIDIA's apex behind our signatures; used only where a config names them, never by "auto".

apex is built from its sources (github.com/NVIDIA/apex). On PyPI the name belongs to another project; it is recognised
by the lack of ``apex.optimizers``. ``USED`` states what we call, as in those sources
(apex/normalization/fused_layer_norm.py, csrc/multi_tensor_adam.cu, csrc/multi_tensor_l2norm_kernel.cu). **None of it
has run here yet**, and unlike Transformer Engine and Liger it has no wheel that a test could read.

The update is the capturable one of ``multi_tensor_adam``: step, learning rate, divisor and skip are tensors on the
device, so that the host never waits. It divides the gradients in place, and writes no 16-bit copy beside fp32
gradients: the copy is a second pass, 6 bytes more for each parameter than our own kernel. Norms keep two numbers a row
for backward; the residual is added before, by torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from megatron_hammer.config import OptimizerConfig
from megatron_hammer.kernels.argument_types import AdamWState

USED: Mapping[str, tuple[str, ...]] = {  # module and name -> arguments, in their order
    "apex.normalization.fused_layer_norm.fused_rms_norm_affine": ("input", "weight", "normalized_shape", "eps"),
    "apex.multi_tensor_apply.multi_tensor_applier": ("op", "noop_flag_buffer", "tensor_lists"),
    "amp_C.multi_tensor_adam_capturable": (
        "lr", "beta1", "beta2", "epsilon", "step", "mode", "bias_correction", "weight_decay", "inv_scale",
    ),
    "amp_C.multi_tensor_l2norm": ("per_tensor",),
}  # fmt: skip
LARGEST_PIECE = 2**30  # elements: older versions count in 32 bits
DECOUPLED, CORRECTED = 1, 1  # weight decay as in AdamW, not as in Adam; bias correction


def norm_unavailable(device: torch.device) -> str:
    """Why apex's RMSNorm cannot be imported here, or an empty string; imports nothing."""
    return _unavailable("fused_layer_norm_cuda")


def adamw_unavailable(device: torch.device) -> str:
    """Why apex's AdamW cannot be imported here, or an empty string; imports nothing."""
    return _unavailable("amp_C")


def _unavailable(extension: str) -> str:
    found = find_spec("apex")
    if found is None:
        return "NVIDIA's apex is not installed"
    # A submodule cannot be looked for by name without importing the package.
    if not any((Path(folder) / "optimizers").is_dir() for folder in found.submodule_search_locations or ()):
        return "the installed package apex is not NVIDIA's: it has no apex.optimizers"
    return "" if find_spec(extension) else f"NVIDIA's apex was built without its extension {extension}"


def add_rms_norm(x: Tensor, branch: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As ``norm.add_rms_norm``."""
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    summed = x if branch is None else x + branch
    return fused_rms_norm_affine(summed, weight, (weight.shape[0],), eps), summed


@torch.no_grad()
def adamw_(
    states: Sequence[AdamWState], updates: Tensor, lr: float, config: OptimizerConfig, divisor: Tensor, skip: Tensor
) -> None:
    """As ``adamw.adamw_``; besides, gradients are divided in place."""
    import amp_C
    from apex.multi_tensor_apply import multi_tensor_applier

    noop, step = skip.to(torch.int32).view(1), (updates + 1).to(torch.int32).view(1)
    rate, inverse = torch.full_like(updates, lr).view(1), divisor.reciprocal().view(1)
    for decay in (True, False):
        chosen = [(s.grad, s.weight, s.exp_avg, s.exp_avg_sq) for s in states if s.decay is decay]
        pieces = [[piece for t in kind for piece in t.split(LARGEST_PIECE)] for kind in zip(*chosen, strict=True)]
        if not pieces:
            continue
        multi_tensor_applier(
            amp_C.multi_tensor_adam_capturable,
            noop,
            pieces,
            rate,
            config.beta1,
            config.beta2,
            config.eps,
            step,
            DECOUPLED,
            CORRECTED,
            config.weight_decay if decay else 0.0,
            inverse,
        )
    for state in states:
        if state.param is not None:
            state.param.copy_(state.weight)
    updates.add_(1 - skip)


@torch.no_grad()
def add_square_sum(part: Tensor, out: Tensor) -> None:
    """As ``adamw.add_square_sum``."""
    import amp_C
    from apex.multi_tensor_apply import multi_tensor_applier

    noop = torch.zeros(1, dtype=torch.int32, device=part.device)
    norm, _ = multi_tensor_applier(amp_C.multi_tensor_l2norm, noop, [list(part.split(LARGEST_PIECE))], False)
    out.add_(norm.view(()).square())
