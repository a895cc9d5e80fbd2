"""``hammer``: its list, its sub-commands, completion, and that a wheel and an sdist carry the programs."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_hammer import command
from megatron_hammer.base import cli
from megatron_hammer.config import preset_names
from tests.page_blocks import blocks_of

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_hammer"
ESSAYS = sorted((ROOT / "examples" / "corpus").glob("*.txt"))
COMPILED = {"_mapping", "_digest", "_index", "_encoder", "_cpu"}
TOOLS = sorted(path.stem.replace("_", "-") for path in (ROOT / "tools").glob("*.py"))


@pytest.fixture
def hammer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command in this process: exit code, standard output, standard error."""

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hammer", *words])
        monkeypatch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as ended:
            command.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


def test_help_lists_every_program_with_its_purpose(hammer: Callable[..., tuple[int, str, str]]) -> None:
    for words in ((), ("--help",), ("-h",), ("help",), ("completion", "--help")):
        code, out, _ = hammer(*words)
        assert code == 0
        for name in [*TOOLS, "train", "launch"]:
            (line,) = re.findall(rf"^  {name} +(.*)$", out, re.MULTILINE)
            assert len(line) > 15 and line.endswith(".") and re.match("[A-Z]", line) and '"""' not in line, line
    assert hammer("--version")[1].startswith("megatron_hammer ")


def test_a_program_is_found_under_both_spellings_and_says_what_was_typed(
    hammer: Callable[..., tuple[int, str, str]],
) -> None:
    for name in ("count-tokens", "count_tokens", "count_tokens.py"):
        code, out, _ = hammer(name, "--help")
        assert code == 0 and out.startswith("usage: hammer count-tokens ")
    assert "usage: hammer inspect-checkpoint list" in hammer("inspect-checkpoint", "list", "--help")[1]
    code, _, err = hammer("generate", "--hf", "x")
    assert code == 2 and err.startswith("error[E201]: ")
    code, _, err = hammer("generate", "--hf", "x", "--step", "3", "--prompt", "y")
    assert code == 2 and err.startswith("error[E201]: hammer generate was called wrongly: --step is of a run")
    for idle in (["--chat", "--json"], ["--chat", "--batch-size", "2"], ["--prompt", "x", "--system", "y"]):
        code, _, err = hammer("generate", "--hf", "x", *idle)
        assert code == 2 and "E201" in err and ("does nothing with --chat" in err or "without --chat; leave" in err)
    code, out, _ = hammer("train", "--help")
    assert code == 0 and "train.num_steps" in out and out.startswith("usage: hammer train ")
    assert "preset, for example tiny\n" in out


