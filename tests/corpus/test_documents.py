"""Documents with all their fields: those of the strict reader, exact when bad ones are left out; files whole or not."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from pathlib import Path

import pytest
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hammer.base import progress
from megatron_hammer.base.errors import ConfigError, DataError
from megatron_hammer.corpus.documents import LineWriter, Skipped, read_documents, read_texts, text_line

BAD = {
    b"": "E305", b" ": "E305", b"{": "E304", b"3": "E306", b"[]": "E306", b'"text"': "E306", b'{"a": 1}': "E307",
    b'{"text": null}': "E307", b'{"text": ["x"]}': "E307", b'{"text": "\xc3("}': "E303", b'{"text": "\\ud800"}': "E308",
}  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1), st.booleans(), st.booleans())
def test_texts_are_those_of_the_strict_reader(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], crlf: bool, last_ending: bool
) -> None:
    ending = b"\r\n" if crlf else b"\n"
    content = ending.join(json.dumps({"text": t, "n": i}).encode() for i, t in enumerate(texts)) + ending * last_ending
    path = tmp_path_factory.mktemp("any") / "a.jsonl"
    path.write_bytes(content)
    hashes: dict[Path, str] = {}
    found = list(read_documents(path, "text", hashes=hashes))
    assert [d.text for d in found] == texts == [t for some, _ in read_texts(path, "text") for t in some]
    assert [d.fields["n"] for d in found] == list(range(len(texts)))
    assert b"\n".join(d.line for d in found) == content.removesuffix(b"\n")
    assert hashes == {path: xxhash.xxh3_128_hexdigest(content)}


def test_long_and_short_lines_over_many_blocks(tmp_path: Path) -> None:
    generator = random.Random(4)
    texts = [str(i) + "y" * (generator.randint(0, 2_500_000) if i % 100 == 7 else 50) for i in range(800)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    found = list(read_documents(path, "text"))
    assert [d.text for d in found] == texts
    assert [d.where for d in found] == [f"{path}:{i + 1}" for i in range(800)]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(sorted(BAD)), st.just(None)), min_size=1, max_size=50))
def test_bad_lines_are_counted_exactly(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes | None]) -> None:
    path = tmp_path_factory.mktemp("bad") / "a.jsonl"
    path.write_bytes(b"".join((b'{"text": "good %d"}' % i if x is None else x) + b"\n" for i, x in enumerate(lines)))
    skipped = Skipped()
    found = [d.text for d in read_documents(path, "text", on_bad=skipped.add)]
    assert found == [f"good {i}" for i, line in enumerate(lines) if line is None]
    assert skipped.counts == Counter(BAD[line] for line in lines if line is not None)
    first = next((i for i, line in enumerate(lines) if line is not None), None)
    if first is not None:
        offset = len(b"".join(path.read_bytes().splitlines(keepends=True)[:first]))
        for read in (read_documents, read_texts):
            with pytest.raises(DataError, match=rf"a.jsonl:{first + 1} \(byte {offset}\) ") as caught:
                list(read(path, "text"))
            assert caught.value.code == BAD[lines[first] or b""]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_file_appears_when_it_is_complete(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "new" / f"a{suffix}"
    with LineWriter(path) as writer:
        for i in range(5000):
            writer.write(b"line %d" % i, 4)
        assert not path.exists()
    content = path.read_bytes()
    assert writer.describe() == {
        "name": path.name, "documents": 5000, "text_bytes": 20_000, "bytes": len(content),
        "xxh3": xxhash.xxh3_128_hexdigest(content),
    }  # fmt: skip
    if suffix:
        content = (
            gzip.decompress(content)
            if suffix == ".gz"
            else zstandard.ZstdDecompressor().decompressobj().decompress(content)
        )
    assert content == b"".join(b"line %d\n" % i for i in range(5000))
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt), LineWriter(path) as writer:
        writer.write(b"half", 4)
        raise KeyboardInterrupt
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
    with pytest.raises(ConfigError, match="E288"):
        LineWriter(tmp_path)


def test_progress_is_quiet_then_says_rate_and_what_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    for total, line in ((4 * 10**9, "copying: 1.20 GB of 4.00 (30%), 200 MB/s, 14 s left\n"),
                        (None, "copying: 1.20 GB, 200 MB/s\n")):  # fmt: skip
        now[0] = 0.0
        with progress.Progress("copying", total) as shown:
            for now[0] in (1.0, 4.9, 6.0, 7.0):
                shown.advance(400_000_000)
        assert capsys.readouterr().err == line


def test_odd_fields_beside_the_text_are_kept(tmp_path: Path) -> None:
    """Only the text is judged: every other field is read, and written again as Python's json has it."""
    lines = [
        b'{"text": "a", "n": NaN}',
        b'{"text": "b", "n": [1, {"m": -Infinity}]}',
        b'{"text": "c", "n": "x\\ud800"}',
        b'{"text": "d", "n": ' + b"7" * 400 + b"}",
        b'{"text": "e", "n": 1e400}',
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    documents = list(read_documents(path, "text"))
    assert [d.text for d in documents] == list("abcde")
    assert [d.line for d in documents] == lines
    for document, line in zip(documents, lines, strict=True):
        again = text_line(document.text, document.fields)
        assert repr(json.loads(again)) == repr(json.loads(line)), "nan is not equal to itself"
