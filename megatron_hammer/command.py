"""``hammer``: every program as a sub-command, so that an installed wheel has what the repository's ``tools/`` has.

::

    hammer preprocess-data --input ...    =  python tools/preprocess_data.py --input ...
    hammer train CONFIG.yaml ...          =  python -m megatron_hammer.train CONFIG.yaml ...
    hammer launch --nproc 2 ...           =  python -m megatron_hammer.launch --nproc 2 ...
    hammer help E204, hammer help data    =  what docs/errors.md says of a code; the page docs/data.md

The programs are the files of ``tools/``: of the repository where there is one, else the copies that the build puts
beside this package (``setup.py``). A program runs in this process as ``python FILE`` would run it. ``hammer`` itself
imports none of them: its list is read from their first lines, so ``hammer --help`` takes a few hundredths of a second.
Needs no torch.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

from megatron_hammer.base.shipped import shipped_folder

MODULES = {
    "train": ("train/__main__.py", "Train one process, or be a rank under torchrun."),
    "launch": ("launch.py", "Start N ranks on this node, and watch them."),
}
"""Sub-commands that are modules of this package: what runs, and what it is for."""
COMPLETIONS = {
    "bash": """_hammer() {
    local word="${COMP_WORDS[COMP_CWORD]}" found="@NAMES@"
    if [ "$COMP_CWORD" -gt 1 ]; then
        found=$(hammer completion --words "${COMP_WORDS[@]:1:COMP_CWORD-1}" 2>/dev/null)
    fi
    COMPREPLY=($(compgen -W "$found" -- "$word"))
    if [[ ${COMPREPLY[0]-} == *= ]]; then compopt -o nospace; fi
}
complete -o default -F _hammer hammer
""",
    "zsh": """#compdef hammer
