"""A model that continues texts: transformers' own class and generation, with weights of a folder or of a checkpoint.

::

    Hugging Face folder --load_causal, AutoTokenizer-------------------------------+
                                                                                   |--> TextModel
    checkpoint, run, ---the export's config and rounded weights, in memory,--------+
    live model          its own tokenizer

A checkpoint is not written anywhere for this: the class of transformers gets the config that the export would write
and the logical tensors rounded as the export rounds them, so both ways give the same tokens
(``tests/huggingface/test_generate.py``). What generates is ``transformers``, with its cache of keys and values.

A prompt begins as documents began in training (``TextModel.start``): with bos where they did; else with the eos that
ended the document before, where documents ended with one; else with nothing. Needs no torch until it is called.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_hammer.base.errors import CheckpointError, ConfigError
from megatron_hammer.base.paths import missing_remedy
from megatron_hammer.tokenizer.interface import refuse_surrogates
from megatron_hammer.tokenizer.model_folder import text_of

if TYPE_CHECKING:
    from megatron_hammer.checkpoint.manifest import Manifest
    from megatron_hammer.config import ModelConfig
    from megatron_hammer.tokenizer.interface import Tokenizer

Begin = Literal["auto", "bos", "eos", "none"]
Message = dict[str, str]
"""``{"role": "user", "content": TEXT}``, as chat templates take them."""


@dataclass(frozen=True)
class TextModel:
    """A model of transformers with a tokenizer."""

    model: Any
    """A ``PreTrainedModel`` in evaluation mode, on its device."""
    encode: Callable[[str], list[int]]
    """The ids of a text, without special ones."""
    decode: Callable[[Sequence[int]], str]
    """The text of ids; special ones stand for nothing."""
    start: tuple[int, ...]
    """Ids that come before every prompt."""
    start_words: str
    """For people: what these are, and why."""
    boundary: tuple[int, ...]
    """What an empty prompt begins with where ``start`` is empty: bos, else eos; nothing where there is neither."""
    template: Callable[[list[Message]], list[int]] | None
    """The ids of a conversation by the tokenizer's chat template, up to where the answer begins; None without one."""

    @property
    def context(self) -> int | None:
        """Tokens of the longest text that the model was made for; None where its config does not say."""
        length = getattr(self.model.config, "max_position_embeddings", None)
        return length if isinstance(length, int) else None

    @property
    def end_ids(self) -> list[int]:
        """The ids that end a text."""
        found = self.model.generation_config.eos_token_id
        return [] if found is None else [found] if isinstance(found, int) else list(found)

    @property
    def pad_id(self) -> int:
        """What stands where a row of a batch has nothing; no row attends to it."""
        found = self.model.generation_config.pad_token_id
        return found if isinstance(found, int) else next(iter(self.end_ids), 0)


def open_text_model(
    path: str | Path, step: int | None = None, begin: Begin = "auto", dtype: str | None = None, device: str = "auto"
) -> TextModel:
    """Load what a path names: a Hugging Face folder, a checkpoint, or a run for its newest checkpoint.

    Args:
        step: of a run, the checkpoint of this step.
        begin: what prompts begin with; "auto": as documents did in training.
        dtype: of the weights in memory; None: as a folder has them, and as an export of a checkpoint would.
        device: "cpu", "cuda", "cuda:N"; "auto": a GPU where there is one.

    Raises:
        CheckpointError: nothing that can be loaded is there.
        ConfigError: E245 no such device or special id.
    """
    folder = Path(path)
    if (folder / "config.json").is_file() and step is None:
        return open_folder(folder, begin, dtype, device)
    from megatron_hammer.checkpoint.folder import open_checkpoint

    return open_saved(open_checkpoint(folder, step), begin, dtype, device)


