"""The shell programs: what pretrain_1b4.sh makes of its variables, and what make_venv.sh says about a bare machine.

pretrain_1b4.sh runs in a copy of the tree's outline whose .venv/bin/python writes down how it is called and makes the
files that the real stages would; the real chain is README's first command.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_hammer.base.errors import CheckpointError, ConfigError, DataError
from megatron_hammer.base.language import sayer
from megatron_hammer.config import Config, load_config
from megatron_hammer.metrics.plot import _source, moving_average, plot_loss, read_curves

ROOT = Path(__file__).resolve().parents[1]

STUB = r"""
import json, os, pathlib, signal, sys, time
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\n")
words = sys.argv[1:]
name = words[1] if words[0] == "-m" else pathlib.Path(words[0]).name
def after(option): return words[words.index(option) + 1]
def make(path, text="x"):
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(path).write_text(text)
if name == "make_sample_corpus.py":
    for part in os.environ.get("LANGUAGES", "zh en code").split():
        make(f"{after('--out')}/{part}.jsonl"); make(f"{after('--out')}/{part}.valid.jsonl")
    make(f"{after('--out')}/manifest.json")
elif name == "reformat_corpus.py":
    make(after("--output"), "x\n" * (40 if words[1] == "text" else 3))
elif name == "split_corpus.py":
    for part in ("train", "valid"): make(f"{after('--output-prefix')}.{part}.jsonl")
elif name == "train_tokenizer.py":
    make(f"{after('--output')}/tokenizer.model")
elif name == "preprocess_data.py":
    make(f"{after('--output-prefix')}_text_document.idx")
elif name == "megatron_hammer.launch":
    if os.environ.get("WAIT"):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        print("waiting", flush=True)
        time.sleep(30)
    output = json.loads(next(w for w in words if w.startswith("train.output=")).partition("=")[2])
    if "train.dry_run=true" not in words:
        pathlib.Path(output, "checkpoints/step-00000300").mkdir(parents=True, exist_ok=True)
    sys.exit(int(os.environ.get("CODE", 0)))
elif name == "megatron_hammer.config":
    sys.exit(2 if "train.num_step=7" in words else 0)
elif name == "checkpoint_to_hf.py":
    time.sleep(0.02)
    make(f"{after('--output')}/certificate.json")
elif name == "plot_loss.py":
    make(after("--output"))
"""


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


SBATCH = [f"examples/slurm/one_task_a_{what}.sbatch" for what in ("node", "rank")]


class Tree:
    """A stand-in for a clone of the repository, and how to run the example in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.calls_file = path / "calls"
        script(path / ".venv/bin/python", f"#!{sys.executable}\n{STUB}")
        script(path / "tools/make_venv.sh", "true\n")
        script(path / "bin/nvidia-smi", '#!/bin/sh\nfor i in $GPUS; do echo "GPU $i: NVIDIA H100"; done\n')
        (path / "examples").mkdir()
        (path / "examples/pretrain_1b4.sh").write_text((ROOT / "examples/pretrain_1b4.sh").read_text())
        (path / "examples/configs").symlink_to(ROOT / "examples/configs")

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        self.calls_file.write_text("")
        hidden = (
            "TEXT",
            "NNODES",
            "NODE_RANK",
            "MASTER_",
            "SLURM_",
            "CUDA_VISIBLE",
            "DATA",
            "VALID",
            "TOKENIZER",
            "OUT",
            "CONFIG",
        )
        environment = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
        environment |= {"PATH": f"{self.path}/bin:{os.environ['PATH']}", "CALLS": str(self.calls_file)} | variables
        command = ["bash", str(self.path / "examples/pretrain_1b4.sh"), *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=self.path, text=True, env=environment, stdout=pipe, stderr=pipe)

    def run(self, *arguments: str, **variables: str) -> tuple[int, str, str]:
        process = self.start(*arguments, **variables)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    @property
    def calls(self) -> list[list[str]]:
        """What is made and run; that settings are checked before is no part of it."""
        calls = [json.loads(line) for line in self.calls_file.read_text().splitlines()]
        return [call for call in calls if call[:2] != ["-m", "megatron_hammer.config"]]

    @property
    def launch(self) -> list[str]:
        """Arguments of the one start of the launcher."""
        (call,) = [c for c in self.calls if c[:2] == ["-m", "megatron_hammer.launch"]]
        return call[2:]

    def config(self) -> tuple[list[str], Config]:
        """The launcher's options, and the settings that its own reader finds in the other arguments."""
        split = next(i for i, word in enumerate(self.launch) if word.endswith(".yaml"))
        return self.launch[:split], load_config(self.launch[split], self.launch[split + 1 :])


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    path = tmp_path / 'a "tree" with blanks'
    path.mkdir()
    return Tree(path)


LAST = ["checkpoint_to_hf.py", "generate.py", "plot_loss.py"]
PROGRAMS = ["make_sample_corpus.py", "train_tokenizer.py", *6 * ["preprocess_data.py"], "-m", *LAST]


