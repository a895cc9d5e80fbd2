"""Reads an export's ``certificate.json``: what was proved, of which files, and whether a folder holds nothing else.

``certificate.py`` writes the certificate; it is read before an export is replaced or published. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from megatron_hammer.base.errors import RefusedError
from megatron_hammer.huggingface.config import read_json

CERTIFICATE = "certificate.json"


def listed_files(certificate: Mapping[str, Any]) -> dict[str, tuple[int, str]] | None:
    """Name -> size and XXH3-128 of each file that was proved; None where they are not listed so."""
    files = certificate.get("files")
    if not isinstance(files, dict) or not files:
        return None
    found = {}
    for name, facts in files.items():
        size, content = (facts.get("size"), facts.get("xxh3_128")) if isinstance(facts, dict) else (None, None)
        if (
            type(size) is not int
            or not isinstance(content, str)
            or Path(name).is_absolute()
            or ".." in Path(name).parts
        ):
            return None
        found[name] = size, content
    return found


def certificate_line(certificate: dict[str, Any]) -> str:
    """One line on what was proved."""
    worst = max(certificate["texts"].values(), key=lambda r: r["max_difference"] / (r["max_logit"] or 1.0))
    return (
        f"certificate passed: max |difference| {worst['max_difference']:.2g} at max |logit| {worst['max_logit']:.3g} "
        f"(bound {certificate['bound']:g} of it), step {certificate['step']}, {certificate['dtype']}"
    )


def remark_on(facts: Mapping[str, Any]) -> str:
    """A line for people where a certificate says of the tokenizer that it is no proved tokenizer.json; else nothing."""
    if facts.get("proved") is False:
        return f"the tokenizer is not proved: {facts['reason']}"
    if facts.get("form") == "sentencepiece":
        from megatron_hammer.tokenizer.convert import form_line  # not for every reader of a certificate

        return f"the tokenizer is exported as {form_line(facts['reason'])}"
    return "" if facts.get("present", True) else "the checkpoint has no tokenizer: the model is exported without one"


def recorded_documents(folder: Path) -> tuple[bool | None, bool | None]:
    """Whether documents began with bos and ended with eos in training, as an export recorded; None: it does not."""
    if not (folder / CERTIFICATE).is_file():
        return None, None
    documents = read_json(folder / CERTIFICATE).get("documents")
    if not isinstance(documents, dict):
        return None, None
    begins, ends = (documents.get(name) for name in ("begin_with_bos", "end_with_eos"))
    return begins if isinstance(begins, bool) else None, ends if isinstance(ends, bool) else None


def check_output(output: Path, beside: Collection[str] = ()) -> None:
    """Raise ``RefusedError`` E525 unless ``output``, which exists, may be replaced: empty, or all an export of ours.

    Args:
        beside: names of files that were put beside an export, and may be replaced with it.
    """
    if not output.is_dir():
        raise RefusedError(25, f"--output {output}", "is a file", "name a folder")
    found = {str(p.relative_to(output)) for p in output.rglob("*") if p.is_symlink() or not p.is_dir()}
    ours: set[str] = set()
    if CERTIFICATE in found:
        ours = {CERTIFICATE, *beside, *(listed_files(read_json(output / CERTIFICATE)) or ())}
    if found - ours:
        raise RefusedError(
            25,
            f"--output {output}",
            f"holds {min(found - ours)}, which no earlier export wrote",
            "name another folder or move that away",
        )
