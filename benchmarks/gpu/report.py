"""All results of one device and day as Markdown: goals first, then a section a part with the prediction beside.

Needs neither a GPU nor torch, so that a report can be written again wherever the results are.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from roofline import (
    SCENARIOS,
    Ceilings,
    Prediction,
    flops_per_token,
    memory_gib,
    predict,
    product_seconds,
    products,
)
from shapes import HAMMERLLM, TOY, Shape
from sides import p99

Entries = Mapping[str, Mapping[str, Any]]
PEAK = 989.0  # TFLOP/s, the datasheet's dense bf16 of H100 SXM and H200
OURS, OURS_SMALL, RECIPE = "ours bf16", "ours bf16, 32,000 pieces", "HammerLLM's recipe"
TITAN = ("torchtitan 0.2.2", "torchtitan 0.2.2 tuned (chunked loss written here)")
MEGATRON = ("Megatron core, local", "Megatron core, local + SDPA")
FSDP2 = "FSDP2"
PREDICTED = {  # contestant -> scenario of roofline.py
    OURS: "ours",
    "ours fp8": "ours fp8",
    OURS_SMALL: "ours",
    RECIPE: "HammerLLM",
    f"{RECIPE} tuned": "HF tuned",
    **dict.fromkeys((*TITAN, FSDP2), "torchtitan"),
    **dict.fromkeys(MEGATRON, "Megatron core"),
}
OURS_SCENARIO = "ours"
# Keys of an entry that add up to its time, where it has no whole
TIMES = {f"{way}ms" for way in ("forward_", "backward_", "both_", "update_", "norm_")}
# How keys of rates end, and the ceiling of the same session that they are a share of
UNITS = {"tflops": "bf16", "gb_per_second": "copy"}


Section = Callable[["Session"], list[str]]


class Session:
    """The results of all parts, and the figures that several sections need."""

    def __init__(self, parts: Mapping[str, Entries], shape: Shape) -> None:
        self.parts, self.shape = parts, shape

    def entries(self, part: str) -> Entries:
        return self.parts.get(part, {})

    def value(self, part: str, entry: str, key: str) -> float | None:
        found = self.entries(part).get(entry, {}).get(key)
        return float(found) if isinstance(found, int | float) else None

    @property
    def ceilings(self) -> Ceilings:
        """As measured; an H200's where a part has not run."""
        assumed = Ceilings()
        return Ceilings(
            self.value("ceilings", "bf16 burst", "tflops") or assumed.gemm,
            self.value("ceilings", "bf16 sustained", "tflops"),
            self.value("ceilings", "fp8 burst", "tflops") or assumed.fp8,
            self.value("ceilings", "copy", "tb_per_second") or assumed.copy,
        )

    def prediction(self, scenario: str, shape: Shape) -> Prediction:
        return predict(shape, self.ceilings, SCENARIOS[scenario])

    def contestant(self, name: str) -> dict[str, Any] | None:
        """All rounds of a contestant as one; None where it did not run."""
        rounds = [e for key, e in self.entries("step").items() if key.startswith(f"{name} (round") and "step_s" in e]
        if not rounds:
            return None
        rounds = [r for r in rounds if r["micro_batch"] == rounds[0]["micro_batch"]]
        each = [t for r in rounds for t in r["step_s_each"]]
        tokens = rounds[0]["tokens_per_second"] * rounds[0]["step_s"]
        return {**rounds[0], "step_s_each": each, "step_s": statistics.median(each), "step_s_p99": p99(each),
                "tokens_per_second": tokens / statistics.median(each), "rounds": len(rounds)}  # fmt: skip

    def shape_of(self, entry: Mapping[str, Any]) -> Shape:
        """What it trained."""
        fields = {field: entry[field] for field in ("micro_batch", "accumulation", "vocabulary")}
        return replace(self.shape, **fields)

    def loop(self, key: str) -> float | None:
        return self.value("loop", "ours", key)

    def rate(self, names: str | Iterable[str]) -> float | None:
        """Tokens/s of the best of these contestants."""
        found = [self.contestant(name) for name in ([names] if isinstance(names, str) else names)]
        return max((f["tokens_per_second"] for f in found if f), default=None)