def names(calls: list[list[str]]) -> list[str]:
    return [Path(call[0]).name for call in calls]


def test_a_misspelt_setting_is_refused_before_anything_is_made(tree: Tree) -> None:
    code, _, _ = tree.run("train.num_step=7")
    assert (code, tree.calls) == (2, []) and "megatron_hammer.config" in tree.calls_file.read_text()
    assert not (tree.path / "runs").exists()


def test_quick_start_runs_the_whole_chain_once(tree: Tree) -> None:
    code, out, err = tree.run("train.num_steps=7")
    assert (code, err) == (0, "")
    assert out.splitlines()[0].startswith("No NVIDIA GPU found. ")
    assert names(tree.calls) == PROGRAMS
    options, config = tree.config()
    assert options == ["--nproc", "2"]
    assert config.train.num_steps == 7 and config.train.output == "runs/pretrain_1b4"
    assert config.data.train == {f"runs/pretrain_1b4/data/{n}_text_document": 1.0 for n in ("zh", "en", "code")}
    assert list(config.data.valid or {}) == ["zh", "en", "code"]
    assert config.parallel.tensor_model_parallel_size == 2 and config.parallel.sequence_parallel
    for place in ("checkpoints/", "hf/", "metrics.jsonl", "tensorboard/", "loss.png"):
        assert re.search(rf"^  {place} ", out, re.MULTILINE), place
    assert "What to run next:" in out

    assert tree.run()[0] == 0  # again: only what can go on is started
    assert names(tree.calls) == ["-m", "generate.py", "plot_loss.py"]
    time.sleep(0.02)
    (tree.path / "runs/pretrain_1b4/checkpoints/step-00000600").mkdir()
    assert tree.run()[0] == 0  # a newer checkpoint is exported again
    assert names(tree.calls) == ["-m", *LAST]


def test_quick_start_goes_on_with_the_languages_that_it_has(tree: Tree) -> None:
    assert tree.run(LANGUAGES="en code")[0] == 0
    _, config = tree.config()
    assert list(config.data.valid or {}) == ["en", "code"]


def test_a_single_gpu_takes_no_tensor_parallelism(tree: Tree) -> None:
    code, out, _ = tree.run(GPUS="0")
    assert code == 0 and out.startswith("DATA is not set. ")
    options, config = tree.config()
    assert options == ["--nproc", "1"]
    assert config.parallel.tensor_model_parallel_size == 1 and not config.parallel.sequence_parallel


def test_data_without_a_gpu_trains_the_small_model(tree: Tree) -> None:
    code, out, _ = tree.run(DATA="2 p 1 q", VALID="v=/p/v", TOKENIZER="t", CUDA_VISIBLE_DEVICES="", GPUS="0 1")
    assert code == 0 and out.startswith("No NVIDIA GPU found. The quick start's small model is trained on DATA, ")
    options, config = tree.config()
    assert options == ["--nproc", "2"] and config.model.num_layers == 4
    assert config.data.train == {"p": 2, "q": 1} and config.data.valid == {"v": "/p/v"} and config.tokenizer.path == "t"
    assert names(tree.calls) == ["-m", *LAST]


def test_own_text_becomes_a_model(tree: Tree) -> None:
    """Both kinds of files, one of them with too few documents to hold some out; again, another text, no text."""
    texts = tree.path / "my texts"
    (texts / "below").mkdir(parents=True)
    (texts / "below" / "a.txt").write_text("x\n" * 40)
    (texts / "b.jsonl").write_text("x\n")
    code, out, err = tree.run(TEXT="my texts", GPUS="")
    assert (code, err) == (0, "") and out.startswith(
        "TEXT=my texts: a tokenizer and a small model are made of your text"
    )
    assert names(tree.calls) == [
        "reformat_corpus.py", "split_corpus.py", "reformat_corpus.py", "train_tokenizer.py",
        *3 * ["preprocess_data.py"], "-m", *LAST,
    ]  # fmt: skip
    assert tree.calls[0][1:3] == ["text", "my texts"] and tree.calls[2][1:3] == ["jsonl", "my texts"]
    _, config = tree.config()
    assert config.data.train == {f"runs/my_text/data/{n}_text_document": 1.0 for n in ("txt", "jsonl")}
    assert config.data.valid == {"txt": "runs/my_text/data/txt_valid_text_document"}
    assert "TEXT=my\\ texts bash examples/pretrain_1b4.sh train.num_steps=800" in out
    assert tree.run(TEXT="my texts", GPUS="")[0] == 0 and names(tree.calls) == ["-m", "generate.py", "plot_loss.py"]
    code, _, err = tree.run(TEXT="my texts/below", GPUS="")
    assert code == 2 and err.startswith(
        "error[E219]: OUT=runs/my_text holds a run on TEXT=my texts; set OUT to another"
    )
    (tree.path / "runs/sample/corpus").mkdir(parents=True)
    (tree.path / "runs/sample/corpus/manifest.json").touch()
    code, _, err = tree.run(TEXT="my texts", OUT="runs/sample")
    assert code == 2 and err.startswith("error[E219]: OUT=runs/sample holds a run on the sample corpus; set OUT")
    code, _, err = tree.run(TEXT="my texts", DATA="p", TOKENIZER="t")
    assert code == 2 and err.startswith("error[E218]: TEXT and DATA are both set; ")
    code, _, err = tree.run(TEXT="nothing", GPUS="")
    assert code == 2 and err.startswith("error[E218]: TEXT=nothing is not there; ") and tree.calls == []
    code, _, err = tree.run(TEXT="examples/configs", GPUS="")
    assert code == 2 and err.startswith("error[E218]: TEXT=examples/configs holds no .txt, .md or .jsonl file ")


