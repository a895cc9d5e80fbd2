"""To and from Hugging Face: the config mapping, the export that proves itself, the import.

::

    export_hf:  checkpoint --band by band, round--> OUTPUT.tmp-ID/ --certificate.py, own process--> OUTPUT/
    import_hf:  HF folder --4 MiB by 4 MiB--> SAVE/checkpoints/step-00000000/   (weights only, in their own type)

Logical tensors already have Hugging Face's names and shapes, and RoPE is half-split as there, so no tensor is permuted,
split or renamed in either direction; that is what makes the round trip bit-equal. What remains is the config, the
tokenizer and the proof. A feature of an HF config that our model does not have is refused by name, never dropped.

Memory: 30 MiB while writing; the proof needs one fp32 model.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from torch import Tensor

from megatron_hammer.base.errors import CheckpointError, ConfigError, RefusedError
from megatron_hammer.base.files import sync_file, write_durably
from megatron_hammer.checkpoint.fit import saved_model
from megatron_hammer.checkpoint.manifest import (
    TOKENIZER,
    Manifest,
    Note,
    checked_tokenizer_folder,
    find_checkpoints,
    new_id,
    print_note,
    publish,
    read_manifest,
    remove_leftovers,
    resolve_checkpoint,
    staging_folder,
    step_name,
)
from megatron_hammer.checkpoint.read import LogicalReader
from megatron_hammer.checkpoint.tensor_files import (
    ITEM_BYTES,
    TensorEntry,
    TensorFileReader,
    TensorFileWriter,
    count,
    open_regular,
)
from megatron_hammer.checkpoint.write import DTYPES, Piece, chunks_of, write_first_checkpoint
from megatron_hammer.config import DataConfig, ModelConfig, RopeScaling
from megatron_hammer.model.parameters import EMBEDDING, HEAD, logical_shapes
from megatron_hammer.tokenizer.load import Tokenizer, load_tokenizer

CERTIFICATE, CONFIG, GENERATION_CONFIG = "certificate.json", "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DEFAULT_SHARD_BYTES = 5 * 10**9  # transformers' own long-time default
MAX_JSON_BYTES = 32 * 2**20  # far above any config or index

Prove = Callable[[Path, Path, str], None]
T = TypeVar("T")

# ---------------------------------------------------------------------------------------------------------------------
# The config, both ways
# ---------------------------------------------------------------------------------------------------------------------

_SIZES = {
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
}
_OPTIONAL_SIZES = {  # with the value that transformers assumes where the key is absent
    "num_key_value_heads": ("num_query_groups", None),
    "head_dim": ("head_dim", None),
    "max_position_embeddings": ("max_position_embeddings", 2048),
}
_NUMBERS = {"rms_norm_eps": ("norm_eps", 1e-6), "initializer_range": ("init_std", 0.02)}
_ROPE_KEYS = {"rope_theta", "rope_scaling", "rope_parameters"}
_ONLY = {  # features that change the function, and the values at which they do not
    "model_type": ("llama",),
    "architectures": (["LlamaForCausalLM"],),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0,),
    "pretraining_tp": (1,),
    "partial_rotary_factor": (1,),
}
# Say nothing about the function that the weights compute.
_NEUTRAL = {
    "torch_dtype",
    "dtype",
    "transformers_version",
    "_name_or_path",
    "use_cache",
    "tie_word_embeddings",
    "return_dict",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "unk_token_id",
    "sep_token_id",
    "id2label",
    "label2id",
    "task_specific_params",
    "problem_type",
    "finetuning_task",
    "use_return_dict",
    "output_attentions",
    "output_hidden_states",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "tokenizer_class",
    "prefix",
    "is_decoder",
    "chunk_size_feed_forward",
    "max_length",
    "min_length",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "num_beams",
    "num_beam_groups",
    "num_return_sequences",
    "repetition_penalty",
    "length_penalty",
    "diversity_penalty",
}


def hf_config_from_model(model: ModelConfig, token_ids: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """``config.json`` of a model, in words that transformers 4 and 5 understand the same way.

    Args:
        token_ids: ``bos_token_id``, ``eos_token_id``, ``pad_token_id``; absent ones become null.
        dtype: of the weights in the folder.
    """
    assert model.max_position_embeddings is not None, "the longest context must be resolved"
    scaling = None if model.rope_scaling is None else {"rope_type": "llama3", **asdict(model.rope_scaling)}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: getattr(model, ours) for theirs, ours in _SIZES.items()},
        "num_key_value_heads": model.query_groups,
        "head_dim": model.head_size,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.norm_eps,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_word_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "pretraining_tp": 1,
        # transformers 4 reads the first two and passes over the third, 5 the other way round.
        "rope_theta": model.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {**(scaling or {"rope_type": "default"}), "rope_theta": model.rope_theta},
        **{name: token_ids.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "use_cache": True,
        "torch_dtype": dtype,
    }


def model_config_from_hf(tree: Mapping[str, Any], where: str = CONFIG) -> ModelConfig:
    """Our config of an HF Llama.

    Raises:
        CheckpointError: a feature that our model does not have, a missing or impossible value; ``where`` is named.
    """
    for name, allowed in _ONLY.items():
        value = tree.get(name)
        if value is not None and value not in allowed:
            raise _no_feature(where, name, value, f"only {' or '.join(map(json.dumps, allowed))} can be converted")
    if "model_type" not in tree and "architectures" not in tree:
        raise CheckpointError(22, f"{where}: model_type", "is missing", "name the folder of a Hugging Face Llama")
    kinds = tree.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise _no_feature(where, "layer_types", kinds, "only full_attention can be converted")
    known = {*_SIZES, *_OPTIONAL_SIZES, *_NUMBERS, *_ROPE_KEYS, *_ONLY, *_NEUTRAL, "layer_types"}
    for name, value in tree.items():
        if name not in known and value:  # off, zero and empty ask for nothing
            raise _no_feature(where, name, value, "it is not known to this program")
    values: dict[str, Any] = {ours: _count(tree, theirs, where) for theirs, ours in _SIZES.items()}
    for theirs, (ours, default) in _OPTIONAL_SIZES.items():
        values[ours] = default if tree.get(theirs) is None else _count(tree, theirs, where)
    for theirs, (ours, usual) in _NUMBERS.items():
        values[ours] = usual if tree.get(theirs) is None else _number(tree, theirs, where)
    tied = tree.get("tie_word_embeddings") or False
    if not isinstance(tied, bool):
        raise _bad_value(where, "tie_word_embeddings", tied, "must be true or false")
    theta, scaling = _rope_from_hf(tree, values["max_position_embeddings"], where)
    model = ModelConfig(**values, rope_theta=theta, rope_scaling=scaling, tie_word_embeddings=tied)
    try:
        model.check()
    except ConfigError as error:
        raise CheckpointError(22, f"{where} ({error.what})", error.rule, "name the folder of a working model") from None
    return model


def _rope_from_hf(tree: Mapping[str, Any], longest: int, where: str) -> tuple[float, RopeScaling | None]:
    """Theta and scaling from transformers 4's form, 5's, or both, which must then agree."""
    theta = None if tree.get("rope_theta") is None else _number(tree, "rope_theta", where)
    forms = [
        _rope_form(name, tree[name], longest, where) for name in ("rope_scaling", "rope_parameters") if tree.get(name)
    ]
    thetas = {t for t in (theta, *(t for t, _ in forms)) if t is not None} or {10000.0}
    scalings = {scaling for _, scaling in forms} or {None}
    if len(thetas) > 1 or len(scalings) > 1:
        raise _bad_value(
            where, "rope_parameters", tree.get("rope_parameters"), "disagrees with rope_theta or rope_scaling"
        )
    return thetas.pop(), scalings.pop()


def _rope_form(name: str, fields: Any, longest: int, where: str) -> tuple[float | None, RopeScaling | None]:
    if not isinstance(fields, dict):
        raise _bad_value(where, name, fields, "must be a mapping")
    kind = fields.get("rope_type", fields.get("type", "default"))
    theta = None if fields.get("rope_theta") is None else _number(fields, "rope_theta", where)
    numbers = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if kind not in ("default", "llama3"):
        raise _no_feature(where, f"{name}.rope_type", kind, "only default and llama3 can be converted")
    for key, value in fields.items():
        if key not in {"rope_theta", "rope_type", "type", "partial_rotary_factor", *numbers} or (
            key == "partial_rotary_factor" and value not in (None, 1)
        ):
            raise _no_feature(where, f"{name}.{key}", value, "it is not known to this program")
    if kind == "default":
        return theta, None
    fields = {"original_max_position_embeddings": longest, **fields}  # as transformers fills it in
    factor, low, high = (_number(fields, key, where) for key in numbers[:3])
    return theta, RopeScaling(factor, low, high, _count(fields, numbers[3], where))


def _no_feature(where: str, name: str, value: Any, rule: str) -> CheckpointError:
    return CheckpointError(
        21,
        f"{where}: {name}={json.dumps(value)[:80]}",
        f"is a feature our Llama lacks: {rule}",
        "convert a plain Llama",
    )


def _bad_value(where: str, name: str, value: Any, rule: str) -> CheckpointError:
    return CheckpointError(22, f"{where}: {name}={json.dumps(value)[:80]}", rule, "name the folder of a working model")


def _count(tree: Mapping[str, Any], name: str, where: str) -> int:
    value = tree.get(name)
    if type(value) is not int or not 0 < value < 2**31:
        raise _bad_value(where, name, value, "must be a positive whole number")
    return value


def _number(tree: Mapping[str, Any], name: str, where: str) -> float:
    value = tree.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e30:
        raise _bad_value(where, name, value, "must be a number of zero or more")
    return float(value)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON mapping from a folder that we did not write.

    Raises:
        CheckpointError: missing, or not such a file.
    """
    with open_regular(path) as file:
        text = file.read(MAX_JSON_BYTES + 1)
    try:
        tree = json.loads(text) if len(text) <= MAX_JSON_BYTES else None
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        raise CheckpointError(20, str(path), "is not a JSON mapping", "name the folder of a Hugging Face model")
    return tree


