"""Writes a tokenizer as a Hugging Face folder that gives the same ids, and tests that before it is used.

The stock conversion of a sentencepiece model goes wrong for merged vocabularies (HammerLLM's is one): it ranks merges
by piece id, where id order is not score order, and it prepends a space that the model does not ask for. Here the
``tokenizer.json`` is derived from what sentencepiece's BPE does, step by step:

sentencepiece                                           tokenizer.json
------------------------------------------------------  ---------------------------------------------------------------
space becomes U+2581; perhaps one is put in front       normalizer: [Prepend,] Replace
user-defined symbols: longest match, never merged       added tokens, not special, matched after the normalizer
merge the adjacent pair whose piece scores best;        one merge a piece, ranked by score; among equal scores in an
of equal scores the leftmost                            order that keeps "leftmost" (``bpe_merges.py``)
a character without a piece becomes bytes               byte_fallback
a NUL piece, or a single character declared unused,     its entry has a name that no text can spell
is never emitted
``<s>`` in a text is text                               ``split_special_tokens`` in tokenizer_config.json

*Unigram models are refused.* The tokenizers library has that algorithm too, but adds up scores in float64 where
sentencepiece does in float32, and of splits that are equal but for rounding (``oc|ation`` against ``oca|tion``; a long
run of spaces in two pieces) it finds another one. Tried with a 6,000-piece model, byte and control pieces put out of
the reach of text and user-defined symbols scored as sentencepiece does: 1 % of 100,000 fuzz strings, 0.6 % of Chinese,
2 % of English and 7 % of code documents still differed.

The folder is loaded with ``AutoTokenizer`` and compared with the source before it is handed over
(``conversion_proof.py``).

Documents are trained as ``<s> ... </s>``, so by default a prompt begins with ``<s>`` and has nothing behind it, in
every program that reads the folder (``reader_settings.py``). ``add_special_tokens=False`` gives sentencepiece's
``encode``. Who wants ``<s>`` in a text to be a control token passes ``split_special_tokens=False``.

The class named in the folder is ``PreTrainedTokenizerFast`` (an alias of ``TokenizersBackend`` in transformers 5): it
takes tokenizer.json as it is. ``LlamaTokenizer`` would rebuild normalizer and merges by its own rules. Ids were equal
in transformers 4.50, 4.57 and 5.23, with and without a Llama ``config.json`` beside them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_hammer.base.errors import RefusedError
from megatron_hammer.base.files import dump_json, publish, replace_file, sync_folder
from megatron_hammer.tokenizer.bpe_merges import Pair, derive_merges, is_never_emitted, not_expressible
from megatron_hammer.tokenizer.conversion_proof import prove_conversion
from megatron_hammer.tokenizer.huggingface_backend import STAND_IN_PAD, HuggingFaceTokenizer
from megatron_hammer.tokenizer.interface import Tokenizer
from megatron_hammer.tokenizer.load import load_tokenizer
from megatron_hammer.tokenizer.pieces import SPACE
from megatron_hammer.tokenizer.reader_settings import begin_with, padding_id, settings_for_readers
from megatron_hammer.tokenizer.sentencepiece_backend import SentencePieceTokenizer, parse_model

TOKENIZER_CLASS = "PreTrainedTokenizerFast"


def convert_tokenizer(
    tokenizer: Tokenizer, directory: Path, begin_with_bos: bool | None = None, max_length: int | None = None
) -> None:
    """Write a Hugging Face tokenizer folder and prove that its ids and its decoding equal the tokenizer's.

    Writes ``tokenizer.json`` and ``tokenizer_config.json``; for sentencepiece also ``tokenizer.model`` (unchanged) and
    ``special_tokens_map.json``. Of a ``tokenizer.json`` that is given, at most the post-processor is changed. The
    folder must exist, and what is in it after an error is the caller's to remove.

    Args:
        begin_with_bos: whether prompts begin with bos by default; None: as a tokenizer.json that is given says, and
            where there is a bos, for sentencepiece.
        max_length: tokens that the model reads at most.

    Raises:
        RefusedError: E501 the model uses something that tokenizer.json cannot express; E502 the proof found a text with
            other ids or another decoding.
    """
    directory = Path(directory)
    config: dict[str, Any]
    pieces: list[str] = []
    directed: list[str] = []
    if isinstance(tokenizer, SentencePieceTokenizer):
        proto = parse_model(tokenizer.model_bytes, tokenizer.path)
        _check_expressible(proto, tokenizer.path)
        merges, directed = derive_merges(proto, tokenizer.path)
        pieces = [piece.piece.replace(SPACE, " ") for piece in proto.pieces]
        tokenizer.save_files(directory)
        definition = _build_definition(proto, merges)
        config = {
            "split_special_tokens": True,
            "model_input_names": ["input_ids", "attention_mask"],  # a Llama takes no token_type_ids
            "clean_up_tokenization_spaces": False,
        }
        begin_with_bos = begin_with_bos is not False
    else:
        assert isinstance(tokenizer, HuggingFaceTokenizer), f"no conversion for {tokenizer!r}"
        tokenizer.save_files(directory)
        definition = json.loads((directory / "tokenizer.json").read_bytes())
        config = json.loads((directory / "tokenizer_config.json").read_bytes())
        config.pop("auto_map", None)  # would run code from elsewhere instead of tokenizer.json
    backend = _write_definition(tokenizer, directory, definition, begin_with_bos)
    special = {
        name: backend.id_to_token(token_id)
        for name, token_id in (
            ("bos_token", tokenizer.bos_id),
            ("eos_token", tokenizer.eos_id),
            ("unk_token", tokenizer.unk_id),
            ("pad_token", padding_id(tokenizer)),
        )
        if token_id is not None
    }
    if tokenizer.pad_id is None:
        config[STAND_IN_PAD] = True
    if isinstance(tokenizer, SentencePieceTokenizer):
        config = special | config
        replace_file(directory / "special_tokens_map.json", dump_json(special))
    config |= settings_for_readers(definition, backend, tokenizer, max_length)
    replace_file(directory / "tokenizer_config.json", dump_json({**config, "tokenizer_class": TOKENIZER_CLASS}))
    prove_conversion(tokenizer, directory, pieces, directed, begins_with_bos=begin_with_bos)


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
    if not path.is_file() or json.loads(path.read_bytes()) != definition:
        replace_file(path, json.dumps(definition, ensure_ascii=False).encode())
    return backend


def publish_tokenizer(
    source: str | Path, output: str | Path, tiktoken_pattern: str | None = None, special_tokens: Sequence[str] = ()
) -> Tokenizer:
    """Convert into a folder that appears at ``output`` only when it is proved.

    It is put together beside ``output`` and renamed; after an error nothing is left there.

    Args:
        tiktoken_pattern: as ``load_tokenizer``; ``special_tokens`` too.

    Returns:
        the source, loaded.

    Raises:
        RefusedError: E506 there is something at ``output``; and what ``convert_tokenizer`` raises.
        DataError: what ``load_tokenizer`` raises.
    """
    target = Path(output).resolve()  # a link to an empty folder is that folder
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        rule = "is not empty" if target.is_dir() else "is a file"
        raise RefusedError(6, str(output), rule, "name a new folder, or move that away")
    tokenizer = load_tokenizer(source, tiktoken_pattern, special_tokens)
    staging = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    staging.mkdir(parents=True)
    try:
        convert_tokenizer(tokenizer, staging)
        sync_folder(staging)
        publish(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # gone already after the rename
    return tokenizer


# ---- what tokenizer.json can express ----


def conversion_obstacle(tokenizer: Tokenizer) -> str:
    """Why a tokenizer cannot be exported exactly, or an empty string: what is known without converting it."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return ""
    try:
        _check_expressible(parse_model(tokenizer.model_bytes, tokenizer.path), tokenizer.path)
    except RefusedError as error:
        return f"{error.what} {error.rule}"
    return ""


