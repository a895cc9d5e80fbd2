"""Publishes a run's proved export on a hub: checks it, adds the model card, and sends nothing private.

::

    RUN ----newest checkpoint--+
                               |  same digest, unchanged files      hard links + README.md
    RUN/hf --certificate.json--+-------------------------------> a folder beside the export --private?--> Hub

The export itself stays as it was proved. Nothing is sent before everything has been checked: that the run is finished,
that the export is of this checkpoint and has not changed since its proof, that the hub knows the token, and that no
file that people read holds a path of this machine, its name, or the value of a secret. Needs no torch.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hammer.base.errors import CheckpointError, RefusedError
from megatron_hammer.base.files import hash_file
from megatron_hammer.base.progress import Progress, size_of
from megatron_hammer.base.reading import read_regular
from megatron_hammer.checkpoint.folder import open_checkpoint, run_of
from megatron_hammer.checkpoint.manifest import Manifest
from megatron_hammer.huggingface.certified import CERTIFICATE, listed_files
from megatron_hammer.huggingface.config import CONFIG, read_json
from megatron_hammer.metrics.metrics_file import METRICS
from megatron_hammer.publish.card import Wishes, model_card
from megatron_hammer.publish.facts import CardFacts, gather_facts
from megatron_hammer.publish.hubs import CARD, Hub, secrets

_STATED = {"texts": dict, "versions": dict, "bound": float, "dtype": str, "step": int}  # by a certificate, for the card
READ_BY_PEOPLE = 2**20  # bytes: larger files are weights and vocabularies, which hold no paths


@dataclass(frozen=True)
class Publication:
    """What would be published."""

    export: Path
    files: tuple[str, ...]
    """Of the export, the certificate included."""
    card: str
    facts: CardFacts

    def listing(self) -> list[str]:
        """A line for each file, with its size."""
        sizes = {name: (self.export / name).stat().st_size for name in self.files} | {CARD: len(self.card.encode())}
        width = max(map(len, sizes))
        return [f"{name:{width}}  {size_of(size)}" for name, size in sorted(sizes.items())]

    @property
    def message(self) -> str:
        """The message of the commit."""
        return f"megatron_hammer: step {self.facts.step:,}, checkpoint {self.facts.certificate['checkpoint_digest']}"


def prepare_upload(
    run: str | Path, wishes: Wishes, export: Path | None = None, step: int | None = None, unfinished: bool = False
) -> Publication:
    """Check run and export, and write the card.

    Args:
        run: the folder of a run, or a checkpoint.
        export: of that checkpoint; None: the folder ``hf`` in the run.
        unfinished: publish a run that has steps left.

    Raises:
        CheckpointError: E493 there is no export, or no proved one.
        RefusedError: E539 the run is not finished; E540 the export is another checkpoint's, or has changed;
            E541 something private would go with it.
    """
    manifest = open_checkpoint(run, step)
    folder = run_of(manifest.folder)
    export = export or (folder or manifest.folder) / "hf"
    certificate = _certificate_of(manifest, export)
    facts = gather_facts(manifest, folder, certificate)
    if folder is not None and (folder / METRICS).is_file() and not (facts.is_finished or unfinished):
        done, planned = facts.step, facts.config.train.num_steps
        remedy = "finish it, or publish this step as it is with --unfinished"
        raise RefusedError(39, str(run), f"is not finished: step {done:,} of {planned:,}", remedy)
    files = _unchanged_files(export, certificate)
    card = model_card(facts, read_json(export / CONFIG), wishes)
    found = Publication(export, files, card, facts)
    refuse_private(found, manifest)
    return found


def upload(found: Publication, hub: Hub) -> str:
    """Send it; the address.

    Raises:
        ConfigError: E291 the hub refuses.
        DiskError: E604 it could not be reached.
    """
    hub.check()
    with _folder_to_send(found) as folder:
        return hub.upload(folder, found.message)


def _certificate_of(manifest: Manifest, export: Path) -> Mapping[str, Any]:
    """The passed certificate of an export of this checkpoint."""
    load, output = shlex.quote(str(manifest.folder)), shlex.quote(str(export))
    command = f"python tools/checkpoint_to_hf.py --load {load} --output {output}"
    if not (export / CONFIG).is_file():
        raise CheckpointError(93, str(export), "holds no export", f"export first: {command}")
    if not (export / CERTIFICATE).is_file():
        rule = "has no certificate.json, so nobody has proved that it is the trained model"
        raise CheckpointError(93, str(export), rule, f"export it anew: {command}")
    certificate = read_json(export / CERTIFICATE)
    if certificate.get("verdict") != "passed" or certificate.get("checkpoint_digest") != manifest.digest:
        rule = f"is the export of step {certificate.get('step')}, not of {manifest.folder.name}"
        raise RefusedError(40, str(export), rule, f"export that one first: {command}")
    lacking = [name for name, kind in _STATED.items() if not isinstance(certificate.get(name), kind)]
    if lacking or not certificate["texts"] or listed_files(certificate) is None:
        rule = f"does not say what was proved: {', '.join(lacking) or 'files, texts'}"
        raise CheckpointError(93, str(export / CERTIFICATE), rule, f"export it anew: {command}")
    return certificate


def _unchanged_files(export: Path, certificate: Mapping[str, Any]) -> tuple[str, ...]:
    """The files of the export, each as it was when it was proved; others do not go, nor does a card there."""
    proved = listed_files(certificate) or {}
    total = sum(size for size, _ in proved.values())
    with Progress("checking the export", total) as progress:
        for name, (_, hashed) in proved.items():
            path = export / name
            if not path.is_file() or path.is_symlink() or hash_file(path, progress.advance) != hashed:
                remedy = "export it anew with tools/checkpoint_to_hf.py"
                raise RefusedError(40, str(path), "is not what the certificate proved: it has changed", remedy)
    return (*sorted(proved.keys() - {CARD}), CERTIFICATE)


@contextmanager
def _folder_to_send(found: Publication) -> Iterator[Path]:
    """The files and the card in a folder of their own, without a copy of the weights where links are possible."""
    with tempfile.TemporaryDirectory(prefix=".publish-", dir=found.export.parent) as name:
        folder = Path(name)
        for file in found.files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(found.export / file, folder / file)
            except OSError:  # another file system, or one without links
                shutil.copyfile(found.export / file, folder / file)
        (folder / CARD).write_text(found.card, encoding="utf-8")
        yield folder


# ---- what must not leave this machine ----


def refuse_private(found: Publication, manifest: Manifest) -> None:
    """Raise ``RefusedError`` E541 where the card, or another file that people read, contains something private."""
    words = private_words(manifest)
    texts = {CARD: found.card.encode()}
    for name in found.files:
        if name.endswith((".json", ".md", ".txt")) and (found.export / name).stat().st_size <= READ_BY_PEOPLE:
            texts[name] = read_regular(found.export / name)
    for name, content in texts.items():
        text = content.decode("utf-8", errors="replace")
        for kind, value in words:
            if re.search(rf"(?<![\w.-]){re.escape(value)}(?![\w-])", text):
                shown = "" if kind.startswith("the value of") else f" ({value})"
                remedy = "leave it out of --name, --repo, --description and the names of sets and sources"
                raise RefusedError(41, f"{name} of {found.export.name}", f"holds {kind}{shown}", remedy)


def private_words(manifest: Manifest) -> list[tuple[str, str]]:
    """(what it is, text) of what must not be published: paths, this machine's name, secrets of the environment."""
    config = manifest.config
    named = [
        str((config.get(group) or {}).get(key) or "") for group, key in (("tokenizer", "path"), ("train", "output"))
    ]
    folders = {
        str(manifest.folder.resolve()),
        str(manifest.folder.resolve().parent.parent),
        os.getcwd(),
        str(Path.home()),
        *named,
    }
    found = [
        ("a path of this machine", folder) for folder in sorted(folders) if folder.startswith("/") and len(folder) >= 5
    ]
    host = platform.node()
    if len(host) > 4 and host != "localhost":
        found.append(("the name of this machine", host))
    return found + [(f"the value of {name}", value) for name, value in secrets()]
