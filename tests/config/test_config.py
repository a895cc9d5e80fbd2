"""The config tree: what is read, what is refused and how, and that help and echo tell the truth."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.config import (
    Config,
    config_from_tree,
    config_to_tree,
    describe_fields,
    help_text,
    load_config,
    to_yaml,
)
from megatron_hammer.parallel.placement import padded_vocab_size

MODEL = "model: {hidden_size: 64, ffn_hidden_size: 128, num_layers: 2, num_attention_heads: 8, num_query_groups: 2}\n"


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    path = tmp_path / "preset.yaml"
    path.write_text(MODEL, encoding="utf-8")
    return path


def test_overrides_in_order(preset: Path) -> None:
    config = load_config(
        preset,
        [
            "optimizer.lr=1e-3",
            "train.num_steps=1e3",
            "optimizer.lr=5e-4",
            "data.train=/a/中文",
            "data.valid={zh: /v/zh, en: /v/en}",
            "train.dry_run=true",
        ],
    )
    assert config.optimizer.lr == 5e-4, "the last one wins, and YAML's dotless float is a number"
    assert config.train.num_steps == 1000 and config.train.dry_run
    assert config.data.train == {"/a/中文": 1.0} and config.data.valid == {"zh": "/v/zh", "en": "/v/en"}
    assert load_config(preset, ['data.train={"/a: b": 142, /c: 128}']).data.train == {"/a: b": 142.0, "/c": 128.0}
    assert load_config(preset, ["data.valid=null"]).data.valid is None


def test_nested_group(preset: Path) -> None:
    scaling = "{factor: 8, low_freq_factor: 1, high_freq_factor: 4, original_max_position_embeddings: 8192}"
    config = load_config(preset, [f"model.rope_scaling={scaling}", "model.rope_scaling.factor=32"])
    assert config.model.rope_scaling is not None and config.model.rope_scaling.factor == 32.0


def test_echo_reads_back(preset: Path, tmp_path: Path) -> None:
    config = load_config(preset, ["data.train={/a: 2, /b: 1}", "schedule.style=wsd", "optimizer.eps=1e-9"])
    echo = tmp_path / "echo.yaml"
    echo.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(echo) == config
    assert config_from_tree(config_to_tree(config)) == config


def test_off_is_a_word(preset: Path, tmp_path: Path) -> None:
    """YAML 1.1 reads off, unquoted, as False; in a file, as an argument, and as written back."""
    assert yaml.safe_load("off") is False
    file = tmp_path / "off.yaml"
    file.write_text(preset.read_text(encoding="utf-8") + "kernels: {fp8: off}\n", encoding="utf-8")
    for config in (load_config(file), load_config(preset, ["kernels.fp8=off"])):
        assert config.kernels.fp8 == "off"
        file.write_text(to_yaml(config), encoding="utf-8")
        assert load_config(file) == config
    with pytest.raises(ConfigError, match=r"E203.*kernels\.fp8=True"):
        load_config(preset, ["kernels.fp8=on"])


def test_nothing_mutates_it(preset: Path) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config(preset).optimizer.lr = 1.0  # type: ignore[misc]


REFUSED = [  # argument, code, what the line must name
    ("optimizer.lrr=1", "E202", ["optimizer.lrr", "optimizer.lr?"]),
    ("optim.lr=1", "E202", ["optim", "optimizer"]),
    ("train.lr=1", "E202", ["train.lr", "optimizer.lr"]),
    ("model.hiden_size=1", "E202", ["model.hidden_size"]),
    ("train.precision=bf61", "E203", ["train.precision=bf61", "bf16"]),
    ("train.num_steps=ten", "E203", ["train.num_steps", "int"]),
    ("train.num_steps=1.5", "E203", ["train.num_steps", "int"]),
    ("train.dry_run=1", "E203", ["train.dry_run", "bool"]),
    ("train=5", "E201", ["group.field=value"]),
    ("nonsense", "E201", ["group.field=value"]),
    ("train.seed=[1", "E208", ["train.seed", "YAML"]),
    ("train.output=runs/\udcce", "E208", ["train.output holds a name that is not UTF-8", "convmv"]),
    ("data.train={}", "E203", ["data.train"]),
    ("data.train={/a: 0}", "E204", ["/a", "positive"]),
    ("data.train={/a: .nan}", "E204", ["/a"]),
    ("optimizer.beta2=1", "E204", ["optimizer.beta2"]),
    ("optimizer.min_lr=1", "E204", ["optimizer.min_lr", "optimizer.lr"]),
    ("optimizer.lr=.nan", "E204", ["optimizer.lr"]),
    ("optimizer.lr=1" + 350 * "0", "E208", ["optimizer.lr", "too many digits"]),
    ("train.num_steps=0x1" + 250 * "0", "E208", ["train.num_steps", "too many digits"]),
    ("checkpoint.keep_last=1", "E204", ["checkpoint.keep_last", "2"]),
    ("checkpoint.keep_every_steps=0", "E204", ["checkpoint.keep_every_steps", "1"]),
    ("checkpoint.pinned_steps=[0]", "E204", ["checkpoint.pinned_steps=[0]", "from 1"]),
    ("checkpoint.background_timeout_seconds=0", "E204", ["checkpoint.background_timeout_seconds=0", "positive"]),
    ("parallel.pipeline_model_parallel_size=0", "E204", ["pipeline_model_parallel_size"]),
    ("parallel.virtual_pipeline_stages=2", "E204", ["virtual_pipeline_stages=2 needs", "pipeline_model_parallel_size"]),
    ("parallel.sequence_parallel=true", "E204", ["sequence_parallel"]),
    ("parallel.tensor_model_parallel_size=3", "E205", ["num_attention_heads=8", "1, 2, 4 or 8"]),
    ("parallel.context_parallel_size=0", "E204", ["context_parallel_size=0"]),
    ("parallel.context_parallel_size=3", "E205", ["context_parallel_size=3", "must divide the 4 ranks"]),
    ("model.ffn_hidden_size=126", None, []),
    ("model.num_query_groups=3", "E204", ["num_query_groups=3", "num_attention_heads=8"]),
    ("model.head_dim=7", "E204", ["head_dim"]),
    ("model.num_attention_heads=7", "E204", ["num_query_groups"]),
    ("train.global_batch_size=6", "E205", ["train.global_batch_size=6", "multiple of 4"]),
    ("train.num_steps=0", "E204", ["train.num_steps=0"]),
    ("data.seq_length=0", "E204", ["data.seq_length"]),
    ("data.weights=token", "E203", ["data.weights=token", "tokens"]),
    ("data.max_epochs=0", "E204", ["data.max_epochs=0"]),
    ("data.max_epochs=.nan", "E204", ["data.max_epochs"]),
    ("data.attention_mask=documents", "E203", ["data.attention_mask=documents", "causal, document", "mean document?"]),
    ("kernels.attention=flash", "E203", ["kernels.attention=flash", "sdpa-documents"]),
    (
        "kernels.attention=varlen",
        "E209",
        ["kernels.attention=varlen", "data.attention_mask=causal", "auto or fused or cudnn or sdpa"],
    ),
    ("kernels.loss=liger", "E203", ["kernels.loss=liger", "auto, fused, triton, torch"]),
    ("kernels.loss_chunk_tokens=0", "E204", ["kernels.loss_chunk_tokens=0"]),
    ("train.z_loss=-1e-4", "E204", ["train.z_loss"]),
    ("model.max_position_embeddings=64", "E205", ["data.seq_length", "max_position_embeddings"]),
]


@pytest.mark.parametrize("argument, code, names", REFUSED)
def test_refusals(preset: Path, argument: str, code: str | None, names: list[str]) -> None:
    def check() -> None:
        load_config(preset, [argument]).validate(world_size=4)

    if code is None:
        check()
        return
    with pytest.raises(ConfigError) as caught:
        check()
    line = str(caught.value)
    assert line.startswith(f"error[{code}]: ") and "\n" not in line and "; " in line
    for name in names:
        assert name in line, line


def test_tensor_parallel_obstacles(preset: Path) -> None:
    for argument, world, named in (
        ("model.ffn_hidden_size=126", 4, "ffn_hidden_size=126"),
        ("data.seq_length=2046", 4, "data.seq_length=2046"),
    ):
        config = load_config(
            preset, [argument, "parallel.tensor_model_parallel_size=4", "parallel.sequence_parallel=true"]
        )
        with pytest.raises(ConfigError, match=named):
            config.validate(world)
    with pytest.raises(ConfigError, match="must divide the 3 ranks"):
        load_config(preset, ["parallel.tensor_model_parallel_size=2"]).validate(3)


@pytest.mark.parametrize(
    "arguments, code, names",
    [
        (["data.seq_length=2046"], "E205", ["context_parallel_size=2 x 2", "seq_length=2046", "multiple of 4"]),
        (["data.seq_length=2044", "parallel.tensor_model_parallel_size=8", "parallel.sequence_parallel=true"], "E205",
         ["tensor_model_parallel_size=8", "seq_length=2044 / parallel.context_parallel_size=2"]),
        (["kernels.attention=sdpa"], "E209", ["kernels.attention=sdpa", "context_parallel_size=2", "varlen"]),
        (["kernels.attention=te", "train.device=cuda"], "E209", ["kernels.attention=te", "context_parallel_size=2"]),
        (["kernels.compile=layers"], "E215", ["kernels.compile=layers", "context_parallel_size=2"]),
        (["kernels.cuda_graph=true", "train.device=cuda"], "E216", ["cuda_graph=true", "context_parallel_size=2"]),
        (["kernels.layers=te", "train.device=cuda"], "E212", ["kernels.layers=te", "context_parallel_size=2"]),
        (["kernels.attention=sdpa-documents"], None, []),
        (["kernels.attention=fused", "data.attention_mask=document"], None, []),
    ],
)  # fmt: skip
def test_what_context_parallelism_does_not_go_with(
    preset: Path, arguments: list[str], code: str | None, names: list[str]
) -> None:
    config = load_config(preset, ["parallel.context_parallel_size=2", *arguments])
    if code is None:
        config.validate(4)
        return
    with pytest.raises(ConfigError) as caught:
        config.validate(16)
    for name in (f"error[{code}]: ", *names):
        assert name in str(caught.value), caught.value


def test_context_parallel_ranks_share_samples(preset: Path) -> None:
    """They are no data-parallel ranks: the global batch and what each rank computes of it."""
    config = load_config(preset, ["parallel.context_parallel_size=2"])
    config.validate(4)
    grid = config.grid(4)
    assert (grid.cp, grid.dp, grid.replicas, config.data_parallel_size(4)) == (2, 2, 4, 2)
    assert config.tokens_per_rank * 2 == config.train.micro_batch_size * config.data.seq_length


@pytest.mark.parametrize(
    "content, code",
    [
        (MODEL + "model: {hidden_size: 1}\n", "E208"),
        ("a: [", "E208"),
        ("- 1", "E208"),
        ("", "E207"),
        ("\xff", "E208"),
        ("model: {hidden_size: 64}", "E207"),
        ("model: 5", "E203"),
        ("model: &a {x: *a}", "E208"),
        ("model: !!python/object/apply:os.system ['true']", "E208"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, code: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert caught.value.code == code, caught.value


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"error\[E206\]: .*absent.yaml"):
        load_config(tmp_path / "absent.yaml")


def test_every_field_is_documented() -> None:
    text = help_text()
    for group, fields in describe_fields().items():
        for name, entry in fields.items():
            assert len(entry.text) > 10 and entry.text.endswith("."), f"{group}.{name} needs a docstring"
            assert f"{group}.{name} (" in text
    assert set(describe_fields()) == {f.name for f in dataclasses.fields(Config)}


@pytest.mark.parametrize(
    "vocab_size, tp, padded",
    [(105_789, 1, 105_856), (105_789, 2, 105_984), (105_789, 8, 106_496), (128, 1, 128), (1, 2, 256)],
)
def test_padding(vocab_size: int, tp: int, padded: int) -> None:
    """The sizes that Megatron-LM pads to as well."""
    assert padded_vocab_size(vocab_size, tp) == padded


PP = "parallel.pipeline_model_parallel_size"
INTERLEAVED = ["parallel.virtual_pipeline_stages=2"]


@pytest.mark.parametrize(
    "world_size, overrides, words",
    [
        (2, [f"{PP}=3"], [f"{PP}=3 x TP 1 x CP 1 must divide the 2 ranks", "1 or 2"]),
        (4, [f"{PP}=4", "model.num_layers=3"], [f"{PP}=4 must not exceed model.num_layers=3"]),
        (2, [f"{PP}=2", *INTERLEAVED, "model.num_layers=3"], ["virtual_pipeline_stages=2 must not exceed"]),
        (2, [f"{PP}=2", "parallel.pipeline_split=[1,1,2]"], ["[1, 1, 2] must have", "the 2 stages"]),
        (2, [f"{PP}=2", "parallel.pipeline_split=[1,2]"], ["has 3 layers", "num_layers=4", "make them 4"]),
        (2, [f"{PP}=2", "parallel.pipeline_split=[0,4]"], ["must give every stage a layer, but the last"]),
        (2, [f"{PP}=2", "parallel.pipeline_split=[5,-1]"], ["must give every stage a layer"]),
        (2, [f"{PP}=2", *INTERLEAVED, "train.global_batch_size=5"], ["not 5", "a multiple of 2"]),
        (2, [f"{PP}=2", "kernels.cuda_graph=true", "train.device=cuda"], ["is not for kernels.cuda_graph=true"]),
        (2, [f"{PP}=2", "kernels.layers=te", "kernels.fp8=current", "train.device=cuda"], ["kernels.fp8=current"]),
    ],
)  # fmt: skip
def test_what_a_pipeline_cannot_do_is_refused(
    preset: Path, world_size: int, overrides: list[str], words: list[str]
) -> None:
    config = load_config(preset, ["model.num_layers=4", *overrides])
    with pytest.raises(ConfigError) as caught:
        config.validate(world_size)
    assert "error[E205]" in str(caught.value) and all(word in str(caught.value) for word in words), caught.value


def test_a_pipeline_that_fits(preset: Path) -> None:
    for world_size, overrides in (
        (2, [f"{PP}=2", "parallel.pipeline_split=[4,0]"]),
        (8, [f"{PP}=2", *INTERLEAVED, "parallel.tensor_model_parallel_size=2", "train.global_batch_size=16"]),
    ):
        config = load_config(preset, ["model.num_layers=4", *overrides])
        config.validate(world_size)
        assert config.grid(world_size).pp == 2 and sum(config.layer_split()) == 4
