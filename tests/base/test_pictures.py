"""Pictures take characters from any installed font that has them."""

from __future__ import annotations

import logging
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.base.pictures import CHINESE, PREFERRED, fallback_families, picture_sayer, png_of, save_png, wrap
from megatron_hammer.costs import budget, plan_report
from megatron_hammer.costs.planner import PlanRequest, plan_layouts
from megatron_hammer.metrics import plot
from megatron_hammer.profile import plots as profile_plots
from megatron_hammer.tokenizer import merge
from megatron_hammer.tokenizer.lab import plots as lab
from megatron_hammer.tokenizer.lab.analyze import OVERALL, Share, Vocabulary
from megatron_hammer.tokenizer.scripts import SCRIPTS
from tests.model.tiny import tiny_config
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
        png_of(titled("한 run 글 \udcce"))
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("note: no installed font has 글한: ") and "fonts-noto-cjk" in line


def test_a_domain_whose_name_is_no_text_is_drawn() -> None:
    """Tick labels: matplotlib writes them anew when it draws."""
    figures = {"bytes": 2000, "bytes_per_token": 4.0, "compared_compression": 1.0}
    described = {"\udcce": {"domains": {"\udcce\udcc4": figures, OVERALL: figures}}}
    assert lab.draw_compression(described, "\udcce").startswith(b"\x89PNG")


def test_rows_are_no_wider_than_they_may_be() -> None:
    """Chinese characters are twice as wide, and no row begins with their comma."""
    assert wrap("来源：宽度 2,048、序列，end of it", 12) == ["来源：宽度", "2,048、序", "列，end of", "it"]
    assert wrap("模型计算，长", 8) == ["模型计", "算，长"] and wrap("a" * 5 + " b", 4) == ["aaaa", "a b"]


def test_texts_are_chinese_where_a_font_has_it(
    installed: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert [picture_sayer("en")("loss", "损失"), picture_sayer("zh")("loss", "损失")] == ["loss", "loss"]
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("note: no installed font has Chinese characters: pictures are in English")
    make_font(installed / "d.ttf", "All Sans SC", CHINESE)
    assert picture_sayer("zh")("loss", "损失") == "损失" and capfd.readouterr().err == ""


UNITS = "TP|CP|PP|DP|GiB|GFLOP|FLOPs|MFU|RoPE|SwiGLU|TFLOP|GB|MiB|KB|ranks?|token|bf16|fp8|kernel|nats"
NAMES = r"metrics|jsonl|tools/\w+|py|attention fused|torch|CPU|hammer|llama|valid|zh|base|donor|H100|none"
SHARED = "optimizer|gradients|weights|selective|full"  # values of settings in names of layouts


def test_every_picture_of_a_program_is_in_chinese(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No English word is left but names; nothing is rendered."""
    found = dict[str, str]()

    def keep(name: str) -> Any:
        def kept(figure: Figure, output: Path | None = None) -> bytes:
            found[name] = "\n".join(text.get_text() for text in figure.findobj(Text))
            return b""

        return kept

    for module in (plot, profile_plots, plan_report, lab, merge):
        function = "png_of" if module in (lab, merge) else "save_png"
        monkeypatch.setattr(module, function, keep(module.__name__))
    monkeypatch.setattr("megatron_hammer.base.pictures.can_draw", lambda text: True)

    def check(module: Any) -> None:
        text = found.pop(module.__name__)
        left = re.sub(rf"(?<![a-zA-Z])(?:{UNITS}|{NAMES}|{SHARED})(?![a-zA-Z])", "", text)
        assert re.search("[\u4e00-\u9fff]", text) and not re.findall("[A-Za-z]{2,}", left), left

    line: dict[str, object] = {"step": 1, "loss": 2.0, "lr": 1e-3, "consumed_tokens": 4096, "valid/zh/loss": 3.0}
    write_metrics(tmp_path / "hammer", [line | {"source/zh/loss": 2.0, "source/hammer/loss": None}])
    plot.plot_loss(tmp_path / "hammer", tmp_path / "loss.png", "zh")
    check(plot)
    parts = [{"name": name, "ms": 5.0, "share": 0.1, "limit_ms": 3.0, "of_limit": 0.6} for name in budget.PARTS]
    kinds = ("weights", "gradients", "optimizer state", "activations", "temporary", "program, libraries", "the rest")
    profile = {
        "device": "CPU, 2 threads", "processor": "CPU", "torch": "2.14", "date": "2026-11-30", "precision": "bf16",
        "parameters": 7, "micro_batch_size": 4, "micro_batches": 2, "seq_length": 256, "ranks": 2,
        "data": "random tokens", "kernels": {"attention": "fused"}, "recompute": "none", "parts": parts,
        "tokens_per_second": 1.0, "step_ms_without_profiler": 80.0, "step_ms": 80.0, "limit_ms": 48.0,
        "rates": {"tflops": 3.0, "gb_per_second": 13.0, "measured": []},
        "memory": {"peak_mib": 1.0, "source": "resident, without the profiler",
                   "kinds": [{"name": name, "mib": 1.0, "share": 0.1} for name in kinds]},
    }  # fmt: skip
    of_ranks = {"rates": None, "limit_ms": None, "communication": [{"ms": 3.0, "beside_ms": 1.0}]}
    for of_one in (profile, profile | of_ranks):
        profile_plots.draw_profile(of_one, tmp_path / "profile.png", "zh")
        check(profile_plots)
    planned = plan_layouts(tiny_config(train__precision="bf16", train__global_batch_size=4), PlanRequest(2, "h100"))
    plan_report.draw_plan(planned, tmp_path / "plan.png", 3, "zh")
    check(plan_report)
    merge.draw_calibration(merge.Calibration("的是", (0.9, 1.0)), "base / donor", "zh")
    check(merge)
    figures = {"bytes": 2000, "bytes_per_token": 4.0, "compared_compression": 1.0}
    lab.draw_compression({"llama": {"domains": {"zh": figures, OVERALL: figures}}}, "llama", "zh")
    check(lab)
    one = Vocabulary({3: 10}, dict.fromkeys(SCRIPTS, 1))
    for vocabularies in ({"llama": one}, {"llama": one, "hammer": one}):
        lab.draw_vocabulary(vocabularies, "zh")
        check(lab)
    coverage: Any = SimpleNamespace(levels={1: Share(1, 2)}, tokens=(np.array([1, 4]), np.array([True, False])))
    lab.draw_coverage({"hammer": coverage}, "zh")
    check(lab)
    price: Any = SimpleNamespace(cost=SimpleNamespace(vocab_size=100, flops=1e9), curve="none", best=None,
                                 tokens_per_byte={OVERALL: 0.3})  # fmt: skip
    lab.draw_price({"llama": price}, tiny_config(), {"zh": 2000}, "zh")
    check(lab)


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
