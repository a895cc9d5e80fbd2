"""Verification finds what is wrong, names the place, goes on to the end, and counts as a slow program would."""

from __future__ import annotations

import json
import random
import resource
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from megatron_hammer.base.errors import ConfigError, DataError, RefusedError, WriteFailed
from megatron_hammer.dataset import writer as writer_module
from megatron_hammer.dataset.format import TokenizerRecord, path_of
from megatron_hammer.dataset.look import contamination as held_out
from megatron_hammer.dataset.look import script_counts, verify
from megatron_hammer.dataset.look.verify import verify_dataset
from megatron_hammer.dataset.look.verify_report import format_report
from megatron_hammer.dataset.reader import IndexedDataset
from megatron_hammer.dataset.writer import IndexedWriter
from megatron_hammer.tokenizer.scripts import script_of
from tests.dataset.inspected import (  # noqa: F401  the fixtures
    random_texts,
    record_of,
    tokenizer,
    tokenizers,
    write_documents,
    write_texts,
)


@pytest.fixture
def small_pieces(monkeypatch):
    """Blocks of a page, and few tokens, documents and digests at once: every border is met."""
    for module in (writer_module, verify):
        monkeypatch.setattr(module, "HASH_BLOCK_BYTES", 4096)
    monkeypatch.setattr(verify, "_TOKENS_AT_ONCE", 37)
    monkeypatch.setattr(held_out, "_WINDOWS_AT_ONCE", 41)
    monkeypatch.setattr(script_counts, "_TOKENS_AT_ONCE", 43)
    monkeypatch.setattr(verify, "_DOCUMENTS_AT_ONCE", 5)
    monkeypatch.setattr(verify, "IN_MEMORY", 64)


@pytest.fixture(params=["as it is", "in small pieces"])
def pieces(request):
    if request.param == "in small pieces":
        request.getfixturevalue("small_pieces")


def unsound(report, *words):
    """The only problem, holding these words."""
    assert len(report.problems) == 1, report.problems
    for word in words:
        assert word in report.problems[0], report.problems
    with pytest.raises(DataError, match=r"^error\[E370\]") as caught:
        report.raise_if_unsound()
    assert "\n" not in str(caught.value)
    assert "PROBLEM: " + report.problems[0] in format_report(report)
    assert format_report(report).endswith("NOT SOUND") and report.describe()["sound"] is False


def test_characters_as_decoding_counts_them(tmp_path, tokenizer, pieces):  # noqa: F811
    """Scripts, replacement characters, byte pieces; characters spelt in bytes stand apart."""
    texts = [*random_texts(150), "", "\ufffd" * 40]
    documents = write_texts(tmp_path / "d", texts, tokenizer)
    report = verify_dataset(tmp_path / "d", tokenizer)
    assert report.problems == [] and report.describe()["sound"] is True
    report.raise_if_unsound()
    found = report.facts["characters"]
    text = "".join(texts)
    assert found["count"] == len(text)
    assert found["replacement_characters"] == text.count("\ufffd") > 60
    expected = Counter(script_of(character) for character in text.replace("\u2581", " "))
    spelt = round(found["scripts"].pop("bytes") * len(text))
    assert 0 < spelt < len(text) / 3
    counted = {name: round(share * len(text)) for name, share in found["scripts"].items()}
    assert sum(counted.values()) + spelt == len(text)
    assert all(counted[name] <= expected[name] for name in counted)
    assert counted["Latin"] >= expected["Latin"] - text.count("é") - text.count("ß")
    ids = [token for document in documents for token in document]
    assert found["byte_token_share"] == tokenizer.read_pieces().is_byte[ids].mean()
    assert report.facts["ids"] == {"used": len(set(ids)), "largest": max(ids), "outside": 0,
                                   "vocabulary": tokenizer.vocab_size}  # fmt: skip
    assert report.facts["document_marks"]["empty"] == 1
    assert report.facts["document_marks"]["end_with_eod"] == len(texts) - 1
    assert any("1 empty document" in remark for remark in report.remarks)


