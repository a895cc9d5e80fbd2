"""The main job with the real programs: the first README command at toy length, and what follows from its results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STEPS = 8


def _first_command(output: Path, *arguments: str, steps: int = STEPS) -> subprocess.CompletedProcess[str]:
    if not (ROOT / ".venv" / ".complete").exists():
        pytest.skip("needs the .venv that tests/run.sh makes")
    lengths = [f"train.num_steps={steps}", "train.eval_interval_steps=4", "checkpoint.save_interval_steps=4"]
    return subprocess.run(
        ["bash", "examples/pretrain_1b4.sh", *lengths, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"OUT": str(output), "CUDA_VISIBLE_DEVICES": ""},
    )


def _python(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished run, and what the command said."""
    output = tmp_path_factory.mktemp("main") / "run with blanks 中"
    done = _first_command(output)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return output, done.stdout


def test_it_leaves_everything(finished: tuple[Path, str]) -> None:
    output, said = finished
    assert said.splitlines()[0].startswith("No NVIDIA GPU found")
    for name in ("checkpoints", "hf", "metrics.jsonl", "tensorboard", "loss.png"):
        assert (output / name).exists() and name in said[said.index("Done.") :]
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["loss"] < lines[0]["loss"]
    for name in ("zh", "en", "code"):
        assert lines[3][f"valid/{name}/loss"] > 0 and lines[-1][f"valid/{name}/bits_per_byte"] > 0
        assert f"valid/{name}/loss" not in lines[1]
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_transformers_loads_the_model(finished: tuple[Path, str]) -> None:
    """From the exported folder alone: tokenizer ids, vocabulary and a continuation."""
    import sentencepiece
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = finished[0] / "hf"
    certificate = json.loads((folder / "certificate.json").read_text())
    assert certificate["verdict"] == "passed", certificate
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(finished[0] / "tokenizer" / "tokenizer.model"))
    for text in ("服务器返回的结果，<s> 字面。", "def main():\n    return  1\n", "Plain text, 12 words."):
        assert tokenizer(text)["input_ids"] == [1, *reference.encode(text)]
    assert model.config.vocab_size == reference.vocab_size() == model.lm_head.weight.shape[0], "no padding rows"
    ids = tokenizer("def main(", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=4, do_sample=False).shape[1] > ids["input_ids"].shape[1]


def test_again_says_done_and_more_steps_continue(finished: tuple[Path, str]) -> None:
    output, _ = finished
    before = (output / "metrics.jsonl").read_bytes()
    again = _first_command(output)
    assert again.returncode == 0 and "finished" in again.stdout and "done already" in again.stdout
    assert (output / "metrics.jsonl").read_bytes() == before
    longer = _first_command(output, steps=STEPS + 2)
    assert longer.returncode == 0 and "resuming from" in longer.stdout, longer.stderr
    assert (output / "metrics.jsonl").read_bytes().count(b"\n") == STEPS + 2
    certificate = json.loads((output / "hf" / "certificate.json").read_text())
    assert certificate["step"] == STEPS + 2, "the export follows the newest checkpoint"


def test_a_foreign_tokenizer_is_refused(finished: tuple[Path, str], tmp_path: Path) -> None:
    output, _ = finished
    corpus = output / "corpus" / "en.jsonl"
    made = _python("tools/train_tokenizer.py", "--input", corpus, "--output", tmp_path / "other", "--vocab-size", "600")
    assert made.returncode == 0, made.stderr
    refused = _python(
        "-m",
        "megatron_hammer.launch",
        "--nproc",
        "2",
        "examples/configs/tiny.yaml",
        f"data.train={output}/data/en_text_document",
        f"tokenizer.path={tmp_path}/other",
        f"train.output={tmp_path}/run",
        "parallel.tensor_model_parallel_size=2",
    )
    assert refused.returncode == 5 and refused.stderr.startswith("error[E510]") and refused.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_exported_model_is_pretrained_further(finished: tuple[Path, str], tmp_path: Path) -> None:
    """HF folder -> checkpoint -> init_from: the first loss is that of the trained model, not of a new one."""
    output, _ = finished
    imported = _python("tools/hf_to_checkpoint.py", "--hf", output / "hf", "--save", tmp_path / "imported")
    assert imported.returncode == 0, imported.stderr
    more = _python(
        "-m",
        "megatron_hammer.train",
        tmp_path / "imported" / "model.yaml",
        f"data.train={output}/data/en_text_document",
        f"tokenizer.path={output}/tokenizer",
        f"checkpoint.init_from={tmp_path}/imported",
        f"train.output={tmp_path}/more",
        "train.num_steps=1",
        "train.global_batch_size=4",
        "data.seq_length=128",
        "log.tensorboard=false",
    )
    assert more.returncode == 0, more.stderr
    trained = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    first = json.loads((tmp_path / "more" / "metrics.jsonl").read_text())
    assert first["loss"] < (trained[0]["loss"] + trained[-1]["loss"]) / 2


def test_torchrun_starts_the_same_program(finished: tuple[Path, str], tmp_path: Path) -> None:
    output, _ = finished
    done = _python(
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-addr",
        "127.0.0.1",
        "--master-port",
        "29611",
        "-m",
        "megatron_hammer.train",
        "examples/configs/tiny.yaml",
        f"data.train={output}/data/en_text_document",
        f"tokenizer.path={output}/tokenizer",
        f"train.output={tmp_path}/run",
        "train.num_steps=2",
        "log.tensorboard=false",
        "parallel.tensor_model_parallel_size=2",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes().count(b"\n") == 2
