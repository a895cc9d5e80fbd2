"""The pipeline as data: every order is run with links that hold nothing, and every split is held against all others."""

from __future__ import annotations

import itertools
from collections import defaultdict
from types import SimpleNamespace

import pytest

from megatron_hammer.config import ModelConfig
from megatron_hammer.parallel.pipeline import Action, Pipeline, TokenFlops, largest_instants, posted_ahead, split_layers
from megatron_hammer.train import pipeline as train_pipeline

KINDS = ("forward", "backward")
SHAPES = [
    (p, v, m)
    for p in (1, 2, 3, 4, 5, 8)
    for v in (1, 2, 3, 4)
    for m in range(1, 17)
    if (v == 1 or m % p == 0) and (p > 1 or v == 1)
]
Link = tuple[int, int, str]
"""From, to, kind."""


def _receive_link(action: Action, ranks: int) -> Link:
    """On which link comes what this action needs."""
    here = action.stage % ranks
    there = (action.stage + (-1 if action.kind == "forward" else 1)) % ranks
    return there, here, action.kind


def _send_link(action: Action, ranks: int) -> Link:
    here = action.stage % ranks
    return here, (action.stage + (1 if action.kind == "forward" else -1)) % ranks, action.kind


def _reader(action: Action) -> Action:
    """The action that needs what this one sends."""
    return Action(action.kind, action.stage + (1 if action.kind == "forward" else -1), action.micro_batch)


def _run(orders: list[list[Action]], v: int, times: dict[str, float]) -> float:
    """Run all ranks; a message leaves a rank when the other one has posted its receive. The time of the last action.

    A rank posts so many receives ahead as training does, in the order in which it needs them, and waits before a send
    where as many as training keeps have not left yet. Raises where no rank can go on.
    """
    p = len(orders)
    n, at, clock = p * v, [0] * p, [0.0] * p
    needs = [[a for a in order if a.receives(n)] for order in orders]
    got: list[dict[Action, float]] = [{} for _ in range(p)]  # when what an action needs was sent
    posted: list[dict[Action, float]] = [dict.fromkeys(need[: posted_ahead(need, 0)], 0.0) for need in needs]
    sent: list[list[Action]] = [[] for _ in range(p)]  # their readers, oldest first
    while any(i < len(order) for i, order in zip(at, orders, strict=True)):
        moved = False
        for rank, order in enumerate(orders):
            while at[rank] < len(order):
                action = order[at[rank]]
                start = clock[rank]
                if action.receives(n):
                    if action not in got[rank]:
                        break
                    start = max(start, got[rank][action])
                end = start + times[action.kind]
                if action.sends(n):
                    kept = Pipeline(rank, p, v).sends_kept
                    oldest = sent[rank][-kept] if len(sent[rank]) >= kept else None
                    if oldest is not None:
                        if oldest not in posted[oldest.stage % p]:
                            break
                        end = max(end, posted[oldest.stage % p][oldest])
                    reader = _reader(action)
                    got[reader.stage % p][reader] = end
                    sent[rank].append(reader)
                if action.receives(n):
                    taken = needs[rank].index(action) + 1
                    for following in needs[rank][taken : taken + posted_ahead(needs[rank], taken)]:
                        posted[rank].setdefault(following, start)
                clock[rank], at[rank], moved = end, at[rank] + 1, True
        assert moved, f"all ranks wait: {[o[i : i + 1] for i, o in zip(at, orders, strict=True)]}"
    return max(clock)


@pytest.mark.parametrize("order", ["training", "evaluation"])
def test_both_ends_of_every_link_use_it_in_the_same_order(order: str) -> None:
    for p, v, m in SHAPES:
        sends, receives = defaultdict(list), defaultdict(list)
        for rank in range(p):
            for action in getattr(Pipeline(rank, p, v), order)(m):
                if action.sends(p * v):
                    sends[_send_link(action, p)].append(_reader(action))
                if action.receives(p * v):
                    receives[_receive_link(action, p)].append(action)
        assert sends == receives, (p, v, m)
        assert all(a != b and (b - a) % p == (1 if kind == "forward" else p - 1) for a, b, kind in sends)


def test_every_order_ends_and_takes_as_long_as_the_formula_says() -> None:
    for p, v, m in SHAPES:
        pipelines = [Pipeline(rank, p, v) for rank in range(p)]
        steps = (m + (p - 1) / v) * v  # in times of one stage
        for forward, backward in ((1.0, 1.0), (1.0, 2.0)):
            taken = _run([pipe.training(m) for pipe in pipelines], v, {"forward": forward, "backward": backward})
            assert taken == pytest.approx(steps * (forward + backward)), (p, v, m)
        assert pipelines[0].idle_share(m) == pytest.approx(1 - m * v / steps)
    for p, v, m in itertools.product((1, 2, 3, 4, 8), (1, 2, 3), (1, 2, 3, 5, 8, 13)):  # no multiples
        _run([Pipeline(rank, p, v).evaluation(m) for rank in range(p)], v, {"forward": 1.0})


