"""Going on with other settings, datasets or another tokenizer: said, refused, accepted by name, and remembered."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_hammer.base.errors import ConfigError, RefusedError
from megatron_hammer.base.files import canonical_json, hash_bytes
from megatron_hammer.checkpoint.folder import newest_checkpoint
from megatron_hammer.checkpoint.manifest import MANIFEST
from megatron_hammer.config import Config, Effect, setting_effects
from megatron_hammer.dataset.reader import IndexedDataset
from megatron_hammer.dataset.writer import IndexedWriter
from megatron_hammer.optim.schedule import learning_rate
from megatron_hammer.train.changes import changed_settings, changed_tokenizer, hold_horizon
from megatron_hammer.train.prepare import Prepared, prepare
from megatron_hammer.train.run import run_rank
from tests.model.tiny import tiny_config
from tests.train.runs import accepted_by, begin_run, config_for, metrics, overrides, run, train_here, write_dataset


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with datasets ``data/a, b, x, y`` and ``run``, which has done 4 of 12 steps on them."""
    folder = tmp_path_factory.mktemp("changes")
    begin_run(folder)
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path) -> Path:
    """A copy to change; the paths in the config are others, which makes no difference."""
    shutil.copytree(trained, tmp_path / "copy")
    return tmp_path / "copy"


def resume(folder: Path, *more: str) -> Prepared:
    """What a start with these arguments would do; ``train.num_steps`` is 12."""
    arguments = overrides(folder / "data", folder / "run", *more)
    return prepare(config_for(arguments), 1, accepted=accepted_by(arguments))


def refusal(folder: Path, *more: str) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        resume(folder, *more)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 5
    return caught.value


# ---- settings -------------------------------------------------------------------------------------------------------


def test_every_setting_says_what_changing_it_means() -> None:
    """``setting_effects`` fails on a field without an effect; these are the ones that must not move."""
    effects = setting_effects()
    assert set(effects) == {f"{g.name}.{f.name}" for g in dataclasses.fields(Config) for f in _fields(g.name)}
    needed = {name for name, effect in effects.items() if effect.must_be_accepted}
    assert needed == {
        "data.weights", "data.seq_length", "data.order", "data.attention_mask", "data.fim",
        *(f"optimizer.{n}" for n in ("lr", "min_lr", "weight_decay", "beta1", "beta2", "eps", "clip_grad",
                                     "loss_scale_window", "style", "muon_momentum", "muon_per_head",
                                     "newton_schulz")),
        *(f"schedule.{n}" for n in ("style", "warmup_steps", "decay_steps", "anneal_steps")),
        "kernels.fp8", "kernels.fp8_head", "train.batch_size_ramp", "train.global_batch_size", "train.seed",
        "train.precision", "train.z_loss",
    }  # fmt: skip
    for name in ("parallel.tensor_model_parallel_size", "kernels.attention", "log.interval_steps", "train.recompute"):
        assert effects[name] is Effect.FREE


def _fields(group: str) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(getattr(config_for(["model.vocab_size=301"]), group))


def test_an_unchanged_run_says_nothing(here: Path) -> None:
    prepared = resume(here, "schedule.decay_steps=12", "train.num_steps=4", f"train.output={here}/run")
    paths = ("train.output", "data.train[", "data.valid[")
    assert all(line.startswith(("changed against", *(f"  {path}" for path in paths))) for line in prepared.changes)
    assert not any("keeps its schedule" in note for note in prepared.notes) and prepared.accepted_changes == ()


CHANGES = [
    ("optimizer.lr=1e-3", "optimizer.lr=0.001 (was 0.003)"),
    ("optimizer.min_lr=1e-4", "optimizer.min_lr=0.0001 (was 0.0003)"),
    ("optimizer.weight_decay=0.2", "optimizer.weight_decay=0.2 (was 0.1)"),
    ("optimizer.beta1=0.8", "optimizer.beta1=0.8 (was 0.9)"),
    ("optimizer.beta2=0.99", "optimizer.beta2=0.99 (was 0.95)"),
    ("optimizer.eps=1e-6", "optimizer.eps=1e-06 (was 1e-08)"),
    ("optimizer.clip_grad=0.5", "optimizer.clip_grad=0.5 (was 1.0)"),
    ("schedule.style=linear", "schedule.style=linear (was cosine)"),
    ("schedule.warmup_steps=3", "schedule.warmup_steps=3 (was 2)"),
    ("schedule.decay_steps=20", "schedule.decay_steps=20 (was 12)"),
    ("train.global_batch_size=16", "train.global_batch_size=16 (was 8)"),
    ("train.precision=bf16", "train.precision=bf16 (was fp32)"),
    ("train.seed=5", "train.seed=5 (was 1234)"),
    ("train.z_loss=1e-4", "train.z_loss=0.0001 (was 0.0)"),
    ("data.attention_mask=document", "data.attention_mask=document (was causal)"),
    ("data.order=megatron", "data.order=megatron (was independent)"),
    ("data.seq_length=16", "data.seq_length=16 (was 32)"),
]


