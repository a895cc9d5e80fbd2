"""Writes the HTML of a report on one run, or on two side by side, section by section, in English or in Chinese.

All texts of runs go through ``base/html_page.py``, which escapes them; the script gets its numbers as JSON. What a run
does not have (evaluations, say) gets no section. Needs no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import resources
from typing import Any

import numpy as np

from megatron_hammer import __version__
from megatron_hammer.base.html_page import data_of, escape, page_of, row_of, table_of, visible
from megatron_hammer.base.language import Language, Say, sayer, span
from megatron_hammer.report.charts import Chart, charts_of, tokens_of
from megatron_hammer.report.curves import MetricsReader
from megatron_hammer.report.gather import RunFacts

MEAN_STEPS = 100  # of the loss and the speed at the top: one step's are noise
MOST_MARKS = 300  # in the charts, of each run
MOST_STARTS, MOST_STEPS, MOST_TEXTS = 50, 12, 30  # rows of starts; columns of evaluations; texts of a prompt
MOST_PROMPTS, MOST_NOTES = 20, 20
MOST_CHARACTERS = 4000  # of one text, and of one setting


def names_of(runs: Sequence[RunFacts]) -> list[str]:
    """Names of the runs, no two equal."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [f"{name} ({i + 1})" for i, name in enumerate(names)]


def run_page(runs: Sequence[RunFacts], language: Language = "en", refresh: float | None = None) -> bytes:
    """The file.

    Args:
        runs: one or two.
        refresh: seconds after which the page loads itself anew; None: it does not.
    """
    say, names = sayer(language), names_of(runs)
    charts = charts_of(runs, names, say)
    sections = [
        ("curves", say("Curves", "曲线"), _charts(charts, say)),
        ("data", say("Data plan", "数据计划"), _plans(runs, names, say)),
        ("evaluations", say("Evaluations", "评估"), _evaluations(runs, names, say)),
        ("incidents", say("Incidents", "事件"), _incidents(runs, names, say)),
        ("generations", say("Generations at checkpoints", "各检查点的生成文本"), _generations(runs, names, say)),
        ("environment", say("Environment", "环境"), _environment(runs, names, say)),
        ("settings", say("Settings", "设置"), _settings(runs, names, say)),
    ]
    sections = [section for section in sections if section[2]]
    parts = [_nav(sections, say), *(part for run, name in zip(runs, names) for part in _summary(run, name, runs, say))]
    for id, title, content in sections:
        parts += [f'<section id="{id}"><h2>{escape(title)}</h2>', *content, "</section>"]
    parts.append(data_of("figures", _data(runs, names, charts, say, refresh)))
    heading = say("Run report: ", "训练报告：") + " · ".join(names)
    own = resources.files("megatron_hammer.report")
    style, script = ((own / name).read_text(encoding="utf-8") for name in ("report.css", "charts.js"))
    return page_of(heading, parts, {"en": "en", "zh": "zh-CN"}[language], style, script)


def _data(
    runs: Sequence[RunFacts], names: Sequence[str], charts: Sequence[Chart], say: Say, refresh: float | None
) -> dict[str, Any]:
    """What the script needs."""
    marks = [mark | {"run": i} for i, run in enumerate(runs) for mark in _marks(run, names[i], say)]
    return {
        "runs": [{"tokens": tokens_of(run.metrics)} for run in runs],
        "charts": [chart.to_tree() for chart in charts],
        "marks": marks,
        "words": {"step": say("step", "步"), "tokens": say("tokens", "token")},
        "refresh": refresh,
    }


def _marks(run: RunFacts, name: str, say: Say) -> list[dict[str, Any]]:
    """Steps that the charts show as lines, with what is said about them."""
    found = [("phase", step, say("phase", "阶段") + f" {i}") for i, step in enumerate(run.phase_steps[1:], start=2)]
    found += [("incident", tree["step"], str(tree.get("finding", ""))[:80]) for tree in run.incidents]
    for start in run.starts[1:]:
        if isinstance(start.get("step"), int):
            found.append(("start", start["step"], say("started again", "重新启动")))
    return [
        {"kind": kind, "step": step, "text": visible(f"{name}: {text}, {say(f'step {step:,}', f'第 {step:,} 步')}")}
        for kind, step, text in found[-MOST_MARKS:]
    ]


