"""Every setting of a run: one tree of frozen dataclasses, read from YAML, overridden by ``group.field=value``.

::

    CONFIG.yaml ----> tree of plain values ----> Config (frozen) ----> validate(world_size) ----> everything else
    group.field=value ^ (last one wins)            types checked         ranges and relations
    reading.py                                     settings.py           settings.py, tree.py

The settings, all of them, stand in ``settings.py``: the docstring under a field is its documentation and what
``--help`` prints (``help.py``), and its type says what changing it means for a run that goes on (``effects.py``).
``tree.py`` joins the groups to one ``Config`` and says what must hold between them (``checks.py``, ``plausible.py``);
``phases.py`` counts samples and steps over the phases of a run. ``presets.py`` finds presets by name, ``mistakes.py``
knows what others call a setting, and ``strict_yaml.py`` reads YAML with limits.
What can be computed is not a field: ``data_parallel_size``, ``grad_accum``, ``grid`` and ``placement`` are methods of
``Config``. Nothing mutates a config; the resolved one (with ``model.vocab_size`` filled in from the tokenizer) is
stored in each checkpoint and logged once. Imports neither torch nor numpy.
"""

from megatron_hammer.config.effects import Effect
from megatron_hammer.config.help import (
    FieldHelp,
    add_accept,
    add_settings,
    describe_fields,
    describe_parts,
    help_text,
    setting_effects,
)
from megatron_hammer.config.presets import preset_names
from megatron_hammer.config.reading import (
    change_config,
    config_from_tree,
    config_to_tree,
    load_config,
    parse_yaml,
    to_yaml,
)
from megatron_hammer.config.settings import (
    ATTENTION_MASKS,
    ROPE_FIELDS,
    CheckpointConfig,
    DataConfig,
    KernelsConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Recompute,
    RopeScaling,
    ScheduleConfig,
    Sharded,
    TokenizerConfig,
    TrainConfig,
    yarn_attention_factor,
)
from megatron_hammer.config.tree import FP8_MULTIPLE, Config

__all__ = [
    "ATTENTION_MASKS",
    "FP8_MULTIPLE",
    "ROPE_FIELDS",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "Effect",
    "FieldHelp",
    "KernelsConfig",
    "LogConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Recompute",
    "RopeScaling",
    "ScheduleConfig",
    "Sharded",
    "TokenizerConfig",
    "TrainConfig",
    "add_accept",
    "add_settings",
    "change_config",
    "config_from_tree",
    "config_to_tree",
    "describe_fields",
    "describe_parts",
    "help_text",
    "load_config",
    "parse_yaml",
    "preset_names",
    "setting_effects",
    "to_yaml",
    "yarn_attention_factor",
]