def write_reports(folder: Path) -> list[Path]:
    """One for each device and day that the folder has results of; their paths.

    Raises:
        SystemExit: it has none.
    """
    named = (re.fullmatch(r"gpu_suite-[a-z]+-(.+)-(\d{4}-\d\d-\d\d)\.json", path.name) for path in folder.iterdir())
    found = sorted({match.groups() for match in named if match})
    if not found:
        raise SystemExit(f"{folder} has no results")
    return [_write_report(folder, *device_and_day) for device_and_day in found]


def _write_report(folder: Path, name: str, date: str) -> Path:
    parts: dict[str, Entries] = {}
    versions: dict[str, str] = {}
    device, small = name, False
    for path in sorted(folder.glob(f"gpu_suite-*-{name}-{date}.json")):
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree["device"].replace(" ", "_") == name:  # the glob finds the toy results of a device, too
            parts[tree["part"]] = tree["items"]
            versions |= tree["versions"]
            device, small = tree["device"], small or tree["small"]
    session = Session(parts, TOY if small else HAMMERLLM)
    lines = [f"# GPU suite: {device}, {date}", ""]
    if small:
        lines += ["**Toy shapes: this shows that the suite works, and measures nothing.**", ""]
    lines += [", ".join(f"{k} {v}" for k, v in versions.items()) + ".", ""]
    full, causal = flops_per_token(session.shape)
    lines += [
        f"Shape: h {session.shape.hidden}, f {session.shape.ffn}, {session.shape.layers} layers, v "
        f"{session.shape.vocabulary:,}, s {session.shape.sequence}, micro-batch {session.shape.micro_batch}, "
        f"accumulation {session.shape.accumulation}; {full / 1e9:.4f} GFLOP/token full, {causal / 1e9:.4f} causal. "
        "Predictions are `benchmarks/roofline.py`'s with the ceilings below.",
        "",
        *goals(session),
        *predictions(session),
    ]
    for part in [*(p for p in SECTIONS if p in parts), *(p for p in parts if p not in SECTIONS)]:
        note = NOTES[part](session) if part in NOTES else ""
        lines += [f"## {part}", "", *([note, ""] if note else []), *SECTIONS.get(part, plain(part))(session), ""]
    lines += _two_processes(folder / f"gpu_parallel-{name}-{date}.json")
    target = folder / f"{name}-{date}.md"
    target.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return target


def _two_processes(path: Path) -> list[str]:
    """What ``gpu_parallel.py`` found, where it ran."""
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))["comparisons"]
    lines = ["## TP 2 and DP 2 as two processes on one GPU, over gloo", ""]
    lines += ["| layout | precision | largest relative difference | tolerance | right |", "|---|---|---|---|---|"]
    names = ("layout", "precision", "largest_relative_difference", "tolerance", "right")
    cells = ([str(line.get(name, line.get("error"))).replace("|", "/") for name in names] for line in found)
    return [*lines, *("| " + " | ".join(row) + " |" for row in cells), ""]


# ---- the goals of performance.md -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """A row of the table: at least ``must`` and better ``goal``; at most where the second is the smaller one."""

    number: str
    what: str
    must: float
    goal: float
    value: float | None
    unit: str = ""

    def line(self) -> str:
        if self.value is None:
            shown, reached = "not measured", ""
        else:
            sign = 1 if self.goal > self.must else -1
            must, goal = (sign * self.value >= sign * x for x in (self.must, self.goal))
            shown, reached = (
                f"{_number(self.value)} {self.unit}".strip(),
                "goal" if goal else "must" if must else "**no**",
            )
        return f"| {self.number} | {self.what} | {shown} | {self.must:g} | {self.goal:g} | {reached} |"


def _ratio(a: float | None, b: float | None, scale: float = 1.0) -> float | None:
    return a * scale / b if a and b else None


def goals(session: Session) -> list[str]:
    """G1 to G13: goal, measured, reached or not."""
    found = [*_speed_goals(session), *_head_goals(session), *_other_goals(session)]
    found.sort(key=lambda g: int(g.number[1:]))
    head = ["## Goals", "", "| # | what | measured | must | goal | reached |", "|---|---|---|---|---|---|"]
    return [*head, *(g.line() for g in found), ""]


