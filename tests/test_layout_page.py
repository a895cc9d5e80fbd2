"""docs/layout.md: its command describes the layout that the page says, in this process, where no rank is started."""

from __future__ import annotations

import shlex

import pytest

from megatron_hammer.config import load_config
from megatron_hammer.train.prepare import prepare
from megatron_hammer.train.run import describe_dry_run
from tests.page_blocks import ROOT, blocks_of


def test_the_dry_run_describes_its_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (block,) = blocks_of((ROOT / "docs" / "layout.md").read_text(encoding="utf-8"))
    words = shlex.split(block.replace("\\\n", " "))
    assert words[:4] == ["python", "-m", "megatron_hammer.launch", "--nproc"] and "train.dry_run=true" in words
    ranks = int(words[4])
    said = describe_dry_run(prepare(load_config(words[5], words[6:]), ranks), ranks)
    assert "layout: 8 ranks = TP 2 with sequence parallelism x DP 4 (weights sharded)" in said
    assert "memory of a rank: " in said and "; step = 16 samples" in said
