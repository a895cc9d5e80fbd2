"""The weights of a Hugging Face folder: safetensors files, written and read tensor by tensor.

Small models have one file; larger ones have several with an index that says which tensor is in which, as transformers
reads them. The files themselves are those of ``checkpoint/tensor_files.py``. Memory: a few MiB, never a whole tensor
unless one is asked for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.base.errors import CheckpointError
from megatron_hammer.base.files import dump_json, write_durably
from megatron_hammer.base.progress import Progress
from megatron_hammer.checkpoint.dtypes import DTYPES
from megatron_hammer.checkpoint.manifest import Manifest
from megatron_hammer.checkpoint.read import LogicalReader
from megatron_hammer.checkpoint.tensor_files import ITEM_BYTES, TensorEntry, TensorFileReader, TensorFileWriter
from megatron_hammer.config import ModelConfig
from megatron_hammer.huggingface.config import read_json
from megatron_hammer.model.llama import Stage
from megatron_hammer.model.parameters import EMBEDDING, HEAD, Parameter, logical_shapes
from megatron_hammer.parallel.sharding import Rectangle, rectangles

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_TENSORS = 60_000  # over all files: 5,000 layers
DEFAULT_SHARD_BYTES = 5 * 10**9  # transformers' own long-time default


def export_weights(
    manifest: Manifest, folder: Path, dtype: str, max_shard_bytes: int | None, look: Callable[[], object] = lambda: None
) -> None:
    """Stream the logical weights of a checkpoint, in one type, into one file, or into several with an index.

    Args:
        look: called before each tensor; what it raises ends the export.
    """
    tensors = {tensor.name: (dtype, tensor.shape) for tensor in manifest.tensors if tensor.kind == "weight"}
    with LogicalReader(manifest) as reader, one_thread():

        def chunks(name: str) -> Iterator[Any]:
            look()
            for band in reader.bands(name):
                yield band.to(DTYPES[dtype]).view(-1).view(torch.uint8).numpy()

        write_weight_files(folder, tensors, chunks, max_shard_bytes)


def write_weight_files(
    folder: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    chunks: Callable[[str], Iterable[Any]],
    max_shard_bytes: int | None = None,
) -> dict[str, str]:
    """Stream tensors into one file, or into shards with an index, as transformers reads them.

    Args:
        tensors: name -> (dtype, shape), in the order of the files.
        chunks: gives the bytes of a tensor by its name; called once for each, in order.
        max_shard_bytes: largest size of a file; None: ``DEFAULT_SHARD_BYTES``.

    Returns:
        name -> XXH3-128 of its bytes, taken before they were written.
    """
    sizes = {name: math.prod(shape) * ITEM_BYTES[dtype] for name, (dtype, shape) in tensors.items()}
    plan = plan_files(sizes, max_shard_bytes or DEFAULT_SHARD_BYTES)
    files = [f"model-{i + 1:05d}-of-{len(plan):05d}.safetensors" for i in range(len(plan))] if plan[1:] else [WEIGHTS]
    hashes = {}
    with Progress("writing weights", sum(sizes.values())) as progress:
        for file_name, names in zip(files, plan):
            entries = [(name, *tensors[name]) for name in names]
            with TensorFileWriter(folder / file_name, entries, {"format": "pt"}) as writer:
                for name in names:
                    hashes[name] = writer.write(name, chunks(name))
                    progress.advance(sizes[name])
    if plan[1:]:
        weight_map = {name: file_name for file_name, names in zip(files, plan) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_durably(folder / INDEX, dump_json(index))
    return hashes


def plan_files(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Tensors in order, cut where a file would exceed ``limit`` bytes; a larger tensor has a file of its own."""
    plan: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if plan[-1] and used + size > limit:
            plan.append([])
            used = 0
        plan[-1].append(name)
        used += size
    return plan


_ROTARY = "rotary_emb.inv_freq"  # old Llamas stored these; they are computed


