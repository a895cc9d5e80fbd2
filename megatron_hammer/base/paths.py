"""Remedies for wrong paths: what a path that does not exist probably means, and what a folder in its place holds."""

from __future__ import annotations

import difflib
import glob
import os
import re
from pathlib import Path

from megatron_hammer.base.characters import in_ascii
from megatron_hammer.base.errors import ConfigError
from megatron_hammer.base.progress import say

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", re.DOTALL)
_WINDOWS = re.compile(r"([A-Za-z]):[\\/](.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$\{?[A-Za-z_]\w*\}?")
_OF_THE_SYSTEM = ("/", "/bin", "/boot", "/dev", "/etc", "/home", "/lib", "/lib64", "/opt", "/proc", "/root", "/run",
                  "/sbin", "/srv", "/sys", "/tmp", "/usr", "/var")  # fmt: skip

RENAME_REMEDY = "rename it; a whole folder from GBK, say: convmv -f GBK -t UTF-8 -r --notest FOLDER"
"""For a name whose bytes are no UTF-8, as archives from Chinese Windows unpack."""


def is_unicode(name: str | Path) -> bool:
    """Whether all bytes of a file's name are text here; libraries in C++ and YAML take no other."""
    try:
        str(name).encode()
    except UnicodeEncodeError:
        return False
    return True


def unusable_remedy(text: str) -> str:
    """What to write for a path that is none on this machine: an address, ``~``, ``$NAME``, ``C:\\``; "" for others.

    A path that is there is one, whatever it looks like.
    """
    if "://" not in text and os.path.lexists(text):
        return ""
    if address := _ADDRESS.fullmatch(text):
        scheme, rest = address[1].lower(), address[2]
        if scheme == "file":
            return f"write the path alone: /{rest}"
        if scheme == "hf":
            repository = rest.split("/", 1)[1] if rest.startswith(("datasets/", "spaces/")) else rest
            kind = "--repo-type dataset " if rest.startswith("datasets/") else ""
            return (
                f"only disks of this machine are used; fetch it first: hf download {kind}{repository} --local-dir NEW"
            )
        if scheme in ("http", "https"):
            return f"only disks of this machine are used; fetch it first: curl -LO {scheme}://{rest}"
        return f"only disks of this machine are used; copy it from {scheme}:// first, or mount it as a folder"
    if text == "~" or text.startswith("~/"):
        return f"the shell left ~ as it is here; write {os.path.expanduser(text)}"
    if variable := _VARIABLE.search(text):
        return (
            f"the shell left {variable[0]} as it is: use double quotes instead of single ones, and see that it is set"
        )
    if windows := _WINDOWS.fullmatch(text):
        rest = windows[2].replace("\\", "/")
        return f"that is a path of Windows; in WSL2 it is /mnt/{windows[1].lower()}/{rest}"
    plain = in_ascii(text)
    if plain.startswith(('"', "'")) and plain[0] == plain[-1] and len(plain) > 2:
        return f"the quotes are part of the name here; write {text[1:-1]}, or quotes of the shell (' or \") around it"
    if plain != text and os.path.lexists(plain):
        return f"did you mean {plain}?"
    words = [word for word in re.split(r"[,;]", plain) if word]
    if len(words) > 1 and all(map(os.path.lexists, words)):
        return f"these are several names: put blanks between them, {' '.join(words)}"
    return ""


def output_remedy(text: str) -> str:
    """What to write for a folder that a run shall have for itself, where this one cannot be it; "" where it can."""
    if remedy := unusable_remedy(text):
        return remedy
    whole = os.path.realpath(text)
    if whole in _OF_THE_SYSTEM or whole == os.path.realpath(os.path.expanduser("~")):
        return f"it belongs to the system or holds other things: name a folder in it, such as {Path(whole) / 'my_run'}"
    return ""


def what_is(path: Path) -> str:
    """In words, what of ours a folder is by what it holds; "" where nothing is known of it."""
    if (path / "manifest.json").is_file() and re.fullmatch(r"step-\d+", path.name):
        return "a checkpoint"
    if (path / "metrics.jsonl").is_file() or any(path.glob("checkpoints/step-*")):
        return "the folder of a run"
    if (path / "config.json").is_file():
        return "a Hugging Face model"
    if any((path / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        return "the folder of a tokenizer"
    if path.is_dir() and any(path.glob("*.idx")):
        return "a folder of datasets"
    return ""


def neighbour_of(path: Path) -> Path | None:
    """An existing path that differs in one name, spelt alike or with another ending; None where there is none."""
    parents = [path, *path.parents]
    there = next((parent for parent in parents[1:] if parent.is_dir()), None)
    if there is None:
        return None
    missing = parents[parents.index(there) - 1]
    try:
        names = sorted(os.listdir(there))
    except OSError:
        return None
    below = path.relative_to(missing)
    fitting = [
        name
        for name in names
        if name != missing.name and (there / name / below if below.parts else there / name).exists()
    ]
    same_stem = [name for name in fitting if Path(name).stem == missing.stem]
    close = difflib.get_close_matches(missing.name, fitting, n=1, cutoff=0.75) or same_stem[:1]
    return there / close[0] / below if close else None


def missing_remedy(path: Path, otherwise: str) -> str:
    """The remedy for a path that is not there; ``otherwise`` where nothing is spelt alike."""
    if remedy := unusable_remedy(os.fspath(path)):
        return remedy
    near = neighbour_of(path)
    if near is not None:
        return f"did you mean {near}?"
    if path.name and (datasets := sorted(path.parent.glob(f"{glob.escape(path.name)}_*.idx"))):
        return f"did you mean the dataset {datasets[0].with_suffix('')}?"
    return otherwise if path.is_absolute() else f"{otherwise} (looked for {Path.cwd() / path})"


def check_output_prefix(option: str, prefix: str | Path, ending: str) -> Path:
    """The prefix of files to write, which ends in a name.

    Args:
        ending: what follows it in the first file's name, such as ``_text_document.idx``.

    Raises:
        ConfigError: E288 it ends in a slash, or is a folder's other name.
    """
    text = os.fspath(prefix)
    if text.endswith(os.sep) or Path(text).name in ("", ".."):
        remedy = f"name the files too: {option} {Path(text) / 'NAME'}"
        raise ConfigError(
            88, f"{option}={text}", f"names a folder, and the files in it would be called {ending}", remedy
        )
    added, stem = re.sub(r"\.idx$", "", ending), re.sub(r"\.(bin|idx|jsonl)$", "", text)
    meant = stem.removesuffix(added) if added else stem
    if meant != text and Path(meant).name:
        say(f"note: the files are called {text}{ending} and so on; {option} {meant} makes them {meant}{ending}")
    if Path(text).is_dir():
        say(f"note: {text} is a folder: {text}{ending} is written beside it; {Path(text) / 'NAME'} would be in it")
    return Path(text)
