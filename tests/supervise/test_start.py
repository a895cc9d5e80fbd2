"""The launcher against small stand-in ranks: exit codes, one line, no orphans, signals, sockets on loopback only.

Run as a program this file is the launcher: ``python test_start.py ENTRY NPROC [NNODES NODE_RANK PORT]`` starts its
functions named ``rank_*`` as ranks. They unblock the stop signals where the training loop does: after its handlers.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_hammer.base.cli import run as run_and_exit
from megatron_hammer.base.errors import CheckpointError, ConfigError, MemoryShortage, from_exception
from megatron_hammer.base.signals import STOP_SIGNALS, end_at_once
from megatron_hammer.config import Config, config_from_tree
from megatron_hammer.parallel import rendezvous
from megatron_hammer.parallel.board import StatusSlot
from megatron_hammer.supervise import attempt
from megatron_hammer.supervise.nodes import Node
from megatron_hammer.supervise.restart import Restarts
from megatron_hammer.supervise.start import _check_gpus, _check_slurm_step, launch
from tests.warm_python import warm_python

HERE = Path(__file__).resolve()
CONFIG = {
    "model": {"hidden_size": 16, "ffn_hidden_size": 16, "num_layers": 1, "num_attention_heads": 2},
}
TIMEOUTS = {
    "rank_stays": 3,
    "rank_hangs": 3,
}  # seconds; others get 30, because a busy machine may start one rank long after another
PRESET = "model: {hidden_size: 16, ffn_hidden_size: 16, num_layers: 1, num_attention_heads: 2}\n"

# ---------------------------------------------------------------------------------------------------------------------
# Stand-in ranks
# ---------------------------------------------------------------------------------------------------------------------


def say(*words: object) -> None:
    """One line in one system call, so that the lines of several ranks do not mix."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def sleep_until_killed() -> None:
    say("pid", os.getpid())
    time.sleep(60)


def rank_done(
    config: Config, rank: int, local_rank: int, world_size: int, store: object, check_data: bool, status: StatusSlot
) -> int:
    return 0


def rank_mistake(
    config: Config, rank: int, local_rank: int, world_size: int, store: object, check_data: bool, status: StatusSlot
) -> int:
    """Every rank raises, as ``raise_together`` makes them; the higher one first."""
    time.sleep(0.3 * (world_size - rank))
    raise CheckpointError(7, f"checkpoint-of-{rank}", "is damaged\nbadly", "remove it")


def rank_mistake_of_one(
    config: Config, rank: int, local_rank: int, world_size: int, store: object, check_data: bool, status: StatusSlot
) -> int:
    if rank == 1:
        raise OSError(28, "No space left on device", "/some/file")
    sleep_until_killed()
    return 0


def rank_dies(
    config: Config, rank: int, local_rank: int, world_size: int, store: object, check_data: bool, status: StatusSlot
) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def rank_killed(
    config: Config, rank: int, local_rank: int, world_size: int, store: object, check_data: bool, status: StatusSlot
) -> int:
    """Rank 1 is killed inside a collective; rank 0 sees its peer go, and raises."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)  # type: ignore[arg-type]
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.zeros(1))
    return 0


def rank_raises(
    config: Config, rank: int, local_rank: int, world_size: int, store: object, check_data: bool, status: StatusSlot
) -> int:
    """The same with an exception that nobody expected."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)  # type: ignore[arg-type]
    if rank == 1:
        raise ZeroDivisionError("a defect of ours")
    dist.all_reduce(torch.zeros(1))
    return 0


def rank_exits(
    config: Config, rank: int, local_rank: int, world_size: int, store: object, check_data: bool, status: StatusSlot
) -> int:
    if rank == 1:
        left_behind = subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                       stderr=subprocess.DEVNULL)  # fmt: skip
        say("pid", left_behind.pid)
        os._exit(3)
    sleep_until_killed()  # a rank that is lost takes this one along
    return 0


def rank_stays(
    config: Config, rank: int, local_rank: int, world_size: int, store: object, check_data: bool, status: StatusSlot
) -> int:
    """Rank 0 is done, rank 1 never ends, although it does something."""
    if rank == 1:
        say("pid", os.getpid())
        while True:
            status.mark("at it")
            time.sleep(0.1)
    return 0


