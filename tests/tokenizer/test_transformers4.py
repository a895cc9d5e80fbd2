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
from pathlib import Path

import pytest

from megatron_hammer.tokenizer.convert import publish_tokenizer
from megatron_hammer.tokenizer.fuzz import fuzz_texts
from megatron_hammer.tokenizer.load import SentencePieceTokenizer, load_processor
from tests.tokenizer.texts import model_proto, real_model

CACHE = Path.home() / ".cache" / "megatron_hammer" / "transformers-4"
WANTED = ("transformers>=4.57,<5", "huggingface-hub<1", "tokenizers<0.23")  # the rest is what version 5 brings, too

ASK = """
import json, sys
import transformers
assert transformers.__version__.startswith("4."), transformers.__version__
texts = json.load(open(sys.argv[2], encoding="utf-8"))
found = {}
for use_fast in (True, False):
    tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1], use_fast=use_fast)
    found[str(use_fast)] = [tokenizer(text)["input_ids"] for text in texts]
json.dump(found, open(sys.argv[3], "w"))
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
                [*pip, "install", "--no-deps", "--target", folder, *WANTED], capture_output=True, text=True, timeout=120
            )
            why = (done.stderr.strip().splitlines() or [""])[-1]
        except subprocess.TimeoutExpired:
            why = "pip install took more than 120 seconds"
        if not (folder / "transformers").is_dir():
            pytest.skip(f"no transformers 4 in {CACHE}: {why}")
        if not CACHE.exists():  # another run may have been quicker
            folder.rename(CACHE)
    return CACHE


@pytest.mark.parametrize("name", ["plain", "with_symbols", "hammerllm", "internlm-7b", "llama2-7b"])
def test_ids_are_those_of_sentencepiece(
    name: str, transformers4: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    small = name in ("plain", "with_symbols")
    tokenizer = request.getfixturevalue(name) if small else SentencePieceTokenizer(real_model(f"{name}.model"))
    publish_tokenizer(tokenizer.path, tmp_path / "hf")
    pieces = [piece.piece.replace("\u2581", " ") for piece in model_proto(tokenizer.path).pieces if piece.piece]
    texts = ["", "Plain text, 12 words.", "今天的天气：晴。", "<s> literal </s>", "  two  spaces ", "a\0b", "\n\n  x"]
    texts += list(fuzz_texts(200, 5, pieces))
    (tmp_path / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", ASK, tmp_path / "hf", tmp_path / "texts.json", tmp_path / "found.json"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(transformers4), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected = load_processor(tokenizer.model_bytes, tokenizer.path).encode(texts)
    for use_fast, found in json.loads((tmp_path / "found.json").read_text()).items():
        for text, theirs, ours in zip(texts, found, expected):
            assert theirs == ours, f"use_fast={use_fast}: {text!r}"
