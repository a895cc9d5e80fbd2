"""Published shapes become one document a line: exact texts, exact counts, limits, and the file whole or not at all."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pyarrow
import pyarrow.parquet
import pytest
import xxhash
import zstandard

from megatron_hammer.base.errors import ConfigError, DataError
from megatron_hammer.corpus import reformat
from megatron_hammer.corpus.reformat import reformat_corpus

TEXTS = ["一篇文章\n第二行", "", 'second "one"\t', "\u2028 emoji \U0001f600", "end"]


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = b"".join(json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in records)
    if path.suffix == ".gz":
        content = gzip.compress(content)
    path.write_bytes(zstandard.compress(content) if path.suffix == ".zst" else content)
    return path


def write_parquet(path: Path, **columns: list[Any]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def read(path: Path) -> list[dict[str, Any]]:
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    if path.suffix == ".zst":
        content = zstandard.ZstdDecompressor().decompressobj().decompress(content)
    return [json.loads(line) for line in content.decode().split("\n")[:-1]]


def texts(path: Path) -> list[str]:
    return [record["text"] for record in read(path)]


WITH_TEXT = [t for t in TEXTS if t]


def pile(name: str, text: str) -> dict[str, Any]:
    return {"text": text, "meta": {"pile_set_name": name}}


def test_chinesewebtext_with_its_score_kept(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_jsonl(folder / "b.jsonl.gz", [{"text": "x", "score": 0.5, "title": "t"}])
    write_jsonl(folder / "a.jsonl", [{"title": "t", "score": 0.95, "text": t, "url": "u"} for t in TEXTS])
    (folder / "README.md").write_text("no data")
    (folder / "notes.txt").write_text("no data either")
    summary = reformat_corpus("chinesewebtext", [folder], tmp_path / "zh.jsonl", keep=["score", "absent"])
    expected = [{"text": t, "score": 0.95} for t in WITH_TEXT] + [{"text": "x", "score": 0.5}]
    assert read(tmp_path / "zh.jsonl") == expected
    assert summary.skipped.counts == {"empty text": 1} and summary.full == []
    assert (
        summary.lines()[0]
        == f"zh.jsonl: 5 documents, {sum(map(len, map(str.encode, [*WITH_TEXT, 'x'])))} bytes of text"
    )
    manifest = json.loads((tmp_path / "zh.jsonl.manifest.json").read_bytes())
    content = (tmp_path / "zh.jsonl").read_bytes()
    (output,) = manifest["outputs"]
    assert output == {
        "name": "zh.jsonl", "documents": 5, "text_bytes": sum(len(t.encode()) for t in [*TEXTS, "x"]),
        "bytes": len(content), "xxh3": xxhash.xxh3_128_hexdigest(content),
    }  # fmt: skip
    assert manifest["sources"] == [
        {"path": str(path), "bytes": path.stat().st_size, "xxh3": xxhash.xxh3_128_hexdigest(path.read_bytes())}
        for path in (folder / "a.jsonl", folder / "b.jsonl.gz")
    ]
    assert manifest["left_out"] == {"empty text": 1} and manifest["options"]["keep"] == ["score", "absent"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_refinedweb_and_compressed_outputs_repeat(tmp_path: Path, suffix: str) -> None:
    source = write_parquet(tmp_path / "a.parquet", content=TEXTS, url=["u"] * 5, timestamp=[None] * 5)
    outputs = [tmp_path / f"one.jsonl{suffix}", tmp_path / f"two.jsonl{suffix}"]
    for output in outputs:
        reformat_corpus("refinedweb", [source], output, keep=["url"])
    assert read(outputs[0]) == [{"text": t, "url": "u"} for t in WITH_TEXT]
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_pile_one_set_or_all_of_them(tmp_path: Path) -> None:
    records = [pile(("ArXiv", "Wikipedia (en)", "Pile-CC")[i % 3], f"text {i}") for i in range(30)]
    source = write_jsonl(tmp_path / "00.jsonl.zst", records)
    summary = reformat_corpus("pile", [source], tmp_path / "arxiv.jsonl", sets=["ArXiv", "Pile-CC"])
    assert texts(tmp_path / "arxiv.jsonl") == [f"text {i}" for i in range(30) if i % 3 != 1]
    assert summary.skipped.counts == {"another set": 10}
    reformat_corpus("pile", [source], tmp_path / "sets")
    names = {p.name for p in (tmp_path / "sets").iterdir()}
    assert names == {"ArXiv.jsonl", "Wikipedia_en.jsonl", "Pile-CC.jsonl", "manifest.json"}
    assert texts(tmp_path / "sets" / "Wikipedia_en.jsonl") == [f"text {i}" for i in range(1, 30, 3)]


def test_what_is_there_is_named_where_nothing_fits(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "p" / "pile.jsonl", [pile("Github", "x"), pile("ArXiv", "y")])
    with pytest.raises(DataError, match=r"E302.*name sets that are in it: --set with one of ArXiv, Github"):
        reformat_corpus("pile", [source], tmp_path / "out.jsonl", sets=["github"])
    for kind, others in (("refinedweb", "chinesewebtext, pile, jsonl"), ("text", "chinesewebtext, pile, jsonl")):
        with pytest.raises(DataError, match=rf"E301.*its files are those of another kind: {others}$"):
            reformat_corpus(kind, [source.parent], tmp_path / "out.jsonl")


def test_names_of_sets_cannot_leave_the_folder(tmp_path: Path) -> None:
    names = ["../../evil", "/etc/passwd", "a b", "a_b", "...", "x" * 300]
    source = write_jsonl(tmp_path / "in.jsonl", [pile(name, "text of " + name) for name in names])
    reformat_corpus("pile", [source], tmp_path / "sets")
    written = sorted((tmp_path / "sets").glob("*.jsonl"))
    assert len(written) == len(names) and {p.name for p in tmp_path.iterdir()} == {"in.jsonl", "sets"}
    assert sorted(t for path in written for t in texts(path)) == sorted("text of " + name for name in names)


def test_generic_kinds_take_a_key(tmp_path: Path) -> None:
    a = write_jsonl(tmp_path / "a.jsonl", [{"body": t} for t in TEXTS])
    b = write_parquet(tmp_path / "b.parquet", body=TEXTS, when=[1, 2, 3, 4, 5])
    reformat_corpus("jsonl", [a], tmp_path / "a.out", key="body")
    reformat_corpus("parquet", [b], tmp_path / "b.out", key="body")
    assert texts(tmp_path / "a.out") == texts(tmp_path / "b.out") == WITH_TEXT


def test_the_limit_is_of_text_and_ends_before_what_does_not_fit(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "字" * n} for n in (10, 10, 20, 1)])
    for limit, count in ((30, 1), (60, 2), (119, 2), (120, 3), (123, 4), (10**9, 4)):
        summary = reformat_corpus("jsonl", [source], tmp_path / "out", max_bytes=limit)
        assert len(texts(tmp_path / "out")) == count
        assert summary.full == (["out"] if count < 4 else [])
        assert (", full" in summary.lines()[0]) == (count < 4)
    many = write_jsonl(tmp_path / "p.jsonl", [pile("AB"[i % 4 > 0], "four") for i in range(12)])
    summary = reformat_corpus("pile", [many], tmp_path / "sets", max_bytes=12)
    assert [o["documents"] for o in summary.outputs] == [3, 3] and summary.full == ["B.jsonl"]
    assert summary.skipped.counts == {"output full": 6}


BAD = b'{"text": "a"}\n{"text": 3}\n\n{"text": "b"}\nnonsense\n{"other": 1}\n{"text": "\xff"}\n[1]\n{"text": "c"}\n'


def test_strict_by_default_and_exact_counts_when_skipping(tmp_path: Path) -> None:
    source, output = tmp_path / "a.jsonl", tmp_path / "out"
    source.write_bytes(BAD)
    output.write_bytes(b"as before")
    with pytest.raises(DataError, match=r"E307\].*a.jsonl:2 "):
        reformat_corpus("jsonl", [source], output)
    assert output.read_bytes() == b"as before" and len(list(tmp_path.iterdir())) == 2
    summary = reformat_corpus("jsonl", [source], output, on_error="skip")
    assert texts(output) == ["a", "b", "c"]
    assert summary.skipped.counts == {"E303": 1, "E304": 1, "E305": 1, "E306": 1, "E307": 2}
    assert any("E307: 2 (first: " in line and "a.jsonl:2" in line for line in summary.lines())
    manifest = json.loads((tmp_path / "out.manifest.json").read_bytes())
    assert manifest["left_out"] == dict(summary.skipped.counts)


def test_damaged_files_and_rows_when_skipping(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"text": "a"}\n' * 200_000)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    good = write_jsonl(tmp_path / "good.jsonl", [pile("A", "x"), {"text": "no set"}, pile("A", "y")])
    summary = reformat_corpus("jsonl", [tmp_path / "cut.jsonl.gz", good], tmp_path / "out", on_error="skip")
    assert summary.skipped.counts == {"E309": 1}
    assert texts(tmp_path / "out")[-3:] == ["x", "no set", "y"] and len(texts(tmp_path / "out")) > 1000
    with pytest.raises(DataError, match=r"E307\].*good.jsonl:2 has no string under meta.pile_set_name"):
        reformat_corpus("pile", [good], tmp_path / "sets")
    assert reformat_corpus("pile", [good], tmp_path / "sets", on_error="skip").skipped.counts == {"E307": 1}
    rows = write_parquet(tmp_path / "a.parquet", content=["a", None, "b"])
    with pytest.raises(DataError, match=r"E307\].*a.parquet:2 "):
        reformat_corpus("refinedweb", [rows], tmp_path / "rows")
    assert reformat_corpus("refinedweb", [rows], tmp_path / "rows", on_error="skip").skipped.counts == {"E307": 1}
    hidden = tmp_path / "hidden.jsonl"
    hidden.write_bytes(whole)
    with pytest.raises(DataError, match="E309"):  # a whole file that is something else is no bad line
        reformat_corpus("jsonl", [hidden], tmp_path / "out", on_error="skip")


def test_bad_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = write_jsonl(tmp_path / "a.jsonl", [pile("A", "x"), pile("B", "y"), pile("C", "z")])
    parquet = write_parquet(tmp_path / "a.parquet", content=["x"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "only").mkdir()
    write_parquet(tmp_path / "only" / "a.parquet", content=["x"])
    out = tmp_path / "out"
    monkeypatch.setattr(reformat, "MAX_SETS", 2)
    for kind, inputs, options, code in (
        ("jsonl", [good], {"max_bytes": 0}, "E287"),
        ("jsonl", [good], {"keep": ["text"]}, "E288"),
        ("jsonl", [parquet], {}, "E288"),
        ("refinedweb", [good], {}, "E288"),
        ("jsonl", [tmp_path / "only"], {}, "E301"),
        ("jsonl", [tmp_path / "empty"], {}, "E301"),
        ("jsonl", [tmp_path / "absent"], {}, "E301"),
        ("pile", [good], {"sets": ["none such"]}, "E302"),
        ("jsonl", [good], {"max_bytes": 1, "key": "meta"}, "E307"),
        ("pile", [good], {}, "E364"),
    ):
        with pytest.raises((ConfigError, DataError)) as caught:
            reformat_corpus(kind, inputs, out, **options)  # type: ignore[arg-type]
        assert caught.value.code == code, (kind, inputs, options)
        assert not out.is_file()
    with pytest.raises(ConfigError, match="E288"):
        reformat_corpus("pile", [good], good)
    with pytest.raises(ConfigError, match="E288"):
        reformat_corpus("jsonl", [good], tmp_path / "only")


def test_the_program(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [pile("A", "x" * 700), pile("A", "y" * 700)])
    program = Path(__file__).parents[2] / "tools" / "reformat_corpus.py"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, str(program), *arguments], capture_output=True, text=True)

    done = run("pile", str(source), "--set", "A", "--output", str(tmp_path / "o.jsonl"), "--max-gb", "1e-6")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("o.jsonl: 1 documents")
    wrong = run("jsonl", str(source), "--set", "A", "--output", str(tmp_path / "o.jsonl"))
    assert wrong.returncode == 2 and wrong.stderr.startswith("error[E201]") and wrong.stderr.count("\n") == 1


def test_plain_text_becomes_documents(tmp_path: Path) -> None:
    """Paragraphs, lines or whole files; line breaks of Windows; a file that is not UTF-8 is refused or left out."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "b.txt").write_bytes("一\r\n二\r\n\r\n三\r\n".encode())
    (folder / "a.txt").write_text("one\n\n\ntwo  \n", encoding="utf-8")
    (folder / "c.jsonl").write_text("not of this kind")
    reformat_corpus("text", [folder], tmp_path / "x.jsonl")
    assert [d["text"].split() for d in read(tmp_path / "x.jsonl")] == [["one"], ["two"], ["一", "二"], ["三"]]
    reformat_corpus("text", [folder], tmp_path / "x.jsonl", text_documents="line")
    assert [d["text"].strip() for d in read(tmp_path / "x.jsonl")] == ["one", "two", "一", "二", "三"]
    reformat_corpus("text", [folder], tmp_path / "x.jsonl", text_documents="file")
    assert len(read(tmp_path / "x.jsonl")) == 2
    (folder / "a2.txt").write_bytes("中文".encode("gbk"))
    with pytest.raises(DataError, match=r"E303.*a2\.txt"):
        reformat_corpus("text", [folder], tmp_path / "x.jsonl")
    assert reformat_corpus("text", [folder], tmp_path / "x.jsonl", on_error="skip").skipped.counts == {"E303": 1}
    assert len(read(tmp_path / "x.jsonl")) == 4
    with pytest.raises(DataError, match=r"E301.*holds no \.txt or \.md file"):
        write_jsonl(tmp_path / "only" / "a.jsonl", [{"text": "x"}])
        reformat_corpus("text", [tmp_path / "only"], tmp_path / "y.jsonl")


def test_the_manifest_of_a_source_whose_name_is_no_utf8(tmp_path: Path) -> None:
    """As archives from Chinese Windows unpack."""
    source = write_jsonl(tmp_path / "\udcce.jsonl", [{"text": "x"}])
    reformat_corpus("jsonl", [source], tmp_path / "out.jsonl")
    manifest = orjson.loads((tmp_path / "out.jsonl.manifest.json").read_bytes())
    assert manifest["sources"][0]["path"] == str(tmp_path / "\\udcce.jsonl")
