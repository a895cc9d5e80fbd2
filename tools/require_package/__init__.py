"""Imported first by every program here: where its Python is another than the one that it needs, one line says which.

That is the Python of the machine as a rule, in a shell in which .venv was not activated, or that of another clone,
whose code would run here unnoticed. A folder, because every file beside it is a program.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec

NEEDED = ("megatron_hammer", "numpy", "orjson", "xxhash", "yaml", "torch")  # by any program, to begin with
CLONE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))


def clone_of(package: ModuleSpec | None) -> str | None:
    """The clone whose package a Python has found; None where it is installed without one."""
    folder = os.path.dirname(os.path.dirname(os.path.realpath((package and package.origin) or "")))
    return folder if os.path.isdir(os.path.join(folder, "tools", "require_package")) else None


def obstacle() -> str | None:
    """What is wrong with this Python, and the cure; None where nothing is."""
    if sys.platform == "win32":
        return (
            "error[E292]: megatron_hammer cannot run on Windows itself: it needs POSIX (fcntl, resource, signals, "
            "flock), which Windows lacks; use WSL2, where it is Linux: wsl --install, then the README's commands there"
        )
    cure = "source .venv/bin/activate (bash tools/make_venv.sh makes it)"
    install = "use the Python that has all: " + cure
    if os.path.isfile(os.path.join(CLONE, "__init__.py")):  # no clone: the package, where a wheel has its programs
        install = "install what is missing: %s -m pip install megatron_hammer" % sys.executable  # noqa: UP031
    if sys.version_info < (3, 11):  # noqa: UP036
        version = "%d.%d" % sys.version_info[:2]  # noqa: UP031
        return f"error[E250]: {sys.executable}, which runs this program, is Python {version}, not 3.11 to 3.14; {cure}"
    missing = next((name for name in NEEDED if importlib.util.find_spec(name) is None), None)
    if missing is not None:
        what = f"the module {missing} is not there for {sys.executable}, which runs this program"
        return f"error[E251]: {what}; {install}"
    found = clone_of(importlib.util.find_spec("megatron_hammer"))
    if found not in (None, CLONE) and os.path.isdir(os.path.join(CLONE, "megatron_hammer")):
        what = f"{sys.executable} has the package megatron_hammer of {found}, and this program is of {CLONE}"
        return f"error[E251]: {what}; there, {cure}"
    return None


said = obstacle()
if said is not None:
    sys.stderr.write(said + "\n")
    sys.exit(2)
