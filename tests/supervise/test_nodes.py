"""Several nodes: the launchers' signs of life, and two machines made of network namespaces, joined and cut apart."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_hammer.base.errors import ConfigError, ParallelError
from megatron_hammer.parallel import heartbeat
from megatron_hammer.parallel.heartbeat import Heartbeat, node_0_is_gone
from megatron_hammer.parallel.rendezvous import Meeting, host_store, join_store
from megatron_hammer.supervise import several_nodes
from megatron_hammer.supervise.nodes import Node
from megatron_hammer.supervise.watch import Failure
from megatron_hammer.verify.faults import DrilledRun
from tests.train.runs import TINY, environment, overrides, write_dataset

ADDRESSES = ("10.77.0.1", "10.77.0.2")


# ---- the heartbeat alone ---------------------------------------------------------------------------------------------


@pytest.fixture
def meeting(monkeypatch: pytest.MonkeyPatch) -> Meeting:
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.02)
    return host_store("127.0.0.1", 0, 30)


def wait_for(what: object) -> None:
    deadline = time.monotonic() + 30
    while not what():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_launcher_that_falls_silent_is_named_by_node_0(meeting: Meeting) -> None:
    nodes = [Heartbeat(meeting, number, 3, 2, 0.5, several_nodes.FAILURE_KEY) for number in range(3)]
    time.sleep(1)
    assert [node.failed() for node in nodes] == [False] * 3
    nodes[2].stop()
    wait_for(nodes[0].failed)
    lost = nodes[0].lost()
    assert (
        lost is not None and lost.code == "E708" and "node 2 (rank 4, 5) has not answered node 0 for 0.5 s" in str(lost)
    )
    assert nodes[1].lost() is None, "node 0 sees the others and tells the rest"
    told = several_nodes.agree_with_other_nodes(meeting.store, Node(2, 3, 0), None, lost)
    assert told is not None and told.error is lost
    wait_for(nodes[1].failed)
    other = several_nodes.agree_with_other_nodes(meeting.store, Node(2, 3, 1), None, None)
    assert other is not None and str(other.error) == str(lost)
    for node in nodes:
        node.stop()


def test_node_0_out_of_reach_is_named_by_the_others(meeting: Meeting, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection hangs, as that of a machine that is cut off does."""
    node = Heartbeat(meeting, 1, 2, 1, 0.5)
    wait_for(lambda: meeting.store.add(f"{heartbeat.BEAT_KEY}/1", 0) > 2)
    monkeypatch.setattr(node._stop, "wait", lambda seconds: time.sleep(2) or False)
    wait_for(node.failed)
    lost = node.lost()
    assert lost is not None and "node 0 (rank 0) has not answered node 1 for 0.5 s" in str(lost)
    consequence = Failure(2, 0, node_0_is_gone())
    told = several_nodes.agree_with_other_nodes(meeting.store, Node(1, 2, 1), consequence, lost)
    assert told is not None and told.error is lost
    mistake = Failure(0, 0, node_0_is_gone())
    assert several_nodes.agree_with_other_nodes(meeting.store, Node(1, 2, 1), mistake, lost) is mistake
    node._stop.set()


def test_launchers_that_may_not_start_again_equally_often_are_refused(meeting: Meeting) -> None:
    """One that waits to hear whether all start again would take node 0's end, even of a run that is complete, for its
    loss."""
    meetings = [meeting, join_store(meeting.address, meeting.port, 30)]

    def meet(number: int) -> str:
        try:
            several_nodes.wait_for_all_nodes(meetings[number], Node(2, 2, number), 30, str, restarts=3 * number)
        except ConfigError as error:
            return str(error)
        return "met"

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(meet, range(2))) == [
            "error[E240]: --max-restarts=0 is 3 on node 1; start all nodes alike",
            "error[E240]: --max-restarts=3 is 0 on node 0; start all nodes alike",
        ]


