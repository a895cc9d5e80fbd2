"""``Config``, the whole tree of settings: its groups, what must hold between them, and what is computed from them."""

from __future__ import annotations

import dataclasses
import itertools
import operator
from dataclasses import dataclass, field

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.config.checks import choices, divisors, require
from megatron_hammer.config.phases import BatchSizes, Course, Phase, phase_at, phases_of, tokens_before
from megatron_hammer.config.plausible import USUAL, check_paths, far_beyond
from megatron_hammer.config.settings import (
    ATTENTION_MASKS,
    CheckpointConfig,
    DataConfig,
    KernelsConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TokenizerConfig,
    TrainConfig,
)
from megatron_hammer.parallel.grid import Grid, build_grid
from megatron_hammer.parallel.pipeline import Pipeline, TokenFlops, split_layers
from megatron_hammer.parallel.placement import Placement, place

BULK = "use parallel.tp_comm_overlap=bulk"
FP8_MULTIPLE = 16  # elements: both sides of an fp8 matrix, or cuBLAS refuses it (Transformer Engine's autocast)


@dataclass(frozen=True)
class Config:
    """The whole tree; one group per field."""

    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def validate(self, world_size: int) -> None:
        """Check every group and every relation between groups for ``world_size`` ranks.

        Raises:
            ConfigError: names field, value, rule and remedy. Nothing is communicated.
        """
        self.check_groups()
        for phase in self.phases:
            if phase.shape != (self.data.seq_length, self.model.rope_theta, self.model.rope_scaling):
                try:
                    self.in_phase(phase).validate(world_size)
                except ConfigError as error:
                    raise ConfigError(error.number, f"{phase.name}: {error.what}", error.rule, error.remedy) from None
        check_paths(self.train.output, self._input_paths())
        model, tp = self.model, self.parallel.tensor_model_parallel_size
        allowed = [t for t in range(1, model.num_attention_heads + 1) if not _tp_obstacle(self, t)]
        obstacle = _tp_obstacle(self, tp)
        require(
            not obstacle, f"parallel.tensor_model_parallel_size={tp}", obstacle, "use " + choices(allowed), number=5
        )
        require(
            world_size % tp == 0,
            f"parallel.tensor_model_parallel_size={tp}",
            f"must divide the {world_size} ranks",
            f"start a multiple of {tp} ranks or use {divisors(world_size)}",
            number=5,
        )
        what, rule, remedy, number = _cp_obstacle(self, world_size)
        require(not what, what, rule, remedy, number=number)
        pp, cp = self.parallel.pipeline_model_parallel_size, self.parallel.context_parallel_size
        require(
            world_size % (tp * cp * pp) == 0,
            f"parallel.pipeline_model_parallel_size={pp}",
            f"x TP {tp} x CP {cp} must divide the {world_size} ranks",
            f"start a multiple of {tp * cp * pp} ranks or use {divisors(world_size // (tp * cp))}",
            number=5,
        )
        shard_size = self.parallel.shard_size
        whole = dataclasses.replace(self, parallel=dataclasses.replace(self.parallel, shard_size=None))
        replicas = whole.grid(world_size).replicas
        require(
            shard_size is None or replicas % shard_size == 0,
            f"parallel.shard_size={shard_size}",
            f"must divide the {replicas} ranks that hold the same weights",
            f"use {divisors(replicas)} or leave it out",
            number=5,
        )
        train = self.train
        samples = train.micro_batch_size * self.data_parallel_size(world_size)
        require(
            train.global_batch_size % samples == 0,
            f"train.global_batch_size={train.global_batch_size}",
            f"must be a multiple of train.micro_batch_size={train.micro_batch_size} x data_parallel_size="
            f"{self.data_parallel_size(world_size)}",
            f"use a multiple of {samples}",
            number=5,
        )
        for size in {size for _, size in self.batch_sizes.ramp}:
            require(
                size % samples == 0,
                f"train.batch_size_ramp: {size} samples a step",
                f"must be a multiple of train.micro_batch_size={train.micro_batch_size} x data_parallel_size="
                f"{self.data_parallel_size(world_size)}",
                f"use a start and an increment that are multiples of {samples}",
                number=5,
            )
        by_ranks = (_ramp_obstacle, _pipeline_obstacle, _tree_obstacle)
        for what, rule, remedy in (find(self, world_size) for find in by_ranks):
            require(not what, what, rule, remedy, number=5)
        require(
            train.precision != "fp16" or self.optimizer.initial_loss_scale >= 1,
            "optimizer.initial_loss_scale",
            "must be at least 1",
            "65536 is usual",
        )
        attention, mask = self.kernels.attention, self.data.attention_mask
        able = [name for name, masks in ATTENTION_MASKS.items() if mask in masks]
        require(
            attention in ("auto", *able) or self.parallel.context_parallel_size > 1,
            f"kernels.attention={attention}",
            f"cannot do data.attention_mask={mask}",
            f"use {' or '.join(('auto', *able))}",
            number=9,
        )
        obstacles = {
            12: _te_obstacle, 13: _fp8_obstacle, 14: _recompute_obstacle, 15: _compile_obstacle, 16: _graph_obstacle,
            21: _shard_obstacle, 23: _rewind_obstacle, 24: _corruption_obstacle,
        }  # fmt: skip
        for number, (what, rule, remedy) in ((n, find(self)) for n, find in obstacles.items()):
            require(not what, what, rule, remedy, number)
        self._check_evaluator()
        longest = model.max_position_embeddings
        require(
            longest is None or longest >= self.data.seq_length,
            f"data.seq_length={self.data.seq_length}",
            f"must not exceed model.max_position_embeddings={longest}",
            "shorten it or raise the limit",
            number=5,
        )

    def check_groups(self) -> None:
        """Check every group by itself.

        Raises:
            ConfigError: names field, value, rule and remedy.
        """
        for group in dataclasses.fields(self):
            check = getattr(getattr(self, group.name), "check", None)
            if check is not None:
                check()

    def _check_evaluator(self) -> None:
        """What ``train.evaluator`` reads must be there: sets, and checkpoints of its steps."""
        evaluator, saved = self.train.evaluator, self.checkpoint.save_interval_steps
        if evaluator is None:
            return
        require(
            bool(evaluator.command or evaluator.sets or self.data.valid),
            "train.evaluator",
            "has nothing to evaluate on: data.valid is absent",
            "set train.evaluator.sets={name: path}",
        )
        interval = evaluator.interval_steps
        require(
            interval is None or (saved is not None and interval % saved == 0),
            f"train.evaluator.interval_steps={interval}",
            f"must be a multiple of checkpoint.save_interval_steps={saved}: committed checkpoints are evaluated",
            "set checkpoint.save_interval_steps to a divisor of it",
            number=5,
        )

    def check_phase_ends(self, consumed: int = 0) -> None:
        """Whether steps that begin at sample ``consumed`` never hold samples of two shapes.

        Raises:
            ConfigError: names the phase that would end within a step.
        """
        for before, phase in itertools.pairwise(self.phases):
            if phase.first > consumed and not phase.has_shape_of(before):
                over = self.batch_sizes.step_end(phase.first, consumed) - phase.first
                require(
                    over == 0,
                    f"{before.name}, which ends at sample {phase.first:,}",
                    f"must end with a step, since {phase.name} has another seq_length or RoPE",
                    f"make it samples={phase.first - before.first + over}",
                )

    @property
    def largest(self) -> Config:
        """``in_phase`` of the phase with the longest samples, which needs most memory."""
        phases = self.phases
        return self.in_phase(max(phases, key=lambda phase: phase.seq_length)) if phases else self

    @property
    def num_tokens(self) -> int:
        """Targets of the whole run, begun with this config."""
        return self.tokens_before(self.course().num_samples)

    def tokens_before(self, sample: int) -> int:
        """Targets of the samples [0, sample)."""
        phases = self.phases
        return tokens_before(phases, sample) if phases else sample * self.data.seq_length

    @property
    def batch_sizes(self) -> BatchSizes:
        """How many samples each step has."""
        return BatchSizes.of(self.train)

    def course(self, step: int = 0, consumed: int = 0) -> Course:
        """Which samples the steps hold of a run that has ``consumed`` behind it after ``step`` steps, of any size."""
        done = ((0,), (0,)) if step == 0 else ((0, step), (0, consumed))
        return Course(self.batch_sizes, self.train.num_steps, *done)

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up, which is cut to the run's length only where the descent follows that, too.

        With ``schedule.decay_steps``, or without a descent, the rate of a step does not depend on how long the run is,
        so that a run can be extended.
        """
        wanted = self.schedule.warmup_steps
        return min(wanted, self.train.num_steps) if self.schedule.follows_run else wanted

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases of the run; ``data.train`` alone is one. Empty where no data are named."""
        return phases_of(self.data, self.model, self.batch_sizes)

    def in_phase(self, phase: Phase) -> Config:
        """The config of a run that has this phase alone: its mix, its length and its RoPE."""
        fim = {prefix: of for prefix, of in (self.data.fim or {}).items() if prefix in phase.train}
        data = dataclasses.replace(
            self.data,
            phases=None,
            train=dict(phase.train),
            weights=phase.unit,
            fim=fim or None,
            seq_length=phase.seq_length,
        )
        model = dataclasses.replace(self.model, rope_theta=phase.rope_theta, rope_scaling=phase.rope_scaling)
        return dataclasses.replace(self, data=data, model=model)

    @property
    def described_model(self) -> ModelConfig:
        """The model as an export describes it: with its longest context filled in."""
        if self.model.max_position_embeddings is not None:
            return self.model
        return dataclasses.replace(self.model, max_position_embeddings=self.data.seq_length)

    def after_samples(self, consumed: int) -> Config:
        """``in_phase`` of the phase of the last of ``consumed`` samples: what has been trained then.

        Its longest context, where the config does not say it, is that of all phases so far with the same RoPE: a model
        does not forget it in a phase of shorter samples.
        """
        if not self.data.phases:
            return self  # one mix, one length and one RoPE for the whole run
        phases = self.phases
        last = phase_at(phases, max(0, consumed - 1))
        lengths = [p.seq_length for p in phases if p.first <= last.first and p.shape[1:] == last.shape[1:]]
        found = self.in_phase(last)
        longest = found.model.max_position_embeddings or max(lengths)
        return dataclasses.replace(found, model=dataclasses.replace(found.model, max_position_embeddings=longest))

    def grid(self, world_size: int) -> Grid:
        """How ``world_size`` ranks share the work."""
        parallel = self.parallel
        return build_grid(
            world_size,
            tp=parallel.tensor_model_parallel_size,
            cp=parallel.context_parallel_size,
            pp=parallel.pipeline_model_parallel_size,
            query_groups=self.model.query_groups,
            shard_size=parallel.shard_size,
        )

    def pipeline(self, pp_rank: int = 0) -> Pipeline:
        """The stages of a pipeline rank, and the order of its work."""
        return Pipeline(pp_rank, self.parallel.pipeline_model_parallel_size, self.parallel.virtual_pipeline_stages)

    def token_flops(self) -> TokenFlops:
        """FLOPs of a token in each part of the model, what is recomputed counted again."""
        again = 0
        if self.train.recompute == "full":
            again = self.train.recompute_layers or self.model.num_layers
        return TokenFlops.of(self.model, self.data.seq_length, again)

    def layer_split(self) -> tuple[int, ...]:
        """Layers of each stage: ``parallel.pipeline_split``, or by cost."""
        return self.parallel.pipeline_split or split_layers(self.token_flops(), self.pipeline().num_stages)

    def placement(self, tp_rank: int = 0, stage: int = 0) -> Placement:
        """What a stage of a rank holds of the model; the sizes are the same on all tensor-parallel ranks."""
        parallel = self.parallel
        return place(
            self.model,
            tp_rank,
            parallel.tensor_model_parallel_size,
            sequence_parallel=parallel.sequence_parallel,
            stage=stage,
            num_stages=self.pipeline().num_stages,
            split=self.layer_split(),
        )

    @property
    def tokens_per_rank(self) -> int:
        """Tokens of a micro-batch on one rank: its share under context parallelism; tensor parallelism divides none."""
        return self.train.micro_batch_size * self.data.seq_length // self.parallel.context_parallel_size

    def data_parallel_size(self, world_size: int) -> int:
        """Ranks that process different samples."""
        return self.grid(world_size).dp

    def grad_accum(self, world_size: int) -> int:
        """Micro-batches that each rank processes in one step."""
        return self.train.global_batch_size // (self.train.micro_batch_size * self.data_parallel_size(world_size))

    @property
    def tokens_per_step(self) -> int:
        """Targets in one step, over all ranks."""
        return self.train.global_batch_size * self.data.seq_length

    def _input_paths(self) -> dict[str, str | None]:
        """Setting -> the path that it names."""
        named = {"tokenizer.path": self.tokenizer.path, "checkpoint.init_from": self.checkpoint.init_from}
        train = {f"data.train[{i}]": prefix for i, prefix in enumerate(self.data.train or ())}
        return named | train | {f"data.valid[{name}]": prefix for name, prefix in (self.data.valid or {}).items()}

    def notes(self) -> list[str]:
        """Remarks on settings that are valid but do something other than their plain reading."""
        notes = []
        if self.schedule.warmup_steps > self.train.num_steps:
            what = (
                f"schedule.warmup_steps={self.schedule.warmup_steps} is longer than train.num_steps="
                f"{self.train.num_steps}: "
            )
            follows = self.schedule.follows_run
            notes.append(what + ("clamped to the run" if follows else "the learning rate does not reach its peak"))
        horizon, last = self.schedule.decay_steps, self.train.num_steps
        if horizon is not None and horizon > 2 * last and self.schedule.style != "constant":
            notes.append(
                f"schedule.decay_steps={horizon} lies far beyond train.num_steps={last}: the learning rate stays near "
                f"its peak to the end; leave schedule.decay_steps out to have it follow the run"
            )
        on_gpu = self.train.device != "cpu" and not self.kernels.deterministic
        if self.train.deterministic_reduction == "tree" and on_gpu:
            notes.append(
                "train.deterministic_reduction=tree: on a GPU bits are equal with kernels.deterministic=true only"
            )
        notes += far_beyond({name: operator.attrgetter(name)(self) for name in USUAL})
        if not self.data.valid:
            notes.append("data.valid is absent: no evaluation")
        if self.kernels.fp8 == "delayed":
            notes.append(
                "kernels.fp8=delayed: checkpoints hold no scales, so a resumed run is not bit-equal to one that went "
                "on, and the first micro-batches after each start lose small gradients; kernels.fp8=current has neither"
            )
        return notes


