"""Every setting that two presets have otherwise, as a Markdown table; what neither file names has the default of both.

    python examples/compare_presets.py [--chinese] \
        examples/configs/hammerllm_1b4_faithful.yaml examples/configs/hammerllm_1b4_modern.yaml

The tables of examples/README.md and README.zh-CN.md are its output, which a test compares.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_hammer.config import config_to_tree, load_config


def leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """group.field and value of every setting."""
    for key, value in tree.items():
        if name:
            yield f"{name}.{key}", value
        else:
            yield from leaves(value, key)


def table(first: Path, second: Path, chinese: bool = False) -> list[str]:
    """A row for each setting that differs."""
    ours, theirs = (dict(leaves(config_to_tree(load_config(path)))) for path in (first, second))
    rows = ["| setting | {} | {} |", "| 设置 | {} | {} |"]
    lines = [rows[chinese].format(f"`{first.stem}`", f"`{second.stem}`"), "|---|---|---|"]
    for name in ours | theirs:
        a, b = (json.dumps(each.get(name)).strip('"') for each in (ours, theirs))
        if a != b:
            lines.append(f"| `{name}` | {a} | {b} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", type=Path, nargs=2, metavar="CONFIG.yaml")
    parser.add_argument("--chinese", action="store_true", help="headings in Chinese")
    arguments = parser.parse_args()
    print(*table(*arguments.presets, arguments.chinese), sep="\n")


if __name__ == "__main__":
    main()
