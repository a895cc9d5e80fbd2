"""``hammer``: every program as a sub-command, so that an installed wheel has what the repository's ``tools/`` has.

::

    hammer preprocess-data --input ...    =  python tools/preprocess_data.py --input ...
    hammer train CONFIG.yaml ...          =  python -m megatron_hammer.train CONFIG.yaml ...
    hammer launch --nproc 2 ...           =  python -m megatron_hammer.launch --nproc 2 ...

The programs are the files of ``tools/``: of the repository where there is one, else the copies that the build puts
beside this package (``setup.py``). A program runs in this process as ``python FILE`` would run it. ``hammer`` itself
imports none of them: its list is read from their first lines, so ``hammer --help`` takes a few hundredths of a second.
Needs no torch.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

MODULES = {
    "train": ("megatron_hammer.train", "Train one process, or be a rank under torchrun."),
    "launch": ("megatron_hammer.launch", "Start N ranks on this node, and watch them."),
}
"""Sub-commands that are modules: what runs, and what it is for."""
WORDS = (
    "grep -oE '(^|[^a-z-])(--[a-z][a-z0-9-]*|(model|tokenizer|data|parallel|optimizer|schedule|kernels|train|"
    "checkpoint|log)[.][a-z_0-9]+)' | sed -e 's/^[^a-z-]//' -e 's/[.].*/&=/' | sort -u"
)
"""From a program's --help to its options, and settings with the = behind them."""
COMPLETIONS = {
    "bash": """_hammer() {
    local word="${COMP_WORDS[COMP_CWORD]}"
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "@NAMES@" -- "$word"))
    elif [[ $word == -* || $word == *.* ]]; then
        COMPREPLY=($(compgen -W "$(hammer "${COMP_WORDS[1]}" --help 2>/dev/null | @WORDS@)" -- "$word"))
        if [[ ${COMPREPLY[0]-} == *= ]]; then compopt -o nospace; fi
    fi
}
complete -o default -F _hammer hammer
""",
    "zsh": """#compdef hammer
_hammer() {
    local -a found
    if (( CURRENT == 2 )); then
        found=(@NAMES@)
        compadd -a found
    elif [[ $words[CURRENT] == -* || $words[CURRENT] == *.* ]]; then
        found=(${(f)"$(hammer $words[2] --help 2>/dev/null | @WORDS@)"})
        compadd -a found
    else
        _files
    fi
}
if (( ! $+functions[compdef] )); then autoload -Uz compinit && compinit; fi
compdef _hammer hammer
""",
    "fish": """function __hammer_words
    set -l words (commandline -opc)
    hammer $words[2] --help 2>/dev/null | @WORDS@
end
complete -c hammer -n __fish_use_subcommand -f -a "@NAMES@"
set -l is_option 'not __fish_use_subcommand; and string match -qr -- "^-|[.]" (commandline -ct)'
complete -c hammer -n $is_option -f -a '(__hammer_words)'
""",
}
HELP = """usage: hammer COMMAND [ARGUMENT ...]
       hammer COMMAND --help
       hammer completion bash|zsh|fish

One command for every program of megatron_hammer. Names may be written with - or _.
"""


def tools_folder() -> Path:
    """Where the programs are: in the repository beside this package, or in the package as it was installed."""
    package = Path(__file__).resolve().parent
    beside = package.parent / "tools"
    return beside if (beside / "require_package").is_dir() and (package.parent / "csrc").is_dir() else package / "tools"


def programs(folder: Path) -> dict[str, Path]:
    """Sub-command -> file."""
    return {path.stem.replace("_", "-"): path for path in sorted(folder.glob("*.py"))}


def purpose_of(path: Path) -> str:
    """The first sentence of a program's docstring."""
    with path.open(encoding="utf-8") as file:
        text = ""
        for line in file:
            text += line.strip().removeprefix('"""') + " "
            if ". " in text or not line.strip() or line.rstrip().endswith('"""'):
                break
    return text.partition(". ")[0].replace('"""', "").strip().rstrip(".:") + "."


