"""A preprocessing job: the checked values of its command line, with the input files found and the tokenizer loaded.

A ``Job`` decides the bytes of the datasets, together with the content of the files. How it is carried out does not
change them: ``local.py`` works in threads of this process, ``ray.py`` on a Ray cluster.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.base.reading import open_regular
from megatron_hammer.corpus.arguments import ON_ERROR, OnError
from megatron_hammer.corpus.readers import DEFAULT_TEXT_DOCUMENTS, TEXT_DOCUMENTS, expand_inputs, kind_of
from megatron_hammer.corpus.stream import file_identity
from megatron_hammer.tokenizer.convert import export_note
from megatron_hammer.tokenizer.interface import Tokenizer
from megatron_hammer.tokenizer.load import load_tokenizer
from megatron_hammer.tokenizer.tiktoken_backend import TiktokenTokenizer

SHARD_BYTES = 1 << 30  # of text between two journals: ten to twenty seconds of work for two cores
_TEXT_DOCUMENT_NAMES = {"file": "all of a file", "line": "a line", "blank-line": "what stands between empty lines"}


@dataclass(frozen=True)
class Job:
    """The datasets to make, one for each JSON key."""

    files: tuple[Path, ...]
    kinds: tuple[str, ...]
    """How each file is read: ``readers.kind_of``."""
    identities: tuple[dict[str, Any], ...]
    """Of each file when the job was prepared, to notice that it has changed: ``stream.file_identity``."""
    keys: tuple[str, ...]
    """JSON fields (parquet: columns) that hold text; plain text files are the text of every key."""
    tokenizer: Tokenizer
    append_eod: bool
    """The tokenizer's eos id ends every document."""
    prepend_bos: bool
    """Its bos id begins every document."""
    on_error: OnError
    """What to do with a bad document: end the work, leave it out, or leave it out and write it down."""
    text_documents: str
    """What a document of a ``.txt`` file is, one of ``readers.TEXT_DOCUMENTS``."""


def prepare_job(
    inputs: Sequence[str | Path],
    json_keys: Sequence[str],
    tokenizer_path: str | Path,
    append_eod: bool,
    prepend_bos: bool = False,
    on_error: OnError = "stop",
    text_documents: str = DEFAULT_TEXT_DOCUMENTS,
) -> Job:
    """Check what the user asks for (see ``Job``), find the files, load the tokenizer.

    Args:
        inputs: files, folders and patterns, in the order their documents shall have (``corpus/readers.py``).

    Raises:
        ConfigError: a needed special id is missing in the tokenizer, a key is named twice, an unknown choice.
        DataError: a missing input or tokenizer, or a damaged one.
    """
    if len(set(json_keys)) != len(json_keys):
        raise ConfigError(74, f"--json-keys {' '.join(json_keys)}", "must not name a key twice", "name each key once")
    if on_error not in ON_ERROR:
        raise _unknown_choice("--on-error", on_error, ON_ERROR)
    if text_documents not in TEXT_DOCUMENTS:
        raise _unknown_choice("--text-documents", text_documents, TEXT_DOCUMENTS)
    files = tuple(expand_inputs(inputs))  # a file that is missing should not be found out after an hour
    kinds = tuple(kind_of(path, text_documents) for path in files)
    identities = tuple(file_identity(path) for path in files)
    tokenizer = load_tokenizer(tokenizer_path)
    if prepend_bos and tokenizer.bos_id is None:
        raise _missing_id("--prepend-bos", "a beginning-of-document", tokenizer)
    if append_eod and tokenizer.eos_id is None:
        raise _missing_id("--append-eod", "an end-of-document", tokenizer)
    keys = tuple(json_keys)
    return Job(files, kinds, identities, keys, tokenizer, append_eod, prepend_bos, on_error, text_documents)


def remarks(job: Job) -> list[str]:
    """What a user may not expect of the datasets of a job, for people."""
    note = "" if job.tokenizer.always_converts else export_note(job.tokenizer)
    found = [text for text in (note, job.tokenizer.assumption) if text]
    if not job.append_eod:
        option = "--append-eod" if job.tokenizer.eos_id is not None else "--prepend-bos"
        if job.prepend_bos:
            found.append("documents begin with bos, and nothing marks their end (no --append-eod): a model does not "
                         "learn to stop")  # fmt: skip
        else:
            found.append(f"nothing marks where a document ends and the next begins (no {option}): a model reads across "
                         "documents as if they were one, and does not learn to stop")  # fmt: skip
    texts = [path for path, kind in zip(job.files, job.kinds) if kind in TEXT_DOCUMENTS]
    return found + _remarks_on_text(job, texts) if texts else found


def _remarks_on_text(job: Job, texts: Sequence[Path]) -> list[str]:
    """The same of its files of plain text."""
    names = f"{texts[0]}" + (f" and {len(texts) - 1:,} more" if len(texts) > 1 else "")
    found = [f"{names}: plain text, {_TEXT_DOCUMENT_NAMES[job.text_documents]} is a document "
             f"(--text-documents {job.text_documents})"]  # fmt: skip
    if json_lines := next((path for path in texts if _begins_as_json(path)), None):
        found.append(f"{json_lines} looks like JSON lines, and its name makes it plain text, braces and keys "
                     "included: rename it to end in .jsonl if that is not meant")  # fmt: skip
    if job.keys != ("text",):
        found.append(f"{names}: plain text has no fields: --json-keys {' '.join(job.keys)} only names the output, "
                     "and all of the text goes into each dataset")  # fmt: skip
    return found


def _begins_as_json(path: Path) -> bool:
    """Whether a file of plain text, which is not compressed, begins as one of JSON lines does."""
    if not path.is_file():
        return False
    with open_regular(path) as file:
        return file.read(2) == b'{"'


def _unknown_choice(option: str, value: str, choices: Sequence[str]) -> ConfigError:
    return ConfigError(77, f"{option}={value}", f"must be one of {', '.join(choices)}", "choose one of these")


def _missing_id(option: str, meaning: str, tokenizer: Tokenizer) -> ConfigError:
    remedy = f"leave {option} out, or use a tokenizer that has one"
    if isinstance(tokenizer, TiktokenTokenizer):
        made = f"python tools/convert_tokenizer.py {shlex.quote(str(tokenizer.path))} hf_tokenizer"
        remedy = (f"its special tokens are in no .tiktoken file: {made} --special-tokens '<|endoftext|>', then "
                  "--tokenizer-model hf_tokenizer")  # fmt: skip
    return ConfigError(70, f"{option} with {tokenizer.path}", f"needs {meaning} id, which this tokenizer lacks", remedy)