def test_help_runs_nothing(tree: Tree) -> None:
    code, out, err = tree.run("--help")
    assert (code, err, tree.calls) == (0, "", []) and "TEXT       a folder" in out and out.startswith("From raw text")


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        ("142 /p/zh_text_document 128 /p/en_text_document", {"/p/zh_text_document": 142, "/p/en_text_document": 128}),
        ("0.5 a 1e-1 b:c", {"a": 0.5, "b:c": 0.1}),
        ("/one/prefix", {"/one/prefix": 1}),
        ('/one {odd: "prefix"}, #1', {'/one {odd: "prefix"}, #1': 1}),
        ("1 back\\slash\"quote'", {"back\\slash\"quote'": 1}),
    ],
)
def test_the_full_recipe_reads_data(tree: Tree, data: str, wanted: dict[str, float]) -> None:
    code, out, err = tree.run(DATA=data, TOKENIZER="a tok.model", OUT="my out", GPUS="0 1 2 3")
    assert (code, err) == (0, "")
    assert out.startswith("VALID is not set: no evaluation.")
    options, config = tree.config()
    assert options == ["--nproc", "4"]
    assert config.data.train == wanted and config.data.valid is None
    assert config.tokenizer.path == "a tok.model" and config.train.output == "my out"
    assert config.model.num_layers == 22
    assert names(tree.calls) == ["-m", *LAST]


def test_another_preset_is_trained_by_name(tree: Tree) -> None:
    preset = "examples/configs/hammerllm_1b4_modern.yaml"
    assert tree.run(CONFIG=preset, DATA="p", TOKENIZER="t", GPUS="0 1")[0] == 0
    assert preset in tree.launch


def test_the_full_recipe_on_several_nodes(tree: Tree) -> None:
    data = {"DATA": "p", "TOKENIZER": "t", "VALID": "zh=/p/z en=/p/e=1", "GPUS": "0 1"}
    code, _, _ = tree.run(NNODES="2", NODE_RANK="1", MASTER_ADDR="n0", MASTER_PORT="999", **data)
    options, config = tree.config()
    nodes = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "n0", "--master-port"]
    assert code == 0 and options == ["--nproc", "2", *nodes, "999"]
    assert config.data.valid == {"zh": "/p/z", "en": "/p/e=1"}
    assert names(tree.calls) == ["-m"], "node 0 does the rest"
    script(tree.path / "bin/scontrol", '#!/bin/sh\n[ "$*" = "show hostnames n[0-1]" ] && printf "n0\\nn1\\n"\n')
    assert tree.run(SLURM_NNODES="2", SLURM_NODEID="1", SLURM_JOB_NODELIST="n[0-1]", **data)[0] == 0
    assert tree.config()[0] == ["--nproc", "2", *nodes, "29500"]


def test_slurm_the_step_comes_before_the_job(tree: Tree) -> None:
    """The job has three nodes, the step the last two of them."""
    data = {"DATA": "p", "TOKENIZER": "t", "GPUS": "0 1"}
    script(tree.path / "bin/scontrol", '#!/bin/sh\n[ "$*" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"\n')
    job = {"SLURM_NNODES": "3", "SLURM_JOB_NODELIST": "n[0-2]", "SLURM_NODEID": "0"}
    step = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    assert tree.run(**data, **job, **step)[0] == 0
    nodes = ["--nnodes", "2", "--node-rank", "0", "--master-addr", "n1", "--master-port", "29500"]
    assert tree.config()[0] == ["--nproc", "2", *nodes]


def test_slurm_without_scontrol_or_with_several_tasks_a_node(tree: Tree) -> None:
    data = {"DATA": "p", "TOKENIZER": "t", "GPUS": "0 1"}
    two = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[0-1]"}
    code, _, err = tree.run(**data, **two)
    assert code == 2 and err.count("\n") == 1
    assert err.startswith("error[E255]: NNODES=2 needs MASTER_ADDR: Slurm's nodes are n[0-1], but scontrol, ")
    code, _, err = tree.run(**data, **two, SLURM_STEP_TASKS_PER_NODE="8(x2)")
    assert code == 2 and err.startswith("error[E259]: SLURM_STEP_TASKS_PER_NODE=8(x2) starts this script several times")


