#!/usr/bin/env python3
"""Make the table of the 8,105 general standard Chinese characters from the Unicode Han database.

    python tools/make_character_table.py --unihan Unihan_OtherMappings.txt

The database is part of Unicode's Unihan.zip; Debian's package unicode-data has it compressed, which is read as well:

    apt-get download unicode-data && dpkg-deb -x unicode-data_*.deb x
    python tools/make_character_table.py --unihan x/usr/share/unicode
"""

from __future__ import annotations

from pathlib import Path

import require_package  # noqa: F401

from megatron_hammer.base.cli import ArgumentParser, run
from megatron_hammer.base.files import replace_file
from megatron_hammer.base.reading import read_regular
from megatron_hammer.tokenizer import required_characters


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--unihan", type=Path, default=required_characters.UNIHAN_FOLDER, metavar="FILE_OR_DIR",
                        help="Unihan_OtherMappings.txt, its .bz2, or their folder (default: %(default)s)")  # fmt: skip
    parser.add_argument("--output", type=Path, default=required_characters.TABLE_PATH, metavar="FILE",
                        help="table to write (default: the package's own)")  # fmt: skip
    args = parser.parse_args()
    table = required_characters.build_table(args.unihan)
    changed = not args.output.is_file() or read_regular(args.output) != table
    replace_file(args.output, table)
    print(f"{args.output}: {required_characters.TABLE_SIZE:,} characters, {'written' if changed else 'as it was'}")


if __name__ == "__main__":
    run(main)
