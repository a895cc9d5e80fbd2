"""Translates the config of a Hugging Face Llama, Qwen2, Qwen3 or Mistral into our settings, and back.

Logical tensors have Hugging Face's names and shapes already, and RoPE is half-split as there, so the config is the only
part of a model that needs a mapping. A feature of a Hugging Face config that our model does not have is refused by its
name, never dropped; keys that have no effect are passed over and named (``extra_keys.py``).

Needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_hammer.base.errors import CheckpointError, ConfigError, RefusedError
from megatron_hammer.base.reading import parse_json
from megatron_hammer.checkpoint.tensor_files import open_checkpoint_file
from megatron_hammer.config import ROPE_FIELDS, ModelConfig, RopeScaling, yarn_attention_factor
from megatron_hammer.huggingface.extra_keys import Judgement, judge_key
from megatron_hammer.tokenizer.interface import Tokenizer
from megatron_hammer.tokenizer.reader_settings import padding_id

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
MAX_JSON_BYTES = 32 * 2**20  # far above any config or index
TOKEN_IDS = {"bos_token_id": "bos_id", "eos_token_id": "eos_id", "pad_token_id": "pad_id"}
"""Key of a config -> the tokenizer's attribute."""

_SIZES = {
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
}
_OPTIONAL_SIZES = {
    "num_key_value_heads": "num_query_groups",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
}
_NUMBERS = {"rms_norm_eps": ("norm_eps", 1e-6), "initializer_range": ("init_std", 0.02)}
_ROPE_KEYS = {"rope_theta", "rope_scaling", "rope_parameters"}
_WINDOW_KEYS = {"sliding_window", "use_sliding_window", "max_window_layers"}
_ONLY = {  # features that change the function, and the values at which they do not
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0,),
    "pretraining_tp": (1,),
    "partial_rotary_factor": (1,),
    "is_causal": (True,),
}


@dataclass(frozen=True)
class Family:
    """A class of transformers whose function our model has, with the fields that it implies."""

    architectures: tuple[str, ...]
    """Names of the class; the first is written."""
    absent: Mapping[str, int]
    """Sizes that transformers assumes where the key is absent; not named: as our own default."""
    flags: Mapping[str, tuple[str, ...]]
    """Keys of the config that are true or false, absent false, and our fields that they set."""
    fields: Mapping[str, bool] = field(default_factory=dict)
    """Our fields that the class always has."""
    has_window: bool = False
    """Whether attention within a sliding window is a feature of the class, which must then be off."""


_ATTENTION_BIAS = {"attention_bias": ("qkv_bias", "attention_output_bias")}
_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768}
FAMILIES = {
    "llama": Family(
        ("LlamaForCausalLM", "LLaMAForCausalLM"),
        {"max_position_embeddings": 2048},
        {**_ATTENTION_BIAS, "mlp_bias": ("mlp_bias",)},
    ),
    "mistral": Family(
        ("MistralForCausalLM",), {"num_key_value_heads": 8, "max_position_embeddings": 131072}, {}, has_window=True
    ),
    "qwen2": Family(("Qwen2ForCausalLM",), _QWEN, {}, {"qkv_bias": True}, has_window=True),
    "qwen3": Family(
        ("Qwen3ForCausalLM",), {**_QWEN, "head_dim": 128}, _ATTENTION_BIAS, {"qk_norm": True}, has_window=True
    ),
}
"""By ``model_type``. A Mistral without its window is a Llama, and is written as one."""


