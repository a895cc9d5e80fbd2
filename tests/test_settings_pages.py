"""docs/configuration.md and its twin are what docs/settings_pages.py makes of the code; no Chinese text is missing."""

from __future__ import annotations

import runpy

from megatron_hammer.config import Effect, describe_fields, describe_parts
from tests.page_blocks import ROOT

PROGRAM = runpy.run_path(str(ROOT / "docs" / "settings_pages.py"))


def test_every_setting_has_a_text_in_chinese_and_no_other_has() -> None:
    wanted = {
        f"{group}.{name}" for part in (describe_fields(), describe_parts()) for group in part for name in part[group]
    }
    texts = PROGRAM["chinese_texts"]()
    assert set(texts) == wanted, "docs/settings.zh-CN.yaml"
    assert not [name for name, text in texts.items() if not text.strip() or text.isascii()]


def test_the_effects_are_those_of_the_code() -> None:
    assert {effect: told[1] for effect, told in PROGRAM["EFFECTS"]["en"].items()} == {e: e.value for e in Effect}
    for language in ("en", "zh-CN"):
        assert set(PROGRAM["EFFECTS"][language]) == set(Effect)
    assert set(PROGRAM["GROUPS"]) == set(describe_fields())


def test_the_pages_are_those_that_the_program_makes() -> None:
    for name, content in PROGRAM["files"]().items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == content, "run: python docs/settings_pages.py"
