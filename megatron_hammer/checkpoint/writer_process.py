"""The process beside a rank that writes its part of a checkpoint while the rank trains; ``background.py`` starts it.

::

    rank  --- one JSON object a line --->  plan     which slices lie where in the memory that both see, once
                                           write    the rank's file of a checkpoint, and its report
                                           commit   of the rank that commits: manifest, rename
                                           prune    what is old
    rank  <-- one JSON object a line ----  {"done": ...} or {"error": ...} for each

It calls the same functions of ``commit.py`` as a rank that saves while training waits, so the files have the same
bytes. It does not communicate with other processes than its rank. It dies with its rank, so that no process goes on
writing into a folder whose lock is free. It starts with the stop signals blocked: the rank decides what to do about
them. Needs no torch.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_hammer.base.errors import HammerError, from_os_error, to_fields
from megatron_hammer.base.faults import fault_point
from megatron_hammer.base.files import sync_file, write_durably
from megatron_hammer.base.system import die_with_parent
from megatron_hammer.checkpoint.commit import SliceToWrite, commit, stage_tokenizer_files, write_rank
from megatron_hammer.checkpoint.folder import step_of
from megatron_hammer.checkpoint.manifest import SavedLayout
from megatron_hammer.checkpoint.retention import KnownCheckpoints, Retention, prune
from megatron_hammer.checkpoint.tensor_files import CHUNK_BYTES
from megatron_hammer.config import config_from_tree

PART = "background"  # of a rank, for ``fault_point``


class Writer:
    """What the requests of one rank are done with.

    Args:
        memory: the snapshot.
    """

    def __init__(self, rank: int, memory: mmap.mmap) -> None:
        self._rank, self._memory = rank, memoryview(memory)
        self._slices: list[SliceToWrite] = []
        self._tokenizer: dict[str, bytes] = {}
        self._fingerprint = ""
        self._known = KnownCheckpoints()

    def do(self, request: dict[str, Any]) -> list[str]:
        """Do what is asked for; returns remarks for people."""
        notes: list[str] = []
        match request["do"]:
            case "plan":
                self._plan(request)
            case "write":
                write_rank(Path(request["staging"]), self._rank, self._slices, part=PART)
            case "commit":
                replaced = self._commit(request)
                if replaced is not None:
                    notes.append(f"{request['target']} was there already: kept as {replaced.name}")
            case "prune":
                self._known.add(Path(request["newest"]))
                self._prune(request, notes)
        return notes

    def _prune(self, request: dict[str, Any], notes: list[str]) -> None:
        """Remove what is old; the checkpoint is there already, so that a failure is a remark."""
        fault_point("prune", self._rank, step_of(Path(request["newest"])), PART)
        fields = request["retention"]
        retention = Retention(**{**fields, "pinned_steps": tuple(fields["pinned_steps"])})
        try:
            prune(Path(request["folder"]), retention, notes.append, self._known)
        except OSError as error:
            notes.append(f"could not remove old checkpoints in {request['folder']}: {error.strerror or error}")

    def _plan(self, request: dict[str, Any]) -> None:
        self._tokenizer = {name: bytes.fromhex(content) for name, content in request["tokenizer"].items()}
        self._fingerprint = request["fingerprint"]
        for name, kind, rows, cols, shape, dtype, offset, size in request["slices"]:
            chunks = _Chunks(self._memory, offset, size)
            columns = None if cols is None else (cols[0], cols[1])
            self._slices.append(SliceToWrite(name, kind, (rows[0], rows[1]), columns, tuple(shape), dtype, chunks))

    def _commit(self, request: dict[str, Any]) -> Path | None:
        for path in request["sync_first"]:
            sync_file(Path(path))
        staging, tree, files = Path(request["staging"]), request["config"], None
        if self._tokenizer:
            files = stage_tokenizer_files(self._save_tokenizer, self._fingerprint, staging)
        return commit(
            staging,
            Path(request["target"]),
            step=request["step"],
            model=config_from_tree(tree).model,
            config_tree=tree,
            state=request["state"],
            weights_dtype=request["weights_dtype"],
            layout=SavedLayout(**request["layout"]),
            tokenizer=files,
            part=PART,
        )

    def _save_tokenizer(self, folder: Path) -> None:
        for name, content in self._tokenizer.items():
            write_durably(folder / name, content)


class _Chunks:
    """The bytes of one slice, a few at a time."""

    def __init__(self, memory: memoryview, offset: int, size: int) -> None:
        self._memory, self._range = memory, range(offset, offset + size, CHUNK_BYTES)
        self._stop = offset + size

    def __call__(self) -> Iterator[memoryview]:
        return (self._memory[at : min(at + CHUNK_BYTES, self._stop)] for at in self._range)


def main(arguments: list[str]) -> int:
    """Serve until the rank closes its end."""
    descriptor, size, rank, parent = map(int, arguments)
    die_with_parent(parent)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints does not answer
    memory = mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    writer = Writer(rank, memory)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        try:
            reply = {"done": request["do"], "notes": writer.do(request)}
        except HammerError as error:
            reply = {"error": to_fields(error)}
        except OSError as failure:
            place = request.get("target") or request.get("staging")
            reply = {"error": to_fields(from_os_error(failure, f"saving {place}", place=place))}
        answers.write(json.dumps(reply).encode() + b"\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
