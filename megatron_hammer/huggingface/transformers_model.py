"""A Hugging Face folder loaded by transformers' own class, strictly: every weight must come from the folder.

Needs no torch until it is called.
"""

from __future__ import annotations

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

    hide_progress_bar: Any = transformers.utils.logging.disable_progress_bar
    hide_progress_bar()
    # The argument was renamed in 4.56; both versions reject the other's name or pass over it in silence.
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    argument = "dtype" if version >= (4, 56) else "torch_dtype"
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **{argument: dtype},
        )
    except Exception as error:  # whatever it is, the folder is of no use
        rule = f"cannot be loaded by transformers ({type(error).__name__}: {error})"
        raise CheckpointError(91, str(folder), rule, _REMEDY) from None
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if found := sorted(map(str, info.get(kind) or ())):
            raise CheckpointError(91, f"{folder}: {found[0]}", f"is among the {kind} of transformers", _REMEDY)
    return model.eval()


_REMEDY = "name the folder of a complete causal language model"
