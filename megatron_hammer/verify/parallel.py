"""A layout against one process: starts the ranks, makes both references, and says what differs.

::

    the user's config -- shrink --> all ranks, two steps in fp64 and fp32 --------------------+
                               |--> one process of ours, the same steps, fp64 and fp32 -------+--> table, findings
                               |--> transformers and AdamW written out, fp64, one process ----+
                               '--> sums in one tree: the ranks without data parallelism -----+

One process of ours shares its code with the ranks and is equal to many digits; transformers shares nothing and shows
what both have wrong. Sums in one tree promise more: the same bits as with one data-parallel rank.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.base.tables import align
from megatron_hammer.checkpoint.folder import open_checkpoint
from megatron_hammer.checkpoint.kinds import STATE_KINDS
from megatron_hammer.checkpoint.read import read_logical
from megatron_hammer.config import Config, KernelsConfig
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.supervise.nodes import Node
from megatron_hammer.supervise.start import launch
from megatron_hammer.verify.compare import (
    BOUNDS,
    NUMBER_BOUNDS,
    Deviation,
    Evidence,
    LayoutSizes,
    compare_numbers,
    compare_pieces,
    compare_stages,
    whole_tensors,
)
from megatron_hammer.verify.diagnosis import diagnose
from megatron_hammer.verify.outcome import INITIAL, Outcome, TensorPiece, read_outcome
from megatron_hammer.verify.reference import reference_steps
from megatron_hammer.verify.shrink import STEPS, alone, exact_optimizer, shrink
from megatron_hammer.verify.steps import (
    EXACT,
    precisions,
    take_steps,
)
from megatron_hammer.verify.token_inputs import TokenInputs
from megatron_hammer.verify.tokens import compare_tokens

RANK_ENTRY = "megatron_hammer.verify.steps:run_rank"
AGAINST_TRANSFORMERS = 5e-6  # its cos and sin are made in fp32 in another way, our losses are divided by an fp32 scalar
ANOTHER_ORDER = "equal but for rounding: added in another order than that of the tree"
NOT_SAVED = "the ranks' states are right, and what a checkpoint has of them is not"
ProofRow = tuple[str, str, str, str, str]


@dataclass(frozen=True)
class Proof:
    """What came of a comparison."""

    config: Config
    """The small one."""
    left_out: list[str]
    """Settings that took no part."""
    rows: list[ProofRow]
    """Quantity, reference, precision, largest difference, bound."""
    findings: list[Deviation]
    """In the order of the model; empty where the layout computes what one process computes."""
    causes: list[str] = dataclasses.field(default_factory=list)
    """What all of them together say of the cause."""

    def table(self) -> list[str]:
        """What was compared, for people."""
        return align([("quantity", "against", "in", "difference", "bound"), *self.rows])


def prove_layout(config: Config, world_size: int, note: Callable[[str], None], on_gpus: bool = False) -> Proof | int:
    """Compare ``world_size`` ranks of the shrunk config with one process.

    Args:
        on_gpus: the ranks run on GPUs, in the config's precision and with its kernels; the references are the same.

    Returns:
        the proof, or the exit code of the launcher where a rank failed (its line is on stderr).

    Raises:
        ConfigError: on_gpus, and this machine has too few GPUs.
    """
    if on_gpus:
        _check_gpus(world_size)
    small, left_out = shrink(config, world_size, on_gpus)
    small.validate(world_size)
    sizes, names = LayoutSizes.of(small, world_size), precisions(small)
    with tempfile.TemporaryDirectory(prefix="verify-parallel-") as folder:
        note(f"{world_size} ranks: {STEPS} steps in {' and in '.join(names)}")
        ranks = _of_ranks(small, world_size, Path(folder))
        if isinstance(ranks, int):
            return ranks
        refused = ranks[[*names][-1]][0].refused
        saved = None if refused else Outcome([], [], _saved_pieces(Path(folder) / "checkpoints"))
        counted = None if refused else _saved_updates(Path(folder) / "checkpoints")
    without_dp = _without_dp(small, sizes, note)
    if isinstance(without_dp, int):
        return without_dp
    note("one process: the same")
    alone, initial = _one_process(small)
    note("transformers: the same in fp64")
    theirs, (exact, *_, last) = reference_steps(small, initial), (*names, *names)
    positions = TokenInputs.of(small).positions.ravel()
    compared = []
    for name in names:
        reference = alone.get(name, alone["fp32"])
        compared.append(_tokens_against(reference, name, ranks[name], positions, sizes))
        compared.append(_against("one process", reference, name, ranks[name], BOUNDS[name], sizes))
        if without_dp:
            compared.append(_same_bits(without_dp[name], name, ranks[name], sizes))
    bound = max(BOUNDS[exact], AGAINST_TRANSFORMERS)
    compared.append(_against("transformers", theirs, exact, ranks[exact], bound, sizes))
    if saved is not None:
        compared.append(_checkpoint_against(saved, alone["fp32"], last, sizes))
    rows, findings = ([part for parts in column for part in parts] for column in zip(*compared, strict=True))
    if counted not in (None, STEPS) and small.train.precision != "fp16":  # there an update may be left out
        said = f"it is {counted:g} after {STEPS} updates: a run that goes on would correct its moments otherwise"
        findings.append(Deviation("checkpoint's count of updates", (), np.inf, said))
    if refused:
        findings.append(Deviation("checkpoint", tuple(range(world_size)), np.inf, f"it cannot be written: {refused}"))
    of_stages = compare_stages(ranks[exact], sizes)
    findings = of_stages + findings
    causes = [finding.cause for finding in of_stages]
    if findings and exact == "fp64":
        note("one process with faults in it: which gives these numbers")
        causes += diagnose(Evidence(small, world_size, ranks[exact], alone[exact], initial, BOUNDS[exact]))
    return Proof(small, left_out, rows, findings, causes or _by_what(findings))


def _by_what(findings: list[Deviation]) -> list[str]:
    """A cause by what differs alone, where the numbers of steps give none."""
    for beginning, cause in (("checkpoint", NOT_SAVED), ("bits", ANOTHER_ORDER)):
        if findings and all(finding.what.startswith(beginning) for finding in findings):
            return [cause]
    return []


def _check_gpus(ranks: int) -> None:
    """Refuse fewer GPUs than ranks before anything is started: the ranks would prove CPUs, and say GPUs."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not found:
        raise ConfigError(4, "--gpu", "needs GPUs that torch can see", "leave it out: a proof on CPUs needs none")
    if ranks > found:
        raise ConfigError(
            5,
            f"--nproc={ranks}",
            f"is more ranks than the {found} GPUs of this machine",
            f"lower it to {found} with a layout of so many, or leave --gpu out",
        )