SRUN = """#!/usr/bin/env bash
# Slurm's srun, as far as the examples use it: the command once a task, with the variables of a step.
options=()
while [[ $1 == --* ]]; do options+=("$1") && shift; done
printf '%s\\n' "${options[@]}" >"$SRUN_OPTIONS"
for ((task = 0; task < TASKS; task++)); do
    export SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NODEID=0 SLURM_NTASKS=$TASKS SLURM_STEP_TASKS_PER_NODE=$TASKS
    "$@" || exit
done
"""


@pytest.mark.parametrize("habit", ["one_task_a_node", "one_task_a_rank"])
def test_slurm_examples(tree: Tree, habit: str) -> None:
    """Both sbatch files under a stand-in for srun, from the folder in which sbatch was called."""
    (tree.path / "examples/slurm").symlink_to(ROOT / "examples/slurm")
    script(tree.path / "bin/srun", SRUN)
    script(tree.path / "bin/scontrol", '#!/bin/sh\nprintf "n0\\nn1\\n"\n')
    by_node = habit == "one_task_a_node"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OUT", "MASTER_"))} | {
        "PATH": f"{tree.path}/bin:{os.environ['PATH']}", "CALLS": str(tree.calls_file), "GPUS": "0 1",
        "SRUN_OPTIONS": str(tree.path / "options"), "TASKS": "1" if by_node else "2", "SLURM_CPUS_PER_TASK": "16",
        "SLURM_SUBMIT_DIR": str(tree.path), "SLURM_JOB_NODELIST": "n[0-1]", "SLURM_NNODES": "1", "SLURM_NODEID": "0",
        "DATA": "p", "TOKENIZER": "t",
    }  # fmt: skip
    arguments = ["train.num_steps=7"] if by_node else ["my.yaml", "train.num_steps=7"]
    path = f"examples/slurm/{habit}.sbatch"
    done = subprocess.run(["bash", path, *arguments], cwd=tree.path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    options = (tree.path / "options").read_text().split()
    assert "--cpus-per-task=16" in options and "--kill-on-bad-exit=1" in options
    if by_node:
        assert "--ntasks-per-node=1" in options and tree.config()[0] == ["--nproc", "2"]
    else:
        assert tree.calls == 2 * [["-m", "megatron_hammer.train", "my.yaml", "train.num_steps=7"]]


SSH = """#!/usr/bin/env bash
# ssh, as far as the example uses it: the command of a shell on a machine, which is this one.
[ "$1 $2" = "-o BatchMode=yes" ] && shift 2
echo "$1" >>"$HOSTS_SEEN"
exec bash -c "$2"
"""


def by_ssh(tree: Tree, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    (tree.path / "examples/ssh").symlink_to(ROOT / "examples/ssh")
    script(tree.path / "bin/ssh", SSH)
    script(tree.path / "tools/make_venv.sh", "exit 0")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OUT", "MASTER_"))} | {
        "PATH": f"{tree.path}/bin:{os.environ['PATH']}", "CALLS": str(tree.calls_file), "HOSTS": "gpu0 gpu1",
        "HOSTS_SEEN": str(tree.path / "hosts"), "GPUS": "0 1", "DATA": "1 a b/x 2 c", "TOKENIZER": "t",
        "HAMMER_ROOT": str(tree.path), **variables,
    }  # fmt: skip
    return subprocess.Popen(["bash", "examples/ssh/launch.sh", *arguments], cwd=tree.path, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip


def test_ssh_starts_a_launcher_on_each_machine(tree: Tree) -> None:
    process = by_ssh(tree, "train.num_steps=7", DATA="1 /data/a 2 /data/c")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    launched = [call for call in tree.calls if call[:2] == ["-m", "megatron_hammer.launch"]]
    nodes = sorted(call[call.index("--node-rank") + 1] for call in launched)
    assert nodes == ["0", "1"] and all(call[call.index("--master-addr") + 1] == "gpu0" for call in launched)
    assert all("train.num_steps=7" in call and call[call.index("--nnodes") + 1] == "2" for call in launched)
    assert all(line.startswith(("[gpu0] ", "[gpu1] ")) for line in out.splitlines()) and out
    assert set((tree.path / "hosts").read_text().split()) == {"gpu0", "gpu1"}
    assert not list(Path("/tmp").glob(f"hammer-*-{process.pid}.*"))


def test_a_signal_reaches_every_machine(tree: Tree) -> None:
    process = by_ssh(tree, WAIT="1", DATA="/data/a")
    assert process.stdout is not None
    waiting = 0
    while waiting < 2:
        waiting += "waiting" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err


def test_ssh_without_machines_is_refused(tree: Tree) -> None:
    process = by_ssh(tree, HOSTS="")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and err.startswith("error[E255]: HOSTS is not set; ")


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"DATA": "p"}, "error[E256]: TOKENIZER is not set but DATA is; "),
        (
            {"DATA": "1 a b", "TOKENIZER": "t", "GPUS": "0"},
            "error[E253]: DATA=1 a b must be pairs of weight and prefix; ",
        ),
        (
            {"DATA": "1 a b c", "TOKENIZER": "t", "GPUS": "0"},
            "error[E253]: DATA: b must be a number, the weight of c; ",
        ),
        ({"DATA": "p", "TOKENIZER": "t", "GPUS": "0", "VALID": "zh"}, "error[E254]: VALID: zh must be name=prefix; "),
        ({"NNODES": "two"}, "error[E255]: NNODES=two must be a whole number; "),
        ({"VALID": "zh=p"}, "error[E256]: VALID is set but DATA is not, and it belongs to DATA; "),
        ({"TOKENIZER": "t"}, "error[E256]: TOKENIZER is set but DATA is not, "),
        ({"NNODES": "2"}, "error[E255]: NNODES=2 needs MASTER_ADDR; "),
        ({"NNODES": "2", "MASTER_ADDR": "a"}, "error[E258]: NNODES=2 needs GPUs and DATA; "),
        ({"CONFIG": "my.yaml"}, "error[E258]: CONFIG=my.yaml needs GPUs and DATA; "),
    ],
)
def test_a_mistake_ends_before_anything_runs(tree: Tree, variables: dict[str, str], line: str) -> None:
    code, _, err = tree.run(**variables)
    assert (code, err.count("\n"), tree.calls) == (2, 1, [])
    assert err.startswith(line)


