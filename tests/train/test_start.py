"""All ranks start from one checkpoint, with one set of inputs, in one folder; else all of them are refused alike.

Each rank is a thread with a config of its own, as two nodes have paths of their own that should be the same folder.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hammer.base.errors import ConfigError, from_exception
from megatron_hammer.checkpoint.folder import newest_checkpoint
from megatron_hammer.config import describe_fields
from megatron_hammer.kernels import norm
from megatron_hammer.parallel.agreement import BeforeStart
from megatron_hammer.train import begin, start
from megatron_hammer.train.__main__ import _place_of_torchrun
from megatron_hammer.train.begin import Beginning
from megatron_hammer.train.prepare import Prepared, find_starting_point, prepare
from tests.parallel.test_agreement import start_together
from tests.train.runs import begin_run, config_for, overrides, train_here
from tests.train.test_changes import rewrite


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A node with ``data`` and ``run``, which has checkpoints of the steps 3 and 4 of 12."""
    folder = tmp_path_factory.mktemp("shared")
    begin_run(folder)
    return folder


@pytest.fixture
def node(shared: Path, tmp_path: Path) -> Path:
    """A second node with files of its own."""
    shutil.copytree(shared, tmp_path / "node")
    return tmp_path / "node"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "PROBE_SECONDS", 0.3)


def started(arguments: Callable[[int], list[str]], size: int = 2) -> list[Prepared | str]:
    """Each rank with its own arguments: what it is prepared for, or the error it raised."""

    describe_fields()  # once before the threads: CPython 3.11 does not parse in two of them at a time

    def work(ranks: BeforeStart) -> Prepared:
        threading.current_thread().name = f"rank {ranks.rank}"
        with ExitStack() as held:
            return Beginning(ranks, held, config_for(arguments(ranks.rank)), 0, False).agree()

    found = start_together(size, work)
    return [result if isinstance(result, Prepared) else str(result) for result in found]


def refused(arguments: Callable[[int], list[str]], code: str) -> str:
    """The one line with which all ranks end."""
    lines = set(map(str, started(arguments)))
    assert len(lines) == 1
    line = lines.pop()
    assert line.startswith(f"error[{code}]: rank 1: "), line
    return line