# ---- the top ----


def _nav(sections: Sequence[tuple[str, str, Sequence[str]]], say: Say) -> str:
    links = "".join(f'<a href="#{id}">{escape(title)}</a>' for id, title, _ in sections)
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    made = say(f"Made by megatron_hammer {__version__} at {now}.", f"由 megatron_hammer {__version__} 于 {now} 生成。")
    return f'<nav>{links}</nav>\n<p class="muted">{escape(made)}</p>'


def _summary(run: RunFacts, name: str, runs: Sequence[RunFacts], say: Say) -> Iterator[str]:
    """What one wants to know first."""
    if len(runs) > 1:
        yield f"<h2>{escape(name)}</h2>"
    cards = "".join(
        f"<div{_class(bad)}><b>{escape(title)}</b><span>{escape(value)}</span></div>"
        for title, value, bad in _cards(run, say)
        if value
    )
    yield f'<div class="cards">{cards}</div>'
    noted = [*_damage(run, say), *run.notes]
    if noted:
        notes = "".join(f"<li>{escape(note[:500])}</li>" for note in noted[:MOST_NOTES])
        yield f'<div class="notes">{escape(say("Not all could be read:", "有内容未能读取："))}<ul>{notes}</ul></div>'


def _damage(run: RunFacts, say: Say) -> list[str]:
    """What of metrics.jsonl is not in the curves."""
    metrics, found = run.metrics, []
    if metrics.damaged:
        found.append(say(f"metrics.jsonl: lines that could not be read: {metrics.damaged:,}",
                         f"metrics.jsonl：无法读取的行数：{metrics.damaged:,}"))  # fmt: skip
    if metrics.out_of_order:
        found.append(say(f"metrics.jsonl: lines whose step is out of order: {metrics.out_of_order:,}",
                         f"metrics.jsonl：步号顺序不对的行数：{metrics.out_of_order:,}"))  # fmt: skip
    if metrics.left_out:
        found.append(say(f"metrics.jsonl: names that are not drawn: {len(metrics.left_out):,}",
                         f"metrics.jsonl：未画出的名称数：{len(metrics.left_out):,}"))  # fmt: skip
    return found


def _class(bad: bool) -> str:
    return ' class="bad"' if bad else ""


def _cards(run: RunFacts, say: Say) -> list[tuple[str, str, bool]]:
    """(title, value, whether it is bad news)."""
    metrics, step, planned = run.metrics, run.metrics.last_step, run.num_steps
    loss, rate = _recent(metrics, "loss"), _recent(metrics, "tokens_per_second")
    share = f" ({step / planned:.1%})" if planned else ""
    state = {
        True: say("running", "运行中"),
        False: say("complete", "已完成") if run.is_complete else say("not running", "未在运行"),
        None: say("complete", "已完成") if run.is_complete else "",
    }[run.is_alive]
    memory, mfu, tokens = (metrics.last.get(key) for key in ("memory_bytes", "mfu", "consumed_tokens"))
    happened = len(run.incidents) + run.incidents_left_out
    meant = min(MEAN_STEPS, len(metrics.values("loss")[1]))
    return [
        (say("state", "状态"), state, state == say("not running", "未在运行")),
        (say("step", "步"), f"{step:,}" + (f" / {planned:,}{share}" if planned else ""), False),
        (say(f"loss, mean of {meant} steps", f"损失，{meant} 步均值"), _figure(loss, ".4f"), False),
        (say("tokens", "token 数"), _figure(tokens, ",.0f"), False),
        (say("tokens/s", "tokens/s"), _figure(rate, ",.0f"), False),
        ("MFU", _figure(mfu, ".1%"), False),
        (say("peak memory, rank 0", "内存峰值，rank 0"), _gib(memory), False),
        (say("time left", "剩余时间"), _time_left(run, rate, say), False),
        (say("last checkpoint", "最新检查点"), f"{run.checkpoints[-1]:,}" if run.checkpoints else "", False),
        (say("skipped steps", "跳过的步"), f"{len(metrics.skipped):,}", bool(metrics.skipped)),
        (say("incidents", "事件"), f"{happened:,}", bool(happened)),
        (say("last line written", "最后写入"), _clock(run.written), False),
    ]