def open_folder(folder: Path, begin: Begin = "auto", dtype: str | None = None, device: str = "auto") -> TextModel:
    """A Hugging Face folder, by transformers alone: nothing of our model code takes part.

    Raises:
        CheckpointError: E490 it is none, E491 it cannot be loaded.
    """
    if not (folder / "config.json").is_file():
        rule = "is no Hugging Face folder (it has no config.json)" if folder.exists() else "does not exist"
        raise CheckpointError(90, str(folder), rule, _folder_remedy(folder))
    place = choose_place(device)
    from transformers import AutoTokenizer

    from megatron_hammer.checkpoint.dtypes import DTYPES
    from megatron_hammer.huggingface.transformers_model import load_causal

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except Exception as error:  # the Rust library raises bare Exception
        remedy = "export it again with tools/checkpoint_to_hf.py"
        raise CheckpointError(91, str(folder), f"could not be loaded by transformers ({error})", remedy) from None

    def encode(text: str) -> list[int]:
        try:
            return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        except (TypeError, UnicodeError) as error:
            raise refuse_surrogates([text], error) from None

    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    used, why = _began_in_folder(folder, tokenizer)
    start, words = start_of(begin, used, why, ids)
    return TextModel(
        model=load_causal(folder, "auto" if dtype is None else DTYPES[dtype]).to(place),
        encode=encode,
        decode=lambda tokens: text_of(tokenizer, list(tokens)),
        start=start,
        start_words=words,
        boundary=_boundary(ids),
        template=_template_of(tokenizer),
    )


def open_saved(manifest: Manifest, begin: Begin = "auto", dtype: str | None = None, device: str = "auto") -> TextModel:
    """A checkpoint of ours, with the weights as an export in this type would have them.

    Memory: the model in this type, and a few MiB of a tensor as it is stored.

    Raises:
        CheckpointError: E492 it has no tokenizer; it is damaged.
    """
    from megatron_hammer.checkpoint.dtypes import DTYPES
    from megatron_hammer.checkpoint.manifest import checked_tokenizer_folder, saved_model
    from megatron_hammer.tokenizer.load import load_tokenizer

    place, name = choose_place(device), dtype or manifest.weights_dtype
    folder = checked_tokenizer_folder(manifest)
    if folder is None:
        remedy = "name a checkpoint of a run with tokenizer.path, or an export that has a tokenizer"
        raise CheckpointError(92, str(manifest.folder), "has no tokenizer, so no text can be continued", remedy)
    return text_model_of(
        saved_model(manifest),
        load_tokenizer(folder),
        manifest.config,
        lambda: _saved_weights(manifest, DTYPES[name]),
        name,
        str(manifest.folder),
        begin,
        place,
    )


def text_model_of(
    model: ModelConfig,
    tokenizer: Tokenizer,
    config: Mapping[str, Any],
    weights: Callable[[], dict[str, Any]],
    dtype: str,
    where: str,
    begin: Begin = "auto",
    place: str = "cpu",
) -> TextModel:
    """A model of ours in the class of transformers that its export names.

    Args:
        config: of its run, as checkpoints have it: its datasets say how documents began.
        weights: gives the logical tensors in ``dtype``; called once.
        where: the model, for messages.
        place: the device, as torch names it.

    Raises:
        RefusedError: E528 the tokenizer has ids for which the model has no row.
        ConfigError: E245 the tokenizer has no such special id.
    """
    from megatron_hammer.dataset.look.document_marks import documents_begin_with, documents_end_with
    from megatron_hammer.huggingface.config import check_vocabulary

    check_vocabulary(tokenizer, model)
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    used, why = _began_in_training(
        documents_begin_with(config, tokenizer.bos_id), documents_end_with(config, tokenizer.eos_id)
    )
    if not used:
        used = "bos" if tokenizer.begins_with_bos else "none"
        why = "as an export's tokenizer begins a text (no dataset of the run is here)"  # ``convert_tokenizer``
    start, words = start_of(begin, used, why, ids)
    return TextModel(
        model=_causal_in_memory(model, tokenizer, weights(), dtype, where).to(place),
        encode=tokenizer.encode,
        decode=tokenizer.decode,
        start=start,
        start_words=words,
        boundary=_boundary(ids),
        template=None,
    )


def _causal_in_memory(model: ModelConfig, tokenizer: Tokenizer, weights: dict[str, Any], dtype: str, where: str) -> Any:
    """The class of transformers that the export's config.json names, with these weights."""
    import transformers

    from megatron_hammer.checkpoint.dtypes import DTYPES
    from megatron_hammer.huggingface.config import hf_config_from_model, token_ids_of
    from megatron_hammer.huggingface.transformers_model import causal_with_weights

    tree = hf_config_from_model(model, token_ids_of(tokenizer), dtype)
    return causal_with_weights(transformers.AutoConfig.for_model(**tree), weights, DTYPES[dtype], where)