def _is_redundant(name: str) -> bool:
    """Whether a tensor may be in the index and not in the files, or the other way round: what a model needs of these is
    found missing by ``check_tensors``."""
    return name == HEAD or name.endswith(_ROTARY)


class HfWeights:
    """The safetensors files of a Hugging Face folder, single or sharded; a context manager.

    Programs differ in what they leave of a tied model's two names for one matrix: the embedding, the head or both, and
    an index may list what the files lack. Where ``tied`` is set, the embedding is there under its own name in any case.

    Raises:
        CheckpointError: none, only pickled ones, or files that do not hold what the index says.
    """

    def __init__(self, folder: Path, tied: bool = False) -> None:
        self.folder, self._tied, self._stack = folder, tied, ExitStack()
        self._stored_as: dict[str, str] = {}
        self._readers: dict[str, TensorFileReader] = {}
        self.where: dict[str, str] = {}
        """Tensor -> file."""
        with ExitStack() as stack:
            if (folder / WEIGHTS).exists():
                self.where = dict.fromkeys(self._open(stack, WEIGHTS).tensors, WEIGHTS)
            elif (folder / INDEX).exists():
                self.where = self._read_index(stack)
            else:
                raise self._no_weights()
            if tied and EMBEDDING not in self.where and HEAD in self.where:
                self.where[EMBEDDING], self._stored_as[EMBEDDING] = self.where.pop(HEAD), HEAD
            self._stack = stack.pop_all()

    def _open(self, stack: ExitStack, name: str) -> TensorFileReader:
        self._readers[name] = stack.enter_context(TensorFileReader(self.folder / name))
        return self._readers[name]

    def _read_index(self, stack: ExitStack) -> dict[str, str]:
        weight_map = read_json(self.folder / INDEX).get("weight_map")
        where = f"{self.folder / INDEX}: weight_map"
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(28, where, "is not a mapping of tensors to files", "fetch the model again")
        if len(weight_map) > MAX_TENSORS:
            rule = f"names {len(weight_map):,} tensors, more than any model of ours has"
            raise CheckpointError(28, where, rule, "name another model")
        for name in sorted(set(weight_map.values())):
            if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors", name):
                raise CheckpointError(
                    28, f"{where}: {name!r}", "is not the plain name of a safetensors file", "fetch the model again"
                )
            for tensor in self._open(stack, name).tensors:
                if tensor not in weight_map and (_is_redundant(tensor) or (self._tied and tensor == EMBEDDING)):
                    weight_map[tensor] = name
                if weight_map.get(tensor) != name and not (self._tied and tensor in (EMBEDDING, HEAD)):
                    raise CheckpointError(
                        28, f"{self.folder / name}: {tensor}", "is not where the index says", "fetch the model again"
                    )
        absent = {tensor for tensor, name in weight_map.items() if tensor not in self._readers[name].tensors}
        for tensor in sorted(absent):
            if not (_is_redundant(tensor) or (self._tied and tensor == EMBEDDING and HEAD in weight_map)):
                name = weight_map[tensor]
                raise CheckpointError(24, f"{self.folder / name}: {tensor}", "is missing", "fetch the model again")
        return {tensor: name for tensor, name in weight_map.items() if tensor not in absent}

    def _no_weights(self) -> CheckpointError:
        pickled = sorted(p.name for p in self.folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        if pickled:
            return CheckpointError(
                23,
                str(self.folder / pickled[0]),
                "is a pickle, which can run code when it is read",
                "save the model with safe_serialization=True first",
            )
        return CheckpointError(
            29, str(self.folder), f"holds neither {WEIGHTS} nor {INDEX}", "name the folder of a Hugging Face model"
        )

    def entry(self, name: str) -> TensorEntry:
        """Type, shape and place of a tensor."""
        return self._readers[self.where[name]].tensors[self._stored(name)]

    def _stored(self, name: str) -> str:
        """The name under which the file has a tensor."""
        return self._stored_as.get(name, name)

    def hash_of(self, name: str) -> str:
        """Hash of a tensor's bytes."""
        return self._readers[self.where[name]].hash_of(self._stored(name))

    def read(self, name: str) -> Tensor:
        """One whole tensor."""
        entry = self.entry(name)
        data = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        self._readers[self.where[name]].read_into(self._stored(name), data.view(-1).view(torch.uint8).numpy())
        return data

    def parts(self, name: str) -> Iterator[Tensor]:
        """A tensor's elements in order, 4 MiB at a time in flat tensors; each is gone when the next is asked for."""
        dtype = DTYPES[self.entry(name).dtype]
        for chunk in self._readers[self.where[name]].chunks(self._stored(name)):
            yield torch.frombuffer(chunk, dtype=dtype)

    def read_part(self, name: str, start: int, buffer: Any) -> None:
        """Fill ``buffer`` (flat bytes) with a tensor's bytes from its byte ``start`` on."""
        self._readers[self.where[name]].read_part(self._stored(name), start, buffer)

    def place(self, name: str) -> tuple[str, int]:
        """File and first byte of a tensor: sorted by it, tensors are read from front to back."""
        return self.where[name], self.entry(name).offset

    def __enter__(self) -> HfWeights:
        return self

    def __exit__(self, *rest: object) -> None:
        self._stack.close()


def check_tensors(weights: HfWeights, model: ModelConfig) -> None:
    """Raise ``CheckpointError`` unless the files hold exactly the tensors of this model, in types that we can keep."""
    shapes, where = logical_shapes(model), str(weights.folder)
    for name in weights.where:
        if name not in shapes and not name.endswith(_ROTARY):
            tied = name == HEAD and EMBEDDING in weights.where and weights.hash_of(HEAD) == weights.hash_of(EMBEDDING)
            if not tied:
                raise CheckpointError(
                    25,
                    f"{where}: {name}",
                    "is not a tensor of the model that config.json describes",
                    "fetch the model again or mend its config.json",
                )
    for name, shape in shapes.items():
        if name not in weights.where:
            raise CheckpointError(24, f"{where}: {name}", "is missing", "fetch the model again")
        entry = weights.entry(name)
        if entry.shape != shape:
            raise CheckpointError(
                26,
                f"{where}: {name} of shape {list(entry.shape)}",
                f"must have shape {list(shape)} by config.json",
                "fetch the model again",
            )
        if entry.dtype not in ITEM_BYTES:
            raise CheckpointError(
                27,
                f"{where}: {name} of type {entry.dtype}",
                f"must be one of {', '.join(ITEM_BYTES)}",
                "save the model in one of these types",
            )


def fill_stage(stage: Stage, table: Sequence[Parameter], weights: HfWeights) -> None:
    """Fill a model's weights from the folder, converting to its types; one whole tensor in memory at a time.

    The tensors must be those of the model (``check_tensors``).

    Args:
        table: of the stage; names and shapes as in it.
    """
    places = {name: parameter.detach().view(-1) for name, parameter in stage.named_parameters()}
    wanted: dict[str, list[tuple[Rectangle, Tensor]]] = {}
    for parameter in table:
        flat = places[parameter.name]
        for part in parameter.slices:
            for box in rectangles(part, 0, parameter.numel):
                view = flat[box.position : box.position + box.numel].view(box.shape)
                wanted.setdefault(part.tensor, []).append((box, view))
    for name in sorted(wanted, key=weights.place):
        tensor = weights.read(name)
        for box, view in wanted[name]:
            rows = tensor[box.rows[0] : box.rows[1]]
            view.copy_(rows if box.cols is None else rows[:, box.cols[0] : box.cols[1]])


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on this thread alone: a chunk is too little to share, and its other threads would wait for the
    cores that read and write (a state of 6.3 GB: 4 s instead of 1.2)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
