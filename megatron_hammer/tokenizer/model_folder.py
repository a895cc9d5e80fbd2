"""A Hugging Face folder around the ``.model`` itself, for sentencepiece models that no tokenizer.json reproduces.

transformers still has classes that hand each text to the sentencepiece library. Two of them do nothing else to it:

class                        prompts begin with bos    transformers
---------------------------  ------------------------  ---------------------------------------------------------------
``SentencePieceBackend``     yes                       5
``BertGenerationTokenizer``  no                        4 and 5; the model's file is named ``spiece.model`` there

All others change the text (GPT-SW3's normalises, SigLIP's lowers and strips), shift the ids (BART's), append eos
(SpeechT5's), or are rebuilt by the tokenizers library (Llama's, T5's; in version 4 wherever there is a "Fast" twin).
Version 4 loads a folder of the first with ``BertGenerationTokenizer.from_pretrained``, without the bos.

Both were tried on 45 kinds of models with 2,500 fuzz texts each: ids were equal on all, but for the fault that
``model_obstacle`` names.

*Decoding is not the library's.* transformers 5 joins the pieces of these classes itself and strips spaces at both ends;
pieces of bytes come out as ``<0x0A>``. ``tokenizer.sp_model.decode(ids)`` gives sentencepiece's text, in every version.
And its ``save_pretrained`` forgets that prompts begin with bos (``special_tokens_pattern``): keep the exported folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_hammer.base.files import dump_json, replace_file
from megatron_hammer.base.reading import parse_json, read_regular
from megatron_hammer.tokenizer.huggingface_backend import STAND_IN_PAD
from megatron_hammer.tokenizer.reader_settings import padding_id
from megatron_hammer.tokenizer.sentencepiece_backend import SentencePieceTokenizer

WHY_NOT_JSON = "why_not_tokenizer_json"
"""In a tokenizer_config.json of ours: the reason why the folder has the ``.model`` instead of a tokenizer.json."""
WITH_BOS, WITHOUT_BOS = "SentencePieceBackend", "BertGenerationTokenizer"
FILES = ("tokenizer.model", "spiece.model")


def write_model_folder(
    tokenizer: SentencePieceTokenizer, proto: Any, directory: Path, begin_with_bos: bool, max_length: int | None,
    why: str,
) -> None:  # fmt: skip
    """Write the model under both names and the tokenizer_config.json.

    Args:
        begin_with_bos: whether prompts begin with bos by default, where there is one.
        max_length: tokens that the language model reads at most.
        why: there is no tokenizer.json.
    """
    for name in FILES:
        replace_file(directory / name, tokenizer.model_bytes)
    padding = padding_id(tokenizer)
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unk": tokenizer.unk_id, "pad": padding, "sep": None}
    config: dict[str, Any] = {
        f"{role}_token": None if index is None else proto.pieces[index].piece for role, index in ids.items()
    }
    begins = begin_with_bos and tokenizer.bos_id is not None
    others = [p.piece for i, p in enumerate(proto.pieces) if p.type == p.CONTROL and i not in ids.values()]
    if others:
        config["additional_special_tokens"] = others
    config |= {
        "split_special_tokens": True,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "add_bos_token": begins,
        "add_eos_token": False,
        "add_prefix_space": proto.normalizer_spec.add_dummy_prefix,
        "tokenizer_class": WITH_BOS if begins else WITHOUT_BOS,
        WHY_NOT_JSON: why,
    }
    if begins:
        config |= {"special_tokens_pattern": "bos", "token_type_ids_pattern": "all_zeros"}
    if tokenizer.pad_id is None:
        config[STAND_IN_PAD] = True
    if max_length is not None:
        config["model_max_length"] = max_length
    replace_file(directory / "tokenizer_config.json", dump_json(config))


def form_of_folder(directory: Path) -> dict[str, str]:
    """For a certificate: the form of an exact tokenizer, and where it is not a tokenizer.json, its class and why."""
    settings = parse_json(read_regular(directory / "tokenizer_config.json"))
    if WHY_NOT_JSON not in settings:
        return {"form": "tokenizer.json"}
    return {"form": "sentencepiece", "class": settings["tokenizer_class"], "reason": settings[WHY_NOT_JSON]}


def text_of(loaded: Any, ids: list[int]) -> str:
    """The text of ids, special ones left out, by a tokenizer that transformers loaded; sentencepiece's as above."""
    if type(loaded).__name__ in (WITH_BOS, WITHOUT_BOS):
        return str(loaded.sp_model.decode(ids))
    return str(loaded.decode(ids, skip_special_tokens=True))


def model_obstacle(tokenizer: SentencePieceTokenizer, proto: Any) -> str:
    """Why such a folder would give other ids, or an empty string.

    transformers asks sentencepiece for pieces and looks their ids up by name. An unknown stretch of text is its own
    piece: if it spells the name of a control piece, it would become that.
    """
    if tokenizer.has_byte_fallback:  # nothing is unknown
        return ""
    for piece in proto.pieces:
        if piece.type in (piece.CONTROL, piece.UNUSED) and any(
            piece.piece in tokenizer.processor.encode(text, out_type=str) for text in (piece.piece, f" {piece.piece}")
        ):
            return f"has no piece for the characters of {piece.piece!r}, so that a text could spell that control piece"
    return ""
