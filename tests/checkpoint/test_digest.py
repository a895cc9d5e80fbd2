"""The digest of a state: one value for any layout and either backend, another one for any change."""

from __future__ import annotations

import dataclasses
import math
from concurrent.futures import wait
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from megatron_hammer.base.errors import CheckpointError
from megatron_hammer.checkpoint import live_state, one_pass
from megatron_hammer.checkpoint.digest import MODULUS, Factors, col_numbers, row_numbers
from megatron_hammer.checkpoint.inspect import verify_checkpoint
from megatron_hammer.checkpoint.live_state import LiveSums, check_live_state, sum_on_device
from megatron_hammer.checkpoint.manifest import Manifest, read_manifest, write_manifest
from megatron_hammer.checkpoint.one_pass import OnePass
from megatron_hammer.checkpoint.read import load_shards
from megatron_hammer.parallel.context import ParallelContext
from tests.checkpoint.layouts import KINDS, load_layout, random_logical, rank_shards, tiny_model, write_layout

MODEL = tiny_model(hidden_size=8, ffn_hidden_size=8, num_attention_heads=2, num_query_groups=1, vocab_size=33)
LAYOUTS = [(1, 1), (2, 1), (1, 3), (2, 2)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Manifest]:
    folder = tmp_path_factory.mktemp("digest")
    return {at: write_layout(folder / f"{at}", MODEL, random_logical(MODEL), *at) for at in LAYOUTS}


def test_every_layout_has_the_same(saved) -> None:
    first, *others = (manifest.state_digest for manifest in saved.values())
    assert first is not None and all(other == first for other in others)
    assert len(set(first.sums)) == len(first.sums)
    for manifest in saved.values():
        assert verify_checkpoint(manifest) == first


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["C++", "NumPy", "torch"])
def test_each_backend_sums_what_the_formula_says(dtype: str, backend: str, monkeypatch) -> None:
    if backend == "C++" and one_pass._native is None:
        pytest.skip("megatron_hammer.checkpoint._digest was not built")
    if backend == "NumPy":
        monkeypatch.setattr(one_pass, "_native", None)
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**16 if dtype == "bfloat16" else 2**32, (7, 11)).astype(
        "u2" if dtype == "bfloat16" else "u4"
    )
    rows, cols = row_numbers((20, 27)), col_numbers((5, 16))
    expected = sum(int(bits[r, c]) * int(rows[r]) * int(cols[c]) for r in range(7) for c in range(11)) % MODULUS
    if backend == "torch":
        view = torch.from_numpy(bits.view(bits.dtype.str.replace("u", "i")).reshape(-1))
        view = view.view(torch.bfloat16 if dtype == "bfloat16" else torch.float32)
        for at_once in (2**23, 20, 4):
            monkeypatch.setattr("megatron_hammer.checkpoint.live_state.ELEMENTS_AT_ONCE", at_once)
            assert int(sum_on_device(view, (20, 27), (5, 16))) % MODULUS == expected
        return
    for cut in (1, 3, 11, 12, 30, 77):
        part = OnePass(None, Factors((20, 27), (5, 16), dtype))
        for start in range(0, 77, cut):
            part.take(bits.reshape(-1)[start : start + cut].tobytes())
        assert part.total == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_added_side_by_side_are_those_of_the_formula(dtype: str) -> None:
    """In bands where the memory is read for the sum alone: rows left over, rows begun, an odd address."""
    bits = np.random.default_rng(3).integers(0, 2**16, (13, 700 * (1 if dtype == "bfloat16" else 2)), np.uint16)
    content = np.frombuffer(b"\0" + bits.tobytes(), np.uint8)[1:]
    factors = Factors((20, 33), (5, 705), dtype)
    expected, row = factors.sum_of(content.tobytes(), 0), bits[0].nbytes
    for cuts in ((), (1400,), (row,), (5 * row,), (5 * row + 8, 7 * row), (4 * row, 12 * row)):
        for whole in (content, content.copy()):
            part = OnePass(None, factors)
            for piece in np.split(whole, cuts):
                part.take(piece)
            assert part.total == expected


