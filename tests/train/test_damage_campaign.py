"""Thousands of damaged checkpoints, each started from: seen, named, and passed over. On demand (HAMMER_FLIPS=1000).

A run of three steps with two files of tensors, a manifest and a tokenizer is copied and damaged in its newest
checkpoint. The start must name the file and take the one before; each 20th run is trained to its end and compared.
"""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_hammer.tokenizer.convert import export_note
from megatron_hammer.tokenizer.load import load_tokenizer
from megatron_hammer.train import loop, prepare
from tests.checkpoint.layouts import FakeTokenizer
from tests.distributed import run_distributed
from tests.train.runs import overrides, train_here
from tests.train.test_begin import STEPS, equals, go, step

FLIPS = int(os.environ.get("HAMMER_FLIPS", "0"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FLIPS, reason="HAMMER_FLIPS=1000 flips so many bits, and takes some minutes"),
]
RANDOM = random.Random(17)


class Named(FakeTokenizer):
    """A tokenizer for these ids, so that the checkpoints have its files too."""

    vocab_size = 301

    def __init__(self, path: str) -> None:
        self.path = Path(path)


class Campaign:
    """Starts damaged copies of one run."""

    def __init__(self, data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
        self.data, self.monkeypatch, self.capsys = data, monkeypatch, capsys
        self.advance, self.tokenizer = loop.TrainLoop.advance, f"tokenizer.path={folder}"
        self.pristine, self.work, self.expected = (folder / name for name in ("pristine", "work", "expected"))
        use_tokenizer(0)
        first = overrides(data, self.pristine, *STEPS, "train.num_steps=3", self.tokenizer)
        run_distributed(2, use_tokenizer)
        assert run_distributed(2, train_here, first) == [0, 0]
        shutil.copytree(self.pristine, self.expected)
        shutil.rmtree(step(self.expected, 3))
        assert go(data, self.expected, self.tokenizer) == 0
        newest = step(self.pristine, 3)
        self.files = sorted(p.relative_to(self.pristine) for p in newest.rglob("*") if p.is_file())
        assert len(self.files) == 5, self.files
        self.seen, self.runs = Counter[str](), 0

    def start(self, name: Path, damage: Callable[[Path], None]) -> None:
        """Damage a file of a copy, and begin with that."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.pristine, self.work, symlinks=True)
        damage(self.work / name)
        whole = sum(self.seen.values()) % 20 == 0
        self.monkeypatch.setattr(loop.TrainLoop, "advance", self.advance if whole else lambda run, *how: run.first_step)
        what = (name, damage)
        assert go(self.data, self.work, self.tokenizer) == (0 if whole else 3), what
        (line,) = (line for line in self.capsys.readouterr().out.splitlines() if " is damaged: error[E" in line)
        assert name.name in line, (what, line)
        self.seen[line.split("error[")[1][:4]] += 1
        if whole:
            equals(self.work, self.expected)
            self.runs += 1

    def report(self) -> None:
        with self.capsys.disabled():
            number = sum(self.seen.values())
            print(f"\n{number} damages of {len(self.files)} files, all seen and named: {dict(self.seen)}; ", end="")
            print(f"{self.runs} runs trained on and compared, all equal")


def use_tokenizer(rank: int, ours: bool = True) -> None:
    """In this process, which is one of the pool's: take ours, or the package's again."""
    prepare.load_tokenizer = Named if ours else load_tokenizer  # type: ignore[assignment]
    prepare.export_note = (lambda tokenizer: None) if ours else export_note


@pytest.fixture
def campaign(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    try:
        yield Campaign(data, tmp_path, monkeypatch, capsys)
    finally:
        use_tokenizer(0, False)
        run_distributed(2, use_tokenizer, False)


def test_every_flipped_bit(campaign: Campaign) -> None:
    """Uniform over files, then over bits."""

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        bit = RANDOM.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)

    for _ in range(FLIPS):
        campaign.start(RANDOM.choice(campaign.files), flip)
    campaign.report()


def _resize(path: Path, size: int) -> None:
    os.truncate(path, size)


def _hole(path: Path) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(max(0, size // 2 - 2048))
        file.write(bytes(min(4096, size - file.tell())))


def _link(path: Path) -> None:
    path.rename(path.parents[3] / "elsewhere")
    path.symlink_to(path.parents[3] / "elsewhere")


def _instead(path: Path, make: Callable[[], object]) -> None:
    path.unlink()
    make()


def _swap_ranks(path: Path) -> None:
    other = path.with_name("rank-00001.safetensors")
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)


def _of_another_step(path: Path) -> None:
    older = Path(str(path).replace("step-00000003", "step-00000002"))
    if path.parent.name == "tokenizer":  # which is the same in all
        path.write_bytes(path.read_bytes() * 2)
    else:
        shutil.copy(older, path)


KINDS: list[Callable[[Path], None]] = [
    lambda path: _resize(path, RANDOM.randrange(path.stat().st_size)),
    lambda path: _resize(path, path.stat().st_size - 1),
    lambda path: _resize(path, path.stat().st_size + 1),
    lambda path: _resize(path, 0),
    _hole, _link, Path.unlink,
    lambda path: _instead(path, path.mkdir),
    lambda path: _instead(path, lambda: os.mkfifo(path)),
    lambda path: _instead(path, lambda: path.symlink_to("/dev/zero")),
    _of_another_step,
]  # fmt: skip


def test_every_other_damage_to_every_file(campaign: Campaign) -> None:
    for kind in KINDS:
        for name in campaign.files:
            campaign.start(name, kind)
    campaign.start(step(Path(), 3) / "rank-00000.safetensors", _swap_ranks)
    campaign.report()
