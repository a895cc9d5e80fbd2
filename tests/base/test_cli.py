"""Options that are nearly right, and values that are no numbers: one line that names the cure."""

from __future__ import annotations

import importlib
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from megatron_hammer.base.cli import ArgumentParser, end_of
from megatron_hammer.base.errors import ConfigError


def parser() -> ArgumentParser:
    parser = ArgumentParser(prog="p")
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="group.field=value")
    parser.add_argument("--vocab-size", type=int)
    parser.add_argument("--top_k", type=float)
    return parser


def test_underscores_are_dashes() -> None:
    read = parser().parse_args(["c.yaml", "--vocab_size", "8", "--top_k=2"])
    assert (read.vocab_size, read.top_k) == (8, 2.0)
    assert parser().parse_args(["c.yaml", "--vocab_size=9"]).vocab_size == 9


def test_options_and_commands_that_were_left_out() -> None:
    tool = ArgumentParser(prog="t")
    tool.add_argument("--load", required=True)
    tool.add_argument("--output", required=True)
    joining = ArgumentParser(prog="m")
    joining.add_argument("prefixes", nargs="+", metavar="P")
    joining.add_argument("--seed", type=int, required=True, metavar="S")
    commands = ArgumentParser(prog="i")
    commands.add_subparsers(required=True, metavar="stats|show").add_parser("stats")
    for program, arguments, words in (
        (tool, ["runs/a", "runs/b"], "write --load runs/a --output runs/b (see t --help)"),
        (tool, ["--load", "x", "--output-prefix", "y"], "did you mean --output, not --output-prefix?"),
        (tool, ["--checkpoint", "x", "--output", "y"], "did you mean --load, not --checkpoint?"),
        (joining, ["a", "b"], "required: --seed; add --seed S (see m --help)"),  # a and b are what it takes
        (joining, ["--seed", "1", "--input", "a"], "what it reads stands without an option's name: m P ..."),
        (commands, ["data/zh"], "'data/zh' is none of stats, show; say which first: i stats data/zh"),
        (commands, ["stat"], "did you mean stats?"),
    ):
        with pytest.raises(ConfigError, match="E201") as caught:
            program.parse_args(arguments)
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["c", "--vocab-size", "8k"], "'8k' is no whole number; write digits, 8000"),
        (["c", "--vocab-size", "8,000"], "write digits, 8000"),
        (["c", "--vocab-size", "two"], "'two' is no whole number; write digits, such as 1000"),
        (["c", "--top_k", "x"], "'x' is no number"),
        ([], "required: CONFIG.yaml; add CONFIG.yaml (see p --help)"),
        (["c", "--vocab-size", "8，000"], "write digits, 8000"),
        (["c", "--vocab-size", "1e3"], "write digits, 1000"),
        (["c", "-vocab-size", "3"], "write --vocab-size, not -vocab-size"),
        (["c", "—vocab-size", "3"], "write --vocab-size"),
        (["c", "–vocab_size=3"], "write --vocab-size"),
        (["c", "--vocabsize", "3"], "did you mean --vocab-size"),
    ],
)
def test_what_is_wrong_and_the_cure(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match="E201") as caught:
        parser().parse_args(arguments)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text, meant", [("80GB", "80"), ("80GiB", "80"), ("1TB", "1000"), ("80 G", "80")])
def test_sizes_are_counted_in_what_the_help_says(text: str, meant: str) -> None:
    program = ArgumentParser(prog="plan")
    program.add_argument("--memory", type=float, metavar="GiB")
    with pytest.raises(ConfigError, match=rf"is no number; write digits, {meant}$"):
        program.parse_args(["--memory", text])


@pytest.mark.parametrize("given", [["c", "--vocab-size", "2", "x.y=1"], ["--vocab_size=2", "c"]])
def test_an_option_that_does_nothing_here_is_refused(given: list[str]) -> None:
    program = parser()
    program.add_argument("overrides", nargs="*")
    program.parse_intermixed_args(given)
    program.refuse_idle("without --chat", "--top_k")
    with pytest.raises(ConfigError, match=r"E201.*--vocab-size does nothing without --chat; leave .* out, or add"):
        program.refuse_idle("without --chat", "--top_k", "--vocab-size")
    with pytest.raises(ConfigError, match=r"--vocab-size does nothing with --json; leave --vocab-size out$"):
        program.refuse_idle("with --json", "--vocab-size")


def test_another_python_is_named_with_the_right_one(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        importlib.import_module("a_library_that_is_not_there")

    assert end_of(main) == 2
    line = capsys.readouterr().err
    assert line.startswith("error[E251]: the module a_library_that_is_not_there is not there for ")
    assert "source .venv/bin/activate" in line and line.count("\n") == 1


def test_a_library_that_cannot_be_loaded_is_named_with_what_is_foreign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of another Python by PYTHONPATH, or without a library of the system; as extension modules and as NumPy say it."""
    (tmp_path / "half_there.py").write_text("raise ImportError('libx.so.1: no such file\\n(long advice)')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "/opt/conda/lib")
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)

    def main() -> None:
        importlib.import_module("half_there")

    assert end_of(main) == 2
    line = capsys.readouterr().err
    assert line.startswith("error[E251]: the module half_there cannot be loaded by ") and line.count("\n") == 1
    assert "libx.so.1: no such file (long advice)" in line and "system: PYTHONPATH=/opt/conda/lib; or make" in line

    def ours() -> None:
        raise ImportError("cannot import name 'x'", name="megatron_hammer.base")

    with pytest.raises(ImportError):
        end_of(ours)


def test_one_of_several_options_and_commands_that_are_none() -> None:
    tool, commands = ArgumentParser(prog="t"), ArgumentParser(prog="i")
    one = tool.add_mutually_exclusive_group(required=True)
    one.add_argument("--hf", metavar="DIR")
    one.add_argument("--load", metavar="RUN")
    listed = commands.add_subparsers(required=True, metavar="stats|show")
    listed.add_parser("stats")
    listed.add_parser("show")
    for program, arguments, words in (
        (tool, [], "add --hf DIR"),
        (tool, ["--model", "a"], "write --hf, not --model"),
        (tool, ["--hf", "“a", "b”"], 'write "a b", in the quotes of the keyboard'),
        (tool, ["--hf", "‘a", "b’"], 'write "a b", in the quotes of the keyboard'),
        (tool, ["--hf", "「it’s", "b」"], 'write "it’s b", in the quotes of the keyboard'),
        (commands, ["text"], "choose one of stats, show"),
        (commands, ["a/b"], "say which first: i stats a/b"),
    ):
        with pytest.raises(ConfigError, match="E201") as caught:
            program.parse_args(arguments)
        assert words in str(caught.value), arguments


def test_children_are_heard_of_although_sigchld_is_ignored() -> None:
    """As whoever starts the program may ignore it; else a child that failed has ended with 0."""
    program = "import subprocess as s; from megatron_hammer.base.cli import run; run(lambda: s.call(['false']))"
    ignored = partial(signal.signal, signal.SIGCHLD, signal.SIG_IGN)  # a shell's own trap does not pass it on
    assert subprocess.run([sys.executable, "-c", program], preexec_fn=ignored).returncode == 1


def test_a_working_folder_that_was_removed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert end_of(lambda: 0) == 6
    assert capsys.readouterr().err.startswith("error[E601]: the working folder is not there any more; ")