def rank_hangs(
    config: Config, rank: int, local_rank: int, world_size: int, store: object, check_data: bool, status: StatusSlot
) -> int:
    """Rank 1 stops in the middle of a step; rank 0 waits for it in a collective."""
    say("pid", os.getpid())
    status.step(7)
    while rank == 0 and not store.check(["there"]):  # type: ignore[attr-defined]
        status.mark("forward")
        time.sleep(0.05)
    status.mark("forward")
    if rank == 1:
        store.set("there", "")  # type: ignore[attr-defined]
        os.kill(os.getpid(), signal.SIGSTOP)
    with status.waits("all_reduce"):
        time.sleep(60)
    return 0


def rank_sleeps(
    config: Config, rank: int, local_rank: int, world_size: int, store: object, check_data: bool, status: StatusSlot
) -> int:
    sleep_until_killed()
    return 0


def rank_saves(
    config: Config, rank: int, local_rank: int, world_size: int, store: object, check_data: bool, status: StatusSlot
) -> int:
    """The training loop's manners: handlers that remember, a save that takes a while, the old handlers again, 75."""
    seen: list[int] = []
    before = {s: signal.signal(s, lambda number, _: seen.append(number)) for s in STOP_SIGNALS}
    status.step(1)
    say("pid", os.getpid())
    time.sleep(0.5)  # a signal that comes now must wait
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    while not seen:
        time.sleep(0.02)
    time.sleep(0.3)
    for signum, handler in before.items():
        signal.signal(signum, handler)
    say("saved after", signal.Signals(seen[0]).name)
    time.sleep(0.5)
    return 75


def rank_fails_in_training(
    config: Config, rank: int, local_rank: int, world_size: int, store: object, check_data: bool, status: StatusSlot
) -> int:
    """The real ``run_rank`` where training fails on rank 1; taking the groups down would block, as NCCL's does."""
    from types import SimpleNamespace

    import torch
    import torch.distributed as dist

    from megatron_hammer.train import run

    def train() -> int:
        if rank == 1:
            raise ZeroDivisionError("a defect of ours")
        dist.all_reduce(torch.zeros(1))
        return 0

    prepared = SimpleNamespace(config=config, is_finished=False)
    replaced = {
        "train": lambda *_: train(),
        "Beginning": lambda ranks, *_: SimpleNamespace(
            ranks=ranks, agree=lambda: prepared, device=torch.device("cpu"), predicted=[]
        ),
        "announcement": lambda *_: "",
    }
    for name, stand_in in replaced.items():
        setattr(run, name, stand_in)
    dist.destroy_process_group = sleep_until_killed
    return run.run_rank(config, rank, local_rank, world_size, store, check_data, status=status)  # type: ignore[arg-type]


def rank_sockets(
    config: Config, rank: int, local_rank: int, world_size: int, store: object, check_data: bool, status: StatusSlot
) -> int:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)  # type: ignore[arg-type]
    total = torch.tensor([float(rank + 1)])
    dist.all_reduce(total)
    for pid in (os.getpid(), os.getppid()):
        say("listens", *listening(pid))
    say("sum", total.item(), "threads", torch.get_num_threads())
    dist.barrier()
    dist.destroy_process_group()
    return 0


