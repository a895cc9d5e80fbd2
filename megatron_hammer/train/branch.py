"""Starts a child run from a checkpoint of another run (annealing, a longer context); the parent stays as it is.

::

    PARENT/checkpoints/step-N --copy--> CHILD/checkpoints/step-N     CHILD/branch.yaml: the parent's config, what it has
    PARENT/metrics.jsonl, up to N ----> CHILD/metrics.jsonl          drawn from as data.phases, and what is changed
                                                                     CHILD/branch.sh: the command that trains it

The mix, ``seq_length`` and RoPE of the child are a further phase: each source goes on where the parent left it. With a
budget in tokens the learning rate falls linearly over it from that of step N to ``optimizer.min_lr``, whatever the
parent's schedule was. The checkpoint is the parent's, config included, so that the child's first start reports and
records what has changed, as any resumed run does. Needs no torch.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.base.files import copy_folder, replace_file, staged_folder, sync_folder
from megatron_hammer.checkpoint.fit import check_fits, check_style
from megatron_hammer.checkpoint.folder import open_checkpoint, run_of, step_name
from megatron_hammer.checkpoint.kinds import STATE_KINDS
from megatron_hammer.checkpoint.manifest import Manifest, check_resumable
from megatron_hammer.config import Config, config_from_tree, to_yaml
from megatron_hammer.config.phases import tokens_before
from megatron_hammer.config.reading import with_overrides
from megatron_hammer.config.settings import PhaseConfig
from megatron_hammer.metrics.metrics_file import METRICS, read_lines
from megatron_hammer.optim.schedule import learning_rate
from megatron_hammer.train.changes import changed_settings
from megatron_hammer.train.past import in_phases, past_phases

CONFIG, SCRIPT = "branch.yaml", "branch.sh"
MOST_TOKENS = 10**18  # of a branch: ten thousand times what any model has been trained on


@dataclass(frozen=True)
class Branch:
    """A child run that has been made."""

    output: Path
    parent: Manifest
    config: Config
    accepted: tuple[str, ...]
    """Settings that are not as in the parent and must be accepted when the child starts."""

    def describe(self) -> list[str]:
        """Lines for people."""
        config, step, last = self.config, self.parent.step, self.config.train.num_steps
        lines = [f"{self.output}: a branch of {self.parent.folder}, steps {step + 1:,} to {last:,}"]
        rates = [learning_rate(config, at) for at in (step + 1, last)]
        lines.append(f"learning rate {rates[0]:.6g} at step {step + 1:,}, {rates[1]:.6g} at step {last:,}")
        lines += [f"must be accepted, and is by {self.output / SCRIPT}: {name}" for name in self.accepted]
        return [*lines, f"train it: bash {shlex.quote(str(self.output / SCRIPT))}"]


def make_branch(
    run: str | Path, step: int | None, output: str | Path, overrides: Sequence[str] = (), tokens: int | None = None
) -> Branch:
    """Make the folder of a child run.

    Args:
        run: the parent, or one of its checkpoints.
        step: of the parent's checkpoint; None: the newest.
        output: a new or empty folder.
        overrides: settings that the child has otherwise.
        tokens: its length from there; None: ``train.num_steps`` and the schedule say it.

    Raises:
        ConfigError: E201 the output is in use or the budget is none; or a setting is wrong.
        CheckpointError: there is no such checkpoint, no run can go on from it, or the child's model or optimizer is
            another one.
    """
    folder, parent = Path(output), open_checkpoint(run, step)
    check_resumable(parent)
    inside = (run_of(parent.folder) or parent.folder).resolve()
    if folder.resolve().is_relative_to(inside):
        raise ConfigError(1, f"--output {folder}", f"lies in {inside}, the parent", "name a folder outside of it")
    if any(override.startswith("train.output=") for override in overrides):
        raise ConfigError(1, "train.output", "is what --output names", "leave it out")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(1, f"--output {folder}", "is there, and not empty", "name a new folder")
    if tokens is not None and not 1 <= tokens <= MOST_TOKENS:
        rule = f"must be at least 1, and at most {MOST_TOKENS:g}"
        raise ConfigError(1, f"--tokens {tokens}", rule, "give the tokens that the branch trains on")
    saved = config_from_tree(parent.config)
    child = _child(saved, parent, [*overrides, f"train.output={folder}"])
    child = child if tokens is None else _annealed(child, saved, parent, tokens, overrides)
    child.check_groups()
    child.check_phase_ends(parent.state["consumed_samples"])
    check_style(parent, child.optimizer.style)
    check_fits(parent, child.after_samples(parent.state["consumed_samples"]).model, STATE_KINDS)
    if child.train.num_steps <= parent.step:
        what = f"train.num_steps={child.train.num_steps}"
        raise ConfigError(
            1, what, f"must be above {parent.step}, where the branch begins", "raise it, or give --tokens"
        )
    accepted = tuple(name for change in changed_settings(saved, child) for name in change.accepted_by[:1])
    branch = Branch(folder, parent, child, accepted)
    with staged_folder(folder) as staging:
        _write(branch, staging)
    return branch


def _child(saved: Config, parent: Manifest, overrides: Sequence[str]) -> Config:
    """The parent's config with what is overridden; another mix, length or RoPE as a further phase."""
    tree = dict(parent.config)
    named = {override.partition("=")[0] for override in overrides}
    if "data.phases" in named or "data.train" in named:  # one takes the place of the other
        tree["data"] = {**tree["data"], "train": None, "phases": None}
    child = with_overrides(tree, overrides)
    if "data.phases" in named:
        return child
    has_rope = any(name.startswith("model.rope_") for name in named)
    if not (named & {"data.train", "data.weights", "data.seq_length"} or has_rope):
        return child
    present = saved.phases[-1]
    further = PhaseConfig(
        child.data.train or dict(present.train),
        weights=child.data.weights,
        seq_length=child.data.seq_length if "data.seq_length" in named else present.seq_length,
        rope_theta=child.model.rope_theta if "model.rope_theta" in named else None,
        rope_scaling=child.model.rope_scaling if any(n.startswith("model.rope_scaling") for n in named) else None,
    )
    theta, scaling = saved.model.rope_theta, saved.model.rope_scaling
    child = dataclasses.replace(
        child,
        data=dataclasses.replace(child.data, seq_length=saved.data.seq_length),
        model=dataclasses.replace(child.model, rope_theta=theta, rope_scaling=scaling),
    )
    return in_phases(child, [*past_phases(saved, parent.state["consumed_samples"]), further])