def _of_ranks(small: Config, world_size: int, folder: Path) -> dict[str, list[Outcome]] | int:
    """What each of so many ranks reports in each precision; the launcher's exit code where one fails."""
    placed = dataclasses.replace(small, train=dataclasses.replace(small.train, output=str(folder)))
    if code := launch(placed, Node(world_size), RANK_ENTRY):
        return code
    return {name: [read_outcome(folder / f"{name}-{r}") for r in range(world_size)] for name in precisions(small)}


def _without_dp(small: Config, sizes: LayoutSizes, note: Callable[[str], None]) -> dict[str, list[Outcome]] | int:
    """Where sums are made in one tree, whose bits no number of data-parallel ranks may change: the ranks without them.
    Else nothing; the launcher's exit code where one fails."""
    if small.train.deterministic_reduction == "off" or sizes.dp == 1:
        return {}
    if small.train.device != "cpu" and not small.kernels.deterministic:
        note("bits are not compared: on a GPU they are equal with kernels.deterministic=true only")
        return {}
    note(f"{sizes.tp} of the ranks, without data parallelism: the same")
    with tempfile.TemporaryDirectory(prefix="verify-parallel-") as folder:
        return _of_ranks(small, sizes.tp, Path(folder))


def _one_process(small: Config) -> tuple[dict[str, Outcome], dict[str, np.ndarray]]:
    """Our own steps on whole tensors on a CPU, and the initial weights of the model."""
    train = dataclasses.replace(small.train, precision="fp32", device="cpu")
    config = dataclasses.replace(
        alone(small), train=train, kernels=KernelsConfig(), optimizer=exact_optimizer(small.optimizer)
    )
    outcomes = {name: take_steps(config, ParallelContext.single(), dtype) for name, dtype in EXACT.items()}
    begun = [piece for piece in outcomes["fp64"].pieces if piece.kind == INITIAL + "model"]
    return outcomes, {tensor: values for (_, tensor), values in whole_tensors(begun).items()}


def _saved_pieces(folder: Path) -> list[TensorPiece]:
    """The logical tensors of the checkpoint that the ranks wrote."""
    manifest = open_checkpoint(folder)
    assert manifest.step == STEPS
    pieces = []
    for tensor in manifest.tensors:
        values = read_logical(manifest, tensor.name, tensor.kind).double().numpy()
        rows, *cols = values.shape
        pieces.append(TensorPiece(tensor.kind, tensor.name, (0, rows), (0, cols[0]) if cols else None, values))
    return pieces