def _tp_obstacle(config: Config, tp: int) -> str:
    """Why ``tp`` tensor-parallel ranks cannot share this model, or an empty string."""
    model, groups = config.model, config.model.query_groups
    if model.num_attention_heads % tp:
        return f"must divide model.num_attention_heads={model.num_attention_heads}"
    if groups % tp and tp % groups:
        return f"must divide model.num_query_groups={groups} or be a multiple of it"
    if model.ffn_hidden_size % tp:
        return f"must divide model.ffn_hidden_size={model.ffn_hidden_size}"
    cp, length = config.parallel.context_parallel_size, config.data.seq_length
    if config.parallel.sequence_parallel and length % (tp * cp):
        shared = "" if cp == 1 else f" / parallel.context_parallel_size={cp}"
        return f"must divide data.seq_length={length}{shared} under sequence parallelism"
    return ""


def _cp_obstacle(config: Config, world_size: int) -> tuple[str, str, str, int]:
    """Why ranks cannot share the tokens of samples (setting, rule, remedy, number), or empty strings."""
    parallel, kernels, length = config.parallel, config.kernels, config.data.seq_length
    cp, tp = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    what, leave_out = f"parallel.context_parallel_size={cp}", "leave one of them out"
    if cp == 1:
        return "", "", "", 5
    if world_size % (tp * cp):
        rule = f"x parallel.tensor_model_parallel_size={tp} must divide the {world_size} ranks"
        return what, rule, f"start a multiple of {tp * cp} ranks or use {divisors(world_size // tp)}", 5
    if length % (2 * cp):
        rule = f"x 2, the chunks of a sample, must divide data.seq_length={length}"
        return what, rule, f"use a data.seq_length of a multiple of {2 * cp}", 5
    able = [name for name, masks in ATTENTION_MASKS.items() if "document" in masks and name != "te"]
    if kernels.attention not in ("auto", *able):
        rule = f"cannot do {what}, where a rank has fewer queries than keys"
        return f"kernels.attention={kernels.attention}", rule, f"use {' or '.join(('auto', *able))}", 9
    if kernels.compile == "layers":
        return "kernels.compile=layers", f"is not for {what}, whose keys are of another number each time", leave_out, 15
    if kernels.cuda_graph:
        return "kernels.cuda_graph=true", f"is not for {what}, where shapes differ between micro-batches", leave_out, 16
    if kernels.layers == "te":
        return "kernels.layers=te", f"is not for {what}: nobody has run it", "use kernels.layers=torch", 12
    return "", "", "", 5


