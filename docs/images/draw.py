"""The drawings of README.md and docs/concepts.md, in English and in Chinese: ``python docs/images/draw.py``.

::

    TEXTS of a drawing, two languages each ----> one function ----> NAME.svg, NAME.zh-CN.svg beside this file

A drawing is 640 wide, so that its text can be read in a column of a phone, has a light ground of its own, so that it
looks the same on a dark page, and tells ranks apart by digits as well as by colour (Okabe and Ito's palette).
``tests/test_site.py`` holds the files to what this program writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

INK, PALE, LINE = "#1b1f24", "#5a6570", "#8b96a2"
BLUE, ORANGE, GREEN, GREY = "#56b4e9", "#f0b429", "#4fc3a1", "#d7dce1"
RANK_COLOURS = (BLUE, ORANGE)
FONT = "-apple-system, 'Segoe UI', 'Noto Sans', 'PingFang SC', 'Microsoft YaHei', 'Noto Sans CJK SC', sans-serif"
WIDTH = 640


class Drawing:
    """An SVG that grows by shapes; coordinates are pixels from the top left."""

    def __init__(self, title: str, height: int) -> None:
        self.height = height
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
            f'role="img" font-family="{FONT}">',
            f"<title>{escape(title)}</title>",
            f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="10" fill="#fbfcfd" '
            'stroke="#d0d7de"/>',
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
            f'<path d="M0 0 L8 4 L0 8 z" fill="{PALE}"/></marker></defs>',
        ]
        self.text(24, 34, title, 18, weight=600)

    def text(
        self,
        x: float,
        y: float,
        words: str,
        size: int = 15,
        *,
        anchor: str = "start",
        fill: str = INK,
        weight: int = 400,
    ) -> None:
        """One line; ``y`` is its base line."""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{fill}" '
            f'font-weight="{weight}">{escape(words)}</text>'
        )

    def box(self, x: float, y: float, w: float, h: float, words: str = "", fill: str = GREY, size: int = 15) -> None:
        """A rectangle with a line of text in its middle."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="4" fill="{fill}" stroke="#ffffff"/>'
        )
        if words:
            self.text(x + w / 2, y + h / 2 + size * 0.36, words, size, anchor="middle")

    def line(self, x1: float, y1: float, x2: float, y2: float, *, tip: bool = True, colour: str = PALE) -> None:
        """A straight line, with an arrow's tip at its end."""
        marker = ' marker-end="url(#tip)"' if tip else ""
        self.parts.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{colour}" stroke-width="1.6"{marker}/>'
        )

    def path(self, points: Sequence[tuple[float, float]], colour: str) -> None:
        """A line through points."""
        through = " L".join(f"{x:g} {y:g}" for x, y in points)
        self.parts.append(f'<path d="M{through}" fill="none" stroke="{colour}" stroke-width="2.5"/>')

    def svg(self) -> str:
        """The whole file."""
        return "\n".join([*self.parts, "</svg>"]) + "\n"


# ---- the flow --------------------------------------------------------------------------------------------------------

FLOW: dict[str, tuple[str, list[tuple[str, str, str]]]] = {
    "en": (
        "From raw text to a Hugging Face model",
        [
            ("raw text", "reformat, split, shuffle", "held-out text never stays in the training text"),
            ("tokenizer", "train, merge, analyze", "or bring one: .model, tokenizer.json, .tiktoken"),
            ("datasets .bin/.idx", "preprocess", "Megatron-LM's format; any workers, the same bytes"),
            ("samples", "a pure function of seed and step", "a run that is extended or moved reads on"),
            ("model and optimizer", "launch", "every layout computes what one process computes"),
            ("checkpoint", "save, inspect, branch", "any layout goes on from it, with the same bits"),
            ("Hugging Face folder", "export, evaluate, publish", "compared with the trained model first"),
        ],
    ),
    "zh-CN": (
        "从原始文本到 Hugging Face 模型",
        [
            ("原始文本", "整理、留出、打乱", "留出的文本不会留在训练文本里"),
            ("分词器", "训练、合并、评估", "也可以自带：.model、tokenizer.json、.tiktoken"),
            ("数据集 .bin/.idx", "预处理", "Megatron-LM 的格式；多少个线程写出的字节都相同"),
            ("样本", "种子和步数的纯函数", "延长或迁移训练，已经读过的不变"),
            ("模型与优化器", "启动", "任何布局算出的都与单进程一致"),
            ("检查点", "保存、查看、分支", "完整的张量：任何布局都能接着做，逐比特相同"),
            ("Hugging Face 目录", "导出、评估、发布", "出现之前先与训练得到的模型比对"),
        ],
    ),
}


