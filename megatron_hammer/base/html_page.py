"""Self-contained pages of HTML: the frame, the look and the tables of every report that the project writes.

A page fetches nothing: style, script, data and pictures are in the file. Its security policy says so to the browser,
and admits the page's own script by its hash alone, so that a text of a run (a generated one, a setting, a name) could
not run as a script even where it got into the page unescaped. Colours follow the reader's light or dark mode, tables
scroll sideways on a phone, with a shadow where there is more of them. Needs no torch.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from typing import Any

STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --muted: #59636e; --back: #ffffff; --panel: #f6f8fa;
        --line: #d1d9e0; --accent: #0072B2; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e8eb; --muted: #9aa4ae; --back: #14171b; --panel: #1e2329; --line: #3a424b; --accent: #56B4E9;
          --bad: #ff8a80; }
}
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif; color: var(--text);
       background: var(--back); max-width: 1500px; margin: 1.5rem auto; padding: 0 1.5rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
a { color: var(--accent); }
.wide { overflow-x: auto; background:
          linear-gradient(to left, var(--back) 40%, transparent) right / 2.5rem 100% no-repeat local,
          linear-gradient(to left, var(--line), transparent) right / .8rem 100% no-repeat scroll; }
.wide + .wide { margin-top: .8rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; overflow-wrap: normal; word-break: keep-all; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
img { display: block; max-width: 100%; background: #fff; }
.wide:has(> img) { margin-top: 2rem; background: none; }
@media (max-width: 600px) {
  body { padding: 0 .8rem; margin: .8rem auto; font-size: 14px; }
  .wide img { max-width: none; width: 800px; }
}
"""
_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """What cannot be seen, or turns lines around, shown as its code."""
    return _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def escape(text: object) -> str:
    """Text for a page, visible, and nothing in it is markup."""
    return html.escape(visible(str(text)))


def row_of(cells: Sequence[str], tag: str = "td") -> str:
    """One row of a table, of plain texts."""
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def table_of(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table of plain texts.

    Args:
        kind: its class, by which a page's own style knows it.
    """
    opening = f'<div class="wide"><table class="{kind}">' if kind else '<div class="wide"><table>'
    body = "\n".join(row_of(row) for row in rows)
    return f"{opening}<thead>{row_of(header, 'th')}</thead>\n<tbody>{body}</tbody></table></div>"


def picture_of(content: bytes, words: str) -> str:
    """A PNG file within the page; ``words`` say what it shows."""
    image = f'<img alt="{escape(words)}" src="data:image/png;base64,{base64.b64encode(content).decode("ascii")}">'
    return f'<div class="wide">{image}</div>'  # on a phone it keeps the size at which its text is read, and is moved


def data_of(name: str, value: Any) -> str:
    """A JSON value for the page's script, which finds it by the name; no text in it can end its element.

    Texts for people must have been made ``visible``.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" id="{name}">{text}</script>'


def page_of(heading: str, parts: Sequence[str], language: str = "en", style: str = "", script: str = "") -> bytes:
    """The whole file.

    Args:
        heading: the title in the browser's list of pages, and the page's own.
        parts: markup, in its order.
        style, script: of this kind of page, beside what all have.
    """
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    if script:
        policy += f"; script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
    head = [
        f'<!DOCTYPE html>\n<html lang="{language}">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(heading)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>",
        f"<h1>{escape(heading)}</h1>",
    ]
    end = [f"<script>{script}</script>"] if script else []
    return "\n".join([*head, *parts, *end, "</body>\n</html>\n"]).encode("utf-8", "replace")
