"""Checkpoints of Megatron-LM, in either layout of any ranks, give the weights they were made of; hostile ones none."""

from __future__ import annotations

import os
import pickle
import random
import shutil
from argparse import Namespace
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_hammer.base.errors import CheckpointError, ConfigError, RefusedError
from megatron_hammer.checkpoint.manifest import read_manifest, saved_model
from megatron_hammer.checkpoint.read import LogicalReader
from megatron_hammer.config import ModelConfig, config_from_tree, load_config
from megatron_hammer.megatron.distributed import DistributedReader
from megatron_hammer.megatron.importing import find_iteration, import_megatron, open_reader
from megatron_hammer.megatron.legacy import LegacyReader
from megatron_hammer.megatron.metadata import Chunk, check_whole
from tests.checkpoint.layouts import write_layout
from tests.huggingface.unproved import write_unproved
from tests.megatron.makes import logical_weights, model_for_tests, write_distributed, write_legacy
from tests.train.runs import checkpoint_bytes, overrides, train_here, write_dataset

PLAIN = model_for_tests(norm_eps=3e-6)
QWEN2 = model_for_tests(qkv_bias=True, tie_word_embeddings=True)
QWEN3 = model_for_tests(qk_norm=True)
BIASES = model_for_tests(qkv_bias=True, attention_output_bias=True, mlp_bias=True)


def weights_of(checkpoint: Path) -> dict[str, Tensor]:
    manifest = read_manifest(checkpoint)
    with LogicalReader(manifest) as reader:
        return {t.name: torch.cat([band.clone() for band in reader.bands(t.name)]) for t in manifest.tensors}


def convert(load: Path, save: Path, **more: Any) -> tuple[Path, list[str]]:
    notes: list[str] = []
    return import_megatron(load, save, note=notes.append, **more), notes


def check(checkpoint: Path, model: ModelConfig, logical: dict[str, Tensor]) -> None:
    found = weights_of(checkpoint)
    assert found.keys() == logical.keys()
    for name, tensor in logical.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name].view(tensor.shape), tensor), name
    saved = saved_model(read_manifest(checkpoint))
    for name in ("num_query_groups", "head_dim", "qk_norm", "qkv_bias", "mlp_bias", "tie_word_embeddings", "norm_eps"):
        assert getattr(saved, name) == getattr(model, name), name
    assert load_config(checkpoint.parents[1] / "model.yaml").model == saved


@pytest.mark.parametrize(
    "model, tp, pp, vpp, local_spec",
    [
        (PLAIN, 1, 1, 1, False),
        (PLAIN, 2, 2, 1, True),
        (PLAIN, 4, 1, 1, False),  # more ranks than query groups: each has half of a group
        (PLAIN, 2, 1, 2, False),  # interleaved: model0 and model1
        (QWEN2, 2, 2, 1, False),
        (QWEN3, 2, 1, 1, True),
        (BIASES, 2, 1, 1, False),
    ],
)
def test_legacy_files_of_any_ranks(
    model: ModelConfig, tp: int, pp: int, vpp: int, local_spec: bool, tmp_path: Path
) -> None:
    logical = logical_weights(model)
    write_legacy(tmp_path / "run", model, logical, tp, pp, vpp, local_spec)
    checkpoint, notes = convert(tmp_path / "run", tmp_path / "ours", vocab_size=131)
    check(checkpoint, model, logical)
    assert "iteration 100" in notes[0] and f"{256 * tp - 131} padding rows of {256 * tp}" in notes[0]
    assert "legacy format" in notes[1] and "not taken over" in notes[1]


def test_what_libraries_allow_torch_to_make_is_no_record(tmp_path: Path) -> None:
    """Some allow argparse.Namespace when they are imported."""
    write_legacy(tmp_path / "run", PLAIN, logical_weights(PLAIN))
    with torch.serialization.safe_globals([Namespace]):
        checkpoint, _ = convert(tmp_path / "run", tmp_path / "ours", vocab_size=131)
        assert Namespace in torch.serialization.get_safe_globals()
    check(checkpoint, PLAIN, logical_weights(PLAIN))