def _ramp_obstacle(config: Config, world_size: int) -> tuple[str, str, str]:
    """What cannot go with steps of several sizes (setting, rule, remedy), or empty strings."""
    sizes, leave_out = [size for _, size in config.batch_sizes.ramp], "leave train.batch_size_ramp out"
    if len(sizes) == 1:
        return "", "", ""
    if config.train.deterministic_reduction == "tree":
        what = "train.deterministic_reduction=tree"
        return what, "is not for train.batch_size_ramp: its tree is of one number of micro-batches", leave_out
    if config.kernels.cuda_graph:
        rule = "is not for train.batch_size_ramp: graphs are recorded for one number of micro-batches"
        return "kernels.cuda_graph=true", rule, leave_out
    each = config.train.micro_batch_size * config.data_parallel_size(world_size)
    each *= config.parallel.pipeline_model_parallel_size
    if config.parallel.virtual_pipeline_stages > 1 and (odd := [size for size in sizes if size % each]):
        what = f"train.batch_size_ramp: {odd[0]} samples a step"
        return what, f"must be a multiple of {each} for parallel.virtual_pipeline_stages", "change start or increment"
    return "", "", ""


def _pipeline_obstacle(config: Config, world_size: int) -> tuple[str, str, str]:
    """Why the layers or a step cannot be divided over the stages (setting, rule, remedy), or empty strings."""
    parallel, layers, kernels = config.parallel, config.model.num_layers, config.kernels
    pp, v, split = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_stages, parallel.pipeline_split
    size, stages = f"parallel.pipeline_model_parallel_size={pp}", pp * v
    product = "" if v == 1 else f" x parallel.virtual_pipeline_stages={v}"
    if stages > layers:
        return f"{size}{product}", f"must not exceed model.num_layers={layers}", f"use at most {layers} stages"
    if split is not None:
        what = f"parallel.pipeline_split={list(split)}"
        if len(split) != stages:
            return what, f"must have one number for each of the {stages} stages, {size}{product}", "write one for each"
        if sum(split) != layers:
            return what, f"has {sum(split)} layers, model.num_layers={layers}", f"make them {layers} together"
        if min(split[:-1], default=1) < 1 or split[-1] < (0 if stages > 1 else 1):
            return what, "must give every stage a layer, but the last, which has the head", "use 1 or more"
    accumulated = config.grad_accum(world_size)
    if v > 1 and accumulated % pp:
        rule = f"needs micro-batches a step that are a multiple of {size}, not {accumulated}"
        samples = config.train.micro_batch_size * config.data_parallel_size(world_size) * pp
        return f"parallel.virtual_pipeline_stages={v}", rule, f"use train.global_batch_size of a multiple of {samples}"
    if pp > 1 and kernels.cuda_graph:
        return size, "is not for kernels.cuda_graph=true", "leave one of them out"
    if pp > 1 and kernels.layers == "te" and kernels.fp8 != "off":
        rule = (
            f"is not for kernels.layers=te with kernels.fp8={kernels.fp8}, which scales over all ranks in each forward"
        )
        return size, rule, "use kernels.layers=torch with kernels.fp8=current"
    return "", "", ""


