"""Command-line options that all programs which read texts share: the key of the text, and what to do about a bad one.

Importing this module imports no reader, so that ``--help`` stays quick.
"""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Literal, get_args

OnError = Literal["stop", "skip", "quarantine"]
"""What happens at a document that cannot be used: the program ends, or it is left out, or written to a file too."""
ON_ERROR: tuple[OnError, ...] = get_args(OnError)


def add_json_key(parser: ArgumentParser, what: str = "field or column that holds the text") -> None:
    """``--json-keys`` for one key, as ``json_key``; ``--json-key`` is its former name."""
    parser.add_argument("--json-keys", "--json-key", dest="json_key", metavar="KEY", default="text",
                        help=f"{what} (default: text)")  # fmt: skip


def add_text_documents(parser: ArgumentParser) -> None:
    """``--text-documents``, alike in all programs (``readers.TEXT_DOCUMENTS``)."""
    parser.add_argument("--text-documents", choices=("file", "line", "blank-line"), default="blank-line",
                        help="a document of plain text (.txt, .md) is: all of a file, each line that is not empty, or "
                        "what stands between empty lines (default: blank-line, as in all programs)")  # fmt: skip


def add_on_error(parser: ArgumentParser, quarantine: str, what: str = "a document that cannot be used") -> None:
    """``--on-error``; ``quarantine`` names the file of what was left out."""
    choices = f"{what}: end, leave it out, or also write it to {quarantine} (default: stop)"
    parser.add_argument("--on-error", choices=ON_ERROR, default="stop", help=choices)