def test_the_output_folder_has_one_name(tree: Tree) -> None:
    code, _, err = tree.run("train.output=elsewhere")
    assert code == 2 and err.startswith("error[E257]: train.output=elsewhere must be given as OUT; set OUT=elsewhere")


@pytest.mark.parametrize("code", [2, 5, 7])
def test_exit_codes_pass_through(tree: Tree, code: int) -> None:
    returned, out, _ = tree.run(CODE=str(code))
    assert returned == code and "Done" not in out and names(tree.calls)[-1] == "-m"


def test_a_dry_run_exports_nothing(tree: Tree) -> None:
    assert tree.run("train.dry_run=true")[0] == 0
    assert names(tree.calls)[-1] == "-m"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_training_program(tree: Tree, signum: signal.Signals) -> None:
    process = tree.start("a.b=1", WAIT="1", OUT="a run")
    assert process.stdout is not None
    while "waiting" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signum)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert (
        "Stopped and saved. The same command goes on from there: OUT=a\\ run bash examples/pretrain_1b4.sh a.b=1" in out
    )


# ---------------------------------------------------------------------------------------------------------------------
# tools/make_venv.sh
# ---------------------------------------------------------------------------------------------------------------------


def make_venv(tmp_path: Path, **variables: str) -> tuple[int, str]:
    """Run it in a copy of the tree's outline, with no PATH but coreutils and the given stand-ins."""
    for name in ("pyproject.toml", "setup.py", "tools/make_venv.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "csrc").mkdir()
    path = tmp_path / "bin"
    path.mkdir(exist_ok=True)
    for program in ("bash", "dirname", "find", "sort", "xargs", "sha256sum", "cut", "mkdir", "flock", "touch", "rm"):
        place = subprocess.run(["bash", "-c", f"type -P {program}"], capture_output=True, text=True, check=True)
        (path / program).symlink_to(place.stdout.strip())
    return make_venv_again(tmp_path, **variables)


def make_venv_again(tmp_path: Path, **variables: str) -> tuple[int, str]:
    environment = {"PATH": str(tmp_path / "bin"), **variables}
    done = subprocess.run(
        ["bash", str(tmp_path / "tools/make_venv.sh")], capture_output=True, text=True, env=environment
    )
    assert done.stderr.count("\n") == 1, "one line"
    assert not list((tmp_path / ".venv").glob("lib*")), "nothing is made"
    return done.returncode, done.stderr


def python_that_says(path: Path, lacks: str, version: str = "3.12") -> None:
    """A Python whose probe finds ``lacks``."""
    script(path, f'#!/bin/sh\ncase "$2" in *sysconfig*) printf "{lacks}";; *) echo {version};; esac\n')


def test_a_machine_without_python_is_told_so(tmp_path: Path) -> None:
    code, err = make_venv(tmp_path)
    assert code == 2 and err.startswith("error[E250]: Python 3.11 to 3.14 was not found (no Python at all); ")


def test_an_unsupported_python_is_named(tmp_path: Path) -> None:
    python_that_says(tmp_path / "bin/python3", "version 3.9")
    code, err = make_venv(tmp_path)
    assert code == 2 and "(python3 is 3.9)" in err
    python_that_says(tmp_path / "other", "version 3.15")
    code, err = make_venv_again(tmp_path, PYTHON=str(tmp_path / "other"))
    assert code == 2 and "(PYTHON=/" in err and "other is 3.15)" in err


SCRIPTS = (
    "docker/install.sh", "examples/anneal.sh", "examples/continue_from_hf.sh", "examples/long_context.sh",
    "examples/pretrain_1b4.sh", "examples/pretrain_8b.sh", "tests/run.sh", "tools/make_venv.sh",
)  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_another_shell_is_told_to_take_bash(name: str) -> None:
    """The beginning of each program, to the line before ``set``, is one that every shell reads."""
    text = (ROOT / name).read_text(encoding="utf-8")
    head = text[: text.index("\nset -euo pipefail\n")] + "\necho went on\n"
    read = subprocess.run(["bash", "-c", f". {ROOT / name}; echo $?"], capture_output=True, text=True)
    assert (
        read.stdout == "2\n"
        and read.stderr == f"error[E283]: {ROOT / name} is a program for bash; run: bash {ROOT / name}\n"
    )
    if Path("/bin/dash").exists():
        other = subprocess.run(["dash", "-c", head, name], capture_output=True, text=True)
        assert (other.returncode, other.stdout) == (2, "") and other.stderr.endswith(f"run: bash {name}\n")
    same = subprocess.run(["bash", "-c", head, name], capture_output=True, text=True)
    assert same.stdout == "went on\n"


def test_surroundings_in_which_no_venv_works_are_named(tmp_path: Path) -> None:
    code, err = make_venv(tmp_path, PYTHONHOME="/opt/conda")
    assert code == 2 and err.startswith("error[E251]: PYTHONHOME=/opt/conda has ") and "; unset PYTHONHOME, and" in err
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/pyvenv.cfg").write_text(
        "home = /usr/bin\ncommand = /usr/bin/python3.12 -m venv /old place/.venv\n"
    )
    code, err = make_venv_again(tmp_path)
    assert code == 2 and err.startswith("error[E251]: .venv was made as /old place/.venv, and moved or copied to ")
    assert f"; rm -rf {tmp_path}/.venv, then call" in err
    (tmp_path / ".venv/pyvenv.cfg").write_text(f"command = /usr/bin/python3.12 -m venv {tmp_path}/.venv\n")
    assert "E250" in make_venv_again(tmp_path)[1], "it is of here"


