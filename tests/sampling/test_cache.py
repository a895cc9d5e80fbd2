"""Kept indices: built once, found by content, never believed when damaged, no hindrance where nothing can be kept."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_hammer.base.errors import ConfigError, DataError
from megatron_hammer.base.progress import say
from megatron_hammer.config import load_config
from megatron_hammer.sampling import cache as index_files
from megatron_hammer.sampling import order
from megatron_hammer.sampling.blend import _BLOCK, Blend
from megatron_hammer.sampling.cache import BadIndexFile, IndexStore, read_index, write_index
from megatron_hammer.sampling.order import IndependentOrder, MegatronOrder
from megatron_hammer.sampling.prebuild import IndexPlan, build_indices, plan_of
from megatron_hammer.sampling.samples import TrainData
from megatron_hammer.train.prepare import prepare
from tests.dataset.written import write_dataset
from tests.sampling.order_samples import sample
from tests.sampling.whole_mix import draw_whole

ROOT = Path(__file__).parents[2]
KEY = {"dataset": "f" * 32, "seed": 3}
ARRAYS = {
    "a": np.arange(7, dtype=np.int32),
    "b": np.arange(6, dtype=np.int64).reshape(3, 2),
    "c": np.empty(0, np.uint32),
}


class Builder:
    """Counts how often it is asked to build."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return ARRAYS


def make_store(folder, **kwargs):
    notes = []
    return IndexStore(folder, notes.append, smallest=0, **kwargs), notes


def same(found):
    return all(np.array_equal(found[k], ARRAYS[k]) and found[k].dtype == ARRAYS[k].dtype for k in ARRAYS)


def test_an_index_is_built_once_and_then_mapped(tmp_path):
    store, notes = make_store(tmp_path / "made" / "P.index")
    build = Builder()
    for _ in range(3):
        found = store.get("kind", KEY, 1, build)
        assert same(found) and not found["a"].flags.writeable
    assert build.calls == 1 and notes == []
    again, _ = make_store(tmp_path / "made" / "P.index")
    assert same(again.get("kind", dict(reversed(KEY.items())), 1, build)) and build.calls == 1
    for kind, key in (("kind", KEY | {"seed": 4}), ("other", KEY)):
        store.get(kind, key, 1, build)
    assert build.calls == 3
    assert sorted(p.suffix for p in (tmp_path / "made" / "P.index").iterdir()) == ["", ".index", ".index", ".index"]


def test_small_indices_are_not_kept(tmp_path):
    build = Builder()
    store = IndexStore(tmp_path / "P.index", smallest=10)
    store.get("kind", KEY, 9, build)
    assert not (tmp_path / "P.index").exists()
    store.get("kind", KEY, 10, build)
    assert store.path("kind", KEY).exists()


@pytest.mark.parametrize("damage", ["empty", "cut", "longer", "header", "array", "version", "magic", "foreign"])
def test_a_damaged_or_foreign_file_is_built_anew(tmp_path, damage):
    store, notes = make_store(tmp_path)
    build = Builder()
    store.get("kind", KEY, 1, build)
    path = store.path("kind", KEY)
    content = bytearray(path.read_bytes())
    if damage == "empty":
        content.clear()
    elif damage == "cut":
        del content[-3:]
    elif damage == "longer":
        content += b"\0" * 64
    elif damage == "foreign":
        store.get("kind", KEY | {"seed": 4}, 1, build)
        content = bytearray(store.path("kind", KEY | {"seed": 4}).read_bytes())
    else:
        content[{"magic": 0, "version": 8, "header": 40, "array": len(content) - 64}[damage]] ^= 1
    path.write_bytes(content)
    before = build.calls
    assert same(store.get("kind", KEY, 1, build)) and build.calls == before + 1
    assert len(notes) == 1 and str(path) in notes[0] and "built anew" in notes[0]
    assert same(store.get("kind", KEY, 1, build)) and build.calls == before + 1  # and now it is whole


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_file_is_never_accepted(tmp_path, data):
    path = tmp_path / "f.index"
    if not path.exists():
        write_index(path, "kind", KEY, ARRAYS)
        (tmp_path / "good").write_bytes(path.read_bytes())
    good = (tmp_path / "good").read_bytes()
    content = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, max(len(content) - 1, 0)))
        action = data.draw(st.sampled_from(["change", "cut", "insert"]))
        if action == "change" and content:
            content[place] = data.draw(st.integers(0, 255))
        elif action == "cut":
            del content[place:]
        else:
            content[place:place] = data.draw(st.binary(min_size=1, max_size=9))
    path.write_bytes(content)
    try:
        found, _ = read_index(path, "kind", KEY)
    except BadIndexFile:
        return
    # What lies between the header and the arrays is nobody's; all else must be as it was.
    assert len(content) == len(good) and same(found)


def test_where_nothing_can_be_kept(tmp_path):
    (tmp_path / "file").write_text("")
    store, notes = make_store(tmp_path / "file" / "P.index")  # a folder that cannot be made, also for root
    build = Builder()
    assert same(store.get("kind", KEY, 1, build)) and build.calls == 1
    assert len(notes) == 1 and "data.index_folder" in notes[0]


