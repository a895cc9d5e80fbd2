"""What the examples beside pretrain_1b4.sh start, with stand-ins: other recipes, Kubernetes, SkyPilot.

The stand-in for Python writes down how it is called and makes the files by which a stage is known to be done; the
settings are then read as the launcher reads them. Fields of manifests are those of the sources of the two projects.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from megatron_hammer.config import Config, load_config
from megatron_hammer.tokenizer import load as tokenizer_load

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"

PYTHON = r"""#!/usr/bin/env bash
printf '%s\037' "$@" >>"$CALLS" && printf '\036' >>"$CALLS"
while (($#)); do
    case $1 in
        --save) mkdir -p "$2" && cp "$MODEL" "$2/model.yaml" ;;
        --output-prefix) touch "$2_text_document.idx" ;;
        -c) echo --append-eod ;;
        */branch.py) mkdir -p "$NEW" && echo 'printf "trained\037\036" >>"$CALLS"' >"$NEW/branch.sh" ;;
    esac
    shift
done
"""


class Shell:
    """Runs an example with the stand-in."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls_file = folder, folder / "calls"
        python, model = folder / "python", folder / "small.yaml"
        python.write_text(PYTHON)
        python.chmod(0o755)
        sizes = "hidden_size: 64, ffn_hidden_size: 128, num_layers: 2, num_attention_heads: 4, vocab_size: 300"
        model.write_text(f"model: {{{sizes}}}\n")
        self.environment = os.environ | {"PYTHON": str(python), "CALLS": str(self.calls_file), "MODEL": str(model)}

    def run(self, name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        self.calls_file.write_text("")
        command = ["bash", str(EXAMPLES / name), *arguments]
        environment = {name: value for name, value in self.environment.items() if name not in ("DATA", "OUT", "CONFIG")}
        return subprocess.run(command, cwd=self.folder, env=environment | variables, capture_output=True, text=True)

    @property
    def calls(self) -> list[list[str]]:
        return [call.split("\037")[:-1] for call in self.calls_file.read_text().split("\036")[:-1]]

    def programs(self) -> list[str]:
        return [Path(call[1] if call[0] == "-m" else call[0]).name for call in self.calls]


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    folder = tmp_path / "with 'blanks' 中"
    folder.mkdir()
    return Shell(folder)


def launched(shell: Shell) -> tuple[list[str], Config]:
    """The launcher's options, and its settings as it reads them."""
    (words,) = [call[2:] for call in shell.calls if call[:2] == ["-m", "megatron_hammer.launch"]]
    split = next(i for i, word in enumerate(words) if word.endswith(".yaml"))
    return words[:split], load_config(shell.folder / words[split], words[split + 1 :])


# ---- recipes ---------------------------------------------------------------------------------------------------------


def test_pretraining_goes_on_from_hugging_face(shell: Shell) -> None:
    done = shell.run("continue_from_hf.sh", "my model", "my text", "out here", "train.num_steps=7", NPROC="4")
    assert (done.returncode, done.stderr) == (0, "")
    stages = ["hf_to_checkpoint.py", "-c", "preprocess_data.py", "megatron_hammer.launch", "checkpoint_to_hf.py"]
    assert shell.programs() == stages
    options, config = launched(shell)
    config.validate(4)
    assert options == ["--nproc", "4"] and config.train.num_steps == 7, "arguments replace the script's"
    assert config.checkpoint.init_from == "out here/imported" and config.tokenizer.path == "my model"
    assert config.data.train == {"out here/data/text_text_document": 1} and config.train.output == "out here/run"
    preprocess, export = shell.calls[2], shell.calls[4]
    assert "--append-eod" in preprocess and "--prepend-bos" not in preprocess and "my text" in preprocess
    assert export[1:] == ["--load", "out here/run", "--output", "out here/hf"]
    assert shell.run("continue_from_hf.sh", "my model", "my text", "out here").returncode == 0
    assert shell.programs() == stages[3:], "what is there is not made again"
    (shell.folder / "P.idx").touch()
    assert shell.run("continue_from_hf.sh", "my model", "P", "out here").returncode == 0
    assert launched(shell)[1].data.train == {"P": 1}


def test_documents_begin_as_the_models_tokenizer_has_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (EXAMPLES / "continue_from_hf.sh").read_text(encoding="utf-8")
    program = re.search(r'-c \'\n(.*?)\' "\$hf"', text, re.DOTALL)
    assert program is not None
    llama = SimpleNamespace(bos_id=1, eos_id=2, path=Path("tokenizer.json"), template_ids=lambda: [1])
    llama2 = SimpleNamespace(bos_id=1, eos_id=2, path=Path("tokenizer.model"), template_ids=list)
    qwen = SimpleNamespace(bos_id=None, eos_id=2, path=Path("tokenizer.json"), template_ids=list)
    silent = SimpleNamespace(bos_id=1, eos_id=None, path=Path("tokenizer.json"), template_ids=list)
    monkeypatch.setattr(sys, "argv", ["-c", "folder"])
    said = []
    for tokenizer in (llama, llama2, qwen, silent):
        monkeypatch.setattr(tokenizer_load, "load_tokenizer", lambda path, found=tokenizer: found)
        exec(program[1], {})
        said.append(capsys.readouterr().out.split())
    assert said == [["--prepend-bos", "--append-eod"]] * 2 + [["--append-eod"], []]


def test_a_longer_context_is_a_branch_that_is_exported(shell: Shell) -> None:
    arguments = ("long_context.sh", "my run", "new", "5e9", "{a b: 1}", "train.global_batch_size=32")
    done = shell.run(*arguments, STEP="40", NEW="new")
    assert (done.returncode, done.stderr) == (0, "")
    assert shell.programs() == ["branch.py", "trained", "checkpoint_to_hf.py"]
    branch = shell.calls[0][1:]
    assert branch[:7] == ["my run", "--step", "40", "--output", "new", "--tokens", "5e9"]
    config = load_config(EXAMPLES / "configs/hammerllm_1b4_faithful.yaml", branch[7:])
    recipe = load_config(EXAMPLES / "recipes/4k_to_32k.yaml", ["model.vocab_size=300"]).phases[-1]
    assert (config.data.seq_length, config.model.rope_theta) == (recipe.seq_length, recipe.rope_theta)
    assert config.model.max_position_embeddings == 32768 and config.data.train == {"a b": 1}
    assert config.train.global_batch_size == 32
    assert shell.run(*arguments, NEW="new").returncode == 0 and shell.programs() == ["trained", "checkpoint_to_hf.py"]


@pytest.mark.parametrize(
    ("name", "arguments", "line"),
    [
        ("anneal.sh", ["a", "1", "b", "5e9"], "error[E201]: anneal.sh needs RUN STEP NEW TOKENS MIX; "),
        ("continue_from_hf.sh", ["a", "b"], "error[E201]: continue_from_hf.sh needs HF TEXT OUT; "),
        ("long_context.sh", ["a", "b", "c"], "error[E201]: long_context.sh needs RUN NEW TOKENS MIX; "),
        ("pretrain_8b.sh", ["plan", "8"], "error[E201]: pretrain_8b.sh plan needs the number of GPUs and their name; "),
        ("pretrain_8b.sh", [], "error[E256]: DATA is not set; "),
    ],
)
def test_a_call_that_lacks_something_is_refused(shell: Shell, name: str, arguments: list[str], line: str) -> None:
    done = shell.run(name, *arguments)
    assert (done.returncode, shell.calls) == (2, []) and done.stderr.startswith(line)
    help_text = shell.run(name, "--help")
    assert help_text.returncode == 0 and f"bash examples/{name}" in help_text.stdout and shell.calls == []


def test_the_8b_is_planned_and_started(shell: Shell) -> None:
    done = shell.run("pretrain_8b.sh", "plan", "64", "h100", "--show", "3")
    preset = str(EXAMPLES / "configs/llama_8b.yaml")
    assert done.returncode == 0, done.stderr
    wanted = [preset, "--gpus", "64", "--gpu", "h100", "--show", "3", "model.vocab_size=128256"]
    assert shell.programs() == ["plan.py"] and shell.calls[0][1:] == wanted
    assert shell.run("pretrain_8b.sh", "plan", "8", "h200", TOKENIZER="a t").returncode == 0
    assert shell.calls[0][-1] == "tokenizer.path=a t"
    tree = shell.folder / "tree"  # whose pretrain_1b4.sh says how it was called
    (tree / "examples").mkdir(parents=True)
    (tree / "examples/pretrain_8b.sh").symlink_to(EXAMPLES / "pretrain_8b.sh")
    (tree / "examples/pretrain_1b4.sh").write_text('echo "$CONFIG|$OUT|$DATA|$*"\n')
    command = ["bash", str(tree / "examples/pretrain_8b.sh"), "train.num_steps=7"]
    done = subprocess.run(command, env=shell.environment | {"DATA": "p"}, capture_output=True, text=True)
    assert done.stdout == f"{tree}/examples/configs/llama_8b.yaml|runs/pretrain_8b|p|train.num_steps=7\n"


# ---- manifests -------------------------------------------------------------------------------------------------------

# kubeflow/training-operator, pkg/apis/kubeflow.org/v1: pytorch_types.go (2f18ab7), common_types.go (186ac6c).
JOB = {"runPolicy", "elasticPolicy", "pytorchReplicaSpecs", "nprocPerNode"}
RUN_POLICY = {"cleanPodPolicy", "ttlSecondsAfterFinished", "activeDeadlineSeconds", "backoffLimit", "schedulingPolicy"}
REPLICA = {"replicas", "template", "restartPolicy"}
# Kubernetes' core/v1, as far as the manifest needs it.
POD = {"terminationGracePeriodSeconds", "containers", "volumes"}
CONTAINER = {"name", "image", "command", "args", "env", "ports", "resources", "volumeMounts"}
# skypilot-org/skypilot, sky/utils/schemas.py (00052df): get_task_schema and _get_single_resources_schema.
TASK = {
    "name",
    "workdir",
    "num_nodes",
    "resources",
    "file_mounts",
    "setup",
    "run",
    "envs",
    "secrets",
    "volumes",
    "config",
}
RESOURCES = {"infra", "accelerators", "cpus", "memory", "instance_type", "use_spot", "job_recovery", "disk_size",
             "network_tier", "image_id"}  # fmt: skip
RECOVERY = {"strategy", "max_restarts_on_errors", "recover_on_exit_codes"}


def what_runs(program: str, folder: Path, **variables: str) -> list[str]:
    """Number of nodes, of this node, address of the first and port, as pretrain_1b4.sh gets them."""
    (folder / "examples").mkdir(exist_ok=True)
    (folder / "examples/pretrain_1b4.sh").write_text('echo "$NNODES $NODE_RANK $MASTER_ADDR $MASTER_PORT"\n')
    environment = {"PATH": os.environ["PATH"], "MASTER_PORT": "23456"} | variables
    done = subprocess.run(["bash", "-c", program], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_pytorchjob_has_the_operators_fields_and_numbers_nodes(tmp_path: Path) -> None:
    job: dict[str, Any] = yaml.safe_load((EXAMPLES / "kubernetes/pytorchjob.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"]), "a DNS label, as the operator asks"
    assert job.keys() == {"apiVersion", "kind", "metadata", "spec"} and job["spec"].keys() <= JOB
    assert job["spec"]["runPolicy"].keys() <= RUN_POLICY
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert replicas.keys() == {"Master", "Worker"} and replicas["Master"]["replicas"] == 1
    for replica in replicas.values():
        assert replica.keys() <= REPLICA and replica["restartPolicy"] == "OnFailure", "75 is below 128: not ExitCode"
        pod = replica["template"]["spec"]
        (container,) = pod["containers"]
        assert pod.keys() <= POD and container.keys() <= CONTAINER
        assert container["name"] == "pytorch" and container["image"]
        assert [port["name"] for port in container["ports"]] == ["pytorchjob-port"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert all(isinstance(variable.get("value", ""), str) for variable in container["env"])
    assert container["command"] == ["bash", "-c"]
    (program,) = container["args"]
    given = {"MASTER_ADDR": "hammer-1b4-master-0", "POD_IP": "10.0.0.7"}
    assert what_runs(program, tmp_path, **given, PET_NNODES="4", WORLD_SIZE="32", RANK="0") == [
        "4", "0", "10.0.0.7", "23456",
    ]  # fmt: skip
    assert what_runs(program, tmp_path, **given, WORLD_SIZE="4", RANK="3") == [
        "4", "3", "hammer-1b4-master-0", "23456",
    ], "operators before PET_NNODES count nodes in WORLD_SIZE"  # fmt: skip


def test_the_skypilot_task_has_its_fields_and_numbers_nodes(tmp_path: Path) -> None:
    task: dict[str, Any] = yaml.safe_load((EXAMPLES / "skypilot/pretrain.yaml").read_text(encoding="utf-8"))
    assert task.keys() <= TASK and task["resources"].keys() <= RESOURCES
    recovery = task["resources"]["job_recovery"]
    assert recovery.keys() <= RECOVERY and recovery["recover_on_exit_codes"] == [75]
    assert all(isinstance(value, str) for value in task["envs"].values()) and isinstance(task["num_nodes"], int)
    assert task["setup"].strip() == "bash tools/make_venv.sh" and (ROOT / "tools/make_venv.sh").exists()
    nodes = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    assert what_runs(task["run"], tmp_path, **nodes) == ["2", "1", "10.0.0.1", "23456"]


def test_both_pages_name_every_example() -> None:
    pages = [(EXAMPLES / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md")]
    names = [path.name for path in EXAMPLES.iterdir() if path.suffix == ".sh"]
    names += [
        f"{path.parent.name}/{path.name}" for path in EXAMPLES.glob("*/*.yaml") if path.parent.name != "monitoring"
    ]
    for page in pages:
        assert [name for name in names if name not in page] == []
        for link in re.findall(r"\]\((?!http)([^)#]+)", page):
            assert (EXAMPLES / link).exists(), link
    blocks = [re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for page in pages]
    assert blocks[0] == blocks[1]
