"""The training loop: resume, train, evaluate, save and report, in visible order.

The whole state of a run is the optimizer's shards, a few scalars, and one integer: consumed samples. Everything else
(learning rate, order of samples, initial weights) is a pure function of the config. So a run that is stopped and
started again computes what it would have computed, bit for bit.
"""

from __future__ import annotations

import gc
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.base.errors import EXIT_STOPPED_BY_SIGNAL, NonFiniteError
from megatron_hammer.base.progress import say
from megatron_hammer.checkpoint.read import load_shards
from megatron_hammer.checkpoint.write import save_checkpoint
from megatron_hammer.config import Config, config_to_tree
from megatron_hammer.kernels.backend import Requirements
from megatron_hammer.kernels.selection import select_operations, select_optimizer_kernels
from megatron_hammer.model.initialise import initialise
from megatron_hammer.model.llama import Stage, build_stage
from megatron_hammer.model.parameters import parameter_table
from megatron_hammer.model.recompute import plan_recompute
from megatron_hammer.optim.optimizer import Optimizer
from megatron_hammer.optim.store import FlatStore
from megatron_hammer.parallel.collectives import all_reduce
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.sampling.batch import Batch
from megatron_hammer.sampling.loader import ReadAhead, chain_digest
from megatron_hammer.sampling.samples import open_train_data, open_valid_data
from megatron_hammer.train.evaluate import evaluate
from megatron_hammer.train.metrics import Reporter, flops_per_token, peak_tflops
from megatron_hammer.train.prepare import STATE_KINDS, Prepared, checkpoints_folder
from megatron_hammer.train.step import StepReport, train_step

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Steps between a step and the reading of its numbers: on a GPU the next step is launched before the last one is read,
# so that the device never waits for Python; on a CPU a step is over when its call returns.
READ_LAG_STEPS = {"cpu": 0, "cuda": 1}

# Steps between garbage collections, on all ranks at once: a rank that stops for one has the others wait at the next
# collective. A step leaves little behind (nothing; with full recompute seven small objects a layer and micro-batch, no
# tensor), so that 100 steps take milliseconds to go through.
COLLECT_EVERY_STEPS = 100


