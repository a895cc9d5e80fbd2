"""The characters that a Chinese tokenizer must have: the Table of General Standard Chinese Characters of 2013.

    Unihan_OtherMappings.txt  --build_table-->  tgh2013.txt (packaged)  --load_table-->  [(character, level), ...]
    U+4E00  kTGH  2013:1                        level 1
                                                <50 characters a line>

The table has 8,105 characters in a fixed order: 3,500 in common use (level 1), 3,000 more that print needs (level 2),
and 1,605 of names, places and sciences (level 3). 196 of the last lie beyond U+FFFF.

The data file is made by ``tools/make_character_table.py`` from the field kTGH of the Unicode Han database (UAX #38),
which gives each character its number in the table; the levels follow from the number.
"""

from __future__ import annotations

import bz2
import re
from pathlib import Path
from typing import NamedTuple

from megatron_hammer.base.errors import ConfigError, DataError
from megatron_hammer.base.reading import read_regular
from megatron_hammer.tokenizer.symbols import read_text_file

TABLE_NAME = "tgh2013"
"""What stands for the table wherever a program takes a file of characters."""
TABLE_PATH = Path(__file__).with_name("tgh2013.txt")
LEVEL_SIZES = {1: 3500, 2: 3000, 3: 1605}
TABLE_SIZE = sum(LEVEL_SIZES.values())

UNIHAN_FOLDER = Path("/usr/share/unicode")
"""Where Debian's package unicode-data puts the database."""
_UNIHAN_NAMES = ("Unihan_OtherMappings.txt", "Unihan_OtherMappings.txt.bz2")
_MAX_UNIHAN_BYTES = 16 * 2**20  # four times what the file has
_CHARACTERS_A_LINE = 50  # chosen by eye
_HEADER = """\
# The Table of General Standard Chinese Characters (2013), in its own order.
# Made by tools/make_character_table.py from the field kTGH of the Unicode Han Database (Unihan_OtherMappings.txt),
# Copyright Unicode, Inc.; terms of use: https://www.unicode.org/copyright.html
"""


def load_table() -> list[tuple[str, int]]:
    """The 8,105 characters in table order, each with its level (1, 2 or 3)."""
    table: list[tuple[str, int]] = []
    level = 0
    for line in read_regular(TABLE_PATH).decode("utf-8").splitlines():
        if line.startswith("#"):
            continue
        if line.startswith("level "):
            level = int(line.removeprefix("level "))
        else:
            table += [(character, level) for character in line]
    assert len(table) == TABLE_SIZE, f"{TABLE_PATH} holds {len(table)} characters"
    return table


class RequiredCharacters(NamedTuple):
    """Characters that a tokenizer must have a piece for.

    Attributes:
        name: ``tgh2013``, or the name of the file.
        characters: all of them, in order, each once.
        common: those in common use, which two tokenizers are compared on; of a file, all.
    """

    name: str
    characters: str
    common: str


def read_required(name: str | Path) -> RequiredCharacters:
    """The characters of a file (all that are not white space), or of the table where the name is ``tgh2013``.

    A file of that name is ``./tgh2013``.

    Raises:
        ConfigError: E261 the file cannot be read, E266 it holds no character.
    """
    if str(name) == TABLE_NAME:
        table = load_table()
        everything = "".join(character for character, _ in table)
        return RequiredCharacters(TABLE_NAME, everything, "".join(c for c, level in table if level == 1))
    characters = read_characters(name)
    if not characters:
        raise ConfigError(66, str(name), "holds no character", f"fill it, or give the word {TABLE_NAME}")
    return RequiredCharacters(Path(name).name, characters, characters)


def read_characters(path: str | Path) -> str:
    """Required characters from a file: every character that is not white space counts.

    Raises:
        ConfigError: E261.
    """
    return "".join(dict.fromkeys("".join(read_text_file(Path(path)).split())))


# ---- making the data file ----


def build_table(unihan: Path) -> bytes:
    """The content of ``tgh2013.txt``, from ``Unihan_OtherMappings.txt``, its ``.bz2``, or a folder that holds one.

    Raises:
        DataError: E316 the file is missing, is something else, or does not number the table's characters without a gap.
    """
    characters = _read_numbers(_find_unihan(unihan))
    lines = []
    start = 0
    for level, size in LEVEL_SIZES.items():
        lines.append(f"level {level}")
        stop = start + size
        lines += [characters[at : min(at + _CHARACTERS_A_LINE, stop)] for at in range(start, stop, _CHARACTERS_A_LINE)]
        start = stop
    return (_HEADER + "\n".join(lines) + "\n").encode()


def _find_unihan(path: Path) -> Path:
    candidates = [path / name for name in _UNIHAN_NAMES] if path.is_dir() else [path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise _not_unihan(path, f"holds no {_UNIHAN_NAMES[0]}" if path.is_dir() else "does not exist")


def _read_numbers(path: Path) -> str:
    """All characters with a kTGH field, in the order of its numbers."""
    try:
        content = read_regular(path, _MAX_UNIHAN_BYTES)
        if path.suffix == ".bz2":
            unpacking = bz2.BZ2Decompressor()
            content = unpacking.decompress(content, _MAX_UNIHAN_BYTES)
            if not unpacking.eof:
                raise EOFError("it is cut, or holds more than such a file does")
        text = content.decode("utf-8")
    except (OSError, EOFError, ValueError) as error:
        raise _not_unihan(path, f"cannot be decoded ({error})") from None
    by_number: dict[int, str] = {}
    for line, code, value in re.findall(r"^(U\+([0-9A-F]{4,6})\tkTGH\t(.*))$", text, re.MULTILINE):
        found = re.fullmatch(r"2013:(\d+)", value.strip())
        if found is None or int(found[1]) in by_number:
            raise _not_unihan(path, f"has a line {line!r} where one number of its own is expected")
        by_number[int(found[1])] = chr(int(code, 16))
    if not by_number:
        raise _not_unihan(path, "holds no kTGH field")
    gap = next((number for number in range(1, TABLE_SIZE + 1) if number not in by_number), None)
    if gap is not None or len(by_number) != TABLE_SIZE:
        cause = f"without number {gap}" if gap is not None else f"beyond {TABLE_SIZE}"
        raise _not_unihan(path, f"numbers {len(by_number)} characters, {cause}")
    return "".join(by_number[number] for number in range(1, TABLE_SIZE + 1))


def _not_unihan(path: Path, rule: str) -> DataError:
    return DataError(
        16, str(path), rule,
        "give the Unihan_OtherMappings.txt of Unicode's Unihan.zip, or install Debian's package unicode-data",
    )  # fmt: skip
