"""``mp_rank_*`` checkpoints of Megatron-LM: a torch file for each rank of TP and PP, merged tensor by tensor.

::

    iter_0000100/mp_rank_00/model_optim_rng.pt        TP 0          args, iteration, model (and optimizer)
    iter_0000100/mp_rank_01_002/model_optim_rng.pt    TP 1, PP 2    model0, model1 ... where stages are interleaved

Layers are counted anew on each stage. Of tensor parallelism: qkv, embedding and head are cut by rows, as are gate and
up, each by itself; attention output and down projection by columns; norms and the biases of the last two are copies,
which must have the same bits on all ranks. The files stay mapped: memory holds one merged tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.base.errors import CheckpointError
from megatron_hammer.megatron.pickles import Record
from megatron_hammer.megatron.torch_files import load_pt
from megatron_hammer.megatron.translation import full_name, split_name

_RANK = re.compile(r"mp_rank_([0-9]{1,6})(?:_([0-9]{1,6}))?")
_FILES = ("model_optim_rng.pt", "model_rng.pt")  # the second: beside optim.pt of very old versions
_BY_COLUMNS = ("linear_proj.weight", "linear_fc2.weight")
_SCALARS, _LONGEST_TEXT = (bool, int, float, str, type(None)), 1_000
_COPIED = ("linear_proj.bias", "linear_fc2.bias", "norm.weight", "layer_norm_weight", "norm.bias", "layer_norm_bias")


class LegacyReader:
    """Reads the tensors of an ``mp_rank_*`` checkpoint, merged (``importing.MegatronCheckpoint``).

    Raises:
        CheckpointError: a rank is missing, a file cannot be read, or ranks contradict each other.
    """

    kind = "legacy mp_rank_* files"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards: dict[tuple[str, int | None], list[Tensor]] = {}
        ranks = _ranks(folder)
        tp, pp = (max(r[axis] for r in ranks) + 1 for axis in (0, 1))
        for rank in ((t, p) for p in range(pp) for t in range(tp)):
            if rank not in ranks:
                rule = f"has no file of TP rank {rank[0]}, PP rank {rank[1]}"
                raise CheckpointError(33, str(folder), rule, "copy the whole checkpoint")
        states = {rank: self._load(path) for rank, path in ranks.items()}
        self.args = arguments_of(states[0, 0], ranks[0, 0])
        self.iteration = iteration_of(states[0, 0])
        self.tensor_parallel, self.pipeline_parallel = tp, pp
        self._check_layout()
        self.optimizer = ""
        if "optimizer" in states[0, 0] or any(folder.glob("mp_rank_*/distrib_optim.pt")):
            self.optimizer = "of the legacy format, whose flat buffers depend on the ranks that wrote them"
        first = 0
        for chunk in _chunks(states[0, 0]):
            for p in range(pp):
                models = [states[t, p].get(chunk) for t in range(tp)]
                first += self._take(models, first, f"PP rank {p}, {chunk}")

    def _load(self, path: Path) -> Mapping[str, Any]:
        state = load_pt(path)
        if not isinstance(state, dict) or not _chunks(state):
            raise CheckpointError(33, str(path), "holds no model of Megatron-LM", "name a checkpoint of Megatron-LM")
        version = state.get("checkpoint_version", 0)
        if type(version) not in (int, float) or version != 3.0:
            named = f"is of checkpoint_version {str(comparable(version))[:20]}"
            rule = f"{named}, in which rows of qkv have another order: only 3.0 is read"
            raise CheckpointError(30, str(path), rule, "load and save it with a newer Megatron-LM")
        return state

    def _check_layout(self) -> None:
        names = {
            "tensor_model_parallel_size": self.tensor_parallel,
            "pipeline_model_parallel_size": self.pipeline_parallel,
        }
        for name, found in names.items():
            if self.args.get(name, found) != found:
                rule = f"must be {found}, the ranks whose files are there"
                what = f"{self.folder}: args.{name}={str(self.args[name])[:80]}"
                raise CheckpointError(33, what, rule, "copy the whole checkpoint")

    def _take(self, models: list[Any], first: int, what: str) -> int:
        """Note the tensors of one stage, whose layers begin with ``first``; how many layers it has."""
        layers = set()
        for t, model in enumerate(models):
            if not isinstance(model, dict):
                raise CheckpointError(
                    33, f"{self.folder}: TP rank {t}, {what}", "is missing", "copy the whole checkpoint"
                )
            for name, tensor in model.items():
                if not isinstance(tensor, Tensor) or not isinstance(name, str) or name.endswith("_extra_state"):
                    continue
                short, layer = split_name(name)
                if layer is not None:
                    layers.add(layer)
                    layer += first
                shards = self._shards.setdefault((short, layer), [])
                if len(shards) == t:
                    shards.append(tensor)
        if layers != set(range(len(layers))):
            raise CheckpointError(
                34, f"{self.folder}: {what}", f"has the layers {sorted(layers)}, not all", "restore it"
            )
        return len(layers)

    def names(self) -> Iterable[tuple[str, int | None]]:
        """All tensors, each with its layer over the whole model."""
        return self._shards.keys()

    def dtype(self, name: str, layer: int | None) -> torch.dtype:
        """The type in which a tensor is stored."""
        return self._shards[name, layer][0].dtype

    def rows(self, name: str) -> int:
        """Of a tensor that is cut by rows and belongs to no layer."""
        return sum(shard.shape[0] if shard.dim() else 0 for shard in self._shards[name, None])

    def tensor(self, name: str, layer: int | None) -> Tensor:
        """A whole tensor, padding included."""
        try:
            return self._merged(name, layer)
        except (RuntimeError, IndexError) as error:  # torch's, of shapes and types that do not go together
            rule = f"cannot be put together from its parts ({' '.join(str(error).split())[:100]})"
            what = f"{self.folder}: {full_name(name, layer)}"
            raise CheckpointError(34, what, rule, "copy the whole checkpoint") from None

    def _merged(self, name: str, layer: int | None) -> Tensor:
        shards = self._shards[name, layer]
        if len(shards) != self.tensor_parallel:
            rule = f"is on {len(shards)} of {self.tensor_parallel} tensor-parallel ranks"
            raise CheckpointError(34, f"{self.folder}: {full_name(name, layer)}", rule, "copy the whole checkpoint")
        if name.endswith(_COPIED):
            for t, shard in enumerate(shards[1:], start=1):
                if shard.shape != shards[0].shape or not torch.equal(_bits(shards[0]), _bits(shard)):
                    rule = f"differs between TP rank 0 and {t}, which must have copies of it"
                    what = f"{self.folder}: {full_name(name, layer)}"
                    raise CheckpointError(35, what, rule, "use an intact checkpoint")
            return shards[0]
        if name.endswith(_BY_COLUMNS):
            return torch.cat(shards, dim=1)
        if "linear_fc1" in name:
            halves = [shard.chunk(2) for shard in shards]
            return torch.cat([half[0] for half in halves] + [half[1] for half in halves])
        return torch.cat(shards)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _ranks(folder: Path) -> dict[tuple[int, int], Path]:
    found: dict[tuple[int, int], Path] = {}
    for path in sorted(folder.glob("mp_rank_*")):
        match = _RANK.fullmatch(path.name)
        if match is None:
            rule = "has files of a rank of experts, which our model has not"
            raise CheckpointError(32, str(path), rule, "convert a model without experts")
        file = next((path / name for name in _FILES if (path / name).exists()), None)
        if file is not None:
            found[int(match[1]), int(match[2] or 0)] = file
    if (0, 0) not in found:
        raise CheckpointError(33, str(folder), "has no file of TP rank 0, PP rank 0", "copy the whole checkpoint")
    return found


def _chunks(state: Mapping[str, Any]) -> list[str]:
    """The keys of a rank's stages: model, or model0, model1 and so on where they are interleaved."""
    if "model" in state:
        return ["model"]
    names = (key for key in state if isinstance(key, str))
    numbers = [int(match[1]) for key in names if (match := re.fullmatch(r"model([0-9]{1,6})", key[:20]))]
    return [f"model{number}" for number in sorted(numbers)]


def arguments_of(state: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The training arguments that a file holds.

    Raises:
        CheckpointError: E434 it has none.
    """
    args = state.get("args")
    if not isinstance(args, Record):
        raise CheckpointError(34, f"{path}: args", "is missing", "name a checkpoint that has its arguments")
    return {name: comparable(value) for name, value in args.fields().items()}


def comparable(value: Any) -> Any:
    """A value of a pickle that may be compared and printed; of any other the name of what it is."""
    if isinstance(value, list | tuple) and len(value) <= 64:
        parts = [comparable(part) if isinstance(part, _SCALARS) else f"a {type(part).__name__}" for part in value]
        return type(value)(parts) if type(value) in (list, tuple) else parts
    if isinstance(value, str):
        return value[:_LONGEST_TEXT]
    return value if isinstance(value, _SCALARS) else f"a {type(value).__name__.lower()}"


def iteration_of(state: Mapping[str, Any]) -> int:
    """The steps that were made; 0 where the file says none."""
    found = state.get("iteration")
    return found if type(found) is int and 0 <= found < 2**31 else 0
