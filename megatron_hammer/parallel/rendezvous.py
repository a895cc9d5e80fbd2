"""How the ranks of a run find each other, and the start and the end of torch's process group.

They meet at a store, torch's ``TCPStore``: a small table of keys and values behind a socket, which one process hosts
and the others join. It exists before any process group does, so errors at start-up travel through it too.
"""

from __future__ import annotations

import datetime
import socket

import torch
import torch.distributed as dist

from megatron_hammer.base.errors import ConfigError, ParallelError

Store = dist.Store


def host_store(address: str, port: int, timeout_seconds: int) -> tuple[Store, int]:
    """Open the store here and return it with its port, a free one where ``port`` is 0.

    torch would bind a port on every interface; it takes a socket that is already bound to this address instead.

    Raises:
        ConfigError: the address or the port cannot be bound.
    """
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart need not wait for TIME_WAIT to pass
        listener.bind(place)
    except OSError as error:
        raise ConfigError(
            44,
            f"--master-addr={address} --master-port={port}",
            f"could not be bound on node 0 ({error.strerror})",
            "give an address of node 0 and a free port",
        ) from None
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        address,
        port,
        is_master=True,
        timeout=datetime.timedelta(seconds=timeout_seconds),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, port


def join_store(address: str, port: int, timeout_seconds: int) -> Store:
    """Reach the store that another process hosts.

    Raises:
        ParallelError: it does not answer in time.
    """
    try:
        return dist.TCPStore(
            address,
            port,
            is_master=False,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=timeout_seconds),
        )
    except dist.DistError as error:
        raise ParallelError(
            5,
            f"{address}:{port}",
            f"could not be reached within {timeout_seconds} s ({str(error).splitlines()[0]})",
            "start node 0 too; check address, port and firewall",
        ) from None


def torchrun_store(rank: int, world_size: int) -> Store:
    """The store of ranks that torchrun started, whose environment variables say where it is."""
    store, *_ = next(iter(dist.rendezvous("env://", rank, world_size)))
    return store


def start_process_group(store: Store, rank: int, world_size: int, device: torch.device, timeout_seconds: int) -> None:
    """Join torch's default process group: NCCL on GPUs, gloo on CPUs."""
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl", store=store, rank=rank, world_size=world_size, timeout=timeout, device_id=device
        )
    else:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)


def end_process_group() -> None:
    """Leave torch's default process group, if this process has one."""
    if dist.is_initialized():
        dist.destroy_process_group()