def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch):
    store, notes = make_store(tmp_path)
    build = Builder()

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    assert same(store.get("kind", KEY, 1, build)) and build.calls == 1
    assert "No space" in notes[0] and [p.name for p in tmp_path.iterdir()] == ["lock"]


def test_what_a_killed_builder_left_is_removed(tmp_path):
    store, _ = make_store(tmp_path)
    (tmp_path / "kind-old.tmp").write_bytes(b"half")
    store.get("kind", KEY, 1, Builder())
    assert not list(tmp_path.glob("*.tmp"))


def _get_slowly(folder, calls):
    def build():
        with calls.get_lock():
            calls.value += 1
        time.sleep(0.3)
        return ARRAYS

    assert same(IndexStore(folder, lambda text: None, smallest=0).get("kind", KEY, 1, build))


def test_of_many_processes_one_builds(tmp_path):
    context = multiprocessing.get_context("fork")
    calls = context.Value("i", 0)
    processes = [context.Process(target=_get_slowly, args=(tmp_path, calls)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4 and calls.value == 1


def test_waiting_is_said_and_has_a_limit(tmp_path):
    started, release = threading.Event(), threading.Event()

    def build():
        started.set()
        release.wait(30)
        return ARRAYS

    builder = threading.Thread(target=lambda: make_store(tmp_path)[0].get("kind", KEY, 1, build))
    builder.start()
    started.wait(30)
    impatient, notes = make_store(tmp_path, wait_seconds=0.0)
    with pytest.raises(DataError, match=r"E357.*lock"):
        impatient.get("kind", KEY, 1, Builder())
    assert len(notes) == 1 and "waiting" in notes[0]
    patient, notes = make_store(tmp_path)
    later = Builder()
    threading.Timer(0.3, release.set).start()
    assert same(patient.get("kind", KEY, 1, later)) and later.calls == 0
    builder.join()


# ---- what is kept ----


def test_marks_of_later_epochs_are_kept_when_they_are_reached(tmp_path, monkeypatch):
    lengths = np.random.default_rng(0).integers(0, 60, 200).astype(np.int32)
    plain = IndependentOrder(lengths, "abc", 32, 3)
    store, _ = make_store(tmp_path)
    kept = IndependentOrder(lengths, "abc", 32, 3, store)
    per_epoch = int(lengths.sum()) // 32
    for position in (0, per_epoch // 2, 2 * per_epoch + 1):
        assert kept.locate(sample(kept, position)[1]) == plain.locate(sample(plain, position)[1])
    assert len(list(tmp_path.glob("marks-*.index"))) == 2
    monkeypatch.setattr(order.index, "epoch_marks", None)  # nothing may be built now
    again = IndependentOrder(lengths, "abc", 32, 3, store)
    again.prepare(2 * per_epoch + 1, 2 * per_epoch + 5)
    assert again.locate(sample(again, 5)[1]) == plain.locate(sample(plain, 5)[1])


def test_megatrons_arrays_are_kept(tmp_path, monkeypatch):
    lengths = np.random.default_rng(0).integers(0, 60, 200).astype(np.int32)
    plain = MegatronOrder(lengths, 32, 3, 500)
    store, _ = make_store(tmp_path)
    MegatronOrder(lengths, 32, 3, 500, store, "abc")
    monkeypatch.setattr(order, "build_megatron_index", None)
    kept = MegatronOrder(lengths, 32, 3, 500, store, "abc")
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(kept.index, plain.index))
    assert not kept.index.documents.flags.writeable
    for position in range(0, 500, 7):
        assert kept.locate(sample(kept, position)[1]) == plain.locate(sample(plain, position)[1])


def test_a_far_sample_of_a_kept_mix_counts_nothing(tmp_path, monkeypatch):
    store, _ = make_store(tmp_path)
    n = 4 * _BLOCK + 10
    plain = Blend([142, 128, 38])
    assert Blend([142, 128, 38], store=store, num_samples=n)[n - 1] == plain[n - 1]
    kept = Blend([142, 128, 38], store=store, num_samples=n)
    monkeypatch.setattr(Blend, "_count_blocks", None)
    assert kept[n - 1] == plain[n - 1] and kept[0] == plain[0]
    longer = Blend([142, 128, 38])
    monkeypatch.undo()
    assert longer[n + _BLOCK] == Blend([142, 128, 38], store=store, num_samples=n)[n + _BLOCK]  # beyond what is kept
    assert np.array_equal(kept.counts(n), np.bincount(draw_whole([142, 128, 38], "chairman", n)[0], minlength=3))


@pytest.mark.parametrize("kind", ["independent", "megatron"])
def test_a_run_with_kept_indices_reads_the_same(tmp_path, monkeypatch, kind):
    sources = {}
    for k, count in enumerate((300, 200)):
        write_dataset(tmp_path / str(k), np.random.default_rng(k).integers(0, 50, count), seed=k)
        sources[str(tmp_path / str(k))] = 1.0 + k
    plain = TrainData(sources, 16, 1, kind, 900).read(0, 900).windows
    assert not list(tmp_path.glob("*.index"))
    monkeypatch.setattr(index_files, "SMALLEST", 0)
    monkeypatch.setattr(IndexStore.__init__, "__defaults__", (say, 0, 60.0))
    beside = TrainData(sources, 16, 1, kind, 900)
    beside.prepare(0, 900)
    assert all(list(tmp_path.glob(f"{k}.index/*.index")) for k in range(2))
    assert np.array_equal(beside.read(0, 900).windows, plain)
    chosen = TrainData(sources, 16, 1, kind, 900, index_folder=tmp_path / "chosen")
    assert np.array_equal(chosen.read(0, 900).windows, plain)
    assert list((tmp_path / "chosen").glob("*.index"))


def test_building_ahead(tmp_path, monkeypatch):
    write_dataset(tmp_path / "d", [40, 50, 60])
    monkeypatch.setattr(IndexStore.__init__, "__defaults__", (say, 0, 60.0))
    plan = IndexPlan({str(tmp_path / "d"): 1.0}, 16, 1, 5)
    lines = list(build_indices(plan, epochs=3))
    assert len(list((tmp_path / "d.index").glob("marks-*.index"))) == 3 and "150 tokens" in lines[0]
    with pytest.raises(ConfigError, match="E286"):
        list(build_indices(plan, epochs=0))
    with pytest.raises(ConfigError, match="E286"):
        list(build_indices(IndexPlan({str(tmp_path / "d"): 1.0}, 16, 1, 5, "megatron"), epochs=1))


def test_the_folder_is_a_setting_and_the_launcher_builds(tmp_path, monkeypatch):
    monkeypatch.setattr(IndexStore.__init__, "__defaults__", (say, 0, 60.0))
    write_dataset(tmp_path / "d", [40, 50, 60], vocab_size=300)
    (tmp_path / "c.yaml").write_text(
        "model: {hidden_size: 8, ffn_hidden_size: 8, num_layers: 1, num_attention_heads: 1, vocab_size: 300}\n"
        f"data: {{train: {tmp_path / 'd'}, seq_length: 16, index_folder: {tmp_path / 'chosen'}}}\n"
        f"train: {{output: {tmp_path / 'out'}, num_steps: 4, global_batch_size: 2, micro_batch_size: 1}}\n"
    )
    config = load_config(tmp_path / "c.yaml")
    assert plan_of(config).index_folder == str(tmp_path / "chosen")
    prepare(config, 1)
    assert len(list((tmp_path / "chosen").glob("marks-*.index"))) == 1 and not (tmp_path / "d.index").exists()
    monkeypatch.setattr(order.index, "epoch_marks", None)  # a rank only opens it
    prepare(config, 1, check_data=False)
    TrainData({str(tmp_path / "d"): 1.0}, 16, config.train.seed, index_folder=tmp_path / "chosen").read(0, 2)
    (tmp_path / "taken").write_text("")
    blocked = load_config(tmp_path / "c.yaml", [f"data.index_folder={tmp_path / 'taken'}"])
    monkeypatch.undo()
    monkeypatch.setattr(IndexStore.__init__, "__defaults__", (say, 0, 60.0))
    assert any("data.index_folder" in note for note in prepare(blocked, 1).data_notes)


NUMBERS = ["--seq-length", "16", "--seed", "1", "--samples", "9"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--prefix", "d", *NUMBERS], 0),
        (["--prefix", "2=d", "--prefix", "e", *NUMBERS, "--order", "megatron"], 0),
        (["c.yaml", "train.seed=5"], 0),
        (["--prefix", "d"], "E285"),
        ([], "E285"),
        (["c.yaml", "--prefix", "d"], "E285"),
        (["--prefix", "nothing", *NUMBERS], "E330"),
    ],
)  # fmt: skip
def test_the_program(tmp_path, arguments, code):
    for name in "de":
        write_dataset(tmp_path / name, [40, 50, 60])
    (tmp_path / "c.yaml").write_text(
        "model: {hidden_size: 8, ffn_hidden_size: 8, num_layers: 1, num_attention_heads: 1}\n"
        "data: {train: d, seq_length: 16}\n"
    )
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "build_index.py", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    if code == 0:
        assert done.returncode == 0, done.stderr
        assert "d: 3 documents, 150 tokens" in done.stdout and "all indices are there" in done.stdout
    else:
        assert done.returncode == int(code[1]) and done.stderr.startswith(f"error[{code}]")


def test_a_kept_index_holds_no_descriptor(tmp_path: Path) -> None:
    store = IndexStore(tmp_path, smallest=0)
    before = len(os.listdir("/proc/self/fd"))
    kept = [store.get("k", {"n": n}, 1, lambda: {"a": np.arange(100)}) for n in range(20)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert all(np.array_equal(arrays["a"], np.arange(100)) for arrays in kept)
