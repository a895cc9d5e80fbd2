"""README.md and docs/quick_start.md: every block of commands runs, in order; what docs/programs.md lists is there.

What follows from the results of its first command, the main job with the real programs, is tested here, too.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from megatron_hammer import __version__
from megatron_hammer.base.errors import RefusedError
from megatron_hammer.config import load_config
from megatron_hammer.train.prepare import prepare
from tests.page_blocks import ROOT, blocks_of, run_block
from tests.warm_python import write_python

PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md")}
PAGE, CHINESE = PAGES.values()
QUICK_START = (ROOT / "docs" / "quick_start.md").read_text(encoding="utf-8")
PROGRAMS = {name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("programs.md", "programs.zh-CN.md")}

SHORT = 64  # tokens of a sample, where the page has 256: a processor without bf16 takes a second for a step of those
pytestmark = pytest.mark.timeout(900)  # the pages take one to two minutes alone on two cores


def prepare_clone(folder: Path) -> Path:
    """What the README's commands need of a clone, with a complete .venv; short runs; the tests do not run twice."""
    folder.mkdir()
    for name in ("tools", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copytree(ROOT / "examples", folder / "examples")
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, folder / name)
    for preset, shorter in (
        ("quick_start", {"warmup_steps": 2, "seq_length": SHORT, "eval_samples": 8}),
        ("tiny", {}),
    ):
        path = folder / "examples" / "configs" / f"{preset}.yaml"
        text = path.read_text(encoding="utf-8")
        shorter |= {"num_steps": 4, "eval_interval_steps": 2, "save_interval_steps": 2}
        for field, value in shorter.items():
            text, changed = re.subn(rf"(?m)^  {field}: \d+", f"  {field}: {value}", text)
            assert changed == 1, field
        path.write_text(text, encoding="utf-8")
    (folder / "tests").mkdir()
    (folder / "tests" / "run.sh").write_text("echo the tests run\n")
    binaries = folder / ".venv" / "bin"
    binaries.mkdir(parents=True)
    write_python(binaries / "python")
    (binaries / "activate").write_text(f'PATH="{binaries}:$PATH"\n')
    here = '"$(dirname -- "${BASH_SOURCE[0]}")/.."'
    script = (folder / "tools" / "make_venv.sh").read_text(encoding="utf-8").replace(here, f"'{folder}'")
    wanted = script.removesuffix("main\n") + "wanted >.venv/.complete\n"
    subprocess.run(["bash", "-c", wanted], check=True)
    return folder


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """All blocks in one shell; those of README.md, which the quick start has too, once."""
    folder = prepare_clone(tmp_path_factory.mktemp("a clone") / "with blanks 中")
    blocks = "\n".join(dict.fromkeys(blocks_of(PAGE) + blocks_of(QUICK_START)))
    assert blocks.count("data.seq_length=256") == 1  # of the 1.4B that is shrunk
    return folder, run_block(blocks.replace("data.seq_length=256", f"data.seq_length={SHORT}"), folder, timeout=840)


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_every_block_runs_in_order(walked: tuple[Path, str]) -> None:
    folder, said = walked
    runs = folder / "runs"
    lengths = {"pretrain_1b4": 4, "my_text": 4, "shrunk": 40, "continued": 20, "mine": 4, "my_1b4": 4}
    assert {path.name: len(steps(path)) for path in runs.iterdir() if path.name != "imported"} == lengths
    for name in ("pretrain_1b4", "my_text", "mine", "my_1b4"):
        assert json.loads((runs / name / "hf" / "certificate.json").read_text())["verdict"] == "passed"
    for name in ("pretrain_1b4", "my_text", "my_1b4"):
        assert (runs / name / "loss.png").exists() and (runs / name / "tensorboard").is_dir()
    assert "the tests run\n" in said and said.count("\nDone. Everything is in ") == 3
    assert "is made of your text" not in said and "made of your text, at a size for this machine." in said
    lines = [json.loads(line) for line in (runs / "shrunk" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5 and lines[-1]["lr"] == pytest.approx(4e-4)


# ---- what the first command leaves -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first(walked: tuple[Path, str]) -> Path:
    """The folder of its run."""
    return walked[0] / "runs" / "pretrain_1b4"


def losses(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_it_leaves_everything(walked: tuple[Path, str], first: Path) -> None:
    said = walked[1][: walked[1].index("the tests run")]
    assert said.splitlines()[0].startswith("No NVIDIA GPU found")
    for name in ("checkpoints", "hf", "metrics.jsonl", "tensorboard", "loss.png"):
        assert (first / name).exists() and name in said[said.index("Done.") :]
    lines = losses(first)
    for name in ("zh", "en", "code"):
        assert lines[1][f"valid/{name}/loss"] > 0 and lines[-1][f"valid/{name}/bits_per_byte"] > 0
        assert f"valid/{name}/loss" not in lines[0]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert (first / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_transformers_loads_the_model(first: Path) -> None:
    """From the exported folder alone: tokenizer ids, vocabulary and a continuation."""
    import sentencepiece
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = first / "hf"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(first / "tokenizer" / "tokenizer.model"))
    for text in ("服务器返回的结果，<s> 字面。", "def main():\n    return  1\n", "Plain text, 12 words."):
        assert tokenizer(text)["input_ids"] == [1, *reference.encode(text)]
    assert model.config.vocab_size == reference.vocab_size() == model.lm_head.weight.shape[0], "no padding rows"
    ids = tokenizer("def main(", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=4, do_sample=False).shape[1] > ids["input_ids"].shape[1]


def test_the_imported_model_is_pretrained_further(first: Path) -> None:
    """HF folder -> checkpoint -> init_from: the first loss is that of the trained model, not of a new one."""
    trained, further = losses(first), losses(first.parent / "continued")
    assert further[0]["loss"] < (trained[0]["loss"] + trained[-1]["loss"]) / 2


def test_a_foreign_tokenizer_is_refused(walked: tuple[Path, str], first: Path) -> None:
    """That of the third block, on the datasets of the first."""
    arguments = [f"data.train={first}/data/en_text_document", f"tokenizer.path={walked[0]}/tokenizer",
                 f"train.output={walked[0]}/refused", "parallel.tensor_model_parallel_size=2"]  # fmt: skip
    with pytest.raises(RefusedError, match=r"error\[E510\]"):
        prepare(load_config(ROOT / "examples" / "configs" / "tiny.yaml", arguments), 2)
    assert not (walked[0] / "refused").exists()


def test_torchrun_starts_the_same_program(walked: tuple[Path, str], first: Path) -> None:
    arguments = [f"data.train={first}/data/en_text_document", f"tokenizer.path={first}/tokenizer",
                 f"train.output={walked[0]}/torchrun", "train.num_steps=2", "log.tensorboard=false",
                 "parallel.tensor_model_parallel_size=2"]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
               "--master-port", "29611", "-m", "megatron_hammer.train", "examples/configs/tiny.yaml"]  # fmt: skip
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert steps(walked[0] / "torchrun") == [1, 2]


def test_more_steps_continue_and_are_exported(walked: tuple[Path, str], first: Path) -> None:
    """The same command with two steps more, and its folder by another name."""
    command = f"OUT='{first}' bash examples/pretrain_1b4.sh train.num_steps=6"
    said = run_block(command, walked[0])
    assert said.count("done already") == 8 and "resuming from" in said  # corpus, tokenizer and six datasets
    assert steps(first) == [1, 2, 3, 4, 5, 6]
    certificate = json.loads((first / "hf" / "certificate.json").read_text())
    assert certificate["step"] == 6 and certificate["verdict"] == "passed", "the export follows the newest checkpoint"


# ---- the pages -------------------------------------------------------------------------------------------------------


def test_both_pages_have_the_same_commands() -> None:
    commands = [re.sub(r"(?m)^#.*\n|\s+#.*", "", block) for block in blocks_of(PAGE)]
    assert len(commands) == 1 and commands == [re.sub(r"(?m)^#.*\n|\s+#.*", "", block) for block in blocks_of(CHINESE)]


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_what_the_page_lists_is_there(page: str) -> None:
    head = page[: page.index("\n## ")]
    assert __version__ in head and "WSL2" in head and "macOS" in head, "the status line"
    for link in re.findall(r"\]\((?!http)([^)#]+)", page):
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("page", PROGRAMS.values(), ids=PROGRAMS)
def test_every_program_is_listed(page: str) -> None:
    missing = [tool.name for tool in (ROOT / "tools").glob("*.py") if tool.name not in page]
    assert not missing


@pytest.mark.parametrize("page", PROGRAMS.values(), ids=PROGRAMS)
def test_every_extra_is_in_the_table_and_used(page: str) -> None:
    """An extra that no module imports would promise something."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    modules = {
        "te": "transformer_engine",
        "flash": "flash_attn",
        "parquet": "pyarrow",
        "eval": "lm_eval",
        "chat": "prompt_toolkit",
    }
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "megatron_hammer").rglob("*.py"))
    code += (ROOT / "tests" / "evaluation" / "test_lm_eval.py").read_text(encoding="utf-8")  # a program beside ours
    rows = "".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    for extra in set(project["optional-dependencies"]) - {"dev", "docs"}:
        assert f"`{extra}`" in rows, extra
        module = modules.get(extra, extra)
        assert re.search(rf"(import|from) {module}\b|\"{module}\"", code), extra
