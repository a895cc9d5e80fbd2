"""docs/reproduce.md: every command runs at toy size, in order; the Chinese page has the same; no flag is left out."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from megatron_hammer.tokenizer.load import load_tokenizer
from tests.page_blocks import ROOT, blocks_of, prepare_folder, run_block

PAGE, CHINESE = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("reproduce.md", "reproduce.zh-CN.md"))
SIZES = {name: (ROOT / "examples" / "reproduce" / f"{name}.sh").read_text(encoding="utf-8") for name in ("toy", "full")}

# What the published train.sh sets: names of its options and variables.
TRAIN_SH = [
    "nproc_per_node", "master_port", "model_name_or_path", "use_flash_attention_2", "use_torch_compile",
    "train_file", "validation_files", "preprocessing_num_workers", "block_size", "do_train", "do_eval",
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "logging_steps",
    "max_steps", "warmup_steps", "eval_steps", "save_steps", "evaluation_strategy", "save_strategy",
    "greater_is_better", "load_best_model_at_end", "ddp_find_unused_parameters", "remove_unused_columns",
    "save_total_limit", "learning_rate", "lr_scheduler_type", "output_dir", "report", "run_name", "bf16", "seed",
    "data_seed", "deepspeed",
]  # fmt: skip
pytestmark = pytest.mark.timeout(600)  # the page takes 40 seconds alone on two cores
VARIABLES = ["WANDB_PROJECT", "WANDB_MODE", "CUDA_VISIBLE_DEVICES", "TOKENIZERS_PARALLELISM"]


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """All blocks in one shell, as a reader runs them; the Hub is a program that says what it was asked."""
    folder = prepare_folder(tmp_path_factory.mktemp("reproduce"))
    (folder / "bin" / "hf").write_text('#!/bin/sh\necho "hf was told: $*"\n')
    (folder / "bin" / "hf").chmod(0o755)
    return folder / "lab" / "hammerllm", run_block("\n".join(blocks_of(PAGE)), folder, timeout=560, HUB_REPO="me/toy")


def test_from_raw_text_to_the_hub(reproduced: tuple[Path, str]) -> None:
    work, said = reproduced
    tokenizer = load_tokenizer(work / "tokenizer_hf")
    assert all(len(tokenizer.encode(character)) == 1 for character in "的䶮")
    assert "\nequal\n" in said and "calibration: " in said
    lines = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    for name in ("zh", "en", "arxiv", "wiki", "github"):
        assert lines[-1][f"valid/{name}/perplexity"] > 1 and lines[-1][f"valid/{name}/bits_per_byte"] > 0
    assert json.loads((work / "hf" / "certificate.json").read_text())["verdict"] == "passed"
    assert (work / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "\n<s>北京理工大学是" in said and said.endswith("hf was told: upload me/toy lab/hammerllm/hf\n")


def test_the_published_example_reads_the_export(reproduced: tuple[Path, str]) -> None:
    """Its calls, which ask for the slow tokenizer and a dtype under the old name."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = reproduced[0] / "hf"
    tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=False)
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.bfloat16)
    input_ids = tokenizer("北京理工大学是", return_tensors="pt").input_ids
    own = load_tokenizer(reproduced[0] / "tokenizer_hf")
    assert own.bos_id is not None and input_ids[0].tolist() == [own.bos_id, *own.encode("北京理工大学是")]
    output = model.generate(input_ids=input_ids, max_length=len(input_ids[0]) + 5, do_sample=True, top_p=0.95).tolist()
    assert tokenizer.decode(output[0]).startswith("<s>北京理工大学是")


def test_both_pages_have_the_same_commands() -> None:
    commands = [re.sub(r"\s*#.*", "", block) for block in blocks_of(PAGE)]
    assert len(commands) > 10 and commands == [re.sub(r"\s*#.*", "", block) for block in blocks_of(CHINESE)]


@pytest.mark.parametrize("page", [PAGE, CHINESE], ids=["english", "chinese"])
def test_every_flag_of_the_published_script_has_a_row(page: str) -> None:
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    missing = [name for name in TRAIN_SH if not any(re.search(rf"--{name}\b", row) for row in rows)]
    assert not missing and not [name for name in VARIABLES if not any(f"`{name}`" in row for row in rows)]
    for published in ("4.3143", "0.5274", "105,789", "0.9388603563642239", "195,274,620", "13,000", "36.43"):
        assert published in page
    anchors = re.findall(r"\]\(#([^)]+)\)", page)
    headings = [
        re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^## (.+)$", page, re.MULTILINE)
    ]
    assert len(anchors) == 8 and all(anchor in headings for anchor in anchors)


def test_both_sizes_set_the_same_variables() -> None:
    names = [set(re.findall(r"^(?:declare -A )?([A-Z_]+)=", text, re.MULTILINE)) for text in SIZES.values()]
    assert names[0] == names[1]
    used = set(re.findall(r"\$\{?([A-Z_]+)", "".join(blocks_of(PAGE))))
    assert used <= names[0] | {"RUN"}


def test_the_toy_size_says_what_is_missing_and_makes_nothing(tmp_path: Path) -> None:
    toy = ROOT / "examples" / "reproduce" / "toy.sh"
    (tmp_path / "tools").mkdir()
    for cure in ("is not the root of the repository; cd there", "bash tools/make_venv.sh, source .venv/bin/activate"):
        done = subprocess.run(
            ["bash", "-c", f"python() {{ return 1; }}; source {toy}"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 2 and cure in done.stderr and done.stderr.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir()] == ["tools"]
        (tmp_path / "tools" / "make_sample_corpus.py").touch()