@pytest.mark.parametrize(
    ("able", "decided", "found"),
    [((True, True), 3, 3), ((True, False), 3, 0), ((False, True), 3, 0), ((True, True), 0, 0)],
)
def test_launchers_start_again_as_node_0_decides_if_all_can(
    meeting: Meeting, able: tuple[bool, bool], decided: int, found: int
) -> None:
    """And about the same failure, whoever has reported it."""
    asked, failure = list[str](), Failure(1, 0, ParallelError(1, "rank 1", "died", "x"))
    stores = [meeting.store, join_store(meeting.address, meeting.port, 30).store]

    def decide(cause: Failure) -> int:
        asked.append(cause.error.what)
        return decided

    def agree(number: int) -> int:
        mine = failure if number else None
        return several_nodes.agree_on_restart(stores[number], Node(2, 2, number), mine, able[number], decide)

    with ThreadPoolExecutor(2) as threads:
        other = threads.submit(agree, 1)
        wait_for(lambda: meeting.store.check([several_nodes.FAILURE_KEY]))
        assert [agree(0), other.result()] == [found, found]
    assert asked == (["rank 1"] if all(able) else [])


def test_who_starts_again_waits_until_the_old_store_is_closed() -> None:
    asked = list[str]()

    def add(key: str, number: int) -> int:
        asked.append(key)
        if len(asked) == 3:
            raise RuntimeError("closed")
        return 0

    several_nodes.wait_for_its_end(SimpleNamespace(add=add))  # type: ignore[arg-type]
    assert len(asked) == 3


# ---- two machines ----------------------------------------------------------------------------------------------------


def _ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def machines() -> Iterator[list[str]]:
    """Two network namespaces with an address each, on one wire."""
    names = [f"hammer{os.getpid()}{letter}" for letter in "ab"]
    wire = [f"hw{os.getpid() % 10**6}{letter}" for letter in "ab"]
    try:
        made = _ip("netns", "add", names[0])
    except FileNotFoundError:
        pytest.skip("needs iproute2")
    if made.returncode:
        pytest.skip(f"needs the right to make network namespaces: {made.stderr.strip()}")
    try:
        for words in (
            ["netns", "add", names[1]],
            ["link", "add", wire[0], "netns", names[0], "type", "veth", "peer", "name", wire[1], "netns", names[1]],
            *(["-n", name, "link", "set", "lo", "up"] for name in names),
            *(["-n", n, "addr", "add", f"{a}/24", "dev", w] for n, a, w in zip(names, ADDRESSES, wire, strict=True)),
            *(["-n", n, "link", "set", w, "up"] for n, w in zip(names, wire, strict=True)),
        ):
            if (done := _ip(*words)).returncode:
                pytest.skip(f"ip {' '.join(words)}: {done.stderr.strip()}")
        yield [*names, wire[0]]
    finally:
        for name in names:
            _ip("netns", "del", name)


def train(machines: list[str], folder: Path, by: str, *more: str) -> list[subprocess.Popen[str]]:
    """One rank on each of the two machines, by our launcher or by torchrun."""
    for i, name in enumerate("abxy"):
        write_dataset(folder / name, 30, i)
    settings = [str(TINY), *overrides(folder, folder / "run", "parallel.timeout_seconds=12", *more)]
    place = ["--nnodes", "2", "--master-addr", ADDRESSES[0], "--master-port", "29577"]
    nodes = []
    for number, machine in enumerate(machines[:2]):
        words = ["-m", "megatron_hammer.launch", "--nproc", "1", *place, "--node-rank", str(number)]
        if by == "torchrun":
            words = ["-m", "torch.distributed.run", "--nproc-per-node", "1", *place, "--node-rank", str(number)]
            words += ["-m", "megatron_hammer.train"]
        command = ["ip", "netns", "exec", machine, sys.executable, *words, *settings]
        nodes.append(subprocess.Popen(command, env=environment(), text=True, stdout=subprocess.DEVNULL,
                                      stderr=subprocess.PIPE))  # fmt: skip
    return nodes