def hf_config_from_model(model: ModelConfig, token_ids: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """``config.json`` of a model, in words that transformers 4 and 5 understand the same way.

    Args:
        token_ids: ``bos_token_id``, ``eos_token_id``, ``pad_token_id``; absent ones become null.
        dtype: of the weights in the folder.
    """
    assert model.max_position_embeddings is not None, "the longest context must be resolved"
    assert model.family is not None, "ModelConfig.check refuses a model of no family"
    family, scaling = FAMILIES[model.family], None
    if model.rope_scaling is not None:
        scaling = {name: value for name, value in asdict(model.rope_scaling).items() if value is not None}
    tree = {
        "architectures": [family.architectures[0]],
        "model_type": model.family,
        **{theirs: getattr(model, ours) for theirs, ours in _SIZES.items()},
        "num_key_value_heads": model.query_groups,
        "head_dim": model.head_size,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.norm_eps,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_word_embeddings,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        **{theirs: all(getattr(model, name) for name in ours) for theirs, ours in family.flags.items()},
        # transformers 4 reads the first two; 5 reads the third, or the first two where it is absent.
        "rope_theta": model.rope_theta,
        "rope_scaling": scaling,
        # llama.cpp takes any other scaling than null for one that it does not know.
        **({} if scaling is None else {"rope_parameters": {**scaling, "rope_theta": model.rope_theta}}),
        **{name: token_ids.get(name) for name in TOKEN_IDS},
        "use_cache": True,
        "torch_dtype": dtype,
    }
    if family.has_window:
        tree |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": model.num_layers}
    if model.family == "llama":
        tree["pretraining_tp"] = 1
    if model.family == "qwen2" and model.head_size * model.num_attention_heads == model.hidden_size:
        del tree["head_dim"]  # as in the family's own configs; transformers reads it where it stands
    return tree


def model_config_from_hf(
    tree: Mapping[str, Any],
    where: str = CONFIG,
    ignore: Collection[str] = (),
    note: Callable[[str], None] | None = None,
) -> ModelConfig:
    """Our config of a Hugging Face Llama, Mistral, Qwen2 or Qwen3.

    Args:
        ignore: unknown keys that the user says do not change what the model computes.
        note: called with a line on the keys that were passed over.

    Raises:
        CheckpointError: a feature that our model does not have, a missing or impossible value; ``where`` is named.
    """
    name, family = _family_of(tree, where)
    for key, allowed in _ONLY.items():
        value = tree.get(key)
        if value is not None and value not in allowed:
            raise _no_feature(where, key, value, f"only {' or '.join(map(json.dumps, allowed))} can be converted")
    kinds = tree.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise _no_feature(where, "layer_types", kinds, "only full_attention can be converted")
    known = {*_SIZES, *_OPTIONAL_SIZES, *_NUMBERS, *_ROPE_KEYS, *_ONLY, *family.flags, *_FAMILY_KEYS}
    if name == "qwen2":
        known.add("attention_bias")  # not read by the class
    values: dict[str, Any] = {ours: _count(tree, theirs, where) for theirs, ours in _SIZES.items()}
    for theirs, ours in _OPTIONAL_SIZES.items():
        values[ours] = family.absent.get(theirs) if tree.get(theirs) is None else _count(tree, theirs, where)
    _refuse_window(tree, name, family, values, where)
    _pass_over({key: value for key, value in tree.items() if key not in known}, where, ignore, note)
    values |= family.fields
    for theirs, flags in family.flags.items():
        values |= dict.fromkeys(flags, _flag(tree, theirs, where))
    for theirs, (ours, usual) in _NUMBERS.items():
        values[ours] = usual if tree.get(theirs) is None else _number(tree, theirs, where)
    tied = _flag(tree, "tie_word_embeddings", where)
    theta, scaling = _rope_from_hf(tree, values["max_position_embeddings"], where)
    model = ModelConfig(**values, rope_theta=theta, rope_scaling=scaling, tie_word_embeddings=tied)
    try:
        model.check()
    except ConfigError as error:
        raise CheckpointError(22, f"{where} ({error.what})", error.rule, "name the folder of a working model") from None
    return model


_FAMILY_KEYS = {"model_type", "architectures", "layer_types", *_WINDOW_KEYS}


def _family_of(tree: Mapping[str, Any], where: str) -> tuple[str, Family]:
    """The family by ``model_type``, or by the class where that is absent; both must agree."""
    if "model_type" not in tree and "architectures" not in tree:
        raise CheckpointError(22, f"{where}: model_type", "is missing", "name the folder of a Hugging Face model")
    kind, classes = tree.get("model_type"), tree.get("architectures")
    by_class = {(name,): kind for kind, family in FAMILIES.items() for name in family.architectures}
    found = by_class.get(tuple(classes)) if isinstance(classes, list) and all(map(_is_text, classes)) else None
    if kind is None:
        kind = found
    if not isinstance(kind, str) or kind not in FAMILIES:
        name, value = ("architectures", classes) if kind is None else ("model_type", kind)
        raise _no_feature(where, name, value, f"only {', '.join(FAMILIES)} can be converted")
    if classes is not None and found != kind:
        wanted = " or ".join(json.dumps([name]) for name in FAMILIES[kind].architectures)
        raise _no_feature(where, "architectures", classes, f"only {wanted} can be converted")
    return kind, FAMILIES[kind]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _refuse_window(tree: Mapping[str, Any], name: str, family: Family, values: Mapping[str, Any], where: str) -> None:
    """Refuse attention within a window; one that is as long as the context is none.

    Qwen has a switch, which is off where it is absent; a Mistral has a window of 4,096 unless it says null.
    """
    window, switch = tree.get("sliding_window"), tree.get("use_sliding_window")
    if not family.has_window:
        used = next((key for key in sorted(_WINDOW_KEYS) if tree.get(key)), None)
        if used is not None:
            raise _no_feature(where, used, tree[used], "it changes what the model computes")
        return
    if name == "mistral" and "sliding_window" not in tree:
        window = 4096
    if name != "mistral" and not switch:
        return
    if window is not None and not (type(window) is int and window >= values["max_position_embeddings"]):
        raise _no_feature(
            where, "sliding_window", window, "attention sees all earlier tokens; only null can be converted"
        )


def _flag(tree: Mapping[str, Any], name: str, where: str) -> bool:
    value = tree.get(name) or False
    if not isinstance(value, bool):
        raise _bad_value(where, name, value, "must be true or false")
    return value


def _pass_over(
    others: Mapping[str, Any], where: str, ignore: Collection[str], note: Callable[[str], None] | None
) -> None:
    """Judge the keys that this program does not read: refuse what may change the function, name the rest."""
    noted = []
    for name, value in others.items():
        if not value:  # off, zero and empty ask for nothing
            continue
        judgement = judge_key(name)
        if judgement is Judgement.CHANGES:
            raise _no_feature(where, name, value, "it changes what the model computes")
        if judgement is Judgement.SUSPECT and name not in ignore:
            raise CheckpointError(
                21,
                f"{where}: {name}={json.dumps(value)[:80]}",
                "is not known to this program and may change what the model computes",
                f"pass --ignore {name} if it does not; transformers' own Llama reads no such key",
            )
        if judgement is not Judgement.USUAL:
            noted.append(name)
    if noted and note is not None:
        note(f"{where}: passed over, as they change nothing that the model computes: {', '.join(noted)}")
    if unused := sorted(set(ignore) - set(others)):
        raise ConfigError(82, f"--ignore {unused[0]}", f"is no key of {where} that could be passed over", "remove it")


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
    if kind != "default" and kind not in ROPE_FIELDS:
        raise _no_feature(where, f"{name}.rope_type", kind, f"only default, {', '.join(ROPE_FIELDS)} can be converted")
    needed, optional = ROPE_FIELDS.get(kind, ((), ()))
    mscales = ("mscale", "mscale_all_dim") if kind == "yarn" else ()
    without_effect = () if "original_max_position_embeddings" in needed else ("original_max_position_embeddings",)
    known = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
    known |= {*needed, *optional, *mscales, *without_effect} if kind != "default" else set()
    for key, value in fields.items():
        if value is not None and (key not in known or (key == "partial_rotary_factor" and value != 1)):
            raise _no_feature(where, f"{name}.{key}", value, "it is not known to this program")
    if kind == "default":
        return theta, None
    if "original_max_position_embeddings" in needed and fields.get("original_max_position_embeddings") is None:
        fields = {**fields, "original_max_position_embeddings": longest}  # as transformers fills it in
    values: dict[str, Any] = {"rope_type": kind}
    for key in (*needed, *optional):
        if key not in needed and fields.get(key) is None:
            continue
        read = {"truncate": _flag, "original_max_position_embeddings": _count}.get(key, _number)
        values[key] = read(fields, key, where)
    if kind == "yarn" and "attention_factor" not in values and all(fields.get(key) for key in mscales):
        over, under = (yarn_attention_factor(values["factor"], _number(fields, key, where)) for key in mscales)
        values["attention_factor"] = over / under
    return theta, RopeScaling(**values)


def _no_feature(where: str, name: str, value: Any, rule: str) -> CheckpointError:
    return CheckpointError(
        21,
        f"{where}: {name}={json.dumps(value)[:80]}",
        f"is a feature that our model lacks: {rule}",
        "convert a Llama, Qwen2, Qwen3 or Mistral without it",
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


def token_ids_of(tokenizer: Tokenizer) -> dict[str, int | None]:
    """The special ids that config.json and generation_config.json name."""
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": padding_id(tokenizer),
    }


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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON mapping from a folder that we did not write.

    Raises:
        CheckpointError: missing, or not such a file.
    """
    if not path.exists() and (inside := _model_inside(path.parent)):
        raise CheckpointError(8, str(path), "is missing", inside)
    with open_checkpoint_file(path) as file:
        text = file.read(MAX_JSON_BYTES + 1)
    why = ""
    try:
        tree = parse_json(text) if len(text) <= MAX_JSON_BYTES else None
    except json.JSONDecodeError:
        tree = None
    except ValueError as error:
        tree, why = None, f" that we read ({error})"
    if not isinstance(tree, dict):
        raise CheckpointError(20, str(path), f"is not a JSON mapping{why}", "name the folder of a Hugging Face model")
    return tree


def _model_inside(folder: Path) -> str:
    """What to name in place of a folder that is no Hugging Face model: where one is near, or how it is made."""
    found = sorted(p.parent for p in folder.glob(f"*/{CONFIG}"))
    if found:
        return f"name the folder of the model: {found[0]}"
    if (folder / "checkpoints").is_dir() or (folder / "manifest.json").is_file():
        return f"{folder} is a run of ours, no Hugging Face model: export it with tools/checkpoint_to_hf.py first"
    return ""