def export_note(tokenizer: Tokenizer) -> str:
    """What whoever begins to use a tokenizer should know of its export, or an empty string."""
    obstacle = conversion_obstacle(tokenizer)
    if not obstacle:
        return ""
    return (
        f"{obstacle}: a model trained with it is exported with the .model as it is or without a tokenizer "
        "(checkpoint_to_hf.py --tokenizer as-is|none), not with one that transformers loads"
    )


def _check_expressible(proto: Any, path: Path) -> None:
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    symbols = any(piece.type == piece.USER_DEFINED for piece in proto.pieces)
    if trainer.model_type == trainer.UNIGRAM:
        raise RefusedError(
            1, str(path), "is a unigram model, and the tokenizers library rounds sums of scores otherwise, so that a "
            "tokenizer.json would differ on some texts",
            "use the .model itself: --tokenizer-model, tokenizer.path and all tools here take it; to export a model to "
            "Hugging Face, train its tokenizer with --model-type bpe",
        )  # fmt: skip
    reasons = (
        (trainer.model_type != trainer.BPE, "is not a BPE model"),
        (not trainer.byte_fallback, "has no byte fallback"),
        (bool(normalizer.precompiled_charsmap), f"normalises characters ({normalizer.name or 'a rule of its own'})"),
        (normalizer.remove_extra_whitespaces, "removes extra spaces"),
        (not normalizer.escape_whitespaces, "does not escape spaces"),
        (trainer.treat_whitespace_as_suffix, "puts spaces at the end of pieces"),
        (bool(proto.denormalizer_spec.precompiled_charsmap), "changes characters when decoding"),
        (normalizer.add_dummy_prefix and symbols, "has both a dummy prefix and user-defined symbols"),
    )
    for found, rule in reasons:
        if found:
            raise not_expressible(path, rule)


# ---- tokenizer.json ----


def _build_definition(proto: Any, merges: list[Pair]) -> dict[str, Any]:
    names = _vocabulary_names(proto)
    added = []
    for index, piece in enumerate(proto.pieces):
        control = piece.type in (piece.CONTROL, piece.UNKNOWN)
        # A symbol with a raw space never matches: the space of the text is escaped before symbols are looked for.
        if control or (piece.type == piece.USER_DEFINED and " " not in piece.piece):
            added.append(
                {
                    "id": index,
                    "content": names[index],
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": not control,
                    "special": control,
                }
            )
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    undo: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    normalizer: dict[str, Any] = spaces
    if proto.normalizer_spec.add_dummy_prefix:
        normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, spaces]}
        undo.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": undo},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": next(names[i] for i, piece in enumerate(proto.pieces) if piece.type == piece.UNKNOWN),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {name: index for index, name in enumerate(names)},
            "merges": [list(pair) for pair in merges],
        },
    }


def _vocabulary_names(proto: Any) -> list[str]:
    """The pieces by id; those that are never emitted under a name that is too long to be met as a character."""
    taken = {piece.piece for piece in proto.pieces}
    names = []
    for index, piece in enumerate(proto.pieces):
        name = piece.piece
        if is_never_emitted(piece):
            name = f"<unused_{index}>"
            while name in taken:
                name = f"<{name}>"
            taken.add(name)
        names.append(name)
    return names