_hammer() {
    local -a found
    if (( CURRENT == 2 )); then
        compadd -- @NAMES@
    else
        found=(${(f)"$(hammer completion --words ${(@)words[2,CURRENT-1]} 2>/dev/null)"})
        compadd -S '' -- ${(M)found:#*=}
        compadd -- ${found:#*=}
        _files
    fi
}
if (( ! $+functions[compdef] )); then autoload -Uz compinit && compinit; fi
compdef _hammer hammer
""",
    "fish": """function __hammer_words
    set -l words (commandline -opc)
    hammer completion --words $words[2..] 2>/dev/null
end
complete -c hammer -n __fish_use_subcommand -f -a "@NAMES@"
complete -c hammer -n 'not __fish_use_subcommand' -a '(__hammer_words)'
""",
}
"""What each shell reads. Where nothing of ours can follow, and beside it, they complete files."""
MEANT = {
    **dict.fromkeys(("chat", "infer", "inference"), "generate"),
    **dict.fromkeys(("deploy", "finetune", "fine-tune", "lora", "serve", "sft"), "help publish"),
    **dict.fromkeys(("export", "to-hf"), "checkpoint-to-hf"),
    **dict.fromkeys(("import", "from-hf"), "hf-to-checkpoint"),
    "pretrain": "train",
    "tokenize": "preprocess-data",
}
"""Words of other programs, and what does or says it here."""
PAGES = shipped_folder("docs", "docs")
"""Of the documentation, as Markdown; NAME.zh-CN.md is NAME.md in Chinese."""
HELP = """usage: hammer COMMAND [ARGUMENT ...]
       hammer COMMAND --help
       hammer help CODE|PAGE
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
    from megatron_hammer.base.reading import read_regular

    found = re.search(r'^r?"""(.+?)(?:\.\s|\n\n|""")', read_regular(path).decode("utf-8"), re.MULTILINE | re.DOTALL)
    assert found is not None, f"{path} has no docstring"
    return " ".join(found[1].split()).rstrip(".:") + "."


def overview() -> str:
    """All sub-commands with what they are for."""
    rows = {name: what for name, (_, what) in MODULES.items()}
    rows |= {name: purpose_of(path) for name, path in programs(tools_folder()).items()}
    rows["completion"] = "Print what a shell needs to complete names and options (see below)."
    width = max(map(len, rows))
    lines = [f"  {name:{width}}  {what}" for name, what in rows.items()]
    pages = textwrap.wrap(f"pages: {', '.join(page_names())}", 100, subsequent_indent=" " * 7)
    return "\n".join([HELP, *lines, "", "hammer help E204 says what an error code means, help PAGE prints a page;",
                      "in Chinese where the language of the system (LANG) is.", *pages, "",
                      "completion: eval \"$(hammer completion bash)\" in ~/.bashrc (zsh: ~/.zshrc);",
                      "            hammer completion fish > ~/.config/fish/completions/hammer.fish"])  # fmt: skip


def page_names() -> list[str]:
    """What ``hammer help`` can print."""
    return sorted(path.stem for path in PAGES.glob("*.md") if "." not in path.stem)


def explain(words: list[str]) -> str:
    """A page of the documentation, or what its pages say of an error code; of a sub-command its ``--help``.

    Raises:
        ConfigError: E201 there is no such code or page.
    """
    from megatron_hammer.base.cli import as_commands
    from megatron_hammer.base.errors import ConfigError

    word = " ".join(words)
    if re.fullmatch(r"E\d{3,4}", word.upper()):
        found = explain_code(word.upper())
        remedy = "hammer help errors lists the codes"
    else:
        name = word.removeprefix("docs/").removesuffix(".md")
        found = _page(name) if name.removesuffix(".zh-CN") in page_names() else ""
        if not found and name.replace("_", "-") in [*MODULES, *programs(tools_folder())]:
            found = _help_of([name])
        titled = [f"hammer help {page}" for page in page_names() if word.lower() in _titles(page)]
        remedy = f"did you mean {' or '.join(titled)}?" if titled else "hammer --help lists commands and pages"
    if not found:
        raise ConfigError(1, "hammer help", f"was called wrongly: there is nothing on {word}", remedy)
    return as_commands(found.rstrip("\n"))


def _titles(name: str) -> str:
    """The first lines of a page in both languages, in small letters."""
    from megatron_hammer.base.reading import read_regular

    texts = [read_regular(PAGES / f"{name}{suffix}.md").decode("utf-8") for suffix in ("", ".zh-CN")]
    return "\n".join(text.partition("\n")[0].lower() for text in texts)


def explain_code(code: str) -> str:
    """The row of the list, what helps, and the paragraphs on it, where there are any; "" for one that is not listed."""
    from megatron_hammer.base.language import user_language

    rows = re.findall(rf"^\| {code} \| (.*) \|$", text := _page("errors"), re.MULTILINE)
    colon = "：" if user_language() == "zh" else ": "
    lines = [f"{code}{colon}{row}" for row in rows]
    for row in re.findall(r"^\| (E.*) \|$", _page("troubleshooting"), re.MULTILINE):
        codes, seen, remedy = row.split(" | ")
        if _holds(codes, code):
            lines.append(f"{seen}{colon}{remedy}")
    about = False
    for block in text.split("\n\n"):
        if head := re.match(r"\*\*(E\d.*?)\*\*", block):
            about = _holds(head[1], code)
        elif block.startswith(("#", "|")):
            about = False
        if about:
            lines += ["", block]
    return "\n".join(lines)


def _holds(codes: str, code: str) -> bool:
    """Whether ``E209, E210`` or ``E330 to E340`` holds a code; a range in Chinese too."""
    numbers = [int(number) for number in re.findall(r"E(\d+)", codes)]
    is_range = len(numbers) == 2 and re.search(r"\d (to|至) E", codes)
    return numbers[0] <= int(code[1:]) <= numbers[1] if is_range else int(code[1:]) in numbers


def _page(name: str) -> str:
    """The text of a page, in Chinese where that is the user's language; links to others as what prints them."""
    from megatron_hammer.base.language import user_language
    from megatron_hammer.base.reading import read_regular

    chinese = PAGES / f"{name}.zh-CN.md"
    path = chinese if user_language() == "zh" and chinese.exists() else PAGES / f"{name}.md"
    text = read_regular(path).decode("utf-8")
    text = re.sub(r"^\[(English|中文)\]\(.*\)\n\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"\[(E\d+)\]\(errors(?:\.zh-CN)?\.md\)", r"\1", text)
    return re.sub(r"\[([^\]]+)\]\((\w+)(?:\.zh-CN)?\.md(?:#[^)]*)?\)", r"\1 (hammer help \2)", text)


def completion(shell: str) -> str:
    """A script that completes sub-commands, and asks ``hammer completion --words`` what may follow one."""
    return COMPLETIONS[shell].replace("@NAMES@", " ".join(command_names()))


def command_names() -> list[str]:
    """All words that may follow ``hammer``."""
    return [*MODULES, *programs(tools_folder()), "completion", "help"]


def words_after(typed: list[str]) -> list[str]:
    """What may follow these words, as the program's own ``--help`` has it.

    That is the values of an option that has a list of them; else options, and where the program takes them its own
    sub-commands, settings (with the = behind them) and presets. None where an option takes anything else, a file, say.

    Args:
        typed: a sub-command and what stands behind it.
    """
    if typed == ["completion"]:
        return list(COMPLETIONS)
    if typed == ["help"]:
        return page_names()
    text = _help_of(typed[:1])
    own = re.search(r"^  ([a-z]+(?:\|[a-z]+)+)$", text, re.MULTILINE)
    commands = own[1].split("|") if own else []
    words = commands if len(typed) == 1 else []
    if typed[1:2] and typed[1] in commands:
        text = _help_of(typed[:2])
    values: dict[str, list[str]] = {}  # of an option that takes one
    for head in re.findall(r"^  (-.*?)(?:  .*)?$", text, re.MULTILINE):  # --keys KEY [KEY ...], --key KEY [KEY ...]
        names = re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", head)
        words += names
        if re.search(r"[^,] (?!-)", head):
            listed = re.search(r"\{(.+?)\}", head)
            values |= dict.fromkeys(names, listed[1].split(",") if listed else [])
    if typed[-1] in values:
        return values[typed[-1]]
    usage = text.partition("\n\n")[0]
    given = [word for before, word in pairwise(typed) if not word.startswith("-") and before not in values]
    if "CONFIG.yaml" in usage and not given:
        from megatron_hammer.config import preset_names

        words += preset_names()
    if "group.field=value" in usage:
        from megatron_hammer.config.help import describe_fields

        words += [f"{group}.{field}=" for group, fields in describe_fields().items() for field in fields]
    return words


def _help_of(words: list[str]) -> str:
    """What a sub-command prints for ``--help``, of which nothing is wrapped."""
    program = [sys.executable, "-P", "-c", "from megatron_hammer.command import main; main()"]
    done = subprocess.run(
        [*program, *words, "--help"], capture_output=True, text=True, env=os.environ | {"COLUMNS": "1000"}
    )
    return done.stdout


def main() -> NoReturn:
    """Run a sub-command, and end with its exit code."""
    words = sys.argv[1:]
    if words[:1] == ["help"] and words[1:]:
        sys.argv[0] = "hammer help"
        _end(lambda: explain(words[1:]))
    if not words or words[0] in ("-h", "--help", "help") or words in (["completion", "-h"], ["completion", "--help"]):
        _end(overview)
    if words[0] in ("-V", "--version"):
        _end(_version)
    name = words[0].replace("_", "-").removesuffix(".py")
    if words[:2] == ["completion", "--words"]:
        _end(lambda: "\n".join(words_after(words[2:])))
    if name == "completion":
        _end(lambda: completion(_shell_of(words[1:])))
    found = Path(__file__).parent / MODULES[name][0] if name in MODULES else programs(tools_folder()).get(name)
    if found is None:
        _end(lambda: _unknown(words[0]))
    if name not in MODULES:
        sys.path.insert(0, str(found.parent))
    sys.argv = [f"hammer {name}", *words[1:]]
    run_file(found)
    sys.exit(0)


def run_file(path: Path) -> None:
    """Run a program as ``python FILE`` does; ``runpy`` would put the file's name in the place of what was typed."""
    spec = importlib.util.spec_from_file_location("__main__", path)
    assert spec is not None and spec.loader is not None
    before, module = sys.modules["__main__"], importlib.util.module_from_spec(spec)
    sys.modules["__main__"] = module
    try:
        spec.loader.exec_module(module)
    finally:
        sys.modules["__main__"] = before


def _end(text: Callable[[], str]) -> NoReturn:
    """Print what a function gives, as all programs print, and end."""
    from megatron_hammer.base.cli import run
    from megatron_hammer.base.streams import OutputKind

    run(lambda: print(text()), OutputKind.LISTING)


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

    typed, known = word.lower().replace("_", "-"), command_names()
    holding = [name for name in known if typed in name.split("-")]
    near = [MEANT[typed]] if typed in MEANT else holding or difflib.get_close_matches(typed, known, n=1, cutoff=0.6)
    remedy = f"did you mean {near[0]}?" if len(near) == 1 else "hammer --help lists them"
    raise ConfigError(1, "hammer", f"was called wrongly: {word} is no command", remedy)
