"""Writes a tokenizer as a Hugging Face folder that gives the same ids, and tests that before it is used.

::

    tokenizer.json --------------------> copied, its settings completed --+
    .model --+-- can be written so ----> definition.py -------------------+--> AutoTokenizer --> conversion_proof.py
             |                              | the proof finds a difference
             +-- cannot ---------------> model_folder.py: the .model itself, in a class that calls sentencepiece

The folder is loaded with ``AutoTokenizer`` and compared with the source before it is handed over. A tokenizer.json is
preferred: every program reads it, in version 4 and 5 of transformers, and it decodes as sentencepiece does.

Documents are trained as ``<s> ... </s>``, so by default a prompt begins with ``<s>`` and has nothing behind it, in
every program that reads the folder (``reader_settings.py``). ``add_special_tokens=False`` gives sentencepiece's
``encode``. Who wants ``<s>`` in a text to be a control token passes ``split_special_tokens=False``.

The class named beside a tokenizer.json is ``PreTrainedTokenizerFast`` (an alias of ``TokenizersBackend`` in
transformers 5): it takes the file as it is. ``LlamaTokenizer`` would rebuild normalizer and merges by its own rules.
Ids were equal in transformers 4.50, 4.57 and 5.23, with and without a Llama ``config.json`` beside them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_hammer.base.errors import RefusedError
from megatron_hammer.base.files import dump_json, publish, replace_file, staging_path, sync_folder
from megatron_hammer.base.reading import parse_json, read_regular
from megatron_hammer.tokenizer.conversion_proof import prove_conversion, prove_ids
from megatron_hammer.tokenizer.definition import definition_of
from megatron_hammer.tokenizer.huggingface_backend import STAND_IN_PAD, HuggingFaceTokenizer
from megatron_hammer.tokenizer.interface import Tokenizer
from megatron_hammer.tokenizer.load import load_tokenizer
from megatron_hammer.tokenizer.model_folder import model_obstacle, write_model_folder
from megatron_hammer.tokenizer.pieces import SPACE
from megatron_hammer.tokenizer.reader_settings import begin_with, settings_for_readers, special_tokens
from megatron_hammer.tokenizer.sentencepiece_backend import SentencePieceTokenizer, parse_model
from megatron_hammer.tokenizer.tokenizer_files import read_tokenizer_json

TOKENIZER_CLASS = "PreTrainedTokenizerFast"


def convert_tokenizer(
    tokenizer: Tokenizer, directory: Path, begin_with_bos: bool | None = None, max_length: int | None = None
) -> str:
    """Write a Hugging Face tokenizer folder and prove that its ids equal the tokenizer's.

    Writes ``tokenizer.json``, whose decoding is proved too, and ``tokenizer_config.json``; for sentencepiece also
    ``tokenizer.model`` (unchanged) and ``special_tokens_map.json``. Where there is no such tokenizer.json, the model's
    file and a ``tokenizer_config.json`` alone (``model_folder.py``). Of a ``tokenizer.json`` that is given, at most the
    post-processor is changed. The folder must exist, and what is in it after an error is the caller's to remove.

    Args:
        begin_with_bos: whether prompts begin with bos by default; None: as a tokenizer.json that is given says, and
            where there is a bos, for sentencepiece.
        max_length: tokens that the model reads at most.

    Returns:
        why the folder has the sentencepiece model and no tokenizer.json; an empty string where it has one.

    Raises:
        RefusedError: E501 neither form can have the model's ids; E502 the proof found a text with other ids or another
            decoding.
    """
    directory = Path(directory)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        _convert_given(tokenizer, directory, begin_with_bos, max_length)
        return ""
    assert isinstance(tokenizer, SentencePieceTokenizer), f"no conversion for {tokenizer!r}"
    return _convert_model(tokenizer, directory, begin_with_bos is not False, max_length)


def _convert_model(tokenizer: SentencePieceTokenizer, directory: Path, begins: bool, max_length: int | None) -> str:
    """With a tokenizer.json where one gives the same ids, else as a folder around the model."""
    proto = parse_model(tokenizer.model_bytes, tokenizer.path)
    texts = [piece.piece.replace(SPACE, " ") for piece in proto.pieces]
    tokenizer.save_files(directory)
    try:
        definition, directed = definition_of(proto, tokenizer.path)
        backend = _write_definition(tokenizer, directory, definition, begins)
        special = special_tokens(tokenizer, backend)
        settings = {
            **special,
            "split_special_tokens": True,
            "model_input_names": ["input_ids", "attention_mask"],  # a Llama takes no token_type_ids
            "clean_up_tokenization_spaces": False,
            **settings_for_readers(definition, backend, tokenizer, max_length),
        }
        _write_settings(tokenizer, directory, settings)
        replace_file(directory / "special_tokens_map.json", dump_json(special))
        prove_conversion(tokenizer, directory, texts, directed, begins_with_bos=begins)
        return ""
    except RefusedError as error:
        why = error.rule.replace("and its Hugging Face form", "and a tokenizer.json")
    _convert_around_model(tokenizer, proto, texts, directory, begins, max_length, why)
    return why


def _convert_around_model(
    tokenizer: SentencePieceTokenizer, proto: Any, texts: list[str], directory: Path, begins: bool,
    max_length: int | None, why: str,
) -> None:  # fmt: skip
    """In place of a tokenizer.json, which cannot have the model's ids: ``why``."""
    for name in ("tokenizer.model", "tokenizer.json", "special_tokens_map.json"):
        (directory / name).unlink(missing_ok=True)
    if obstacle := model_obstacle(tokenizer, proto):
        raise RefusedError(
            1, str(tokenizer.path), f"{why}, and {obstacle}: there is no exact form for transformers",
            "train or choose a model with byte fallback, or use the .model itself",
        )  # fmt: skip
    write_model_folder(tokenizer, proto, directory, begins, max_length, why)
    prove_ids(tokenizer, directory, texts, begins_with_bos=begins)


