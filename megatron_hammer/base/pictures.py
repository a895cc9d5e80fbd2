"""Pictures as PNG, with characters of any script that an installed font has.

matplotlib draws a box for what its own font lacks, whatever else is installed: a family is taken by name, and its list
of fonts may be older than the fonts. So the characters of a finished figure are compared with its font, and families
that have the missing ones are added to all of its texts as fallbacks (matplotlib takes each character from the first
family that has it). Nothing is searched where nothing is missing. Needs no torch.
"""

from __future__ import annotations

import io
import logging
import os
import re
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.base.files import writing
from megatron_hammer.base.language import Language, Say, sayer
from megatron_hammer.base.progress import say
from megatron_hammer.base.terminal import width_of

# Okabe and Ito's palette, told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")  # beside the colours: blue and green are one to readers who lack blue
WIDTH_INCHES, DOTS_AN_INCH = 9.0, 130  # a page shows its 1,170 pixels as 800 or more
SMALL_POINTS = 9  # of the smallest text: 11 pixels of these 800, and 9 points in a print
TITLE_COLUMNS, SOURCE_COLUMNS = 72, 125  # of their sizes in the figure's width
SOURCE_INCHES = 0.1  # from the lower edge to the source
CHINESE = "训练损失词表步时间显存"  # of which a font for traditional characters alone lacks half
# A family for several scripts comes before one for a single letter, and one without serifs, whose Chinese is of the
# mainland, before others: words of its name.
PREFERRED = ("Sans CJK SC", "Sans SC", "Sans CN", "YaHei", "MicroHei", "Micro Hei", "SimHei", "PingFang", "Hei", "Sans")

_WIDE, _CLOSING = "\u2e80-\u9fff\uac00-\ud7a3\uf900-\ufaff\uff00-\uffef", "，。；：、！？）》”"
_WORDS = re.compile(rf"\s+|[（《“]*(?:[{_WIDE}]|[^\s{_WIDE}]+)[{_CLOSING}]*|.")
_SURROGATE = re.compile("[\ud800-\udfff]")


def new_figure(height: float, title: str, source: str) -> Any:
    """A matplotlib figure as wide as a page, with its title above and, small, below, what it was drawn from."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DOTS_AN_INCH, layout="constrained")
    title = "\n".join(wrap(title, TITLE_COLUMNS))
    figure.suptitle(title, x=0.008, ha="left", fontsize=13, weight="bold", parse_math=False)
    figure.supxlabel(_wrapped(source), x=0.008, ha="left", fontsize=SMALL_POINTS, color="0.35", parse_math=False)
    return figure


def bare_figure(height: float, source: str) -> Any:
    """The same without a title, for a caller who places everything above the source, in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DOTS_AN_INCH)
    figure.text(0.008, SOURCE_INCHES / height, _wrapped(source), va="bottom", fontsize=SMALL_POINTS, color="0.35",
                parse_math=False)  # fmt: skip
    return figure


def _wrapped(source: str) -> str:
    return "\n".join(wrap(source, SOURCE_COLUMNS))


def wrap(text: str, columns: int) -> list[str]:
    """Rows of at most so many columns: a Chinese character has two and a row may end behind it, else at a blank.

    No row begins with a Chinese comma or ends with an opening bracket; a word that is longer than a row is cut.
    """
    rows = [""]
    for word in _WORDS.findall(text):
        if rows[-1] and width_of(rows[-1] + word.rstrip()) > columns:
            rows[-1] = rows[-1].rstrip()
            rows.append("")
        for character in " " if word.isspace() else word:
            if width_of(rows[-1] + character) > columns and not character.isspace():
                rows.append("")
            rows[-1] += character if rows[-1] or not character.isspace() else ""
    return [row.rstrip() for row in rows]


def tidy(axes: Any, grid: str = "both") -> None:
    """Pale lines to read values by, behind what is drawn, and no frame above and on the right."""
    axes.grid(axis=grid, color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def legend_above(axes: Any, columns: int) -> None:
    """What the colours of the axes stand for, between title and axes."""
    names = axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, borderaxespad=0.2)
    for text in names.get_texts():
        text.set_parse_math(False)  # a name may be $x


def png_of(figure: Any) -> bytes:
    """The content of a PNG file of a matplotlib figure."""
    _escape_surrogates(figure)
    _use_fallbacks(figure)
    content, fonts = io.BytesIO(), logging.getLogger("matplotlib.font_manager")
    level = fonts.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # said once, in a line of ours
        fonts.setLevel(logging.ERROR)  # a Chinese family of one weight is taken for all of them: no news for anybody
        try:
            figure.savefig(content, format="png")
        finally:
            fonts.setLevel(level)
    return content.getvalue()