def _recent(metrics: MetricsReader, key: str) -> float | None:
    """Mean of the last steps; None where none is finite."""
    _, values = metrics.values(key)
    values = values[-MEAN_STEPS:]
    values = values[np.isfinite(values)].astype(np.float64)
    return float(values.mean()) if len(values) else None


def _figure(value: Any, form: str) -> str:
    """A number for people; nothing for what is none."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return format(value, form) if is_number else ""


def _gib(value: Any) -> str:
    return "" if not (text := _figure(value, "g")) else f"{float(text) / 2**30:,.2f} GiB"


def _clock(time: datetime | None) -> str:
    return "" if time is None else time.strftime("%Y-%m-%d %H:%M:%S UTC")


def _time_left(run: RunFacts, rate: float | None, say: Say) -> str:
    """At the present speed; nothing for a run that is over, or whose length is not known."""
    if run.config is None or run.course is None or run.is_complete or not rate or not run.config.data.train_prefixes:
        return ""
    done = run.metrics.last.get("consumed_tokens")
    if not isinstance(done, int | float):
        return ""
    return span(max(0.0, (run.config.tokens_before(run.course.num_samples) - done) / rate), say)


# ---- curves ----


def _charts(charts: Sequence[Chart], say: Say) -> list[str]:
    controls = (
        '<div id="controls" hidden>'
        f'<label>{escape(say("smoothing", "平滑"))} <input id="smooth" type="range" value="0"></label>'
        f'<label><input id="log" type="checkbox"> {escape(say("logarithmic axis", "对数坐标"))}</label>'
        f'<label><input id="tokens" type="checkbox"> {escape(say("over tokens", "按 token 数"))}</label>'
        f'<button id="all" type="button">{escape(say("whole run", "显示全程"))}</button></div>'
    )
    figures = "".join(
        f"<figure><figcaption>{escape(chart.title)}</figcaption>"
        f'<div class="chart" id="chart-{chart.id}"></div></figure>'
        for chart in charts
    )
    words = say(
        "Drag over a chart to zoom all of them, double-click for the whole run; a name hides its curve. Where a run "
        "is longer than a curve has points, each is the mean of a stretch of steps, and the pale band goes from the "
        "lowest to the highest value in it. Lines across: red an incident, dashed a phase, dotted a start.",
        "在图上拖动可放大所有图，双击显示全程；点击名称可隐藏曲线。训练步数多于曲线点数时，每个点是一段步数的均值，"
        "浅色带从其中最低值到最高值。竖线：红色为事件，虚线为阶段，点线为启动。",
    )
    hint = say("The charts need JavaScript.", "图表需要 JavaScript。")
    return [controls, f'<p class="muted">{escape(words)}</p>', f"<noscript><p>{escape(hint)}</p></noscript>",
            f'<div class="charts">{figures}</div>']  # fmt: skip


# ---- tables ----


def _titled(runs: Sequence[RunFacts], names: Sequence[str], of_run: Any, say: Say) -> list[str]:
    """What each run has for a section, under its name where there are two."""
    parts: list[str] = []
    for run, name in zip(runs, names, strict=True):
        found = of_run(run, say)
        if found:
            parts += [*([f"<h3>{escape(name)}</h3>"] if len(runs) > 1 else []), *found]
    return parts


def _plans(runs: Sequence[RunFacts], names: Sequence[str], say: Say) -> list[str]:
    return _titled(runs, names, _plan, say)


def _plan(run: RunFacts, say: Say) -> list[str]:
    if run.config is None or not run.mixes:
        return []
    data, rows = run.config.data, []
    header = [say("phase", "阶段"), say("from step", "起始步"), say("length", "长度"), say("source", "数据源"),
              say("weight", "权重"), say("share", "占比"), say("tokens read in all", "共读 token 数"),
              say("passes", "遍数")]  # fmt: skip
    for number, (mix, first) in enumerate(zip(run.mixes, run.phase_steps), start=1):
        total = sum(source.weight for source in mix.sources)
        unit = run.config.data.mixes[number - 1].weights or data.weights
        for i, source in enumerate(mix.sources):
            share = f"{source.weight / total:.2%}" if total > 0 and unit != "epochs" else ""
            rows.append([
                str(number) if i == 0 else "", f"{first:,}" if i == 0 else "",
                (mix.length or say("to the end", "到结束")) if i == 0 else "", source.name,
                f"{source.weight:,g} ({unit})", share, _figure(source.tokens_read, ",d"),
                _figure(source.passes, ".2f"),
            ])  # fmt: skip
    return [table_of(header, rows)]


def _evaluations(runs: Sequence[RunFacts], names: Sequence[str], say: Say) -> list[str]:
    return _titled(runs, names, _evaluation, say)


def _evaluation(run: RunFacts, say: Say) -> list[str]:
    """The last evaluations as a table: validation in the run, then those of checkpoints."""
    parts = []
    for reader, kind in ((run.metrics, "valid/"), (run.evaluations, "evaluation/")):
        keys = [key for key in reader.curves if key.startswith(kind)] if reader is not None else []
        if reader is None or not keys:
            continue
        found = {key: dict(zip(*(part.tolist() for part in reader.values(key)))) for key in keys}
        steps = sorted({step for values in found.values() for step in values})[-MOST_STEPS:]
        header = [say("figure", "指标"), *(f"{step:,}" for step in steps)]
        rows = [
            [key.removeprefix(kind), *(_figure(values.get(step), ".4f") for step in steps)]
            for key, values in found.items()
        ]
        parts.append(table_of(header, rows))
    return parts


def _incidents(runs: Sequence[RunFacts], names: Sequence[str], say: Say) -> list[str]:
    return _titled(runs, names, _incident_tables, say)


def _incident_tables(run: RunFacts, say: Say) -> list[str]:
    parts = []
    if run.incidents:
        header = [say("step", "步"), say("finding", "现象"), say("action", "处理"), say("loss", "损失"),
                  say("gradient norm", "梯度范数"), say("where", "位置"), say("data", "数据"),
                  say("file", "文件")]  # fmt: skip
        rows = [
            [f"{tree['step']:,}", str(tree.get("finding", ""))[:200], str(tree.get("action", ""))[:80],
             _figure(tree.get("loss"), ".6g"), _figure(tree.get("grad_norm"), ".6g"), _places(tree), _documents(tree),
             f"incidents/{tree['file']}"]
            for tree in reversed(run.incidents)
        ]  # fmt: skip
        parts.append(table_of(header, rows, "words"))
        if run.incidents_left_out:
            parts.append(f"<p>{escape(say('Earlier ones: ', '更早的：'))}{run.incidents_left_out:,}</p>")
    if run.ledger:
        header = [say("rewind", "回退"), say("from step", "起始步"), say("finding", "现象"),
                  say("back to step", "回退到步"), say("samples left out", "略去样本")]  # fmt: skip
        rows = [[str(r.number), f"{r.step:,}", r.finding, f"{r.back_to_step:,}", f"{r.samples:,}"] for r in run.ledger]
        parts += [f"<h3>{escape(say('Rewinds (ledger.jsonl)', '回退（ledger.jsonl）'))}</h3>", table_of(header, rows)]
    return parts


def _places(tree: Mapping[str, Any]) -> str:
    """Ranks, and the module or the weights that were first."""
    found = []
    for rank in _mappings(tree.get("ranks"))[:8]:
        names = rank.get("gradients") or rank.get("differs") or []
        what = rank.get("module") or ", ".join(map(str, names[:3] if isinstance(names, list) else []))
        found.append(f"rank {rank.get('rank')}: {what}"[:200])
    return "; ".join(found)


def _documents(tree: Mapping[str, Any]) -> str:
    """The text files, or else the datasets, of the step's samples."""
    found: dict[str, None] = {}
    for sample in _mappings(tree.get("samples")):
        for piece in _mappings(sample.get("pieces")):
            found[str(piece.get("file") or sample.get("prefix") or sample.get("dataset") or "")] = None
    return ", ".join([name for name in found if name][:5])


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _generations(runs: Sequence[RunFacts], names: Sequence[str], say: Say) -> list[str]:
    """Prompt by prompt, the newest checkpoint first; two runs beside each other."""
    prompts = list(dict.fromkeys(one.prompt for run in runs for one in run.generations))
    parts = []
    for number, prompt in enumerate(prompts[:MOST_PROMPTS]):
        columns = []
        for run, name in zip(runs, names, strict=True):
            texts = sorted((one for one in run.generations if one.prompt == prompt), key=lambda one: -one.step)
            shown = "".join(
                f'<p class="muted">{escape(say(f"step {one.step:,}", f"第 {one.step:,} 步"))}</p>'
                f'<pre dir="auto">{escape(one.text[:MOST_CHARACTERS])}</pre>'
                for one in texts[:MOST_TEXTS]
            )
            title = f"<h3>{escape(name)}</h3>" if len(runs) > 1 else ""
            columns.append(f"<div>{title}{shown}</div>")
        opening = "<details open>" if number == 0 else "<details>"
        parts.append(
            f'{opening}<summary dir="auto">{escape(prompt[:200])}</summary><div class="texts">{"".join(columns)}</div>'
            "</details>"
        )
    if len(prompts) > MOST_PROMPTS:
        parts.append(f"<p>{escape(say('Further prompts: ', '其余提示：'))}{len(prompts) - MOST_PROMPTS:,}</p>")
    return parts


