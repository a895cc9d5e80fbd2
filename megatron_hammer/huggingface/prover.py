"""The process beside an export: it writes the tokenizer while the weights are written, and then proves all of it.

::

    export.py   weights ..........  config.json   "\\n"                             renames the folder
                                    ^               v                              ^
    here        tokenizer, proved   {"token_ids"}   certificate.prove .........   {"verdict", ...}

torch and transformers, which take seconds to import, are imported here meanwhile, and once. Each answer is one JSON
object in a line of standard output; ``{"error": ...}`` is the last. Where standard input ends, the export has ended,
however that happened, and so does this process. Needs no torch to begin.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any, cast

from megatron_hammer.base.cli import run
from megatron_hammer.base.errors import from_exception, to_fields
from megatron_hammer.checkpoint.manifest import read_manifest, saved_model
from megatron_hammer.huggingface.exported_tokenizer import TokenizerForm, write_tokenizer


def main() -> int:
    """Serve one export."""
    checkpoint, folder, dtype, form = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints does not answer

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    is_written = threading.Event()
    threading.Thread(target=_listen, args=(is_written,), daemon=True).start()
    try:
        manifest = read_manifest(checkpoint)
        tokenizer = write_tokenizer(manifest, saved_model(manifest), Path(folder), cast(TokenizerForm, form))
        answer({"token_ids": tokenizer.token_ids})
        from megatron_hammer.huggingface.certificate import prove  # while the weights are written

        is_written.wait()
        answer(prove(manifest.folder, Path(folder), dtype, tokenizer.unproved))
    except Exception as error:
        known = from_exception(error, "the proof of the export")
        if known is None:
            raise
        answer({"error": to_fields(known)})
        return known.exit_code
    return 0


def _listen(is_written: threading.Event) -> None:
    """Note that everything is written; end the process when the export ends."""
    if os.read(0, 1):
        is_written.set()
        os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    run(main)
