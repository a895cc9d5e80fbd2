"""The table of 8,105 characters: counts, order, and that its file is what the Unicode Han database says."""

from __future__ import annotations

import bz2
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from megatron_hammer.base.errors import ConfigError, DataError
from megatron_hammer.tokenizer.required_characters import (
    LEVEL_SIZES,
    TABLE_PATH,
    UNIHAN_FOLDER,
    build_table,
    load_table,
    read_required,
)
from tests.tokenizer.texts import REPOSITORY

TOOL = REPOSITORY / "tools/make_character_table.py"


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, env={"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True)


def unihan_lines() -> list[str]:
    """The database as far as the table goes, in the database's order."""
    numbered = {character: number for number, (character, _) in enumerate(load_table(), start=1)}
    return [f"U+{ord(c):04X}\tkTGH\t2013:{numbered[c]}" for c in sorted(numbered)]


def write_unihan(path: Path, lines: list[str]) -> Path:
    others = ["# Unihan_OtherMappings.txt", "#\tkTGH", "U+3400\tkBigFive\tA440", "U+4E00\tkGB0\t5027"]
    path.write_text("\n".join([*others, *lines, "", "# EOF"]) + "\n", encoding="utf-8")
    return path


def test_counts_and_order() -> None:
    table = load_table()
    characters = [character for character, _ in table]
    assert len(table) == len(set(characters)) == 8105
    assert Counter(level for _, level in table) == LEVEL_SIZES == {1: 3500, 2: 3000, 3: 1605}
    assert [level for _, level in table] == sorted(level for _, level in table)
    # The first and last of each level, as printed in the table (numbers 1, 3500, 3501, 6500, 6501, 8105).
    assert [characters[n - 1] for n in (1, 3500, 3501, 6500, 6501, 8105)] == list("一矗乂齉亍蠼")
    assert sum(ord(character) > 0xFFFF for character in characters) == 196


def test_regenerated_from_the_database() -> None:
    """HAMMER_UNIHAN names a file or folder elsewhere than where Debian's unicode-data puts it."""
    unihan = Path(os.environ.get("HAMMER_UNIHAN", UNIHAN_FOLDER))
    if not unihan.exists():
        pytest.skip(f"no Unicode Han database at {unihan} (Debian: package unicode-data)")
    assert build_table(unihan) == TABLE_PATH.read_bytes()


def test_the_order_is_that_of_the_numbers(tmp_path: Path) -> None:
    lines = unihan_lines()
    random.Random(1).shuffle(lines)
    write_unihan(tmp_path / "Unihan_OtherMappings.txt", lines)
    assert build_table(tmp_path) == TABLE_PATH.read_bytes()
    packed = bz2.compress((tmp_path / "Unihan_OtherMappings.txt").read_bytes())
    (tmp_path / "other.bz2").write_bytes(packed)
    assert build_table(tmp_path / "other.bz2") == TABLE_PATH.read_bytes()


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda lines: lines[:-1], r"numbers 8104 characters, without number \d+"),
        (lambda lines: [*lines, "U+9FFF\tkTGH\t2013:8106"], "numbers 8106 characters, beyond 8105"),
        (lambda lines: [*lines, "U+9FFF\tkTGH\t2013:17"], r"has a line 'U\+9FFF"),
        (lambda lines: [*lines, "U+9FFF\tkTGH\t1988:17"], r"has a line 'U\+9FFF"),
        (lambda lines: [], "holds no kTGH field"),
    ],
)
def test_an_incomplete_database_is_refused(tmp_path: Path, spoil, words: str) -> None:
    with pytest.raises(DataError, match=f"E316.*{words}"):
        build_table(write_unihan(tmp_path / "u.txt", spoil(unihan_lines())))


def test_a_damaged_or_missing_database_is_refused(tmp_path: Path) -> None:
    whole = bz2.compress(write_unihan(tmp_path / "u.txt", unihan_lines()).read_bytes())
    (tmp_path / "cut.bz2").write_bytes(whole[:1000])
    (tmp_path / "text.bz2").write_bytes(b"no bzip2")
    for name in ("cut.bz2", "text.bz2"):
        with pytest.raises(DataError, match=r"E316.*cannot be decoded"):
            build_table(tmp_path / name)
    with pytest.raises(DataError, match=r"E316.*holds no Unihan_OtherMappings"):
        build_table(tmp_path)


def test_the_program(tmp_path: Path) -> None:
    output = tmp_path / "table.txt"
    source = write_unihan(tmp_path / "u.txt", unihan_lines())
    done = run_tool("--unihan", source, "--output", output)
    assert done.returncode == 0 and "8,105 characters, written" in done.stdout, done.stderr
    assert output.read_bytes() == TABLE_PATH.read_bytes()
    assert "as it was" in run_tool("--unihan", source, "--output", output).stdout

    failed = run_tool("--unihan", tmp_path / "none", "--output", tmp_path / "other.txt")
    assert failed.returncode == 3 and failed.stderr.startswith("error[E316]") and failed.stderr.count("\n") == 1
    assert not (tmp_path / "other.txt").exists()


def test_required_characters(tmp_path: Path) -> None:
    required = read_required("tgh2013")
    assert required.characters == "".join(character for character, _ in load_table())
    assert required.common == required.characters[:3500]

    path = tmp_path / "mine.txt"
    path.write_text("龘 靐\n龘\n", encoding="utf-8")
    assert read_required(path) == ("mine.txt", "龘靐", "龘靐")
    path.write_text(" \n\n")
    with pytest.raises(ConfigError, match=r"E266.*holds no character"):
        read_required(path)
    with pytest.raises(ConfigError, match=r"E261.*cannot be read"):
        read_required(tmp_path / "none")