def _environment(runs: Sequence[RunFacts], names: Sequence[str], say: Say) -> list[str]:
    values = [_facts_of_machine(run) for run in runs]
    keys = list(dict.fromkeys(key for found in values for key in found))
    if not keys:
        return []
    header = [say("environment", "环境"), *names]
    parts = [table_of(header, [[key, *(found.get(key, "") for found in values)] for key in keys], "settings")]
    return parts + _titled(runs, names, _starts, say)


def _facts_of_machine(run: RunFacts) -> dict[str, str]:
    """The machine of the last start, or what the newest checkpoint says."""
    found: dict[str, str] = {}
    environment = run.starts[-1]["environment"] if run.starts else {"versions": run.versions}
    for key, value in environment.items():
        if isinstance(value, Mapping):
            found |= {str(name): str(version) for name, version in value.items()}
        else:
            found[str(key)] = str(value)
    found |= {f"layout: {key}": str(value) for key, value in run.layout.items()}
    return {key[:100]: value[:500] for key, value in found.items()}


def _starts(run: RunFacts, say: Say) -> list[str]:
    if not run.starts:
        return []
    header = [
        say("started", "启动"),
        say("after step", "此前步数"),
        say("host", "主机"),
        say("device", "设备"),
        "ranks",
    ]
    rows = []
    for start in reversed(run.starts[-MOST_STARTS:]):
        environment = start["environment"]
        cells = [start.get("time"), start.get("step"), *(environment.get(key) for key in ("host", "device", "ranks"))]
        rows.append([str(cell)[:200] for cell in cells])
    return [table_of(header, rows)]