def test_an_error_and_a_help_name_programs_as_they_are_called_here(
    hammer: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "see docs/errors.md, python tools/count_tokens.py --x, tools/doctor.py; /my/tools/x.py, tools/make_venv.sh"
    line += "; python -m megatron_hammer.launch --nproc 2 examples/configs/tiny.yaml, my/examples/configs/tiny.yaml"
    assert cli.as_commands(line) == line, "in the repository"
    said = "see hammer help errors, hammer count-tokens --x, hammer doctor; /my/tools/x.py, tools/make_venv.sh"
    said += "; hammer launch --nproc 2 tiny, my/examples/configs/tiny.yaml"
    with monkeypatch.context() as changed:
        changed.setattr(cli, "OF_A_WHEEL", True)
        assert cli.as_commands(line) == said, "installed"
    (tmp_path / "checkpoints").mkdir()
    code, _, err = hammer("generate", "--hf", str(tmp_path), "--prompt", "x")
    assert code == 4 and ": hammer checkpoint-to-hf --load " in err and "tools/" not in err
    assert "hammer publish runs/mine" in (out := hammer("publish", "--help")[1]) and "tools/" not in out


def test_help_says_what_a_code_means_and_prints_pages(
    hammer: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What messages name as docs/errors.md is there without a checkout, too."""
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    assert hammer("help", "E204")[1] == "E204: value out of range\n"
    damaged = hammer("help", "e403")[1]
    assert damaged.startswith("E403: no readable manifest\na checkpoint is damaged: ") and "hammer inspect" in damaged
    hung = hammer("help", "E801")[1]
    assert "\n\n**E801.** " in hung and "max-restarts N` starts" in hung and "**E701 to" not in hung
    assert "**E701 to E703**" in hammer("help", "E702")[1]
    for page in ("data", "docs/data.md"):
        assert hammer("help", page)[1].startswith("# The data engine\n\nFrom raw text")
    assert hammer("help", "data.zh-CN")[1].startswith("# 数据引擎\n")
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    assert "language of the picture (default: the system's, LANG; now zh)" in " ".join(
        hammer("plot-loss", "--help")[1].split()
    )
    assert hammer("help", "E204")[1] == "E204：值超出范围\n" and hammer("help", "data")[1].startswith("# 数据引擎\n")
    assert hammer("help", "count-tokens")[1].startswith("usage: hammer count-tokens ")
    assert "hammer help errors lists the codes" in hammer("help", "E999")[2]
    assert "hammer --help lists commands and pages" in hammer("help", "xyzzy")[2]
    assert "did you mean hammer help layout or hammer help parallelism?" in hammer("help", "并行")[2]


def test_an_unknown_name_is_answered_by_the_nearest(hammer: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = hammer("preproces_data")
    assert code == 2 and "did you mean preprocess-data?" in err and err.startswith("error[E201]")
    assert "hammer --help lists them" in hammer("xyzzy")[2]
    for typed, meant in {"finetune": "help publish", "export": "checkpoint-to-hf", "selftst": "selftest"}.items():
        assert f"did you mean {meant}?" in hammer(typed)[2]
    assert "did you mean" not in hammer("tokenizer")[2], "five programs have it in their names"
    assert "write hammer completion bash" in hammer("completion", "tcsh")[2]


def test_the_list_imports_no_program() -> None:
    code = (
        "import sys; from megatron_hammer.command import overview; overview(); "
        "sys.exit(str({m.split('.')[0] for m in sys.modules} & {'torch', 'numpy', 'yaml', 'argparse', 'orjson'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == "set()", done.stderr


def test_what_may_follow_is_what_the_help_of_a_program_has() -> None:
    assert command.words_after(["completion"]) == ["bash", "zsh", "fish"]
    assert {"errors", "quick_start"} < set(command.words_after(["help"]))
    assert command.words_after(["inspect-checkpoint"]) == ["list", "show", "verify", "diff", "digest", "--help"]
    assert command.words_after(["inspect-checkpoint", "digest", "x"]) == ["--help", "--sha256"]
    assert command.words_after(["preprocess-data", "--on-error"]) == ["stop", "skip", "quarantine"]
    assert command.words_after(["preprocess-data", "--key", "text", "--input"]) == [], "files"
    words = command.words_after(["launch", "--nproc", "2"])
    assert {"--max-restarts", "train.num_steps=", *preset_names()} < set(words)
    assert words.index("tiny") < words.index("train.seed="), "and what is typed before it is no preset"


SHELLS = {
    "bash": """source rc
try() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _hammer 2>/dev/null; echo "${COMPREPLY[*]}"; }
try hammer inspect-c; try hammer generate --j; try hammer generate 'a b' tr; try hammer generate zz""",
    "zsh": """compdef() {}; source rc
compadd() { [[ $1 == -S ]] && shift 2; shift; print -rn -- "${(M)@:#$word*} " }; _files() { print }
try() { words=("$@"); CURRENT=$#; word=$@[-1]; _hammer }
try hammer inspect-c; print; try hammer generate --j; try hammer generate 'a b' tr; try hammer generate zz""",
    "fish": """source rc
for line in "inspect-c" "generate --j" "generate 'a b' tr" "generate zz"; echo (complete -C "hammer $line"); end""",
}
"""For each shell: complete four lines, and print a line for each."""


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes_names_options_and_settings(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not there: apt-get install {shell}")
    stub = '#!/bin/sh\necho "$*" >>asked; printf "%s\\n" --json --help train.seed=\n'
    (tmp_path / "hammer").write_text(stub)
    (tmp_path / "hammer").chmod(0o755)
    (tmp_path / "rc").write_text(command.completion(shell))
    done = subprocess.run(
        [shell, *{"bash": ["--norc"], "zsh": ["-f"], "fish": ["--no-config"]}[shell], "-c", SHELLS[shell]],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    said = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert said == ["inspect-checkpoint", "--json", "train.seed=", ""], done.stderr
    asked = (tmp_path / "asked").read_text().replace("'", "").splitlines()
    assert asked == [f"completion --words generate{more}" for more in ("", " a b", "")]
    assert all(name in command.completion(shell) for name in TOOLS)


def test_programs_are_found_where_a_wheel_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No repository around the package: the copies in it."""
    package = tmp_path / "site-packages" / "megatron_hammer"
    (package / "tools" / "require_package").mkdir(parents=True)
    (package / "tools" / "one_tool.py").write_text('#!/usr/bin/env python3\nr"""Do one\nthing: well. More."""\n')
    monkeypatch.setattr(command, "__file__", str(package / "command.py"))
    assert command.tools_folder() == package / "tools"
    assert command.programs(command.tools_folder()) == {"one-tool": package / "tools" / "one_tool.py"}
    assert command.purpose_of(package / "tools" / "one_tool.py") == "Do one thing: well."


def test_a_build_carries_the_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``build_py`` of setup.py; the whole wheel and the sdist: HAMMER_BUILD=1."""
    from setuptools import Distribution

    monkeypatch.chdir(ROOT)
    build = runpy.run_path("setup.py")["BuildWithTools"](Distribution({"packages": []}))
    build.build_lib = str(tmp_path)
    build.ensure_finalized()
    build.run()
    there = {path.relative_to(tmp_path / "megatron_hammer").as_posix() for path in tmp_path.rglob("*.*")}
    presets, essays = {f"configs/{name}.yaml" for name in preset_names()}, {f"essays/{path.name}" for path in ESSAYS}
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    programs = {f"tools/{name.replace('-', '_')}.py" for name in TOOLS}
    assert there == programs | presets | essays | pages | {"tools/require_package/__init__.py"} and len(essays) > 4
    sdist = set((ROOT / "MANIFEST.in").read_text().splitlines())
    assert {"graft csrc", "graft tools", "graft examples/configs"} <= sdist
    assert {"include examples/corpus/*", "include docs/*.md"} <= sdist
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"hammer": "megatron_hammer.command:main"}
    assert project["tool"]["cibuildwheel"]["environment"]["HAMMER_CUDA_ARCHS"] == "none"
    data = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.*") if path.is_file()}
    data = {name for name in data if not name.endswith((".py", ".so", ".pyc"))}
    assert data == set(project["tool"]["setuptools"]["package-data"]["megatron_hammer"])


def test_every_source_of_csrc_is_compiled_into_a_module_that_a_wheel_must_have() -> None:
    setup = runpy.run_path(str(ROOT / "setup.py"))
    sources = {source for extension in setup["EXTENSIONS"] for source in [*extension.sources, *extension.depends]}
    folders = {path.name for path in (ROOT / "csrc").iterdir()} - {"kernels"}
    assert sources == {f"csrc/{f}/{path.name}" for f in folders for path in (ROOT / "csrc" / f).iterdir()}
    assert {extension.name.rpartition(".")[2] for extension in setup["EXTENSIONS"]} == COMPILED
    for name in COMPILED:
        assert f".{name}" in (ROOT / "pyproject.toml").read_text(), "the test of a wheel imports it"


def test_every_place_names_the_same_pythons() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    first, end = (int(n) for n in re.fullmatch(r">=3\.(\d+),<3\.(\d+)", project["project"]["requires-python"]).groups())
    minors = range(first, end)
    assert project["tool"]["cibuildwheel"]["build"].split() == [f"cp3{minor}-*" for minor in minors]
    classifiers = [c.rpartition(" ")[2] for c in project["project"]["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert classifiers == [f"3.{minor}" for minor in minors]
    assert (
        f"python: {json.dumps([f'3.{minor}' for minor in minors])}" in (ROOT / ".github/workflows/ci.yml").read_text()
    )
    assert f"(3, {first}) <= sys.version_info[:2] <= (3, {end - 1})" in (ROOT / "tools/make_venv.sh").read_text()
    pages = (
        "README",
        "CONTRIBUTING",
        *(f"docs/{page}" for page in ("installation", "quick_start", "reproduce", "errors")),
    )
    named = dict.fromkeys(pages, "{} to {}")
    named |= {f"{name}.zh-CN": "{} 至 {}" for name in named if name != "CONTRIBUTING"}
    for page, words in named.items():
        assert "Python " + words.format(f"3.{first}", f"3.{end - 1}") in (ROOT / f"{page}.md").read_text(), page


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("HAMMER_BUILD") != "1", reason="HAMMER_BUILD=1: builds sdist and wheel (minutes)")
@pytest.mark.timeout(1800)
def test_the_wheel_of_the_sdist_has_a_command_that_works(tmp_path: Path) -> None:
    """Built from the sdist alone, installed without dependencies beside this environment's, and used elsewhere."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "build", "--sdist", "-o", str(tmp_path), str(ROOT)], check=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(tmp_path), str(sdist)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    holds = zipfile.ZipFile(wheel).namelist()
    ours = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")}
    ours |= {f"megatron_hammer/tools/{path.name}" for path in (ROOT / "tools").glob("*.py")}
    ours |= {f"megatron_hammer/configs/{name}.yaml" for name in preset_names()}
    ours |= {f"megatron_hammer/essays/{path.name}" for path in ESSAYS} | {"megatron_hammer/report/charts.js"}
    ours |= {f"megatron_hammer/docs/{name}.md" for name in command.page_names()}
    assert ours <= set(holds), ours - set(holds)
    assert {name.rpartition("/")[2].partition(".")[0] for name in holds if name.endswith(".so")} == COMPILED
    subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", str(tmp_path / "v")], check=True)
    python = tmp_path / "v" / "bin" / "python"
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", "--force-reinstall", str(wheel)], check=True)
    # The libraries of this environment, and not the package that is installed there.
    libraries = Path(importlib.util.find_spec("numpy").origin).parents[1]
    (tmp_path / "libraries").mkdir()
    for path in libraries.iterdir():
        if "megatron_hammer" not in path.name and path.suffix != ".pth":
            (tmp_path / "libraries" / path.name).symlink_to(path)
    (place,) = (tmp_path / "v").glob("lib/python3*/site-packages")
    (place / "libraries.pth").write_text(str(tmp_path / "libraries"))
    walk, page = tmp_path / "walk", (ROOT / "docs" / "installation.md").read_text(encoding="utf-8")
    walk.mkdir()
    path = f"{tmp_path / 'v' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PATH": path}
    said = ""
    for block in blocks_of(page):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block], cwd=walk, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        said += done.stdout + done.stderr
    assert "import numpy" in said and "all 6 parts passed" in said
    assert "tools/" not in said and str(ROOT) not in said, "programs are named as they are called there"


def test_the_devcontainer_names_files_that_are_there() -> None:
    text = (ROOT / ".devcontainer" / "devcontainer.json").read_text()
    tree = json.loads(re.sub(r"(?m)^\s*//.*$", "", text))
    assert "bash tools/make_venv.sh" in tree["postCreateCommand"] and (ROOT / "tools" / "make_venv.sh").exists()
