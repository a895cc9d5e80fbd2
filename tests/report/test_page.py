"""The page: what it says, in both languages, of one run and of two; that no text of a run becomes markup."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megatron_hammer.report.curves import MOST_POINTS
from megatron_hammer.report.gather import RunFacts, gather_runs, open_metrics
from megatron_hammer.report.page import run_page
from tests.report.conftest import HOSTILE, STEPS, write_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Outline(HTMLParser):
    """Elements of a page, and its texts outside of scripts."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._hidden = False
        self.feed(page.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._hidden = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._hidden else data


def facts(folder: Path) -> RunFacts:
    return gather_runs(folder, open_metrics(folder))


def data_in(page: bytes) -> dict[str, Any]:
    found = re.search(r'id="figures">(.*?)</script>', page.decode(), re.DOTALL)
    assert found is not None
    value: dict[str, Any] = json.loads(found[1])
    return value


def test_one_run(run: Path) -> None:
    page = run_page([facts(run)])
    outline, data = Outline(page), data_in(page)
    charts = [chart["id"] for chart in data["charts"]]
    assert charts == ["loss", "sources", "valid", "valid_bits", "evaluations", "lr", "grad_norm", "tokens_per_second",
                      "memory_bytes"]  # fmt: skip
    places = [attributes.get("id") for _, attributes in outline.tags if attributes.get("id")]
    assert len(set(places)) == len(places) and {f"chart-{chart}" for chart in charts} <= set(places)
    assert {name for name in places if name in ("curves", "data", "evaluations", "incidents", "generations",
                                                "environment", "settings")} == {a["href"][1:] for t, a in outline.tags
                                                                                if t == "a" and a["href"]}  # fmt: skip
    for words in ("200 / 400 (50.0%)", "2.00 GiB", "spike", "web/part-17.jsonl", "今天 100", "optimizer.lr", "0.3000",
                  "120 steps", "75.00%", "2026-11-30T01:00:00+00:00", "incidents/step-00000090.json",
                  "could not be read: 4", "out of order: 1"):  # fmt: skip
        assert words in outline.text, words
    assert {(mark["kind"], mark["step"]) for mark in data["marks"]} == {
        ("phase", 121), ("incident", 61), ("incident", 90), ("start", 150)
    }  # fmt: skip
    loss = data["charts"][0]["curves"][0]
    assert loss["x"] == list(range(1, STEPS + 1)) and loss["y"][0] == pytest.approx(2 + 8 * 0.97531, rel=1e-4)


def test_two_runs_beside_each_other_in_chinese(run: Path, other: Path) -> None:
    page = run_page([facts(run), facts(other)], "zh")
    outline, data = Outline(page), data_in(page)
    assert outline.tags[0] == ("html", {"lang": "zh-CN"}) and "训练报告：运行 <一> & · other" in outline.text
    for words in ("曲线", "数据计划", "评估", "事件", "各检查点的生成文本", "环境", "设置", "项设置不同", "剩余时间"):
        assert words in outline.text, words
    assert [(c["run"], c["name"], c["dash"]) for c in data["charts"][0]["curves"]] == [
        (0, "运行 <一> &", ""), (1, "other", "7 4")
    ]  # fmt: skip
    sources = data["charts"][1]["curves"]
    assert len(sources) == 4 and len({(c["colour"], c["dash"]) for c in sources}) == 4
    assert sources[0]["colour"] == sources[2]["colour"], "the same source"
    differ = page.decode().split('id="settings"')[1].split("<details>")[0]
    assert re.findall(r"<tr><td>([^<]*)", differ) == ["optimizer.lr", "train.output"]


def test_no_text_of_a_run_becomes_markup(run: Path) -> None:
    page = run_page([facts(run)])
    outline = Outline(page)
    assert {tag for tag, _ in outline.tags} <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "nav", "a", "p", "div", "b", "span", "ul",
        "li", "section", "label", "input", "button", "noscript", "figure", "figcaption", "table", "thead", "tbody",
        "tr", "th", "td", "details", "summary", "pre", "script",
    }  # fmt: skip
    assert not [name for _, attributes in outline.tags for name in attributes if name.startswith("on")]
    assert "\u202e" not in page.decode() and HOSTILE[:-1] in outline.text
    assert not re.search(r"(?:src|href)=[\"'](?!#)", page.decode())


def test_a_run_that_has_nothing_but_metrics(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 7, "loss": null}\n')
    outline = Outline(run_page([facts(tmp_path)]))
    assert "7" in outline.text and "Settings" not in outline.text and "Incidents" not in outline.text
    for name in ("starts.jsonl", "evaluations.jsonl", "generations.jsonl", "ledger.jsonl", "checkpoints", "incidents"):
        (tmp_path / name).write_bytes(b'{"step": 1, "environment": {}, "config": {"model": 3}}\n\xff\xfe\n')
    found = facts(tmp_path)
    assert found.notes and "ledger" in " ".join(found.notes)
    assert "ledger.jsonl" in Outline(run_page([found], "zh")).text


def test_a_long_run_makes_a_small_page(tmp_path: Path) -> None:
    lines = [
        json.dumps({"step": s, "loss": 2.0, "lr": 1e-3, "grad_norm": 9.0 if s == 4777 else 1.0})
        for s in range(1, 6_001)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = run_page([facts(tmp_path)])
    grad_norm = next(chart for chart in data_in(page)["charts"] if chart["id"] == "grad_norm")["curves"][0]
    assert max(grad_norm["hi"]) == 9.0 and len(page) < 60 * MOST_POINTS


def test_in_a_browser(tmp_path: Path) -> None:
    """Charts are drawn, hostile texts run nothing; needs a headless browser on PATH."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser ({', '.join(BROWSERS)}) on PATH")
    run = write_run(tmp_path / "运行")
    page = tmp_path / "report.html"
    page.write_bytes(run_page([facts(run)], "zh"))
    words = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
             "--virtual-time-budget=2000", "--dump-dom", page.as_uri()]  # fmt: skip
    done = subprocess.run([browser, *words], capture_output=True, text=True, timeout=300)
    assert done.stdout.count('class="curve c') == 10, done.stderr[-2000:]
    assert "<img" not in done.stdout.split("<script")[0] and 'id="controls" hidden' not in done.stdout