def _convert_given(
    tokenizer: HuggingFaceTokenizer, directory: Path, begin_with_bos: bool | None, max_length: int | None
) -> None:
    tokenizer.save_files(directory)
    definition = read_tokenizer_json(directory / "tokenizer.json")
    settings = parse_json(read_regular(directory / "tokenizer_config.json"))
    settings.pop("auto_map", None)  # would run code from elsewhere instead of tokenizer.json
    backend = _write_definition(tokenizer, directory, definition, begin_with_bos)
    _write_settings(tokenizer, directory, settings | settings_for_readers(definition, backend, tokenizer, max_length))
    prove_conversion(tokenizer, directory, [], [], begins_with_bos=begin_with_bos)


def _write_settings(tokenizer: Tokenizer, directory: Path, settings: dict[str, Any]) -> None:
    """tokenizer_config.json beside a tokenizer.json."""
    if tokenizer.pad_id is None:
        settings[STAND_IN_PAD] = True
    replace_file(directory / "tokenizer_config.json", dump_json({**settings, "tokenizer_class": TOKENIZER_CLASS}))


def _write_definition(
    tokenizer: Tokenizer, directory: Path, definition: dict[str, Any], begin_with_bos: bool | None
) -> Any:
    """Write tokenizer.json where it is made or changed here, and load it with the tokenizers library."""
    from tokenizers import Tokenizer as Backend

    path = directory / "tokenizer.json"
    backend = Backend.from_str(json.dumps(definition))
    if begin_with_bos is not None:
        bos = tokenizer.bos_id if begin_with_bos else None
        begin_with(definition, {} if bos is None else {str(backend.id_to_token(bos)): bos})
        backend = Backend.from_str(json.dumps(definition))
    if not path.is_file() or read_tokenizer_json(path) != definition:
        replace_file(path, json.dumps(definition, ensure_ascii=False).encode())
    return backend


