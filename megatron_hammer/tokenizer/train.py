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

HammerLLM's algorithm is BPE. Unigram is trained by the same recipe and has every use that a ``.model`` has, but it has
no exact ``tokenizer.json`` (``convert.py`` says why), so a model trained with it cannot be exported.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from megatron_hammer.base.errors import ConfigError, DataError
from megatron_hammer.base.files import dump_json, replace_file
from megatron_hammer.tokenizer.pieces import SPACE
from megatron_hammer.tokenizer.sentencepiece_backend import SentencePieceTokenizer, parse_model, quiet_sentencepiece

MAX_SENTENCE_BYTES = 8384
"""HammerLLM's max_sentence_length."""
SAMPLE_BYTES = 100_000_000
"""Text that training keeps at most. sentencepiece 0.2.3 takes 21 bytes of memory for each byte of Chinese (measured on
10 MB), so this asks for some 2 GB; the amount itself is chosen by eye."""
ModelType = Literal["bpe", "unigram"]
UNIGRAM_THREADS = 8
"""Unigram training adds up its counts thread by thread, so its result depends on their number: it is fixed. Chosen by
eye; on fewer cores they take turns."""
REPORT_SECONDS = 10
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
BYTE_PIECES = 256
_CONTROL_PIECES = ("<unk>", "<s>", "</s>")

# The trainer drops a whole sentence that holds its word boundary (tab) or its mark for unknown characters (U+2585),
# and no piece may hold NUL. A literal U+2581 would be counted as a space. Cutting there costs nothing: no piece can
# span one.
_RESERVED = re.compile("[\t\0\u2585" + SPACE + "]+")
_SENTENCE_ENDS = tuple(mark.encode() for mark in "。！？；，")


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
    _check_settings(vocab_size, character_coverage, max_sentence_bytes, sample_bytes, threads)
    symbols = check_symbols(user_defined_symbols)
    minimum = len(_CONTROL_PIECES) + BYTE_PIECES + len(symbols) + 1
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
        f"training {vocab_size:,} {model_type} pieces on {sample.kept_bytes / 1e6:.1f} of "
        f"{sample.seen_bytes / 1e6:.1f} MB of text, read in {time.monotonic() - started:.1f} s"
    )
    settings = {
        "model_type": model_type,
        "vocab_size": vocab_size,
        "character_coverage": character_coverage,
        "user_defined_symbols": symbols,
        "required_chars": required_characters,
        "max_sentence_length": max_sentence_bytes,
    }
    with _report_meanwhile("training", report):
        model = _run_sentencepiece(sample.sentences, settings, threads if model_type == "bpe" else UNIGRAM_THREADS)

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


def read_symbols(path: str | Path) -> list[str]:
    """User-defined symbols from a file: one literal string a line (no escapes are decoded), empty lines left out.

    Raises:
        ConfigError: E261.
    """
    return [line for line in _read_text(Path(path)).split("\n") if line]


def read_characters(path: str | Path) -> str:
    """Required characters from a file: every character that is not white space counts.

    Raises:
        ConfigError: E261.
    """
    return "".join(dict.fromkeys("".join(_read_text(Path(path)).split())))


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except OSError as error:
        raise ConfigError(61, str(path), f"cannot be read: {error.strerror}", "check the path") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            61, str(path), f"is not valid UTF-8 at byte {error.start}", "save it as UTF-8, one entry a line"
        ) from None


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
            raise ConfigError(62, f"{name}={value}", f"must be from {low} to {high}", "choose a value in that range")


def check_symbols(symbols: Sequence[str]) -> list[str]:
    """The symbols as pieces: spaces escaped as in every piece, so that they match where the text has a space."""
    pieces: list[str] = []
    for symbol in symbols:
        piece = symbol.replace(" ", SPACE)
        rule = None
        if not piece:
            rule = "is empty"
        elif "\0" in piece:
            rule = "holds NUL, which no piece may"
        elif piece in _CONTROL_PIECES or re.fullmatch("<0x[0-9A-F]{2}>", piece):
            rule = "is the name of a control or byte piece"
        elif piece in pieces:
            rule = "occurs twice"
        if rule:
            raise ConfigError(61, f"user-defined symbol {symbol!r}", rule, "remove it from the list")
        pieces.append(piece)
    return pieces


# ---- text ----