@dataclass
class Progress:
    """How far the run is: what a checkpoint stores beside the optimizer's state."""

    step: int = 0
    consumed_samples: int = 0
    samples_digest: str = ""

    def to_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As JSON values."""
        return {
            "consumed_samples": self.consumed_samples,
            "samples_digest": self.samples_digest,
            "optimizer": optimizer.scalar_state(),
        }


@dataclass(frozen=True)
class PendingStep:
    """A step that has been launched and whose numbers nobody has read yet."""

    step: int
    report: StepReport
    stop: Tensor
    """Device scalar: how many ranks had received a stop signal."""
    consumed_samples: int
    samples_digest: str


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)  # USR1: Slurm's early warning


class StopSignal:
    """TERM, INT, HUP or USR1 asks the run to save and leave; the handler only notes it.

    The launcher's ranks are born with these signals blocked, so that none is lost while they start.
    """

    def __init__(self) -> None:
        self.received = False
        self.before = {}
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                self.before[number] = signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


@contextmanager
def garbage_collected_by_hand() -> Iterator[None]:
    """No garbage collection but those that the loop asks for, which do not look at what was there before.

    Left alone, Python's collector stops a rank at any moment to go through the modules, tables and closures of
    the set-up, all of which stay: 50 ms here, half a second in nanochat's log (dev/LOG.md).
    """
    enabled, frozen = gc.isenabled(), gc.get_freeze_count()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        if not frozen:  # by somebody else, before
            gc.unfreeze()
        if enabled:
            gc.enable()


def every(interval: int | None, step: int, config: Config) -> bool:
    """Whether something that happens every ``interval`` steps, and always after the last one, happens now."""
    return step == config.train.num_steps or (interval is not None and step % interval == 0)


def train(prepared: Prepared, ctx: ParallelContext) -> int:
    """Train from wherever the run stands to its end; return the exit code (0, or 75 after a stop signal)."""
    return Run(prepared, ctx).train()


class Run:
    """One process's part of a run: the objects that live as long as the loop."""

    def __init__(self, prepared: Prepared, ctx: ParallelContext) -> None:
        config = prepared.config
        self.prepared, self.config, self.ctx = prepared, config, ctx
        self.model, self.optimizer = build(config, ctx)
        self.progress = self._load_state()
        self.data = open_train_data(config, note=say if ctx.world.rank == 0 else lambda text: None)
        self.data.prepare(self.progress.consumed_samples, config.train.global_batch_size)
        self.batches = ReadAhead(
            self.data,
            config.train.num_steps * config.train.global_batch_size,
            config.train.micro_batch_size,
            config.grad_accum(ctx.world.size),
            ctx.dp.rank,
            ctx.dp.size,
        )
        self.valid = open_valid_data(config)
        tokenizer = prepared.tokenizer
        self.piece_bytes: Tensor | None = None
        if tokenizer is not None and self.valid:
            assert config.model.vocab_size is not None
            self.piece_bytes = torch.zeros(config.model.vocab_size, dtype=torch.int64, device=ctx.device)
            self.piece_bytes[: tokenizer.vocab_size] = torch.from_numpy(tokenizer.piece_bytes()).to(ctx.device)
        self.pending: list[PendingStep] = []
        self.skips_in_a_row = 0
        self.clock = time.perf_counter()

    def _load_state(self) -> Progress:
        """The newest checkpoint of this run, else the weights of ``checkpoint.init_from``, else a new model."""
        manifest = self.prepared.resume or self.prepared.init_from
        if manifest is None:
            return Progress()
        resumed = manifest is self.prepared.resume
        kinds = STATE_KINDS if resumed else {"weight"}
        load_shards(manifest, self.optimizer.shards(), model=self.config.model, kinds=kinds, ctx=self.ctx)
        self.optimizer.copy_params_from_masters()
        if not resumed:
            return Progress()
        self.optimizer.load_scalar_state(manifest.state["optimizer"])
        return Progress(manifest.step, manifest.state["consumed_samples"], manifest.state["samples_digest"])

    def train(self) -> int:
        """The loop."""
        config, ctx, progress = self.config, self.ctx, self.progress
        stop_signal = StopSignal()
        try:
            with self._reporter() as self.reporter, garbage_collected_by_hand():
                self.clock = time.perf_counter()
                for step in range(progress.step + 1, config.train.num_steps + 1):
                    report = train_step(self.model, self.optimizer, self._next_batches(), config, step, ctx)
                    self._launched(step, report, stop_signal.received)
                    evaluates = bool(self.valid) and every(config.train.eval_interval_steps, step, config)
                    saves = every(config.checkpoint.save_interval_steps, step, config)
                    lag = 0 if evaluates or saves else READ_LAG_STEPS[ctx.device.type]
                    stopped = self._read(lag, self._evaluate if evaluates else None)
                    if saves or stopped:
                        self._read(0)  # every line up to here is written before the checkpoint is committed
                        self._save()
                    if evaluates or saves or step % COLLECT_EVERY_STEPS == 0:
                        self._collect_garbage()
                    if stopped and step < config.train.num_steps:
                        return EXIT_STOPPED_BY_SIGNAL
            return 0
        finally:
            stop_signal.restore()

    # ---- one step's surroundings -----------------------------------------------------------------------------------

    def _next_batches(self) -> list[Batch[Tensor]]:
        """This rank's micro-batches of the next step, on the device."""
        return [batch.to(self.ctx.device) for batch in self.batches.get(self.progress.consumed_samples)]

    def _launched(self, step: int, report: StepReport, stop_received: bool) -> None:
        """Account for a step whose numbers may still be under way; ask all ranks whether one must stop."""
        progress, size = self.progress, self.config.train.global_batch_size
        ids = self.data.sample_ids(progress.consumed_samples, size)
        progress.step, progress.consumed_samples = step, progress.consumed_samples + size
        progress.samples_digest = chain_digest(progress.samples_digest, ids, self.data.fingerprints)
        stop = torch.full((), float(stop_received), device=self.ctx.device)  # a fill: no copy to wait for
        all_reduce(stop, self.ctx.world)
        self.pending.append(PendingStep(step, report, stop, progress.consumed_samples, progress.samples_digest))

    def _read(self, lag: int, evaluate_last: Any = None) -> bool:
        """Read launched steps, oldest first, until ``lag`` are left; return whether some rank must stop.

        All ranks read the same numbers in the same order, so all decide the same.
        """
        stopped = False
        while len(self.pending) > lag:
            done = self.pending.pop(0)
            loss, grad_norm = done.report.loss.item(), done.report.grad_norm.item()
            applied = bool(done.report.applied.item())
            stopped |= done.stop.item() > 0
            seconds = time.perf_counter() - self.clock
            valid = evaluate_last() if evaluate_last is not None and not self.pending else {}
            self.clock = time.perf_counter()  # evaluation does not count
            if self.reporter is not None:
                self.reporter.step(
                    {
                        "step": done.step,
                        "loss": loss,
                        "grad_norm": grad_norm,
                        "lr": done.report.lr,
                        "skipped": not applied,
                        "consumed_samples": done.consumed_samples,
                        "consumed_tokens": done.consumed_samples * self.config.data.seq_length,
                        "tokens_per_second": self.config.tokens_per_step / seconds,
                        "samples_digest": done.samples_digest,
                    },
                    valid,
                )
            self._count_skips(done.step, applied, grad_norm)
        return stopped

    def _count_skips(self, step: int, applied: bool, grad_norm: float) -> None:
        self.skips_in_a_row = 0 if applied else self.skips_in_a_row + 1
        if self.skips_in_a_row >= self.config.train.max_consecutive_skips:
            raise NonFiniteError(
                1,
                f"step {step}: grad_norm={grad_norm}",
                f"was not finite for {self.skips_in_a_row} steps in a row (train.max_consecutive_skips)",
                "lower optimizer.lr, lengthen the warm-up or look at these samples",
            )

    def _evaluate(self) -> dict[str, float | None]:
        results: dict[str, float | None] = {}
        for data in self.valid:
            result = evaluate(
                self.model,
                data,
                self.config.train.micro_batch_size,
                self.piece_bytes,
                self.ctx,
            )
            results |= result.metrics(data.name)
        return results

    def _save(self) -> None:
        """Write a checkpoint of the present step; its time does not count as training."""
        start = time.perf_counter()
        if self.reporter is not None:
            self.reporter.sync()
        folder = save_checkpoint(
            checkpoints_folder(self.config),
            self.progress.step,
            self.optimizer.shards(),
            model=self.config.model,
            config_tree=config_to_tree(self.config),
            state=self.progress.to_state(self.optimizer),
            tokenizer=self.prepared.tokenizer,
            ctx=self.ctx,
            keep_last=self.config.checkpoint.keep_last,
        )
        if self.reporter is not None:
            self.reporter.say(f"saved {folder}")
        self.clock += time.perf_counter() - start

    def _collect_garbage(self) -> None:
        """Its time does not count as training; on a GPU the step that has been launched goes on behind."""
        start = time.perf_counter()
        gc.collect()
        self.clock += time.perf_counter() - start

    def _reporter(self) -> Any:
        """Rank 0 reports; the others get None."""
        if self.ctx.world.rank != 0:
            return nullcontext(None)
        config, device = self.config, self.ctx.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        flops = flops_per_token(config.model, config.data.seq_length)
        return Reporter(config, self.progress.step, flops, peak_tflops(config, name), self.ctx.world.size)