class _Message:
    """A tensor on its way, and what waits for it: notes in the queue of a rank's GPU what happens to it."""

    def __init__(self, queue: list[tuple[str, Action]], waits: str, action: Action) -> None:
        self.queue, self.waits, self.action = queue, waits, action

    def contiguous(self) -> _Message:
        return self

    def wait(self) -> None:
        self.queue.append((self.waits, self.action))


def _queue_of(rank: int, p: int, v: int, order: list[Action]) -> list[tuple[str, Action]]:
    """What a rank gives its GPU besides products, in order: by ``Messages``, over links that only note it."""
    pipe, queue = Pipeline(rank, p, v), list[tuple[str, Action]]()
    expected = iter(pipe.receives(order))

    def receive(buffer: object, link: str) -> _Message:
        action = next(expected)
        assert link == f"{action.kind}_in"
        queue.append(("post", action))
        return _Message(queue, "need", action)

    def send(tensor: _Message, link: str) -> _Message:
        assert link == f"{tensor.action.kind}_out"
        queue.append(("send", tensor.action))
        return tensor

    stage = SimpleNamespace(empty_hidden=lambda tokens, packed: None)
    batches = [SimpleNamespace(tokens=None, documents=None)] * (1 + max(action.micro_batch for action in order))
    links = SimpleNamespace(**{f"{kind}_{way}": f"{kind}_{way}" for kind in KINDS for way in ("in", "out")})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_pipeline, "start_receive", receive)
        patch.setattr(train_pipeline, "start_send", send)
        messages = train_pipeline.Messages(pipe, order, [stage], batches, links)  # type: ignore[arg-type, list-item]
        for action, _ in messages.in_turn():
            if action.sends(p * v):
                messages.send(action, _Message(queue, "left", _reader(action)))  # type: ignore[arg-type]
        messages.finish()
    return queue


def _ends_with_one_queue(orders: list[list[Action]], v: int) -> bool:
    """Whether all ranks come to their end where each has one queue for all that it gives its GPU, taken in order.

    A message that is alone on its link does not hold the queue, on either side; one behind another of the same link
    does, until that has arrived, and so does what needs a message, or that one has left.
    """
    p = len(orders)
    queues = [_queue_of(rank, p, v, order) for rank, order in enumerate(orders)]
    done: dict[str, set[Action]] = {"post": set(), "send": set(), "need": set(), "left": set()}
    before: dict[tuple[int, str, str], Action] = {}  # of a rank's link, the message before
    at, moved = [0] * p, True
    while moved:
        moved = False
        for rank, queue in enumerate(queues):
            while at[rank] < len(queue):
                what, message = queue[at[rank]]
                link = rank, what, message.kind
                waits_for = message if what in ("need", "left") else before.get(link)
                if waits_for is not None and waits_for not in done["post" if what in ("send", "left") else "send"]:
                    break
                before[link] = message
                done[what].add(message)
                at[rank], moved = at[rank] + 1, True
    return all(i == len(queue) for i, queue in zip(at, queues, strict=True))


def test_every_order_ends_where_all_streams_of_a_gpu_share_one_queue() -> None:
    """CUDA_DEVICE_MAX_CONNECTIONS=1, as for Megatron-LM, or more streams than queues. With two receives posted on one
    link the first step of two stages hung: the first rank had asked for both gradients before it computed anything.
    """
    for p, v, m in SHAPES:
        pipelines = [Pipeline(rank, p, v) for rank in range(p)]
        for orders in (
            [pipe.training(m) for pipe in pipelines],
            [pipe.evaluation(m) for pipe in pipelines],
            [pipe.alone() for pipe in pipelines],
        ):
            assert _ends_with_one_queue(orders, v), (p, v, m)


def test_every_stage_sees_every_micro_batch_forward_and_then_backward() -> None:
    for p, v, m in SHAPES:
        for rank in range(p):
            pipe = Pipeline(rank, p, v)
            order = pipe.training(m)
            place = {action: i for i, action in enumerate(order)}
            assert len(place) == len(order) == 2 * m * v
            for stage, micro_batch in itertools.product(pipe.stages, range(m)):
                forward, backward = (place[Action(kind, stage, micro_batch)] for kind in ("forward", "backward"))
                assert forward < backward
                # The head's gradient is written in forward, into what backward finishes.
                assert stage < p * v - 1 or backward == forward + 1
            for kind, stage in itertools.product(("forward", "backward"), pipe.stages):
                found = [a.micro_batch for a in order if (a.kind, a.stage) == (kind, stage)]
                assert found == list(range(m)), "sums of gradients begin with the first and end with the last"


