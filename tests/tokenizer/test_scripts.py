"""Scripts of characters and of pieces."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hammer.tokenizer.scripts import SCRIPTS, script_of


@pytest.mark.parametrize("text, script", [
    ("中国", "Han"), ("〇", "Han"), ("々", "Han"), (" the", "Latin"), ("ｆ", "Latin"), ("naïve", "Latin"),
    ("e\u0301", "Latin"), ("の", "Kana"), ("ｱ", "Kana"), ("가", "Hangul"), ("д", "Cyrillic"), ("Ω", "Greek"),
    ("ع", "Arabic"), ("ก", "other script"), ("漢の", "mixed scripts"), ("12", "digits"), ("½", "digits"),
    ("７", "digits"), ("。", "punctuation"), ("):\n", "punctuation"), (" +=", "symbols"), ("😀", "symbols"),
    ("   ", "white space"), ("\n\n", "white space"), ("<br>", "Latin"), ("x1", "Latin"), ("1.", "digits"),
])  # fmt: skip
def test_scripts(text: str, script: str) -> None:
    assert script_of(text) == script


@given(text=st.text(min_size=1))
@settings(max_examples=200, deadline=None)
def test_every_piece_has_a_script(text: str) -> None:
    assert script_of(text) in SCRIPTS[: SCRIPTS.index("bytes")]