def publish_tokenizer(
    source: str | Path, output: str | Path, tiktoken_pattern: str | None = None, special_tokens: Sequence[str] = ()
) -> tuple[Tokenizer, str]:
    """Convert into a folder that appears at ``output`` only when it is proved.

    It is put together beside ``output`` and renamed; after an error nothing is left there.

    Args:
        tiktoken_pattern: as ``load_tokenizer``; ``special_tokens`` too.

    Returns:
        the source, loaded, and what ``convert_tokenizer`` returns.

    Raises:
        RefusedError: E506 there is something at ``output``; and what ``convert_tokenizer`` raises.
        DataError: what ``load_tokenizer`` raises.
    """
    target = Path(output).resolve()  # a link to an empty folder is that folder
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        rule = "is not empty" if target.is_dir() else "is a file"
        raise RefusedError(6, str(output), rule, "name a new folder, or move that away")
    if target.suffix.lower() in (".json", ".model", ".tiktoken", ".zip") and not target.exists():
        rule = "is a file's name, and a folder of several files is written"
        raise RefusedError(6, str(output), rule, f"name the folder: {Path(output).with_suffix('')}")
    tokenizer = load_tokenizer(source, tiktoken_pattern, special_tokens)
    staging = staging_path(target)
    staging.mkdir(parents=True)
    try:
        why = convert_tokenizer(tokenizer, staging)
        sync_folder(staging)
        publish(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # gone already after the rename
    return tokenizer, why


def form_line(why: str) -> str:
    """For people: the form that ``convert_tokenizer`` wrote, from what it returned."""
    if not why:
        return "tokenizer.json"
    return (
        f"the sentencepiece model, which transformers hands to the sentencepiece library, for it {why}; "
        "tokenizer.sp_model.decode(ids) is the text of ids"
    )


# ---- what is known without converting ----

QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How ``Qwen2Tokenizer`` of transformers 5 cuts a text into words."""
QWEN2_READS = "transformers reads the tokenizer of every model of kind qwen2 with Qwen2's own class"
QWEN2_CURE = "as Qwen3 (model.qk_norm=true) or Llama (model.qkv_bias=false)"


def conversion_obstacle(tokenizer: Tokenizer) -> str:
    """Why a tokenizer cannot be exported exactly, or an empty string: what is known without converting it."""
    if tokenizer.always_converts:
        return ""
    assert isinstance(tokenizer, SentencePieceTokenizer), f"{tokenizer!r} has a tokenizer.json"
    proto = parse_model(tokenizer.model_bytes, tokenizer.path)
    if not (obstacle := model_obstacle(tokenizer, proto)):
        return ""
    try:
        definition_of(proto, tokenizer.path)
        return ""
    except RefusedError as error:
        return f"{tokenizer.path} {error.rule}, and {obstacle}"


def export_note(tokenizer: Tokenizer, family: str | None = None) -> str:
    """What whoever begins to use a tokenizer should know of its export, or an empty string.

    Args:
        family: transformers' name of the model's kind, where there is one already.
    """
    obstacle, cure = conversion_obstacle(tokenizer), ""
    if not obstacle and family == "qwen2" and not _splits_as_qwen2(tokenizer):
        obstacle = f"{QWEN2_READS}, which splits text in another way than {tokenizer.path}"
        cure = f"; {QWEN2_CURE} it is"
    if not obstacle:
        return ""
    return (
        f"{obstacle}: a model trained with it is exported with the tokenizer's files as they are or without any "
        f"(checkpoint_to_hf.py --tokenizer as-is|none), not with one that transformers loads{cure}"
    )


def _splits_as_qwen2(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer.json does to a text what ``Qwen2Tokenizer`` of transformers 5 does with any vocabulary."""
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return False
    normalizer, split = (tokenizer.definition.get(name) or {} for name in ("normalizer", "pre_tokenizer"))
    words, *rest = split.get("pretokenizers") or [split]
    pattern = words.get("pattern") or {}
    return (
        normalizer.get("type") == "NFC"
        and pattern == {"Regex": QWEN2_WORDS}
        and (words.get("behavior"), words.get("invert")) == ("Isolated", False)
        and [(step.get("type"), step.get("add_prefix_space")) for step in rest] == [("ByteLevel", False)]
    )