@pytest.mark.parametrize(
    "model, tp, stacked, halves",
    [(PLAIN, 1, True, False), (PLAIN, 2, True, False), (QWEN3, 2, False, True), (BIASES, 4, False, False)],
)
def test_torch_dist_of_any_ranks(model: ModelConfig, tp: int, stacked: bool, halves: bool, tmp_path: Path) -> None:
    logical = logical_weights(model)
    optimizer = "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_x.bucket_idx_0.exp_avg"
    write_distributed(tmp_path / "iter_0000100", model, logical, tp, stacked, halves, optimizer, recent=stacked)
    checkpoint, notes = convert(tmp_path / "iter_0000100", tmp_path / "ours", vocab_size=131)
    check(checkpoint, model, logical)
    assert "torch_dist" in notes[0] and "dp_reshardable" in notes[1]


def test_the_chunks_are_read_as_torchs_own_reader_does(tmp_path: Path) -> None:
    """Which also says that the test's files are what torch calls a distributed checkpoint."""
    import torch.distributed.checkpoint as dcp

    folder = write_distributed(tmp_path / "iter_0000100", PLAIN, logical_weights(PLAIN), tp=2)
    source = open_reader(folder)
    name = "mlp.linear_fc1.weight"
    shape = (PLAIN.num_layers, 2 * PLAIN.ffn_hidden_size, PLAIN.hidden_size)
    state = {f"decoder.layers.{name}": torch.empty(shape, dtype=torch.bfloat16)}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    for layer in range(PLAIN.num_layers):
        assert torch.equal(source.tensor(name, layer), state[f"decoder.layers.{name}"][layer])


def steps_of_adam(updates: Any) -> Any:
    """What common.pt has of the optimizer."""

    def change(state: dict[str, Any], t: int, p: int) -> None:
        groups = [{"step": updates, "lr": 1e-3}, {"step": updates, "lr": 1e-3}]
        state["optimizer"] = {"optimizer": {"param_groups": groups}, "param_state_sharding_type": "fully_reshardable"}

    return change


@pytest.mark.parametrize("tp", [1, 2])
def test_a_run_goes_on_from_a_fully_reshardable_optimizer(tp: int, tmp_path: Path) -> None:
    """Six steps of ours, in one go, equal two, by way of Megatron-LM's format, and then four: to the bit."""
    data, whole = tmp_path / "data", tmp_path / "whole"
    data.mkdir()
    for seed, name in enumerate("abxy"):
        write_dataset(data / name, 30, seed)
    more = (
        "train.num_steps=6",
        "checkpoint.save_interval_steps=2",
        "checkpoint.keep_last=4",
        "train.micro_batch_size=2",
    )
    assert train_here(0, overrides(data, whole, *more)) == 0
    manifest = read_manifest(whole / "checkpoints" / "step-00000002")
    config, model = config_from_tree(manifest.config), saved_model(manifest)
    found: dict[str, dict[str, Tensor]] = {}
    with LogicalReader(manifest) as reader:
        for t in manifest.tensors:
            bands = [band.clone() for band in reader.bands(t.name, t.kind)]
            found.setdefault(t.kind, {})[t.name] = torch.cat(bands).view(t.shape)
    args = {
        "lr": config.optimizer.lr, "min_lr": config.optimizer.min_lr, "adam_beta1": config.optimizer.beta1,
        "adam_beta2": config.optimizer.beta2, "adam_eps": config.optimizer.eps, "lr_decay_style": "cosine",
        "weight_decay": config.optimizer.weight_decay, "clip_grad": config.optimizer.clip_grad,
        "lr_warmup_iters": config.schedule.warmup_steps, "lr_decay_iters": config.schedule.decay_steps or 6,
        "train_iters": 6, "micro_batch_size": 2, "global_batch_size": 8, "seq_length": 32, "seed": 1234,
        "consumed_train_samples": 16, "max_position_embeddings": model.max_position_embeddings,
        "norm_epsilon": model.norm_eps, config.train.precision: True,
    }  # fmt: skip
    assert config.schedule.style == "cosine"
    states = {"param": found["weight"], "exp_avg": found["exp_avg"], "exp_avg_sq": found["exp_avg_sq"]}
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in found["weight"].items()}
    folder = write_distributed(
        tmp_path / "iter_0000002", model, weights, tp, states=states, change=steps_of_adam(2), recent=tp == 2, **args
    )
    checkpoint, notes = convert(folder, tmp_path / "ours", vocab_size=301, with_optimizer=True)
    assert checkpoint.name == "step-00000002" and len(notes) == 1
    assert train_here(0, overrides(data, tmp_path / "ours", *more, "--accept=data")) == 0
    assert checkpoint_bytes(tmp_path / "ours", 6) == checkpoint_bytes(whole, 6)