def _annealed(child: Config, saved: Config, parent: Manifest, tokens: int, overrides: Sequence[str]) -> Config:
    """The child with a length of so many tokens, and a learning rate that goes to its floor over them."""
    consumed, phases, batches = parent.state["consumed_samples"], child.phases, child.batch_sizes
    wanted = tokens_before(phases, consumed) + tokens
    steps = bisect_left(range(tokens), wanted, key=lambda n: tokens_before(phases, batches.samples(n, consumed)))
    last = parent.step + steps
    schedule = dataclasses.replace(child.schedule, style="wsd", warmup_steps=0, decay_steps=last, anneal_steps=steps)
    optimizer = child.optimizer
    if not any(override.startswith("optimizer.lr=") for override in overrides):
        rate = learning_rate(saved, parent.step)
        at_floor = math.isclose(rate, optimizer.min_lr, rel_tol=1e-12)  # a descent may end a rounding below it
        optimizer = dataclasses.replace(optimizer, lr=optimizer.min_lr if at_floor else rate)
    train = dataclasses.replace(child.train, num_steps=last)
    return dataclasses.replace(child, schedule=schedule, optimizer=optimizer, train=train)


def _write(branch: Branch, staging: Path) -> None:
    parent, step = branch.parent, branch.parent.step
    target = staging / "checkpoints" / step_name(step)
    target.mkdir(parents=True)
    copy_folder(parent.folder, target)
    sync_folder(target.parent)
    metrics = parent.folder.parent.parent / METRICS
    replace_file(staging / METRICS, read_lines(metrics).content(up_to=step))
    header = f"# A branch of {parent.folder} (step {step}, digest {parent.digest}); {SCRIPT} trains it.\n"
    replace_file(staging / CONFIG, (header + to_yaml(branch.config)).encode())
    options = "".join(f" --accept {name}" for name in branch.accepted)
    script = (
        "#!/usr/bin/env bash\n"
        f"# Trains the branch of {parent.folder}; again to go on. PYTHON and NPROC choose interpreter and ranks.\n"
        "set -euo pipefail\n"
        f'exec "${{PYTHON:-python}}" -m megatron_hammer.launch --nproc "${{NPROC:-1}}"{options} '
        f'{shlex.quote(str(branch.output / CONFIG))} "$@"\n'
    )
    replace_file(staging / SCRIPT, script.encode())
