"""The quick start's corpus: its making, the offline case, and the parts that choose text."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
from pathlib import Path

import pytest

from megatron_hammer.base.errors import ConfigError, DataError
from megatron_hammer.corpus import quick_start as sample
from megatron_hammer.corpus.documents import read_documents
from megatron_hammer.corpus.quick_start import (
    FoundText,
    chinese_prose,
    group_lines,
    make_sample_corpus,
    split_documents,
)

OWN_TEXT = Path(__file__).parents[2] / "examples" / "corpus"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retry\nERROR: no route to host\n")

    monkeypatch.setattr(sample.subprocess, "run", refuse)
    # A part of the library is enough here, and ten times quicker.
    files = list(itertools.islice(sample._library_files(), 60))
    monkeypatch.setattr(sample, "_library_files", lambda: iter(files))


def test_corpus_without_network(tmp_path: Path, offline: None) -> None:
    lines: list[str] = []
    manifest = make_sample_corpus(tmp_path / "a", OWN_TEXT, 60_000, lines.append)
    assert any("no route to host" in line and "own text alone" in line for line in lines)
    texts: dict[str, set[str]] = {}
    for name, entry in manifest["files"].items():
        records = [d.text for d in read_documents(tmp_path / "a" / name, "text")]
        assert len(records) == entry["documents"] and len(set(records)) == len(records)
        texts[name] = set(records)
    for domain in sample.DOMAINS:
        assert texts[f"{domain}.jsonl"].isdisjoint(texts[f"{domain}.valid.jsonl"])
        assert manifest["files"][f"{domain}.jsonl"]["text_bytes"] <= 60_000
    assert {s["licence"] for s in manifest["sources"]} == {"CC0-1.0", "PSF-2.0"}

    again = make_sample_corpus(tmp_path / "b", OWN_TEXT, 60_000)
    assert again == manifest  # same bytes: the hashes are in it


def test_second_call_does_nothing_and_a_changed_file_is_made_anew(tmp_path: Path, offline: None) -> None:
    lines: list[str] = []
    first = make_sample_corpus(tmp_path, OWN_TEXT, 60_000)
    stamps = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert make_sample_corpus(tmp_path, OWN_TEXT, 60_000, lines.append) == first
    assert len(lines) == 1 and "nothing to do" in lines[0]
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == stamps

    with open(tmp_path / "zh.jsonl", "ab") as file:
        file.write(b'{"text": "changed"}\n')
    assert make_sample_corpus(tmp_path, OWN_TEXT, 60_000) == first
    assert make_sample_corpus(tmp_path, OWN_TEXT, 70_000) != first


def test_refusals(tmp_path: Path, offline: None) -> None:
    with pytest.raises(ConfigError, match="E264"):
        make_sample_corpus(tmp_path, OWN_TEXT, 10)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="E320"):
        make_sample_corpus(tmp_path / "file", OWN_TEXT)
    with pytest.raises(DataError, match=r"E321.*domain zh"):
        make_sample_corpus(tmp_path / "new", tmp_path / "no essays here")


def test_whole_library_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample.sys, "executable", str(tmp_path / "no-python"))
    lines: list[str] = []
    manifest = make_sample_corpus(tmp_path / "a", OWN_TEXT, report=lines.append)
    assert manifest["files"]["en.jsonl"]["text_bytes"] > 400_000
    assert manifest["files"]["code.jsonl"]["text_bytes"] > 950_000
    assert sum("pip did not answer" in line for line in lines) == 1


def test_split_is_by_content_alone() -> None:
    generator = random.Random(1)
    documents = [FoundText("x" * generator.randint(10, 400) + str(i), f"d{i}") for i in range(300)]
    train, valid = split_documents(documents, 20_000)
    shuffled = documents + documents[:50]  # duplicates
    generator.shuffle(shuffled)
    train2, valid2 = split_documents(shuffled, 20_000)
    assert [d.text for d in train2] == [d.text for d in train]
    assert [d.text for d in valid2] == [d.text for d in valid]
    assert {d.text for d in train}.isdisjoint(d.text for d in valid)
    assert 19_000 < sum(d.size for d in train) <= 20_000
    assert 500 < sum(d.size for d in valid) <= 1_000


def test_split_always_holds_something_out() -> None:
    train, valid = split_documents([FoundText("a" * 100, ""), FoundText("b" * 90, "")], 50_000)
    assert [d.text[0] for d in train] == ["a"] and [d.text[0] for d in valid] == ["b"]


def test_chinese_prose_drops_markup() -> None:
    docstring = """批量认证企业任务详情信息，其中包括状态信息等。<br/>
    ![image](https://example.com/a.png)
    **注意**：如果合同已经签署完毕，请参考[发起解除合同](https://example.com/x)接口&amp;文档
    - `UserId` 和 OpenId 两个参数只需要填写其中的一个即可。
    示例值：138****1569
    <tr><td>ID_CARD</td><td>身份证</td></tr>
    :param _Name: 超管的姓名，需要与证件上的姓名保持一致
    :rtype: str
    """
    assert list(chinese_prose(docstring)) == [
        "批量认证企业任务详情信息，其中包括状态信息等。",
        "注意：如果合同已经签署完毕，请参考发起解除合同接口&文档",
        "UserId 和 OpenId 两个参数只需要填写其中的一个即可。",
    ]


def test_group_lines_loses_nothing() -> None:
    generator = random.Random(2)
    for count in range(40):
        lines = ["字" * generator.randint(1, 60) for _ in range(count)]
        groups = list(group_lines(lines, 100))
        assert "\n".join(groups).split("\n") == (lines or [""])
        assert all(len(group) >= 100 for group in groups) or len(groups) == 1


def test_own_essays_are_plain_utf8() -> None:
    essays = sorted(OWN_TEXT.glob("*.txt"))
    assert 8_000 <= sum(path.stat().st_size for path in essays) <= 12_000
    for path in essays:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n\n") >= 4 and "\r" not in text and json.loads(json.dumps(text)) == text


def test_nothing_is_fetched_where_that_is_not_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("一篇短文。", encoding="utf-8")
    monkeypatch.setattr(sample, "_download", lambda folder: pytest.fail("the network was asked"))
    ((source, documents),) = sample._collect_chinese(tmp_path, print, fetch=False)
    assert source.domain == "zh" and [document.text for document in documents] == ["一篇短文。"]
