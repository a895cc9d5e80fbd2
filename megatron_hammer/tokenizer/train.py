"""Train a sentencepiece tokenizer, BPE or unigram, with HammerLLM's settings as defaults.

    documents --> sentences (cut where no piece can span) --> sample by hash --> sentencepiece --> tokenizer.model

Pieces of the result: unk 0, bos 1, eos 2, no pad; 256 byte pieces, so that every text can be encoded; no dummy prefix,
no normalisation, no whitespace lost: ``decode(encode(text)) == text`` for every text without a literal U+2581 (which
sentencepiece reads as a space).

Line breaks are text. sentencepiece's own file reader takes every line for a sentence of its own, so a tokenizer
trained that way never sees one and spends a byte piece on each; here a sentence is a stretch of a document with its
line breaks inside, and pieces such as ``):\\n`` are learned. A tab cannot be learned (the library keeps it for itself
and would skip the whole sentence): it stays the byte piece ``<0x09>``, which is one id as well.

The result depends on the text alone: not on the order or the number of files, not on the number of threads.

HammerLLM's algorithm is BPE. Unigram is trained by the same recipe and has every use that a ``.model`` has, but no
exact ``tokenizer.json`` (``definition.py`` says why): exports hold the ``.model`` itself (``model_folder.py``).
"""

from __future__ import annotations

import hashlib
import io
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from megatron_hammer.base.characters import share_meant
from megatron_hammer.base.errors import ConfigError, DataError
from megatron_hammer.base.files import dump_json, replace_file
from megatron_hammer.base.progress import Activity, Progress, size_of
from megatron_hammer.tokenizer.sentencepiece_backend import SentencePieceTokenizer, parse_model, quiet_sentencepiece
from megatron_hammer.tokenizer.sentences import HashSample, split_sentences
from megatron_hammer.tokenizer.symbols import CONTROL_PIECES, check_symbols

MAX_SENTENCE_BYTES = 8384
"""HammerLLM's max_sentence_length."""
SAMPLE_BYTES = 100_000_000
"""Text that training keeps at most. sentencepiece 0.2.3 takes 21 bytes of memory for each byte of Chinese (measured on
10 MB), so this asks for some 2 GB; the amount itself is chosen by eye."""
ModelType = Literal["bpe", "unigram"]
UNIGRAM_THREADS = 8
"""Unigram training adds up its counts thread by thread, so its result depends on their number: it is fixed. Chosen by
eye; on fewer cores they take turns."""
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
BYTE_PIECES = 256


class TextSource(Protocol):
    """What training reads: texts, and afterwards a description of where they came from (``corpus.TextCorpus``)."""

    def __iter__(self) -> Iterator[str]: ...

    def describe(self) -> list[dict[str, Any]]: ...


