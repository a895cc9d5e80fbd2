"""The config of a Hugging Face Llama and ours, mapped onto each other in both directions.

Logical tensors have Hugging Face's names and shapes already, and RoPE is half-split as there, so the config is the only
part of a model that needs a mapping. A feature of a Hugging Face config that our model does not have is refused by its
name, never dropped; keys that have no effect are passed over and named (``extra_keys.py``).

Needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_hammer.base.errors import CheckpointError, ConfigError, RefusedError
from megatron_hammer.base.files import write_durably
from megatron_hammer.base.reading import parse_json
from megatron_hammer.checkpoint.tensor_files import open_regular
from megatron_hammer.config import ModelConfig, RopeScaling
from megatron_hammer.huggingface.extra_keys import Judgement, judge_key
from megatron_hammer.tokenizer.interface import Tokenizer

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
MAX_JSON_BYTES = 32 * 2**20  # far above any config or index

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
    "architectures": (["LlamaForCausalLM"], ["LLaMAForCausalLM"]),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0,),
    "pretraining_tp": (1,),
    "partial_rotary_factor": (1,),
    "is_causal": (True,),
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
        # transformers 4 reads the first two; 5 reads the third, or the first two where it is absent.
        "rope_theta": model.rope_theta,
        "rope_scaling": scaling,
        # llama.cpp takes any other scaling than null for one that it does not know.
        **({} if scaling is None else {"rope_parameters": {**scaling, "rope_theta": model.rope_theta}}),
        **{name: token_ids.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "use_cache": True,
        "torch_dtype": dtype,
    }


def model_config_from_hf(
    tree: Mapping[str, Any],
    where: str = CONFIG,
    ignore: Collection[str] = (),
    note: Callable[[str], None] | None = None,
) -> ModelConfig:
    """Our config of an HF Llama.

    Args:
        ignore: unknown keys that the user says do not change what the model computes.
        note: told which keys were passed over.

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
    known = {*_SIZES, *_OPTIONAL_SIZES, *_NUMBERS, *_ROPE_KEYS, *_ONLY, "layer_types"}
    _pass_over({name: value for name, value in tree.items() if name not in known}, where, ignore, note)
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
    with open_regular(path) as file:
        text = file.read(MAX_JSON_BYTES + 1)
    try:
        tree = parse_json(text) if len(text) <= MAX_JSON_BYTES else None
    except ValueError:
        tree = None
    if not isinstance(tree, dict):
        raise CheckpointError(20, str(path), "is not a JSON mapping", "name the folder of a Hugging Face model")
    return tree


def _model_inside(folder: Path) -> str:
    """What to name in place of a folder that is no Hugging Face model: where one is near, or how it is made."""
    found = sorted(p.parent for p in folder.glob(f"*/{CONFIG}"))
    if found:
        return f"name the folder of the model: {found[0]}"
    if (folder / "checkpoints").is_dir() or (folder / "manifest.json").is_file():
        return f"{folder} is a run of ours, no Hugging Face model: export it with tools/checkpoint_to_hf.py first"
    return ""


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """Write readable JSON durably."""
    write_durably(path, (json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode())