def test_other_formats_of_the_optimizer_are_named(tmp_path: Path) -> None:
    logical, flat = logical_weights(PLAIN), "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.exp_avg"
    write_distributed(tmp_path / "flat", PLAIN, logical, optimizer=flat)
    write_distributed(tmp_path / "none", PLAIN, logical)
    write_legacy(tmp_path / "legacy", PLAIN, logical)
    write_distributed(tmp_path / "bare", PLAIN, logical, states={"exp_avg": logical})
    for name, said in {
        "flat": "dp_reshardable",
        "none": "is not there",
        "legacy": "legacy format",
        "bare": "step",
    }.items():
        with pytest.raises(CheckpointError, match=rf"error\[E43[04]\].*{said}"):
            convert(tmp_path / name, tmp_path / "ours", vocab_size=131, with_optimizer=True)
    assert "--optimizer does" in convert(tmp_path / "bare", tmp_path / "ours", vocab_size=131)[1][1]


def test_values_of_other_types_are_no_numbers(tmp_path: Path) -> None:
    """Which NumPy's become records, of which nothing is computed."""
    logical = logical_weights(PLAIN)
    write_legacy(tmp_path / "run", PLAIN, logical, change=lambda state, t, p: state.update(iteration="many"))
    assert "iteration 0;" in convert(tmp_path / "run", tmp_path / "1", vocab_size=131)[1][0]
    write_distributed(tmp_path / "dist", PLAIN, logical, states={"exp_avg": logical}, change=steps_of_adam(np.int64(2)))
    with pytest.raises(CheckpointError, match=r"error\[E434\].*the optimizer's step is missing"):
        convert(tmp_path / "dist", tmp_path / "2", vocab_size=131, with_optimizer=True)


@pytest.mark.parametrize("field, value", [("length", 2**62), ("offset", 2**63)])
def test_a_chunk_lies_within_its_file(field: str, value: int, tmp_path: Path) -> None:
    folder = write_distributed(tmp_path / "iter_0000100", PLAIN, logical_weights(PLAIN))
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    setattr(next(iter(metadata.storage_data.values())), field, value)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"error\[E433\].*has a chunk beyond the end of __0_0.distcp"):
        convert(folder, tmp_path / "ours", vocab_size=131)


ODD: list[Any] = [
    None, True, -1, 2**62, 2**200, 1.5, float("nan"), "", "x" * 2000, b"raw", (), [], {}, {1: 2}, (1,) * 9, (-1, 2),
    (2**60, 2**60), [[1]], ("a", "b"), torch.bfloat16, torch.Size([3, 5]), {"a"}, 10**6,
]  # fmt: skip