def test_micro_batches_in_flight() -> None:
    def most(pipeline: Pipeline, micro_batches: int) -> int:
        return max(sum(instant.in_flight) for instant in pipeline.instants(micro_batches))

    assert [most(Pipeline(rank, 4), 8) for rank in range(4)] == [4, 3, 2, 1]
    assert [most(Pipeline(rank, 4), 2) for rank in range(4)] == [2, 2, 2, 1]
    assert [most(Pipeline(rank, 4, 2), 8) for rank in range(4)] == [11, 9, 7, 5]
    assert most(Pipeline(), 5) == 1


def test_the_moments_at_which_a_rank_may_need_most() -> None:
    """Of two stages a rank, of which the second may be small, beside the head, the last rank."""
    instants = list((last := Pipeline(1, 2, 2)).instants(4))
    assert [(instant.kind[0], instant.own) for instant in instants[:8]] == [
        ("f", 0), ("f", 0), ("f", 1), ("b", 1), ("f", 1), ("b", 1), ("f", 0), ("b", 0),
    ]  # fmt: skip
    assert {m.in_flight for m in instants if m.kind == "backward" and m.own == 0} == {(3, 0), (2, 0), (1, 0)}
    assert instants[0].messages == 1 and instants[0].begun == (False, False), "nothing is sent or summed yet"
    assert [instant.held for instant in instants[:5]] == [
        (False, False), (True, False), (True, False), (True, True), (True, False)
    ]  # fmt: skip
    assert instants[-1].begun == (True, True) and instants[-1].messages == sum(
        action.sends(4) for action in last.training(4)[:-1]
    ), "nobody has waited for one of so few"
    largest = largest_instants(last, 8)
    assert largest == largest_instants(last, 12), "a longer step has none that is larger"
    assert all(any(instant.is_within(other) for other in largest) for instant in last.instants(8)) and len(largest) < 10


# ---- layers ---------------------------------------------------------------------------------------------------------


def _all_splits(layers: int, stages: int) -> list[tuple[int, ...]]:
    """Each with one at least, but the last."""
    found = itertools.product(range(1, layers + 1), repeat=stages - 1)
    return [(*sizes, layers - sum(sizes)) for sizes in found if sum(sizes) <= layers]


@pytest.mark.parametrize("head", [0.0, 0.6, 1.0, 3.7, 9.0])
@pytest.mark.parametrize("embedding", [0.0, 0.5])
def test_no_other_split_has_less_work_in_its_busiest_stage(head: float, embedding: float) -> None:
    for layers, stages in itertools.product((1, 4, 5, 9), (1, 2, 3, 4)):
        for again in (0, 2):
            if stages > layers:
                continue
            costs = TokenFlops(embedding, tuple(4 / 3 if i < again else 1.0 for i in range(layers)), head)
            split = split_layers(costs, stages)
            assert split in _all_splits(layers, stages)
            assert max(costs.stages(split)) == pytest.approx(
                min(max(costs.stages(other)) for other in _all_splits(layers, stages))
            )


def test_a_big_head_takes_layers_from_the_last_stage() -> None:
    """22 layers and 105,789 pieces: the head is 18 % of the matrix products."""
    model = ModelConfig(
        hidden_size=2048, ffn_hidden_size=5632, num_layers=22, num_attention_heads=32, num_query_groups=4,
        vocab_size=105_789,
    )  # fmt: skip
    short = TokenFlops.of(model, 0)
    assert short.head / (short.head + sum(short.layers)) == pytest.approx(0.18, abs=0.005)
    costs = TokenFlops.of(model, 2048)
    assert split_layers(costs, 2) == (13, 9)
    assert split_layers(costs, 4) == (6, 7, 7, 2)
    assert split_layers(costs, 8) == (3, 3, 3, 3, 3, 3, 4, 0)
    assert costs.imbalance((13, 9), 2) < 1.02 < 1.15 < costs.imbalance((11, 11), 2)


def test_equal_stages_where_nothing_but_layers_counts() -> None:
    assert split_layers(TokenFlops(0.0, (1.0,) * 10, 0.0), 4) == (2, 2, 3, 3), (
        "the earlier ones keep more micro-batches"
    )
    assert split_layers(TokenFlops(0.0, (1.0,) * 8, 0.0), 4) == (2, 2, 2, 2)
    assert TokenFlops(1.0, (1.0,) * 4, 1.0).imbalance((1, 1, 1, 1), 2) == 1.0, "stages 0 and 2, stages 1 and 3"
