"""A path that is not there: the one that is meant is named, else where it was looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_hammer.base.errors import CheckpointError, ConfigError, DataError
from megatron_hammer.base.paths import check_prefix, missing_remedy, neighbour_of
from megatron_hammer.corpus.readers import expand_inputs
from megatron_hammer.huggingface.generate import generate
from megatron_hammer.tokenizer.load import load_tokenizer
from megatron_hammer.train.plot import read_curves


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
            next(generate(given, ["x"]))
    (run / "hf").mkdir()
    (run / "hf" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"E490.*did you mean runs/mine/hf\?"):
        next(generate(run / "checkpoints" / "step-00000003", ["x"]))


def test_a_folder_in_place_of_a_prefix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, name in (("data/", "data/NAME"), (".", "NAME"), ("..", "../NAME"), ("data/zh/..", "data/zh/../NAME")):
        with pytest.raises(ConfigError, match="E288") as caught:
            check_prefix("--output-prefix", given, "_text_document.idx")
        assert str(caught.value).endswith(f"called _text_document.idx; name the files too: --output-prefix {name}")
    assert check_prefix("--output-prefix", "data/zh", "_text_document.idx") == Path("data/zh")
    assert capsys.readouterr().err == ""
    check_prefix("--output-prefix", tmp_path, "_text_document.idx")  # may be meant
    assert f"{tmp_path}_text_document.idx is written beside it" in capsys.readouterr().err
