"""Pictures take characters from any installed font that has them."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.image import imread

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.base.pictures import PREFERRED, fallback_families, png_of, save_png
from tests.test_examples import write_metrics


def make_font(path: Path, family: str, characters: str) -> Path:
    """A font whose characters are black squares."""
    names = [".notdef", *(f"uni{ord(c):04X}" for c in characters)]
    pen = TTGlyphPen(None)
    for move, point in zip(["moveTo", *3 * ["lineTo"]], [(0, 0), (0, 900), (900, 900), (900, 0)]):
        getattr(pen, move)(point)
    pen.closePath()
    glyph = pen.glyph()
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(names)
    font.setupCharacterMap({ord(c): name for c, name in zip(characters, names[1:])})
    font.setupGlyf(dict.fromkeys(names, glyph))
    font.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    font.setupHorizontalHeader(ascent=900, descent=-100)
    font.setupNameTable({"familyName": family, "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    path.parent.mkdir(parents=True, exist_ok=True)
    font.save(path)
    return path


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of fonts that matplotlib's list does not know yet."""
    folder = tmp_path / "fonts"
    make_font(folder / "a.ttf", "Rare Signs", "运\U00020000")
    make_font(folder / "b.ttf", "Some Micro Hei", "运行名")
    make_font(folder / "c.ttf", "Odd Serif", "运行名")
    (folder / "broken.ttf").write_bytes(b"no font")
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda *_: [str(p) for p in sorted(folder.iterdir())])
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [
        entry for entry in font_manager.fontManager.ttflist if "matplotlib" in entry.fname
    ])  # fmt: skip
    return folder


def ink(figure: Figure, tmp_path: Path) -> float:
    save_png(figure, tmp_path / "picture.png")
    with pytest.raises(ConfigError, match=r"E288.*output .* is a folder; name a file in it"):
        save_png(figure, tmp_path)
    return float(np.mean(imread(tmp_path / "picture.png")[..., :3] < 0.5))


def titled(text: str) -> Figure:
    figure = Figure(figsize=(4, 1), dpi=100)
    figure.text(0.1, 0.3, text, fontsize=20)
    return figure


def test_the_family_that_has_most_comes_first_and_the_preferred_one_of_equals(installed: Path) -> None:
    assert fallback_families(set("运行名")) == (["Some Micro Hei"], set())
    assert fallback_families({"行", "\U00020000"}) == (["Some Micro Hei", "Rare Signs"], set())
    assert fallback_families({"行", "한"}) == (["Some Micro Hei"], {"한"})
    assert "Micro Hei" in PREFERRED


def test_a_font_that_was_installed_later_is_used(
    installed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = ink(titled("运行"), tmp_path)
    assert drawn > 0.03, "two black squares, no boxes"
    assert capfd.readouterr().err == ""


def test_matplotlib_says_nothing_of_weights(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """WenQuanYi, which Debian has, comes in one weight: that was three lines for each picture with a Chinese name."""
    fonts = logging.getLogger("matplotlib.font_manager")
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: fonts.warning("findfont: Failed to find font weight bold"))
    png_of(titled("run"))
    assert not caplog.records and fonts.level == logging.NOTSET


def test_what_no_font_has_is_said_in_one_line(
    installed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        png_of(titled("한 run 글"))
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("note: no installed font has 글한: ") and "fonts-noto-cjk" in line


def test_a_run_and_a_set_named_in_chinese(installed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Title and legend of a loss curve; a dollar sign is no formula."""
    from megatron_hammer.metrics.plot import plot_loss

    lines: list[dict[str, object]] = [
        {"step": 1, "loss": 2.0, "lr": 1e-3, "valid/运$x_{/loss": 3.0, "consumed_tokens": 4096}
    ]
    write_metrics(tmp_path / "名行 $\\frac{", lines)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plot_loss(tmp_path / "名行 $\\frac{", tmp_path / "loss.png").tokens == 4096
    assert capfd.readouterr().err == ""
