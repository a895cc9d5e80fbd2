"""Give a model another vocabulary: embedding and head get the rows of a new tokenizer, all else stays bit for bit.

::

    old tokenizer, new tokenizer --plan_extension--> for each new id: the old ids whose mean its row is
    old matrix [v, h] --grown_rows, block by block--> new matrix [v', h]      (embedding; head, unless tied)
    every other tensor --------------------------> the same bytes

Ids are matched by what they stand for, never by number, so a reordered or partly dropped vocabulary works. The rule
for a new id, first that applies:

copied   the old tokenizer has the same token: the same text, the same fallback byte, the same control name (of several
         that stand for one text, that of the same spelling, else the lowest id). One that is a control token on one
         side and an added or user-defined symbol on the other is the same token. The row keeps its bits.
role     a control token without namesake that is bos, eos, unk or pad: copied from the old token of that role.
pieces   text: the mean of the rows of the ids that the old tokenizer gives for it in the middle of a text (no dummy
         prefix, spaces kept, its normalisation applied). Summed in fp32 in the order of the ids, divided, rounded once.
bytes    the same mean, where an old piece among them is a part of a character (a fallback byte, or a byte-level token
         that is no whole text). What is no text itself (a part of a character) is put together from single bytes.
mean     what has no text in the old tokenizer: other control tokens (their name is not text), numbers without a token,
         text that the old tokenizer drops or knows as unk only. The mean of the rows of all old ids.

Rows of the model beyond the old tokenizer (padding, as many models on the Hub have) belong to no token and are dropped,
and the new model has exactly the new tokenizer's ids: layers pad by themselves for tensor parallelism.

The result is of the kind that was given, a Hugging Face folder or a folder with a weights-only checkpoint of step 0
(``checkpoint.init_from`` of a new run). Optimizer moments and the count of consumed samples are not kept: both belong
to the old vocabulary's data. ``extension.json`` beside the weights says where each row that was not copied came from.

Memory: the old embedding or head, 50 MB for parts and blocks of new rows, and what two tokenizers and their conversion
take (0.25 GB for 105,789 ids, torch and transformers themselves not counted).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_hammer.base.errors import CheckpointError, ConfigError, RefusedError
from megatron_hammer.base.files import sync_file, sync_folder
from megatron_hammer.checkpoint.fit import saved_model
from megatron_hammer.checkpoint.manifest import (
    TOKENIZER,
    Note,
    checked_tokenizer_folder,
    new_id,
    print_note,
    read_manifest,
    remove_leftovers,
    resolve_checkpoint,
    staging_folder,
    step_name,
)
from megatron_hammer.checkpoint.read import LogicalReader, read_logical
from megatron_hammer.checkpoint.write import Piece, write_first_checkpoint
from megatron_hammer.config import ModelConfig
from megatron_hammer.huggingface.convert import (
    CONFIG,
    GENERATION_CONFIG,
    HfWeights,
    check_tensors,
    model_config_from_hf,
    progress,
    read_json,
    write_json,
    write_preset,
    write_weight_files,
)
from megatron_hammer.model.parameters import EMBEDDING, HEAD, logical_shapes
from megatron_hammer.tokenizer.load import (
    SPACE,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    decode_token,
    flatten_decoders,
    is_fallback_byte,
    load_processor,
    load_tokenizer,
    parse_model,
)

REPORT = "extension.json"
BLOCK_BYTES = 4 * 2**20  # of new rows in fp32 made at a time: three or four such blocks are alive at once
ORIGINS = ("copied", "role", "pieces", "bytes", "mean")
TOKEN_IDS = {"bos_token_id": "bos_id", "eos_token_id": "eos_id", "pad_token_id": "pad_id"}
_ROLES = ("bos_id", "eos_id", "unk_id", "pad_id")

# ---------------------------------------------------------------------------------------------------------------------
# What an id stands for
# ---------------------------------------------------------------------------------------------------------------------


class Token(NamedTuple):
    """What one id stands for."""

    kind: str
    """``text``, ``byte`` (of byte fallback), ``control`` (unk included), or ``none``: no token has this number."""
    name: str
    """As the tokenizer's file spells it."""
    content: bytes
    """Bytes of text; a control token's name; of a byte-level token perhaps a part of a character."""