def test_a_stale_listing_on_one_rank_decides_nothing(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1's listing lacks the newest folder; it opens it all the same, by the name that rank 0 tells."""
    listing = Path.iterdir

    def stale(path: Path) -> Iterator[Path]:
        hidden = "step-00000004" if threading.current_thread().name == "rank 1" else ""
        return (entry for entry in listing(path) if entry.name != hidden)

    monkeypatch.setattr(Path, "iterdir", stale)
    threading.current_thread().name, own = "rank 1", threading.current_thread().name
    seen = newest_checkpoint(shared / "run")
    threading.current_thread().name = own
    assert seen is not None and seen.step == 3, "the stand-in hides it"
    both = started(lambda rank: overrides(shared / "data", shared / "run"))
    assert [p.resume.step for p in both if isinstance(p, Prepared) and p.resume] == [4, 4]
    assert not list((shared / "run").glob(".probe-*")), "the probe is gone"


def test_a_checkpoint_that_one_rank_cannot_see_refuses_all(shared: Path, node: Path) -> None:
    shutil.rmtree(node / "run" / "checkpoints" / "step-00000004")
    line = refused(lambda rank: overrides(shared / "data", (shared, node)[rank] / "run"), "E583")
    assert f"{node}/run/checkpoints/step-00000004 cannot be read, but rank 0 starts from its step 4" in line


def test_another_checkpoint_of_the_same_name_refuses_all(shared: Path, node: Path) -> None:
    shutil.rmtree(node / "run")
    others = overrides(node / "data", node / "run", "train.num_steps=4", "schedule.decay_steps=12", "optimizer.lr=1e-3")
    assert train_here(0, others) == 0
    line = refused(lambda rank: overrides(shared / "data", (shared, node)[rank] / "run"), "E583")
    assert "differs from the checkpoint of that name" in line


def test_no_checkpoint_is_a_decision_too(shared: Path, node: Path) -> None:
    """Rank 0 begins anew although another rank sees checkpoints: then this is not its folder."""
    shutil.rmtree(shared / "fresh", ignore_errors=True)
    line = refused(lambda rank: overrides(shared / "data", (shared / "fresh", node / "run")[rank]), "E584")
    assert f"train.output={node}/run is not the folder of rank 0" in line


def test_a_folder_that_is_not_shared_refuses_all(shared: Path, node: Path) -> None:
    """Equal copies of the checkpoints lie on both nodes: only the probe shows that they are two folders."""
    line = refused(lambda rank: overrides(shared / "data", (shared, node)[rank] / "run"), "E584")
    assert "cannot be seen; put train.output on a file system that all nodes share" in line
    assert not list((shared / "run").glob(".probe-*"))


def test_a_slow_folder_is_waited_for(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "PROBE_SECONDS", 20.0)
    looks, exists = list[str](), Path.exists

    def late(path: Path, **more: bool) -> bool:
        if path.name.startswith(".probe-"):
            looks.append(path.name)
            return len(looks) > 2 and exists(path, **more)
        return exists(path, **more)

    monkeypatch.setattr(Path, "exists", late)
    both = started(lambda rank: overrides(shared / "data", shared / "run"))
    assert all(isinstance(p, Prepared) for p in both) and len(looks) == 3


def test_weights_to_begin_with_are_rank_0_s_too(shared: Path, node: Path) -> None:
    """checkpoint.init_from may name a run, whose newest checkpoint counts."""
    new = [f"checkpoint.init_from={folder}/run" for folder in (shared, node)]
    both = started(lambda rank: overrides(shared / "data", shared / "new", new[rank]))
    assert [p.init_from.step for p in both if isinstance(p, Prepared) and p.init_from] == [4, 4]
    shutil.rmtree(node / "run" / "checkpoints" / "step-00000004")
    assert "rank 0 starts from its step 4" in refused(
        lambda r: overrides(shared / "data", shared / "new", new[r]), "E583"
    )


@pytest.mark.parametrize("name", ["a", "b", "x", "y"])
@pytest.mark.parametrize("how", ["other text", "grown"])
def test_a_dataset_that_differs_names_rank_and_file(shared: Path, node: Path, name: str, how: str) -> None:
    rewrite(node / "data" / name, how)
    line = refused(lambda rank: overrides((shared, node)[rank] / "data", shared / "run"), "E585")
    assert f"rank 1: {node}/data/{name}.bin has fingerprint " in line
    assert f" where rank 0's {shared}/data/{name}.bin has fingerprint " in line and "copy the same dataset" in line


def test_equal_datasets_may_lie_elsewhere(shared: Path, node: Path) -> None:
    both = started(lambda rank: overrides((shared, node)[rank] / "data", shared / "run"))
    assert all(isinstance(p, Prepared) for p in both)


@pytest.mark.parametrize(
    "change",
    ["optimizer.lr=1e-3", "train.seed=3", "train.micro_batch_size=4", "log.interval_steps=3", "data.valid=null"],
)
def test_settings_that_differ_between_nodes_refuse_all(shared: Path, change: str) -> None:
    line = refused(lambda rank: overrides(shared / "data", shared / "run", *[change][:rank]), "E585")
    name = change.split("=")[0]
    assert f"rank 1: {name}" in line


def test_another_mix_on_one_node_refuses_all(shared: Path) -> None:
    data = shared / "data"
    line = refused(
        lambda rank: overrides(data, shared / "run", f"data.train={{{data}/a: {2 + rank}, {data}/b: 1}}"), "E585"
    )
    assert f"{data}/a gives 0.75 of the samples where rank 0's {data}/a gives 0.666666666667 of the samples" in line


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("device", "device is cuda where rank 0's device is cpu; look at GPUs and driver of the node without"),
        ("torch", "torch is 2.9 where rank 0's torch is "),
        ("kernels", "kernels.norm takes torch where rank 0's kernels.norm takes fused; install the same on every node"),
    ],
)
def test_a_node_that_computes_with_something_else_refuses_all(
    shared: Path, monkeypatch: pytest.MonkeyPatch, what: str, line: str
) -> None:
    """As one whose driver does not work and which train.device=auto puts on its CPU, where gloo would wait for NCCL; or
    one without the compiled kernels, which no line named and for which all others wait in each step."""

    def other(name: str, value: Any, otherwise: Any) -> None:
        there = lambda *given: (otherwise if threading.current_thread().name == "rank 1" else value)(*given)  # noqa: E731
        monkeypatch.setattr(begin, name, there)

    rows = {name: next(row for row in norm.BACKENDS if row.name == name) for name in ("fused", "torch")}
    chosen = {name: lambda *_, row=row: {"norm": row} for name, row in rows.items()}
    device = torch.device("cuda" if what == "device" else "cpu")
    other("device_of_rank", lambda *_: torch.device("cpu"), lambda *_: device)
    other("check_machine", chosen["fused"], chosen["torch" if what == "kernels" else "fused"])
    if what == "torch":
        facts = begin.facts_of_machine
        old = lambda *given: [dataclasses.replace(f, value="2.9") if f.what == "torch" else f for f in facts(*given)]  # noqa: E731
        other("facts_of_machine", facts, old)
    assert f"rank 1: {line}" in refused(lambda rank: overrides(shared / "data", shared / "new"), "E585")


