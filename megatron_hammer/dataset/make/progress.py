"""What the user sees while datasets are made."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from megatron_hammer.base.progress import say

if TYPE_CHECKING:
    from tqdm import tqdm

_REPORT_SECONDS = 10.0  # between two plain progress lines


class BuildProgress:
    """A bar on a terminal, else a plain line now and then, on stderr: how far, and how fast.

    How far: in bytes of the files, as on disk, with those of the run before. How fast: in bytes of text and in tokens,
    of this run alone. (``base/progress.py`` counts bytes of one sort.)
    """

    def __init__(self, name: str, total_bytes: int, done_bytes: int, tokens: int) -> None:
        self.name, self.total_bytes, self.done_bytes, self._tokens_before = name, total_bytes, done_bytes, tokens
        self.raw_bytes = self.text_bytes = self.tokens = 0  # of this run
        self._started = self._reported = time.monotonic()
        self._bar: tqdm | None = None

    def __enter__(self) -> BuildProgress:
        if sys.stderr.isatty():
            import tqdm

            self._bar = tqdm.tqdm(
                total=self.total_bytes, initial=self.done_bytes, desc=self.name, unit="B", unit_scale=True
            )
        return self

    def advance(self, raw_bytes: int, text_bytes: int, tokens: int) -> None:
        """Account for some more; ``tokens`` are all that there are now."""
        self.done_bytes += raw_bytes
        self.raw_bytes += raw_bytes
        self.text_bytes += text_bytes
        self.tokens = tokens - self._tokens_before
        now = time.monotonic()
        seconds = max(now - self._started, 1e-9)
        if self._bar is not None:
            self._bar.update(raw_bytes)
            self._bar.set_postfix_str(self._rates(seconds), refresh=False)
        elif now - self._reported >= _REPORT_SECONDS:
            self._reported = now
            left = max(self.total_bytes - self.done_bytes, 0) * seconds / max(self.raw_bytes, 1)
            share = self.done_bytes / max(self.total_bytes, 1)
            say(f"{self.name}: {self.done_bytes / 1e6:,.0f} of {self.total_bytes / 1e6:,.0f} MB ({share:.0%}), "
                 f"{self._rates(seconds)}, {left:,.0f} s left")  # fmt: skip

    def pass_over(self, raw_bytes: int, tokens: int) -> None:
        """Account for something that was done before this run."""
        self.done_bytes += raw_bytes
        self._tokens_before += tokens
        if self._bar is not None:
            self._bar.update(raw_bytes)

    def _rates(self, seconds: float) -> str:
        """Of text, uncompressed."""
        return f"{self.text_bytes / seconds / 1e6:,.2f} MB/s, {self.tokens / seconds:,.0f} tokens/s"

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
