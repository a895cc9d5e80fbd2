"""The file of the documents that a program left out, such as ``P_KEY_document.rejected.jsonl``: a JSON object a line.

    {"file": "zh.jsonl", "line": 17, "byte": 5120, "cause": "E304", "message": "...", "raw": "the line"}

``line`` and ``byte`` are the place in the uncompressed file; in parquet both are the row. ``raw_hex`` stands for
``raw`` where the line is not valid UTF-8, and ``raw_bytes`` is the size of a line that is too long to be kept whole.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import orjson

from megatron_hammer.base.files import StaleState, close_after, make_durable, open_existing, open_new, publish
from megatron_hammer.corpus.parse import RejectedDocument


class RejectedFile:
    """The rejected documents, a JSON object a line; appears under its name when the work is complete, even if empty.

    Args:
        size: None for a new file; else go on behind so many bytes of the temporary.
    """

    def __init__(self, path: Path, size: int | None = None) -> None:
        self.path, self.temporary = path, self.temporary_of(path)
        self._keep = size is not None
        if size is not None and not self.temporary.exists():
            raise StaleState(f"{self.temporary} is gone")
        self._file = open_new(self.temporary) if size is None else open_existing(self.temporary)
        if size is not None:
            if self._file.seek(0, os.SEEK_END) < size:
                self._file.close()
                raise StaleState(f"{self.temporary} is shorter than it was")
            self._file.truncate(size)
            self._file.seek(size)

    @staticmethod
    def temporary_of(path: Path) -> Path:
        return path.with_name(f"{path.name}.tmp")

    def write(self, path: Path, rejected: Sequence[RejectedDocument]) -> None:
        for item in rejected:
            record: dict[str, object] = {
                "file": os.fsencode(path).decode("utf-8", "backslashreplace"),
                "line": item.place.line,
                "byte": item.place.offset,
                "cause": item.code,
                "message": item.message.encode("utf-8", "backslashreplace").decode(),
            }
            if item.raw is not None:
                if len(item.raw) < item.size:
                    record["raw_bytes"] = item.size
                try:
                    record["raw"] = item.raw.decode("utf-8")
                except UnicodeDecodeError:
                    record["raw_hex"] = item.raw.hex()
            self.write_record(record)

    def write_record(self, record: Mapping[str, object]) -> None:
        self._file.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))

    def save_state(self) -> int:
        """Make everything durable; the bytes there are."""
        make_durable(self._file)
        self._keep = True
        return self._file.tell()

    def __enter__(self) -> RejectedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                make_durable(self._file)
        except OSError as failure:
            error = failure
            raise
        finally:
            close_after(self._file, error)
        if kind is None:
            publish(self.temporary, self.path)
        elif not self._keep:
            self.temporary.unlink(missing_ok=True)
