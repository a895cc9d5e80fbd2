"""What all command-line programs share: an argument parser with one-line errors, and ``run``, which ends a program.

``run`` calls a program's ``main`` and turns an error of the user's into one line on stderr and a documented exit code.
Nothing heavy is imported here, so that ``--help`` of every program answers in well under a second.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import difflib
import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import PurePath
from typing import Any, NoReturn

from megatron_hammer.base.characters import DOUBLE_QUOTES, SINGLE_QUOTES, TYPOGRAPHIC_QUOTES, in_ascii, number_meant
from megatron_hammer.base.errors import ConfigError, DiskError, HammerError, from_exception
from megatron_hammer.base.language import LANGUAGES, user_language
from megatron_hammer.base.paths import unusable_remedy
from megatron_hammer.base.shipped import OF_A_WHEEL
from megatron_hammer.base.streams import OutputKind, Vanished, flush_streams, guard_streams, only_list

READ_ELSEWHERE = (
    "--input",
    "--inputs",
    "--data",
    "--file",
    "--load",
    "--model",
    "--path",
    "--hf",
    "--run",
    "--tokenizer",
)
_QUOTED = re.compile("|".join(f"[{quotes}][^{quotes}]*[{quotes}]" for quotes in (DOUBLE_QUOTES, SINGLE_QUOTES)))
TRACEBACK_VARIABLE = "HAMMER_TRACEBACK"  # set to 1: show where an error line came from


def as_commands(text: str) -> str:
    """Programs by the names that work here: ``hammer doctor`` for ``python tools/doctor.py``; and presets and pages.

    So where the package was installed without its repository, and where a sub-command of ``hammer`` was typed.
    """
    if not (sys.argv[0].startswith("hammer ") or OF_A_WHEEL):
        return text
    text = re.sub(r"(?<![\w./-])examples/configs/([a-z]\w*)\.yaml\b", r"\1", text)
    text = re.sub(r"(?<![\w./-])docs/([a-z_]+)\.md\b", r"hammer help \1", text)
    text = re.sub(r"\bpython -m megatron_hammer\.(train|launch)\b", r"hammer \1", text)
    return re.sub(
        r"(?<![\w./-])(?:python )?tools/([a-z]\w*)\.py\b", lambda found: "hammer " + found[1].replace("_", "-"), text
    )


class ArgumentParser(argparse.ArgumentParser):
    """``argparse`` whose usage errors are ``error[E201]`` lines; no abbreviated options."""

    def __init__(self, **kwargs: Any) -> None:
        self._words: list[str] = []
        self._given: set[str] = set()
        """Options of all calls: argparse may parse twice where options and other words are mixed."""
        self.option_remedy: Callable[[str], str] = lambda option: ""
        """What an option that there is not, such as another program's, is here."""
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        prog = str(kwargs.get("prog", ".py"))
        if sys.argv[0].startswith("hammer ") and (".py" in prog or prog.startswith("python -m ")):
            kwargs["prog"] = sys.argv[0] + prog.partition(".py")[2]  # a sub-command (command.py): what was typed
        super().__init__(**kwargs)

    def format_help(self) -> str:
        """The help, with programs as they are called here."""
        return as_commands(super().format_help())

    def print_help(self, file: Any = None) -> None:
        """Print the help, all that the program is for once it is asked for it."""
        only_list()
        super().print_help(file)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse, but an option that is written with underscores is the one with dashes."""
        return self._checked(super().parse_known_args(self._understood(args), namespace))

    def parse_known_intermixed_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """The same where options and other words are mixed: from Python 3.12.8 on it does not call the one above."""
        return self._checked(super().parse_known_intermixed_args(self._understood(args), namespace))

    def _understood(self, args: Any) -> list[str]:
        """The words with options as they are spelled here; those of the command line where none are given."""
        self._words = [self._with_dashes(word) for word in (sys.argv[1:] if args is None else args)]
        for word in self._words:
            if not word.isascii() and not word.startswith("-") and (meant := self._meant_as_option(word)):
                rule = f"was called wrongly: {meant[0]} is no option: its dash is not that of the keyboard"
                raise ConfigError(1, self.prog, rule, f"write {meant[1]}")
        self._given |= {word.partition("=")[0] for word in self._words}
        return self._words

    def _checked(self, parsed: tuple[Any, list[str]]) -> tuple[Any, list[str]]:
        """What was parsed, unless it has a path that is none."""
        for name, value in list(vars(parsed[0]).items()):
            for path in value if isinstance(value, list) else [value]:
                if isinstance(path, PurePath) and (remedy := unusable_remedy(str(path))):
                    shown = re.sub(r"^([a-z0-9+.-]{2,}):/+", r"\1://", str(path))
                    raise ConfigError(88, f"{name} {shown}", "is no path on this machine", remedy)
        return parsed

    def add_language(self, of_what: str) -> None:
        """``--language``: that of the system, unless it is chosen.

        Args:
            of_what: for the help, as "the picture".
        """
        self.add_argument("--language", choices=LANGUAGES, default=user_language(),
                          help=f"language of {of_what} (default: the system's, LANG; now %(default)s)")  # fmt: skip

    def refuse_idle(self, where: str, *options: str) -> None:
        """Refuse options that were given although they do nothing here.

        Args:
            where: the reason, as "without --write FILE.yaml".

        Raises:
            ConfigError: E201.
        """
        for option in options:
            if option in self._given:
                other = where.partition("without ")[2]
                remedy = f"leave {option} out" + (f", or add {other}" if other else "")
                raise ConfigError(1, self.prog, f"was called wrongly: {option} does nothing {where}", remedy)

    def _with_dashes(self, argument: str) -> str:
        name, equals, value = argument.partition("=")
        dashed = name.replace("_", "-")
        unknown = name.startswith("--") and name not in self._option_string_actions
        return dashed + equals + value if unknown and dashed in self._option_string_actions else argument

    def _meant_as_option(self, word: str) -> tuple[str, str] | None:
        """A word with one dash or a typographic one, such as ``—seed`` or ``-seed``, and the option that it means."""
        name = in_ascii(word).partition("=")[0]
        option = "--" + name.lstrip("-").replace("_", "-")
        is_one = name.startswith("-") and option in self._option_string_actions
        return (word.partition("=")[0], option) if is_one and not word.startswith("--") else None

    def _given_for(self, missing: list[str]) -> str:
        """What of the command line was probably meant to be the options that are missing."""
        if meant := next(filter(None, map(self._meant_as_option, self._words)), None):
            return f"write {meant[1]}, not {meant[0]}"
        options = [word.partition("=")[0] for word in self._words if word.startswith("--")]
        unknown = [option for option in options if option not in self._option_string_actions]
        for option in unknown:
            if near := difflib.get_close_matches(option, missing, n=1, cutoff=0.6):
                return f"did you mean {near[0]}, not {option}?"
        if len(unknown) == len(missing) == 1:
            return f"did you mean {missing[0]}, not {unknown[0]}?"
        takes_words = any(not action.option_strings for action in self._actions)
        if takes_words or options or len(self._words) != len(missing) or not missing[0].startswith("-"):
            return "add " + ", ".join(self._shown(name) for name in missing)
        return "write " + " ".join(f"{name.split('/')[0]} {word}" for name, word in zip(missing, self._words))

    def _unit_of(self, option: str) -> str:
        """What the number of an option is counted in: ``mb`` of ``--train-mb MB``, ``gb`` of ``--memory GiB``."""
        action = self._option_string_actions.get(option)
        size = re.fullmatch(r"([KMGT])i?B(/s)?", str(action.metavar)) if action is not None else None
        return f"{size[1].lower()}b" if size else option.rsplit("-", 1)[-1]

    def _shown(self, name: str) -> str:
        """``--seed S`` of ``--seed``, as the help shows it; positional arguments are their own names."""
        action = self._option_string_actions.get(name.split("/")[0])
        if action is None or action.nargs == 0:
            return name
        value = action.metavar or (action.dest.upper() if action.choices is None else next(iter(action.choices)))
        return f"{name.split('/')[0]} {value if isinstance(value, str) else ' '.join(value)}"

    def error(self, message: str) -> NoReturn:
        remedy = f"see {self.prog} --help"
        message = message.replace(", group.field=value", "")  # argparse counts it among what is required
        if setting := re.search(r"(?<!\S)--?([a-z_]+\.[a-z0-9_.]+(=\S*)?)", message):
            remedy = f"settings have no dashes: write {setting[1] if setting[2] else setting[1] + '=VALUE'}"
        elif choice := re.search(r"argument (\w+(?:\|\w+)+): invalid choice: '([^']*)'", message):
            commands = choice[1].split("|")
            message = f"{choice[2]!r} is none of {', '.join(commands)}"
            near = difflib.get_close_matches(choice[2], commands, n=1)
            remedy = f"choose one of {', '.join(commands)}"
            if near:
                remedy = f"did you mean {near[0]}?"
            elif os.path.lexists(choice[2]) or re.search(r"[/.\\]", choice[2]):
                remedy = f"say which first: {self.prog} {commands[0]} {choice[2]}"
        elif alternatives := re.search(r"one of the arguments (--\S+(?: --\S+)*) is required", message):
            names = alternatives[1].split()
            unknown = [w.partition("=")[0] for w in self._words if w.startswith("--")]
            unknown = [option for option in unknown if option not in self._option_string_actions]
            meant = f"write {names[0]}, not {unknown[0]}" if len(unknown) == 1 else f"add {self._shown(names[0])}"
            remedy = f"{meant} (see {self.prog} --help)"
        elif "required: " in message and (given := self._given_for(message.partition("required: ")[2].split(", "))):
            remedy = f"{given} (see {self.prog} --help)"
        elif wrong := re.search(r"invalid (int|float) value: '([^']*)'", message):
            kind, example = ("whole number", "1000") if wrong[1] == "int" else ("number", "0.5")
            option = message[: wrong.start()].removeprefix("argument ").split("/")[0].rstrip(": ")
            meant = number_meant(wrong[2], wrong[1] == "int", unit=self._unit_of(option))
            message = f"{message[: wrong.start()]}{wrong[2]!r} is no {kind}"
            remedy = f"write digits, {meant or 'such as ' + example}"
        elif wrong_choice := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            names = [name.strip(" '") for name in wrong_choice[2].split(",")]
            near = difflib.get_close_matches(wrong_choice[1], names, n=1, cutoff=0.5)
            remedy = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(names)}"
        elif "unrecognized arguments: " in message and (
            dashed := next(filter(None, map(self._meant_as_option, message.partition("arguments: ")[2].split())), None)
        ):
            remedy = f"write {dashed[1]}, not {dashed[0]}"
        elif re.search(rf"unrecognized arguments: .*[{TYPOGRAPHIC_QUOTES}]", message) and (
            quoted := _QUOTED.search(" ".join(self._words))
        ):
            remedy = f'write "{quoted[0][1:-1]}", in the quotes of the keyboard'
        elif "unrecognized arguments: -" in message:
            option = message.partition("unrecognized arguments: ")[2].split()[0].partition("=")[0]
            if near := difflib.get_close_matches(option, list(self._option_string_actions), n=1, cutoff=0.7):
                remedy = f"did you mean {near[0]}? (see {self.prog} --help)"
            elif meant := self.option_remedy(option):
                remedy = meant
            elif option in READ_ELSEWHERE and (names := [a for a in self._actions if not a.option_strings]):
                remedy = f"what it reads stands without an option's name: {self.prog} {names[0].metavar} ..."
        raise ConfigError(1, self.prog, f"was called wrongly: {message}", remedy)


def run(main: Callable[[], int | None], output: OutputKind = OutputKind.REPORT) -> NoReturn:
    """Run a program's ``main`` and leave with its documented exit code; a user's mistake is one line on stderr.

    Args:
        main: returns the exit code, None for 0.
        output: what standard output is to this program, and so what a failure of it means (``base/streams.py``). A
            program that only lists says so by ``only_list`` when it knows.
    """
    guard_streams(output)
    raise_open_files_limit()
    hear_of_children()
    code = end_of(main)
    lost = flush_streams()
    if lost is not None and code == 0:
        code = report_error(lost)
    sys.exit(code)


def end_of(main: Callable[[], int | None]) -> int:
    """The exit code with which ``main`` ends, however it does; what there is to say about it is on stderr."""
    try:
        _check_working_folder()
        return main() or 0
    except SystemExit as ending:  # argparse, after --help
        if isinstance(ending.code, str):
            print(ending.code, file=sys.stderr)
            return 1
        return int(ending.code or 0)  # argparse and we give integers
    except Vanished:  # the reader of a listing
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        known = from_exception(error, "the program")
        if known is None:
            raise  # a mistake of ours: the traceback belongs to the report
        return report_error(known)


def _check_working_folder() -> None:
    """Raise where the working folder was removed: libraries of torch end the process then, naming a file of theirs."""
    try:
        os.getcwd()
    except FileNotFoundError:
        remedy = 'cd "$PWD" if it was made anew, or change to another folder'
        raise DiskError(1, "the working folder", "is not there any more", remedy) from None


def print_json(value: Any) -> None:
    """One JSON document a line on standard output; ASCII only where that is not UTF-8: every reader can take it."""
    unicode = (sys.stdout.encoding or "utf-8").lower().replace("-", "") == "utf8"
    print(json.dumps(value, ensure_ascii=not unicode), flush=True)


def hear_of_children() -> None:
    """Have the system keep for us how children end, although whoever started this program ignores SIGCHLD.

    Else a launcher waits for its ranks for ever, and a child that failed looks like one that did not.
    """
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def raise_open_files_limit() -> None:
    """Let the process and its children have as many open files as the system grants them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # macOS reports a limit that it does not grant
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def keep_torch_quiet() -> None:
    """Of what torch's C++ side writes to stderr by itself leave errors only; before torch is imported.

    Its warnings (a peer's name that does not resolve, a store that is not there yet) are no matter of the user's, and
    what they lead to is said in our own words. A value that the user has set stays.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def leave(code: int) -> NoReturn:
    """End a process whose work is done, or has failed: exit functions and output, but no teardown of the interpreter.

    One rank among several ends like this. After a failure a tidy end would wait for the other ranks, and at the very
    end of a good run a thread of a communication library that is still there has the whole process abort.
    """
    atexit._run_exitfuncs()
    flush_streams()
    os._exit(code)


def report_error(error: HammerError) -> int:
    """Print the one line (and the traceback where ``HAMMER_TRACEBACK=1`` asks for it); return the exit code."""
    if os.environ.get(TRACEBACK_VARIABLE) == "1":
        import traceback

        traceback.print_exception(error)
    print(as_commands(str(error)), file=sys.stderr, flush=True)
    return error.exit_code