def _tree_obstacle(config: Config, world_size: int) -> tuple[str, str, str]:
    """Why sums cannot be made in one fixed tree (setting, rule, remedy), or empty strings."""
    what, parallel, kernels = "train.deterministic_reduction=tree", config.parallel, config.kernels
    if config.train.deterministic_reduction == "off":
        return "", "", ""
    dp = config.data_parallel_size(world_size)
    if dp & (dp - 1):
        powers = [2**i for i in range(dp.bit_length())]
        rule = f"needs a power of two of data-parallel ranks, not data_parallel_size={dp}"
        return what, rule, f"use {choices(powers)} of them"
    others = {
        "parallel.pipeline_model_parallel_size": (parallel.pipeline_model_parallel_size, 1),
        "parallel.context_parallel_size": (parallel.context_parallel_size, 1),
        "parallel.shard": (parallel.shard, "optimizer"),
        "parallel.shard_size": (parallel.shard_size, None),
        "kernels.cuda_graph": (kernels.cuda_graph, False),
        "kernels.fp8": (kernels.fp8, "off"),
        "kernels.layers": (kernels.layers, "torch"),
    }
    for name, (value, possible) in others.items():
        if value != possible:
            without = "null" if possible is None else str(possible).lower()
            return what, f"is not for {name}={str(value).lower()}", f"leave one of them out ({name}={without})"
    return "", "", ""


