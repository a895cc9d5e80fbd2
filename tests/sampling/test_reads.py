"""Which samples read a document: the same ones that list it when asked for their documents."""

from __future__ import annotations

import pytest

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.config.phases import BatchSizes
from megatron_hammer.sampling import reads
from megatron_hammer.sampling.reads import describe_read, document_reads, find_source
from megatron_hammer.sampling.samples import TrainData, describe_samples
from tests.dataset.written import write_dataset


@pytest.fixture
def prefixes(tmp_path):
    lengths = {"x/a": [5, 0, 1, 40, 12, 3, 0, 9], "b": [30] * 7, "c": [6, 2, 2]}
    for seed, (name, of) in enumerate(lengths.items()):
        write_dataset(tmp_path / name, of, seed=seed)
    return {name: str(tmp_path / name) for name in lengths}


@pytest.mark.parametrize("order", ["independent", "megatron"])
@pytest.mark.parametrize("weights", [{"x/a": 1}, {"x/a": 1, "b": 3.7, "c": 0.1}, {"c": 1}])
def test_every_document_of_every_source(prefixes, order, weights, monkeypatch):
    monkeypatch.setattr(reads, "_DOCUMENTS_AT_ONCE", 3)
    data = TrainData({prefixes[name]: weight for name, weight in weights.items()}, 8, 1, order, 120)
    for start, end in ((0, 120), (37, 90)):
        samples = describe_samples(data, start, end - start)
        for source, dataset in enumerate(data.sources):
            for document in range(dataset.num_documents):
                expected = [
                    (s["sample"], s["epoch"], s["window"], [p for p in s["pieces"] if p["document"] == document])
                    for s in samples
                    if s["source"] == str(dataset.prefix) and any(p["document"] == document for p in s["pieces"])
                ]
                found = [
                    describe_read(read, BatchSizes(((0, 10),)))
                    for read in document_reads(data, source, document, start, end)
                ]
                assert [(r["sample"], r["epoch"], r["window"], r["pieces"]) for r in found] == expected
                assert all(r["step"] == r["sample"] // 10 + 1 for r in found)


def test_several_sequences_a_document(tmp_path):
    import numpy as np

    from megatron_hammer.dataset.writer import IndexedWriter

    with IndexedWriter(tmp_path / "d", 100) as writer:
        writer.add(np.arange(60), np.array([10, 5, 20, 5, 20]), np.array([2, 0, 1, 2]))
    for order in ("independent", "megatron"):
        data = TrainData({str(tmp_path / "d"): 1}, 7, 1, order, 30)
        for document in range(4):
            expected = {s["sample"] for s in describe_samples(data, 0, 30)
                        for p in s["pieces"] if p["document"] == document}  # fmt: skip
            assert {read.sample for read in document_reads(data, 0, document, 0, 30)} == expected


def test_names_of_sources_and_documents(prefixes):
    data = TrainData(dict.fromkeys(prefixes.values(), 1), 8, 1)
    for name in ("a", "x/a", prefixes["x/a"]):
        assert str(data.sources[find_source(data, name)].prefix) == prefixes["x/a"]
    with pytest.raises(ConfigError, match="E296.*none of data.train"):  # noqa: RUF043
        find_source(data, "nothing")
    for document in (-1, 8):
        with pytest.raises(ConfigError, match="E296"):
            document_reads(data, find_source(data, "a"), document, 0, 10)
