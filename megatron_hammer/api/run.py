"""A training run as an object: opened, trained a few steps at a time, evaluated, asked for text, saved, exported.

::

    open_run(config)    the same inputs, lock, checkpoint and objects as ``python -m megatron_hammer.train`` (RankRun)
    run.train(steps)    the same loop (Training.advance), so the same bits; every interval of the config is kept
    run.save()          the same checkpoint: the program goes on from it, bit for bit
    run.close()         gives back the lock of train.output and all memory; so does every error in a step

One process, on a CPU or one GPU: several ranks are for the programs. Nothing outlives a closed run, so any number of
them may follow each other in one process.
"""

from __future__ import annotations

import dataclasses
import gc
import signal
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from megatron_hammer.base.errors import ConfigError, RefusedError, from_exception
from megatron_hammer.base.signals import StopRequest
from megatron_hammer.checkpoint.dtypes import DTYPES, PRECISION_DTYPES
from megatron_hammer.checkpoint.folder import step_of
from megatron_hammer.checkpoint.live_weights import live_weights
from megatron_hammer.config import Config, config_to_tree
from megatron_hammer.huggingface.export import Prove, export_hf, parse_size
from megatron_hammer.huggingface.exported_tokenizer import TokenizerForm
from megatron_hammer.huggingface.generate import Continuation, Sampling, continue_texts
from megatron_hammer.huggingface.text_model import Begin, TextModel, text_model_of
from megatron_hammer.model.llama import Stage
from megatron_hammer.optim.optimizer import Optimizer
from megatron_hammer.parallel.agreement import BeforeStart
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.sampling.batch import Batch
from megatron_hammer.sampling.plan import RunPlan
from megatron_hammer.sampling.samples import TrainData, check_tokenizer, open_valid_data
from megatron_hammer.tokenizer.interface import Tokenizer
from megatron_hammer.train import loop
from megatron_hammer.train.begin import Beginning
from megatron_hammer.train.evaluate import ValidResult
from megatron_hammer.train.run import RankRun
from megatron_hammer.train.stopping import CutShort
from megatron_hammer.train.training import Training

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
"""Types that ids may have."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, or a notebook's stop button, during a step or an evaluation, which the run has survived.

    A ``KeyboardInterrupt``, so that nothing takes it for an error of the run. A second one while the first is being
    answered ends the step in the middle, and closes the run.
    """

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows."""
        return [f"interrupted: {self}"]


def open_run(config: Config, *, accept: Collection[str] = (), check_data: bool = True) -> Run:
    """Open a run in this process: new in ``train.output``, or from its newest checkpoint. Reads; never communicates.

    Config, tokenizer and datasets are checked as the training program checks them, the lock of ``train.output`` is
    taken, model and optimizer are built, and what the program prints at its start is printed.

    Args:
        config: as ``load_config`` gives it, for one process.
        accept: names of what may differ from the checkpoint that the run goes on from, as ``--accept``.
        check_data: False to open the datasets without reading all ids.

    Raises:
        HammerError: what the program would end with: ``error.code`` is the documented number. Nothing stays open.
    """
    if not isinstance(config, Config):
        remedy = "give what load_config returns: open_run(load_config('tiny', {...}))"
        raise ConfigError(25, f"open_run({config!r:.80})", "is no Config", remedy)
    if config.train.dry_run:
        raise ConfigError(25, "train.dry_run=true", "opens no run", "print(dry_run(config)), or leave it out")
    with ExitStack() as held, _documented():
        return Run(held, config, (accept,) if isinstance(accept, str) else accept, check_data)


class Run:
    """An open run; ``open_run`` makes one. A context manager that closes it.

    Attributes are the very objects that train: what is changed in them is trained on.
    """

    def __init__(self, held: ExitStack, config: Config, accept: Collection[str], check_data: bool) -> None:
        lines: list[dict[str, Any]] = []
        self.lines = lines
        """The metrics of every step since the run was opened, as ``train`` returns them."""
        self._ended = ""
        self._rank = RankRun(Beginning(BeforeStart(None, 0, 1), held, config, 0, check_data, accept))
        begin = partial(self._rank.begin, when_finished=True)
        training = Training(
            self._rank.prepared,
            ParallelContext.single(self._rank.device),
            begin,
            heard=lambda line: lines.append(dict(line)),
        )
        self._training: Training | None = held.enter_context(training)
        self._held = held.pop_all()
        weakref.finalize(self, self._held.close)  # a run that is forgotten keeps no lock

    # ---- what there is ---------------------------------------------------------------------------------------------

    @property
    def config(self) -> Config:
        """The config that is run: with ``model.vocab_size``, and where the run goes on with the end of its schedule."""
        return self._open.config

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None where ``tokenizer.path`` is not set."""
        return self._open.prepared.tokenizer

    @property
    def plan(self) -> RunPlan | None:
        """What the run draws from each source; None where ``check_data`` was False."""
        return self._open.prepared.plan

    @property
    def model(self) -> Stage:
        """A ``torch.nn.Module``: ``model(tokens, labels)``, [b, s] int64 both, gives the loss of each token, [b, s]
        fp32."""
        return self._open.stages[0]

    @property
    def optimizer(self) -> Optimizer:
        """Weights, gradients and moments in flat buffers, fp32 masters."""
        return self._open.optimizer

    @property
    def data(self) -> TrainData:
        """The training samples in their order: ``data.read(first, count)`` gives any of them."""
        return self._open.data

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._open.ctx.device

    @property
    def steps_done(self) -> int:
        """Steps of the whole run so far, those before it was opened included."""
        return self._open.state.step

    @property
    def is_finished(self) -> bool:
        """Whether ``train.num_steps`` are done."""
        return self.steps_done >= self.config.train.num_steps

    def __repr__(self) -> str:
        if self._training is None:
            return f"<Run, closed{self._ended}>"
        done, steps = self.steps_done, self.config.train.num_steps
        return f"<Run of {self.config.train.output}: step {done:,} of {steps:,}, on {self.device}>"

    def batches(self) -> list[Batch[Tensor]]:
        """The micro-batches of the next step, on the device: ``tokens`` and ``labels``, [b, s] int64. They stay the
        next step's: looking consumes nothing.

        Raises:
            ConfigError: E225 there is no next step.
        """
        run = self._open
        if self.is_finished:
            raise self._no_steps_left()
        return run.next_batches()

    # ---- training --------------------------------------------------------------------------------------------------

    def train(self, steps: int | None = None) -> list[dict[str, Any]]:
        """Go on by some steps, None: to ``train.num_steps``. Evaluates, saves and reports as the config says.

        Ctrl-C, or a notebook's stop button, ends it after the present step: ``Interrupted``, and the run goes on with
        the next call.

        Returns:
            of each step that was done, its line of metrics.jsonl: ``step``, ``loss``, ``grad_norm``, ``lr``,
            ``tokens_per_second`` and more; floats may be infinite or NaN.

        Raises:
            ConfigError: E225 fewer steps are left.
            HammerError: what the program would end with. The run is closed then, and its checkpoints stay.
        """
        run, before = self._open, len(self.lines)
        steps_left = run.config.train.num_steps - run.state.step
        if steps is not None:
            if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
                raise ConfigError(25, f"train(steps={steps!r})", "must be a whole number from 1", "write train(10)")
            if steps > steps_left:
                raise self._no_steps_left(steps)
        assert self._training is not None
        with self._ends_with_an_error(), _interruptible() as stop:
            last = None if steps is None else run.state.step + steps
            stopped = self._training.advance(last, stop, save_when_stopped=False)
        if stopped:
            raise Interrupted(f"step {self.steps_done} is complete, nothing is lost: train() goes on, save() keeps it")
        return self.lines[before:]

    def step(self) -> dict[str, Any]:
        """One step; its line of metrics, as ``train``."""
        return self.train(1)[-1]

    def _no_steps_left(self, asked: int = 1) -> ConfigError:
        steps, done = self.config.train.num_steps, self.steps_done
        return ConfigError(
            25,
            f"train(steps={asked})",
            f"goes beyond train.num_steps={steps}: {done} steps are done",
            f"close the run and open it with train.num_steps={done + asked} or more; train() goes to the end",
        )

    # ---- looking ---------------------------------------------------------------------------------------------------

    def evaluate(
        self, sets: str | Collection[str] | Mapping[str, str | Path] | None = None, samples: int | None = None
    ) -> dict[str, ValidResult]:
        """Loss, perplexity and bits per byte on validation sets; changes nothing of the run.

        Args:
            sets: names of ``data.valid``, None: all; or name -> prefix of another dataset of the same tokenizer.
            samples: of each set at most so many; None: ``train.eval_samples``.

        Raises:
            ConfigError: E225 there is no such set.
            DataError, RefusedError: a dataset that cannot be read, or is another tokenizer's.
        """
        run = self._open
        known = run.config.data.valid or {}
        if samples is not None and samples < 1:
            raise ConfigError(25, f"evaluate(samples={samples})", "must be at least 1", "raise it, or leave it out")
        if sets is not None and not isinstance(sets, str | Collection):
            raise ConfigError(25, f"evaluate({sets!r:.80})", "names no set", f"use {', '.join(known) or 'a mapping'}")
        if isinstance(sets, Mapping):
            chosen = {str(name): str(prefix) for name, prefix in sets.items()}
        else:
            names = list(known) if sets is None else [sets] if isinstance(sets, str) else list(sets)
            if missing := next((name for name in names if name not in known), None):
                remedy = "name a dataset: evaluate({'new': 'data/new_text_document'})"
                remedy = f"use {', '.join(known)}; or {remedy}" if known else remedy
                raise ConfigError(25, f"evaluate({missing!r})", "is no set of data.valid", remedy)
            chosen = {name: known[name] for name in names}
        with _documented(), _interruptible() as stop:
            valid = open_valid_data(run.config, chosen, samples)
            for data in valid if isinstance(sets, Mapping) else ():  # those of data.valid were looked at before
                fingerprint = None if self.tokenizer is None else self.tokenizer.fingerprint
                check_tokenizer(data.dataset, fingerprint, self.model.vocab_size)
            try:
                return run.measure(valid, stop)
            except CutShort:
                raise Interrupted("the evaluation was given up; the run is as it was") from None

    @torch.no_grad()
    def logits(self, tokens: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """[b, s] ids -> [b, s, v], what the model gives the next token of each place; on the run's device.

        Args:
            tokens: integers below ``model.vocab_size``; a tensor or nested lists.

        Raises:
            ConfigError: E225 another shape or type, or an id that the model does not have.
        """
        run = self._open
        remedy = "give [b, s] integers: torch.tensor([run.tokenizer.encode(text)])"
        try:
            given = torch.as_tensor(tokens)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(25, "logits(tokens)", f"takes a batch of ids ({error})", remedy) from None
        if given.ndim != 2 or not given.numel() or given.dtype not in INTEGERS:
            what = f"logits(tokens of shape {tuple(given.shape)} and type {given.dtype})"
            raise ConfigError(25, what, "is no batch of ids", remedy)
        vocab_size, low, high = self.model.vocab_size, int(given.min()), int(given.max())
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise ConfigError(25, f"logits(id {wrong})", f"is not in [0, {vocab_size})", "encode with run.tokenizer")
        with _documented():
            return run.stages[0].logits(given.to(run.ctx.device, torch.int64))

    def text_model(self, begin: Begin = "auto", dtype: str | None = None) -> TextModel:
        """The model as it is now, in the class of transformers, for ``continue_texts``. Memory: the model once more.

        Args:
            begin: what prompts begin with; "auto": as documents did in training.
            dtype: of the weights, "bfloat16", "float16" or "float32"; None: as an export of this run would have them.

        Raises:
            ConfigError: E207 the run has no tokenizer.
        """
        run = self._open
        config, tokenizer = run.config, run.prepared.tokenizer
        if tokenizer is None:
            remedy = "open the run with tokenizer.path set to what made its data"
            raise ConfigError(7, "tokenizer.path", "is not set, so no text can be continued", remedy)
        name = PRECISION_DTYPES[config.train.precision] if dtype is None else dtype
        _check_choice("dtype", name, DTYPES)
        _check_choice("begin", begin, get_args(Begin))
        model = config.after_samples(run.state.consumed_samples).described_model
        with _documented():
            return text_model_of(
                model,
                tokenizer,
                config_to_tree(config),
                lambda: live_weights(run.optimizer.shards(), model, DTYPES[name]),
                name,
                repr(self),
                begin,
                str(run.ctx.device),
            )

    def generate(
        self,
        prompts: str | Sequence[str],
        sampling: Sampling | None = None,
        batch_size: int = 1,
        begin: Begin = "auto",
        **settings: float,
    ) -> list[Continuation]:
        """Continue texts with the model as it is now: the same tokens as ``tools/generate.py --load`` from a checkpoint
        of this step. Changes nothing of the run, nor of torch's random numbers.

        Args:
            prompts: one text or several.
            sampling: how tokens are chosen; None: ``Sampling()``.
            batch_size: prompts that are continued at once.
            begin: as for ``text_model``.
            settings: fields of ``Sampling``, in place of one: ``generate("x", max_new_tokens=20, temperature=0)``.

        Raises:
            ConfigError: E207 no tokenizer, E225 what cannot be meant, E245 a value out of range, E246 an empty prompt
                that cannot begin.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if wrong := next((text for text in texts if not isinstance(text, str)), None):
            raise ConfigError(25, f"generate({wrong!r:.80})", "is no text", "give texts; logits() takes ids")
        if sampling is not None and (settings or not isinstance(sampling, Sampling)):
            remedy = "give Sampling(temperature=0), or temperature=0 alone"
            raise ConfigError(25, f"generate(sampling={sampling!r:.80})", "is no Sampling, or not alone", remedy)
        known = [field.name for field in dataclasses.fields(Sampling)]
        if unknown := next((name for name in settings if name not in known), None):
            raise ConfigError(25, f"generate({unknown}=...)", "is no setting of Sampling", f"use {', '.join(known)}")
        chosen: dict[str, Any] = settings
        sampling = Sampling(**chosen) if sampling is None else sampling
        sampling.check()
        model = self.text_model(begin)
        devices = [self.device] if self.device.type == "cuda" else []
        with _documented(), torch.random.fork_rng(devices):
            return list(continue_texts(model, texts, sampling, batch_size))

    # ---- keeping ---------------------------------------------------------------------------------------------------

    def save(self) -> Path:
        """Save the present step, unless its checkpoint is there, and return its folder when it is durable.

        A checkpoint like the program's: it resumes from it with the same config. ``checkpoint.keep_last`` counts it.

        Raises:
            ConfigError: E225 no step is done yet.
            HammerError: it could not be saved. The run is closed then.
        """
        run = self._open
        if run.newest is not None and step_of(run.newest) == run.state.step:
            return run.newest
        if run.state.step == 0:
            raise ConfigError(25, "save()", "has nothing to save before the first step", "call train(1) first")
        with self._ends_with_an_error():
            run.save()
        assert run.newest is not None
        return run.newest

    def export(
        self,
        output: str | Path,
        dtype: str | None = None,
        max_shard_size: str = "5GB",
        tokenizer: TokenizerForm = "exact",
        prove: Prove | None = None,
    ) -> dict[str, Any]:
        """Save the present step and write it as a Hugging Face folder, proved to be the same model before it is there.

        Args:
            output: a new folder, or an earlier export to replace.
            dtype: "bfloat16", "float16" or "float32"; None: as it is trained.
            max_shard_size, tokenizer: as of ``tools/checkpoint_to_hf.py``.
            prove: as ``export_hf`` takes it; None: a process of its own.

        Returns:
            the certificate, as ``certificate.json`` has it.

        Raises:
            RefusedError: the output is somebody else's, or not the same model: nothing is left there.
        """
        if dtype is not None:
            _check_choice("dtype", dtype, DTYPES)
        _check_choice("tokenizer", tokenizer, get_args(TokenizerForm))
        size, checkpoint = parse_size(max_shard_size), self.save()
        with _documented():
            return export_hf(checkpoint, output, dtype, size, tokenizer=tokenizer, prove=prove)

    # ---- the end ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Give back the lock of ``train.output``, files and memory. Saves nothing. May be called again."""
        if self._training is not None:
            self._close("", (None, None, None))

    def __enter__(self) -> Run:
        assert self._open is not None
        return self

    def __exit__(self, *error: Any) -> None:
        if self._training is not None:
            kind = error[0]
            self._close("" if kind is None else f" after {kind.__name__}", error)

    def _close(self, why: str, error: Any) -> None:
        self._ended, self._training = why, None
        try:
            self._held.__exit__(*error)
        finally:
            gc.collect()

    @property
    def _open(self) -> loop.TrainLoop:
        """The loop's run.

        Raises:
            RefusedError: E545 this one is closed.
        """
        if self._training is None or self._training.loop is None:
            output = self._rank.prepared.config.train.output
            remedy = "open it again: open_run(config) goes on from its newest checkpoint"
            raise RefusedError(45, f"the run of {output}", f"is closed{self._ended}", remedy)
        return self._training.loop

    @contextmanager
    def _ends_with_an_error(self) -> Iterator[None]:
        """The block computes; an error in the middle leaves a state that nobody knows: the run is closed."""
        try:
            with _documented(), self._rank.explained():
                yield
        except BaseException as error:
            code = getattr(error, "code", type(error).__name__)
            self._close(f", since a step ended with {code}", (type(error), error, error.__traceback__))
            raise


def _check_choice(name: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise ConfigError(25, f"{name}={value!r:.80}", f"is none of {', '.join(choices)}", "choose one of these")


@contextmanager
def _documented() -> Iterator[None]:
    """What the machine causes in the block is one of the documented errors, as at the end of a program."""
    try:
        yield
    except Exception as error:
        known = from_exception(error, "the run")
        if known is None or known is error:
            raise
        raise known from error


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C is noted while the block runs, a second one acts as before; a thread gets no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    with StopRequest((signal.SIGINT,), once=True, takes_over=False) as request:
        yield lambda: request.received
