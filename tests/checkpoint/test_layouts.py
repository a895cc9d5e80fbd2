"""Any layout loads what any layout saved, bit for bit; padding never reaches a file."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from megatron_hammer.base.errors import CheckpointError
from megatron_hammer.checkpoint import read as load
from megatron_hammer.checkpoint.inspect import verify_checkpoint
from megatron_hammer.checkpoint.manifest import read_manifest, saved_model, slice_key
from megatron_hammer.checkpoint.read import (
    LogicalReader,
    load_model,
    load_shards,
    read_logical,
)
from megatron_hammer.checkpoint.write import save_checkpoint
from megatron_hammer.model.llama import build_stage
from megatron_hammer.model.parameters import logical_shapes, parameter_table
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.train.step import train_step
from tests.checkpoint.layouts import (
    KINDS,
    config_tree,
    load_layout,
    random_logical,
    rank_shards,
    tiny_model,
    write_layout,
)
from tests.distributed import run_distributed
from tests.model.tiny import build, make_context, rank_batches, tiny_config

LAYOUTS = [(tp, dp) for tp in (1, 2, 4, 8) for dp in (1, 2, 3)]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def saved(request, tmp_path_factory):
    """The same logical state, saved by every layout."""
    model = tiny_model(tie_word_embeddings=request.param)
    tensors = random_logical(model)
    folder = tmp_path_factory.mktemp("layouts")
    return model, tensors, {(tp, dp): write_layout(folder / f"{tp}-{dp}", model, tensors, tp, dp) for tp, dp in LAYOUTS}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_saves_the_same_logical_tensors(saved, layout):
    model, tensors, manifests = saved
    manifest = manifests[layout]
    assert manifest.index.keys() == tensors.keys()
    verify_checkpoint(manifest)
    for (name, kind), tensor in tensors.items():
        assert torch.equal(read_logical(manifest, name, kind), tensor)
    stored = sum(f.size for f in manifest.files)
    headers = sum(int.from_bytes((manifest.folder / f.name).read_bytes()[:8], "little") + 8 for f in manifest.files)
    true_size = 4 * len(KINDS) * sum(torch.Size(s).numel() for s in logical_shapes(model).values())
    assert stored - headers == true_size  # no padded row, nothing twice


@pytest.mark.parametrize("target", [(1, 1), (2, 3), (4, 1), (8, 2)], ids=str)
def test_every_layout_loads_from_every_layout(saved, target):
    model, tensors, manifests = saved
    expected = [rank_shards(model, r, *target, tensors, poison=-5.0) for r in range(target[0] * target[1])]
    for manifest in manifests.values():
        for found, wanted in zip(load_layout(manifest, model, *target), expected, strict=True):
            for a, b in zip(found, wanted, strict=True):
                for kind in KINDS:
                    assert torch.equal(a.tensors[kind], b.tensors[kind]), (a.parameter.name, kind)


@pytest.mark.parametrize("chunk_bytes, open_files", [(4, 1), (200, 2), (2**22, 16)])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_bands_make_up_the_tensors_of_every_layout(saved, layout, chunk_bytes, open_files, monkeypatch):
    """Bands of one row, of some, and whole tensors; files closed and opened again between them."""
    monkeypatch.setattr(load, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(load, "MAX_OPEN_FILES", open_files)
    _, tensors, manifests = saved
    with LogicalReader(manifests[layout]) as reader:
        for (name, kind), tensor in tensors.items():
            bands = [band.clone() for band in reader.bands(name, kind)]
            row_bytes = 4 * tensor[0].numel()
            assert len(bands) == -(-len(tensor) // max(1, chunk_bytes // row_bytes))
            assert torch.equal(torch.cat(bands), tensor)
            assert len(reader._readers) <= open_files
        with pytest.raises(CheckpointError, match=r"E413.*weight lm\.tail is missing"):
            list(reader.bands("lm.tail"))


def test_a_changed_bit_ends_the_bands_of_its_tensor_and_of_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "CHUNK_BYTES", 200)
    model = tiny_model()
    manifest = write_layout(tmp_path, model, random_logical(model), 2, 2)
    path = manifest.folder / manifest.files[-1].name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    damaged = []
    with LogicalReader(manifest) as reader:
        for tensor in manifest.tensors:
            try:
                list(reader.bands(tensor.name, tensor.kind))
            except CheckpointError as error:
                assert "E411" in str(error) and manifest.files[-1].name in str(error)
                damaged.append(tensor)
    last = manifest.files[-1].slices[-1].tensor
    assert damaged == [manifest.tensors[last]]


def test_files_are_readable_by_the_safetensors_package(saved):
    _, tensors, manifests = saved
    manifest = manifests[2, 3]
    for file in manifest.files:
        with safe_open(manifest.folder / file.name, framework="pt") as reader:
            keys = {
                s: slice_key(tensor.name, tensor.kind, s.rows, s.cols) for s, tensor in _with_tensors(manifest, file)
            }
            assert set(reader.keys()) == set(keys.values())
            for saved, tensor in _with_tensors(manifest, file):
                part = tensors[tensor.name, tensor.kind][saved.rows[0] : saved.rows[1]]
                part = part if saved.cols is None else part[:, saved.cols[0] : saved.cols[1]]
                assert torch.equal(reader.get_tensor(keys[saved]), part)


def _with_tensors(manifest, file):
    return [(saved, manifest.tensors[saved.tensor]) for saved in file.slices]


def test_a_slice_is_read_at_most_once_and_in_place_where_it_fits(saved, monkeypatch):
    from megatron_hammer.checkpoint.tensor_files import TensorFileReader

    model, _, manifests = saved
    read: list[str] = []
    original = TensorFileReader.read_into
    monkeypatch.setattr(TensorFileReader, "read_into", lambda self, n, b: read.append(n) or original(self, n, b))
    load_layout(manifests[4, 3], model, 1, 1)
    assert len(read) == len(set(read)) == sum(len(f.slices) for f in manifests[4, 3].files)
    monkeypatch.setattr(torch, "empty", lambda *a, **k: pytest.fail("the same layout needs no buffer"))
    load_layout(manifests[2, 3], model, 2, 3)


def test_weights_load_without_moments_but_moments_do_not_without_being_there(tmp_path):
    model = tiny_model()
    tensors = random_logical(model, kinds=("weight",))
    manifest = write_layout(tmp_path, model, tensors, 2, 2)
    for shards in load_layout(manifest, model, 1, 2, kinds=("weight",)):
        assert not any(s.tensors["weight"].isnan().any() for s in shards)
    with pytest.raises(CheckpointError, match=r"E412.*holds no exp_avg.*checkpoint\.init_from"):
        load_layout(manifest, model, 1, 2)


@pytest.mark.parametrize("change, named", [
    ({"vocab_size": 132}, "model.vocab_size=132 must be 131"),
    ({"num_attention_heads": 4, "head_dim": 8}, "num_attention_heads"),  # the same shapes, another function
    ({"rope_theta": 500000.0}, "rope_theta"),
    ({"norm_eps": 1e-6}, "norm_eps"),
    ({"num_layers": 2}, "num_layers"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings"),
])  # fmt: skip
def test_another_model_is_refused_by_the_name_of_the_setting(tmp_path, change, named):
    model = tiny_model()
    manifest = write_layout(tmp_path, model, random_logical(model, kinds=("weight",)))
    with pytest.raises(CheckpointError, match=named):
        load_layout(manifest, tiny_model(**change), 1, 1, kinds=("weight",))


def test_a_model_loads_rounded_and_unrounded(tmp_path):
    model = tiny_model()
    tensors = random_logical(model, kinds=("weight",))
    manifest = write_layout(tmp_path, model, tensors, 4, 1)
    ctx = ParallelContext.single()
    for dtype in (None, torch.bfloat16, torch.float16):
        llama = build_stage(saved_model(manifest), ctx)
        load_model(llama, parameter_table(model), manifest, ctx, round_to=dtype)
        head = tensors["lm_head.weight", "weight"]
        assert torch.equal(llama.head.weight[:131], head if dtype is None else head.to(dtype).float())
        assert llama.head.weight[131:].eq(0).all()


def _save_and_load(rank: int, tp: int, precision: str, folder: str) -> list[tuple[str, bool]]:
    """Two steps, save, two more; then load and repeat them: bit-equal."""
    config = tiny_config(parallel__tensor_model_parallel_size=tp, train__precision=precision, model__num_layers=1)
    ctx = make_context(config)
    model, optimizer = build(config, ctx)

    def steps(first, last):
        for n in range(first, last + 1):
            train_step(model, optimizer, rank_batches(config, n, ctx), config, n, ctx)
        return {(s.parameter.name, s.start, k): t.clone() for s in optimizer.shards() for k, t in s.tensors.items()}

    steps(1, 2)
    generator = torch.get_rng_state()
    path = save_checkpoint(folder, 2, optimizer.shards(), model=config.model, config_tree=config_tree(config.model),
                           state=optimizer.scalar_state(), tokenizer=None, ctx=ctx)  # fmt: skip
    assert torch.equal(generator, torch.get_rng_state()), "a save must not draw random numbers"
    after = steps(3, 4)
    manifest = read_manifest(path)
    load_shards(manifest, optimizer.shards(), model=config.model, kinds=KINDS, ctx=ctx)
    optimizer.load_scalar_state(manifest.state)
    optimizer.copy_params_from_masters()
    again = steps(3, 4)
    return [(str(key), torch.equal(after[key], again[key])) for key in after]


@pytest.mark.parametrize("world, tp, precision", [(1, 1, "fp32"), (2, 1, "bf16"), (2, 2, "fp32")])
def test_real_ranks_save_and_load(tmp_path, world, tp, precision):
    results = run_distributed(world, _save_and_load, tp, precision, str(tmp_path / "checkpoints"))
    assert all(same for result in results for _, same in result)
    manifest = read_manifest(tmp_path / "checkpoints" / "step-00000002")
    assert (manifest.layout.world, manifest.layout.tp, len(manifest.files)) == (world, tp, world)
    verify_checkpoint(manifest)
    assert sorted(p.name for p in manifest.folder.iterdir()) == sorted(
        ["manifest.json", *(f.name for f in manifest.files)]
    )


def _fail_on_one_rank(rank: int, folder: str) -> str:
    """Rank 1's disk is full: both ranks must raise the same error."""
    import errno

    from megatron_hammer.base.errors import HammerError
    from megatron_hammer.checkpoint import write as save

    config = tiny_config(model__num_layers=1)
    ctx = make_context(config)
    _, optimizer = build(config, ctx)
    original = save.write_rank
    if rank == 1:

        def fail(*args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device", "rank-00001.safetensors")

        save.write_rank = fail
    try:
        save_checkpoint(folder, 5, optimizer.shards(), model=config.model, config_tree=config_tree(config.model),
                        state={}, tokenizer=None, ctx=ctx)  # fmt: skip
    except HammerError as error:
        return str(error)
    finally:
        save.write_rank = original
    return "saved"


def test_a_full_disk_on_one_rank_is_raised_on_all_and_leaves_nothing(tmp_path):
    results = run_distributed(2, _fail_on_one_rank, str(tmp_path / "checkpoints"))
    assert results[0] == results[1] and "E601" in results[0] and "No space left" in results[0]
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_all_slices_of_a_big_layout_stay_a_small_manifest(tmp_path):
    model = tiny_model(num_layers=2)
    manifest = write_layout(tmp_path, model, random_logical(model), 8, 3)
    size = (manifest.folder / "manifest.json").stat().st_size
    slices = list(itertools.chain.from_iterable(f.slices for f in manifest.files))
    assert size < 90 * len(slices) + 8000, f"{size} bytes for {len(slices)} slices"
    assert Path(manifest.folder).name == "step-00000007"
