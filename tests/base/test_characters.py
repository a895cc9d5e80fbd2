"""Numbers as people write them, and the ASCII form of what a Chinese keyboard gives."""

from __future__ import annotations

import pytest

from megatron_hammer.base.characters import in_ascii, number_meant


@pytest.mark.parametrize(
    "text, whole, meant",
    [
        ("8k", True, "8000"),
        ("1e3", True, "1000"),
        ("8，000", True, "8000"),
        ("1,000,000", True, "1000000"),
        ("3.5亿", True, "350000000"),
        ("2千步", True, "2000"),
        ("5%", False, "0.05"),
        ("0,5", False, "0.5"),
        ("1,0", True, ""),
        ("1.5", True, ""),
        ("1/0", False, ""),
        ("1e999", True, ""),
        ("两", True, ""),
        ("", False, ""),
        ("1 2 x", True, ""),
    ],
)
def test_numbers(text: str, whole: bool, meant: str) -> None:
    assert number_meant(text, whole) == meant


def test_the_unit_of_an_option_is_no_factor() -> None:
    assert number_meant("2MB", False, unit="mb") == "2" and number_meant("2MB", False, unit="gb") == "0.002"
    assert number_meant("1GB", True, unit="mb") == number_meant("1g", True, unit="mb") == "1000"
    assert number_meant("1KB", True, unit="mb") == "" and number_meant("2k", True, unit="steps") == "2000"


def test_ascii() -> None:
    assert in_ascii("｛“ａ”：１，２、３｝—ｂ") == '{"a":1,2,3}-b'
    assert in_ascii("中文 a_b") == "中文 a_b"
