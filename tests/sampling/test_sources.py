"""What sources are called."""

from __future__ import annotations

import pytest

from megatron_hammer.sampling.sources import names_by_prefix, source_keys, source_names


@pytest.mark.parametrize(
    ("prefixes", "names"),
    [
        (["/data/zh/wiki_text_document", "/data/zh/books", "/data/en/wiki_text_document"],
         ["zh.wiki", "books", "en.wiki"]),
        (["code"], ["code"]),
        (["/a/x/c", "/b/x/c"], ["a.x.c", "b.x.c"]),
        (["a/c", "/a/c", "./a/c"], ["a.c", "a.c.2", "a.c.3"]),  # one file under three names
        (["b.2", "x/b", "y/b", "b"], ["b.2", "x.b", "y.b", "b"]),
        (["/a/c", "c", "a/c.2", "/a.c"], ["a.c", "c", "c.2", "a.c.2"]),
        (["数据/网页（甲）_text_document", "a=b"], ["网页_甲_", "a_b"]),
        (["/data/_text_document"], ["_text_document"]),
    ],
)  # fmt: skip
def test_names_are_short_and_no_two_are_equal(prefixes: list[str], names: list[str]) -> None:
    assert source_names(prefixes) == names
    assert len(set(names)) == len(names)


def test_keys_tell_sources_of_one_content_apart() -> None:
    assert source_keys(["f", "g", "f"]) == ["f", "g", "f.2"]


def test_a_source_that_moves_keeps_one_name() -> None:
    """As in the run, whose sources are told apart by content; what one mix names twice stays two."""
    contents = {"/old/zh": "f", "/new/zh": "f", "/new/en": "g", "/copy/en": "g"}
    names = names_by_prefix([["/old/zh", "/new/en"], ["/new/zh", "/new/en", "/copy/en"]], contents)
    assert names == {"/old/zh": "zh", "/new/zh": "zh", "/new/en": "new.en", "/copy/en": "copy.en"}