def flow(language: str) -> str:
    """What comes from what, by which program, and what each promises."""
    title, rows = FLOW[language]
    drawing = Drawing(title, 58 + 62 * len(rows))
    for i, (thing, program, promise) in enumerate(rows):
        y = 54 + 62 * i
        drawing.box(24, y, 190, 40, thing, (GREY, GREEN, GREEN, BLUE, BLUE, ORANGE, ORANGE)[i], 16)
        drawing.text(234, y + 16, program, 15, weight=600)
        drawing.text(234, y + 36, promise, 14, fill=PALE)
        if i + 1 < len(rows):
            drawing.line(119, y + 42, 119, y + 60)
    return drawing.svg()


# ---- what each parallel dimension divides ----------------------------------------------------------------------------

DIMENSIONS: dict[str, tuple[str, str, list[str], list[str]]] = {
    "en": (
        "What two ranks divide, dimension by dimension",
        "0, 1: the part of that rank. Grey: not divided. Two samples of eight tokens, two layers.",
        ["tokens", "activations", "matrices", "layers", "optimizer"],
        ["DP", "TP", "SP", "CP", "PP"],
    ),
    "zh-CN": (
        "两个 rank 各分到什么：逐个维度",
        "0、1：归这个 rank 的部分；灰色：不切分。图中是两个样本各 8 个 token，两层。",
        ["token", "激活", "矩阵", "层", "优化器"],
        ["DP", "TP", "SP", "CP", "PP"],
    ),
}
BOTH = None  # no single owner
_ROWS: dict[str, tuple[Callable[[int, int], int | None], ...]] = {
    # tokens (sample, position), activations (the same), matrices (row, column), layers (layer), optimizer (quarter)
    "DP": (lambda s, _: s, lambda s, _: s, lambda *_: BOTH, lambda *_: BOTH, lambda _, i: i // 2),
    "TP": (lambda *_: BOTH, lambda *_: BOTH, lambda _, c: c // 2, lambda *_: BOTH, lambda _, i: i // 2),
    "SP": (lambda *_: BOTH, lambda _, p: p // 4, lambda _, c: c // 2, lambda *_: BOTH, lambda _, i: i // 2),
    "CP": (lambda _, p: (0, 1, 1, 0)[p // 2], lambda _, p: (0, 1, 1, 0)[p // 2], lambda *_: BOTH, lambda *_: BOTH,
           lambda _, i: i // 2),
    "PP": (lambda *_: BOTH, lambda *_: BOTH, lambda *_: BOTH, lambda layer, _: layer, lambda _, i: i // 2),
}  # fmt: skip
_GRIDS = ((92, 2, 8, 14), (218, 2, 8, 14), (354, 2, 4, 22), (462, 2, 1, 70), (552, 1, 4, 18))
"""Of each column: its left edge, rows and columns of its grid, width of a cell."""


def dimensions(language: str) -> str:
    """Grids of what is divided, in the colours of two ranks."""
    title, legend, columns, names = DIMENSIONS[language]
    drawing = Drawing(title, 132 + 66 * len(names))
    drawing.text(24, 58, legend, 13, fill=PALE)
    for (x, _, across, width), column in zip(_GRIDS, columns):
        drawing.text(x + across * width / 2, 90, column, 13, anchor="middle", weight=600)
    for i, name in enumerate(names):
        y = 104 + 66 * i
        drawing.text(24, y + 32, name, 16, weight=600)
        for (x, down, across, width), owner_of in zip(_GRIDS, _ROWS[name]):
            height = 50 / down
            for row in range(down):
                for column in range(across):
                    owner = owner_of(row, column)
                    fill = GREY if owner is BOTH else RANK_COLOURS[owner]
                    words = "" if owner is BOTH else str(owner)
                    drawing.box(x + column * width, y + row * height, width, height, words, fill, 12)
    return drawing.svg()


# ---- a checkpoint ----------------------------------------------------------------------------------------------------

CHECKPOINT: dict[str, dict[str, str]] = {
    "en": {
        "title": "A checkpoint: whole tensors, whoever wrote them",
        "writers": "four ranks, TP 2 x DP 2",
        "readers": "two ranks, or eight, or one",
        "each": "each writes its slices",
        "any": "each reads its own slices",
        "manifest": "which tensor lies where, with hashes;",
        "last": "written last, then one rename",
        "slices": "slices of weights and both moments",
        "tokenizer": "what it was trained with",
        "note": "Half a checkpoint has another name (.tmp) and is never loaded.",
    },
    "zh-CN": {
        "title": "检查点：完整的张量，与谁写的无关",
        "writers": "四个 rank，TP 2 x DP 2",
        "readers": "两个 rank，或八个，或一个",
        "each": "各写自己的切片",
        "any": "各读自己的切片",
        "manifest": "每个张量在哪里，附哈希；",
        "last": "最后写入，然后一次重命名",
        "slices": "权重和两个动量的切片",
        "tokenizer": "训练所用的分词器",
        "note": "写了一半的检查点叫别的名字（.tmp），永远不会被加载。",
    },
}


def checkpoint(language: str) -> str:
    """Writers, the folder, readers."""
    t = CHECKPOINT[language]
    drawing = Drawing(t["title"], 440)
    drawing.text(24, 66, t["writers"], 15, weight=600)
    for i in range(4):
        drawing.box(24 + i * 74, 78, 68, 34, str(i), RANK_COLOURS[i % 2], 16)
        drawing.line(58 + i * 74, 116, 58 + i * 74, 146)
    drawing.text(336, 100, t["each"], 14, fill=PALE)
    drawing.parts.append(
        f'<rect x="24" y="150" width="592" height="160" rx="8" fill="none" stroke="{LINE}" stroke-dasharray="6 4"/>'
    )
    drawing.text(40, 176, "step-00000100/", 15, weight=600)
    for y, name, words in (
        (202, "rank-00000.safetensors ...", t["slices"]),
        (232, "tokenizer/", t["tokenizer"]),
        (262, "manifest.json", t["manifest"]),
        (286, "", t["last"]),
    ):
        drawing.text(56, y, name, 14)
        drawing.text(270, y, words, 14, fill=PALE)
    for i in range(2):
        drawing.line(58 + i * 74, 314, 58 + i * 74, 342)
        drawing.box(24 + i * 74, 346, 68, 34, str(i), RANK_COLOURS[i], 16)
    drawing.text(186, 358, t["readers"], 15, weight=600)
    drawing.text(186, 378, t["any"], 14, fill=PALE)
    drawing.text(24, 418, t["note"], 14, fill=PALE)
    return drawing.svg()


# ---- phases ----------------------------------------------------------------------------------------------------------

PHASES: dict[str, dict[str, str]] = {
    "en": {
        "title": "Phases: mixes one after the other, one run",
        "one": "base: 100e9 tokens",
        "two": "anneal: 20e9",
        "three": "long context",
        "zh": "zh",
        "en": "en",
        "books": "books",
        "lr": "learning rate",
        "axis": "tokens read",
        "note": "Each source goes on where the phase before left it:",
        "note2": "nothing of a pass is read twice or left out.",
    },
    "zh-CN": {
        "title": "阶段：一次训练里依次使用的配比",
        "one": "基础：100e9 token",
        "two": "退火：20e9",
        "three": "长上下文",
        "zh": "中文",
        "en": "英文",
        "books": "书籍",
        "lr": "学习率",
        "axis": "已读 token",
        "note": "每个来源都从前一阶段停下的地方继续：",
        "note2": "一遍之内不会重复读，也不会漏读。",
    },
}


def phases(language: str) -> str:
    """Bars of shares over the tokens read, and the learning rate."""
    t = PHASES[language]
    drawing = Drawing(t["title"], 356)
    left, top, high = 24, 160, 110
    shares = (
        (300, t["one"], ((t["zh"], 1, BLUE), (t["en"], 1, ORANGE))),
        (140, t["two"], ((t["zh"], 1, BLUE), (t["en"], 3, ORANGE))),
        (148, t["three"], ((t["zh"], 1, BLUE), (t["en"], 1, ORANGE), (t["books"], 2, GREEN))),
    )
    x = float(left)
    for width, name, sources in shares:
        drawing.text(x + 2, top - 10, name, 14, weight=600)
        y, whole = float(top), sum(share for _, share, _ in sources)
        for source, share, colour in sources:
            drawing.box(x, y, width, high * share / whole, source, colour, 14)
            y += high * share / whole
        x += width
    drawing.path([(24, 126), (44, 66), (324, 66), (464, 108), (612, 122)], "#0b5c8a")
    drawing.text(56, 58, t["lr"], 13, fill="#0b5c8a")
    drawing.line(left, top + high + 14, 612, top + high + 14)
    drawing.text(612, top + high + 34, t["axis"], 13, anchor="end", fill=PALE)
    drawing.text(24, 318, t["note"], 14, fill=PALE)
    drawing.text(24, 338, t["note2"], 14, fill=PALE)
    return drawing.svg()


DRAWINGS = {"flow": flow, "dimensions": dimensions, "checkpoint": checkpoint, "phases": phases}


def files() -> dict[str, str]:
    """Name of each file -> its content."""
    return {
        f"{name}{'' if language == 'en' else '.' + language}.svg": draw(language)
        for name, draw in DRAWINGS.items()
        for language in ("en", "zh-CN")
    }


if __name__ == "__main__":
    for file, content in files().items():
        Path(__file__).with_name(file).write_text(content, encoding="utf-8")
