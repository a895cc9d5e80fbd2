"""How the ranks of a run find each other, and the start and the end of torch's process group.

They meet at a store, torch's ``TCPStore``: a small table of keys and values behind a socket, which one process hosts
and the others join. It exists before any process group does, so errors at start-up travel through it too.

torch's own client waits for its host inside C++, where it handles no signals and prints warnings of its own. So a
process that joins first tries the socket from Python, where a signal ends the wait at once, and starts torch's client
when the host answers.
"""

from __future__ import annotations

import datetime
import ipaddress
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_hammer.base.errors import ConfigError, ParallelError
from megatron_hammer.base.system import interface_address, take_no_core_by_waking
from megatron_hammer.parallel.board import StatusSlot

Store = dist.Store

TRY_SECONDS = 2.0  # for one attempt to reach the host
PAUSE_SECONDS = 0.2  # between two attempts, and between two looks at what has arrived
SAY_AFTER_SECONDS = 5.0  # of waiting, and again after each such time
WATCHED_SECONDS = (
    10.0  # later than their watcher's limit do ranks give up a collective: it knows which rank is to blame
)
ROUTE_PROBE = ("192.0.2.1", 9)  # an address of RFC 5737, for documentation: nothing is ever sent to it


@dataclass(frozen=True)
class Meeting:
    """An open store and where others find it."""

    store: Store
    address: str
    port: int


class Waiting:
    """The clock of a wait that people should know about: says what is waited for after five seconds, and again."""

    def __init__(self, timeout_seconds: float, note: Callable[[str], None]) -> None:
        self._began, self._timeout, self._note = time.monotonic(), timeout_seconds, note
        self._say_at = self._began + SAY_AFTER_SECONDS

    def pause(self, what: str) -> bool:
        """Sleep a moment; return False when the time is up."""
        now = time.monotonic()
        if now - self._began >= self._timeout:
            return False
        if now >= self._say_at:
            self._note(f"waiting for {what}: {now - self._began:.0f} s of {self._timeout:g} s")
            self._say_at = now + SAY_AFTER_SECONDS
        time.sleep(PAUSE_SECONDS)
        return True


def collective_timeout(timeout_seconds: int) -> int:
    """How long a rank that is watched waits in a collective before it raises."""
    return timeout_seconds + int(WATCHED_SECONDS)


def host_store(address: str, port: int, timeout_seconds: int) -> Meeting:
    """Open the store on this machine, at a free port where ``port`` is 0.

    torch would bind a port on every interface; it takes a socket that is already bound instead. A name that this
    machine resolves to loopback although others know it (Debian writes 127.0.1.1 into /etc/hosts) is bound to the
    address of the route out instead: on loopback nobody else would reach it.

    Raises:
        ConfigError: the address or the port cannot be bound, or nobody could reach it.
    """
    family, place = _resolve(address, port)
    if _is_loopback(place[0]) and not _names_loopback(address):
        family, place = socket.AF_INET, (_route_out(address, place[0]), port)
    _check_reachable(family, place[0])
    try:
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart need not wait for TIME_WAIT to pass
        listener.bind(place)
    except OSError as error:
        raise ConfigError(
            44,
            f"--master-addr={address} --master-port={port}",
            f"could not be bound on node 0 ({error.strerror})",
            "give an address of node 0 and a free port",
        ) from None
    bound, port = place[0], listener.getsockname()[1]
    store = dist.TCPStore(
        bound,
        port,
        is_master=True,
        timeout=datetime.timedelta(seconds=timeout_seconds),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return Meeting(store, bound, port)


def join_store(
    address: str, port: int, timeout_seconds: int, note: Callable[[str], None] = lambda text: None
) -> Meeting:
    """Reach the store that another process hosts; a signal may end the wait at any time.

    Args:
        note: gets a line after every few seconds of waiting.

    Raises:
        ConfigError: no such name is known.
        ParallelError: the host does not answer in time.
    """
    waiting, reason = Waiting(timeout_seconds, note), "no answer"
    while True:
        try:
            family, place = _resolve(address, port)
            with socket.socket(family, socket.SOCK_STREAM) as attempt:
                attempt.settimeout(TRY_SECONDS)
                attempt.connect(place)
            break
        except OSError as error:
            reason = error.strerror or str(error)
        if not waiting.pause(f"node 0 at {address}:{port} ({reason})"):
            raise _unreachable(address, port, timeout_seconds, reason)
    timeout = datetime.timedelta(seconds=timeout_seconds)
    try:
        store = dist.TCPStore(place[0], port, is_master=False, wait_for_workers=False, timeout=timeout)
    except dist.DistError as error:
        raise _unreachable(address, port, timeout_seconds, str(error).splitlines()[0]) from None
    return Meeting(store, place[0], port)


def _check_reachable(family: socket.AddressFamily, address: str) -> None:
    """Connect to ourselves, as torch's client will for minutes without a word: loopback may be down."""
    try:
        with socket.socket(family) as listener, socket.socket(family) as attempt:
            listener.bind((address, 0))
            listener.listen(1)
            attempt.settimeout(TRY_SECONDS)
            attempt.connect(listener.getsockname())
    except OSError as error:
        raise ConfigError(
            44,
            f"the address {address}, at which the ranks would meet,",
            f"cannot be reached from this machine itself ({error.strerror or error})",
            "bring its network up (`ip link set lo up`), or give another --master-addr",
        ) from None


def _unreachable(address: str, port: int, timeout_seconds: int, reason: str) -> ParallelError:
    return ParallelError(
        5,
        f"{address}:{port}",
        f"could not be reached within {timeout_seconds} s ({reason})",
        "start node 0 too; check address, port and firewall",
    )


def _resolve(address: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int]]:
    """Family and address of a name; a name server that is out of reach is an ``OSError``, which may pass."""
    try:
        family, _, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        if error.errno == socket.EAI_AGAIN:
            raise
        raise ConfigError(
            49, f"--master-addr={address}", f"is not a known name ({error.strerror})", "give an address of node 0"
        ) from None
    return family, (str(place[0]), port)


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _names_loopback(address: str) -> bool:
    """Whether the user asked for loopback, by number or by its own name."""
    try:
        return _is_loopback(address)
    except ValueError:
        return address == "localhost"