def check_png(output: Path) -> None:
    """Refuse a name that no PNG file can have here: a folder, another ending, a folder that is not there.

    Raises:
        ConfigError: E288.
    """
    if output.is_dir():
        raise ConfigError(88, f"output {output}", "is a folder", f"name a file in it: {output / 'NAME.png'}")
    if output.suffix.lower() != ".png":
        remedy = f"write {output.with_suffix('.png') if output.suffix else f'{output}.png'}"
        raise ConfigError(88, f"output {output}", "is to be a PNG, and its name does not end in .png", remedy)
    if not output.parent.is_dir():
        remedy = f"make it first: mkdir -p {shlex.quote(str(output.parent))}"
        raise ConfigError(88, f"output {output}", f"lies in {output.parent}, which is no folder", remedy)


def save_png(figure: Any, output: Path) -> None:
    """Write a matplotlib figure into a PNG file, which appears complete or not at all."""
    check_png(output)
    content = png_of(figure)
    staging = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        with writing(staging, len(content)):
            staging.write_bytes(content)
        os.replace(staging, output)
    finally:
        staging.unlink(missing_ok=True)


def _escape_surrogates(figure: Any) -> None:
    """Show bytes of a file's name that are no text here (GBK on a UTF-8 system) as codes, which fonts can draw."""
    from matplotlib.text import Text

    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):  # which writes its labels anew when it is drawn
            names = [label.get_text() for label in axis.get_ticklabels()]
            if any(map(_SURROGATE.search, names)):
                axis.set_ticks(axis.get_ticklocs(), [_escaped(name) for name in names])
    for text in figure.findobj(Text):
        if _SURROGATE.search(text.get_text()):
            text.set_text(_escaped(text.get_text()))


def _escaped(name: str) -> str:
    return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", name)


def _use_fallbacks(figure: Any) -> None:
    from matplotlib.text import Text

    texts = figure.findobj(Text)
    missing = _missing("".join(text.get_text() for text in texts))
    if not missing:
        return
    families, lacking = fallback_families(missing)
    if lacking:
        say(f"note: no installed font has {''.join(sorted(lacking))}: the picture shows boxes; install one that has "
            "(Debian: apt-get install fonts-noto-cjk)")  # fmt: skip
    for text in texts:
        text.set_fontfamily([*text.get_fontfamily(), *families])


def picture_sayer(language: Language) -> Say:
    """What chooses a picture's texts: English where no installed font has Chinese, since there would be boxes."""
    if language == "zh" and not can_draw(CHINESE):
        say("note: no installed font has Chinese characters: pictures are in English; install one for Chinese ones "
            "(Debian: apt-get install fonts-noto-cjk)")  # fmt: skip
        return sayer("en")
    return sayer(language)


def can_draw(text: str) -> bool:
    """Whether the installed fonts have all characters of a text between them."""
    missing = _missing(text)
    return not missing or not fallback_families(missing)[1]


def _missing(text: str) -> set[str]:
    """The characters of a text that a picture's own font lacks."""
    from matplotlib import font_manager

    own = _characters_of(font_manager.findfont(font_manager.FontProperties()))
    return {c for c in text if not c.isspace()} - own


def fallback_families(missing: set[str]) -> tuple[list[str], set[str]]:
    """Families that have these characters between them, and the characters that none has."""
    families: list[str] = []
    left = set(missing)
    candidates = [(name, left & _characters_of(path)) for name, path in _installed()]
    while left:
        name, known = max(candidates, key=lambda candidate: len(candidate[1] & left), default=("", set()))
        if not known & left:
            break
        families.append(name)
        left -= known
    return families, left


def _installed() -> Iterator[tuple[str, str]]:
    """Name and file of each family, those that are new since matplotlib made its list too; the preferred ones first."""
    from matplotlib import font_manager

    manager = font_manager.fontManager
    listed = {entry.fname for entry in manager.ttflist}
    for path in sorted(set(font_manager.findSystemFonts()) - listed):
        try:
            manager.addfont(path)
        except (OSError, RuntimeError, ValueError):  # a format that matplotlib does not read
            continue

    def rank(entry: Any) -> tuple[int, bool, int, str]:
        place = next((i for i, words in enumerate(PREFERRED) if words in entry.name), len(PREFERRED))
        return place, entry.style != "normal", abs(_weight(entry.weight) - 400), entry.name

    seen = set()
    for entry in sorted(manager.ttflist, key=rank):
        if entry.name not in seen and "Last Resort" not in entry.name:  # which has a box for every character
            seen.add(entry.name)
            yield entry.name, entry.fname


def _weight(weight: int | str) -> int:
    from matplotlib import font_manager

    return weight if isinstance(weight, int) else font_manager.weight_dict.get(weight, 400)


def _characters_of(path: str) -> set[str]:
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(path)
        return {chr(code) for code in font.get_charmap()} if font.scalable else set()  # colour bitmaps are not drawn
    except (OSError, RuntimeError):
        return set()
