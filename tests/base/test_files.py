"""Publishing by rename, folders that appear whole, and hashes of files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import xxhash

from megatron_hammer.base.files import hash_bytes, hash_file, publish, replace_file, staged_folder


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


def test_what_a_killed_one_of_the_same_number_left_hinders_nobody(tmp_path: Path) -> None:
    """As the first process of a container, whose number is always 1."""
    (tmp_path / f"file.tmp-{os.getpid()}").write_text("half")
    for content in (b"one", b"two"):
        replace_file(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == content and len(list(tmp_path.iterdir())) == 2


def test_a_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "which").write_text("target")
    with staged_folder(tmp_path / "target", replace=True) as staging:
        (staging / "which").write_text("staging")
        assert (tmp_path / "target" / "which").read_text() == "target"
    assert [p.name for p in tmp_path.iterdir()] == ["target"]
    assert (tmp_path / "target" / "which").read_text() == "staging"


def test_a_staged_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder"
    with staged_folder(target) as staging:
        (staging / "file").write_text("1")
        assert not target.exists()
    assert [p.name for p in target.parent.iterdir()] == ["folder"]
    with pytest.raises(OSError, match="not empty"), staged_folder(target):
        pass  # somebody's folder is not replaced unasked
    with pytest.raises(KeyboardInterrupt), staged_folder(target, replace=True):
        raise KeyboardInterrupt
    assert (target / "file").read_text() == "1"
    (tmp_path / "new" / "folder.tmp-0123456789abcdef").mkdir()
    target.rename(tmp_path / "new" / "folder.old-0123456789abcdef")  # a crash between two renames
    with staged_folder(target, replace=True) as staging:
        assert (target / "file").read_text() == "1"
        (staging / "file").write_text("2")
    assert [p.name for p in target.parent.iterdir()] == ["folder"] and (target / "file").read_text() == "2"