def _speed_goals(session: Session) -> Iterable[Goal]:
    """Against the ceilings, the peers and a smaller vocabulary."""
    ours, value = session.rate(OURS), session.value
    full, causal = (f / 1e12 for f in flops_per_token(session.shape))  # TFLOP a token
    yield Goal(
        "G1",
        "% of burst ceiling, causal",
        62,
        67,
        _ratio(ours, value("ceilings", "bf16 burst", "tflops"), 100 * causal),
    )
    yield Goal(
        "G1",
        "% of 5 s ceiling, causal",
        66,
        71,
        _ratio(ours, value("ceilings", "bf16 sustained", "tflops"), 100 * causal),
    )
    yield Goal("G1", "MFU full, % of 989", 53, 57.4, _ratio(ours, PEAK, 100 * full))
    yield Goal("G1", "MFU causal, % of 989", 49.5, 53.5, _ratio(ours, PEAK, 100 * causal))
    yield Goal("G2", "against HammerLLM's recipe", 1.18, 1.3, _ratio(ours, session.rate(RECIPE)), "x")
    yield Goal("G3", "against it tuned", 1.06, 1.13, _ratio(ours, session.rate(f"{RECIPE} tuned")), "x")
    yield Goal("G4", "against torchtitan, its better loss", 1.02, 1.06, _ratio(ours, session.rate(TITAN)), "x")
    yield Goal("G5", "against Megatron core, the better of two", 1.06, 1.13, _ratio(ours, session.rate(MEGATRON)), "x")
    yield Goal("G6", "105,789 against 32,000 pieces", 0.84, 0.87, _ratio(ours, session.rate(OURS_SMALL)), "x")
    # nanochat's fp8 reaches 60.2 to 60.4 % of the bf16 peak: 72.6k tokens/s of this model.
    yield Goal("G11", "fp8, thousand tokens/s, for an H200", 73, 78.7, _ratio(session.rate("ours fp8"), 1e3), "k")
    yield Goal(
        "G11", "fp8 against bf16 (loss parity: the tests)", 1.08, 1.14, _ratio(session.rate("ours fp8"), ours), "x"
    )


def _head_goals(session: Session) -> Iterable[Goal]:
    """Our faster head and loss."""
    ours = [e for name, e in session.entries("head").items() if name.startswith("ours") and "tflops" in e]
    best: Mapping[str, Any] = max(ours, key=lambda e: e["tflops"], default={})
    rate = best.get("tflops")
    yield Goal("G7", "head + loss, effective TFLOP/s", 560, 620, rate)
    yield Goal("G7", "its extra memory, GiB", 1, 0.5, best.get("peak_extra_gib"))
    yield Goal("G7", "against Liger's", 1.2, 1.4, _ratio(rate, session.value("head", "Liger", "tflops")), "x")
    cce = session.value("head", "CCE, all gradients", "tflops")
    yield Goal("G7", "against CCE, all gradients computed", 1.3, 1.5, _ratio(rate, cce), "x")
    yield Goal(
        "G7", "against HF's compiled loss", 1.1, 1.2, _ratio(rate, session.value("head", "HF compiled", "tflops")), "x"
    )


def _other_goals(session: Session) -> Iterable[Goal]:
    """Kernels, optimizer, memory, steadiness, prediction."""
    kernels, copy = our_bandwidths(session), session.ceilings.copy
    slowest = min(kernels, key=lambda k: kernels[k], default="")
    what = f"slowest memory-bound kernel{f' ({slowest})' if slowest else ''}, % of copy"
    yield Goal("G8", what, 75, 85, _ratio(kernels.get(slowest), copy, 0.1))
    adam, peer = (session.value("optimizer", who, "ms") for who in ("ours", "torch"))
    beside = f"; here {adam:.1f} ms, torch's fused AdamW, clipping and copy {peer:.1f} ms" if adam and peer else ""
    # the goal is an H200's: as if copies ran at its 4.3 TB/s
    yield Goal("G9", f"clip + AdamW + bf16 copy, ms at 4.3 TB/s{beside}", 16, 13, adam and adam * copy / 4.3)
    step, peak, off, beyond = session.contestant(OURS), None, None, None
    if step is not None:
        peak = step["peak_gib"]
        off = _ratio(step["step_s"], session.prediction("ours", session.shape_of(step)).step)
        beyond = _ratio(peak, sum(memory_gib(session.shape_of(step)).values()))
    yield Goal("G10", "peak memory, GiB", 50, 45, peak)
    steady = _ratio(session.loop("step_s_p99"), session.loop("step_s"))
    yield Goal("G12", "step time p99 / median of the real loop", 1.05, 1.02, steady)
    waits = session.loop("wait_percent")
    yield Goal("G12", "GPU waits for data, % of the real loop's time", 1, 0, None if waits is None else round(waits, 1))
    yield Goal("G13", "step time against the prediction, % off", 15, 10, off and 100 * abs(off - 1))
    yield Goal("G13", "peak memory against the prediction, % off", 15, 10, beyond and 100 * abs(beyond - 1))


