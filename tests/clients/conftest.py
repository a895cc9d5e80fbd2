"""The environments of the clients, and the model that they are given."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hammer.checkpoint.dtypes import DTYPES
from megatron_hammer.checkpoint.folder import open_checkpoint
from megatron_hammer.checkpoint.manifest import saved_model
from megatron_hammer.checkpoint.read import load_model
from megatron_hammer.model.llama import Stage, build_stage
from megatron_hammer.model.parameters import parameter_table
from megatron_hammer.parallel.context import ParallelContext

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
CACHE = Path.home() / ".cache" / "megatron_hammer" / "clients"
SHARED = ("torch", f"torch-{torch.__version__}.dist-info", "torchgen", "functorch")
NEW_TOKENS = 8


@dataclass(frozen=True)
class Exported:
    """A trained model: the run, its export, and what clients are asked about it."""

    run: Path
    request: dict[str, Any]
    model: Stage
    """Ours in fp32, with the weights of the checkpoint as they are exported."""

    @property
    def folder(self) -> Path:
        return self.run / "hf"

    def logits(self, ids: list[int]) -> torch.Tensor:
        """Ours, [s, v]."""
        with torch.no_grad():
            return self.model.logits(torch.tensor([ids]))[0]

    def greedy(self) -> list[list[int]]:
        """Ours, for each prompt."""
        found = []
        for prompt in self.request["prompts"]:
            ids = list(prompt)
            for _ in range(NEW_TOKENS):
                ids.append(int(self.logits(ids)[-1].argmax()))
            found.append(ids[len(prompt) :])
        return found


@pytest.fixture(scope="session", autouse=True)
def asked_for() -> None:
    if os.environ.get("HAMMER_CLIENTS") != "1":
        pytest.skip("nightly tier: other people's programs; HAMMER_CLIENTS=1 runs it (downloads about 1 GB)")


@pytest.fixture(scope="session")
def exported(asked_for: None, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The quick start at 60 steps, or the finished quick start that HAMMER_CLIENTS_RUN names."""
    if given := os.environ.get("HAMMER_CLIENTS_RUN"):
        return _exported(Path(given))
    if not (ROOT / ".venv" / ".complete").exists():
        pytest.skip("needs the .venv that tests/run.sh makes")
    run = tmp_path_factory.mktemp("clients") / "run"
    done = subprocess.run(
        ["bash", "examples/pretrain_1b4.sh", "train.num_steps=60"],
        cwd=ROOT, capture_output=True, text=True, timeout=400,
        env=os.environ | {"OUT": str(run), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return _exported(run)


def _exported(run: Path) -> Exported:
    generator = torch.Generator().manual_seed(3)
    prompts = [[1, *torch.randint(3, 4096, (2 + i,), generator=generator).tolist()] for i in range(12)]
    texts = ["", "Plain text, 12 words.", "今天的天气：晴。", "  two  spaces", "def main(x):\n    return x", "a\tb\n\n",
             "<s> literal </s>", "\U0001f600 naïve", "x" * 40]  # fmt: skip
    choices = [["def main(", ["self):", " x", "今天"]], ["今天的天气", ["很好", "：晴。", " bad"]]]
    request = {"prompts": prompts, "new_tokens": NEW_TOKENS, "texts": texts, "choices": choices}
    manifest, ctx = open_checkpoint(run), ParallelContext.single()
    config = saved_model(manifest)
    model = build_stage(config, ctx)
    load_model(model, parameter_table(config), manifest, ctx, round_to=DTYPES[manifest.weights_dtype])
    return Exported(run, request, model)


def environment(name: str, wanted: tuple[str, ...]) -> Path:
    """The Python of a virtual environment with these packages and our torch; skips where it cannot be made."""
    key = hashlib.sha256(repr((sys.version, torch.__version__, wanted)).encode()).hexdigest()[:12]
    folder = CACHE / f"{name}-{key}"
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=CACHE))
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", made], check=True, timeout=60)
        (site,) = made.glob("lib/python*/site-packages")
        shared = made / "shared"
        shared.mkdir()
        for part in SHARED:
            (shared / part).symlink_to(Path(torch.__file__).parents[1] / part)
        (site / "shared_torch.pth").write_text(f"{folder / 'shared'}\n{shared}\n")
        pip = [sys.executable, "-m", "pip", "--python", str(made / "bin" / "python"), "--disable-pip-version-check"]
        try:
            done = subprocess.run(
                [*pip, "install", "-q", "--no-input", "--prefer-binary", "--retries", "1", "torch", *wanted],
                capture_output=True, text=True, timeout=500,
            )  # fmt: skip
            why = "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]
        except subprocess.TimeoutExpired:
            why = "pip install took more than 500 seconds"
        if why:
            pytest.skip(f"no environment for {name}: {why}")
        made.rename(folder)
    return folder / "bin" / "python"


@pytest.fixture
def ask(exported: Exported, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run a client's script in its environment: ask(script, package, ...) -> its answer, a dictionary."""

    def run(script: str, *wanted: str) -> dict[str, Any]:
        python = environment(script.removesuffix("_client"), wanted)
        request, answer = tmp_path / "request.json", tmp_path / "answer.json"
        request.write_text(json.dumps(exported.request), encoding="utf-8")
        alone = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        done = subprocess.run(
            [python, HERE / f"{script}.py", exported.folder, request, answer],
            capture_output=True, text=True, timeout=300, cwd=tmp_path,
            env=alone | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf_home")},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return found

    return run