def _te_obstacle(config: Config) -> tuple[str, str, str]:
    """What a config without a GPU asks of Transformer Engine (setting, rule, remedy), or empty strings."""
    for name, remedy in (("layers", "torch"), ("attention", "auto"), ("norm", "auto")):
        if getattr(config.kernels, name) == "te" and config.train.device == "cpu":
            return f"kernels.{name}=te", "does not run with train.device=cpu", f"use kernels.{name}={remedy}"
    norm = config.kernels.norm
    if config.kernels.layers == "te" and norm not in ("auto", "te"):
        return f"kernels.norm={norm}", "is not for kernels.layers=te, which has its own norms", "use kernels.norm=auto"
    if config.kernels.layers == "te" and config.parallel.tp_comm_overlap != "bulk":
        what = f"parallel.tp_comm_overlap={config.parallel.tp_comm_overlap}"
        return what, "is not for kernels.layers=te, which overlaps by itself", BULK
    return "", "", ""


def _fp8_obstacle(config: Config) -> tuple[str, str, str]:
    """Why the layers' matrix products cannot run in 8 bits (setting, rule, remedy), or empty strings."""
    kernels, model, train = config.kernels, config.model, config.train
    if kernels.fp8 == "off":
        lone_head = kernels.fp8_head
        return ("kernels.fp8_head=true", "needs kernels.fp8", "set it too") if lone_head else ("", "", "")
    what = f"kernels.fp8={kernels.fp8}"
    if kernels.layers == "torch" and kernels.fp8 == "delayed":
        return what, "is not for kernels.layers=torch", "use kernels.fp8=current or kernels.layers=te"
    if train.device == "cpu":
        return what, "does not run with train.device=cpu", "use kernels.fp8=off"
    if train.precision != "bf16":
        return what, f"is not for train.precision={train.precision}", "use bf16 or kernels.fp8=off"
    if config.parallel.tp_comm_overlap == "chunks":
        rule = f"is not for {what}, which scales a tensor as a whole"
        return "parallel.tp_comm_overlap=chunks", rule, BULK
    at, d = config.placement(), model.head_size
    shards = at.sequence_shards if kernels.layers == "te" else 1  # Transformer Engine quantises before it gathers
    rows = config.tokens_per_rank // shards
    sizes = {
        "train.micro_batch_size x data.seq_length": rows,
        "model.hidden_size": model.hidden_size,
        "the rows of the fused query, key and value weight": (at.heads_local + 2 * at.groups_local) * d,
        "model.num_attention_heads x head size": at.heads_local * d,
        "model.ffn_hidden_size": at.ffn_local,
        "kernels.loss_chunk_tokens": (kernels.loss_chunk_tokens or 0) if kernels.fp8_head else 0,
    }
    for name, size in sizes.items():
        if size % FP8_MULTIPLE:
            share = "" if at.tp_size == 1 else ", one rank's part"
            rule = f"needs a multiple of {FP8_MULTIPLE} for {name} ({size}{share})"
            return what, rule, "change the sizes or use kernels.fp8=off"
    return "", "", ""