def our_bandwidths(session: Session) -> dict[str, float]:
    """GB/s of our own fastest row of each operation and direction."""
    best: dict[str, float] = {}
    for name, entry in session.entries("kernels").items():
        operation, who = name.split(": ")
        for key, value in entry.items():
            if key.endswith("gb_per_second") and who in ("fused", "triton"):
                way = f"{operation} {key.removesuffix('_gb_per_second')}"
                best[way] = max(best.get(way, 0.0), value)
    return best


def predictions(session: Session) -> list[str]:
    """G13: a step as measured and as ``roofline.py`` has it; memory of ours alone, as it counts no other."""
    lines = [
        "## Predictions",
        "",
        "| who | step s | predicted | off | peak GiB | predicted | off |",
        "|---|---|---|---|---|---|---|",
    ]

    def cells(measured: float | None, predicted: float) -> list[str]:
        if measured is None:
            return ["", "", ""]
        return [_number(measured), _number(predicted), f"{measured / predicted - 1:+.1%}"]

    for name, scenario in PREDICTED.items():
        if found := session.contestant(name):
            shape = session.shape_of(found)
            counted = name in (OURS, OURS_SMALL)
            row = cells(found["step_s"], session.prediction(scenario, shape).step)
            row += cells(found["peak_gib"] if counted else None, sum(memory_gib(shape).values()))
            lines.append(f"| {name} | " + " | ".join(row) + " |")
    for recompute, entry in session.entries("memory").items():
        if "step_s" in entry and recompute != "none":
            row = cells(entry["peak_gib"], sum(memory_gib(session.shape_of(entry), recompute).values()))
            lines.append(f"| ours, recompute {recompute} | | | | " + " | ".join(row) + " |")
    return [*lines, ""]


# ---- sections --------------------------------------------------------------------------------------------------------


STEP_COLUMNS = (
    "tokens/s", "predicted", "ours is", "step s, median / p99", "% of burst / 5 s ceiling, causal", "MFU full / causal",
    "micro-batch x accumulation", "peak GiB", "first step s", "clock, power",
)  # fmt: skip