def _saved_updates(folder: Path) -> float:
    """The count by which a run that goes on from that checkpoint corrects AdamW's moments."""
    return float(open_checkpoint(folder).state["optimizer"]["updates"])


def _against(
    name: str, reference: Outcome, precision: str, ranks: list[Outcome], bound: float, sizes: LayoutSizes
) -> tuple[list[ProofRow], list[Deviation]]:
    numbers = max(NUMBER_BOUNDS[precision], NUMBER_BOUNDS["fp32"] if name == "transformers" else 0.0)
    difference, findings = compare_numbers(ranks, reference, numbers, sizes)
    rows = [_row("losses, gradient norms", name, precision, difference, numbers)]
    worst, found = compare_pieces(ranks, whole_tensors(reference.pieces), bound, sizes)
    rows += [_row(kind, name, precision, value, bound) for kind, value in worst.items()]
    return rows, [dataclasses.replace(f, what=f"{f.what}, against {name} in {precision},") for f in findings + found]


def _same_bits(
    others: list[Outcome], precision: str, ranks: list[Outcome], sizes: LayoutSizes
) -> tuple[list[ProofRow], list[Deviation]]:
    """Ranks whose sums are made in one tree against as many tensor-parallel ones without data parallelism."""
    name, first = "one data-parallel rank", others[0]
    pieces = [piece for outcome in others for piece in outcome.pieces]
    difference, findings = compare_numbers(ranks, first, 0.0, sizes)
    try:
        whole = whole_tensors(pieces)
    except ValueError as error:
        what = f"{error}, on {name} in {precision},"
        return [], [
            Deviation(what, tuple(range(len(others))), np.inf, "the ranks without data parallelism are wrong, too")
        ]
    worst, found = compare_pieces(ranks, whole, 0.0, sizes)
    kept = [
        dataclasses.replace(f, what=f"bits of {f.what}, against {name} in {precision},", cause=ANOTHER_ORDER)
        for of_kind, beyond in ((findings, NUMBER_BOUNDS), (found, BOUNDS))  # beyond it one process says more
        for f in of_kind if f.difference <= beyond[precision]
    ]  # fmt: skip
    return [_row("bits of all numbers", name, precision, max(difference, *worst.values()), 0.0)], kept


def _tokens_against(
    reference: Outcome, precision: str, ranks: list[Outcome], positions: np.ndarray, sizes: LayoutSizes
) -> tuple[list[ProofRow], list[Deviation]]:
    """The loss of each token before the first step, against one process."""
    bound = BOUNDS[precision]
    worst, found = compare_tokens(ranks, reference, positions, bound, sizes)
    found = [dataclasses.replace(f, what=f"{f.what}, against one process in {precision},") for f in found]
    return [_row("loss of each token", "one process", precision, worst, bound)], found


def _checkpoint_against(
    saved: Outcome, alone: Outcome, precision: str, sizes: LayoutSizes
) -> tuple[list[ProofRow], list[Deviation]]:
    """What the ranks saved, put together by our reader, against the state of one process."""
    whole = {key: value for key, value in whole_tensors(alone.pieces).items() if key[0] in STATE_KINDS}
    worst, found = compare_pieces([saved], whole, BOUNDS[precision], sizes)
    rows = [_row(f"checkpoint's {kind}", "one process", precision, value, BOUNDS[precision])
            for kind, value in worst.items()]  # fmt: skip
    have = {(piece.kind, piece.tensor): piece.values for piece in saved.pieces}

    def cause(found: Deviation) -> str:
        kind, tensor = found.what.split(" of ")
        values = have.get((kind, tensor), np.empty(0))
        others = [
            o for o in STATE_KINDS if o != kind and (o, tensor) in whole and whole[o, tensor].shape == values.shape
        ]
        swapped = [o for o in others if np.allclose(values, whole[o, tensor], 1e-4, 1e-12)]
        return f"it has the values of {swapped[0]}" if swapped else found.cause

    return rows, [dataclasses.replace(f, what=f"checkpoint's {f.what}", ranks=(), cause=cause(f)) for f in found]


def _row(what: str, reference: str, precision: str, difference: float, bound: float) -> ProofRow:
    return what, reference, precision, f"{difference:.1e}", f"{bound:.0e}"
