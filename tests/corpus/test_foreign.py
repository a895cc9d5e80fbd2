"""Files that are no UTF-8 text: the message names the format or the encoding, and the command that cures it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_hammer.base.errors import DataError
from megatron_hammer.corpus import long
from megatron_hammer.corpus.documents import TextCorpus
from megatron_hammer.corpus.readers import expand_inputs
from tests.corpus.reading import blocks_of, texts_of

CHINESE = "他说：“今天的天气很好，我们一起去公园散步吧。”大家都同意了，于是带上水和食物出发。\n"
TRADITIONAL = "他說：今天的天氣很好，我們一起去公園散步吧。大家都同意了，於是帶上水和食物出發。\n"
KOREAN = "오늘은 날씨가 아주 좋아서 우리는 함께 공원에 산책을 갔습니다 모두가 동의했습니다\n"
ENCODED = {
    "GBK": (CHINESE.encode("gbk"), "GB18030 (GBK, GB2312): run iconv -f GB18030 -t UTF-8"),
    "GB18030 and English": (("The weather. " + CHINESE).encode("gb18030"), "iconv -f GB18030"),
    "Big5": (TRADITIONAL.encode("big5"), "iconv -f BIG5"),
    "EUC-KR": (KOREAN.encode("euc_kr"), "iconv -f EUC-KR"),
    "Latin-1": ("Le café était fermé, et la fenêtre aussi.\n".encode("latin-1"), "iconv -f WINDOWS-1252"),
    "UTF-16 with a mark": (CHINESE.encode("utf-16"), "byte order mark (UTF-16); run iconv -f UTF-16"),
    "UTF-8 with a mark": (
        CHINESE.encode("utf-8-sig"),
        "byte order mark (UTF-8); take its three bytes away: tail -c +4",
    ),
}
FORMATS = {
    "a.docx": (b"PK\x03\x04\x14\0\x06\0rest", "is a Word document (.docx); save it as plain text"),
    "a.zip": (b"PK\x03\x04\x14\0\x06\0rest", "is a zip archive; unpack it"),
    "a.pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "is a PDF file; run: pdftotext"),
    "a.doc": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "old Office document"),
    "named.txt": (b"PK\x03\x04\x14\0\x06\0rest", "is a zip archive"),
    "table.jsonl": (b"PAR1\x15\x04", "is a parquet file"),
    "a.jsonl.bz2": (b"BZh91AY&SY", "bzip2"),
    "a.idx": (
        b"MMIDIDX\0\0",
        "is the index of a dataset, which is made of text; it is preprocessed already: name it in",
    ),
    "a.model": (
        b"\n\x0e\n\x05<unk>\x15\0\0",
        "is a sentencepiece model; name files of text; a tokenizer goes behind --tok",
    ),
    "a.csv": (b"text,label\nx,1\n", 'no plain text (.csv); write its texts as lines {"text": "..."} in a .jsonl'),
    "a.html": (b"<html>", "no plain text (.html); write its texts as lines"),
    "a.png": (b"\x89PNG\r\n", "a picture (.png); name files of text"),
    "a.dat": (b"\x93\5\xff\x81\0\7\xfe" * 9, "is no text: it has NUL bytes; name files of text"),
    "a.org": (b"# A title\n\nText.\n", "plain text must be in a file whose name ends in .txt"),
}


@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize("ending", [".txt", ".jsonl"])
def test_an_encoding_is_named_with_its_cure(tmp_path: Path, name: str, ending: str) -> None:
    content, words = ENCODED[name]
    path = tmp_path / f"a b{ending}"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(TextCorpus([path]))
    assert caught.value.code == "E303" and words in str(caught.value)
    assert f"'{path}'" in caught.value.remedy  # the command can be given as it stands


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_named_with_its_cure(tmp_path: Path, name: str) -> None:
    content, words = FORMATS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(TextCorpus(expand_inputs([tmp_path / name])))
    assert words in str(caught.value)


def test_a_dataset_given_as_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.idx").touch()
    (tmp_path / "p.bin").write_bytes(b"\xff\x01" * 9)
    with pytest.raises(DataError, match=r"E309.*p\.bin is the tokens of a dataset.*name it in data\.train"):
        list(TextCorpus([tmp_path / "p.bin"]))


@pytest.mark.parametrize("kind", ["file", "line", "blank-line"])
def test_lines_of_windows_end_as_others_do(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "unix.txt").write_bytes(b"one\ntwo\n\n\nthree\nfour\n")
    (tmp_path / "windows.txt").write_bytes(b"one\r\ntwo\r\n\r\n\r\nthree\r\nfour\r\n")
    read = [list(TextCorpus([tmp_path / name], text_documents=kind)) for name in ("unix.txt", "windows.txt")]
    assert read[0] == read[1] and "\r" not in "".join(read[1])
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\\r\\nb"}\r\n')
    assert list(TextCorpus([tmp_path / "a.jsonl"])) == ["a\r\nb"]  # what JSON says is meant
    monkeypatch.setattr(long, "LONG_BYTES", 4)  # in pieces
    path = tmp_path / "windows.txt"
    assert texts_of(path, blocks_of(path, kind)) == read[0]
