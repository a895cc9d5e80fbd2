"""The settings of a Hugging Face tokenizer folder that other programs read: how prompts begin, and special tokens.

They read it in different places, which must say the same:

program            a prompt begins with bos if                        a space is put in front if       padding
-----------------  -------------------------------------------------  -------------------------------  -------------
transformers 4, 5  the post-processor of tokenizer.json says so       tokenizer.json says so           pad_token
vLLM, SGLang, TGI  as transformers                                    as transformers                  pad_token
llama.cpp (gguf)   ``add_bos_token``, and the post-processor          ``add_prefix_space``, else yes   pad_token
Ollama             ``add_bos_token``                                  as llama.cpp                     pad_token

The words in code font are those of tokenizer_config.json. transformers 5 passes over its ``add_bos_token`` where there
is a tokenizer.json, and transformers 4 does so for the class that is written here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_hammer.tokenizer.interface import Tokenizer
from megatron_hammer.tokenizer.pieces import SPACE

_ADDING_SPECIAL_TOKENS = ("TemplateProcessing", "RobertaProcessing", "BertProcessing")


def begin_with(definition: dict[str, Any], tokens: dict[str, int]) -> None:
    """Let the definition of a tokenizer.json put these tokens (text -> id) before every text, and none behind it.

    What else its post-processor does stays.
    """
    kept = [
        p for p in _steps(definition.get("post_processor"), "processors") if p["type"] not in _ADDING_SPECIAL_TOKENS
    ]
    if tokens:
        before: list[dict[str, Any]] = [{"SpecialToken": {"id": token, "type_id": 0}} for token in tokens]
        text, pair = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        kept.append(
            {
                "type": "TemplateProcessing",
                "single": [*before, text],
                "pair": [*before, text, pair],  # a second bos would be a separator to llama.cpp
                "special_tokens": {
                    token: {"id": token, "ids": [index], "tokens": [token]} for token, index in tokens.items()
                },
            }
        )
    definition["post_processor"] = {"type": "Sequence", "processors": kept} if kept[1:] else next(iter(kept), None)


def settings_for_readers(
    definition: dict[str, Any], backend: Any, tokenizer: Tokenizer, max_length: int | None
) -> dict[str, Any]:
    """What tokenizer_config.json must say, so that all readers do what the tokenizer.json does.

    Args:
        definition: of the tokenizer.json.
        backend: the same, loaded by the tokenizers library.
        max_length: tokens that the model reads at most.
    """
    with_marks, plain = (backend.encode("a", add_special_tokens=on).ids for on in (True, False))
    settings: dict[str, Any] = {
        "add_bos_token": tokenizer.bos_id is not None and with_marks[:1] == [tokenizer.bos_id] != plain[:1],
        "add_eos_token": tokenizer.eos_id is not None and with_marks[-1:] == [tokenizer.eos_id] != plain[-1:],
    }
    roles = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "unk_token": tokenizer.unk_id}
    settings |= {role: None for role, index in roles.items() if index is None}  # else Qwen2's class has its own
    if (prefix := adds_prefix_space(definition)) is not None:
        settings["add_prefix_space"] = prefix
    if (padding := padding_id(tokenizer)) is not None:
        settings["pad_token"] = backend.id_to_token(padding)
    if max_length is not None:
        settings["model_max_length"] = max_length
    return settings


def special_tokens(tokenizer: Tokenizer, backend: Any) -> dict[str, str]:
    """The tokens of the roles that a tokenizer has, by the role's name."""
    roles = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "unk_token": tokenizer.unk_id,
             "pad_token": padding_id(tokenizer)}  # fmt: skip
    return {role: backend.id_to_token(index) for role, index in roles.items() if index is not None}


def padding_id(tokenizer: Tokenizer) -> int | None:
    """The id that batches are padded with: the tokenizer's own, else unk, which texts do not hold, else eos."""
    return next((i for i in (tokenizer.pad_id, tokenizer.unk_id, tokenizer.eos_id) if i is not None), None)


def adds_prefix_space(definition: dict[str, Any]) -> bool | None:
    """Whether a tokenizer.json puts a space in front of a text; None where it knows no such thing."""
    found = None
    for step in _steps(definition.get("normalizer"), "normalizers"):
        if step["type"] == "Prepend":
            return bool(step.get("prepend") == SPACE)
        if step["type"] == "Replace" and step.get("content") == SPACE:
            found = False
    for step in _steps(definition.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Metaspace":
            return bool(
                step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never") != "never"
            )
        if step["type"] == "ByteLevel":
            return bool(step.get("add_prefix_space", True))
    return found


def _steps(part: dict[str, Any] | None, inner: str) -> Iterator[dict[str, Any]]:
    """The single steps of a part of a tokenizer.json, which may be absent, one step, or a sequence of parts."""
    if part is None:
        return
    if part.get("type") != "Sequence":
        yield part
        return
    for step in part.get(inner) or ():
        yield from _steps(step, inner)