def test_missing_parts_of_python_are_named_with_their_packages(tmp_path: Path) -> None:
    python_that_says(tmp_path / "bin/python3", "venv\\nheaders\\n")
    code, err = make_venv(tmp_path)
    assert code == 2
    assert err.startswith("error[E251]: python3 (Python 3.12) lacks the module venv with ensurepip, the headers")
    assert "; apt-get install python3.12-venv python3.12-dev, or " in err


def test_a_missing_compiler_is_named(tmp_path: Path) -> None:
    python_that_says(tmp_path / "bin/python3.12", "headers\\n")  # a later candidate has everything
    python_that_says(tmp_path / "bin/python3.11", "", "3.11")
    code, err = make_venv(tmp_path)
    assert code == 2 and err.startswith("error[E252]: a C++ compiler (c++, g++) was not found; apt-get install g++")


CUDA_TORCH = 'cuda = "13.0"\n__version__ = "2.15.0+cu130"\n'

VENV_STUB = r"""
# A Python that does what make_venv.sh asks of one, without the network. pip installs the stub of torch, and builds the
# package by running the true setup.py: in an environment that sees torch only where the build is not isolated.
import os, pathlib, runpy, subprocess, sys
words, root = sys.argv[1:], pathlib.Path.cwd()
with open(root / "calls", "a") as calls:
    print(*words, file=calls)
if words[:2] == ["-m", "venv"]:
    place = root / words[2] / "bin/python"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(pathlib.Path(os.environ["STUB"]))
elif words[0] == "--version":
    print("Python 3.12.0")
elif words[:3] == ["-m", "pip", "install"] and "--editable" in words:
    seen = {"PYTHONPATH": os.environ["STUB_PACKAGES"]} if "--no-build-isolation" in words else {}
    done = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], env={**os.environ, **seen})
    sys.exit(done.returncode)
elif words[0] == "-c" and words[1] != "import pip":
    sys.path[:0] = ["", os.environ["STUB_PACKAGES"]]
    exec(words[1])
"""


