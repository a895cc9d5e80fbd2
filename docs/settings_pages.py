"""docs/configuration.md and its twin, from the code: ``python docs/settings_pages.py``.

::

    megatron_hammer/config/settings.py: types, defaults, docstrings ----> configuration.md
    the same types and defaults, docs/settings.zh-CN.yaml: texts -------> configuration.zh-CN.md

What a setting means stands under its field in the code, and is printed by ``--help`` too; nothing on these pages is
written by hand. ``tests/test_settings_pages.py`` holds them, and the Chinese texts, to the code.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from megatron_hammer.config import Effect, describe_fields, describe_parts
from megatron_hammer.config.help import FieldHelp

HERE = Path(__file__).parent

WORDS = {
    "en": {
        "title": "Settings",
        "twin": "[中文](configuration.zh-CN.md)",
        "intro": (
            "Every setting with its type, its default and its meaning, made from the code by `docs/settings_pages.py`; "
            "`--help` of the training program says the same. They stand in a YAML file, group by group, or on the "
            "command line as `group.field=value`; the last one wins. How to use them: "
            "[Configure, run, go on](running.md)."
        ),
        "effects": "What a change means for a run that goes on",
        "effects_intro": "Each setting says one of these. What must be accepted is named: `--accept optimizer.lr`.",
        "columns": "| mark | a change of it | on going on |",
        "required": "required",
        "absent": "absent",
        "default": "default",
        "part": "A value of",
        "colon": ": ",
        "comma": ", ",
    },
    "zh-CN": {
        "title": "设置",
        "twin": "[English](configuration.md)",
        "intro": (
            "每个设置的类型、默认值和含义，由 `docs/settings_pages.py` 从代码生成；"
            "训练程序的 `--help` 有同样的内容（英文）。设置按组写在 YAML 文件里，"
            "或写在命令行上：`group.field=value`，以最后一个为准。用法见[配置、运行、接着训练](running.zh-CN.md)。"
        ),
        "effects": "对接着训练意味着什么",
        "effects_intro": "每个设置都标有其中一种。标为需要接受的，要用 `--accept optimizer.lr`。",
        "columns": "| 标记 | 改变它会改变 | 接着训练时 |",
        "required": "必填",
        "absent": "不设",
        "default": "默认",
        "part": "用于",
        "colon": "：",
        "comma": "，",
    },
}
EFFECTS = {
    "en": {
        Effect.MODEL: ("model", "the weights would be those of another model", "refused"),
        Effect.MATHEMATICS: ("mathematics", "what a step computes", "must be accepted"),
        Effect.SAMPLES: ("samples", "which samples a step computes with", "must be accepted"),
        Effect.CONTENT: ("content", "judged by what lies there, not by its path",
                         "another path: free; content: `--accept data`, `tokenizer`"),
        Effect.LENGTH: ("length", "how long the run is", "free"),
        Effect.FREE: ("free", "nothing that is learnt", "free"),
        Effect.PLACE: ("place", "where files lie", "free, also from node to node"),
    },
    "zh-CN": {
        Effect.MODEL: ("模型", "权重就成了另一个模型的", "拒绝"),
        Effect.MATHEMATICS: ("数学", "一步计算什么", "需要接受"),
        Effect.SAMPLES: ("样本", "一步用哪些样本", "需要接受"),
        Effect.CONTENT: ("内容", "看放在那里的内容，不看路径", "换路径自由；换内容用 `--accept data`、`tokenizer`"),
        Effect.LENGTH: ("长度", "训练有多长", "自由"),
        Effect.FREE: ("自由", "不改变学到的任何东西", "自由"),
        Effect.PLACE: ("位置", "文件放在哪里", "自由，各节点可以不同"),
    },
}  # fmt: skip
GROUPS = {
    "model": ("The model", "模型"),
    "parallel": ("Ranks and what they share", "各 rank 与分担"),
    "tokenizer": ("Tokenizer", "分词器"),
    "data": ("Data", "数据"),
    "optimizer": ("Optimizer", "优化器"),
    "schedule": ("Learning rate", "学习率"),
    "kernels": ("Backends", "后端"),
    "train": ("The run", "训练"),
    "checkpoint": ("Checkpoints", "检查点"),
    "log": ("Logging", "日志"),
}


def chinese_texts() -> dict[str, str]:
    """``group.field``, or ``Class.field`` of a part, -> its meaning in Chinese."""
    texts: dict[str, str] = yaml.safe_load((HERE / "settings.zh-CN.yaml").read_text(encoding="utf-8"))
    return texts


def page(language: str) -> str:
    """The whole page."""
    words, chinese = WORDS[language], chinese_texts()
    lines = [f"# {words['title']}", "", words["twin"], "", words["intro"], ""]
    lines += [f"## {words['effects']}", "", words["effects_intro"], "", words["columns"], "|---|---|---|"]
    lines += [f"| {mark} | {change} | {then} |" for mark, change, then in EFFECTS[language].values()]
    parts = describe_parts()
    for group, fields in describe_fields().items():
        lines += ["", f"## {group}{words['colon']}{GROUPS[group][language != 'en']}"]
        for name, entry in fields.items():
            text = entry.text if language == "en" else chinese[f"{group}.{name}"]
            lines += ["", f"### {group}.{name}", "", _line(entry, language), "", _escaped(text)]
            for part in (part for part in parts if part in entry.type):
                lines += ["", f"| {part} | {words['default']} | |", "|---|---|---|"]
                for inner, told in parts[part].items():
                    text = told.text if language == "en" else chinese[f"{part}.{inner}"]
                    lines.append(f"| `{inner}` | {_default(told, language)} | {_escaped(text)} |")
    return "\n".join(lines) + "\n"


def _line(entry: FieldHelp, language: str) -> str:
    words = WORDS[language]
    kind = entry.type.replace(" | None", "")
    if choices := re.fullmatch(r"Literal\[(.*)\]", kind):
        kind = ", ".join(f"`{word}`" for word in re.findall(r"'([^']+)'", choices[1]))
    else:
        kind = f"`{kind}`"
    return f"{kind} · {words['default']} {_default(entry, language)} · {EFFECTS[language][entry.effect][0]}"


def _default(entry: FieldHelp, language: str) -> str:
    return WORDS[language].get(entry.default) or f"`{entry.default}`"


def _escaped(text: str) -> str:
    """As Markdown that shows it: no table cells, no tags, no formatting by chance."""
    return re.sub(r"([|*<>\[\]])", r"\\\1", text)


def files() -> dict[str, str]:
    """Name of each page -> its content."""
    return {"configuration.md": page("en"), "configuration.zh-CN.md": page("zh-CN")}


if __name__ == "__main__":
    for file, content in files().items():
        (HERE / file).write_text(content, encoding="utf-8")
