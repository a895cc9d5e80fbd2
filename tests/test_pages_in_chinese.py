"""The pages of docs/ in Chinese: the same commands, pictures and sections as the English ones, and links both ways."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.page_blocks import ROOT, blocks_of

TWINS = sorted((ROOT / "docs").glob("*.zh-CN.md"))


def without_comments(block: str) -> str:
    return re.sub(r"(?m)^#.*\n|\s+#.*", "", block)


def outline(text: str) -> list[int]:
    """Levels of the headings."""
    plain = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [len(marks) for marks in re.findall(r"^(#+) ", plain, re.MULTILINE)]


@pytest.mark.parametrize("chinese", TWINS, ids=[path.name for path in TWINS])
def test_the_twin_says_the_same(chinese: Path) -> None:
    english = chinese.with_name(chinese.name.replace(".zh-CN", ""))
    ours, theirs = english.read_text(encoding="utf-8"), chinese.read_text(encoding="utf-8")
    assert list(map(without_comments, blocks_of(ours))) == list(map(without_comments, blocks_of(theirs)))
    assert outline(ours) == outline(theirs)
    pictures = r"!\[[^\]]+\]\(([^)]+)\)"  # a drawing has words in it, and so a twin
    assert re.findall(pictures, ours) == [name.replace(".zh-CN", "") for name in re.findall(pictures, theirs)]
    assert f"[中文]({chinese.name})" in ours and f"[English]({english.name})" in theirs
    for link in re.findall(r"\]\((?!http)([^)#]+)", theirs):
        assert (chinese.parent / link).exists(), link


def test_every_page_has_one() -> None:
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {path.name for path in TWINS}
    assert {path.name.replace(".zh-CN", "") for path in TWINS} == pages
    readme = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")
    assert not re.findall(r"\]\(docs/[a-z_]+\.md\)", readme), "Chinese link titles lead to Chinese pages"
