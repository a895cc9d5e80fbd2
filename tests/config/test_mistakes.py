"""A newcomer's mistakes in settings: each is answered by the line that cures it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_hammer.base.cli import ArgumentParser
from megatron_hammer.base.errors import ConfigError
from megatron_hammer.config import add_settings, load_config
from megatron_hammer.config.help import describe_fields
from megatron_hammer.config.mistakes import OTHER_NAMES

TINY = Path(__file__).parents[2] / "examples" / "configs" / "tiny.yaml"


def said(*overrides: str, path: str | Path = TINY) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    return str(error.value)


@pytest.mark.parametrize(
    "override, cure",
    [
        ("num_steps=5", "write train.num_steps=5"),
        ("lr=3", "write optimizer.lr=3"),
        ("train-iters=3", "write train.num_steps=3"),
        ("train.num_steps", "write train.num_steps=VALUE"),
        ("data.train=142 P 128 Q", "write {P: 142, Q: 128}"),
        ("data.train=P 142 Q 128", "write {P: 142, Q: 128}"),
        ("data.train=[142, P, 128, Q]", "write {P: 142, Q: 128}"),
        ("data.train=[P, Q]", "write {P: 1, Q: 1}"),
        ("data.train={a 1}", "write {a: 1}, with a colon and a blank"),
        ("data.train={a, b}", "write {a: 1, b: 1}"),
        ("data.train={a:1, b: 2}", "write {a: 1, b: 2}"),
        ("data.train={a 1, b 2}", "write {a: 1, b: 2}"),
        ("data.train=0.5 a, 0.5 b", "write {a: 0.5, b: 0.5}"),
        ("data.valid={zh}", "write {NAME: PREFIX}"),
        ("data.valid=p_text_document", "give the set a name: {valid: p_text_document}"),
        ("wandb=true", "write log.trackers=[wandb]"),
        ("train.precision=BF16", "did you mean bf16?"),
        ("kernels.attention=Flash_Attn", "did you mean flash-attn?"),
        ("log.wandb=true", "did you mean log.trackers=[wandb]?"),
        ("train.bf16=true", "did you mean train.precision=bf16?"),
        ("kernels.attention=flash-attn-2", "did you mean flash-attn?"),
        ("kernels.attention=flash_attention_2", "did you mean flash-attn?"),
        ("train.precision=bfloat16", "did you mean bf16?"),
        ("train.precision=float", "did you mean fp32?"),
        ("train.resume=true", "leave it out: the same command goes on from the newest checkpoint of train.output"),
        (
            "train.gpus=8",
            "--nproc N of python -m megatron_hammer.launch counts ranks, CUDA_VISIBLE_DEVICES chooses",
        ),
        ("model.rope_scaling=yarn", "write model.rope_scaling={rope_type: yarn, factor: VALUE, ...}"),
        ("model.rope_scaling=4", "write model.rope_scaling={factor: 4, ...}"),
        (
            "train.batch_size_ramp=[16, 16, 1000]",
            "write train.batch_size_ramp={start: 16, increment: 16, samples: 1000}",
        ),
        ("train.evaluator=true", "write train.evaluator={"),
        ("data.phases=200", "write data.phases[0]={train: 200"),
        ("data.fim={a: 0.5}", "write data.fim[a]={rate: 0.5"),
        ("train.precision=fp8", "write kernels.fp8=current"),
        ("parallel.shard=zero-3", "did you mean weights?"),
        ("parallel.shard=FSDP", "did you mean weights?"),
        ("log.trackers=tensorboard", "log.tensorboard=true is the default"),
        ("train.device=cuda:1", "write cuda, and choose the GPU with CUDA_VISIBLE_DEVICES=1"),
        ("train.device=gpu0", "CUDA_VISIBLE_DEVICES=0"),
        ("model.hidden_act=silu", "the feed-forward part is SwiGLU, as in every Llama"),
        ("model.attention_dropout=0.1", "nothing is dropped"),
        ("train.gradient_accumulation_steps=8", "it follows: train.global_batch_size"),
        ("train.num_train_epochs=3", "train.num_steps; the plan before training says how many make an epoch"),
        ("parallel.zero_stage=3", "it is parallel.shard: optimizer"),
        ("optimizer.learning_rate=1", "did you mean optimizer.lr?"),
        ("train.lr=1", "did you mean optimizer.lr?"),
        ("parallel.tp=2", "did you mean parallel.tensor_model_parallel_size?"),
        ("train.seq_length=2", "did you mean data.seq_length?"),
        ("model.num_hidden_layers=2", "did you mean model.num_layers?"),
        ("model.num_key_value_heads=2", "did you mean model.num_query_groups?"),
        ("train.num_stesp=3", "did you mean train.num_steps?"),
        ("trian.num_steps=3", "did you mean train?"),
        ("model.hidden_size=1k", "write 1000"),
        ("train.num_steps=1,000", "write 1000"),
        ("train.num_steps=0.5M", "write 500000"),
        ("train.num_steps=many", "write a whole number"),
        ("model.hidden_size=0.5", "write a whole number"),
        ("optimizer.lr=small", "write a number"),
        ("train.num_steps=1，000", "write 1000"),
        ("train.num_steps=1万", "write 10000"),
        ("train.num_steps=100步", "write 100"),
        ("model.hidden_size=64,64", "write a whole number"),
        ("optimizer.lr=0,0004", "write 0.0004"),
        ("optimizer.lr=4e-4%", "write 4e-06"),
        ("optimizer.lr=4×10-4", "write 0.0004"),
        ("optimizer.lr=10^-4", "write 0.0001"),
        ("optimizer.lr=1/1000", "write 0.001"),
        ("optimizer.lr=4e−4", "write 0.0004"),
        ("optimizer.lr=inf", "must be a finite number"),
        ("optimizer.lr=nan", "must be a finite number"),
        ("train.num_steps＝20", "write train.num_steps=20"),
        ("train.num_steps：20", "write train.num_steps=20"),
        ("train。num_steps=20", "write train.num_steps=20"),
        ("train.num_steps =20", "write train.num_steps=20"),
        ("“train.num_steps=20”", "write train.num_steps=20"),
        ("“data.train={a:", "write 'data.train=...', in the quotes of the keyboard"),
        ("num_steps", "write train.num_steps=VALUE"),
        ("model=tiny", "model is a group of settings: write them one by one, such as model.hidden_size=VALUE"),
        ("train", "train is a group of settings"),
        ("tiny.yaml", "one config file is read"),
        ("训练.步数=3", "settings have English names"),
        ("train.dry_run=1", "write true"),
        ("train.dry_run=否", "write false"),
        ("log.trackers=wandb，swanlab", "write [wandb, swanlab]"),
        ("log.trackers=wandb swanlab", "write [wandb, swanlab]"),
        ("data.train={a：1，b：2}", "write {a: 1, b: 2}"),
        ("data.train={a: 1，b: 2}", "write {a: 1, b: 2}"),
        ("data.train={a: 1、b: 2}", "write {a: 1, b: 2}"),
        ("data.train=｛a: 1, b: 2｝", "write {a: 1, b: 2}"),
        ("data.train={a=1, b=2}", "write {a: 1, b: 2}"),
        ("data.train=a=1,b=2", "write {a: 1, b: 2}"),
        ("data.train=a: 1, b: 2", "write {a: 1, b: 2}"),
        ("data.train=a:1", "write {a: 1}"),
        ("data.train={a: 70%}", "write 0.7"),
        ("data.train=“data/zh_text_document”", "write data/zh_text_document"),
        ("train.output=", "has no value; write train.output=VALUE, or leave it out"),
    ],
)
def test_settings(override: str, cure: str) -> None:
    line = said(override)
    assert cure in line and "\n" not in line


@pytest.mark.parametrize(
    "name, cure",
    [
        ("tinny", "examples/configs/tiny.yaml?"),
        ("tiny.yaml", "examples/configs/tiny.yaml?"),
        ("examples/configs/tiny", "examples/configs/tiny.yaml?"),
        ("somewhere/tny.yaml", "examples/configs/tiny.yaml?"),
        ("zzzzzzzzzzzzzz", "name an existing YAML file, such as"),
    ],
)
def test_config_files(name: str, cure: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if "/" not in name:
        monkeypatch.chdir(tmp_path)
    assert cure in said(path=name)


@pytest.mark.parametrize(
    "content, cure",
    [
        (b"train:\n\tnum_steps: 3\n", "line 2 begins with a tab; YAML takes blanks alone"),
        (b"<<<<<<< HEAD\ntrain:\n  seed: 3\n=======\ntrain:\n  seed: 4\n>>>>>>> x\n", "keep one of the two versions"),
        ("train：\n  num_steps： 3\n".encode(), "line 1 has a full-width character"),
        (b"train.num_steps: 3\nmodel: {}\n", "stands below its group: train: {num_steps: VALUE}"),
        (b"train:\n  seed: 3\n  seed: 4\n", "leave one of the two out"),
        (b"model:\n  hidden_size: 64\n   num_layers: 2\n", "the same blanks in front"),
        (b"model:\n  hidden_size:64\n", "put a blank behind the colon: hidden_size: 64"),
        (b"num_steps=3\n", "line 1 has = in it"),
        ("# 中文\nmodel: {}\n".encode("gbk"), "save it as UTF-8; it looks like GBK"),
        ("model: {}\n".encode("utf-16"), "save it as UTF-8; it is UTF-16"),
        (b"\x89PNG\r\n\x00\xff", "name a YAML file"),
    ],
)
def test_slips_in_a_config_file(content: bytes, cure: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(content)
    line = said(path=tmp_path / "mine.yaml")
    assert cure in line and "\n" not in line and "<unicode string>" not in line


def test_windows_line_ends_and_a_mark_are_taken(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"\xef\xbb\xbf" + TINY.read_bytes().replace(b"\n", b"\r\n"))
    assert load_config(tmp_path / "mine.yaml") == load_config(TINY)


def test_a_prefix_with_chinese_punctuation_is_one_where_it_is_there(tmp_path: Path) -> None:
    (tmp_path / "语料：一，二.idx").touch()
    assert load_config(TINY, [f"data.train={tmp_path}/语料：一，二"]).data.train


@pytest.mark.parametrize(
    "override, cure",
    [
        ("train.output=/", "name a folder in it, such as /my_run"),
        ("train.output=/tmp", "name a folder in it, such as /tmp/my_run"),
        ("train.output=~/run", "the shell left ~ as it is here; write /"),
        ("train.output=$HOME/run", "use double quotes instead of single ones"),
        ("train.output=s3://bucket/run", "copy it from s3:// first, or mount it as a folder"),
        (r"train.output=C:\runs", "in WSL2 it is /mnt/c/runs"),
        ("tokenizer.path=https://a/b", "fetch it first: curl -LO https://a/b"),
        ("data.train=hf://datasets/a/b", "fetch it first: hf download --repo-type dataset a/b --local-dir NEW"),
        ("checkpoint.init_from=~/run", "write /"),
    ],
)
def test_paths_that_are_none_here(override: str, cure: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(TINY, [override]).validate(1)
    assert cure in str(error.value)


def test_figures_far_beyond_any_in_use_are_remarked() -> None:
    notes = load_config(TINY, ["optimizer.lr=1", "optimizer.beta1=0.1", "model.init_std=2"]).notes()
    assert "optimizer.lr=1 is above 0.1, the most that is in use: see that no digit or exponent is wrong" in notes
    assert any(note.startswith("optimizer.beta1=0.1 is below 0.5") for note in notes)
    assert any(note.startswith("model.init_std=2 is above") for note in notes)
    for preset in TINY.parent.glob("*.yaml"):
        assert not any("in use" in note for note in load_config(preset).notes())


def test_a_prefix_with_blanks_is_one_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(TINY, ["data.train=my data/zh one_text_document"]).data.train
    (tmp_path / "1 a.idx").touch()
    assert load_config(TINY, ["data.train=1 a"]).data.train == {"1 a": 1.0}


@pytest.mark.parametrize(
    "arguments, cure",
    [
        (["--train.num_steps=5"], "settings have no dashes: write train.num_steps=5"),
        (["--data.train", "x"], "settings have no dashes: write data.train=VALUE"),
        (["-data.train="], "settings have no dashes: write data.train="),
        (["--colour"], "see x --help"),
    ],
)
def test_dashes(arguments: list[str], cure: str) -> None:
    parser = ArgumentParser(prog="x")
    parser.add_argument("overrides", nargs="*")
    with pytest.raises(ConfigError) as error:
        parser.parse_args(arguments)
    assert str(error.value).endswith(cure)


def test_other_names_lead_to_settings() -> None:
    known = {f"{group}.{field}" for group, fields in describe_fields().items() for field in fields}
    assert {setting.partition("=")[0] for setting in OTHER_NAMES.values()} <= known


def test_a_setting_in_place_of_the_config() -> None:
    assert "CONFIG.yaml group.field=value" in said(path="data.train=/a/b")


def test_prefixes_that_exist_are_several_datasets(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.idx").touch()
    for between in (" ", ",", ", "):
        line = said(f"data.train={tmp_path}/a{between}{tmp_path}/b")
        assert f"write {{{tmp_path}/a: 1, {tmp_path}/b: 1}}" in line


def test_an_option_nearly_so_is_named() -> None:
    parser = ArgumentParser(prog="p")
    parser.add_argument("--nproc")
    with pytest.raises(ConfigError, match=r"did you mean --nproc\?"):
        parser.parse_args(["--npoc=2"])


def test_settings_are_checked_by_a_program_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_hammer.config.__main__ import main

    monkeypatch.setattr("sys.argv", ["config", str(TINY), "train.num_steps=5"])
    assert main() == 0 and capsys.readouterr() == ("", "")
    monkeypatch.setattr("sys.argv", ["config", str(TINY), "train.num_step=5"])
    with pytest.raises(ConfigError, match=r"did you mean train\.num_steps"):
        main()


@pytest.mark.parametrize(
    "name, content, cure",
    [
        ("config.json", '{"architectures": ["LlamaForCausalLM"]}', "tools/hf_to_checkpoint.py makes a checkpoint"),
        ("README.md", "# a\n**b**: c (d). e: f", "it is no config: name a YAML file first"),
        ("zh.jsonl", '{"text": "a"}', "it is no config: name a YAML file first"),
        ("zh.idx", "MMIDIDX", "name the config first, then data.train=PREFIX"),
    ],
)
def test_a_file_that_is_no_config(name: str, content: str, cure: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert cure in said(path=tmp_path / name)
    (tmp_path / "mine.json").write_text('{"train": {"num_steps": 7}}')  # JSON is YAML
    assert "model" in said(path=tmp_path / "mine.json")


@pytest.mark.parametrize(
    "inside, name, cure",
    [
        ("run/checkpoints/step-00000002", "run", "it belongs to a run: to go on with it give the YAML file"),
        ("run/checkpoints/step-00000002", "run/checkpoints/step-00000002", "with train.output=run"),
        ("hf/config.json", "hf", "tools/hf_to_checkpoint.py makes a checkpoint of it, and a config"),
        ("imported/model.yaml", "imported", "name a file in it: imported/model.yaml"),
        ("empty/x", "empty", "name a YAML file, such as"),
    ],
)
def test_a_folder_in_place_of_the_config(
    inside: str, name: str, cure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / inside).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert cure in said(path=name)


@pytest.mark.parametrize(
    "option, cure",
    [
        ("--resume", "leave it out: the same command goes on"),
        ("--gpus=0,1", "CUDA_VISIBLE_DEVICES chooses GPUs"),
        ("--train-iters=100", "it is a setting here: write train.num_steps=VALUE"),
        ("--lr=1e-4", "write optimizer.lr=VALUE"),
        ("--load=runs/a", "write checkpoint.init_from=VALUE"),
        ("--bf16", "write train.precision=bf16"),
        ("--config=x.yaml", "name the YAML file without an option in front of it"),
        ("--nonsense", "see x --help"),
    ],
)
def test_options_of_other_training_programs(option: str, cure: str) -> None:
    parser = ArgumentParser(prog="x")
    add_settings(parser)
    with pytest.raises(ConfigError, match="E201") as error:
        parser.parse_intermixed_args(["c.yaml", option])
    assert cure in str(error.value) and "\n" not in str(error.value)