_NO_TOKEN = Token("none", "", b"")


def read_vocabulary(tokenizer: Tokenizer) -> list[Token]:
    """The token of each id, ``[vocab_size]``."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return [_token_of_piece(piece) for piece in parse_model(tokenizer.model_bytes, tokenizer.path).pieces]
    assert isinstance(tokenizer, HuggingFaceTokenizer), f"no vocabulary of {tokenizer!r}"
    return _tokens_of_definition(tokenizer)


def _token_of_piece(piece: Any) -> Token:
    if piece.type in (piece.CONTROL, piece.UNKNOWN):
        return Token("control", piece.piece, piece.piece.encode())
    if piece.type == piece.BYTE:
        return Token("byte", piece.piece, bytes([int(piece.piece[3:5], 16)]))
    return Token("text", piece.piece, piece.piece.replace(SPACE, " ").encode())


def _tokens_of_definition(tokenizer: HuggingFaceTokenizer) -> list[Token]:
    definition = tokenizer.definition
    decoders = flatten_decoders(definition.get("decoder"))
    falls_back = any(step.get("type") == "ByteFallback" for step in decoders)
    added = {token["content"]: token for token in definition.get("added_tokens") or []}
    unknown = definition["model"].get("unk_token")
    tokens = [_NO_TOKEN] * tokenizer.vocab_size
    for name, index in _backend(definition).get_vocab(with_added_tokens=True).items():
        if name == unknown or added.get(name, {}).get("special"):
            tokens[index] = Token("control", name, name.encode())
        elif name in added:
            tokens[index] = Token("text", name, name.encode())
        elif falls_back and is_fallback_byte(name):
            tokens[index] = Token("byte", name, decode_token(name, decoders))
        else:
            tokens[index] = Token("text", name, decode_token(name, decoders))
    return tokens


def _backend(definition: Mapping[str, Any]) -> Any:
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(json.dumps(definition))
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def inner_encoder(tokenizer: Tokenizer) -> Callable[[list[str]], list[list[int]]]:
    """Encodes texts as if each stood in the middle of a text: no dummy prefix, no spaces removed at its ends."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        proto = parse_model(tokenizer.model_bytes, tokenizer.path)
        proto.normalizer_spec.add_dummy_prefix = False
        proto.normalizer_spec.remove_extra_whitespaces = False
        processor = load_processor(proto.SerializeToString(), tokenizer.path)
        return lambda texts: processor.encode(texts)
    assert isinstance(tokenizer, HuggingFaceTokenizer), f"no encoder of {tokenizer!r}"
    definition = tokenizer.definition
    inner = {
        **definition,
        "normalizer": _without_ends(definition.get("normalizer")),
        "pre_tokenizer": _without_ends(definition.get("pre_tokenizer")),
    }
    backend = _backend(inner)
    return lambda texts: [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _without_ends(step: Any) -> Any:
    """A normalizer or pre-tokenizer without what it does at the ends of a text; None where nothing is left."""
    if not isinstance(step, dict) or step.get("type") in ("Prepend", "Strip"):
        return None
    step = dict(step)
    for parts in ("normalizers", "pretokenizers"):
        if parts in step:
            step[parts] = [kept for part in step[parts] if (kept := _without_ends(part)) is not None]
    if step.get("type") == "Metaspace":
        step.pop("add_prefix_space", None)  # an older file's word for the same
        step["prepend_scheme"] = "never"
    elif step.get("type") == "ByteLevel":
        step["add_prefix_space"] = False
    return step


# ---------------------------------------------------------------------------------------------------------------------
# Where each new row comes from
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """For each new id the old ids whose rows are averaged; none where the mean of all old rows is meant."""

    offsets: np.ndarray
    """``[v' + 1] int64``: new id i has the sources ``offsets[i] : offsets[i + 1]``."""
    sources: np.ndarray
    """``[sum] int64``: old ids."""
    origins: list[str]
    """``[v']``: which rule of the module's list applied."""
    old_ids: np.ndarray
    """``[n] int64``: the old ids that have a token: the rows of "all"."""
    tokens: list[Token]
    """``[v']``: of the new ids."""

    @property
    def size(self) -> int:
        """Number of new ids."""
        return len(self.origins)

    def sources_of(self, index: int) -> list[int]:
        """The old ids of a new one."""
        return self.sources[self.offsets[index] : self.offsets[index + 1]].tolist()


class _OldVocabulary:
    """Finds tokens of the old vocabulary by what they stand for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokens = read_vocabulary(tokenizer)
        self.unk_id = tokenizer.unk_id
        self._exact: dict[Token, int] = {}
        self._same: dict[tuple[str, bytes], int] = {}
        for index, token in enumerate(self.tokens):
            self._exact.setdefault(token, index)
            self._same.setdefault((token.kind, token.content), index)  # the lowest id
        self._bytes = [self._same.get(("byte", bytes([b])), self._same.get(("text", bytes([b])))) for b in range(256)]
        self._encode = inner_encoder(tokenizer)

    def find(self, token: Token) -> int | None:
        """The old id of the same token."""
        if token.kind == "none":
            return None
        other_kind = {"control": "text", "text": "control"}.get(token.kind, "")
        return self._exact.get(
            token, self._same.get((token.kind, token.content), self._same.get((other_kind, token.content)))
        )

    def spell(self, contents: Sequence[bytes]) -> Iterator[list[int]]:
        """The old ids that make up each content: text as the tokenizer encodes it, parts of characters as bytes."""
        split = [_split_invalid(content) for content in contents]
        encoded = iter(self._encode([part for parts in split for part in parts if isinstance(part, str)]))
        for parts in split:
            ids: list[int | None] = []
            for part in parts:
                ids += next(encoded) if isinstance(part, str) else [self._bytes[b] for b in part]
            yield [i for i in ids if i is not None and i != self.unk_id]

    def is_partial(self, index: int) -> bool:
        """Whether an old id may stand for a part of a character only."""
        token = self.tokens[index]
        return token.kind == "byte" or (token.kind == "text" and "\ufffd" in token.content.decode(errors="replace"))


def _split_invalid(content: bytes) -> list[str | bytes]:
    """Stretches of valid UTF-8 as text, the bytes between them as they are."""
    parts: list[str | bytes] = []
    for part in re.split("([\udc80-\udcff]+)", content.decode(errors="surrogateescape")):
        if part:
            stray = part[0] >= "\udc80" and part[0] <= "\udcff"
            parts.append(part.encode(errors="surrogateescape") if stray else part)
    return parts


def plan_extension(old: Tokenizer, new: Tokenizer) -> Plan:
    """Decide by the module's rules where the row of each id of ``new`` comes from."""
    vocabulary, tokens = _OldVocabulary(old), read_vocabulary(new)
    roles = {
        getattr(new, role): getattr(old, role)
        for role in _ROLES
        if getattr(new, role) is not None and getattr(old, role) is not None
    }
    sources: list[list[int]] = []
    origins: list[str] = []
    unmatched = []
    for index, token in enumerate(tokens):
        found = vocabulary.find(token)
        if found is not None:
            sources.append([found])
            origins.append("copied")
        elif token.kind == "control" and index in roles:
            sources.append([roles[index]])
            origins.append("role")
        else:
            sources.append([])
            origins.append("mean")
            if token.kind in ("text", "byte"):
                unmatched.append(index)
    for index, spelt in zip(unmatched, vocabulary.spell([tokens[i].content for i in unmatched])):
        if spelt:
            sources[index] = spelt
            origins[index] = "bytes" if any(map(vocabulary.is_partial, spelt)) else "pieces"
    offsets = np.zeros(len(tokens) + 1, np.int64)
    np.cumsum([len(ids) for ids in sources], out=offsets[1:])
    flat = np.fromiter((i for ids in sources for i in ids), np.int64, int(offsets[-1]))
    old_ids = np.array([i for i, token in enumerate(vocabulary.tokens) if token.kind != "none"], np.int64)
    return Plan(offsets, flat, origins, old_ids, tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------


def mean_row(old: Tensor, ids: np.ndarray) -> Tensor:
    """Mean of the rows ``ids`` of ``old: [v, h]``, summed in fp64 (there may be 100,000), in ``old``'s type."""
    total = torch.zeros(old.shape[1], dtype=torch.float64)
    for part in np.array_split(ids, max(1, len(ids) * old.shape[1] * 8 // BLOCK_BYTES)):
        total += old[torch.from_numpy(part)].double().sum(0)
    return (total / len(ids)).to(old.dtype)


def grown_rows(old: Tensor, plan: Plan, start: int, stop: int, mean: Tensor) -> Tensor:
    """Rows ``start : stop`` of the new matrix, ``[stop - start, h]`` in ``old``'s type.

    Args:
        old: ``[v, h]``, any of our types.
        mean: ``[h]``, for ids without sources.
    """
    offsets, counts = torch.from_numpy(plan.offsets[start:stop]), torch.from_numpy(np.diff(plan.offsets)[start:stop])
    sources = torch.from_numpy(plan.sources)
    rows = torch.empty((stop - start, old.shape[1]), dtype=old.dtype)
    rows[counts == 0] = mean
    one = counts == 1
    rows[one] = old[sources[offsets[one]]]  # not by way of fp32: every bit stays, a NaN's too
    many = torch.nonzero(counts > 1).view(-1)
    if len(many):
        total = torch.zeros((len(many), old.shape[1]), dtype=torch.float32)
        for position in range(int(counts.max())):  # in the order of the ids, so that the sum is one and the same
            having = torch.nonzero(counts[many] > position).view(-1)
            total[having] += old[sources[offsets[many[having]] + position]].float()
        rows[many] = total.div_(counts[many, None]).to(old.dtype)
    return rows


class _Grown:
    """One new matrix, made block by block in order; the old one is in memory from the first block to the last."""

    def __init__(self, read: Callable[[], Tensor], plan: Plan, hidden_size: int) -> None:
        self._read, self._plan = read, plan
        self._old: tuple[Tensor, Tensor] | None = None
        rows = max(1, BLOCK_BYTES // (4 * hidden_size))
        self.ranges = [(start, min(start + rows, plan.size)) for start in range(0, plan.size, rows)]

    def blocks(self, start: int, stop: int) -> Iterator[Tensor]:
        """Rows ``start : stop``, one of ``ranges``, in one tensor."""
        if self._old is None:
            old = self._read()
            self._old = old, mean_row(old, self._plan.old_ids)
        old, mean = self._old
        rows = grown_rows(old, self._plan, start, stop, mean)
        if stop == self._plan.size:
            self._old = None
        yield rows


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Model:
    """A model to be extended, of either kind, its tensors read when asked for."""

    kind: str
    folder: Path
    model: ModelConfig
    tokenizer: Path | None
    dtype: Callable[[str], str]
    read: Callable[[str], Tensor]
    parts: Callable[[str], Iterator[Tensor]]
    """A tensor's elements in order, a few MiB at a time; each part is gone when the next is asked for."""
    weights_dtype: str = ""
    """Of a checkpoint: that in which the model computes."""


def _open_hf(folder: Path, stack: ExitStack) -> _Model:
    model = model_config_from_hf(read_json(folder / CONFIG), str(folder / CONFIG))
    weights = stack.enter_context(HfWeights(folder))
    check_tensors(weights, model)
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))
    tokenizer = folder if has_tokenizer else None
    return _Model(
        "Hugging Face", folder, model, tokenizer, lambda name: weights.entry(name).dtype, weights.read, weights.parts
    )


def _open_checkpoint(path: Path, stack: ExitStack) -> _Model:
    manifest = read_manifest(resolve_checkpoint(path))
    reader = stack.enter_context(LogicalReader(manifest))

    def dtype(name: str) -> str:
        return manifest.tensors[manifest.index[name, "weight"]].dtype

    def read(name: str) -> Tensor:
        return read_logical(manifest, name)

    model, tokenizer = saved_model(manifest), checked_tokenizer_folder(manifest)
    return _Model("checkpoint", manifest.folder, model, tokenizer, dtype, read, reader.bands, manifest.weights_dtype)


def extend_model(
    model: str | Path,
    new_tokenizer: str | Path,
    output: str | Path,
    old_tokenizer: str | Path | None = None,
    note: Note = print_note,
) -> dict[str, Any]:
    """Write ``model`` with the vocabulary of ``new_tokenizer`` to ``output``, whole or not at all.

    Args:
        model: a Hugging Face folder, or a run, checkpoints or checkpoint folder of ours.
        output: does not exist, or is an empty folder.
        old_tokenizer: that of ``model``; None: the one in it.
        note: told what the user should know beside the report.

    Returns:
        the report, which is ``extension.json`` in ``output`` but for the list ``rows``.

    Raises:
        ConfigError: E281 there is no old tokenizer.
        RefusedError: E530 the model has fewer rows than the old tokenizer has ids, E531 the vocabularies are the same,
            E532 ``output`` is taken, E533 ``old_tokenizer`` is not the checkpoint's; E501, E502 the new tokenizer
            cannot be written as a Hugging Face folder.
        CheckpointError, DataError: something given cannot be read, or is a model that ours cannot be.
    """
    source_path, output = Path(model), Path(os.path.abspath(output))
    if os.path.lexists(output) and not (output.is_dir() and not output.is_symlink() and not any(output.iterdir())):
        raise RefusedError(32, f"--output {output}", "exists already", "name a new folder")
    with ExitStack() as stack:
        is_hf = (source_path / CONFIG).is_file()
        source = _open_hf(source_path, stack) if is_hf else _open_checkpoint(source_path, stack)
        old, new = _load_tokenizers(source, old_tokenizer, new_tokenizer)
        plan = plan_extension(old, new)
        assert source.model.vocab_size is not None
        unchanged = plan.size == old.vocab_size and set(plan.origins) == {"copied"}
        if unchanged and plan.sources.tolist() == list(range(plan.size)):
            raise _same_vocabulary(new, old)
        if padding := source.model.vocab_size - old.vocab_size:
            note(f"{padding} rows of {source.folder} belong to no id of {old.path}: they are dropped")
            if old.path.name == "tokenizer.model" and old.path.with_name("tokenizer.json").is_file():
                note(f"if {old.path.with_name('tokenizer.json')} has tokens for them, name it with --old-tokenizer")
        report = _describe(source, old, new, plan)
        output.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(output.parent, re.compile(f"({re.escape(output.name)})" + r"\.(tmp|old)-[0-9a-f]{16}"))
        staging = staging_folder(output, new_id())
        staging.mkdir()
        try:
            write_report(staging / REPORT, report, plan)
            extended = replace(source.model, vocab_size=plan.size)
            if is_hf:
                note(f"converting {new.path}, with proof: some 10 s for 100,000 ids")
                _write_hf(source, extended, new, plan, staging)
            else:
                _write_checkpoint(source, extended, new, plan, staging)
                tokenizer = output / "checkpoints" / step_name(0) / TOKENIZER  # where it will be, not where it is
                write_preset(staging / "model.yaml", extended, tokenizer)
            sync_folder(staging)
            os.rename(staging, output)  # over an empty folder, but never over one that was filled meanwhile
            sync_folder(output.parent)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    return report


def _load_tokenizers(
    source: _Model, old_tokenizer: str | Path | None, new_tokenizer: str | Path
) -> tuple[Tokenizer, Tokenizer]:
    """Old and new, checked against the model and each other."""
    if old_tokenizer is None and source.tokenizer is None:
        raise ConfigError(
            81, "--old-tokenizer", f"is not given, and {source.folder} holds no tokenizer",
            "name the tokenizer that the model was trained with",
        )  # fmt: skip
    old = load_tokenizer(old_tokenizer or source.tokenizer or "")
    if source.kind == "checkpoint" and source.tokenizer is not None and old_tokenizer is not None:
        own = load_tokenizer(source.tokenizer)
        if own.fingerprint != old.fingerprint:
            raise RefusedError(
                33, f"--old-tokenizer {old_tokenizer}", f"is not the tokenizer that {source.folder} was trained with",
                f"leave it out to use {source.tokenizer}",
            )  # fmt: skip
    assert source.model.vocab_size is not None
    if old.vocab_size > source.model.vocab_size:
        raise RefusedError(
            30, f"old tokenizer {old.path} of {old.vocab_size} ids",
            f"does not fit {source.folder}, which has {source.model.vocab_size} rows",
            "name the tokenizer that the model was trained with",
        )  # fmt: skip
    new = load_tokenizer(new_tokenizer)
    if new.fingerprint == old.fingerprint:
        raise _same_vocabulary(new, old)
    return old, new


def _same_vocabulary(new: Tokenizer, old: Tokenizer) -> RefusedError:
    return RefusedError(
        31, f"--new-tokenizer {new.path}", f"has the same tokens at the same ids as {old.path}",
        "name another tokenizer, or use the model as it is",
    )  # fmt: skip


def _pieces(source: _Model, extended: ModelConfig, plan: Plan) -> list[Piece]:
    """All tensors of the new model as what is to be written one after the other, the grown ones in blocks of rows."""
    pieces = []
    for name, shape in logical_shapes(extended).items():
        dtype = source.dtype(name)
        if name in (EMBEDDING, HEAD):
            grown = _Grown(partial(source.read, name), plan, shape[1])
            for start, stop in grown.ranges:
                box, parts = (stop - start, shape[1]), partial(grown.blocks, start, stop)
                pieces.append(Piece(name, "weight", (start, stop), (0, shape[1]), box, dtype, parts))
        else:
            cols = (0, shape[1]) if len(shape) == 2 else None
            pieces.append(Piece(name, "weight", (0, shape[0]), cols, shape, dtype, partial(source.parts, name)))
    return pieces


def _write_hf(source: _Model, extended: ModelConfig, new: Tokenizer, plan: Plan, folder: Path) -> None:
    """Config with the new sizes and ids, tokenizer, weights; each tensor is read back."""
    from megatron_hammer.tokenizer.convert import convert_tokenizer

    convert_tokenizer(new, folder)  # first: it may refuse
    for path in folder.iterdir():
        sync_file(path)
    tree = read_json(source.folder / CONFIG)
    absent = {key: getattr(new, role) for key, role in TOKEN_IDS.items() if key not in tree}
    write_json(folder / CONFIG, {**_renumbered(tree, plan, new), **absent, "vocab_size": plan.size})
    if (source.folder / GENERATION_CONFIG).is_file():
        generation = read_json(source.folder / GENERATION_CONFIG)
        write_json(folder / GENERATION_CONFIG, _renumbered(generation, plan, new))
    by_name: dict[str, list[Piece]] = {}
    for piece in _pieces(source, extended, plan):
        by_name.setdefault(piece.name, []).append(piece)
    tensors = {name: (source.dtype(name), shape) for name, shape in logical_shapes(extended).items()}
    hashes = write_weight_files(
        folder,
        tensors,
        lambda name: (chunk for piece in by_name[name] for chunk in piece.chunks()),
    )
    with HfWeights(folder) as written:
        check_tensors(written, extended)
        for name in progress(list(hashes), "reading back"):
            if written.hash_of(name) != hashes[name]:
                raise CheckpointError(
                    16, f"{folder / written.where[name]}: {name}", "reads back differently than it was written",
                    "suspect the disk or the memory of this machine",
                )  # fmt: skip


def _renumbered(tree: Mapping[str, Any], plan: Plan, new: Tokenizer) -> dict[str, Any]:
    """A config whose bos, eos and pad ids are the new ids of the same tokens; of a lost token, that of its role."""
    new_ids: dict[int, int] = {}
    for index in range(plan.size):
        if plan.origins[index] in ("copied", "role"):
            new_ids.setdefault(int(plan.sources[plan.offsets[index]]), index)
    changed = dict(tree)
    for key, role in TOKEN_IDS.items():
        value = tree.get(key)
        if isinstance(value, list):  # several ends, as Llama 3 has
            kept = [new_ids[v] for v in value if v in new_ids]
            changed[key] = kept or getattr(new, role)
        elif value is not None:
            changed[key] = new_ids.get(value, getattr(new, role))
    return changed


def _write_checkpoint(source: _Model, extended: ModelConfig, new: Tokenizer, plan: Plan, folder: Path) -> None:
    """``checkpoints/step-00000000``, as ``import_hf`` leaves it."""
    write_first_checkpoint(
        folder / "checkpoints",
        _pieces(source, extended, plan),
        model=extended,
        state={"token_ids": {key: getattr(new, role) for key, role in TOKEN_IDS.items()}},
        weights_dtype=source.weights_dtype,
        tokenizer=new,
        watch=lambda items: progress(items, "writing weights"),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------------------------------


def _describe(source: _Model, old: Tokenizer, new: Tokenizer, plan: Plan) -> dict[str, Any]:
    counts = np.diff(plan.offsets)
    averaged = np.array([origin in ("pieces", "bytes") for origin in plan.origins], bool)
    kept = {int(plan.sources[plan.offsets[i]]) for i in range(plan.size) if plan.origins[i] in ("copied", "role")}
    same = Counter(tuple(sorted(plan.sources_of(int(i)))) for i in np.nonzero(averaged & (counts > 1))[0])
    origins = Counter(plan.origins)
    return {
        "format": "megatron_hammer.extension-1",
        "model": {"kind": source.kind, "path": str(source.folder)},
        "old": {"tokenizer": str(old.path), "fingerprint": old.fingerprint, "ids": old.vocab_size,
                "rows": source.model.vocab_size},
        "new": {"tokenizer": str(new.path), "fingerprint": new.fingerprint, "ids": new.vocab_size},
        "tied": source.model.tie_word_embeddings,
        "origins": {origin: origins[origin] for origin in ORIGINS},
        "pieces_per_averaged_id": {
            str(n): k for n, k in sorted(Counter(counts[averaged].tolist()).items())
        },
        "averaged_ids_equal_to_another": sum(k for k in same.values() if k > 1),
        "old_ids_without_successor": len(plan.old_ids) - len(kept),
    }  # fmt: skip


def write_report(path: Path, report: Mapping[str, Any], plan: Plan) -> None:
    """The report and, one a line, ``rows``: [new id, token, origin, old ids] of each row that is not a copy."""
    rows = [
        [i, plan.tokens[i].content.decode(errors="backslashreplace"), origin, plan.sources_of(i)]
        for i, origin in enumerate(plan.origins)
        if origin != "copied"
    ]
    head = json.dumps(report, indent=2, ensure_ascii=False).removesuffix("\n}")
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(f'{head},\n  "rows": [\n{lines}\n  ]\n}}\n', encoding="utf-8")
    sync_file(path)


def summary(report: Mapping[str, Any]) -> str:
    """The report in a few lines for people."""
    origins, old, new = report["origins"], report["old"], report["new"]
    averaged = origins["pieces"] + origins["bytes"]
    lengths = {int(n): k for n, k in report["pieces_per_averaged_id"].items()}
    lines = [f"{old['rows']:,} rows -> {new['ids']:,}: {origins['copied']:,} copied by content"]
    if origins["role"]:
        lines.append(f"{origins['role']:,} copied from the control token of the same role")
    if averaged:
        mean = sum(n * k for n, k in lengths.items()) / averaged
        lines.append(
            f"{averaged:,} averaged over {mean:.2f} old pieces ({min(lengths)} to {max(lengths)}), "
            f"{origins['bytes']:,} of them from bytes, "
            f"{report['averaged_ids_equal_to_another']:,} of them equal to another new row"
        )
    if origins["mean"]:
        lines.append(f"{origins['mean']:,} without text in the old tokenizer: the mean of all old rows")
    if report["old_ids_without_successor"]:
        lines.append(f"{report['old_ids_without_successor']:,} of the old ids have no token in the new vocabulary")
    return "\n".join(lines)