def kernel_requirements(config: Config, device: torch.device) -> Requirements:
    """What this run asks of its kernels on each rank."""
    at = config.placement()
    return Requirements(
        device,
        DTYPES[config.train.precision],
        config.data.attention_mask,
        heads=at.heads_local,
        groups=at.groups_local,
        head_size=config.model.head_size,
        deterministic=config.kernels.deterministic,
        compile=config.kernels.compile,
    )


def build(config: Config, ctx: ParallelContext) -> tuple[Stage, Optimizer]:
    """Model and optimizer of this rank, with the initial weights that the seed defines."""
    placement, dtype = config.placement(ctx.tp.rank), DTYPES[config.train.precision]
    required = kernel_requirements(config, ctx.device)
    table = parameter_table(config.model, placement)
    store = FlatStore(table, dtype, ctx, config.parallel.gradient_bucket_bytes)
    model = build_stage(
        config.model,
        ctx,
        placement,
        dtype=dtype,
        operations=select_operations(config.kernels, required),
        kernels=config.kernels,
        recompute=plan_recompute(config),
        store=store,
    )
    store.check(model)
    initialise(model, table, config.train.seed)
    loss_scaling, kernels = config.train.precision == "fp16", select_optimizer_kernels(config.kernels, required)
    return model, Optimizer(store, config.optimizer, loss_scaling, kernels)
