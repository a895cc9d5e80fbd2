"""Inputs of preprocessing: every cut into blocks and ranges gives the same texts, from every kind of file."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest
import xxhash
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_hammer.base.errors import DataError
from megatron_hammer.corpus import file_blocks, jsonl, parse, readers, stream
from megatron_hammer.corpus.file_blocks import Position
from tests.corpus.reading import GOOD, blocks_of, rejected_of, texts_of


def compress(content: bytes, suffix: str, rng: random.Random) -> bytes:
    """As several members or frames."""
    cuts = sorted(rng.choices(range(len(content) + 1), k=2))
    parts = [content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)])]
    if suffix.lower() == ".gz":
        return b"".join(map(gzip.compress, parts)) + b"\0" * 5
    return b"".join(map(zstandard.compress, parts)) if suffix == ".zst" else content


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(0, 200), min_size=1, max_size=30),
    st.integers(1, 300),
    st.sampled_from(["", ".gz", ".zst", ".GZ"]),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_any_cut_gives_the_same_documents(
    tmp_path: Path, lengths: list[int], block_bytes: int, suffix: str, ending: bool, rng: random.Random
) -> None:
    expected = ["x字\n"[k % 3] * n for k, n in enumerate(lengths)]
    content = b"\n".join(json.dumps({"text": t}, ensure_ascii=False).encode() for t in expected) + b"\n" * ending
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress(content, suffix, rng))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_blocks, "BLOCK_BYTES", block_bytes)
        whole = blocks_of(path)
        assert texts_of(path, whole) == expected
        assert [b.last for b in whole] == [False] * (len(whole) - 1) + [True]
        assert whole[-1].file_hash == xxhash.xxh3_128_hexdigest(path.read_bytes())
        assert b"".join(bytes(b.data) for b in whole) == content
        assert sum(b.raw_bytes for b in whole) <= path.stat().st_size  # what stands behind the last text is not for it
        place = Position(0, 1)
        for block in whole:  # each goes on where the one before ended, and ends with a line
            assert block.start == place and block.content_hash == xxhash.xxh3_128_hexdigest(content[: block.end.offset])
            place = block.end
            assert place.line == 1 + content.count(b"\n", 0, place.offset) + (
                place.offset == len(content) and not ending
            )
        assert texts_of(path, blocks_of(path, range_bytes=rng.randint(1, 400))) == expected
        whole_file = next(readers.plan_ranges([path]))
        stop = rng.choice(whole)  # a run that comes back goes on anywhere
        again = list(readers.read_range(path, whole_file, ["text"], resume=stop.end))
        assert again[0].content_hash == stop.content_hash and again[0].text_bytes == 0
        done = texts_of(path, whole[: whole.index(stop) + 1])
        assert done + texts_of(path, again) == expected
        assert again[-1].file_hash == whole[-1].file_hash


def test_a_long_line_stands_alone_and_is_held_once(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "a.jsonl"
    long = b'{"text": "' + b"x" * 30_000_000 + b'"}'
    path.write_bytes(b"\n".join([*GOOD, long, *GOOD]) + b"\n")
    tracemalloc.start()
    sizes = [b.text_bytes for s in readers.plan_ranges([path]) for b in readers.read_range(path, s, ["text"])]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(long) + 1 in sizes and sum(sizes) == path.stat().st_size
    assert peak < 1.2 * len(long) + 4 * file_blocks.BLOCK_BYTES, peak


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_what_expands_a_thousandfold_is_refused(tmp_path: Path, suffix: str) -> None:
    import tracemalloc

    path = tmp_path / f"a.txt{suffix}"
    content = b"\n" * 50_000_000
    path.write_bytes(gzip.compress(content, 1) if suffix == ".gz" else zstandard.compress(content))
    del content
    with stream.open_stream(path) as source:
        buffer, total = bytearray(1 << 20), 0
        tracemalloc.start()
        with pytest.raises(stream.StreamDamage, match="200 times"):
            while count := source.readinto(buffer):
                total += count
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert total < 50_000_000 and peak < (8e6 if suffix == ".gz" else 260e6), peak


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("cut", [20, 400, -1])
def test_cut_compressed_file(tmp_path: Path, name: str, cut: int) -> None:
    """Strictly an error; else the whole lines before the cut are taken and the cut is counted once."""
    rng = random.Random(0)
    lines = [json.dumps({"text": rng.randbytes(rng.randint(0, 90)).hex()}).encode() for _ in range(300)]
    content = b"\n".join(lines) + b"\n"
    whole = gzip.compress(content) if name.endswith(".gz") else zstandard.compress(content)
    path = tmp_path / name
    path.write_bytes(whole[:cut])
    with pytest.raises(DataError, match=r"E309.*\(byte \d+\) could not be decompressed"):
        texts_of(path, blocks_of(path))
    blocks = blocks_of(path, lenient=True)
    (rejected,) = rejected_of(path, blocks)
    taken = [t for b in blocks for t in parse.parse_block(b, path, ["text"], False).texts[0]]
    assert taken == [json.loads(line)["text"] for line in lines[: len(taken)]]
    assert rejected.code == "E309" and rejected.place == (
        sum(map(len, lines[: len(taken)])) + len(taken),
        len(taken) + 1,
    )
    assert blocks[-1].file_hash == xxhash.xxh3_128_hexdigest(whole[:cut])


def test_lines_beyond_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_blocks, "BLOCK_BYTES", 64)
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 200)
    path = tmp_path / "a.jsonl"
    for position in (0, 7, 40):
        lines = [*GOOD[:position], b'{"text": "' + b"y" * 1000 + b'"}', *GOOD[position:]]
        path.write_bytes(b"\n".join(lines) + b"\n" * (position == 7))
        with pytest.raises(DataError, match=rf"E304.*a.jsonl:{position + 1} \(byte \d+\) is longer than 200 bytes"):
            texts_of(path, blocks_of(path))
        blocks = blocks_of(path, lenient=True)
        (rejected,) = rejected_of(path, blocks)
        assert rejected.place == (sum(len(g) + 1 for g in GOOD[:position]), position + 1) and rejected.raw is None
        taken = [t for b in blocks for t in parse.parse_block(b, path, ["text"], False).texts[0]]
        assert taken == [json.loads(line)["text"] for line in GOOD]
        assert blocks[-1].last and blocks[-1].file_hash == xxhash.xxh3_128_hexdigest(path.read_bytes())


def test_a_cut_within_a_line_beyond_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It hides all that followed, so it is what is told, and not the long line that it was found in."""
    monkeypatch.setattr(file_blocks, "BLOCK_BYTES", 64)
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 200)
    long = b'{"text": "' + random.Random(0).randbytes(4000).hex().encode() + b'"}'
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n".join([*GOOD, long, *GOOD]))[:-1500])
    blocks = blocks_of(path, lenient=True)
    (rejected,) = rejected_of(path, blocks)
    taken = [t for b in blocks for t in parse.parse_block(b, path, ["text"], False).texts[0]]
    assert rejected.code == "E309" and rejected.place == (sum(len(g) + 1 for g in GOOD), len(GOOD) + 1)
    assert taken == [json.loads(line)["text"] for line in GOOD] and blocks[-1].last


