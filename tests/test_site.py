"""The site of docs/: it builds without a warning, in both languages, and asks no other host; drawings are current."""

from __future__ import annotations

import importlib.util
import logging
import re
import runpy
from pathlib import Path

import pytest

from tests.page_blocks import ROOT

OUTSIDE = {"examples", "slurm", "ssh", "docker", "monitoring"}
"""Pages that are read from elsewhere, beside the first one."""
HAS_MKDOCS = all(importlib.util.find_spec(name) for name in ("mkdocs", "material", "mkdocs_static_i18n"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as ``mkdocs build --strict`` builds it."""
    if not HAS_MKDOCS:
        pytest.skip('the site needs mkdocs: pip install -e ".[docs]"')
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    said: list[str] = []
    listener = logging.Handler(logging.WARNING)
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("mkdocs").addHandler(listener)
    try:
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    finally:
        logging.getLogger("mkdocs").removeHandler(listener)
    assert not said, "\n".join(said)
    return folder


def test_every_page_is_there_in_both_languages(site: Path) -> None:
    names = {path.stem for path in (ROOT / "docs").glob("*.md") if not path.stem.endswith(".zh-CN")} | OUTSIDE
    for folder in (site, site / "zh-CN"):
        assert {path.parent.name for path in folder.glob("*/index.html")} - {"zh-CN"} == names
        assert "bash examples/pretrain_1b4.sh" in re.sub(r"<[^>]+>", "", (folder / "index.html").read_text("utf-8"))


def test_no_page_asks_another_host(site: Path) -> None:
    """Neither fonts nor scripts nor pictures: the site can be read where no other host is reached."""
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|img|iframe)[^>]+src=.?https?://[^>]+>", text), page
        assert not re.findall(r"<link[^>]+rel=.?(?:stylesheet|preconnect)[^>]+href=.?https?://[^>]+>", text), page


def test_a_link_to_nothing_is_a_warning(site: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also one to a file outside of docs/, whose links the site shows as names."""
    hooks = runpy.run_path(str(ROOT / "docs" / "site_hooks.py"))

    class File:
        src_uri = "x.md"
        abs_src_path = str(ROOT / "docs" / "x.md")

    class Page:
        file = File()

    text = "[a](../tools/plan.py) [b](../tools/none.py) [`c`](data.zh-CN.md#d) [f](../docker/README.zh-CN.md#g)\n"
    text += "\n```\n[e](../f)\n```\n"
    shown = hooks["on_page_markdown"](text, Page(), None, None)
    assert shown == "a (`tools/plan.py`) b (`tools/none.py`) [`c`](data.md#d) [f](docker.md#g)\n\n```\n[e](../f)\n```\n"
    hooks["on_page_markdown"]("![h](../benchmarks/results/muon-epyc-2cores-2026-11-29.png)", Page(), None, None)
    assert [record.getMessage() for record in caplog.records] == [
        "x.md links to ../tools/none.py, which is not there",
        "x.md shows ../benchmarks/results/muon-epyc-2cores-2026-11-29.png, which lies outside of docs/",
    ]


def test_every_page_is_in_the_navigation() -> None:
    """Held without mkdocs, too, where the site is not built."""
    listed = re.findall(r"(?m)^\s+- (?:\w+: )?([a-z_]+\.md)", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = [path.name for path in (ROOT / "docs").glob("*.md") if not path.stem.endswith(".zh-CN")]
    assert sorted(listed) == sorted([*pages, "index.md", *(f"{name}.md" for name in OUTSIDE)])


def test_the_drawings_are_those_that_the_program_draws() -> None:
    pictures = ROOT / "docs" / "images"
    drawn = runpy.run_path(str(pictures / "draw.py"))["files"]()
    assert drawn == {path.name: path.read_text(encoding="utf-8") for path in pictures.glob("*.svg")}