def _saved_weights(manifest: Manifest, dtype: Any) -> dict[str, Any]:
    """The logical weights of a checkpoint, by name, in a type."""
    import torch

    from megatron_hammer.checkpoint.read import LogicalReader

    weights = {}
    with LogicalReader(manifest) as reader:
        for tensor in (tensor for tensor in manifest.tensors if tensor.kind == "weight"):
            weights[tensor.name] = weight = torch.empty(tensor.shape, dtype=dtype)
            row = 0
            for band in reader.bands(tensor.name):
                weight[row : row + len(band)] = band
                row += len(band)
    return weights


def choose_place(wanted: str, unknown: int = 45, absent: int = 45) -> str:
    """``--device`` as torch names it.

    Args:
        unknown: number of the error for what is no device.
        absent: and for a device that is not here.

    Raises:
        ConfigError: with these numbers.
    """
    import torch

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ConfigError(unknown, f"--device {wanted}", "is no device", "use cpu, cuda or cuda:N") from None
    there = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.type not in ("cpu", "cuda") or (device.index or 0) >= there:
        rule = f"is not here: torch sees {torch.cuda.device_count()} GPUs"
        raise ConfigError(absent, f"--device {wanted}", rule, "use cpu")
    return wanted


def start_of(begin: Begin, used: str, why: str, ids: dict[str, int | None]) -> tuple[tuple[int, ...], str]:
    """The ids before each prompt, and in words what they are.

    Args:
        used: "bos", "eos" or "none": what documents began with.
        ids: of bos and eos, as far as the tokenizer has them.

    Raises:
        ConfigError: E245 one is asked for by name that the tokenizer lacks.
    """
    chosen, reason = (used, why) if begin == "auto" else (begin, "as --begin says")
    if chosen == "none":
        return (), f"prompts begin with no special token, {reason}"
    token = ids[chosen]
    if token is None:
        if begin == "auto":
            return (), f"prompts begin with no special token: the tokenizer has no {chosen}"
        rule = "names a token that the tokenizer does not have"
        raise ConfigError(45, f"--begin {begin}", rule, "use --begin none, or leave it out")
    return (token,), f"prompts begin with {chosen} (id {token}), {reason}"


def _boundary(ids: dict[str, int | None]) -> tuple[int, ...]:
    """What stands between two documents, as far as the tokenizer has it."""
    return tuple(token for token in (ids["bos"], ids["eos"]) if token is not None)[:1]


def _began_in_training(begins: bool | None, ends: bool | None) -> tuple[str, str]:
    """What documents began with by the run's datasets, and why; ("", "") where none of them can be read now."""
    if begins:
        return "bos", "as the documents of the run's data do"
    if ends:
        return "eos", "the end of the document before, as the run's data has it"
    return ("", "") if begins is None else ("none", "as the documents of the run's data")


def _began_in_folder(folder: Path, tokenizer: Any) -> tuple[str, str]:
    """As the export recorded of the run's data; else as transformers' tokenizer begins a text of itself."""
    from megatron_hammer.huggingface.certified import recorded_documents

    used, why = _began_in_training(*recorded_documents(folder))
    if used:
        return used, why
    bos = tokenizer.bos_token_id
    begins = bos is not None and list(tokenizer("", verbose=False)["input_ids"])[:1] == [bos]
    return "bos" if begins else "none", "as the folder's tokenizer begins a text"


def _template_of(tokenizer: Any) -> Callable[[list[Message]], list[int]] | None:
    """The tokenizer's chat template, where it has one."""
    if not getattr(tokenizer, "chat_template", None):
        return None

    def ids_of(messages: list[Message]) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    return ids_of


def _folder_remedy(folder: Path) -> str:
    """How to get at the Hugging Face folder that a run, or a part of one, means."""
    runs = [folder, *folder.parents[:2]]  # a checkpoint's folder is two below its run
    of = [run for run in runs if (run / "checkpoints").is_dir()]
    if made := [run / "hf" for run in of[:1] or runs if (run / "hf" / "config.json").is_file()]:
        return f"did you mean {made[0]}?"
    if of:
        load, output = shlex.quote(str(of[0])), shlex.quote(str(of[0] / "hf"))
        return (
            f"read the checkpoint itself: --load {shlex.quote(str(folder))}; or make one: "
            f"python tools/checkpoint_to_hf.py --load {load} --output {output}"
        )
    return missing_remedy(folder, "make one with tools/checkpoint_to_hf.py")