# ---- plain text ----

TEXT = "first line\nsecond  \r\n\n\nthird 字\n \nfourth\n\r\nlast".encode()


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("file", [TEXT.decode().replace("\r\n", "\n")]),
        ("line", ["first line", "second  ", "third 字", " ", "fourth", "last"]),
        ("blank-line", ["first line\nsecond  ", "third 字\n \nfourth", "last"]),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_documents_of_plain_text(
    tmp_path: Path, mode: str, expected: list[str], suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(compress(TEXT, suffix, random.Random(1)))
    for block_bytes in (1, 2, 5, 13, 1 << 20):
        monkeypatch.setattr(file_blocks, "BLOCK_BYTES", block_bytes)
        assert texts_of(path, blocks_of(path, mode)) == expected, block_bytes
        if mode == "line":
            assert texts_of(path, blocks_of(path, mode, range_bytes=9)) == expected


# ---- which files ----


def test_folders_and_patterns_are_expanded_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.jsonl", "a.jsonl.gz", "deep/c.parquet", "deep/d.txt.zst", "deep/.hidden.jsonl", "note.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    found = [str(p) for p in readers.expand_inputs(["deep", "note.md", ".", "*.jsonl*"])]
    assert found == ["deep/c.parquet", "deep/d.txt.zst", "note.md",
                     "a.jsonl.gz", "b.jsonl", "deep/c.parquet", "deep/d.txt.zst", "a.jsonl.gz", "b.jsonl"]  # fmt: skip
    (tmp_path / "odd[1].jsonl").write_bytes(b"")
    assert [str(p) for p in readers.expand_inputs(["odd[1].jsonl"])] == ["odd[1].jsonl"]  # a name before a pattern
    for wrong, words in (
        ("empty", "is a folder without"),
        ("*.none", "matches no file"),
        ("x.jsonl", "does not exist"),
    ):
        with pytest.raises(DataError, match=f"E301.*{words}"):
            readers.expand_inputs([wrong])


# What lies in a folder of text, and what of it is text to train on.
FOLDERS = {
    "the quick start's": ("zh.jsonl zh.valid.jsonl en.jsonl en.valid.jsonl manifest.json", "en.jsonl zh.jsonl"),
    "split_corpus": ("zh.train.jsonl.gz zh.valid.jsonl.gz zh.split.json", "zh.train.jsonl.gz"),
    "sample_corpus": ("train.jsonl valid.jsonl manifest.json", "train.jsonl"),
    "reformat_corpus": ("my.jsonl my.jsonl.manifest.json", "my.jsonl"),
    "the Pile's": ("train/00.jsonl.zst train/01.jsonl.zst val.jsonl.zst test.jsonl.zst",
                   "train/00.jsonl.zst train/01.jsonl.zst"),
    "folders": ("train/a.parquet validation/a.parquet dataset_info.json", "train/a.parquet"),
    "dashes": ("c4-train.jsonl c4-validation.jsonl", "c4-train.jsonl"),
    "quarantine": ("a.jsonl a_text_document.rejected.jsonl", "a.jsonl"),
    "a data set's cards": ("README.md zh.jsonl zh.md", "zh.jsonl"),
    "texts of all kinds": ("LICENSE.txt README.md a.MD b.TXT c.markdown d.text.gz", "a.MD b.TXT c.markdown d.text.gz"),
    "held out alone": ("zh.valid.jsonl en.valid.jsonl", "en.valid.jsonl zh.valid.jsonl"),
    "words that only begin so": ("testimony.jsonl validity.jsonl developer.txt train.jsonl",
                                 "developer.txt testimony.jsonl train.jsonl validity.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOLDERS)
def test_of_a_folder_only_text_to_train_on_is_taken(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture) -> None:
    there, taken = (text.split() for text in FOLDERS[kind])
    for name in there:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{\n  "kind": "manifest"\n}\n' if name.endswith(".json") else GOOD_LINE)
    assert [path.relative_to(tmp_path).as_posix() for path in readers.expand_inputs([tmp_path])] == taken
    note = capsys.readouterr().err
    for name in set(there) - set(taken):
        assert (tmp_path / name).name in note or (tmp_path / name).parent.name in note
    for name in there:  # what is named is read
        assert readers.expand_inputs([tmp_path / name]) == [tmp_path / name]


GOOD_LINE = '{"text": "a"}\n'