def step(session: Session) -> list[str]:
    """The contestants, each beside its prediction."""
    lines = ["| who | " + " | ".join(STEP_COLUMNS) + " |", "|---" * (len(STEP_COLUMNS) + 1) + "|"]
    for name, scenario in PREDICTED.items():
        found = session.contestant(name)
        if found is None:
            lines.append(f"| {name} | {_reason(session, name)} |" + " |" * (len(STEP_COLUMNS) - 1))
            continue
        rate, ours, shape = found["tokens_per_second"], session.rate(OURS), session.shape_of(found)
        full, causal = (rate * f / 1e12 for f in flops_per_token(shape))
        ceilings = session.ceilings
        sustained = f"{100 * causal / ceilings.sustained:.1f}" if ceilings.sustained else "not measured"
        cells = [
            f"{rate:,.0f}",
            f"{session.prediction(scenario, shape).tokens_per_second:,.0f}",
            f"{ours / rate:.2f} x" if ours else "",
            f"{found['step_s']:.4f} / {found['step_s_p99']:.4f} ({found['rounds']} rounds)",
            f"{100 * causal / ceilings.gemm:.1f} / {sustained}",
            f"{100 * full / PEAK:.1f} / {100 * causal / PEAK:.1f}",
            f"{found['micro_batch']} x {found['accumulation']}" + _not_fitting(found),
            "" if found["peak_gib"] is None else f"{found['peak_gib']:.1f}",
            f"{found['first_step_s']:.1f}",
            f"{found['sm_mhz']:.0f} MHz, {found['watts']:.0f} W" if "watts" in found else "",
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _not_fitting(found: Mapping[str, Any]) -> str:
    """More did not fit, or was counted not to."""
    return f" ({found['wanted']} did not fit)" if found.get("wanted", 0) > found["micro_batch"] else ""


def tests(session: Session) -> list[str]:
    """What was not done, and the end of pytest's own words."""
    entries = session.entries("tests").values()
    reasons = [reason for e in entries if (reason := _reason_of(e))]
    return ["```", *reasons, *(line for e in entries for line in e.get("summary", [])), "```"]


def _reason(session: Session, name: str) -> str:
    for key, entry in session.entries("step").items():
        if key.startswith(f"{name} (round"):
            return _reason_of(entry) or "not run"
    return "not run"


def _rate_note(session: Session, scenario: str, name: str, vocabulary: int | None = None) -> str:
    shape = replace(session.shape, vocabulary=vocabulary or session.shape.vocabulary)
    return f"{name} {session.prediction(scenario, shape).tokens_per_second:,.0f}"


def _head_note(session: Session) -> str:
    parts = session.prediction("ours", session.shape).parts
    predicted = 1e3 * (parts["head products"] + parts["cross-entropy"])
    return (
        f"Predicted for ours: {predicted:.1f} ms. CCE leaves out gradients below 2^-12 unless told otherwise: on "
        "random inputs nearly all of them, so the line with all gradients is the one that computes what others do."
    )


def _optimizer_note(session: Session) -> str:
    """Prediction; and accumulation 16 as computed from accumulation 4 and as measured."""
    note = (
        "ours, torch, apex: clipping, AdamW and the copy to bf16 of all parameters. "
        f"Predicted for ours: {1e3 * session.prediction('ours', session.shape).optimizer:.1f} ms."
    )
    step, alone = session.contestant(OURS), session.value("optimizer", "ours", "ms")
    sixteen = session.value("optimizer", "step at accumulation 16", "step_s")
    if step and alone and sixteen and step["micro_batch"] == session.shape.micro_batch and session.shape is HAMMERLLM:
        computed = 16 / step["accumulation"] * (step["step_s"] - alone / 1e3) + alone / 1e3
        note += (
            f" Accumulation 16: computed {computed:.3f} s, measured {sixteen:.3f} s ({computed / sixteen - 1:+.1%})."
        )
    return note


def _tables_note(session: Session) -> str:
    cases = [(s, n, v) for v in (None, 32_000) for s, n in (("HammerLLM", "both"), ("ours", "ours"))]
    told = ", ".join(_rate_note(session, s, n + (f" at {v:,}" if v else ""), v) for s, n, v in cases)
    measured = [f"{name} {rate:,.0f}" for name in (OURS, OURS_SMALL) if (rate := session.rate(name))]
    return (
        f"HammerLLM's README, 8 A100: flash 13k, both 16k, 32,000 pieces 24k a GPU. Predicted here, tokens/s: {told}. "
        f"Measured in `step`, tokens/s: {', '.join(measured) or 'nothing'}."
    )


def _loop_note(session: Session) -> str:
    """Beside the same step without the loop."""
    loop, alone = session.loop("tokens_per_second"), session.rate(OURS)
    return f"{loop / alone:.1%} of the rate of the step alone." if loop and alone else ""


def _matmul_note(session: Session) -> str:
    """The prediction of the whole step with the measured times of its products in it."""
    measured = {name: e["ms"] / 1e3 for name, e in session.entries("matmul").items() if "ms" in e}
    if not {p.name for p in products(session.shape)} <= set(measured):
        return ""
    p = predict(session.shape, session.ceilings, SCENARIOS[OURS_SCENARIO], measured)
    return f"With these times in place of estimates, ours is predicted at {p.tokens_per_second:,.0f} tokens/s."


def _predicted_product(session: Session, name: str) -> Mapping[str, Any]:
    """The tile estimate at the sustained rate."""
    found = {p.name: p for p in products(session.shape)}.get(name.split(",")[0])
    if found is None or "odd" in name:
        return {}
    seconds = product_seconds(found, session.shape, SCENARIOS[OURS_SCENARIO], session.ceilings)
    return {"predicted_ms": 1e3 * seconds}


def memory(session: Session) -> list[str]:
    """Peak beside the prediction."""
    lines = ["| recompute | peak GiB | predicted | step s |", "|---|---|---|---|"]
    for recompute, entry in session.entries("memory").items():
        if "step_s" not in entry:
            lines.append(f"| {recompute} | {_reason_of(entry)} | | |")
            continue
        parts = memory_gib(session.shape_of(entry), recompute)
        peak = "" if entry["peak_gib"] is None else f"{entry['peak_gib']:.2f}"
        lines.append(f"| {recompute} | {peak} | {sum(parts.values()):.2f} | {entry['step_s']:.4f} |")
    return lines


def plain(part: str, more: Callable[[Session, str], Mapping[str, Any]] = lambda session, name: {}) -> Section:
    """A table of whatever numbers the entries have; rates also as a share of this session's ceiling.

    more: further columns of an entry, predictions for example.
    """

    def section(session: Session) -> list[str]:
        entries = session.entries(part)
        measured = {name: {**e, **more(session, name)} for name, e in entries.items() if _reason_of(e) is None}
        columns = list(dict.fromkeys(k for e in measured.values() for k, v in e.items() if _is_column(k, v)))
        headings = [*map(_heading, columns), "times the first's rate"]
        lines = ["| entry | " + " | ".join(headings) + " |", "|---" * (len(headings) + 1) + "|"]
        for name, entry in entries.items():
            if name not in measured:
                lines.append(f"| {name} | {_reason_of(entry)} |" + " |" * len(columns))
                continue
            cells = [_cell(session, part, name, c, measured[name].get(c)) for c in columns]
            lines.append(f"| {name} | " + " | ".join([*cells, _relative(measured, name)]) + " |")
        return lines

    return section


def _reason_of(entry: Mapping[str, Any]) -> str | None:
    """Why an entry has no figures, fit for a cell of a table."""
    reason = entry.get("missing") or entry.get("error")
    told = [reason, entry.get("said"), *entry.get("warnings", [])]
    return None if reason is None else " / ".join(str(x) for x in told if x).replace("|", "/")


def _relative(entries: Entries, name: str) -> str:
    """Rate of an entry as a multiple of the first's of its group: what "auto" takes, or the table's starting point."""
    group = name.split(": ")[0] if ": " in name and not name.startswith("ours") else ""
    first = next(e for n, e in entries.items() if n.startswith(group))

    def seconds(entry: Mapping[str, Any]) -> float:
        if ("tokens_per_second" in entry) != ("tokens_per_second" in first):  # another quantity
            return 0.0
        if "tokens_per_second" in entry:
            return 1 / float(entry["tokens_per_second"])
        return float(entry.get("ms") or sum(v for k, v in entry.items() if k in TIMES))

    return f"{seconds(first) / seconds(entries[name]):.2f}" if seconds(first) and seconds(entries[name]) else ""


def _is_column(key: str, value: Any) -> bool:
    return key not in ("seconds", "bytes") and (
        isinstance(value, str) or (isinstance(value, int | float) and value is not True)
    )


def _heading(key: str) -> str:
    return key.replace("_per_second", "/s").replace("_", " ")


def _cell(session: Session, part: str, entry: str, key: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    shown = _number(value)
    unit = next((of for unit, of in UNITS.items() if key.endswith(unit)), None)
    if part == "ceilings" or unit is None:
        return shown
    ceiling = session.ceilings.copy * 1e3 if unit == "copy" else session.ceilings.gemm
    return f"{shown} ({value / ceiling:.0%})"


def _number(value: float) -> str:
    if isinstance(value, int) or value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


SECTIONS: dict[str, Section] = {  # in the order of the report
    "tests": tests,
    "step": step,
    "loop": plain("loop"),
    "choices": plain("choices"),
    "tables": plain("tables"),
    "memory": memory,
    "optimizer": plain("optimizer"),
    "ceilings": plain("ceilings"),
    "kernels": plain("kernels"),
    "head": plain("head"),
    "attention": plain("attention"),
    "matmul": plain("matmul", _predicted_product),
}
NOTES: dict[str, Callable[[Session], str]] = {
    "choices": lambda session: f"Predicted, tokens/s: {_rate_note(session, OURS_SCENARIO, 'default')}.",
    "tables": _tables_note,
    "loop": _loop_note,
    "optimizer": _optimizer_note,
    "kernels": lambda session: "Share of the measured copy bandwidth by ideal bytes; predicted for ours: 85 %.",
    "head": _head_note,
    "attention": lambda session: "Predicted, TFLOP/s forward and backward: cuDNN 334 and 334, flash 262 and 225.",
    "matmul": _matmul_note,
}
