"""docs/tokenizer.md and docs/data.md: every command runs, in its order, and leaves what the page says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_hammer.tokenizer.load import load_tokenizer
from tests.page_blocks import ROOT, blocks_of, prepare_folder, run_block

MODELS = ROOT.parent / "shared" / "tokenizers"
PAGES = {name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("tokenizer.md", "data.md")}
TOKENIZER_PAGE, HAMMERLLM = PAGES["tokenizer.md"].split("## HammerLLM's own")


def _run_blocks(text: str, folder: Path, **variables: str) -> str:
    return "".join(run_block(block, folder, **variables) for block in blocks_of(text))


# ---- docs/tokenizer.md ----


@pytest.fixture(scope="module")
def lab_and_said(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = prepare_folder(tmp_path_factory.mktemp("tokenizer_page"))
    return folder / "lab", _run_blocks(TOKENIZER_PAGE, folder)


def test_a_tokenizer_trained_merged_and_converted_goes_through_the_whole_job(lab_and_said: tuple[Path, str]) -> None:
    lab, said = lab_and_said
    merged, converted = load_tokenizer(lab / "merged"), load_tokenizer(lab / "hf")
    assert merged.vocab_size == converted.vocab_size > 15_000
    exported = lab / "runs" / "merged" / "hf"
    assert json.loads((exported / "config.json").read_text())["vocab_size"] == merged.vocab_size
    assert json.loads((exported / "certificate.json").read_text())["verdict"] == "passed"
    assert "\nequal\n" in said and "import numpy" in said


def test_every_character_became_a_piece(lab_and_said: tuple[Path, str]) -> None:
    lab, _ = lab_and_said
    rare = "䶮"  # of level 3
    merged, base = load_tokenizer(lab / "merged"), load_tokenizer(lab / "base")
    assert len(merged.encode(rare)) == 1 and len(base.encode(rare)) == 3


def test_the_pictures_and_the_page_are_there(lab_and_said: tuple[Path, str]) -> None:
    lab, _ = lab_and_said
    for name in ("coverage", "compression", "vocabulary", "price"):
        assert (lab / "pictures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (lab / "compression.html").read_text(encoding="utf-8")
    assert "data:image/" in page and not re.search(r"(src|href)=.https?:", page), "the page is not self-contained"


@pytest.mark.skipif(not MODELS.is_dir(), reason="needs the real tokenizers beside the checkout")
def test_the_real_inputs_give_the_published_model(tmp_path: Path) -> None:
    folder = prepare_folder(tmp_path)
    (folder / "lab").mkdir()
    said = _run_blocks(HAMMERLLM, folder, MODELS=str(MODELS))
    assert "ratio mean 0.9388603563642239" in said and "105,789 pieces" in said
    rows = {line.split()[0]: line.split()[1:4] for line in said.splitlines() if line.count("%") > 3}
    assert rows["hammerllm"] == ["100.00%"] * 3
    assert rows["internlm-7b"] == ["100.00%", "65.93%", "5.67%"] and rows["llama2-7b"] == ["17.29%", "0.13%", "0.00%"]


# ---- docs/data.md ----


def test_raw_text_becomes_samples(tmp_path: Path) -> None:
    folder = prepare_folder(tmp_path)
    said = _run_blocks(PAGES["data.md"], folder)
    assert "zh_text_document: sound" in said
    assert '"cause":"E304"' in said, "what was quarantined was shown"
    assert "weight (epochs)" in said and re.search(r"train\.num_steps=\d+ fits", said), "the plan was printed"
    metrics = [json.loads(line) for line in (folder / "lab" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == list(range(1, 7))


def test_every_picture_of_the_pages_exists() -> None:
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", "".join(PAGES.values()))
    assert len(pictures) >= 5
    assert all((ROOT / "docs" / picture).is_file() for picture in pictures)
