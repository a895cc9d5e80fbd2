"""What mkdocs does to the pages of docs/ beyond rendering them (mkdocs.yml names this file).

The pages are written to be read on a code host, where README.md leads and links go to files of the repository. On the
site README.md is the first page, and those of examples/ and docker/ are pages, too (``READMES``). The line that leads
to a page's twin gives way to the choice of languages, links between Chinese pages go to pages of the Chinese site, and
a link to another file outside of docs/ becomes the file's name. A link to a file that is not there is a warning, and so
is a picture outside of docs/, which the site would not show; ``--strict`` makes errors of them.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path

from jinja2 import Environment
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
_OUTSIDE = {
    "index": "README",
    "examples": "examples/README",
    "slurm": "examples/slurm/README",
    "ssh": "examples/ssh/README",
    "docker": "docker/README",
    "monitoring": "examples/monitoring/README",
}
READMES = {f"{name}{twin}.md": f"{source}{twin}.md" for name, source in _OUTSIDE.items() for twin in ("", ".zh-CN")}
"""Pages of the site that are read from files outside of docs/."""
PAGES = {source: name.replace(".zh-CN", "") for name, source in READMES.items()}
LOG = logging.getLogger("mkdocs.hooks.site")
TWIN = re.compile(r"(?m)^\[(?:中文|English)\]\([A-Za-z_]+(?:\.zh-CN)?\.md\)\n")
README_TWIN = re.compile(r"(?m)^\[(?:中文说明|English)\]\(README[^)]*\.md\)[^\n]*\n")
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()#\s]+)(#[^()\s]*)?\)")
JOINT = re.compile(r"(?<=[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef])\n(?=[\u4e00-\u9fff\uff08])")
CODE_IN_CELL = re.compile(r"`[^`\n]*\\\|[^`\n]*`")
FENCE = re.compile(r"(?ms)^(```.*?^```)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie elsewhere, in both languages."""
    for name in READMES:
        files.append(File(name, config.docs_dir, config.site_dir, config.use_directory_urls))
    return files


def on_env(env: Environment, config: MkDocsConfig, files: Files) -> None:
    """The theme's own words: those for ``zh-CN`` it calls ``zh``."""
    config.theme["language"] = config.theme["language"].partition("-")[0]


def on_page_read_source(page: Page, config: MkDocsConfig) -> str | None:
    """What such a page is read from; None: from its own file, as all others."""
    readme = READMES.get(Path(page.file.abs_src_path or "").name)
    return None if readme is None else README_TWIN.sub("", (ROOT / readme).read_text(encoding="utf-8"))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The text of a page as the site needs it."""
    source = READMES.get(Path(page.file.abs_src_path or "").name, "docs/")
    here = ROOT / posixpath.dirname(source)
    parts = FENCE.split(TWIN.sub("", markdown, count=1))
    for i, part in enumerate(parts):
        if not part.startswith("```"):
            # A line break between two Chinese words is no blank.
            parts[i] = LINK.sub(lambda match: _link(match, here, page), JOINT.sub("", part))
            # In a cell a code host wants \| in code, too; here the bar alone is meant.
            parts[i] = CODE_IN_CELL.sub(lambda match: match.group().replace("\\|", "|"), parts[i])
    return "".join(parts)


def _link(match: re.Match[str], folder: Path, page: Page) -> str:
    mark, label, target, anchor = match.groups(default="")
    if "://" in target or target.startswith("mailto:"):
        return match.group()
    place = posixpath.normpath(posixpath.join(folder.relative_to(ROOT).as_posix(), target))
    if not (ROOT / place).exists():
        LOG.warning("%s links to %s, which is not there", page.file.src_uri, target)
    if place in PAGES:
        return f"[{label}]({PAGES[place]}{anchor})"
    if place.startswith("docs/"):
        return f"{mark}[{label}]({place.removeprefix('docs/').replace('.zh-CN.md', '.md')}{anchor})"
    if mark:
        LOG.warning("%s shows %s, which lies outside of docs/", page.file.src_uri, target)
    name = f"`{place}`"
    return name if label.strip("`") in (place, posixpath.basename(place), place + "/") else f"{label} ({name})"
