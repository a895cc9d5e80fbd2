"""A converted folder in the last transformers of the fourth series, as many users still have it: ``use_fast`` or not.

The library goes into a cache folder of its own, never into the environment of the tests; without network the test is
skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_hammer.tokenizer.convert import convert_tokenizer, publish_tokenizer
from megatron_hammer.tokenizer.lab.fuzz import fuzz_texts
from megatron_hammer.tokenizer.sentencepiece_backend import load_processor
from tests.tokenizer.texts import REAL_MODELS, model_proto, real_model

CACHE = Path.home() / ".cache" / "megatron_hammer" / "transformers-4"
WANTED = ("transformers>=4.57,<5", "huggingface-hub<1", "tokenizers<0.23")  # the rest is what version 5 brings, too

SMALL, REAL, WITH_MODEL = ("plain", "with_symbols"), ("hammerllm", "internlm-7b", "llama2-7b"), "unigram"
ASK = """
import json, sys
import transformers
assert transformers.__version__.startswith("4."), transformers.__version__
found = {}
for name, (folder, texts) in json.load(open(sys.argv[1], encoding="utf-8")).items():
    for use_fast in (True, False):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, use_fast=use_fast)
        found.setdefault(name, {})[str(use_fast)] = [tokenizer(text)["input_ids"] for text in texts]
json.dump(found, open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def transformers4() -> Path:
    """The folder to put into PYTHONPATH."""
    if not CACHE.exists():
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=CACHE.parent))
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--retries", "0", "--timeout", "10"]
        try:
            done = subprocess.run(
                [*pip, "install", "--no-deps", "--no-compile", "--target", folder, *WANTED],
                capture_output=True,
                text=True,
                timeout=120,
            )
            why = (done.stderr.strip().splitlines() or [""])[-1]
        except subprocess.TimeoutExpired:
            why = "pip install took more than 120 seconds"
        if not (folder / "transformers").is_dir():
            pytest.skip(f"no transformers 4 in {CACHE}: {why}")
        if not CACHE.exists():  # another run may have been quicker
            folder.rename(CACHE)
    return CACHE


def texts_for(model: Path) -> list[str]:
    pieces = [piece.piece.replace("\u2581", " ") for piece in model_proto(model).pieces if piece.piece]
    texts = ["", "Plain text, 12 words.", "今天的天气：晴。", "<s> literal </s>", "  two  spaces ", "a\0b", "\n\n  x"]
    return texts + list(fuzz_texts(200, 5, pieces))


@pytest.fixture(scope="module")
def answers(
    transformers4: Path,
    converted: Callable[[str], Path],
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, dict[str, list[list[int]]]]:
    """Name of a tokenizer -> use_fast -> ids of its texts, all from one process."""
    folder = tmp_path_factory.mktemp("transformers4")
    questions = {name: (str(converted(name)), texts_for(REAL_MODELS / f"{name}.model")) for name in REAL if there(name)}
    for name in SMALL:
        model = request.getfixturevalue(name).path
        publish_tokenizer(model, folder / name)
        questions[name] = (str(folder / name), texts_for(model))
    unigram = request.getfixturevalue(WITH_MODEL)  # whose prompts begin with bos in version 5 alone
    (folder / WITH_MODEL).mkdir()
    assert convert_tokenizer(unigram, folder / WITH_MODEL, begin_with_bos=False)
    questions[WITH_MODEL] = (str(folder / WITH_MODEL), texts_for(unigram.path))
    (folder / "questions.json").write_text(json.dumps(questions), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", ASK, folder / "questions.json", folder / "found.json"],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"PYTHONPATH": str(transformers4), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, dict[str, list[list[int]]]] = json.loads((folder / "found.json").read_text())
    return found


def there(name: str) -> bool:
    return (REAL_MODELS / f"{name}.model").is_file()


@pytest.mark.parametrize("name", [*SMALL, WITH_MODEL, *REAL])
def test_ids_are_those_of_sentencepiece(
    name: str, answers: dict[str, dict[str, list[list[int]]]], request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(name).path if name not in REAL else real_model(f"{name}.model")
    texts = texts_for(model)
    expected = load_processor(model.read_bytes(), model).encode(texts)
    before = [] if name == WITH_MODEL else [1]
    assert answers[name].keys() == {"True", "False"}
    for use_fast, found in answers[name].items():
        for text, theirs, ours in zip(texts, found, expected, strict=True):
            assert theirs == [*before, *ours], f"use_fast={use_fast}: {text!r}"