def odd_metadata(content: bytes, rng: random.Random) -> bytes:
    """One value of the records is another, or one byte of the file; of what may stand where, nothing is assumed."""
    if rng.random() < 0.3:
        at = rng.randrange(len(content))
        return content[:at] + bytes([rng.randrange(256)]) * rng.choice([0, 1, 5]) + content[at + 1 :]
    metadata = pickle.loads(content)
    key = rng.choice([key for key in metadata.state_dict_metadata if not key.startswith(("rng", "common"))])
    entry, index = metadata.state_dict_metadata[key], rng.choice(list(metadata.storage_data))
    chunk, odd = rng.choice(entry.chunks), rng.choice([*ODD, entry, index])
    where, name = rng.choice([(metadata, "state_dict_metadata"), (metadata, "storage_data"), (entry, "size"),
                              (entry, "chunks"), (entry, "properties"), (chunk, "offsets"), (chunk, "sizes"),
                              (index, "fqn"), (index, "offset"), (metadata.storage_data[index], "relative_path"),
                              (metadata.storage_data[index], "offset"), (metadata.storage_data[index], "length"),
                              (metadata.storage_data[index], "transform_descriptors")])  # fmt: skip
    if rng.random() < 0.2 and name == "chunks":
        odd = rng.choice([[odd], [*entry.chunks, chunk], entry.chunks[1:], [chunk, odd]])
    object.__setattr__(where, name, odd)
    return pickle.dumps(metadata)


def test_metadata_of_odd_forms_is_refused_by_a_documented_error(tmp_path: Path) -> None:
    """Or is read as it was, where what has changed is not needed: it never ends in another way."""
    model = model_for_tests(num_attention_heads=2, num_query_groups=1, hidden_size=4, ffn_hidden_size=4, head_dim=2)
    folder = write_distributed(tmp_path / "iter_0000100", model, logical_weights(model), tp=2, recent=True)
    file = folder / ".metadata"
    content, rng, refused = file.read_bytes(), random.Random(18), 0
    names = sorted(open_reader(folder).names(), key=str)
    expected = {name: open_reader(folder).tensor(*name) for name in names}
    for _ in range(int(os.environ.get("HAMMER_ODD_METADATA", "120"))):
        file.write_bytes(odd_metadata(content, rng))
        try:
            source = open_reader(folder)
            for name in sorted(source.names(), key=str):
                source.dtype(*name)
                whole = source.tensor(*name)
                if name in expected and whole.dtype == torch.bfloat16 and whole.shape == expected[name].shape:
                    assert torch.equal(whole.view(torch.int16), expected[name].view(torch.int16)), name
        except CheckpointError as error:
            assert error.code in ("E430", "E431", "E433", "E434"), error
            refused += 1
    assert refused > 60


def test_a_pickle_cannot_ask_for_more_room_than_it_has_bytes(tmp_path: Path) -> None:
    """Its reader makes a table up to the highest mark: 34 GB for this one."""
    folder = write_distributed(tmp_path / "iter_0000100", PLAIN, logical_weights(PLAIN))
    (folder / ".metadata").write_bytes(b"\x80\x02}r\xff\xff\xff\x7f.")
    with pytest.raises(CheckpointError, match=r"error\[E433\].*marks an object with the number 2147483647"):
        open_reader(folder)


def test_chunks_cover_their_tensor_once(tmp_path: Path) -> None:
    """As many elements as it has, but twice the same ones: the others would be whatever lay in memory."""
    folder = write_distributed(tmp_path / "iter_0000100", PLAIN, logical_weights(PLAIN), tp=2, stacked=False)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    entry = metadata.state_dict_metadata["decoder.layers.0.mlp.linear_fc2.weight"]
    entry.chunks[1] = entry.chunks[0]
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"error\[E433\].*linear_fc2.weight has chunks that lie over each other"):
        convert(folder, tmp_path / "ours", vocab_size=131)


def cut(chunk: Chunk, times: int, draw: random.Random) -> list[Chunk]:
    """A rectangle cut in two, and these again."""
    if not times or not chunk.sizes:
        return [chunk]
    axis = draw.randrange(len(chunk.sizes))
    first, whole = draw.randrange(chunk.sizes[axis] + 1), chunk.sizes[axis]
    parts = [Chunk((*chunk.offsets[:axis], chunk.offsets[axis] + start, *chunk.offsets[axis + 1 :]),
                   (*chunk.sizes[:axis], size, *chunk.sizes[axis + 1 :]))
             for start, size in ((0, first), (first, whole - first))]  # fmt: skip
    return [piece for part in parts for piece in cut(part, times - 1, draw)]


