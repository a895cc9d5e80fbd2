"""Ids as text for people."""

from __future__ import annotations

from typing import Any

from megatron_hammer.tokenizer.spelling import Speller
from tests.dataset.inspected import tokenizers  # noqa: F401  the fixture


def test_ids_that_spell_nothing(tokenizers: dict[str, Any]) -> None:  # noqa: F811
    spm = tokenizers["sentencepiece"]
    speller = Speller(spm)
    smile = spm.encode("\U0001f600")
    assert speller.text([1, *spm.encode("世界"), 2, 10**6, -1, 0]) == "<bos>世界<eos><id 1000000><id -1><unk>"
    assert speller.text(smile[:2]) == "\\xf0\\x9f", "bytes that are no character"
    assert speller.marked([1, *smile, *spm.encode("\n")]).startswith("<bos>\u2502<0xF0>\u2502<0x9F>\u2502")
    assert speller.marked(spm.encode("\n")) in ("\\n", "<0x0A>")