def listening(pid: int) -> list[str]:
    """Hex addresses on which a process listens, from /proc (state 0A)."""
    inodes = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            match = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(fd))
        except FileNotFoundError:
            continue
        if match:
            inodes.add(match[1])
    rows = [
        line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    return [row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes]


# ---------------------------------------------------------------------------------------------------------------------
# Starting it
# ---------------------------------------------------------------------------------------------------------------------


def start(entry: str, nproc: int = 2, *place: object, warm: bool = True) -> subprocess.Popen[str]:
    """The launcher; in the plain interpreter, with ranks that are spawned, if not ``warm``."""
    environment = os.environ | {"PYTHONPATH": f"{HERE.parents[2]}:{HERE.parent}"}
    environment.pop("OMP_NUM_THREADS", None)
    command = [warm_python() if warm else sys.executable, str(HERE), entry, str(nproc), *map(str, place)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, list[str]]:
    """Exit code, stdout, and the lines of stderr."""
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err.splitlines()


def pids(process: subprocess.Popen[str], count: int) -> list[int]:
    assert process.stdout is not None
    return [int(process.stdout.readline().split()[1]) for _ in range(count)]


def is_alive(pid: int) -> bool:
    try:
        return " Z" not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def assert_gone(numbers: list[int], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while any(is_alive(pid) for pid in numbers):
        assert time.monotonic() < deadline, f"{numbers} outlive their launcher"
        time.sleep(0.05)


# ---------------------------------------------------------------------------------------------------------------------
# Tests
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "nproc", "code", "line"),
    [
        ("rank_done", 1, 0, None),
        ("rank_mistake", 2, 4, "error[E407]: checkpoint-of-0 is damaged badly; remove it"),
        ("rank_mistake_of_one", 2, 6, "error[E601]: /some/file could not be used while rank 1 was running: No space"),
        ("rank_killed", 2, 7, "error[E701]: rank 1 died of SIGKILL; "),
        ("rank_raises", 2, 7, "error[E702]: rank 1 raised ZeroDivisionError: a defect of ours; "),
        ("rank_fails_in_training", 2, 7, "error[E702]: rank 1 raised ZeroDivisionError: a defect of ours; "),
        ("rank_exits", 2, 7, "error[E703]: rank 1 ended with exit code 3 and no report; "),
        ("rank_stays", 2, 7, "error[E704]: rank 1 did not end within 3 s of the others; "),
        ("rank_hangs", 2, 8, "error[E801]: rank 1 hung: step 7, forward; silent for "),
    ],
)
def test_exit_code_and_one_line(
    entry: str, nproc: int, code: int, line: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm = entry != "rank_mistake"
    if warm:
        warm_python()  # its server's folder is no temporary file of this program's
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    returned, out, lines = finish(start(entry, nproc, warm=warm))
    assert returned == code, "\n".join(lines)
    assert_gone([int(number) for number in re.findall(r"pid (\d+)", out)], seconds=0.5)
    assert list(tmp_path.iterdir()) == [], "no temporary file stays"
    if line is None:
        assert lines == []
    elif entry in (
        "rank_raises",
        "rank_fails_in_training",
    ):  # a defect of ours: its traceback, and not that of the rank that lost its peer
        assert lines[0] == "Traceback (most recent call last):" and lines[-1].startswith(line)
        assert lines[-2] == "ZeroDivisionError: a defect of ours" and "Connection" not in "".join(lines)
    elif entry == "rank_hangs":
        assert lines[-1].startswith(line) and "(state T, stopped" in lines[-1]
        said = "\n".join(lines)
        assert "rank 0: step 7, forward: waits in all_reduce, its collective number 1; silent for " in said
        assert "rank 0, Python stack:" in said and "in rank_hangs" in said and "rank 1, Python stack" not in said
    else:
        assert len(lines) == 1 and lines[0].startswith(line), lines


@pytest.mark.parametrize(
    ("signum", "nproc"), [(signal.SIGTERM, 2), (signal.SIGINT, 1), (signal.SIGHUP, 1), (signal.SIGUSR1, 1)]
)
def test_a_signal_saves_and_exits_75(signum: signal.Signals, nproc: int) -> None:
    """Sent while the ranks still start; again (one of another kind too) while they save, and after that."""
    process = start("rank_saves", nproc, warm=nproc == 1)
    numbers = pids(process, nproc)
    process.send_signal(signum)
    time.sleep(0.7)
    process.send_signal(signum)
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    saved = [process.stdout.readline() for _ in range(nproc)]
    process.send_signal(signum)
    code, _, lines = finish(process)
    assert (code, lines) == (75, [])
    assert saved == nproc * [f"saved after {signum.name}\n"]
    assert_gone(numbers, seconds=0.5)


def rank_asked_from_the_start(
    config: Config, rank: int, local_rank: int, world_size: int, store: object, check_data: bool, status: StatusSlot
) -> int:
    """The signal that was passed on is pending: it was born with it blocked."""
    return 75 if signal.sigtimedwait((signal.SIGTERM,), 5) else 0


def test_a_signal_while_ranks_are_started_reaches_them() -> None:
    """Another thread takes it, as all but the main one may; in a child, whose signals nobody else needs."""
    from tests.faults.kills import ended, forked  # with torch, which this file as a program does not need

    real, watch, calls = attempt.children_of, attempt.watch, list[int]()

    def children_of(pid: int) -> set[int]:  # first asked when the signals are blocked, before there is a rank
        calls.append(pid)
        if len(calls) == 1:
            os.kill(pid, signal.SIGTERM)
            time.sleep(0.01)
        return real(pid)

    def launcher() -> int:
        fork = multiprocessing.get_context("fork")
        attempt.children_of = children_of
        attempt.watch = lambda *told: watch(*told[:4])  # as on several nodes, which ends nobody before the first step
        attempt.multiprocessing.get_context = lambda method=None: fork  # type: ignore[attr-defined,assignment]
        end_at_once("before any rank started")
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        entry, config = f"{__name__}:rank_asked_from_the_start", config_from_tree(CONFIG)
        return attempt.run_ranks(config, Node(1, 1, 0, "", 0), entry, {}).code

    assert ended(forked(launcher)) == 75


def test_an_ignored_signal_stays_ignored() -> None:
    """``nohup`` starts a program with SIGHUP ignored: losing the terminal must not stop it."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = start("rank_saves", 1, warm=False)
        pids(process, 1)
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, previous)
    code, out, _ = finish(process)
    assert (code, out.split()) == (75, ["saved", "after", "SIGTERM"])


def test_before_the_first_step_a_signal_ends_all_at_once() -> None:
    """There is nothing to save: the ranks may be at anything, deaf to signals too."""
    process = start("rank_sleeps")
    numbers = pids(process, 2)
    process.send_signal(signal.SIGTERM)
    code, _, lines = finish(process)
    assert (code, lines) == (75, ["stopped by SIGTERM before the first step; run the same command again"])
    assert_gone(numbers, seconds=0.5)


def test_ranks_die_with_a_killed_launcher() -> None:
    process = start("rank_sleeps", warm=False)
    numbers = pids(process, 2)
    process.kill()
    process.wait()
    assert_gone(numbers)


def test_everything_listens_on_loopback_only() -> None:
    code, out, _ = finish(start("rank_sockets", warm=False))
    assert code == 0
    listeners = [line.split()[1:] for line in out.splitlines() if line.startswith("listens")]
    assert len(listeners) == 4 and all(listeners), "each rank (gloo) and the launcher (store) listen"
    assert {address for row in listeners for address in row} == {"0100007F"}, "127.0.0.1 in /proc's byte order"
    cores = len(os.sched_getaffinity(0))
    assert out.count(f"sum 3.0 threads {max(1, cores // 2)}") == 2


def test_two_nodes_meet_and_share_the_cause() -> None:
    """Two launchers on this machine, one rank each: rank 1's mistake is what both report."""
    port = free_port()
    nodes = [start(entry, 1, 2, node, port) for node, entry in enumerate(("rank_sleeps", "rank_mistake"))]
    for code, _, lines in map(finish, nodes):
        assert (code, lines) == (4, ["error[E407]: checkpoint-of-1 is damaged badly; remove it"])


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def test_a_node_that_waits_says_for_whom_and_ends_on_a_signal_at_once() -> None:
    """Node 0 without node 1, and node 1 without node 0: a line after five seconds, nothing of torch's, and code 75."""
    ports = [free_port(), free_port()]
    nodes = [start("rank_sleeps", 1, 2, number, port) for number, port in enumerate(ports)]
    said = [process.stderr.readline().rstrip("\n") for process in nodes if process.stderr is not None]
    for process in nodes:
        process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    ended = [finish(process) for process in nodes]
    assert time.monotonic() - sent < 10, "long before the 30 s of the wait are over"
    for first, (code, _, later), place in zip(said, ended, ports, strict=True):
        lines = [first, *later]
        assert code == 75
        assert lines[-1] == "stopped by SIGTERM before any rank started; run the same command again"
        waits = re.compile(rf"waiting for node [01] (of 2 to come to|at) 127\.0\.0\.1:{place}( \(.+\))?: \d+ s of 30 s")
        assert lines[:-1] and all(waits.fullmatch(line) for line in lines[:-1]), lines


def test_a_node_that_waits_for_another_start_ends_on_a_signal_at_once() -> None:
    """Node 1 agrees to start again, and does not come back."""
    port = free_port()
    nodes = [start("rank_dies", 1, 2, number, port, 1) for number in range(2)]
    assert nodes[0].stderr is not None
    while not (line := nodes[0].stderr.readline()).startswith("restart 1 of 1: 1 ranks on each of 2 nodes"):
        assert line.startswith("error[E701]"), line
    assert finish(nodes[1])[0] == 0
    sent = time.monotonic()
    nodes[0].send_signal(signal.SIGTERM)
    code, _, lines = finish(nodes[0])
    assert time.monotonic() - sent < 10, "long before the 30 s of the wait are over"
    assert code == 75
    assert lines[-1] == "stopped by SIGTERM before the ranks were started again; run the same command again"


def test_two_launchers_of_one_number_are_refused() -> None:
    port = free_port()
    first = start("rank_sleeps", 1, 3, 0, port)
    others = [start("rank_sleeps", 1, 3, 1, port) for _ in range(2)]
    deadline = time.monotonic() + 40
    while all(process.poll() is None for process in others) and time.monotonic() < deadline:
        time.sleep(0.1)
    refused = [finish(process) for process in others if process.poll() is not None]
    for process in [first, *others]:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            finish(process)
    ((code, _, lines),) = refused
    assert code == 2 and lines[-1].startswith("error[E241]: --node-rank=1 is that of another launcher too; start one ")


def resolver(address: str) -> Callable[..., list[tuple[Any, ...]]]:
    """A ``socket.getaddrinfo`` that finds one address for every name."""
    return lambda name, port, **_: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]