# ---------------------------------------------------------------------------------------------------------------------
# Export
# ---------------------------------------------------------------------------------------------------------------------


def parse_size(text: str) -> int:
    """``5GB`` (decimal, as in transformers), ``512MiB`` or plain bytes, as a number of bytes.

    Raises:
        ConfigError: not a size.
    """
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B)?", text.strip().upper())
    size = int(float(match[1]) * units.get(match[2] or "", 0)) if match else 0
    if size < 1:
        raise ConfigError(80, f"--max-shard-size={text}", "is not a size", "write it like 5GB, 512MiB or 1000000")
    return size


def export_hf(
    checkpoint: str | Path,
    output: str | Path,
    dtype: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    *,
    prove: Prove | None = None,
    note: Note = print_note,
) -> dict[str, Any]:
    """Write a checkpoint as a Hugging Face folder, prove it, and only then give it its name.

    Args:
        checkpoint: a checkpoint folder or a run.
        output: a folder that does not exist, is empty, or is an earlier export, which is then replaced.
        dtype: of the written weights; None: that in which the model was trained.
        prove: writes ``certificate.json`` into the folder or raises; None: ``prove_in_child_process``.

    Returns:
        the certificate.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        RefusedError: the output belongs to somebody else, or the written folder is not the checkpoint's model.
            Nothing is left at ``output``, or what was there before.
    """
    from megatron_hammer.huggingface.certificate import prove_in_child_process

    manifest = read_manifest(resolve_checkpoint(checkpoint))
    dtype = dtype or manifest.weights_dtype
    output = Path(output).resolve()  # a link to a folder stays a link
    check_output(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(output.parent, re.compile(f"({re.escape(output.name)})" + r"\.(tmp|old)-[0-9a-f]{16}"))
    staging = staging_folder(output, new_id())
    staging.mkdir()
    try:
        write_hf(manifest, staging, dtype, max_shard_bytes, note)
        (prove or prove_in_child_process)(manifest.folder, staging, dtype)
        certificate = read_json(staging / CERTIFICATE)
        publish(staging, output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return certificate


def check_output(output: Path) -> None:
    """Raise ``RefusedError`` unless ``output`` may be replaced: absent, empty, or all an export of ours."""
    if not output.exists():
        return
    if not output.is_dir():
        raise RefusedError(25, f"--output {output}", "is a file", "name a folder")
    found = {str(p.relative_to(output)) for p in output.rglob("*") if p.is_symlink() or not p.is_dir()}
    ours: set[str] = set()
    if CERTIFICATE in found:
        ours = {CERTIFICATE, *read_json(output / CERTIFICATE).get("files", {})}
    if found - ours:
        raise RefusedError(
            25,
            f"--output {output}",
            f"holds {min(found - ours)}, which no earlier export wrote",
            "name another folder or move that away",
        )


def write_hf(manifest: Manifest, folder: Path, dtype: str, max_shard_bytes: int, note: Note = print_note) -> None:
    """Write weights, configs and tokenizer into an empty folder, without any proof."""
    model = saved_model(manifest)
    tokenizer_folder = checked_tokenizer_folder(manifest)
    token_ids = dict(manifest.state.get("token_ids") or {})  # of an imported model
    if tokenizer_folder is None:
        note("the checkpoint has no tokenizer: the model is exported without one")
    else:
        from megatron_hammer.tokenizer.convert import convert_tokenizer

        tokenizer = load_tokenizer(tokenizer_folder)
        check_vocabulary(tokenizer, model)
        convert_tokenizer(tokenizer, folder)
        token_ids = {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
            "pad_token_id": tokenizer.pad_id,
        }
    for path in folder.iterdir():
        sync_file(path)
    write_json(folder / CONFIG, hf_config_from_model(model, token_ids, dtype))
    write_json(folder / GENERATION_CONFIG, {name: value for name, value in token_ids.items() if value is not None})
    write_weights(manifest, model, folder, dtype, max_shard_bytes)


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """Write readable JSON durably."""
    write_durably(path, (json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode())


def check_vocabulary(tokenizer: Tokenizer, model: ModelConfig) -> None:
    """Raise ``RefusedError`` if the tokenizer has ids for which the model has no row."""
    assert model.vocab_size is not None
    if tokenizer.vocab_size > model.vocab_size:
        raise RefusedError(
            28,
            f"tokenizer of {tokenizer.vocab_size} ids",
            f"does not fit model.vocab_size={model.vocab_size}",
            "use the tokenizer that the model was trained with",
        )


def write_weights(manifest: Manifest, model: ModelConfig, folder: Path, dtype: str, max_shard_bytes: int) -> None:
    """Stream the logical weights, in one type, into one file, or into shards with an index."""
    tensors = {name: (dtype, shape) for name, shape in logical_shapes(model).items()}
    with LogicalReader(manifest) as reader, one_thread():

        def chunks(name: str) -> Iterator[Any]:
            for band in reader.bands(name):
                yield from chunks_of(band, DTYPES[dtype])

        write_weight_files(folder, tensors, chunks, max_shard_bytes)


def write_weight_files(
    folder: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    chunks: Callable[[str], Iterable[Any]],
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> dict[str, str]:
    """Stream tensors into one file, or into shards with an index, as transformers reads them.

    Args:
        tensors: name -> (dtype, shape), in the order of the files.
        chunks: gives the bytes of a tensor by its name; called once for each, in order.

    Returns:
        name -> XXH3-128 of its bytes, taken before they were written.
    """
    sizes = {name: count(shape) * ITEM_BYTES[dtype] for name, (dtype, shape) in tensors.items()}
    plan = plan_shards(sizes, max_shard_bytes)
    names = (
        [WEIGHTS] if len(plan) == 1 else [f"model-{i + 1:05d}-of-{len(plan):05d}.safetensors" for i in range(len(plan))]
    )
    hashes = {}
    order = progress(list(sizes), "writing weights")
    for file_name, content in zip(names, plan):
        entries = [(name, *tensors[name]) for name in content]
        with TensorFileWriter(folder / file_name, entries, {"format": "pt"}) as writer:
            for name in islice(order, len(content)):
                hashes[name] = writer.write(name, chunks(name))
    if len(plan) > 1:
        weight_map = {name: file_name for file_name, content in zip(names, plan) for name in content}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
    return hashes


def plan_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
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


# ---------------------------------------------------------------------------------------------------------------------
# Import
# ---------------------------------------------------------------------------------------------------------------------


class HfWeights:
    """The safetensors files of a Hugging Face folder, single or sharded; a context manager.

    Raises:
        CheckpointError: none, only pickled ones, or files that do not hold what the index says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._stack = folder, ExitStack()
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
            self._stack = stack.pop_all()

    def _open(self, stack: ExitStack, name: str) -> TensorFileReader:
        self._readers[name] = stack.enter_context(TensorFileReader(self.folder / name))
        return self._readers[name]

    def _read_index(self, stack: ExitStack) -> dict[str, str]:
        weight_map = read_json(self.folder / INDEX).get("weight_map")
        where = f"{self.folder / INDEX}: weight_map"
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(28, where, "is not a mapping of tensors to files", "fetch the model again")
        for name in sorted(set(weight_map.values())):
            if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors", name):
                raise CheckpointError(
                    28, f"{where}: {name!r}", "is not the plain name of a safetensors file", "fetch the model again"
                )
            for tensor in self._open(stack, name).tensors:
                if weight_map.get(tensor) != name:
                    raise CheckpointError(
                        28, f"{self.folder / name}: {tensor}", "is not where the index says", "fetch the model again"
                    )
        for tensor, name in weight_map.items():
            if tensor not in self._readers[name].tensors:
                raise CheckpointError(24, f"{self.folder / name}: {tensor}", "is missing", "fetch the model again")
        return weight_map

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
        return self._readers[self.where[name]].tensors[name]

    def hash_of(self, name: str) -> str:
        """Hash of a tensor's bytes."""
        return self._readers[self.where[name]].hash_of(name)

    def read(self, name: str) -> Tensor:
        """One whole tensor."""
        entry = self.entry(name)
        data = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        self._readers[self.where[name]].read_into(name, data.view(-1).view(torch.uint8).numpy())
        return data

    def parts(self, name: str) -> Iterator[Tensor]:
        """A tensor's elements in order, 4 MiB at a time in flat tensors; each is gone when the next is asked for."""
        dtype = DTYPES[self.entry(name).dtype]
        for chunk in self._readers[self.where[name]].chunks(name):
            yield torch.frombuffer(chunk, dtype=dtype)

    def read_part(self, name: str, start: int, buffer: Any) -> None:
        """Fill ``buffer`` (flat bytes) with a tensor's bytes from its byte ``start`` on."""
        self._readers[self.where[name]].read_part(name, start, buffer)

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
        if name not in shapes and not name.endswith(
            "rotary_emb.inv_freq"
        ):  # old Llamas stored these; they are computed
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


def import_hf(hf_dir: str | Path, save_dir: str | Path, note: Note = print_note) -> Path:
    """Write a Hugging Face Llama as ``save_dir/checkpoints/step-00000000``: weights only, in their own types.

    ``save_dir`` can then be named wherever a checkpoint or run can: ``--load`` and ``checkpoint.init_from``. Its
    ``model.yaml`` is a preset with the model's settings, for the run that continues.

    Raises:
        CheckpointError: a feature, tensor or type that cannot be converted, by name.
        RefusedError: ``save_dir`` holds checkpoints of a training run.
    """
    source, folder = Path(hf_dir), Path(save_dir) / "checkpoints"
    target = folder / step_name(0)
    if not source.is_dir():
        raise CheckpointError(20, str(source), "is not a folder", "name the folder of a Hugging Face model")
    tree = read_json(source / CONFIG)
    model = model_config_from_hf(tree, str(source / CONFIG))
    if trained := [p for p in find_checkpoints(folder) if p.name != target.name]:
        raise RefusedError(
            27, f"--save {save_dir}", f"already holds {trained[-1].name} of a run", "name another folder"
        )
    tokenizer = None
    if any((source / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        tokenizer = load_tokenizer(source)
        check_vocabulary(tokenizer, model)
    else:
        note(f"{source} has no tokenizer: only the weights are converted")
    with HfWeights(source) as weights:
        check_tensors(weights, model)
        shapes = logical_shapes(model)
        pieces = [_whole(weights, name, shapes[name]) for name in sorted(shapes, key=weights.place)]
        dtypes = {p.dtype for p in pieces}
        write_first_checkpoint(
            folder,
            pieces,
            model=model,
            state={"token_ids": {k: tree.get(k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}},
            weights_dtype=dtypes.pop() if len(dtypes) == 1 else "float32",  # fp32 holds any mixture exactly
            tokenizer=tokenizer,
            watch=lambda items: progress(items, "reading weights"),
        )
    write_preset(Path(save_dir) / "model.yaml", model, target / TOKENIZER if tokenizer else None)
    return target


def write_preset(path: Path, model: ModelConfig, tokenizer: Path | None) -> None:
    """A preset with the model's settings, for the run that continues from these weights."""
    assert model.max_position_embeddings is not None
    preset: dict[str, Any] = {"model": asdict(model)}
    preset["data"] = {"seq_length": min(DataConfig.seq_length, model.max_position_embeddings)}
    if tokenizer is not None:
        preset["tokenizer"] = {"path": str(tokenizer)}
    staged = path.with_name(f"{path.name}.tmp-{new_id()}")
    write_durably(staged, yaml.safe_dump(preset, sort_keys=False).encode())
    staged.replace(path)


def _whole(weights: HfWeights, name: str, shape: tuple[int, ...]) -> Piece:
    cols = (0, shape[1]) if len(shape) == 2 else None
    return Piece(name, "weight", (0, shape[0]), cols, shape, weights.entry(name).dtype, lambda: weights.parts(name))


# ---------------------------------------------------------------------------------------------------------------------


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


def progress(items: Sequence[T], what: str) -> Iterator[T]:
    """Go through ``items`` with a bar on stderr in a terminal, else with a line every 10 seconds."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, desc=what, unit="tensor", dynamic_ncols=True)
        return
    told = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - told > 10:
            told = time.monotonic()
            print_note(f"{what}: {done} of {len(items)} tensors")
        yield item