def _route_out(name: str, loopback: str) -> str:
    """This machine's address on the way to others. Connecting a datagram socket chooses a route and sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(ROUTE_PROBE)
        except OSError as error:
            raise ConfigError(
                44,
                f"--master-addr={name}",
                f"is {loopback} here, which other nodes cannot reach, and there is no route out ({error.strerror})",
                "give node 0's address in the network of the nodes",
            ) from None
        return str(probe.getsockname()[0])


def interface_towards(meeting: Meeting) -> str | None:
    """Name of the network interface through which this machine reaches the store; None where that cannot be told."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((meeting.address, meeting.port))
            ours = probe.getsockname()[0]
        except OSError:  # another family of addresses, or no route: the libraries' own choice stands
            return None
        for _, name in socket.if_nameindex():
            address = interface_address(probe.fileno(), name)
            if address is not None and socket.inet_ntoa(address) == ours:
                return name
    return None


def torchrun_store(rank: int, world_size: int) -> Store:
    """The store of ranks that torchrun started, whose environment variables say where it is."""
    store: Store = next(iter(dist.rendezvous("env://", rank, world_size)))[0]
    return store


def start_process_group(
    store: Store, rank: int, world_size: int, device: torch.device, timeout_seconds: int, status: StatusSlot
) -> None:
    """Join torch's default process group: NCCL on GPUs, gloo on CPUs. That it is waited for is noted."""
    timeout = datetime.timedelta(seconds=timeout_seconds)
    with status.waits("the process group"):
        if device.type == "cuda":
            torch.cuda.set_device(device)
            dist.init_process_group(
                "nccl", store=store, rank=rank, world_size=world_size, timeout=timeout, device_id=device
            )
        else:
            leave_cores_to_those_who_run()
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)


def leave_cores_to_those_who_run() -> None:
    """Before gloo is started: this thread, and those that it starts from now on, take no core from another by waking.

    gloo's event loop tries the lock of a connection and asks the kernel for events again until it has it. Where ranks
    are more than cores, the loop that a message wakes takes the core of the very thread that holds the lock, and spins
    for the rest of its time slice: eight ranks on two cores called epoll_wait 10.5 million times for half a million
    messages. Under SCHED_BATCH (sched(7), Linux) a thread that wakes waits until the core is free; priorities stay.
    """
    take_no_core_by_waking()


def end_process_group() -> None:
    """Leave torch's default process group, if this process has one."""
    if dist.is_initialized():
        dist.destroy_process_group()
