"""Makes an indexed dataset from text: what ``tools/preprocess_data.py`` does on one machine. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_hammer.base.progress import say
from megatron_hammer.corpus.arguments import OnError
from megatron_hammer.corpus.readers import DEFAULT_TEXT_DOCUMENTS
from megatron_hammer.dataset.make.job import prepare_job, remarks
from megatron_hammer.dataset.make.local import build_datasets
from megatron_hammer.tokenizer.interface import Tokenizer


def make_dataset(
    inputs: str | Path | Sequence[str | Path],
    tokenizer: str | Path | Tokenizer,
    output_prefix: str | Path,
    *,
    key: str = "text",
    append_eod: bool = True,
    prepend_bos: bool = False,
    workers: int = 1,
    on_error: OnError = "stop",
    text_documents: str = DEFAULT_TEXT_DOCUMENTS,
) -> str:
    """Tokenize texts into ``{output_prefix}_{key}_document.bin`` and ``.idx``, in the order of the files.

    What its name held before stays until the new files are complete.

    Args:
        inputs: .jsonl, .parquet, .txt, .md, all but parquet also .gz or .zst; folders, patterns.
        tokenizer: path of the tokenizer, or what ``load_tokenizer`` gave.
        key: field or column that holds the text.
        append_eod, prepend_bos: end every document with eos, begin it with bos.
        workers: threads; the files are the same for any number.
        on_error: "stop" at a malformed document, "skip" or "quarantine" it.
        text_documents: what a document of a plain text is: "file", "line", or "blank-line": what lies between
            blank lines.

    Returns:
        the prefix, as ``data.train`` takes it.

    Raises:
        ConfigError, DataError: what ``tools/preprocess_data.py`` would end with.
    """
    files = [inputs] if isinstance(inputs, str | Path) else list(inputs)
    path = tokenizer.path if isinstance(tokenizer, Tokenizer) else tokenizer
    job = prepare_job(files, [key], path, append_eod, prepend_bos, on_error, text_documents)
    for note in remarks(job):
        say(f"note: {note}")
    (summary,) = build_datasets(job, output_prefix, workers)
    print(summary, flush=True)
    return str(summary.prefix)
