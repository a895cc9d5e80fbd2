"""``hammer``: its list, its sub-commands, completion, and that a wheel and an sdist carry the programs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_hammer import command
from megatron_hammer.base import cli
from megatron_hammer.config import preset_names

ROOT = Path(__file__).parents[1]
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
    for words in ((), ("--help",), ("-h",), ("help",)):
        code, out, _ = hammer(*words)
        assert code == 0
        for name in [*TOOLS, "train", "launch"]:
            (line,) = re.findall(rf"^  {name} +(.*)$", out, re.MULTILINE)
            assert len(line) > 15 and line.endswith(".") and '"""' not in line, line
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
    assert code == 0 and "train.num_steps" in out


def test_an_error_and_a_help_name_programs_as_they_are_called_here(
    hammer: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "see python tools/count_tokens.py --x, tools/doctor.py; /my/tools/count_tokens.py and tools/make_venv.sh"
    assert cli.as_commands(line) == line, "in the repository"
    said = "see hammer count-tokens --x, hammer doctor; /my/tools/count_tokens.py and tools/make_venv.sh"
    with monkeypatch.context() as changed:
        changed.setattr(cli, "INSTALLED_PROGRAMS", tmp_path)
        assert cli.as_commands(line) == said, "installed"
    (tmp_path / "checkpoints").mkdir()
    code, _, err = hammer("generate", "--hf", str(tmp_path), "--prompt", "x")
    assert code == 4 and ": hammer checkpoint-to-hf --load " in err and "tools/" not in err
    assert "hammer publish runs/mine" in (out := hammer("publish", "--help")[1]) and "tools/" not in out


def test_an_unknown_name_is_answered_by_the_nearest(hammer: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = hammer("preproces_data")
    assert code == 2 and "did you mean preprocess-data?" in err and err.startswith("error[E201]")
    assert "hammer --help lists them" in hammer("xyzzy")[2]
    assert "write hammer completion bash" in hammer("completion", "tcsh")[2]


def test_the_list_imports_no_program() -> None:
    code = (
        "import sys; from megatron_hammer.command import help_text; help_text(); "
        "sys.exit(str({m.split('.')[0] for m in sys.modules} & {'torch', 'numpy', 'yaml', 'argparse', 'orjson'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == "set()", done.stderr


def test_bash_completes_names_options_and_settings(tmp_path: Path) -> None:
    (tmp_path / "hammer").write_text(
        "#!/bin/sh\necho '  --hf DIR  folder'; echo '  --help'; echo ' * train.seed  int'; echo 'see --hf'\n"
    )
    (tmp_path / "hammer").chmod(0o755)
    (tmp_path / "rc").write_text(command.completion("bash"))
    script = """source rc
try() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _hammer 2>/dev/null; echo "${COMPREPLY[*]}"; }
try hammer inspect-c; try hammer generate --h; try hammer train train.; try hammer generate x"""
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.stdout.splitlines() == ["inspect-checkpoint", "--help --hf", "train.seed=", ""], done.stderr
    for shell in command.COMPLETIONS:
        assert "@" not in command.completion(shell)
        assert all(name in command.completion(shell) for name in TOOLS)


def test_programs_are_found_where_a_wheel_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No repository around the package: the copies in it."""
    package = tmp_path / "site-packages" / "megatron_hammer"
    (package / "tools" / "require_package").mkdir(parents=True)
    (package / "tools" / "one_tool.py").write_text('"""Do one thing: well. More."""\n')
    monkeypatch.setattr(command, "__file__", str(package / "command.py"))
    assert command.tools_folder() == package / "tools"
    assert command.programs(command.tools_folder()) == {"one-tool": package / "tools" / "one_tool.py"}
    assert command.purpose_of(package / "tools" / "one_tool.py") == "Do one thing: well."


def test_a_build_carries_the_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``build_py`` of setup.py; the whole wheel and the sdist: HAMMER_BUILD=1."""
    import runpy

    from setuptools import Distribution

    monkeypatch.chdir(ROOT)
    build = runpy.run_path("setup.py")["BuildWithTools"](Distribution({"packages": []}))
    build.build_lib = str(tmp_path)
    build.ensure_finalized()
    build.run()
    there = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.py")}
    assert there == {f"megatron_hammer/tools/{n.replace('-', '_')}.py" for n in TOOLS} | {
        "megatron_hammer/tools/require_package/__init__.py"
    }
    presets = {path.stem for path in (tmp_path / "megatron_hammer" / "configs").iterdir()}
    assert presets == set(preset_names()), "and the presets, by whose names load_config finds them"
    assert {"graft tools", "graft examples/configs"} <= set((ROOT / "MANIFEST.in").read_text().splitlines())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"hammer": "megatron_hammer.command:main"}
    assert project["tool"]["cibuildwheel"]["environment"]["HAMMER_CUDA_ARCHS"] == "none"


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
    subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", str(tmp_path / "v")], check=True)
    python = tmp_path / "v" / "bin" / "python"
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", "--force-reinstall", str(wheel)], check=True)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    site = subprocess.run(
        [sys.executable, "-c", "import numpy; print(numpy.__path__[0])"], capture_output=True, text=True
    )
    environment["PYTHONPATH"] = str(Path(site.stdout.strip()).parent)
    for words in (["--help"], ["generate", "--help"], ["train", "--help"], ["doctor", "--help"]):
        done = subprocess.run(
            [str(python), "-P", str(tmp_path / "v" / "bin" / "hammer"), *words], cwd=tmp_path, env=environment,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0 and done.stdout, done.stderr


def test_the_devcontainer_names_files_that_are_there() -> None:
    text = (ROOT / ".devcontainer" / "devcontainer.json").read_text()
    tree = json.loads(re.sub(r"(?m)^\s*//.*$", "", text))
    assert "bash tools/make_venv.sh" in tree["postCreateCommand"] and (ROOT / "tools" / "make_venv.sh").exists()
