"""Loads weights into transformers' own model class, from a folder or from memory, and refuses missing or extra ones.

Needs no torch until it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_hammer.base.errors import CheckpointError


def load_causal(folder: Path, dtype: Any) -> Any:
    """``AutoModelForCausalLM`` of the folder; offline, from safetensors, running no code of the folder's.

    Args:
        dtype: of the weights in memory, a ``torch.dtype`` or "auto" for that in which they are stored.

    Raises:
        CheckpointError: E491 it cannot be loaded, or keys are missing, unexpected or of another shape.
    """
    import transformers

    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    return _strictly(
        lambda: load(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **_typed(dtype),
        ),
        str(folder),
    )


def causal_with_weights(settings: Any, weights: dict[str, Any], dtype: Any, where: str) -> Any:
    """The causal language model of a config of transformers with these weights, which need not be on any disk.

    Args:
        settings: a ``PretrainedConfig``.
        weights: by the names of the class; where it ties the head to the embedding, the embedding alone.
        where: for messages.

    Raises:
        CheckpointError: E491 as ``load_causal``.
    """
    import transformers

    classes: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    load: Any = classes[type(settings)].from_pretrained
    return _strictly(
        lambda: load(None, config=settings, state_dict=weights, output_loading_info=True, **_typed(dtype)), where
    )


def _typed(dtype: Any) -> dict[str, Any]:
    """The type of the weights as an argument; each version rejects the other's name or passes over it in silence."""
    import transformers

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    return {"dtype" if version >= (4, 56) else "torch_dtype": dtype}


def _strictly(load: Callable[[], Any], where: str) -> Any:
    """What ``load`` gives, if no key was missing, unexpected or of another shape."""
    import transformers

    hide_progress_bar: Any = transformers.utils.logging.disable_progress_bar
    hide_progress_bar()
    try:
        model, info = load()
    except Exception as error:  # whatever it is, the folder is of no use
        rule = f"cannot be loaded by transformers ({type(error).__name__}: {error})"
        raise CheckpointError(91, where, rule, _REMEDY) from None
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if found := sorted(map(str, info.get(kind) or ())):
            raise CheckpointError(91, f"{where}: {found[0]}", f"is among the {kind} of transformers", _REMEDY)
    return model.eval()


_REMEDY = "name the folder of a complete causal language model"
