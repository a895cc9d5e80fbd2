"""Recognises the format or encoding of a file that is not UTF-8 text, and says how to turn it into UTF-8 text.

Only for messages: nothing is converted. An encoding is guessed from which bytes are frequent, and is called a guess.
"""

from __future__ import annotations

import codecs
import shlex
from pathlib import Path

_OFFICE = "save it as plain text (.txt, UTF-8) in the program that made it"
_DATASET = "it is preprocessed already: name it in data.train, without its ending"
_FORMATS = (
    (b"%PDF-", "a PDF file", "run: pdftotext -enc UTF-8 FILE NEW.txt"),
    (b"PK\x03\x04", "a zip archive", "unpack it, and name the text in it"),
    (b"\xd0\xcf\x11\xe0", "an old Office document (.doc, .xls)", _OFFICE),
    (b"{\\rtf", "a rich text document (.rtf)", _OFFICE),
    (b"PAR1", "a parquet file, but its name does not say so", "rename it to end in .parquet"),
    (b"MMIDIDX", "the index of a dataset, which is made of text", _DATASET),
    (b"\x89PNG", "a picture (.png)", "name files of text"),
    (b"\xff\xd8\xff", "a picture (.jpg)", "name files of text"),
    (b"SQLite format", "a database", "write its texts as JSON lines first"),
    (b"\x80\x02", "a file of Python's pickle", "write its texts as JSON lines first"),
    (b"BZh", "compressed by bzip2, which is not read here", "run: bunzip2 FILE"),
    (b"\xfd7zXZ", "compressed by xz, which is not read here", "run: unxz FILE"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it, and name the text in it"),
)
"""First bytes, what they mean, the remedy."""

_ZIPPED = {".docx": "a Word document", ".xlsx": "an Excel table", ".pptx": "a PowerPoint file", ".epub": "an e-book",
           ".odt": "an OpenDocument text"}  # fmt: skip
_SAMPLE_BYTES = 1 << 16
_MARKS = {codecs.BOM_UTF8: "UTF-8", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


def format_of(path: Path, data: bytes | bytearray) -> tuple[str, str] | None:
    """What a file is by its first bytes, such as "a PDF file", and the remedy; None for what may be text."""
    for begin, what, remedy in _FORMATS:
        if data.startswith(begin):
            if begin == b"PK\x03\x04" and path.suffix.lower() in _ZIPPED:
                return f"{_ZIPPED[path.suffix.lower()]} ({path.suffix})", _OFFICE
            return what, remedy.replace("FILE", shlex.quote(str(path)))
    if data[:1] == b"\n" and b"<unk>" in bytes(data[:64]):
        return "a sentencepiece model", "name files of text; a tokenizer goes behind --tokenizer-model"
    if path.suffix == ".bin" and path.with_suffix(".idx").is_file():
        return "the tokens of a dataset, which are made of text", _DATASET
    if path.suffix.lower() in (".csv", ".tsv", ".html", ".htm", ".xml") and data[:1] != b"{":
        return (
            f"no JSON lines and no plain text ({path.suffix})",
            'write its texts as lines {"text": "..."} in a .jsonl',
        )
    head = bytes(data[:4096])
    if b"\0" in head and not _decodes(head, "utf-8") and not (encoding_of(data) or "").startswith("UTF-16"):
        return "no text: it has NUL bytes", "name files of text"
    return None


def byte_order_mark(data: bytes | bytearray) -> str | None:
    """The encoding whose byte order mark the data begin with."""
    return next((encoding for mark, encoding in _MARKS.items() if data.startswith(mark)), None)


def encoding_of(data: bytes | bytearray) -> str | None:
    """The likely encoding of text that is no UTF-8, by a name that iconv knows; None where nothing fits."""
    sample = bytes(memoryview(data)[:_SAMPLE_BYTES])
    if byte_order_mark(sample) == "UTF-16":
        return "UTF-16"
    for encoding, first in (("UTF-16LE", 1), ("UTF-16BE", 0)):  # Latin text has a zero in every second byte
        if sample and sample[first::2].count(0) > 0.4 * len(sample) / 2:
            return encoding
    high = sum(byte >= 0x80 for byte in sample)
    pairs = _pairs(sample)
    leads, trails = [first for first, _ in pairs], [second for _, second in pairs]
    if pairs and 2 * len(pairs) >= 0.6 * high:
        # The frequent characters of GB2312 and of Korean have a high second byte; of Big5 four in ten have a low one.
        if _decodes(sample, "gb18030") and _share(leads, 0xA1, 0xD7) >= 0.8 and _share(trails, 0xA1, 0xFE) >= 0.85:
            korean = len(leads) >= 20 and _share(leads, 0xA1, 0xC8) > 0.99 and _decodes(sample, "euc_kr")
            return "EUC-KR" if korean else "GB18030"
        if _decodes(sample, "big5") and _share(leads, 0xA1, 0xC6) >= 0.8:
            return "BIG5"
    return "WINDOWS-1252" if high < 0.3 * len(sample) and _decodes(sample, "cp1252") else None


def to_utf8(path: Path, data: bytes | bytearray) -> str:
    """The remedy for text that is no UTF-8, as a command where the encoding can be guessed."""
    encoding = encoding_of(data)
    if encoding is None:
        return "convert the file to plain UTF-8"
    name = {"GB18030": "GB18030 (GBK, GB2312)"}.get(encoding, encoding)
    return f"it looks like {name}: run iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > NEW{path.suffix}"


def without_mark(path: Path, encoding: str) -> str:
    """The remedy for a byte order mark."""
    if encoding == "UTF-8":
        return f"take its three bytes away: tail -c +4 {shlex.quote(str(path))} > NEW{path.suffix}"
    return f"run iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > NEW{path.suffix}"


def _pairs(sample: bytes) -> list[tuple[int, int]]:
    """The pairs of bytes that a Chinese or Korean encoding would see as one character."""
    pairs, place = [], 0
    while place < len(sample) - 1:
        if sample[place] < 0x80:
            place += 1
            continue
        if sample[place + 1] >= 0x40:
            pairs.append((sample[place], sample[place + 1]))
        place += 2
    return pairs


def _share(values: list[int], lowest: int, highest: int) -> float:
    return sum(lowest <= value <= highest for value in values) / len(values)


def _decodes(sample: bytes, encoding: str) -> bool:
    try:
        codecs.getincrementaldecoder(encoding)().decode(sample, final=False)  # the sample may end within a character
    except UnicodeDecodeError:
        return False
    return True