def train_tokenizer(
    source: TextSource,
    output: str | Path,
    vocab_size: int,
    *,
    model_type: ModelType = "bpe",
    character_coverage: float = 0.9995,
    user_defined_symbols: Sequence[str] = (),
    required_characters: str = "",
    max_sentence_bytes: int = MAX_SENTENCE_BYTES,
    sample_bytes: int = SAMPLE_BYTES,
    threads: int = 1,
    allow_fewer: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> SentencePieceTokenizer:
    """Train on ``source`` and write the model and a manifest of what it was made of.

    Args:
        source: the texts, and their description for the manifest.
        output: a name that ends in ``.model``, or a folder that gets ``tokenizer.model``; the manifest goes beside it
            as ``<stem>.manifest.json``.
        vocab_size: pieces in all, control, byte and user-defined ones included.
        model_type: the algorithm.
        character_coverage: share of all characters (by count) that get a piece of their own; the rest uses bytes.
        user_defined_symbols: literal strings that are always one piece. A space in one matches a space in text.
        required_characters: characters that get a piece however rare they are.
        max_sentence_bytes: longest stretch of text that the trainer sees at once.
        sample_bytes: of more text than this, sentences are chosen by their hash.
        threads: helps only the counting; the result is the same. Of no effect on unigram (``UNIGRAM_THREADS``).
        allow_fewer: train as many pieces as the text has where it cannot fill ``vocab_size``; else that is an error.
        report: gets a line at each phase, and one every ten seconds meanwhile.

    Returns:
        The trained tokenizer, loaded from the file written.

    Raises:
        ConfigError: E260 vocabulary that does not fit the text, E261 bad symbol, E262 setting out of range, E263
            another complaint of sentencepiece.
        DataError: E315 no text at all; and what the source raises.
    """
    if model_type not in get_args(ModelType):
        raise ConfigError(62, f"model_type={model_type}", "is neither bpe nor unigram", "choose one of the two")
    if not hasattr(source, "describe"):
        remedy = "give TextCorpus(['zh.jsonl']): files, folders or patterns"
        raise ConfigError(62, f"train_tokenizer({source!r:.80})", "is no corpus", remedy)
    _check_settings(vocab_size, character_coverage, max_sentence_bytes, sample_bytes, threads)
    symbols = check_symbols(user_defined_symbols)
    minimum = len(CONTROL_PIECES) + BYTE_PIECES + len(symbols) + 1
    if vocab_size < minimum:
        raise ConfigError(
            60, f"vocab_size={vocab_size}",
            f"leaves no room beside {minimum - 1} control, byte and user-defined pieces",
            f"use at least {minimum}, and some thousands for a useful tokenizer",
        )  # fmt: skip
    model_path = Path(output)
    if model_path.suffix != ".model":
        model_path = model_path / "tokenizer.model"

    started = time.monotonic()
    sample = _sample_sentences(source, max_sentence_bytes, sample_bytes, report)
    if not sample.sentences:
        raise DataError(15, "the input", "holds no text to train a tokenizer on", "give documents that are not empty")
    report(
        f"training {vocab_size:,} {model_type} pieces on {size_of(sample.kept_bytes)} of "
        f"{size_of(sample.seen_bytes)} of text, read in {time.monotonic() - started:.1f} s"
    )
    if not any(b" " in sentence for sentence in sample.sentences):
        report("this text has no blank: it gets a piece all the same")  # else three bytes, which read back as U+2581
        required_characters += "\u2581"
    settings = {
        "model_type": model_type,
        "vocab_size": vocab_size,
        "character_coverage": character_coverage,
        "user_defined_symbols": symbols,
        "required_chars": required_characters,
        "max_sentence_length": max_sentence_bytes,
    }
    with Activity("training", report):
        threads = threads if model_type == "bpe" else UNIGRAM_THREADS
        try:
            model = _run_sentencepiece(sample.sentences, settings, threads)
        except _MoreThanTextHas as error:
            if not allow_fewer:
                raise
            report(f"this text has {error.pieces:,} pieces and no more: {error.pieces:,} are trained")
            settings["vocab_size"] = error.pieces
            model = _run_sentencepiece(sample.sentences, settings, threads)

    model_path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(model_path, model)
    tokenizer = SentencePieceTokenizer(model_path)
    manifest = {
        "inputs": source.describe(),
        "settings": settings | {"sample_bytes": sample_bytes},
        "text_bytes": sample.seen_bytes,
        "sampled_bytes": sample.kept_bytes,
        "fingerprint": tokenizer.fingerprint,
        "sha256": hashlib.sha256(model).hexdigest(),
        "sentencepiece": _sentencepiece_version(),
    }
    replace_file(model_path.with_name(model_path.stem + ".manifest.json"), dump_json(manifest))
    return tokenizer


# ---- settings ----


def _check_settings(
    vocab_size: int, character_coverage: float, max_sentence_bytes: int, sample_bytes: int, threads: int
) -> None:
    rules = (
        ("vocab_size", vocab_size, 1, 10_000_000),
        ("character_coverage", character_coverage, 0.98, 1.0),  # the library's own limits
        ("max_sentence_bytes", max_sentence_bytes, 64, 65_535),  # the trainer keeps positions in 16 bits
        ("sample_bytes", sample_bytes, 65_536, 1 << 40),
        ("threads", threads, 1, 128),
    )
    for name, value, low, high in rules:
        if not low <= value <= high:
            remedy = "choose a value in that range"
            if high == 1.0 and low <= value / 100 <= high:
                remedy = share_meant(value, "0.9995")
            raise ConfigError(62, f"{name}={value}", f"must be from {low} to {high}", remedy)


# ---- text ----


def _sample_sentences(
    source: TextSource, max_sentence_bytes: int, sample_bytes: int, report: Callable[[str], None]
) -> HashSample:
    sample = HashSample(sample_bytes)
    with Progress("reading text", None, report=report) as progress:
        for text in source:
            before = sample.seen_bytes
            for sentence in split_sentences(text, max_sentence_bytes):
                sample.add(sentence)
            progress.advance(sample.seen_bytes - before)
    return sample


# ---- sentencepiece ----


def _run_sentencepiece(sentences: list[bytes], settings: dict[str, Any], threads: int) -> bytes:
    """The trained model file; the library's complaints become ours."""
    import sentencepiece

    quiet_sentencepiece()
    written = io.BytesIO()
    arguments = {name: value for name, value in settings.items() if value not in ([], "")}
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=written,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            max_sentencepiece_length=32,
            shuffle_input_sentence=False,  # the order by hash is a shuffle already
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=-1,
            num_threads=threads,
            minloglevel=2,
            **arguments,
        )
    except RuntimeError as error:
        raise _name_complaint(str(error), settings["vocab_size"]) from None
    proto = parse_model(written.getvalue(), Path("the trained model"))
    proto.trainer_spec.ClearField("num_threads")  # the file must not depend on it either
    found = [piece.piece for piece in proto.pieces if piece.type == proto.SentencePiece.USER_DEFINED]
    assert found == settings["user_defined_symbols"], f"symbols {settings['user_defined_symbols']} became {found}"
    model: bytes = proto.SerializeToString(deterministic=True)
    return model


class _MoreThanTextHas(ConfigError):
    """The vocabulary is larger than the number of pieces that the text has."""

    def __init__(self, what: str, pieces: int) -> None:
        rule = f"is more than this text can fill: it has {pieces} pieces"
        super().__init__(60, what, rule, f"use at most {pieces} (or --allow-fewer), or train on more text")
        self.pieces = pieces


def _name_complaint(message: str, vocab_size: int) -> ConfigError:
    what = f"vocab_size={vocab_size}"
    if found := re.search(r"too high \(\d+\).*?<= ?(\d+)", message):
        return _MoreThanTextHas(what, int(found[1]))
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return ConfigError(
            60, what,
            f"cannot hold the {found[1]} control, byte, user-defined and single-character pieces of this text",
            f"use more than {found[1]}, or lower character_coverage",
        )  # fmt: skip
    cause = re.sub(r"^\w+: (src/\S+ )?(\[.*\] )?", "", message.strip().splitlines()[0] if message.strip() else "")
    return ConfigError(
        63, what, f"was refused by sentencepiece: {cause or message!r}", "change the settings or the text"
    )


def _sentencepiece_version() -> str:
    from importlib.metadata import version

    return version("sentencepiece")
