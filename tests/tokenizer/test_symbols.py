"""Files of user-defined symbols."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.tokenizer.symbols import read_symbols


def test_symbol_files(tmp_path: Path) -> None:
    path = tmp_path / "s.txt"
    path.write_bytes(b"<br>\r\n\\357\n\n two words \n")
    assert read_symbols(path) == ["<br>", "\\357", " two words "]
    with pytest.raises(ConfigError, match=r"E261.*cannot be read"):
        read_symbols(tmp_path / "none")
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"E261.*not valid UTF-8 at byte 0"):
        read_symbols(path)
