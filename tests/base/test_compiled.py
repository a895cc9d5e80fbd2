"""A compiled module is taken only where it is there, loads, and was built from the sources that call it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_hammer.base.compiled import find_compiled


def test_only_a_module_of_this_interface_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "hammer_current.py").write_text("INTERFACE = 3\n")
    (tmp_path / "hammer_ancient.py").write_text("")
    (tmp_path / "hammer_broken.py").write_text("raise ImportError('libgomp.so.1: cannot open shared object file')\n")
    found = find_compiled("hammer_current", 3)
    assert found is not None and found.__name__ == "hammer_current"
    for name, interface in (("current", 2), ("current", 4), ("ancient", 3), ("broken", 3), ("absent", 3)):
        assert find_compiled(f"hammer_{name}", interface) is None, name
