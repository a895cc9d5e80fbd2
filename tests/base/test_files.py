"""Publishing by rename, and hashes of files."""

from __future__ import annotations

from pathlib import Path

import pytest
import xxhash

from megatron_hammer.base.files import hash_bytes, hash_file, publish


def test_hash_of_a_file_longer_than_the_buffer(tmp_path: Path) -> None:
    content = bytes(range(256)) * 8192 + b"end"
    (tmp_path / "file").write_bytes(content)
    assert hash_file(tmp_path / "file") == hash_bytes(content) == xxhash.xxh3_128(content).hexdigest()


def test_publish_replaces_a_file_but_no_filled_folder(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    (tmp_path / "staged").write_text("new")
    publish(tmp_path / "staged", tmp_path / "old")
    assert (tmp_path / "old").read_text() == "new" and not (tmp_path / "staged").exists()
    for name in ("folder.tmp", "folder"):
        (tmp_path / name).mkdir()
    (tmp_path / "folder.tmp" / "a").touch()
    publish(tmp_path / "folder.tmp", tmp_path / "folder")
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["a"]
    (tmp_path / "folder.tmp").mkdir()
    with pytest.raises(OSError, match="not empty"):
        publish(tmp_path / "folder.tmp", tmp_path / "folder")