def help_text() -> str:
    """All sub-commands with what they are for."""
    rows = {name: what for name, (_, what) in MODULES.items()}
    rows |= {name: purpose_of(path) for name, path in programs(tools_folder()).items()}
    rows["completion"] = "Print what a shell needs to complete names and options (see below)."
    width = max(map(len, rows))
    lines = [f"  {name:{width}}  {what}" for name, what in rows.items()]
    return "\n".join([HELP, *lines, "", "completion: eval \"$(hammer completion bash)\" in ~/.bashrc (zsh: ~/.zshrc);",
                      "            hammer completion fish > ~/.config/fish/completions/hammer.fish"])  # fmt: skip


def completion(shell: str) -> str:
    """A script that completes sub-commands, then options (and settings) as the program's own --help names them."""
    names = " ".join([*MODULES, *programs(tools_folder()), "completion"])
    return COMPLETIONS[shell].replace("@NAMES@", names).replace("@WORDS@", WORDS)


def main() -> NoReturn:
    """Run a sub-command, and end with its exit code."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help", "help"):
        _end(help_text)
    if words[0] in ("-V", "--version"):
        _end(_version)
    name = words[0].replace("_", "-").removesuffix(".py")
    if name == "completion":
        _end(lambda: completion(_shell_of(words[1:])))
    if name in MODULES:
        sys.argv = [f"hammer {name}", *words[1:]]
        runpy.run_module(MODULES[name][0], run_name="__main__", alter_sys=True)
        sys.exit(0)
    found = programs(tools_folder()).get(name)
    if found is None:
        _end(lambda: _unknown(words[0]))
    sys.argv = [f"hammer {name}", *words[1:]]
    run_file(found)
    sys.exit(0)


def run_file(path: Path) -> None:
    """Run a program as ``python FILE`` does; ``runpy`` would put the file's name in the place of what was typed."""
    spec = importlib.util.spec_from_file_location("__main__", path)
    assert spec is not None and spec.loader is not None
    sys.path.insert(0, str(path.parent))
    before, module = sys.modules["__main__"], importlib.util.module_from_spec(spec)
    sys.modules["__main__"] = module
    try:
        spec.loader.exec_module(module)
    finally:
        sys.modules["__main__"] = before


def _end(text: Callable[[], str]) -> NoReturn:
    """Print what a function gives, as all programs print, and end."""
    from megatron_hammer.base.cli import run
    from megatron_hammer.base.streams import Output

    run(lambda: print(text()), Output.LISTING)


def _version() -> str:
    from megatron_hammer import __version__

    return f"megatron_hammer {__version__}"


def _shell_of(words: list[str]) -> str:
    """The shell that is named, or the one of the user.

    Raises:
        ConfigError: E201 another one.
    """
    from megatron_hammer.base.errors import ConfigError

    shell = words[0] if words else os.path.basename(os.environ.get("SHELL", ""))
    if shell not in COMPLETIONS or len(words) > 1:
        rule = f"was called wrongly: {shell or 'no shell'} is none of {', '.join(COMPLETIONS)}"
        raise ConfigError(1, "hammer completion", rule, "write hammer completion bash")
    return shell


def _unknown(word: str) -> str:
    """Raise for a sub-command that is none.

    Raises:
        ConfigError: E201, with the nearest name.
    """
    import difflib

    from megatron_hammer.base.errors import ConfigError

    names = [*MODULES, *programs(tools_folder()), "completion"]
    near = difflib.get_close_matches(word.replace("_", "-"), names, n=1, cutoff=0.5)
    remedy = f"did you mean {near[0]}?" if near else "hammer --help lists them"
    raise ConfigError(1, "hammer", f"was called wrongly: {word} is no command", remedy)