def test_a_damaged_block_and_its_documents_are_named(tmp_path, tokenizers, small_pieces):  # noqa: F811
    documents = write_texts(tmp_path / "d", random_texts(400), tokenizers["sentencepiece"])
    owner = np.repeat(np.arange(len(documents)), [len(ids) for ids in documents])
    size = IndexedDataset(tmp_path / "d").dtype.itemsize
    path = path_of(tmp_path / "d", ".bin")
    content = bytearray(path.read_bytes())
    blocks = -(-len(content) // 4096)
    assert blocks > 5
    for block in (1, blocks - 1):
        content[block * 4096 + 17 * size] ^= 1
    path.write_bytes(content)
    report = verify_dataset(tmp_path / "d", tokenizers["sentencepiece"])
    damaged = [problem for problem in report.problems if "checksum" in problem]
    for problem, block in zip(damaged, (1, blocks - 1), strict=True):
        inside = owner[block * 4096 // size : (block + 1) * 4096 // size]
        assert f"block {block} (bytes {block * 4096:,} to " in problem
        assert f"documents {inside[0]:,} to {inside[-1]:,})" in problem
    with pytest.raises(DataError, match="E370"):
        report.raise_if_unsound()


def test_a_damaged_index_or_header(tmp_path):
    write_documents(tmp_path / "d", [[1, 2, 3], [4, 5], [6]], sources={"a": 1, "b": 2})
    idx, meta = path_of(tmp_path / "d", ".idx"), path_of(tmp_path / "d", ".meta.json")
    whole = idx.read_bytes()
    header = json.loads(meta.read_text())

    meta.write_text(json.dumps(header | {"max_token_id": 9}))
    unsound(verify_dataset(tmp_path / "d"), "largest id is 9", "6")
    meta.write_text(json.dumps(header | {"idx_hash": "0" * 32}))
    unsound(verify_dataset(tmp_path / "d"), "d.idx has changed")
    meta.write_text(json.dumps(header | {"fingerprint": "0" * 32}))
    unsound(verify_dataset(tmp_path / "d"), "fingerprint=000")
    meta.write_text(json.dumps(header | {"block_bytes": 0}))
    unsound(verify_dataset(tmp_path / "d"), "blocks of 0 bytes")
    sources = [header["sources"][0] | {"tokens": 4}, header["sources"][1] | {"tokens": 3}]
    meta.write_text(json.dumps(header | {"sources": sources}))
    report = verify_dataset(tmp_path / "d")
    assert [p.split(" tokens for ")[0] for p in report.problems] == ["the header says 4"], "b has 3, as it says"

    meta.write_text(json.dumps(header))
    idx.write_bytes(whole[:34] + b"\x04" + whole[35:])  # the first length, and so every later offset
    report = verify_dataset(tmp_path / "d")
    assert len(report.problems) == 2 and "must be 16" in report.problems[0] and "checksum" in report.problems[1]
    meta.unlink()
    report = verify_dataset(tmp_path / "d")
    assert len(report.problems) == 1 and "nothing says which" in report.remarks[0]
    with pytest.raises(DataError, match="E370"):
        report.raise_if_unsound()
    idx.unlink()
    with pytest.raises(DataError, match="E330"):
        verify_dataset(tmp_path / "d")


@pytest.mark.parametrize("change", ["shorter", "longer", "another"])
def test_a_bin_of_the_wrong_size(tmp_path, small_pieces, change):
    write_documents(tmp_path / "d", [[1] * 3000, [2]])
    path = path_of(tmp_path / "d", ".bin")
    content = path.read_bytes()
    path.write_bytes({"shorter": content[:-4], "longer": content + b"more", "another": b"0" + content}[change])
    report = verify_dataset(tmp_path / "d")
    assert "must hold the 3,001 tokens" in report.problems[0]
    expected = {"shorter": ["block 2 (bytes 8,192 to 12,004)"], "longer": ["goes on after the 12,004 bytes"],
                "another": ["block 0", "block 1", "block 2", "goes on"]}  # fmt: skip
    assert len(report.problems) == 1 + len(expected[change])
    for words, problem in zip(expected[change], report.problems[1:]):
        assert words in problem


def test_ids_outside_the_vocabulary(tmp_path, tokenizers, pieces):  # noqa: F811
    spm = tokenizers["sentencepiece"]
    documents = [[5] * 2000, [], [7, 8, spm.vocab_size, 9], [spm.vocab_size + 5]]
    write_documents(tmp_path / "d", documents, spm, dtype=np.int32)
    for given in (None, spm):
        unsound(verify_dataset(tmp_path / "d", given), f"2 ids outside [0, {spm.vocab_size})",
                f"{spm.vocab_size} at token 2,002 in document 2")  # fmt: skip
    write_documents(tmp_path / "d", [[5, 6], [7, -3]], dtype=np.int64)
    unsound(verify_dataset(tmp_path / "d"), "1 id outside", "-3 at token 3 in document 1")
    write_documents(tmp_path / "d", [[5, 6], [7, 3]], dtype=np.float32)
    with pytest.raises(DataError, match="E333"):
        verify_dataset(tmp_path / "d")
    with pytest.raises(RefusedError, match="E510"):
        write_documents(tmp_path / "d", [[5, 6]], spm)
        verify_dataset(tmp_path / "d", tokenizers["byte-level"])


def test_marks_of_documents(tmp_path, tokenizers, pieces):  # noqa: F811
    """bos 1, eod 2: at the ends as the header promises, nowhere else."""
    spm = tokenizers["sentencepiece"]
    both = {"append_eod": True, "prepend_bos": True}
    good = [[1, 5, 2], [], [1, 2], [1, 9, 9, 2]]
    write_documents(tmp_path / "d", good, spm, options=both)
    report = verify_dataset(tmp_path / "d")
    assert report.problems == []
    assert report.facts["document_marks"] == {"empty": 1, "only_bos_or_eod": 1, "begin_with_bos": 3, "bos_inside": 0,
                                              "end_with_eod": 3, "eod_inside": 0}  # fmt: skip
    cases = [
        ([*good, [1, 7], [1, 8]], "2 of 5 documents do not end with the eod 2, first 4"),
        ([*good, [7, 2]], "1 of 4 documents do not begin with the bos 1, first 4"),
        ([*good, [1, 7, 2, 7, 2]], "1 eod id inside documents, the first in document 4"),
        ([*good, [1, 7, 1, 1, 2]], "2 bos ids inside documents, the first in document 4"),
    ]
    for documents, words in cases:
        write_documents(tmp_path / "d", documents, spm, options=both)
        unsound(verify_dataset(tmp_path / "d"), words)
        write_documents(tmp_path / "d", documents, spm)  # a header that promises nothing
        report = verify_dataset(tmp_path / "d")
        assert report.problems == [] and len(report.remarks) > 0
    write_documents(tmp_path / "d", [[0, 5, 0], [0, 0], [0], [0, 6, 0, 6, 0]], tokenizers["byte-level"], options=both)
    report = verify_dataset(tmp_path / "d")  # a tokenizer without bos: whatever the options say
    assert report.facts["document_marks"]["eod_inside"] == 4 and "begin_with_bos" not in report.facts["document_marks"]


def test_one_id_for_both_marks(tmp_path, tokenizers):  # noqa: F811
    spm = tokenizers["sentencepiece"]
    record = TokenizerRecord(spm.fingerprint, spm.vocab_size, 0, 0)
    with IndexedWriter(tmp_path / "d", tokenizer=record, options={"append_eod": True, "prepend_bos": True}) as writer:
        writer.add(np.array([0, 5, 0, 0, 6, 7, 0]), np.array([3, 4]))
    report = verify_dataset(tmp_path / "d")
    assert report.problems == [] and report.facts["document_marks"]["eod_inside"] == 0
    with IndexedWriter(tmp_path / "d", tokenizer=record, options={"append_eod": True, "prepend_bos": True}) as writer:
        writer.add(np.array([0, 5, 0, 0, 6, 0, 7, 0]), np.array([3, 5]))
    unsound(verify_dataset(tmp_path / "d"), "1 eod id inside", "document 1")


def test_duplicates_are_counted_exactly(tmp_path, tokenizers, pieces):  # noqa: F811
    """Against a dictionary, with empty documents, several sequences a document, and marks that do not matter."""
    spm, rng = tokenizers["sentencepiece"], random.Random(3)
    pool = [[rng.randrange(3, 20) for _ in range(rng.randrange(1, 5))] for _ in range(150)]
    documents = [rng.choice([*pool, []]) for _ in range(500)]
    documents = [([1] if rng.random() < 0.3 else []) + ids + ([2] if rng.random() < 0.5 else []) for ids in documents]
    with IndexedWriter(tmp_path / "d", tokenizer=record_of(spm)) as writer:
        sequences = [[ids[:2], ids[2:]] if len(ids) > 3 else [ids] if ids else [] for ids in documents]
        flat = [one for of in sequences for one in of]
        writer.add(np.array([i for ids in flat for i in ids]), np.array([len(ids) for ids in flat]),
                   np.array([len(of) for of in sequences]))  # fmt: skip
    seen: dict[tuple, int] = Counter()
    repeats = tokens = 0
    for ids in documents:
        text = ids[1:] if ids[:1] == [1] else ids
        text = tuple(text[:-1] if text[-1:] == [2] else text)
        if text:
            seen[text] += 1
            repeats += seen[text] > 1
            tokens += len(ids) * (seen[text] > 1)
    report = verify_dataset(tmp_path / "d", scratch=tmp_path)
    found = report.facts["duplicates"]
    assert found["documents"] == repeats > 100 and found["tokens"] == tokens
    assert found["document_share"] == repeats / sum(seen.values())
    assert found["distinct_texts_repeated"] == sum(count > 1 for count in seen.values())
    remark = next(r for r in report.remarks if "exact duplicates" in r)
    assert f"is there {max(seen.values())} times" in remark
    assert report.problems == [], "duplicates are no fault of the files"
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".bin", ".idx", ".json"], "scratch is gone"
    write_documents(tmp_path / "d", [[5], [6], [7, 7]])
    assert verify_dataset(tmp_path / "d").facts["duplicates"]["documents"] == 0


def windows(ids, n):
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


def test_overlap_with_held_out_sets(tmp_path, tokenizers, pieces, monkeypatch):  # noqa: F811
    """Whole documents and windows of NGRAM tokens, against sets of tuples; windows never cross documents."""
    monkeypatch.setattr(held_out, "NGRAM", 4)
    spm, rng = tokenizers["sentencepiece"], random.Random(4)

    def some(count, longest):
        return [[rng.randrange(3, 9) for _ in range(rng.randrange(1, longest))] for _ in range(count)]

    train, held = some(150, 12), [*some(60, 9), [5, 6] * 40]
    write_documents(tmp_path / "d", [[1, *ids, 2] for ids in train], spm, options={"append_eod": True})
    write_documents(tmp_path / "h", [*held, []], spm)
    write_documents(tmp_path / "unmarked", train, dtype=np.int16)  # documents touch without anything between
    for prefix in ("d", "unmarked"):
        report = verify_dataset(tmp_path / prefix, spm, [tmp_path / "h"])
        found = report.facts["held_out"][str(tmp_path / "h")]
        have = {window for ids in train for window in windows(ids, 4)}
        of_held = [windows(ids, 4) for ids in held]
        assert found["documents"] == len(held) and found["windows"] == sum(map(len, of_held))
        assert found["documents_found"] == sum(ids in train for ids in held) > 3
        assert found["documents_sharing_a_window"] == sum(any(w in have for w in of) for of in of_held)
        assert found["windows_found"] == sum(w in have for of in of_held for w in of) < found["windows"]
        held_windows = {window for of in of_held for window in of}
        touched = sum(any(window in held_windows for window in windows(ids, 4)) for ids in train)
        assert report.facts["documents_sharing_a_window"] == touched
        assert report.problems == [] and not report.describe()["sound"]
        with pytest.raises(RefusedError, match="E538") as caught:
            report.raise_if_unsound()
        assert f"{found['documents_found']} of the 61 documents" in str(caught.value)
        here = report.contaminated[0].split("with text: ")[1].split(",")[0].rstrip(")")
        a, b = (int(word) for word in here.split() if word.isdecimal())
        assert held[a] == train[b]


def test_held_out_text(tmp_path, tokenizer):  # noqa: F811
    texts = random_texts(60, longest=200)
    write_texts(tmp_path / "d", texts, tokenizer)
    path = tmp_path / "h.jsonl"
    lines = [texts[7], "never seen before: " + max(texts[8:], key=len) + " 你们", "novel"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    report = verify_dataset(tmp_path / "d", tokenizer, [path])
    found = report.facts["held_out"][str(path)]
    assert found["documents"] == 3 and found["documents_found"] == 1 and found["documents_sharing_a_window"] == 2
    assert "0 is document 7" in report.contaminated[0]
    with pytest.raises(ConfigError, match="E294"):
        verify_dataset(tmp_path / "d", None, [path])
    path.write_text(json.dumps({"text": "novel"}) + "\n")
    report = verify_dataset(tmp_path / "d", tokenizer, [path])
    assert report.describe()["sound"] and report.contaminated == []


def test_a_held_out_set_of_another_tokenizer(tmp_path, tokenizers):  # noqa: F811
    write_texts(tmp_path / "d", ["one"], tokenizers["sentencepiece"])
    write_texts(tmp_path / "h", ["one"], tokenizers["byte-level"])
    with pytest.raises(RefusedError, match="E510"):
        verify_dataset(tmp_path / "d", None, [tmp_path / "h"])


def test_nothing_in_it(tmp_path, tokenizers):  # noqa: F811
    for documents in ([], [[], []]):
        write_documents(tmp_path / "d", documents, tokenizers["sentencepiece"])
        report = verify_dataset(tmp_path / "d", tokenizers["sentencepiece"], [tmp_path / "d"])
        assert report.problems == [] and report.facts["document_marks"]["empty"] == len(documents)
        assert format_report(report).endswith(": sound")


def test_memory_does_not_grow_with_the_dataset(tmp_path, tokenizers):  # noqa: F811
    """Our own arrays (the pages of the files are the operating system's): far less than the 64 MB dataset."""
    with IndexedWriter(tmp_path / "d", tokenizer=record_of(tokenizers["sentencepiece"])) as writer:
        for _ in range(16):
            writer.add(np.ones(1 << 20, np.int32), np.full(1 << 10, 1 << 10))
    tracemalloc.start()
    report = verify_dataset(tmp_path / "d", tokenizers["sentencepiece"], [])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.facts["tokens"] == 1 << 24 and peak < 24 << 20, peak


@pytest.mark.parametrize("suffix", [".idx", ".bin", ".meta.json"])
def test_mutated_files_end_in_a_report_or_a_documented_error(tmp_path, tokenizers, small_pieces, suffix):  # noqa: F811
    """Bytes changed, cut or put in anywhere; a change of tokens or index under a whole header is never missed."""
    spm, rng = tokenizers["sentencepiece"], random.Random(7)
    write_texts(tmp_path / "d", [*random_texts(30), ""], spm, sources={"a": 31})
    path = path_of(tmp_path / "d", suffix)
    whole = path.read_bytes()
    digits = [i for i, byte in enumerate(whole) if chr(byte).isdigit()]
    unsound = 0
    for _ in range(120):
        content = bytearray(whole)
        place = rng.randrange(len(content))
        match rng.randrange(4):
            case 0 if suffix == ".meta.json":  # what is still JSON
                content[rng.choice(digits)] = rng.choice(b"0123456789")
            case 0 | 1:
                content[place] ^= 1 << rng.randrange(8)
            case 2:
                del content[place : place + rng.randrange(1, 40)]
            case 3:
                content[place:place] = rng.choice([b"9" * 20, b"\xff" * 8, b"null", bytes(8)])
        path.write_bytes(content)
        try:
            report = verify_dataset(tmp_path / "d", spm if rng.random() < 0.5 else None)
        except (DataError, RefusedError) as error:
            assert "\n" not in str(error)
        else:
            unsound += bool(report.problems)
            assert report.problems or suffix == ".meta.json" or bytes(content) == whole
            assert format_report(report)
    assert unsound > 20


def test_a_full_disk_names_the_file_of_digests(tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "IN_MEMORY", 0)
    digests, limits = verify._Digests(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, limits[1]))
    try:
        with pytest.raises(WriteFailed) as failed:
            digests.add(np.array([1], np.uint64), np.array([0]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert failed.value.filename == str(tmp_path / "0") and failed.value.needed == 16
