"""What all command-line programs share: an argument parser with one-line errors, and ``run``, which ends a program.

``run`` calls a program's ``main`` and turns an error of the user's into one line on stderr and a documented exit code.
Nothing heavy is imported here, so that ``--help`` of every program answers in well under a second.
"""

from __future__ import annotations

import argparse
import atexit
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from megatron_hammer.base.errors import ConfigError, HammerError, from_exception

TRACEBACK_VARIABLE = "HAMMER_TRACEBACK"  # set to 1: show where an error line came from


class ArgumentParser(argparse.ArgumentParser):
    """``argparse`` whose usage errors are ``error[E201]`` lines; no abbreviated options."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**kwargs)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(1, self.prog, f"was called wrongly: {message}", f"see {self.prog} --help")


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a program's ``main`` and leave with its documented exit code; a user's mistake is one line on stderr."""
    try:
        code = main() or 0
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except Exception as error:
        known = from_exception(error, "the program")
        if known is None:
            raise  # a mistake of ours: the traceback belongs to the report
        code = report(known)
    sys.stdout.flush()
    sys.exit(code)


def leave(code: int) -> NoReturn:
    """End a process whose work is done, or has failed: exit functions and output, but no teardown of the interpreter.

    One rank among several ends like this. After a failure a tidy end would wait for the other ranks, and at the very
    end of a good run a thread of a communication library that is still there has the whole process abort.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def report(error: HammerError) -> int:
    """Print the one line (and the traceback where ``HAMMER_TRACEBACK=1`` asks for it); return the exit code."""
    if os.environ.get(TRACEBACK_VARIABLE) == "1":
        import traceback

        traceback.print_exception(error)
    print(error, file=sys.stderr, flush=True)
    return error.exit_code
