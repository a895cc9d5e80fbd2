"""Text without what tells whose machine it is from: paths, secrets, names of hosts and people, addresses.

``Anonymiser`` knows what this process can know of it (its environment, its folders, its user and host) and replaces
that, then everything that has the form of a path or an address. It is for text that was not written by us, such as
messages of exceptions; it errs on the side of replacing too much. Needs no torch.
"""

from __future__ import annotations

import getpass
import os
import platform
import re
import socket
import sys
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

PATH, SECRET, PERSON, HOST, VALUE, ADDRESS = "<path>", "<secret>", "<user>", "<host>", "<value>", "<address>"
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASS|KEY|CREDENTIAL|AUTH|COOKIE|LICEN|PWD|DSN", re.IGNORECASE)
_USER_NAMES = ("USER", "LOGNAME", "USERNAME", "SUDO_USER", "LNAME", "GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME", "NAME")
_HOST_NAMES = ("HOSTNAME", "HOST", "COMPUTERNAME", "SLURMD_NODENAME", "SLURM_NODELIST", "SLURM_JOB_NODELIST",
               "SLURM_SUBMIT_HOST", "MASTER_ADDR", "SSH_CLIENT", "SSH_CONNECTION")  # fmt: skip
_TELLS_NOTHING = {"root", "user", "localhost", "true", "false", "none", "null", "auto", "yes", "python", "python3",
                  "megatron_hammer", "offline", "online", "disabled", "error", "warning", "linux"}  # fmt: skip
_LEAST_NAME, _LEAST_SECRET, _LEAST_VALUE = 2, 4, 6  # characters; shorter ones are in every text
_FRAMES = re.compile(r"[^\s\"'<>]*/(?:site-packages|dist-packages|lib/python3\.\d+)/")
_END = r"[^\s\"'`<>|;,()\[\]{}]"
_PATHS = re.compile(rf"{PATH}{_END}*|(?<![\w.<>/])(?:file:)?/+[^\s/\"'`<>|;,()\[\]{{}}]{_END}*")
_OTHER_PATHS = re.compile(rf"~[\w.-]*/{_END}*|\b[A-Za-z]:[\\/]{_END}+|\\\\[\w.-]+\\{_END}+")
_ADDRESSES = re.compile(
    r"\b[a-z][a-z0-9+.-]*://[^\s\"'<>]+"  # with user, host and query
    r"|[\w.+-]+@[\w-]+(?:\.[\w-]+)+"
    r"|\b(?:[\w-]+\.)+(?!py\b|cpp\b|hpp\b|cuh?\b|h\b|jsonl?\b|yaml\b)[a-z]{2,}:\d+\b"
    r"|\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b"
    r"|\b(?:[0-9a-f]{2}[:-]){5}[0-9a-f]{2}\b"
    r"|(?<![\w:])(?:[0-9a-f]{1,4}:){7}[0-9a-f]{1,4}(?![\w:])"
    r"|(?<![\w:])(?:[0-9a-f]{1,4}(?::[0-9a-f]{1,4})*)?::(?:[0-9a-f]{1,4}(?::[0-9a-f]{1,4})*)?(?![\w:])",
    re.IGNORECASE,
)


class Anonymiser:
    """Replaces what is private in a text.

    Args:
        environment: of the process.
        folders: further ones whose names are private, such as that of a config.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ, folders: Iterable[str | Path] = ()) -> None:
        self._package = str(Path(__file__).resolve().parents[2]) + "/"
        here = [_home(), tempfile.gettempdir(), sys.prefix, sys.base_prefix, *folders]
        with suppress(OSError):  # it may have been deleted
            here.append(os.getcwd())
        named = {name: value.strip() for name, value in environment.items() if value.strip()}
        words: dict[str, str] = {}
        for folder in (*map(str, here), *(value for value in named.values() if value.startswith("/"))):
            words |= {form: PATH for form in (folder, os.path.realpath(folder)) if len(form.strip("/")) > 1}
        secret = {name for name in named if _SECRET_NAME.search(name)}
        for name, value in named.items():
            least, shown = (_LEAST_SECRET, SECRET) if name in secret else (_LEAST_VALUE, VALUE)
            for part in {value, *re.split(r"[\s,;:@=?&]+", value)}:
                if len(part) >= least and not _is_plain(part):
                    words.setdefault(part, shown)
        self._words = _by_length(words)
        self._names = _by_length(dict.fromkeys(_hosts(named), HOST) | dict.fromkeys(_people(named, _home()), PERSON))

    def text(self, text: str) -> str:
        """The text without what is private in it."""
        text = _FRAMES.sub("", text).replace(self._package, "")
        for word, shown in self._words:
            text = text.replace(word, shown)
        return self._without_names(_OTHER_PATHS.sub(PATH, _PATHS.sub(PATH, _ADDRESSES.sub(ADDRESS, text))))

    def own(self, text: str) -> str:
        """A text of ours, such as a version or the name of a device, without the names of people and hosts."""
        return self._without_names(text)

    def _without_names(self, text: str) -> str:
        for name, shown in self._names:
            text = re.sub(rf"(?<![A-Za-z0-9<]){re.escape(name)}(?![A-Za-z0-9>])", shown, text, flags=re.IGNORECASE)
        return text


def _is_plain(word: str) -> bool:
    """Whether it is in every text: a number, a version, a word that tells nothing."""
    return word.lower() in _TELLS_NOTHING or re.fullmatch(r"[\d.+-]{1,9}", word) is not None


def _by_length(words: Mapping[str, str]) -> list[tuple[str, str]]:
    """The longest first, each also as other programs write characters beyond ASCII."""
    forms = {form: shown for word, shown in words.items()
             for form in (word, word.encode("unicode_escape").decode(), quote(word))}  # fmt: skip
    return sorted(forms.items(), key=lambda item: -len(item[0]))


def _home() -> Path:
    """The user's folder; the root, which tells nothing, where a container knows of none."""
    try:
        return Path.home()
    except RuntimeError:
        return Path("/")


def _hosts(named: Mapping[str, str]) -> set[str]:
    found = {platform.node(), *(part for name in _HOST_NAMES for part in re.split(r"[\s,]+", named.get(name, "")))}
    with suppress(OSError):
        found.add(socket.gethostname())
    for name in [name for name in found if not name.replace(".", "").isdigit()]:
        label, _, domain = name.partition(".")
        found |= {label, domain if "." in domain else ""}
    return {name for name in found if len(name) >= _LEAST_NAME and not _is_plain(name)}


def _people(named: Mapping[str, str], home: Path) -> set[str]:
    found = {home.name, *(named.get(name, "") for name in _USER_NAMES)}
    with suppress(Exception):  # no such user in a container's list
        found.add(getpass.getuser())
    with suppress(Exception):
        import pwd

        entry = pwd.getpwuid(os.getuid())
        found |= {entry.pw_name, *re.split(r"[\s,]+", entry.pw_gecos)}
    return {name for name in found if len(name) >= _LEAST_NAME and not _is_plain(name)}