def split_sentences(text: str, max_bytes: int) -> Iterator[bytes]:
    """Cut a document into stretches of UTF-8 of at most ``max_bytes``, at places where training loses least.

    The best place is before a run of spaces, where the trainer cuts words anyway; then after a line break, then after
    Chinese punctuation; failing all, between two characters.
    """
    for stretch in _RESERVED.split(text):
        rest = stretch.encode("utf-8")
        while len(rest) > max_bytes:
            cut = _find_cut(rest, max_bytes)
            yield rest[:cut]
            rest = rest[cut:]
        if rest:
            yield rest


def _find_cut(data: bytes, max_bytes: int) -> int:
    half = max_bytes // 2  # a cut further left would make too many short stretches
    window = data[:max_bytes]
    space = window.rfind(b" ")
    if space >= 0:
        start = len(window[: space + 1].rstrip(b" "))  # of the run of spaces
        if start > half:
            return start
    newline = window.rfind(b"\n") + 1
    if newline > half:
        return newline
    mark = max(window.rfind(mark) + len(mark) if mark in window else 0 for mark in _SENTENCE_ENDS)
    if mark > half:
        return mark
    cut = max_bytes
    while data[cut] & 0xC0 == 0x80:  # inside a character
        cut -= 1
    return cut


class HashSample:
    """The sentences with the smallest hashes that fit into ``limit`` bytes: a random choice that depends on them alone.

    Streaming: a heap keeps the largest hash on top; once a hash was too large it stays so, whatever comes later, and
    therefore the outcome is the same for every order of the input.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.seen_bytes = self.kept_bytes = 0
        self._cut: bytes | None = None
        self._heap: list[tuple[bytes, bytes]] = []  # (inverted hash, sentence)

    def add(self, sentence: bytes, key: bytes = b"") -> None:
        """Offer a sentence; with a key of its own (its place, say), equal ones are chosen one by one."""
        self.seen_bytes += len(sentence)
        inverted = bytes(255 - byte for byte in hashlib.blake2b(sentence, digest_size=8, key=key).digest())
        if self._cut is not None and inverted <= self._cut:
            return
        heapq.heappush(self._heap, (inverted, sentence))
        self.kept_bytes += len(sentence)
        while self.kept_bytes > self.limit:
            self._cut, dropped = heapq.heappop(self._heap)
            self.kept_bytes -= len(dropped)
            while self._heap and self._heap[0][0] == self._cut:  # equal sentences stay or go together
                self.kept_bytes -= len(heapq.heappop(self._heap)[1])

    @property
    def sentences(self) -> list[bytes]:
        return [sentence for _, sentence in sorted(self._heap)]


def _sample_sentences(
    source: TextSource, max_sentence_bytes: int, sample_bytes: int, report: Callable[[str], None]
) -> HashSample:
    from tqdm import tqdm

    sample = HashSample(sample_bytes)
    next_report = time.monotonic() + REPORT_SECONDS
    # On a terminal a bar, in a log a line every ten seconds.
    with tqdm(desc="reading text", unit="B", unit_scale=True, disable=not sys.stderr.isatty(), leave=False) as bar:
        for text in source:
            before = sample.seen_bytes
            for sentence in split_sentences(text, max_sentence_bytes):
                sample.add(sentence)
            bar.update(sample.seen_bytes - before)
            if time.monotonic() > next_report:
                next_report += REPORT_SECONDS
                report(f"read {sample.seen_bytes / 1e6:.0f} MB of text")
    return sample


# ---- sentencepiece ----


@contextmanager
def _report_meanwhile(doing: str, report: Callable[[str], None]) -> Iterator[None]:
    """A line every ten seconds that it is still at work: the library says nothing, but lets other threads run."""
    done = threading.Event()
    started = time.monotonic()

    def watch() -> None:
        while not done.wait(REPORT_SECONDS):
            report(f"{doing}: still at work, {time.monotonic() - started:.0f} s so far")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


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
    return proto.SerializeToString(deterministic=True)


def _name_complaint(message: str, vocab_size: int) -> ConfigError:
    what = f"vocab_size={vocab_size}"
    if found := re.search(r"too high \(\d+\).*?<= ?(\d+)", message):
        return ConfigError(
            60, what, f"is more than this text can fill: it has {found[1]} pieces",
            f"use at most {found[1]}, or train on more text",
        )  # fmt: skip
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