@pytest.mark.parametrize(("change", "said"), CHANGES)
def test_what_alters_the_run_must_be_accepted(trained: Path, change: str, said: str) -> None:
    """Refused with both values and the step; accepted under its own name only, printed, and put down."""
    name = change.split("=")[0]
    error = refusal(trained, change)
    assert error.number == 80 and said in str(error) and "from step 5 on" in str(error)
    assert f"--accept {name}" in str(error)
    refusal(trained, change, "--accept=optimizer.eps" if name != "optimizer.eps" else "--accept=optimizer.lr")
    prepared = resume(trained, change, f"--accept={name}")
    old, new = said.split("(was ")[1][:-1], said.split("=")[1].split(" ")[0]
    assert f"  {name}: {old} -> {new}   (accepted)" in prepared.changes
    assert {"from_step": 5, "what": name, "old": old, "new": new} in prepared.accepted_changes
    if name.startswith(("optimizer.lr", "schedule.", "optimizer.min_lr")):
        assert "learning rate of step 5: 0.00244351" in str(error) and any(
            "0.00244351" in line for line in prepared.changes
        )


def test_all_that_is_refused_is_said_at_once(trained: Path) -> None:
    changes = ("optimizer.lr=1e-3", "train.seed=5", "optimizer.clip_grad=0.5")
    error = refusal(trained, *changes, "--accept=train.seed")
    assert "--accept optimizer.lr --accept optimizer.clip_grad" in str(error) and "train.seed" not in str(error)
    accepted = ("--accept=train.seed", "--accept=optimizer.lr", "--accept=optimizer.clip_grad")
    assert len(resume(trained, *changes, *accepted).accepted_changes) == 3