def _settings(runs: Sequence[RunFacts], names: Sequence[str], say: Say) -> list[str]:
    """All settings, those first in which the two runs differ."""
    flat = [dict(_flat(run.tree)) if run.tree else {} for run in runs]
    keys = list(dict.fromkeys(key for found in flat for key in found))
    if not keys:
        return []
    different = [key for key in keys if len({found.get(key) for found in flat}) > 1]
    header, parts = [say("setting", "设置"), *names], []
    if len(runs) > 1:
        title = say(f"{len(different)} settings differ", f"{len(different)} 项设置不同")
        parts.append(f"<h3>{escape(title)}</h3>")
        if different:
            parts.append(table_of(header, [[key, *(found.get(key, "") for found in flat)] for key in different],
                                  "settings"))  # fmt: skip
    rows = "".join(row_of([key, *(found.get(key, "") for found in flat)]) for key in keys)
    parts.append(
        f'<details><summary>{escape(say("All settings", "全部设置"))}</summary><div class="wide">'
        f'<table class="settings">{row_of(header, "th")}{rows}</table></div></details>'
    )
    return parts


def _flat(tree: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """``group.field`` -> the value; mappings of settings are opened, other values are JSON."""
    if isinstance(tree, Mapping) and tree and name.count(".") < 2:
        for key, value in tree.items():
            yield from _flat(value, f"{name}.{key}" if name else str(key))
    else:
        text = tree if isinstance(tree, str) else json.dumps(tree, ensure_ascii=False, default=str)
        yield name, text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + " ..."