def _recompute_obstacle(config: Config) -> tuple[str, str, str]:
    """Why this cannot be recomputed (setting, rule, remedy), or empty strings."""
    mode, layers = config.train.recompute, config.train.recompute_layers
    what = f"train.recompute_layers={layers}"
    if layers is not None and mode != "full":
        return what, f"is not for train.recompute={mode}", "leave it out or use train.recompute=full"
    if layers is not None and layers > config.model.num_layers:
        return what, f"must not exceed model.num_layers={config.model.num_layers}", "lower it or leave it out"
    return "", "", ""


def _compile_obstacle(config: Config) -> tuple[str, str, str]:
    """Why whole layers cannot be compiled (setting, rule, remedy), or empty strings."""
    if config.kernels.compile != "layers":
        return "", "", ""
    if config.parallel.tp_comm_overlap != "bulk":
        what = f"parallel.tp_comm_overlap={config.parallel.tp_comm_overlap}"
        return what, "is not for kernels.compile=layers, where the compiler decides what overlaps", BULK
    if config.kernels.layers == "torch":
        return "", "", ""
    rule = f"is not for kernels.layers={config.kernels.layers}, whose modules the compiler cannot look into"
    return "kernels.compile=layers", rule, "use kernels.compile=operations"


def _shard_obstacle(config: Config) -> tuple[str, str, str]:
    """Why gradients or weights cannot be sharded (setting, rule, remedy), or empty strings."""
    kernels, what = config.kernels, f"parallel.shard={config.parallel.shard}"
    if not config.parallel.divides_gradients:
        return "", "", ""
    if kernels.layers == "te":
        rule = "is not for kernels.layers=te, whose modules hold weights and sums of gradients as they were made"
        return what, rule, "use kernels.layers=torch or parallel.shard=optimizer"
    if kernels.cuda_graph:
        rule = "is not for kernels.cuda_graph=true: memory that comes and goes cannot be recorded"
        return what, rule, "leave the graph out or use parallel.shard=optimizer"
    return "", "", ""