def test_what_may_change_freely_is_said_and_goes_on(trained: Path) -> None:
    free = ("train.micro_batch_size=4", "log.interval_steps=1", "kernels.compile=none", "train.eval_samples=5",
            "checkpoint.keep_last=5", "parallel.timeout_seconds=30", "train.recompute=full", "kernels.rope=torch",
            "train.max_consecutive_skips=3", "optimizer.initial_loss_scale=4", "model.init_std=0.5")  # fmt: skip
    prepared = resume(trained, *free)
    assert (
        "  train.micro_batch_size: 2 -> 4" in prepared.changes and "  kernels.rope: auto -> torch" in prepared.changes
    )
    assert prepared.accepted_changes == () and not any("accepted" in line for line in prepared.changes)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("lr", "did you mean --accept optimizer.lr?"),
        ("optimizer.lrr", "did you mean --accept optimizer.lr?"),
        ("train.lr", "did you mean --accept optimizer.lr?"),
        ("dataset", "did you mean --accept data?"),
        ("model.num_layers", "cannot be accepted: the weights would be those of another model"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(trained: Path, name: str, answer: str) -> None:
    with pytest.raises(ConfigError, match=r"error\[E220\]") as caught:
        resume(trained, f"--accept={name}")
    assert answer in str(caught.value)


def test_needless_names_are_remarked_on_only(trained: Path, tmp_path: Path) -> None:
    """The same command resumes, also when what it accepts has long been accepted."""
    names = ("--accept=optimizer.lr", "--accept=log.interval_steps", "--accept=data", "--accept=tokenizer.path")
    told = "\n".join(resume(trained, *names).changes)
    for expected in ("optimizer.lr accepts nothing: it is as in the checkpoint", "data accepts nothing",
                     "log.interval_steps is not needed: it may", "--accept tokenizer is about"):  # fmt: skip
        assert expected in told
    new = overrides(trained / "data", tmp_path / "new", "train.num_steps=2")
    assert any("no checkpoint is resumed" in note for note in prepare(config_for(new), 1, accepted=["data"]).notes)


def test_what_is_not_used_needs_no_name(trained: Path) -> None:
    """The scale of fp16 in fp32; the end of a descent that stays where it was."""
    assert resume(trained, "optimizer.loss_scale_window=5").accepted_changes == ()
    assert resume(trained, "schedule.decay_steps=12").accepted_changes == ()
    a, b = (config_for(["model.vocab_size=9", "schedule.style=constant", f"optimizer.min_lr={m}"]) for m in (0, 1e-5))
    assert changed_settings(a, b) == []


def test_the_length_decides_in_megatron_s_order(here: Path) -> None:
    """And a run of the same length goes on in it."""
    out = here / "m"
    arguments = ("data.order=megatron", f"train.output={out}", "checkpoint.save_interval_steps=2")
    whole = overrides(here / "data", out, *arguments, "train.num_steps=3")
    assert train_here(0, whole) == 0
    lines = metrics(out)
    shutil.rmtree(out / "checkpoints" / "step-00000003")
    assert train_here(0, whole) == 0 and metrics(out) == lines
    assert "train.num_steps=12 (was 3)" in str(refusal(here, *arguments))
    assert resume(here, *arguments, "--accept=train.num_steps").accepted_changes[0]["what"] == "train.num_steps"


# ---- the schedule of a run that is extended -------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["cosine", "cosine-clamped", "linear", "wsd"])
def test_an_extended_run_keeps_its_schedule(here: Path, style: str) -> None:
    """More steps alone never raise the learning rate; the horizon stays through later starts, and can be moved."""
    out = here / style
    more = (f"schedule.style={style}", f"train.output={out}")
    assert train_here(0, overrides(here / "data", out, *more, "train.num_steps=4")) == 0
    longer = resume(here, *more, "train.num_steps=8")
    assert [learning_rate(longer.config, step) for step in (4, 5, 8)] == [pytest.approx(3e-4)] * 3
    note = next(note for note in longer.notes if "keeps its schedule" in note)
    assert "train.num_steps was 4 and is 8 now" in note and "ends at step 4" in note
    assert "schedule.decay_steps=8 --accept schedule.decay_steps" in note
    assert train_here(0, overrides(here / "data", out, *more, "train.num_steps=8")) == 0
    assert [line["lr"] for line in metrics(out)][4:] == [pytest.approx(3e-4)] * 4
    again = resume(here, *more, "train.num_steps=8")
    assert again.config.schedule.decay_steps == 4 and not any("keeps its schedule" in note for note in again.notes)
    error = refusal(here, *more, "train.num_steps=16", "schedule.decay_steps=16")
    assert "schedule.decay_steps=16 (was 4)" in str(error) and "learning rate of step 9: 0.0003 -> 0." in str(error)
    moved = resume(here, *more, "train.num_steps=16", "schedule.decay_steps=16", "--accept=schedule.decay_steps")
    assert learning_rate(moved.config, 9) > 3e-4


def test_a_run_cut_short_keeps_its_schedule(trained: Path) -> None:
    prepared = resume(trained, "train.num_steps=6")
    assert prepared.config.schedule.decay_steps == 12


def test_a_constant_rate_has_no_horizon(here: Path) -> None:
    more = ("schedule.style=constant", f"train.output={here}/constant")
    assert train_here(0, overrides(here / "data", here / "constant", *more, "train.num_steps=2")) == 0
    prepared = resume(here, *more)
    assert prepared.config.schedule.decay_steps is None and not any("schedule" in note for note in prepared.notes)


# ---- data -----------------------------------------------------------------------------------------------------------


def rewrite(prefix: Path, how: str, header: bool = True) -> None:
    """Make a dataset again behind its path: other text, more, less, or the same documents in another order."""
    dataset = IndexedDataset(prefix)
    documents = [np.array(dataset.read(i)) for i in range(dataset.num_sequences)]
    match how:
        case "other text":
            documents[0] = (documents[0] + 1) % 301
        case "grown":
            documents.append(documents[0])
        case "shrunk":
            documents.pop()
        case "reordered":
            documents.reverse()
    del dataset
    for suffix in (".bin", ".idx", ".meta.json"):
        Path(f"{prefix}{suffix}").unlink(missing_ok=True)
    with IndexedWriter(prefix, vocab_size=301) as writer:
        for tokens in documents:
            writer.add(tokens, [len(tokens)])
    if not header:
        Path(f"{prefix}.meta.json").unlink(missing_ok=True)


@pytest.mark.parametrize("name", ["a", "b", "x", "y"])
@pytest.mark.parametrize("how", ["other text", "grown", "shrunk", "reordered"])
def test_a_dataset_made_again_is_refused(here: Path, name: str, how: str) -> None:
    before = IndexedDataset(here / "data" / name).fingerprint
    rewrite(here / "data" / name, how)
    after = IndexedDataset(here / "data" / name).fingerprint
    error = refusal(here)
    assert error.number == 82 and before in str(error) and after in str(error) and "--accept data" in str(error)
    refusal(here, "--accept=train.seed")
    prepared = resume(here, "--accept=data")
    assert [entry["from_step"] for entry in prepared.accepted_changes] == [5]
    assert before in prepared.accepted_changes[0]["old"] and after in prepared.accepted_changes[0]["new"]


def test_the_same_data_elsewhere_or_without_its_header_is_the_same(here: Path) -> None:
    (here / "data").rename(here / "moved")
    for file in (here / "moved").glob("*.meta.json"):
        file.unlink()
    prepared = prepare(config_for(overrides(here / "moved", here / "run")), 1)
    assert prepared.accepted_changes == () and any(f"data.train[{here}/moved/a]: " in line for line in prepared.changes)


def test_the_header_tells_what_sampled_blocks_do_not(tmp_path: Path) -> None:
    """A fingerprint reads at most 1 MiB of the tokens; the header's hashes cover the one that differs."""
    from megatron_hammer.train.identity import identify

    identities = []
    for i, name in enumerate(("one", "two")):
        tokens = np.zeros(4_000_000, np.int64)
        tokens[1_234_567] = i
        with IndexedWriter(tmp_path / name, vocab_size=301) as writer:
            writer.add(tokens, [len(tokens)])
        identities.append(identify(IndexedDataset(tmp_path / name), name))
    one, two = identities
    assert one.fingerprint == two.fingerprint and one.blocks is not None and not one.has_content_of(two)
    assert one.has_content_of(dataclasses.replace(two, blocks=None))


def test_sources_and_sets_added_removed_or_weighed_anew(here: Path) -> None:
    data = here / "data"
    write_dataset(data / "c", 30, seed=9)
    mixes = {
        f"data.train={{{data}/a: 2, {data}/b: 1, {data}/c: 1}}": (82, "data", "not there"),
        f"data.train={{{data}/a: 2}}": (82, "data", "not there"),
        f"data.train={{{data}/a: 2, {data}/c: 1}}": (82, "data", "(was "),
        f"data.train={{{data}/a: 1, {data}/b: 1}}": (80, "data.train", "0.666667 of the samples"),
        "data.weights=epochs": (80, "data.weights", "of the samples"),
        f"data.valid={{x: {data}/x, y: {data}/y, z: {data}/c}}": (82, "data", "data.valid[z]"),
        f"data.valid={{x: {data}/x}}": (82, "data", "data.valid[y]"),
        f"data.valid={{x: {data}/y, y: {data}/x}}": (82, "data", "data.valid[x]"),
    }
    for change, (number, name, said) in mixes.items():
        error = refusal(here, change)
        assert error.number == number and said in str(error) and f"--accept {name}" in str(error), change
        assert resume(here, change, f"--accept={name}").accepted_changes
        assert resume(here, change, "--accept=data").accepted_changes
        setting = change.split("=")[0]
        assert resume(here, change, f"--accept={setting}").accepted_changes, (
            "a change that the config states goes by its name too"
        )
    for same in (f"data.train={{{data}/b: 2, {data}/a: 4}}", "data.weights=tokens"):
        assert resume(here, same).accepted_changes == (), "the same mix, written otherwise"


def test_what_was_accepted_is_in_the_checkpoints_that_follow(here: Path) -> None:
    """And is accepted once: the next start needs no name, and the ledger goes on."""
    arguments = overrides(here / "data", here / "run", "optimizer.lr=1e-3", "train.num_steps=6")
    assert train_here(0, [*arguments, "--accept=optimizer.lr"]) == 0
    rewrite(here / "data" / "a", "grown")
    assert train_here(0, [*arguments, "train.num_steps=8", "--accept=data", "--accept=optimizer.lr"]) == 0
    newest = newest_checkpoint(here / "run")
    assert newest is not None and newest.step == 8
    assert [(entry["from_step"], entry["what"]) for entry in newest.state["accepted"]] == [
        (5, "optimizer.lr"),
        (7, f"data.train[{here}/data/a]"),
    ]
    assert newest.state["data"]["train"][0]["fingerprint"] == IndexedDataset(here / "data" / "a").fingerprint
    assert set(newest.state["data"]["valid"]) == {"x", "y"}
    assert resume(here, "optimizer.lr=1e-3").config.optimizer.lr == 1e-3


def test_an_older_checkpoint_goes_on_with_a_note(here: Path) -> None:
    """It records no fingerprints: then only the paths in the config can be compared."""
    newest = newest_checkpoint(here / "run")
    assert newest is not None
    path = newest.folder / MANIFEST
    tree = json.loads(path.read_bytes())
    del tree["state"]["data"], tree["state"]["accepted"], tree["digest"]
    tree["config"]["data"]["train"] = {f"{here}/data/a": 2.0, f"{here}/data/b": 1.0}
    tree["config"]["data"]["valid"] = {"x": f"{here}/data/x", "y": f"{here}/data/y"}
    tree["digest"] = hash_bytes(canonical_json(tree))
    path.write_bytes(canonical_json(tree) + b"\n")
    assert any("recorded no fingerprints" in note for note in resume(here).notes)
    assert "--accept data" in str(refusal(here, f"data.train={here}/data/a"))
    assert train_here(0, overrides(here / "data", here / "run", "train.num_steps=5")) == 0
    assert not any("fingerprints" in note for note in resume(here).notes), "the next checkpoint records them"


def test_another_tokenizer_is_a_change() -> None:
    """Where vocabulary and datasets fit; elsewhere E414 and E510 come first."""
    assert changed_tokenizer("aa", "aa", ("a", "b")) == [] == changed_tokenizer(None, None, (None, None))
    for old, new in (("aa", "bb"), (None, "bb"), ("aa", None)):
        (change,) = changed_tokenizer(old, new, (f"{old}.model", f"{new}.model"))
        assert [side != "no tokenizer" for side in (change.old, change.new)] == [old is not None, new is not None]
        assert new is None or change.new == "bb.model (fingerprint bb)"
        assert change.is_open([]) and change.is_open(["data", "tokenizer.path"]) and not change.is_open(["tokenizer"])
        assert change.is_of_content


# ---- the programs ---------------------------------------------------------------------------------------------------


def test_the_launcher_passes_it_through(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = overrides(here / "data", here / "run", "optimizer.lr=1e-3", "train.num_steps=5")
    refused = run(2, changed)
    assert refused.returncode == 5 and refused.stderr.count("\n") == 1
    assert refused.stderr.startswith("error[E580]: optimizer.lr=0.001 (was 0.003) would change the run of ")
    went = run(2, ["--accept", "optimizer.lr", *changed])
    assert went.returncode == 0, went.stderr
    assert "  optimizer.lr: 0.003 -> 0.001   (accepted)\n" in went.stdout
    assert "learning rate of step 5: 0.00244351 -> " in went.stdout
    back = config_for(overrides(here / "data", here / "run", "train.num_steps=6"))
    assert run_rank(back, 0, 0, 1, None, accepted=["optimizer.lr"]) == 0
    assert "  optimizer.lr: 0.001 -> 0.003   (accepted)\n" in capsys.readouterr().out


def test_a_warm_up_that_was_cut_to_the_run_stays_so() -> None:
    """A run of 8 steps with a warm-up of 20, lengthened, and lengthened once more."""
    first = tiny_config(train__num_steps=8, schedule__warmup_steps=20)
    saved, asked = first, tiny_config(train__num_steps=10, schedule__warmup_steps=20)
    for _ in range(2):
        held, _ = hold_horizon(asked, saved)
        assert not [c for c in changed_settings(saved, held) if c.accepted_by]
        assert [learning_rate(held, step) for step in range(1, 9)] == [learning_rate(first, s) for s in range(1, 9)]
        saved, asked = held, dataclasses.replace(asked, train=dataclasses.replace(asked.train, num_steps=30))
    other = tiny_config(train__num_steps=10, schedule__warmup_steps=5)
    held, _ = hold_horizon(other, first)
    assert [c.accepted_by for c in changed_settings(first, held)][:1] == [("schedule.warmup_steps",)]
