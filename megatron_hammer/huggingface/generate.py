"""Text from an exported model, through ``transformers`` alone: what anybody can do with the folder.

Nothing of our model code takes part, so what comes out is what the exported folder holds. Needs no torch.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_hammer.base.errors import CheckpointError, ConfigError
from megatron_hammer.base.paths import missing_remedy
from megatron_hammer.huggingface.transformers_model import load_causal
from megatron_hammer.tokenizer.model_folder import text_of


def generate(
    folder: Path,
    prompts: Sequence[str],
    max_new_tokens: int = 48,
    temperature: float = 0.7,
    top_k: int = 40,
    seed: int = 0,
) -> Iterator[str]:
    """Continue each prompt; yields prompt and continuation as one text.

    Args:
        folder: a Hugging Face folder with model and tokenizer.
        max_new_tokens: longest continuation; it ends earlier at the end-of-document id.
        temperature: divides the logits before sampling; 0: always the likeliest token.
        top_k: sample among so many likeliest tokens only.
        seed: the same seed gives the same texts.

    Raises:
        CheckpointError: the folder cannot be loaded.
    """
    for name, value, low in (
        ("--max-new-tokens", max_new_tokens, 1),
        ("--temperature", temperature, 0),
        ("--top-k", top_k, 1),
    ):
        if not value >= low:
            raise ConfigError(45, f"{name}={value}", f"must be at least {low}", f"raise {name}")
    if not (folder / "config.json").is_file():
        rule = "is no Hugging Face folder (it has no config.json)" if folder.exists() else "does not exist"
        raise CheckpointError(90, str(folder), rule, _folder_remedy(folder))
    import torch
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            91,
            str(folder),
            f"could not be loaded by transformers ({error})",
            "export it again with tools/checkpoint_to_hf.py",
        ) from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_causal(folder, "auto").to(device)
    for prompt in prompts:
        torch.manual_seed(seed)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if tokenizer.bos_token_id is not None:
            ids = [tokenizer.bos_token_id, *ids]  # every document begins with it (--prepend-bos)
        if not ids:
            raise ConfigError(46, "--prompt ''", "is empty and the tokenizer has no bos token", "give a prompt")
        tokens = torch.tensor([ids], device=device)
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_k": top_k} if temperature > 0 else {"do_sample": False}
        )
        with torch.inference_mode():
            output = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.eos_token_id,
                **sampling,
            )
        yield text_of(tokenizer, output[0].tolist())


def _folder_remedy(folder: Path) -> str:
    """How to get at the Hugging Face folder that a run, or a part of one, means."""
    runs = [folder, *folder.parents[:2]]  # a checkpoint's folder is two below its run
    of = [run for run in runs if (run / "checkpoints").is_dir()]
    if made := [run / "hf" for run in of[:1] or runs if (run / "hf" / "config.json").is_file()]:
        return f"did you mean {made[0]}?"
    if of:
        load, output = shlex.quote(str(of[0])), shlex.quote(str(of[0] / "hf"))
        return f"make one: python tools/checkpoint_to_hf.py --load {load} --output {output}"
    return missing_remedy(folder, "make one with tools/checkpoint_to_hf.py")