def test_what_chunks_cover_is_known_from_their_corners() -> None:
    """As from a mark on each element, in up to three dimensions; many chunks are looked at in a moment."""
    draw, verdicts = random.Random(1), Counter[str]()
    for _ in range(2000):
        shape = tuple(draw.choices((0, 2, 3, 4, 5, 6), k=draw.randrange(4)))
        chunks = cut(Chunk((0,) * len(shape), shape), 3, draw)
        for place in draw.choices(range(len(chunks)), k=draw.randrange(6)):
            same = [chunk for chunk in chunks if chunk.numel == chunks[place].numel]
            chunks[place] = draw.choice(draw.choice([chunks, same]))
        marks = np.zeros(shape, np.int64)
        for chunk in chunks:
            marks[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))] += 1
        right = "" if (marks == 1).all() else "over each other" if marks.sum() == marks.size else "not all of its"
        said = check_whole(chunks, shape)
        assert right in said and bool(right) == bool(said), (shape, chunks)
        verdicts[right] += 1
    assert len(verdicts) == 3 and min(verdicts.values()) > 50, verdicts
    columns = [Chunk((0, column), (4, 1)) for column in range(50_000)]
    assert check_whole(columns, (4, 50_000)) == ""
    assert "lie over each other" in check_whole([*columns[1:], columns[1]], (4, 50_000))


def test_the_embedding_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logical, read = logical_weights(PLAIN), list[str]()
    write_legacy(tmp_path / "legacy", PLAIN, logical, tp=2)
    write_distributed(tmp_path / "dist", PLAIN, logical, tp=2)
    for source in (LegacyReader, DistributedReader):
        whole = source.tensor
        monkeypatch.setattr(source, "tensor", lambda self, name, layer, whole=whole: (
            read.append(name), whole(self, name, layer))[1])  # fmt: skip
    for name in ("legacy", "dist"):
        convert(tmp_path / name, tmp_path / f"of {name}", vocab_size=131)
    assert read.count("embedding.word_embeddings.weight") == 2, "once for each"


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of the weights that the tests' Megatron-LM checkpoints are made of."""
    folder = tmp_path_factory.mktemp("twin")
    logical = {(name, "weight"): tensor.float() for name, tensor in logical_weights(QWEN3).items()}
    manifest = write_layout(folder / "run", QWEN3, logical, 1, 1)
    write_unproved(manifest, folder / "hf")
    return folder / "hf"


def test_a_twin_proves_the_logits(twin: Path, tmp_path: Path) -> None:
    logical = logical_weights(QWEN3)
    write_legacy(tmp_path / "run", QWEN3, logical, tp=2)
    checkpoint, notes = convert(tmp_path / "run", tmp_path / "ours", twin=twin)  # which says the vocabulary, too
    check(checkpoint, QWEN3, logical)
    assert notes[-1].startswith("logits equal")
    name = "model.layers.1.self_attn.k_norm.weight"
    write_legacy(tmp_path / "other", QWEN3, logical | {name: logical[name] * 1.5}, tp=2)
    with pytest.raises(RefusedError, match=r"error\[E520\].*a twin of the same weights"):
        convert(tmp_path / "other", tmp_path / "no", twin=twin)
    assert not list((tmp_path / "no" / "checkpoints").iterdir()) and not (tmp_path / "no" / "model.yaml").exists()


def test_the_vocabulary_is_that_of_whoever_knows_it(tokenizer_model: Path, tmp_path: Path) -> None:
    logical = logical_weights(PLAIN)
    write_legacy(tmp_path / "said", PLAIN, logical, vocab_size=131)
    check(convert(tmp_path / "said", tmp_path / "1")[0], PLAIN, logical)
    write_legacy(tmp_path / "run", PLAIN, logical)
    checkpoint, notes = convert(tmp_path / "run", tmp_path / "2")
    assert len(weights_of(checkpoint)["lm_head.weight"]) == 256 and "nothing says" in notes[0]
    with pytest.raises(ConfigError, match="must be between 1 and the 256 rows"):
        convert(tmp_path / "run", tmp_path / "3", tokenizer_path=tokenizer_model)  # of 700 ids
    write_legacy(
        tmp_path / "wide", model_for_tests(vocab_size=700), logical_weights(model_for_tests(vocab_size=700)), 4
    )
    checkpoint, _ = convert(tmp_path / "wide", tmp_path / "4", tokenizer_path=tokenizer_model)
    assert len(weights_of(checkpoint)["lm_head.weight"]) == 700 and (checkpoint / "tokenizer").is_dir()