def train_on(machines: list[str], folder: Path) -> list[subprocess.Popen[str]]:
    """A run by our launcher that does not end by itself, after three steps of it."""
    long = ("train.num_steps=1000000", "train.eval_interval_steps=1000000", "checkpoint.save_interval_steps=500000")
    nodes = train(machines, folder, "launcher", *long)
    metrics = folder / "run" / "metrics.jsonl"
    wait_until = time.monotonic() + 100
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 3:
        assert time.monotonic() < wait_until and all(node.poll() is None for node in nodes)
        time.sleep(0.1)
    return nodes


def test_torchrun_trains_on_two_machines(machines: list[str], tmp_path: Path) -> None:
    """Each of which resolves its own name to loopback, or to nothing."""
    patient = "parallel.timeout_seconds=60"  # nobody is to be missed, however loaded the machine is
    nodes = train(machines, tmp_path, "torchrun", "train.num_steps=2", "train.eval_interval_steps=2", patient)
    ended = [(node.communicate(timeout=120)[1][-2000:], node.returncode) for node in nodes]
    assert [code for _, code in ended] == [0, 0], ended
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes().count(b"\n") == 2


def test_a_machine_that_is_cut_off_ends_both_with_its_name(machines: list[str], tmp_path: Path) -> None:
    nodes = train_on(machines, tmp_path)
    _ip("-n", machines[0], "link", "set", machines[2], "down")
    said = [node.communicate(timeout=100)[1].splitlines() for node in nodes]
    assert [node.returncode for node in nodes] == [7, 7], said
    for number, lines in enumerate(said):
        other = 1 - number
        assert len(lines) == 1, lines
        assert lines[0].startswith(f"error[E708]: node {other} (rank {other}) has not answered node {number} for 12 s")


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("HAMMER_FAULTS"), reason="HAMMER_FAULTS=night runs it: half a minute")
@pytest.mark.parametrize("which", [0, 1])
def test_both_machines_start_again_when_a_rank_dies(machines: list[str], tmp_path: Path, which: int) -> None:
    """Twice; the third death ends the run."""
    steps = ("train.num_steps=1000000", "train.eval_interval_steps=1000", "checkpoint.save_interval_steps=5")
    nodes = train(machines, tmp_path, "launcher", *steps, "--max-restarts=2")
    metrics, folder = tmp_path / "run" / "metrics.jsonl", tmp_path / "run" / "checkpoints"
    killed = 0
    until = time.monotonic() + 200
    while killed < 3:
        assert time.monotonic() < until and all(node.poll() is None for node in nodes)
        ranks = DrilledRun(nodes[which], tmp_path / "run", random.Random(0)).ranks()
        lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        if ranks and any(folder.glob("step-*[0-9]")) and lines >= 20 * (killed + 1):
            os.kill(ranks[0], signal.SIGKILL)
            killed += 1
            while ranks[0] in DrilledRun(nodes[which], tmp_path / "run", random.Random(0)).ranks():
                time.sleep(0.05)
        time.sleep(0.05)
    said = [node.communicate(timeout=200)[1].splitlines() for node in nodes]
    assert [node.returncode for node in nodes] == [7, 7], said
    for lines_said in said:
        assert sum(line.startswith(f"error[E701]: rank {which} died of SIGKILL") for line in lines_said) == 3, said
        assert sum("1 ranks on each of 2 nodes go on from the last checkpoint" in line for line in lines_said) == 2, (
            said
        )


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("HAMMER_FAULTS"), reason="HAMMER_FAULTS=night runs it: half a minute")
@pytest.mark.parametrize("which", [0, 1])
def test_a_rank_that_hangs_is_named_on_both_machines(machines: list[str], tmp_path: Path, which: int) -> None:
    nodes = train_on(machines, tmp_path)
    (rank,) = DrilledRun(nodes[which], tmp_path / "run", random.Random(0)).ranks()
    os.kill(rank, signal.SIGSTOP)
    stopped = time.monotonic()
    said = [node.communicate(timeout=100)[1].splitlines() for node in nodes]
    print(f"named {time.monotonic() - stopped:.1f} s after it had stopped, at a timeout of 12 s", flush=True)
    assert [node.returncode for node in nodes] == [8, 8], said
    for lines in said:
        assert lines[-1].startswith(f"error[E801]: rank {which} hung: step "), lines
