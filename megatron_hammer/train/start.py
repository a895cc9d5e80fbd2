"""How the ranks of a run make sure, before its start, that they have the same inputs, checkpoint and output folder.

::

    round "inputs"       each rank looks at config, tokenizer, datasets    compared: settings, fingerprints
    round "search"       rank 0 looks for the checkpoint and the ledger    sent: its name and digest, the ledger
    round "checkpoint"   the others open that very one                     compared: devices, torch, kernels
                         rank 0 writes a probe file                        sent: the probe's name
    round "folder"       the others look for the probe in their train.output

All rounds, in their order, are in ``begin.py``.

Only rank 0 searches: on a network file system two nodes may list one folder differently for a while, and ranks that
each took what they saw would train on masters of two different steps. A name, once known, is looked up without the
listing. The probe has a random name, so that no cache can hold it. Ranks exchange these values through
``parallel/agreement.py``. Needs no torch.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hammer.base.errors import CheckpointError, RefusedError
from megatron_hammer.checkpoint.manifest import Manifest, read_manifest
from megatron_hammer.config import Config, config_to_tree, setting_effects
from megatron_hammer.sampling.ledger import ledger_from_trees
from megatron_hammer.train.identity import DatasetIdentity
from megatron_hammer.train.prepare import Inputs, StartingPoint, checkpoints_folder

if TYPE_CHECKING:
    from megatron_hammer.parallel.agreement import Fact

PROBE_SECONDS = 10.0  # a client of NFS may take some seconds to see a folder that another has just made
PAUSE_SECONDS = 0.2  # between two looks


# ---- facts ----------------------------------------------------------------------------------------------------------


def facts_of(inputs: Inputs) -> list[Fact]:
    """What must be the same on every rank: settings, the content of datasets, the tokenizer; paths may differ."""
    from megatron_hammer.parallel.agreement import Fact

    tree = config_to_tree(inputs.config)
    remedy = "start all nodes with the same settings"
    facts = []
    for name, effect in setting_effects().items():
        group, field = name.split(".")
        if effect.is_common:
            facts.append(Fact(name, f"{name} is", str(tree[group][field]), remedy))
    path = inputs.config.tokenizer.path
    if inputs.tokenizer is not None:
        value = f"fingerprint {inputs.tokenizer.fingerprint}"
        facts.append(Fact("the tokenizer", f"tokenizer {path} has", value, "put the same tokenizer on every node"))
    sources = [(f"source {i} of data.train", dataset) for i, dataset in enumerate(inputs.identity.train, start=1)]
    sources += [(f"data.valid[{name}]", dataset) for name, dataset in inputs.identity.valid.items()]
    facts += [fact for what, dataset in sources for fact in _dataset_facts(what, dataset)]
    mixes = [
        Fact(f"phase {i} of data.phases", "the phase is", str(mix), "give all nodes the same phases")
        for i, mix in enumerate(inputs.identity.mixes, start=1)
    ]
    return facts + mixes


def _dataset_facts(what: str, dataset: DatasetIdentity) -> list[Fact]:
    from megatron_hammer.parallel.agreement import Fact

    facts = [Fact(what, f"{dataset.prefix}.bin has", str(dataset), "copy the same dataset to every node")]
    if dataset.share is not None:
        share = f"{dataset.share:.12g} of the samples"
        facts.append(Fact(f"the share of {what}", f"{dataset.prefix} gives", share, "give all nodes the same weights"))
    return facts


# ---- the checkpoint -------------------------------------------------------------------------------------------------


def name_starting_point(start: StartingPoint, config: Config) -> dict[str, Any]:
    """What rank 0 tells the others of the checkpoint it has found, as JSON values."""
    return {
        "resume": _name(start.resume, checkpoints_folder(config)),
        "init_from": _name(start.init_from, Path(config.checkpoint.init_from or "")),
        "rewinds": [rewind.to_tree() for rewind in start.rewinds],
    }


def _name(manifest: Manifest | None, below: Path) -> dict[str, Any] | None:
    """The paths of two nodes may differ, but not the part below the folder that the config names."""
    if manifest is None:
        return None
    return {"folder": os.path.relpath(manifest.folder, below), "step": manifest.step, "digest": manifest.digest}


def open_starting_point(names: dict[str, Any], config: Config, rank: int) -> StartingPoint:
    """Open what rank 0 has chosen, by its name.

    Raises:
        RefusedError: this rank sees no such checkpoint, or another one of that name.
    """
    return StartingPoint(
        _open(names["resume"], checkpoints_folder(config), rank),
        _open(names["init_from"], Path(config.checkpoint.init_from or ""), rank),
        rewinds=ledger_from_trees(names["rewinds"], "the ledger of rank 0"),
    )


def _open(name: dict[str, Any] | None, below: Path, rank: int) -> Manifest | None:
    if name is None:
        return None
    folder = below / name["folder"]
    remedy = "have all nodes see the same folder (a listing may be stale for a minute), then run the same command again"
    try:
        manifest = read_manifest(folder)
    except (CheckpointError, OSError) as error:
        reason = f"cannot be read, but rank 0 starts from its step {name['step']} ({error})"
        raise RefusedError(83, f"rank {rank}: {folder}", reason, remedy) from None
    if manifest.digest != name["digest"]:
        reason = f"differs from the checkpoint of that name that rank 0 starts from ({name['digest']})"
        raise RefusedError(83, f"rank {rank}: {folder} of digest {manifest.digest}", reason, remedy)
    return manifest


# ---- the output folder ----------------------------------------------------------------------------------------------


@contextmanager
def probe_file(output: Path) -> Iterator[str]:
    """An empty file of random name in the output folder, for as long as the block lasts; its name."""
    probe = output / f".probe-{secrets.token_hex(16)}"
    probe.touch(exist_ok=False)
    try:
        yield probe.name
    finally:
        probe.unlink(missing_ok=True)


def look_for_probe(output: Path, name: str, rank: int) -> None:
    """See the file that rank 0 has written.

    Raises:
        RefusedError: it does not show in time, so this is another folder.
    """
    deadline = time.monotonic() + PROBE_SECONDS
    while not (output / name).exists():
        if time.monotonic() >= deadline:
            raise RefusedError(
                84,
                f"rank {rank}: train.output={output}",
                f"is not the folder of rank 0: {name}, which rank 0 has written there, cannot be seen",
                "put train.output on a file system that all nodes share",
            )
        time.sleep(PAUSE_SECONDS)