class Hostile:
    """Runs a command where it is unpickled by somebody who trusts it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


class HostileState(Hostile):
    """The same through a state."""

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"open({str(self.marker)!r}, 'w')",)


@pytest.mark.parametrize("kind", [Hostile, HostileState])
@pytest.mark.parametrize("place", ["args", "model", "common", "metadata", "chunk"])
def test_nothing_that_a_pickle_names_is_run(kind: type[Hostile], place: str, tmp_path: Path) -> None:
    marker, logical = tmp_path / "run-by-the-pickle", logical_weights(PLAIN)
    evil = kind(marker)

    def change(state: dict[str, Any], t: int, p: int) -> None:
        if place == "model":
            state["model"]["decoder.layers.0.evil"] = evil
        else:
            state["args"].evil = evil

    folder = tmp_path / "run"
    if place in ("args", "model"):
        write_legacy(folder, PLAIN, logical, change=change)
    elif place == "common":
        write_distributed(folder, PLAIN, logical, change=change)
    else:
        write_distributed(folder, PLAIN, logical)
        if place == "metadata":
            metadata = pickle.loads((folder / ".metadata").read_bytes())
            metadata.planner_data = evil
            (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        else:
            metadata = pickle.loads((folder / ".metadata").read_bytes())
            info = next(i for i in metadata.storage_data.values())
            with (folder / "__0_0.distcp").open("r+b") as file:
                file.seek(0, os.SEEK_END)
                info.offset = file.tell()
                torch.save(evil, file)
                info.length = file.tell() - info.offset
            (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError) as refused:
        convert(folder, tmp_path / "ours", vocab_size=131)
    assert not marker.exists() and not (tmp_path / "ours" / "checkpoints" / "step-00000000").exists()
    named = {Hostile: "posix.system", HostileState: "builtins.eval"}[kind]
    assert refused.value.code == "E431" and named in str(refused.value)


def test_a_state_dict_of_a_module_is_read_with_its_attributes(tmp_path: Path) -> None:
    """It is an OrderedDict that remembers versions, and parameters may be saved as such."""

    def change(state: dict[str, Any], t: int, p: int) -> None:
        model: Any = OrderedDict(state["model"])
        model._metadata = OrderedDict({"": {"version": 1}})
        name = "decoder.layers.0.mlp.linear_fc2.weight"
        model[name] = torch.nn.Parameter(model[name])
        model[name].tensor_model_parallel = True
        state["model"] = model

    logical = logical_weights(PLAIN)
    write_legacy(tmp_path / "run", PLAIN, logical, tp=2, change=change)
    checkpoint, _ = convert(tmp_path / "run", tmp_path / "ours", vocab_size=131)
    check(checkpoint, PLAIN, logical)


def remove(name: str) -> Any:
    return lambda state, t, p: state["model"].pop(name)


def replace_copy(state: dict[str, Any], t: int, p: int) -> None:
    if t == 1:
        state["model"]["decoder.final_layernorm.weight"][0] += 1


@pytest.mark.parametrize(
    "more, said",
    [
        ({"num_experts": 8}, r"E432.*args.num_experts=8"),
        ({"normalization": "LayerNorm"}, r"E432.*args.normalization=LayerNorm"),
        ({"rotary_percent": 0.5}, r"E432.*args.rotary_percent=0.5"),
        ({"apply_layernorm_1p": True}, r"E432.*args.apply_layernorm_1p=True"),
        ({"swiglu": False}, r"E432.*args.swiglu=False"),
        ({"use_mup": True}, r"E432.*args.use_mup=True"),
        ({"norm_epsilon": None}, r"E434.*args.norm_epsilon=None must be a positive number"),
        ({"hidden_size": "16"}, r"E434.*args.hidden_size=16 must be a positive"),
        ({"num_layers": 2**30}, r"E434.*args.num_layers=1073741824 must be a positive whole number of at most 10,000"),
        ({"norm_epsilon": "small"}, r"E434.*args.norm_epsilon=small must be a positive number"),
        ({"kv_channels": 2.5}, r"E434.*args.kv_channels=2.5 must be a positive whole number"),
        ({"window_size": torch.zeros(2)}, r"E432.*args.window_size=a tensor"),
        (
            {"change": lambda s, t, p: s["model"].update({"decoder.layers.0.mlp.linear_fc2.weight": torch.zeros(())})},
            r"E434.*linear_fc2.weight cannot be put together",
        ),
        ({"ffn_hidden_size": 32}, r"E434.*mlp.linear_fc1.weight.*has the shape \[48, 16\]"),
        ({"tensor_model_parallel_size": 4}, r"E433.*tensor_model_parallel_size=4 must be 2"),
        (
            {"change": remove("decoder.layers.0.mlp.linear_fc2.weight")},
            r"E434.*layers.0.mlp.linear_fc2.weight is missing",
        ),
        (
            {"change": lambda s, t, p: s["model"].update({"adapter.weight": torch.zeros(1)})},
            r"E434: adapter.weight|adapter.weight is no",
        ),
        ({"change": lambda s, t, p: s.update(checkpoint_version=1.0)}, r"E430.*checkpoint_version 1.0"),
        ({"change": replace_copy}, r"E435.*final_layernorm.weight differs between TP rank 0 and 1"),
    ],
)
def test_what_cannot_be_converted_is_named(more: dict[str, Any], said: str, tmp_path: Path) -> None:
    write_legacy(tmp_path / "run", PLAIN, logical_weights(PLAIN), tp=2, **more)
    with pytest.raises(CheckpointError, match=said):
        convert(tmp_path / "run", tmp_path / "ours", vocab_size=131)
    assert not (tmp_path / "ours" / "checkpoints" / "step-00000000").exists()


def test_damage_is_named(tmp_path: Path) -> None:
    run = write_legacy(tmp_path / "run", PLAIN, logical_weights(PLAIN), tp=2)
    file = run / "iter_0000100" / "mp_rank_01" / "model_optim_rng.pt"
    content = file.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"\x80\x04N."):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"error\[E433\].*mp_rank_01"):
            convert(run, tmp_path / "ours")
    shutil.rmtree(file.parent)
    (run / "iter_0000100" / "mp_rank_02").mkdir()
    shutil.copy(run / "iter_0000100" / "mp_rank_00" / "model_optim_rng.pt", run / "iter_0000100" / "mp_rank_02")
    with pytest.raises(CheckpointError, match=r"error\[E433\].*no file of TP rank 1"):
        convert(run, tmp_path / "ours")
    dist = write_distributed(tmp_path / "dist", PLAIN, logical_weights(PLAIN), tp=2)
    metadata = pickle.loads((dist / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = "../../etc/passwd"
    (dist / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"error\[E433\].*no file of a distributed checkpoint"):
        convert(dist, tmp_path / "ours")
    (dist / "metadata.json").unlink()
    (run / "latest_checkpointed_iteration.txt").unlink()
    for folder, said in ((dist, "no metadata.json; copy the whole"), (run, "name one, as .*run/iter_0000100")):
        with pytest.raises(CheckpointError, match=rf"E430.*{said}"):
            find_iteration(folder)
    for text in ("../run", "7", "x", "²"):
        (run / "latest_checkpointed_iteration.txt").write_text(text)
        with pytest.raises(CheckpointError, match="E430"):
            find_iteration(run)
    with pytest.raises(CheckpointError, match="E430"):
        find_iteration(tmp_path / "nowhere")
