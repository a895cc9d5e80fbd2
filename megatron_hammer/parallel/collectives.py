"""All collectives of the program: the plain ones and their differentiable forms. No other module calls one of torch's.

Each takes its group; a group of size 1 returns its input and never communicates. The differentiable pairs are those of
Megatron-LM (arXiv 1909.08053 section 3, and 2205.05198 section 4.2 for the sequence-parallel ones)::

    function         forward               backward
    sum_over_ranks   all-reduce            identity
    scatter_sum      reduce-scatter rows   all-gather rows

The linear layers have fused forms of these and of their inverses (kernels/linear.py). In a graph that torch.compile
makes of a layer they are torch's functional collectives, each waited for at once: what hides them is the compiler's
choice. Rows are dimension 0, the sequence inside the model. torch 2.13 renames two collectives; this module picks the
name that torch has. The functional ones are private, and the same in torch 2.11 to 2.15 (tests/test_private_torch.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import unwrap
from time import monotonic_ns
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from megatron_hammer.parallel.board import StatusSlot
from megatron_hammer.parallel.context import Group

SUM, MAX = dist.ReduceOp.SUM, dist.ReduceOp.MAX

# Without torch's wrapper, which writes an exception to a log before it passes it on.
_all_gather_into: Any = unwrap(getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor)
_exchange: Any = unwrap(dist.all_to_all_single)
_reduce_scatter_into: Any = unwrap(getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor)


class Done:
    """A finished handle: what an asynchronous call returns when there was nothing to communicate."""

    def wait(self) -> None:
        """Nothing to wait for."""


class Noted:
    """The handle of a collective under way; that it is waited for is noted in the status slot of this rank.

    Layers make ten of them, so what is noted is written out here (``StatusSlot.note``), and there is no ``__init__``:
    benchmarks/calls.py counts Python calls.
    """

    __slots__ = ("status", "work")
    status: StatusSlot
    work: Any

    def wait(self) -> None:
        """Until it is done here."""
        status = self.status
        status.is_waiting = True
        status.note(monotonic_ns(), status.collectives, True, status.collective)
        self.work.wait()
        status.is_waiting = False
        status.note(monotonic_ns(), status.collectives, False, status.collective)


def _start(group: Group, name: bytes, collective: Callable[..., Any], *tensors: Tensor, **more: Any) -> Any:
    """Start a collective of the group, and note it: a handle."""
    status = group.status
    status.collectives, status.collective = status.collectives + 1, name
    status.note(monotonic_ns(), status.collectives, status.is_waiting, name)
    noted = Noted()
    noted.status, status.is_waiting = status, True  # a message to a rank that has died fails here
    noted.work = collective(*tensors, group=group.handle, async_op=True, **more)
    status.is_waiting = False
    return noted


def _finish(group: Group, name: bytes, collective: Callable[..., Any], *tensors: Tensor, **more: Any) -> None:
    """Run a collective of the group to its end (on a GPU: to its start), and note it."""
    status = group.status
    status.collectives, status.collective, status.is_waiting = status.collectives + 1, name, True
    status.note(monotonic_ns(), status.collectives, True, name)
    collective(*tensors, group=group.handle, **more)
    status.is_waiting = False
    status.note(monotonic_ns(), status.collectives, False, name)


def all_reduce(tensor: Tensor, group: Group, op: Any = SUM, async_op: bool = False) -> Any:
    """Reduce ``tensor`` in place over the group; with ``async_op`` return a handle to wait for."""
    if group.size == 1:
        return Done()
    if is_dynamo_compiling():
        assert op is SUM, "layers sum"  # is: torch 2.11 cannot compare these in a graph
        tensor.copy_(functional.all_reduce(tensor, "sum", group.process_group))
        return Done()
    if async_op:
        return _start(group, b"all_reduce", dist.all_reduce, tensor, op=op)
    _finish(group, b"all_reduce", dist.all_reduce, tensor, op=op)
    return Done()


@overload
def all_gather_rows(shard: Tensor, group: Group) -> Tensor: ...
@overload
def all_gather_rows(shard: Tensor, group: Group, async_op: Literal[True]) -> tuple[Tensor, Any]: ...
def all_gather_rows(shard: Tensor, group: Group, async_op: bool = False) -> Tensor | tuple[Tensor, Any]:
    """[r, ...] on each rank -> [r * size, ...] on all, in rank order; a new tensor unless size is 1.

    With ``async_op`` it is under way: (result, handle), and the result is valid after ``handle.wait()``.
    """
    full, handle = shard, Done()
    if group.size > 1 and is_dynamo_compiling():
        full = functional.all_gather_tensor(shard.contiguous(), 0, group.process_group)
    elif group.size > 1:
        full = shard.new_empty((shard.shape[0] * group.size, *shard.shape[1:]))
        run: Callable[..., Any] = _start if async_op else _finish
        handle = run(group, b"all_gather", _all_gather_into, full, shard.contiguous())
    return (full, handle) if async_op else full


def reduce_scatter_rows_async(full: Tensor, group: Group) -> tuple[Tensor, Any]:
    """Sum [r * size, ...] over the ranks and keep this rank's r rows: (result, handle)."""
    if group.size == 1:
        return full, Done()
    if is_dynamo_compiling():
        return functional.reduce_scatter_tensor(full.contiguous(), "sum", 0, group.process_group), Done()
    shard = full.new_empty((full.shape[0] // group.size, *full.shape[1:]))
    return shard, _start(group, b"reduce_scatter", _reduce_scatter_into, shard, full.contiguous())


def reduce_scatter_into(shard: Tensor, full: Tensor, group: Group, room: Tensor | None = None) -> Any:
    """Start to sum ``full`` over the ranks into ``shard``, this rank's part (it may lie inside ``full``): a handle.

    Args:
        room: for what arrives on a CPU, where the shard lies inside ``full``: as long as the other ranks' parts, and
            nobody else's until the handle is done. Without it gloo makes copies.
    """
    if group.size == 1:
        if shard.data_ptr() != full.data_ptr():
            shard.copy_(full)
        return Done()
    if room is not None and full.is_cpu:
        return _start(group, b"reduce_scatter", _sum_of_parts, shard, full, room=room[: len(full) - len(shard)])
    return _start(group, b"reduce_scatter", _reduce_scatter_into, shard, full)


def all_gather_into(full: Tensor, shard: Tensor, group: Group) -> Any:
    """Start to gather every rank's ``shard`` (it may lie inside ``full``) into ``full``: a handle."""
    if group.size == 1:
        if shard.data_ptr() != full.data_ptr():
            full.copy_(shard)
        return Done()
    if full.is_cpu:
        return _start(group, b"all_gather", _parts_of_all, full, shard)
    return _start(group, b"all_gather", _all_gather_into, full, shard)


# gloo gathers into memory of its own and copies from there; it sums a whole copy on every rank, of which each then
# keeps its part. That is two to three times the bytes of a bucket of weights or gradients moved, and blocks of its size
# in the heaps of gloo's threads, which never come back. So on a CPU parts go from where they lie to where they belong.


def _parts_of_all(full: Tensor, shard: Tensor, group: Any, async_op: bool) -> Any:
    """By broadcasts, which nobody has to wait for before the group ends, as for messages between two ranks."""
    parts, process_group = full.chunk(dist.get_world_size(group)), _torch_group(group)
    own = parts[dist.get_rank(group)]
    if own.data_ptr() != shard.data_ptr():
        own.copy_(shard)
    ranks = [dist.get_global_rank(process_group, r) for r in range(len(parts))]
    calls = zip(parts, ranks, strict=True)
    return _Together([dist.broadcast(part, src=rank, group=group, async_op=async_op) for part, rank in calls])


def _sum_of_parts(shard: Tensor, full: Tensor, group: Any, async_op: bool, room: Tensor) -> Any:
    """Part r goes to rank r, from which one arrives; the caller waits for the handle in the same step."""
    parts, process_group = full.chunk(dist.get_world_size(group)), _torch_group(group)
    arriving = room.chunk(len(parts) - 1)
    others = [r for r in range(len(parts)) if r != dist.get_rank(group)]
    peers = [dist.get_global_rank(process_group, r) for r in others]
    handles = [dist.irecv(part, peer, group) for part, peer in zip(arriving, peers, strict=True)]
    handles += [dist.isend(parts[r], peer, group) for r, peer in zip(others, peers, strict=True)]
    return _Sum(_Together(handles), shard, arriving)


def _torch_group(handle: Any) -> Any:
    return dist.group.WORLD if handle is None else handle


class _Sum:
    """The sum of what a rank has and of the others' parts, which are on their way: taken when it is waited for."""

    def __init__(self, arriving: Any, total: Tensor, parts: Sequence[Tensor]) -> None:
        self.arriving, self.total, self.parts = arriving, total, parts

    def wait(self) -> None:
        self.arriving.wait()
        parts, self.parts = self.parts, ()
        for part in parts:
            self.total.add_(part)


def start_exchange(
    received: Tensor,
    sent: Tensor,
    group: Group,
    receive_sizes: Sequence[int] | None = None,
    send_sizes: Sequence[int] | None = None,
) -> Any:
    """Start to send the r-th of ``size`` parts of ``sent`` to rank r, and to receive one from each: a handle.

    Args:
        receive_sizes, send_sizes: rows of each part; None: all parts are equal.
    """
    if group.size == 1:
        if received.data_ptr() != sent.data_ptr():
            received.copy_(sent)
        return Done()
    if receive_sizes is None or send_sizes is None:
        return _start(group, b"all_to_all", _exchange, received, sent)
    sizes = {"output_split_sizes": list(receive_sizes), "input_split_sizes": list(send_sizes)}
    return _start(group, b"all_to_all", _exchange, received, sent, **sizes)


def broadcast(tensor: Tensor, group: Group) -> None:
    """Overwrite ``tensor`` with that of the group's first rank."""
    if group.size > 1:
        first = 0 if group.handle is None else dist.get_global_rank(group.handle, 0)
        _finish(group, b"broadcast", dist.broadcast, tensor, src=first)


def read_back(tensor: Tensor, group: Group) -> Any:
    """On the host, the values of a tensor that a collective of the group has filled: a number, or nested lists.

    On a GPU the collective itself has only been launched, and here the host waits for the others; that is noted.
    """
    with group.status.waits():
        return tensor.tolist()


def start_send(tensor: Tensor, link: Group) -> Any:
    """Start to send to the other rank of a link: a handle; the tensor is left as it is until the handle is done."""
    return _start_message(dist.isend, tensor, link, b"send")


def start_receive(tensor: Tensor, link: Group) -> Any:
    """Start to receive into ``tensor`` what the other rank of a link sends next: a handle."""
    return _start_message(dist.irecv, tensor, link, b"receive")


def _start_message(call: Callable[..., Any], tensor: Tensor, link: Group, name: bytes) -> Any:
    peer = dist.get_global_rank(link.process_group, 1 - link.rank)
    return _start(link, name, lambda **_: call(tensor, peer, group=link.handle))


class _Together:
    """Several handles as one, which may be waited for again: gloo would wait for another message then."""

    def __init__(self, handles: Sequence[Any]) -> None:
        self.handles = handles

    def wait(self) -> None:
        handles, self.handles = self.handles, ()
        for handle in handles:
            handle.wait()


def start_swap(sent: Tensor, target: int, received: Tensor, source: int, group: Group) -> Any:
    """Start to send to one rank of a group while receiving from another: a handle. The numbers are within the group.

    All ranks of the group do so at once. ``sent`` is left as it is until the handle is done.
    """
    calls = [(dist.isend, sent, target), (dist.irecv, received, source)]
    peers = [dist.get_global_rank(group.process_group, rank) for *_, rank in calls]
    if sent.is_meta:  # in a world that only counts (fake_world.py); a batch asks for the backend of a real device
        return _Together([call(x, p, group.handle) for (call, x, _), p in zip(calls, peers, strict=True)])
    batch = [dist.P2POp(call, x, p, group.process_group) for (call, x, _), p in zip(calls, peers, strict=True)]
    return _start(group, b"send and receive", lambda **_: _Together(dist.batch_isend_irecv(batch)))


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        total = x.clone()
        all_reduce(total, group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        shard, handle = reduce_scatter_rows_async(x, group)
        handle.wait()
        return shard

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_gather_rows(grads[0], ctx.group), None


def sum_over_ranks(x: Tensor, group: Group) -> Tensor:
    """Sum the parts that the ranks of a tensor-parallel region computed."""
    return x if group.size == 1 else _SumOverRanks.apply(x, group)  # type: ignore[no-untyped-call]


def scatter_sum(x: Tensor, group: Group) -> Tensor:
    """[s, ...] parts -> [s/t, ...] sums: enter a sequence-parallel region."""
    return x if group.size == 1 else _ScatterSum.apply(x, group)  # type: ignore[no-untyped-call]
