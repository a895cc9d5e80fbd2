"""A path that is not there: the one that is meant is named, else where it was looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_hammer.base.errors import CheckpointError, ConfigError, DataError, HammerError
from megatron_hammer.base.paths import check_output_prefix, missing_remedy, neighbour_of, unusable_remedy
from megatron_hammer.base.pictures import check_png
from megatron_hammer.checkpoint.average import choose_checkpoints
from megatron_hammer.checkpoint.folder import open_checkpoint
from megatron_hammer.corpus.documents import LineWriter
from megatron_hammer.corpus.readers import expand_inputs
from megatron_hammer.dataset.reader import prefix_remedy
from megatron_hammer.huggingface.importing import import_hf
from megatron_hammer.huggingface.text_model import open_folder
from megatron_hammer.metrics.plot import read_curves
from megatron_hammer.tokenizer.convert import publish_tokenizer
from megatron_hammer.tokenizer.lab.arguments import prepare_outputs
from megatron_hammer.tokenizer.load import load_tokenizer
from megatron_hammer.tokenizer.symbols import read_symbols


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("runs/mine/tokenizer/tokenizer.model", "runs/mine/corpus/zh.jsonl", "runs/\u6211\u7684/x.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("x")
    monkeypatch.chdir(tmp_path)
    return Path("runs/mine")


def test_a_name_spelt_alike_at_any_depth(run: Path) -> None:
    meant = run / "corpus" / "zh.jsonl"
    for wrong in (
        "runs/mine/corpus/zh.json",
        "runs/mine/korpus/zh.jsonl",
        "runs/mein/corpus/zh.jsonl",
        "run/mine/corpus/zh.jsonl",
    ):
        assert neighbour_of(Path(wrong)) == meant, wrong
    assert neighbour_of(Path("runs/mine/corpus/other")) is None and neighbour_of(Path("elsewhere/zh.jsonl")) is None
    (run / "zh.valid_text_document.idx").touch()
    assert missing_remedy(run / "zh.valid", "check it") == f"did you mean the dataset {run / 'zh.valid_text_document'}?"
    assert missing_remedy(Path("a/b"), "check it") == f"check it (looked for {Path.cwd() / 'a/b'})"
    assert missing_remedy(Path("/a/b"), "check it") == "check it"


def test_programs_name_it(run: Path) -> None:
    with pytest.raises(DataError, match=r"E301.*did you mean runs/mine/corpus/zh\.jsonl\?"):
        expand_inputs(["runs/mine/corpus/zh.jsnl"])
    with pytest.raises(DataError, match=r"E310.*did you mean runs/mine/tokenizer\?"):
        load_tokenizer("runs/mine/tokeniser")
    with pytest.raises(DataError, match=r"E311.*did you mean runs/mine/tokenizer\?"):
        load_tokenizer(run)
    with pytest.raises(DataError, match=r"E310.*hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B"):
        load_tokenizer("Qwen/Qwen3-0.6B")
    (run / "tokenizer" / "tokenizer.manifest.json").write_text("{}")
    with pytest.raises(DataError, match=r"E313.*did you mean runs/mine/tokenizer/tokenizer\.model\?"):
        load_tokenizer(run / "tokenizer" / "tokenizer.manifest.json")


def test_a_run_to_draw(run: Path) -> None:
    (run / "metrics.jsonl").write_text("x")
    for given in (run / "hf", run / "loss.png", run.parent):
        with pytest.raises(DataError, match=r"E380.*did you mean runs/mine\?"):
            read_curves(given / "metrics.jsonl")


def test_a_run_given_for_its_hugging_face_model(run: Path) -> None:
    (run / "checkpoints" / "step-00000003").mkdir(parents=True)
    for given in (run, run / "checkpoints", run / "checkpoints" / "step-00000003"):
        with pytest.raises(CheckpointError, match=r"E490.*checkpoint_to_hf\.py --load runs/mine --output runs/mine/hf"):
            open_folder(given)
    (run / "hf").mkdir()
    (run / "hf" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"E490.*did you mean runs/mine/hf\?"):
        open_folder(run / "checkpoints" / "step-00000003")


def test_a_folder_in_place_of_a_prefix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, name in (("data/", "data/NAME"), (".", "NAME"), ("..", "../NAME"), ("data/zh/..", "data/zh/../NAME")):
        with pytest.raises(ConfigError, match="E288") as caught:
            check_output_prefix("--output-prefix", given, "_text_document.idx")
        assert str(caught.value).endswith(f"called _text_document.idx; name the files too: --output-prefix {name}")
    assert check_output_prefix("--output-prefix", "data/zh", "_text_document.idx") == Path("data/zh")
    assert capsys.readouterr().err == ""
    check_output_prefix("--output-prefix", tmp_path, "_text_document.idx")  # may be meant
    assert f"{tmp_path}_text_document.idx is written beside it" in capsys.readouterr().err
    for given in ("o/x_text_document", "o/x.bin", "o/x_text_document.idx"):
        check_output_prefix("--output-prefix", given, "_text_document.idx")
        said = f"note: the files are called {given}_text_document.idx and so on; --output-prefix o/x makes them o/x_"
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "cure"),
    [
        ("https://a.b/c.jsonl", "curl -LO https://a.b/c.jsonl"),
        ("https:/a.b/c.jsonl", "curl -LO https://a.b/c.jsonl"),  # as a Path spells it
        ("hf://datasets/a/b", "hf download --repo-type dataset a/b --local-dir NEW"),
        ("hf://a/b", "hf download a/b --local-dir NEW"),
        ("oss://bucket/c", "copy it from oss:// first"),
        ("file:///data/c", "write the path alone: /data/c"),
        ("~/c", "the shell left ~ as it is here; write /"),
        ("${DATA}/c", "the shell left ${DATA} as it is"),
        ("D:\\text\\c.jsonl", "in WSL2 it is /mnt/d/text/c.jsonl"),
        ("“runs”", "the quotes are part of the name here; write runs"),
        ("runs，runs", "put blanks between them, runs runs"),
        ("ｒｕｎｓ", "did you mean runs?"),
    ],
)
def test_what_is_no_path_here(run: Path, path: str, cure: str) -> None:
    assert cure in unusable_remedy(path)
    with pytest.raises(DataError) as error:
        expand_inputs([path])
    assert cure in str(error.value) or "://" not in path
    assert not unusable_remedy("runs/mine") and not unusable_remedy("runs/我的")


def test_what_is_there_is_a_path_whatever_it_looks_like(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("~", "$x", "a，b"):
        Path(name).mkdir()
        assert not unusable_remedy(name)


@pytest.fixture
def things(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    names = ("run/metrics.jsonl", "run/checkpoints/step-00000002/tokenizer/tokenizer.model", "hf/config.json",
             "hf/model.safetensors", "data/zh.idx", "data/zh.bin", "zh.jsonl")  # fmt: skip
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "cure"),
    [
        ("zh.jsonl", "is text, no tokenizer; train one on it: tools/train_tokenizer.py --input zh.jsonl"),
        ("data/zh", "is the prefix of a dataset; name the tokenizer that made it"),
        ("data/zh.bin", "is a part of a dataset, no tokenizer"),
        ("data/zh.idx", "is a part of a dataset, no tokenizer"),
        ("data", "it is a folder of datasets"),
        ("hf/model.safetensors", "is weights of a model, no tokenizer"),
        ("hf", "it is a Hugging Face model"),
        ("run", "did you mean run/checkpoints/step-00000002/tokenizer?"),
    ],
)
def test_other_things_given_as_a_tokenizer(things: Path, path: str, cure: str) -> None:
    with pytest.raises(DataError) as error:
        load_tokenizer(path)
    assert cure in str(error.value)


def test_other_things_given_as_data_corpus_or_model(things: Path) -> None:
    assert "hf is a Hugging Face model: data.train names datasets" in prefix_remedy(Path("hf.idx"))
    assert "run is the folder of a run" in prefix_remedy(Path("run.idx"))
    for folder, what in (("run", "the folder of a run"), ("hf", "a Hugging Face model")):
        with pytest.raises(DataError, match=f"{folder} is {what}, no text"):
            expand_inputs([folder])
    for path, cure in (
        ("hf/model.safetensors", "did you mean hf?"),
        ("data", "is a folder of datasets"),
        ("a/b", "hf download a/b --local-dir NEW"),
        ("https://h/a/b", "curl -LO https://h/a/b"),
    ):
        with pytest.raises(CheckpointError) as error:
            import_hf(path, "new")
        assert cure in str(error.value)
    with pytest.raises(CheckpointError, match=r"did you mean run\?"):
        open_checkpoint("run/metrics.jsonl")


@pytest.mark.parametrize(
    ("name", "cure"),
    [("name.xyz", "write name.png"), ("name", "write name.png"), ("new/a.png", "mkdir -p new"), ("hf", "hf/NAME.png")],
)
def test_names_that_no_picture_can_have(things: Path, name: str, cure: str) -> None:
    with pytest.raises(ConfigError, match="E288") as error:
        check_png(Path(name))
    assert cure in str(error.value)
    check_png(Path("a.PNG"))


def test_names_of_what_is_not_written(things: Path) -> None:
    """An output whose name says another kind of file than it would be."""
    for write, name, cure in (
        (LineWriter, "a.parquet", "gets JSON lines, which are no such file; write "),
        (LineWriter, "a.csv", "a.jsonl"),
        (lambda path: prepare_outputs(None, path), "report.pdf", "gets a page of HTML; write "),
        (lambda path: publish_tokenizer("none", path), "new/tokenizer.json", "name the folder: "),
        (read_symbols, "<h1>,<h2>", "name a file that holds them, one a line"),
        (
            lambda path: choose_checkpoints([str(path)], 2),
            "hf",
            "is a Hugging Face model, no run; name the folder of a run",
        ),
    ):
        with pytest.raises(HammerError) as error:
            write(things / name)
        assert cure in str(error.value), name