@pytest.mark.parametrize("backend", ["C++", "NumPy"])
def test_one_pass_copies_and_hashes_what_the_library_hashes(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size and the cuts, where the bytes lie, and whether they are copied; with a sum, too."""
    if backend == "C++" and one_pass._native is None:
        pytest.skip("megatron_hammer.checkpoint._digest was not built")
    if backend == "NumPy":
        monkeypatch.setattr(one_pass, "_native", None)
    content = memoryview(b"\0" + np.random.default_rng(2).bytes(9000))[1:]  # at an odd address
    for size in (0, 2, 62, 64, 66, 240, 242, 256, 1024, 1026, 1088, 1090, 2048, 2050, 9000):
        expected = xxhash.xxh3_128_hexdigest(content[:size])
        bits, factors = np.frombuffer(bytes(content[:size]), "u2"), col_numbers((3, 3 + size // 2))
        total = sum(int(b) * int(f) for b, f in zip(bits, factors)) * int(row_numbers((0, 1))[0]) % MODULUS
        for cut in (2, 64, 250, 1024, 1026, 5000):
            target, plain = bytearray(size + 1), OnePass(size)
            added = OnePass(size, Factors((3, 3 + size // 2), None, "bfloat16"))
            for at in range(0, size, max(cut, size // 100 * 2)):
                piece = content[at : min(at + max(cut, size // 100 * 2), size)]
                plain.take(piece)
                added.take(piece, memoryview(target)[at + 1 : at + 1 + len(piece)])
            assert plain.hexdigest() == added.hexdigest() == expected, (size, cut)
            assert target[1:] == content[:size] and plain.total == 0
            assert added.total == total


def test_any_change_is_another_sum() -> None:
    """A bit, two places exchanged, rows or columns exchanged, a sign and another."""

    def sum_of(values: np.ndarray) -> int:
        part = OnePass(None, Factors((0, 6), (0, 9), "float32"))
        part.take(np.ascontiguousarray(values).tobytes())
        return part.total

    values = np.random.default_rng(1).standard_normal((6, 9)).astype("f4")
    seen = {sum_of(values)}
    changes = [values[::-1], values[:, ::-1], np.roll(values, 1), -values, np.zeros_like(values)]
    for bit in range(32):
        changed = values.copy()
        changed.view("u4")[3, 4] ^= np.uint32(1 << bit)
        changes.append(changed)
    for changed in changes:
        seen.add(sum_of(changed))
    assert len(seen) == 1 + len(changes)


@pytest.mark.parametrize("layout", [(1, 1), (2, 2)])
def test_what_was_loaded_is_compared_whatever_the_layout(saved, layout: tuple[int, int], monkeypatch) -> None:
    """Ranks add up their parts, in threads; here one rank after the other."""
    monkeypatch.setattr(live_state, "ELEMENTS_OF_A_THREAD", 40)
    manifest = saved[2, 1]
    sums = [0] * len(manifest.tensors)
    for shards in load_layout(manifest, MODEL, *layout):
        sums = [(a + b) % MODULUS for a, b in zip(sums, LiveSums(manifest, shards).totals(), strict=True)]
    assert tuple(f"{value:016x}" for value in sums) == manifest.state_digest.sums


def test_a_live_state_that_is_another_is_named(saved) -> None:
    manifest, ctx = saved[1, 3], ParallelContext.single()
    shards = rank_shards(MODEL, 0, 1, 1, random_logical(MODEL))
    state = {"consumed_samples": 3}
    assert check_live_state(manifest, shards, 7, state, ctx) is None
    for step, other in ((8, state), (7, {"consumed_samples": 4})):
        with pytest.raises(CheckpointError, match=r"E417.*is not the state that was saved"):
            check_live_state(manifest, shards, step, other, ctx)
    last = shards[-1].tensors["exp_avg_sq"]
    last[0] = torch.nextafter(last[0], torch.tensor(9.0))
    with pytest.raises(CheckpointError, match=r"E417.*exp_avg_sq of .*not what was saved"):
        check_live_state(manifest, shards, 7, state, ctx)
    old = dataclasses.replace(manifest, state_digest=None)
    assert "without a digest" in str(check_live_state(old, shards, 7, state, ctx))


@pytest.mark.parametrize("layout, changes", [((1, 1), False), ((1, 1), True), ((2, 1), False)])
def test_what_is_added_up_while_the_rest_is_loaded(saved, layout: tuple[int, int], changes: bool, monkeypatch) -> None:
    """Each tensor once, where each is read right to its place; of a changed kind, which is one piece of memory as the
    optimizer has it, once more at the check; what another layout has cut, at the check alone."""
    manifest, ctx, added, early = saved[layout], ParallelContext.single(), list[int](), list[int]()
    nothing = {name: torch.full_like(t, torch.nan) for name, t in random_logical(MODEL).items()}
    shards = rank_shards(MODEL, 0, 1, 1, nothing)
    for kind in KINDS:
        parts = torch.cat([shard.tensors[kind] for shard in shards]).split([s.tensors[kind].numel() for s in shards])
        for shard, part in zip(shards, parts, strict=True):
            shard.tensors[kind] = part
    sum_of = live_state._sum_of
    monkeypatch.setattr(live_state, "_sum_of", lambda *part: (added.append(part[2].numel()), sum_of(*part))[1])
    sums = LiveSums(manifest, shards)
    begin = lambda at: (early.append(at), sums.begin(at))  # noqa: E731
    load_shards(manifest, shards, model=MODEL, kinds=KINDS, ctx=ctx, filled=begin)
    assert sorted(early) == (list(range(len(manifest.tensors))) if layout == (1, 1) else [])
    if changes:
        wait([future for _, futures in sums._begun.values() for future in futures])  # else some are never taken
        changed = shards[-1].tensors["exp_avg_sq"]
        changed[0] = torch.nextafter(changed[0].clone(), torch.tensor(9.0))
        with pytest.raises(CheckpointError, match=r"E417.*exp_avg_sq of .*not what was saved"):
            check_live_state(manifest, shards, 7, {"consumed_samples": 3}, ctx, sums)
    else:
        assert check_live_state(manifest, shards, 7, {"consumed_samples": 3}, ctx, sums) is None
    sizes = [math.prod(tensor.shape) for tensor in manifest.tensors]
    again = [math.prod(tensor.shape) for tensor in manifest.tensors if changes and tensor.kind == "exp_avg_sq"]
    assert sorted(added) == sorted(sizes + again)


@pytest.mark.parametrize("device, others", [("cpu", 3), ("meta", 0)])
def test_one_thread_adds_up_on_a_gpu(saved, device: str, others: int, monkeypatch) -> None:
    """Each would take room of its own on the device, of which several hundred MB, and all wait for one stream."""
    shards = rank_shards(MODEL, 0, 1, 1, random_logical(MODEL))
    shards = [
        dataclasses.replace(shard, tensors={k: t.to(device) for k, t in shard.tensors.items()}) for shard in shards
    ]
    monkeypatch.setattr(live_state, "_sum_of", lambda *part: 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    sums, asked = LiveSums(saved[1, 1], shards), list[object]()
    submit = sums._pool.submit
    monkeypatch.setattr(sums._pool, "submit", lambda work: (asked.append(work), submit(work))[1])
    assert sum(sums.totals()) > 0 and len(asked) == others


def test_an_old_checkpoint_has_none_and_a_wrong_one_is_damage(saved, tmp_path: Path) -> None:
    manifest = write_layout(tmp_path, MODEL, random_logical(MODEL))
    path = manifest.folder / "manifest.json"
    for known in (None, dataclasses.replace(manifest.state_digest, digest="0" * 32)):
        path.unlink()
        write_manifest(dataclasses.replace(manifest, state_digest=known))
        again = read_manifest(manifest.folder)
        assert again.state_digest == known
        if known is None:
            assert verify_checkpoint(again) == manifest.state_digest
        else:
            with pytest.raises(CheckpointError, match=r"E417.*the state does not match the digest"):
                verify_checkpoint(again)