def make_venv_of(tmp_path: Path, torch_version: str, nvcc: bool, **variables: str) -> tuple[str, list[str]]:
    """The whole of make_venv.sh with the true setup.py, and compilers that only make the file they are asked for."""
    tree = tmp_path / "tree"
    for name in ("pyproject.toml", "setup.py", "tools/make_venv.sh"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text((ROOT / name).read_text())
    (tree / "csrc").symlink_to(ROOT / "csrc")
    for room in ("base", "checkpoint", "kernels/native", "sampling", "tokenizer"):
        (tree / "megatron_hammer" / room).mkdir(parents=True)
    (tree / "megatron_hammer/__init__.py").write_text('__version__ = "0"\n')
    packages = tmp_path / "packages"
    script(packages / "torch/__init__.py", "raise SystemExit('a build imports no torch')\n")
    (packages / "torch/version.py").write_text(torch_version)
    compiler = '#!/bin/sh\nwhile [ $# -gt 1 ]; do if [ "$1" = -o ]; then : >"$2"; fi; shift; done\n'
    for name in ("c++", *(["nvcc"] if nvcc else [])):
        script(tmp_path / "bin" / name, compiler)
    script(tmp_path / "bin/python3.12", f"#!{sys.executable}\n{VENV_STUB}")
    for name in ("python3.11", "python3.13", "python3.14", "nvidia-smi"):
        script(tmp_path / "bin" / name, "exit 1\n")
    environment = {
        "PATH": f"{tmp_path}/bin:/usr/bin:/bin", "STUB": str(tmp_path / "bin/python3.12"), "HOME": str(tmp_path),
        "STUB_PACKAGES": str(packages), "CC": f"{tmp_path}/bin/c++", "CXX": f"{tmp_path}/bin/c++",
        "CUDA_HOME": str(tmp_path / "no_cuda"), **variables,
    }  # fmt: skip
    done = subprocess.run(["bash", str(tree / "tools/make_venv.sh")], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, (tree / "calls").read_text().splitlines()


@pytest.mark.parametrize("variable, package", [("TORCH_INDEX_URL", "torch"), ("PIP_INDEX_URL", "pip")])
def test_an_index_that_does_not_answer_is_named_at_once(tmp_path: Path, variable: str, package: str) -> None:
    python = (
        '#!/bin/sh\ncase "$*" in *sysconfig*) ;; *"index versions"*) echo "$@" >>asked; exit 1;;'
        ' *"pip install"*) exit 9;; esac\n'
    )
    script(tmp_path / "bin/python3.12", python)
    script(tmp_path / ".venv/bin/python", python)
    script(tmp_path / "bin/c++", "exit 0\n")
    code, err = make_venv(tmp_path, **{variable: "http://nowhere.invalid/simple"})
    assert code == 2 and err.startswith(f"error[E222]: {variable}=http://nowhere.invalid/simple does not answer")
    (asked,) = (tmp_path / "asked").read_text().splitlines()
    assert f"index versions {package} --index-url http://nowhere.invalid/simple --retries 0" in asked


def test_nvcc_and_a_cuda_torch_give_the_cuda_kernels(tmp_path: Path) -> None:
    """The build sees the torch that it is for: torch, what builds the package, then the package, in one environment."""
    out, calls = make_venv_of(tmp_path, CUDA_TORCH, nvcc=True)
    built = tmp_path / "tree/megatron_hammer/kernels/native/_cuda.so"
    assert built.exists() and "the CUDA kernels are built: megatron_hammer/kernels/native/_cuda.so\n" in out
    assert "WARNING" not in out
    installs = [call for call in calls if call.startswith("-m pip install")]
    assert [install.split()[-1] for install in installs] == ["torch>=2.11,<2.16", "pybind11>=2.12", ".[dev]"]
    assert "--no-build-isolation" in installs[-1]


def test_a_file_system_without_locks_is_noted(tmp_path: Path) -> None:
    """Lustre's default mount: flock(2) is ENOSYS, of which flock(1) makes exit code 65."""
    script(tmp_path / "bin/flock", "#!/bin/sh\necho 'flock: 9: Function not implemented' >&2\nexit 65\n")
    out, _ = make_venv_of(tmp_path, "cuda = None\n__version__ = '2.15.0+cpu'\n", False, HAMMER_NO_EXTENSIONS="1")
    assert "tree has no locks; until .venv is complete, call" in out and "\n.venv is complete\n" in out
    assert "waiting for another" not in out


@pytest.mark.parametrize(
    "torch_version, nvcc, variables, said",
    [
        (CUDA_TORCH, False, {}, "WARNING: the CUDA kernels are left out: nvcc was not found on PATH or under CUDA_"),
        (CUDA_TORCH, True, {"HAMMER_CUDA_ARCHS": "none"}, "\nno CUDA kernels: HAMMER_CUDA_ARCHS=none\n"),
        (CUDA_TORCH, True, {"HAMMER_NO_EXTENSIONS": "1"}, "\nno compiled kernels: HAMMER_NO_EXTENSIONS=1\n"),
        ("cuda = None\n__version__ = '2.15.0+cpu'\n", True, {}, ""),
    ],
)  # fmt: skip
def test_what_was_not_built_is_said(
    tmp_path: Path, torch_version: str, nvcc: bool, variables: dict[str, str], said: str
) -> None:
    """After a quiet pip, with the reason; nothing where no GPU is meant."""
    out, _ = make_venv_of(tmp_path, torch_version, nvcc, **variables)
    assert not (tmp_path / "tree/megatron_hammer/kernels/native/_cuda.so").exists()
    assert said in out and ("WARNING" in out) == ("WARNING" in said)


def test_torch_range_is_stated_once_and_the_same() -> None:
    (ours,) = re.findall(r"torch_range='(.+?)'", (ROOT / "tools/make_venv.sh").read_text())
    assert f'"{ours}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("path", ["examples/pretrain_1b4.sh", "tools/make_venv.sh", "tests/run.sh", ".ci/run", *SBATCH])
def test_shell_syntax(path: str) -> None:
    assert subprocess.run(["bash", "-n", str(ROOT / path)], capture_output=True).stderr == b""


# ---------------------------------------------------------------------------------------------------------------------
# The last two stages: picture and generation
# ---------------------------------------------------------------------------------------------------------------------


def write_metrics(path: Path, lines: list[dict[str, object]], tail: str = "") -> None:
    path.mkdir(exist_ok=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)


def test_plot_reads_gaps_sets_and_a_torn_line(tmp_path: Path) -> None:
    lines: list[dict[str, object]] = [{"step": i, "loss": 9.0 - i, "lr": 1e-3 * i} for i in range(1, 6)]
    lines[1]["loss"] = None
    lines[3] |= {"valid/zh/loss": 7.0, "valid/zh/perplexity": 1096.6}
    for i, name in ((0, "a"), (0, "b"), (2, "a")):
        lines[i] |= {f"source/{name}/loss": 8.0 - i, f"source/{name}/tokens": 32 * (i + 1)}
    write_metrics(tmp_path, lines, tail='{"step": 6, "lo')
    curves = read_curves(tmp_path / "metrics.jsonl")
    assert curves.steps == [1, 2, 3, 4, 5] and np.isnan(curves.loss[1]) and curves.valid == {"zh": ([4], [7.0])}
    assert curves.sources == {"a": ([1, 3], [8.0, 6.0]), "b": ([1], [8.0])} and curves.read == {"a": 96, "b": 32}
    plot_loss(tmp_path, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 2
    assert _source(tmp_path, curves, sayer("en")) == "Source: metrics.jsonl of the run, to step 5"
    where = {"device": "cpu", "processor": "EPYC", "ranks": 2}
    (tmp_path / "starts.jsonl").write_text(json.dumps({"time": "2026-11-30T12:31:52+00:00", "environment": where}))
    assert _source(tmp_path, curves, sayer("en")).endswith("to step 5; last started on 2026-11-30, ranks: 2, EPYC")
    with (tmp_path / "starts.jsonl").open("a") as file:  # later: one that says little, and one that is torn
        file.write('\n{"time": "2026-12-01T", "environment": {}}\n{"time": "2026-12')
    assert _source(tmp_path, curves, sayer("en")).endswith("to step 5; last started on 2026-12-01")


def test_moving_average_keeps_the_start_and_skips_gaps() -> None:
    values = np.array([1.0, 2.0, np.nan, 4.0, 9.0])
    assert moving_average(values, 3).tolist() == [1.0, 1.5, 3.0, 6.5, 6.5]
    assert moving_average(values, 1).tolist()[3:] == [4.0, 9.0]
    assert np.isnan(moving_average(values, 1)[2])


@pytest.mark.parametrize(
    ("text", "code"), [(None, "E380"), ("", "E381"), ("[]\n", "E382"), ('{"step": 1}\n', "E382"), ("\xff\n", "E382")]
)
def test_plot_refuses_what_is_no_run(tmp_path: Path, text: str | None, code: str) -> None:
    if text is not None:
        (tmp_path / "metrics.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError) as caught:
        plot_loss(tmp_path, tmp_path / "loss.png")
    assert caught.value.code == code and not (tmp_path / "loss.png").exists()


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with a byte-level tokenizer, made here."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("hf")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    from tokenizers.decoders import ByteLevel

    raw.decoder = ByteLevel()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>").save_pretrained(str(folder))
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=258, bos_token_id=0, eos_token_id=1, **shape)).save_pretrained(str(folder))
    return folder


def test_generate_continues_each_prompt_and_repeats_itself(hf_folder: Path) -> None:
    from tests.huggingface.continued import generate

    prompts = ["abc", "服务"]
    texts = list(generate(hf_folder, prompts, max_new_tokens=8))
    assert all(text.startswith(prompt) and len(text) > len(prompt) for text, prompt in zip(texts, prompts))
    assert texts == list(generate(hf_folder, prompts, max_new_tokens=8))
    assert texts != list(generate(hf_folder, prompts, max_new_tokens=8, seed=1))
    greedy = [list(generate(hf_folder, prompts, max_new_tokens=8, temperature=0, seed=s)) for s in (0, 1)]
    assert greedy[0] == greedy[1]


def test_generate_refuses_a_folder_that_lacks_a_weight(hf_folder: Path, tmp_path: Path) -> None:
    """transformers would draw it at random."""
    from safetensors.torch import load_file, save_file

    from tests.huggingface.continued import generate

    folder = Path(shutil.copytree(hf_folder, tmp_path / "hf"))
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"error\[E491\].*up_proj.weight is among the missing_keys"):
        list(generate(folder, ["a"]))


def test_generate_refuses_a_folder_without_a_model(tmp_path: Path) -> None:
    from tests.huggingface.continued import generate

    with pytest.raises(CheckpointError, match="no Hugging Face folder"):
        list(generate(tmp_path, ["a"]))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        list(generate(tmp_path, ["a"]))
    assert caught.value.code == "E491" and "\n" not in str(caught.value)
    with pytest.raises(ConfigError) as usage:
        list(generate(tmp_path, ["a"], top_k=-1))
    assert usage.value.code == "E245"