def _rewind_obstacle(config: Config) -> tuple[str, str, str]:
    """Why a run cannot leave samples out (setting, rule, remedy), or empty strings."""
    asked = {f"train.{name}": getattr(config.train, name) for name in ("on_spike", "on_nonfinite", "replay")}
    what = next((f"{k}={v}" for k, v in asked.items() if v == "rewind" or (k == "train.replay" and v)), "")
    if not what or config.data.order == "independent":
        return "", "", ""
    rule = "is not for data.order=megatron, which has as many samples as the run reads"
    return what, rule, "use data.order=independent"


def _corruption_obstacle(config: Config) -> tuple[str, str, str]:
    """Why a micro-batch would not have the same bits twice (setting, rule, remedy), or empty strings."""
    interval, kernels = config.train.sdc_check_interval_steps, config.kernels
    what = f"train.sdc_check_interval_steps={interval}"
    if interval and kernels.fp8 == "delayed":
        rule = "is not for kernels.fp8=delayed, which scales each micro-batch by those before it"
        return what, rule, "use kernels.fp8=current, or leave it out"
    if interval and config.train.device == "cuda" and not kernels.deterministic:
        return what, "needs kernels.deterministic=true on a GPU", "set it too, or leave the check out"
    return "", "", ""


def _graph_obstacle(config: Config) -> tuple[str, str, str]:
    """Why a micro-batch cannot be one CUDA graph (setting, rule, remedy), or empty strings."""
    kernels, what = config.kernels, "kernels.cuda_graph=true"
    if not kernels.cuda_graph:
        return "", "", ""
    if config.train.device == "cpu":
        return what, "does not run with train.device=cpu", "leave it out"
    if config.data.attention_mask == "document":
        rule = "is not for data.attention_mask=document, where shapes differ from one micro-batch to the next"
        return what, rule, "leave it out or use data.attention_mask=causal"
    if kernels.fp8 != "off":
        rule = f"is not for kernels.fp8={kernels.fp8}, where a weight is quantised once a step and then kept"
        return what, rule, "leave it out or use kernels.fp8=off"
    if kernels.layers == "te":
        return what, "is not for kernels.layers=te, whose modules keep state of their own", "use kernels.layers=torch"
    if kernels.compile == "layers":
        return what, "is not for kernels.compile=layers", "use kernels.compile=operations or none"
    if config.parallel.tp_comm_overlap == "chunks":
        return "parallel.tp_comm_overlap=chunks", f"is not for {what}: nobody has recorded it", BULK
    return "", "", ""