def test_a_name_that_is_loopback_here_is_bound_to_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's /etc/hosts has 127.0.1.1 for the machine's own name; nobody else would reach a store there."""
    monkeypatch.setattr(socket, "getaddrinfo", resolver("127.0.1.1"))
    monkeypatch.setattr(rendezvous, "ROUTE_PROBE", ("127.0.0.9", 9))  # a route that exists wherever tests run
    meeting = rendezvous.host_store("node0", 0, 5)
    assert meeting.address == "127.0.0.1", "this machine's address on the way to the probe"
    with monkeypatch.context() as others:
        others.setattr(socket, "getaddrinfo", resolver(meeting.address))
        joined = rendezvous.join_store("node0", meeting.port, 5)
    joined.store.set("key", "value")
    assert meeting.store.get("key") == b"value"
    assert rendezvous.interface_towards(meeting) == "lo"

    def no_route(self: object, place: object) -> None:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(rendezvous.socket, "socket", type("Socket", (socket.socket,), {"connect": no_route}))
    with pytest.raises(ConfigError) as refused:
        rendezvous.host_store("node0", 0, 5)
    assert str(refused.value).startswith(
        "error[E244]: --master-addr=node0 is 127.0.1.1 here, which other nodes cannot reach, and there is no route out"
    )


def test_loopback_that_is_down_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def down(self: object, place: object) -> None:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(rendezvous.socket, "socket", type("Socket", (socket.socket,), {"connect": down}))
    with pytest.raises(
        ConfigError, match=re.escape("E244]: the address 127.0.0.1, at which the ranks would meet, can")
    ):
        rendezvous.host_store("127.0.0.1", 0, 600)


def test_loopback_by_its_own_name_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("localhost", "127.0.0.1", "127.0.1.1"):
        assert rendezvous.host_store(name, 0, 5).address.startswith("127.0.")


def test_an_unknown_name_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    for meet in (rendezvous.host_store, rendezvous.join_store):
        with pytest.raises(ConfigError) as refused:
            meet("nodde0", 29500, 600)
        assert "E249" in str(refused.value) and "--master-addr=nodde0 is not a known name" in str(refused.value)


def test_a_name_server_out_of_reach_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    meeting, asked = rendezvous.host_store("127.0.0.1", 0, 5), []

    def late(name: str, port: int, **more: Any) -> list[tuple[Any, ...]]:
        asked.append(name)
        if len(asked) < 3:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return resolver("127.0.0.1")(name, port)

    monkeypatch.setattr(socket, "getaddrinfo", late)
    assert rendezvous.join_store("node0", meeting.port, 30).address == "127.0.0.1"
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("tasks", "refused"), [("1", False), ("1(x4)", False), ("8", True), ("8(x2)", True), ("1,2", True)]
)
def test_one_launcher_a_node_under_slurm(tasks: str, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", tasks)
    if not refused:
        _check_slurm_step()
        return
    with pytest.raises(ConfigError, match=re.escape(f"E241]: SLURM_STEP_TASKS_PER_NODE={tasks} starts several")):
        _check_slurm_step()


def run_program(*arguments: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "megatron_hammer.launch", *arguments]
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["tiny.yaml"], "error[E201]: python -m megatron_hammer.launch was called wrongly: "),
        (["--nproc", "0", "PRESET"], "error[E240]: --nproc=0 must be at least 1; "),
        (["--nproc", "1", "--nnodes", "2", "--node-rank", "2", "PRESET"], "error[E241]: --node-rank=2 must lie in "),
        (["--nproc", "1", "--nnodes", "2", "PRESET"], "error[E242]: --nnodes=2 needs --master-addr and --master-port"),
        (["--nproc", "2", "PRESET", "model.num_layer=3"], "error[E202]: model.num_layer is not a known setting; "),
        (["--nproc", "3", "PRESET", "parallel.tensor_model_parallel_size=2"], "error[E205]: parallel.tensor_model"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_any_rank(arguments: list[str], line: str, tmp_path: Path) -> None:
    preset = tmp_path / "preset.yaml"
    preset.write_text(PRESET)
    code, out, err = run_program(*[str(preset) if a == "PRESET" else a for a in arguments])
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith(line)


@pytest.mark.parametrize(
    ("gpus", "device", "dry_run", "refused"),
    [(1, "auto", False, True), (0, "cuda", False, True), (0, "auto", False, False), (2, "auto", False, False),
     (1, "cpu", False, False), (1, "auto", True, False)],
)  # fmt: skip
def test_more_ranks_than_gpus_are_refused(
    gpus: int, device: str, dry_run: bool, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    config = config_from_tree(CONFIG | {"train": {"device": device, "dry_run": dry_run}})
    if not refused:
        _check_gpus(config, 2)
        return
    with pytest.raises(ConfigError) as caught:
        _check_gpus(config, 2)
    assert caught.value.code == "E243" and f"the {gpus} GPUs" in caught.value.rule


def test_a_signal_before_any_rank_exits_75(tmp_path: Path) -> None:
    (tmp_path / "preset.yaml").write_text("x: 1")
    waits = "from megatron_hammer.config import tree, reading; import runpy, sys, time; "
    waits += "reading.read_regular = lambda *rest: time.sleep(60); "
    waits += "sys.argv[0] = 'launch'; runpy.run_module('megatron_hammer.launch', run_name='__main__')"
    command = [sys.executable, "-c", waits, "--nproc", "2", str(tmp_path / "preset.yaml")]
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[2])}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    sigcgt = 0  # caught signals as a bit mask, from /proc: the handler stands once TERM is among them
    while not sigcgt >> (signal.SIGTERM - 1) & 1:
        assert process.poll() is None
        status = Path(f"/proc/{process.pid}/status").read_text()
        sigcgt = int(re.findall(r"SigCgt:\s+(\w+)", status)[0], 16)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75 and err.startswith("stopped by SIGTERM before any rank started; ")


def test_help_lists_every_field() -> None:
    code, out, _ = run_program("--help")
    assert code == 0 and "train.micro_batch_size (int) = 1" in out and "--nproc" in out


def test_memory_shortage_is_recognised() -> None:
    nccl = "NCCL error in: NCCLUtils.cpp:77, unhandled cuda error, NCCL version 2.30.7\nLast error:\n"
    texts = [
        "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
        "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in https://docs.nvidia.com/cuda/",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        nccl + "Cuda failure 2 'out of memory'",
    ]
    for error in (MemoryError(), *map(RuntimeError, texts)):
        known = from_exception(error, "rank 3")
        assert isinstance(known, MemoryShortage) and str(known).startswith("error[E1001]: rank 3 has no memory left")
    for text in ("shapes differ", "CUDA error: an illegal memory access was encountered", nccl + "Cuda failure 1 'x'"):
        assert from_exception(RuntimeError(text), "rank 3") is None
    assert from_exception(ConnectionResetError(104, "Connection reset by peer"), "rank 3") is None


if __name__ == "__main__":
    name, nproc, *place = sys.argv[1:]
    nnodes, node_rank, port, most = map(int, (*place, 0)[:4] if place else (1, 0, 0, 0))
    node = Node(int(nproc), nnodes, node_rank, "127.0.0.1", port)
    config = config_from_tree(CONFIG | {"parallel": {"timeout_seconds": TIMEOUTS.get(name, 30)}})
    if most and node_rank:  # it does not come back to be started again
        once = attempt.run_ranks
        attempt.run_ranks = lambda *told: once(*told).again and os._exit(0)  # type: ignore[assignment,return-value]
    end_at_once("before any rank started")  # as the program does
    restarts = Restarts(config, most, 1) if most else None
    run_and_exit(lambda: launch(config, node, f"test_start:{name}", restarts=restarts))