def test_another_tokenizer_on_one_node_refuses_all(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_hammer.train import prepare as prepare_module
    from tests.checkpoint.layouts import FakeTokenizer

    class Named(FakeTokenizer):
        def __init__(self, path: str) -> None:
            self.path, self.fingerprint, self.vocab_size = Path(path), path[-1] * 32, 301

    monkeypatch.setattr(prepare_module, "load_tokenizer", Named)
    line = refused(lambda rank: overrides(shared / "data", shared / "new", f"tokenizer.path=/t/{rank}"), "E585")
    assert (
        "rank 1: tokenizer /t/1 has fingerprint 1111" in line and "rank 0's tokenizer /t/0 has fingerprint 0000" in line
    )
    prepared = prepare(config_for(overrides(shared / "data", shared / "new", "tokenizer.path=/t/0")), 1, False)
    assert prepared.tokenizer is not None and dataclasses.is_dataclass(prepared)


def test_the_launcher_of_another_node_judges_nothing_by_its_own_listing(shared: Path) -> None:
    """Which checkpoint counts is for rank 0 to see; a change that it accepts must not be refused elsewhere."""
    config = config_for(overrides(shared / "data", shared / "run", "optimizer.lr=1e-3"))
    assert prepare(config, 2, first_node=False).resume is None
    a = f"train: {{{shared}/data/a: 1}}"  # a phase that ends with a step for a run that has had other steps
    phases = ("data.train=null", f"data.phases=[{{samples: 20, {a}}}, {{{a}, seq_length: 64}}]")
    config = config_for(overrides(shared / "data", shared / "new", *phases))
    with pytest.raises(ConfigError, match="must end with a step"):
        prepare(config, 2)
    assert prepare(config, 2, first_node=False).config.phases[1].first == 20


TWO_RANKS = {"WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE='abc' must be a number"),
        ({"RANK": "-1"}, "RANK='-1' must be a number"),
        ({"LOCAL_RANK": "9" * 5000}, "must be a number"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2, WORLD_SIZE=2 must name one of the ranks"),
        ({"WORLD_SIZE": "2"}, "MASTER_ADDR is missing beside WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "x"}, "MASTER_PORT is missing"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "abc"}, "MASTER_PORT='abc' must be a number"),
        ({**TWO_RANKS, "LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE='x' must be a number"),
        ({**TWO_RANKS, "LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0 must be at least 1"),
    ],
)
def test_variables_of_torchrun_that_something_else_has_left(environment: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as error:
        _place_of_torchrun(environment)
    assert error.value.code == "E240" and len(str(error.value)) < 300
    assert _place_of_torchrun({}) == _place_of_torchrun({"MASTER_PORT": "", "LOCAL_WORLD_SIZE": "x"}) == (0, 0, 1)
    there = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    assert _place_of_torchrun(there) == (3, 1, 4)


@pytest.mark.parametrize(
    ("task", "visible", "bound", "gpu"),
    [("5", "5", {"SLURM_GPUS_PER_TASK": "1"}, 0), ("5", "0", {"SLURM_GPU_BIND": "single:1"}, 0),
     ("5", "GPU-6f1e", {"SLURM_GPU_BIND": "verbose,per_task:1"}, 0), ("5", "0", {}, 5),
     ("5", "0", {"SLURM_GPU_BIND": "none"}, 5), ("5", "", {"SLURM_GPUS_PER_TASK": "1"}, 5),
     ("5", "0,1,2,3,4,5,6,7", {"SLURM_GPUS_PER_TASK": "8"}, 5), ("0", "0", {"SLURM_GPUS_PER_TASK": "1"}, 5)],
)  # fmt: skip
def test_a_task_of_slurm_with_a_gpu_of_its_own(task: str, visible: str, bound: dict[str, str], gpu: int) -> None:
    """Under --gpus-per-task=1 task 5 sees one GPU, its number 0. Not so ranks that torchrun starts in task 0, nor where
    all tasks of a node see the same one: rank 5 has no GPU of its own there, and is refused."""
    there = {"RANK": "13", "LOCAL_RANK": "5", "WORLD_SIZE": "16", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    there |= {"SLURM_LOCALID": task, "CUDA_VISIBLE_DEVICES": visible, **bound}
    assert _place_of_torchrun(there) == (13, gpu, 16)


@pytest.mark.parametrize("name", ["x" * 300, "loop/run"])
def test_a_path_that_nothing_can_have_is_no_damaged_ledger(tmp_path: Path, name: str) -> None:
    """It was: code 4, of a checkpoint, where the disk's is meant."""
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match=r"too long|symbolic links") as error:
        find_starting_point(config_for(overrides(tmp_path, tmp_path / name)))
    known = from_exception(error.value, "the test")
    assert known is not None and known.exit_code == 6
