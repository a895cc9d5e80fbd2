"""What a program wrote on standard error without its signs of life, which a slow machine adds after five seconds."""

from __future__ import annotations

import re
import subprocess


def without_activity(text: str) -> str:
    """The text without the lines of ``Activity`` (``base/progress.py``)."""
    return re.sub(r"^.*: [\d,]+ s so far\n", "", text, flags=re.MULTILINE)


def run_quietly(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    """``subprocess.run`` with both outputs as text, the second without signs of life."""
    done = subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    done.stderr = without_activity(done.stderr)
    return done  # type: ignore[no-any-return]
