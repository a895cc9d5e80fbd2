"""The parts of the self-test: each tries one thing on inputs that every installation has, and says what it found.

A part is a function of an empty folder. It returns a line about what was compared, and raises one of our errors where
something is wrong. ``selftest.py`` runs each in a process of its own, by ``python -m`` this module, so that one that
crashes is named and the others still run. What computes is the code that users run: tokenizer training and its proofs,
``verify_parallel``, the drill, export with its certificate. Needs no torch, but where a part does.
"""

from __future__ import annotations

import dataclasses
import json
import random
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_hammer.base import system
from megatron_hammer.base.errors import from_exception, to_fields
from megatron_hammer.base.progress import say
from megatron_hammer.base.reading import read_regular
from megatron_hammer.verify import golden
from megatron_hammer.verify.golden import wrong

if TYPE_CHECKING:
    from megatron_hammer.config import Config

VERDICT = "verdict.json"  # what a part leaves in its folder
RANKS = 2
NOT_TRIED = "not tried: "
NOT_HERE = f"{NOT_TRIED}{RANKS} ranks need Linux (E292)"
REINSTALL = "install the package anew: pip install --force-reinstall --no-cache-dir, in a clone pip install -e ."
PIECES = 1000  # of the tokenizers: more than the characters and bytes of their texts
CORPUS_BYTES = 50_000  # the least that a sample corpus has


@dataclass(frozen=True)
class SelftestPart:
    """One thing that is tried."""

    name: str
    run: Callable[[Path], str]
    cure: str
    """Where a result is wrong, or the part crashes."""


# ---- text ------------------------------------------------------------------------------------------------------------


def try_tokenizer(folder: Path) -> str:
    """Train one on the sample corpus; its ids are sentencepiece's, decode to the text, and survive conversion."""
    from sentencepiece import SentencePieceProcessor

    from megatron_hammer.corpus.documents import TextCorpus
    from megatron_hammer.corpus.quick_start import DOMAINS, ESSAYS, make_sample_corpus
    from megatron_hammer.tokenizer.convert import convert_tokenizer
    from megatron_hammer.tokenizer.encode import COMPILED
    from megatron_hammer.tokenizer.hard_texts import FIXED_TEXTS
    from megatron_hammer.tokenizer.pieces import SPACE
    from megatron_hammer.tokenizer.train import train_tokenizer

    make_sample_corpus(folder / "corpus", ESSAYS, CORPUS_BYTES, say, fetch=False)
    corpus = TextCorpus([folder / "corpus" / f"{domain}.jsonl" for domain in DOMAINS])
    tokenizer = train_tokenizer(corpus, folder / "tokenizer", PIECES, allow_fewer=True, report=say)
    reference = SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    texts = [*corpus, *FIXED_TEXTS]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        if ids != reference.encode(text) and "\0" not in text:  # its NUL depends on sentencepiece's version
            raise wrong(f"the text {text[:40]!r}", "has other ids than sentencepiece gives it")
        if SPACE not in text and tokenizer.decode(ids) != text:
            raise wrong(f"the text {text[:40]!r}", "is another one after encoding and decoding")
    (folder / "converted").mkdir()
    convert_tokenizer(tokenizer, folder / "converted")
    by = "the compiled encoder" if COMPILED is not None else "sentencepiece (no compiled encoder)"
    return f"{tokenizer.vocab_size:,} pieces; {len(texts):,} texts by {by}; converted with equal ids"


def try_index(folder: Path) -> str:
    """The compiled index builder and its NumPy twin on the same inputs, of ordinary and of awkward sizes."""
    import numpy as np

    from megatron_hammer.sampling import index_builder as chosen
    from megatron_hammer.sampling import index_builder_numpy as twin

    if not chosen.BACKEND.startswith("C++"):
        return f"nothing to compare: {chosen.BACKEND}"
    compared = 0

    def equal(what: str, ours: object, theirs: object) -> None:
        nonlocal compared
        compared += 1
        pairs = (
            zip(ours, theirs, strict=True)
            if isinstance(ours, tuple) and isinstance(theirs, tuple)
            else [(ours, theirs)]
        )
        if not all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs):
            raise wrong(f"{what} of the compiled index builder", "differs from its NumPy twin")

    for n in (1, 2, 7, 64, 65, 4097, 2**40 + 1):
        equal(f"permute({n})", chosen.permute(n, n, 0, min(n, 5000)), twin.permute(n, n, 0, min(n, 5000)))
    draw = np.random.default_rng(1)
    for documents, longest, window in ((1, 40, 8), (63, 3, 5), (500, 200, 64), (5000, 900, 512)):
        lengths = (1 + draw.integers(0, longest, documents)).astype(np.int32)
        marks = chosen.epoch_marks(lengths, 9, 8)
        equal("epoch_marks", marks, twin.epoch_marks(lengths, 9, 8))
        offsets = np.arange(0, int(lengths.sum()) - window, window, dtype=np.int64)[:200]
        located = chosen.locate_windows(lengths, marks, 8, 9, offsets, window)
        equal("locate_windows", located, twin.locate_windows(lengths, marks, 8, 9, offsets, window))
        order, total = twin.permute(documents, 5, 0, documents).astype(np.int32), int(lengths.sum())
        equal("sample_index", chosen.sample_index(lengths, order, window, total),
              twin.sample_index(lengths, order, window, total))  # fmt: skip
        shuffled = [np.arange(documents, dtype=np.int32) for _ in range(2)]
        for module, values in zip((chosen, twin), shuffled):
            module.random_state(documents).shuffle(values)
        equal("shuffle", *shuffled)
    weights, drawn = np.array([0.5, 0.3, 0.2]), np.zeros(3, dtype=np.int64)
    equal("chairman_blend", chosen.chairman_blend(weights, drawn, 5000), twin.chairman_blend(weights, drawn, 5000))
    equal("greedy_blend", chosen.greedy_blend(weights, drawn, 5000), twin.greedy_blend(weights, drawn, 5000))
    return f"{compared} results of the compiled index builder equal those of its NumPy twin"


# ---- training --------------------------------------------------------------------------------------------------------


def try_training(folder: Path) -> str:
    """Twenty steps whose losses are known, on the CPU and, where there is one, on a GPU."""
    import torch

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return "; ".join(_golden(folder, device) for device in devices)


def _golden(folder: Path, device: str) -> str:
    from megatron_hammer.train.run import run_rank

    digest = golden.write_golden_data(folder / "data")
    if digest != golden.DATA_SHA256:
        raise wrong("the made-up dataset", f"has the hash {digest[:12]}, not {golden.DATA_SHA256[:12]}")
    config = golden.golden_config(folder / "data", folder / device, device)
    if code := run_rank(config, 0, 0, 1, None):
        raise wrong(f"the run on {device}", f"ended with exit code {code}")
    lines = read_regular(folder / device / "metrics.jsonl").decode().splitlines()
    return golden.compare_with_golden([json.loads(line) for line in lines], device)


def try_resume(folder: Path) -> str:
    """A run that is killed and started again equals an undisturbed run in every bit."""
    from megatron_hammer.verify.drill import Drill, drill_summary
    from megatron_hammer.verify.faults import KILLS

    if not system.IS_LINUX:
        return NOT_HERE
    config = golden.golden_config(folder / "data", folder / "run")
    kill = next(fault for fault in KILLS if fault.name == "kill everything")
    report = Drill(config, RANKS, [kill], random.Random(0), folder, say).run()
    if report.failed:
        rows = [f"{strike.fault}: {strike.wrong} ({strike.said})" for strike in report.strikes if strike.wrong]
        raise wrong(f"a run of {RANKS} ranks after a kill", "; ".join([*rows, *drill_summary(report)]))
    return f"{RANKS} ranks killed at step {report.strikes[0].step}, started again: the bits of an undisturbed run"


def try_layout(folder: Path) -> str:
    """Two tensor-parallel ranks with sequence parallelism against one process and transformers, on GPUs too."""
    import torch

    if not system.IS_LINUX:
        return NOT_HERE
    config = golden.golden_config(folder / "data", folder / "run")
    parallel = dataclasses.replace(config.parallel, tensor_model_parallel_size=RANKS, sequence_parallel=True)
    config = dataclasses.replace(config, parallel=parallel)
    found = [_layout(config, on_gpus=False)]
    if torch.cuda.device_count() >= RANKS:
        found.append(_layout(config, on_gpus=True))
    return "; ".join(found)


def _layout(config: Config, on_gpus: bool) -> str:
    from megatron_hammer.verify.parallel import Proof, prove_layout

    where = "GPUs" if on_gpus else "CPUs"
    proof = prove_layout(config, RANKS, say, on_gpus=on_gpus)
    if not isinstance(proof, Proof):
        raise wrong(f"{RANKS} ranks on {where}", f"ended with exit code {proof}; their line is above")
    if proof.findings:
        first = proof.findings[0]
        raise wrong(f"TP {RANKS} with sequence parallelism on {where}",
                     f"differs from one process in {len(proof.findings)} places, the first {first.what} by "
                     f"{first.difference:.1e}")  # fmt: skip
    return f"TP {RANKS} with sequence parallelism on {where} computes what one process and transformers compute"


def try_export(folder: Path) -> str:
    """Text to a model in Hugging Face's format: tokenizer, dataset, two steps, export, certificate."""
    from megatron_hammer.corpus.documents import TextCorpus
    from megatron_hammer.dataset.make.job import prepare_job
    from megatron_hammer.dataset.make.local import build_datasets
    from megatron_hammer.huggingface.certificate import TEXTS
    from megatron_hammer.huggingface.certified import certificate_line
    from megatron_hammer.huggingface.export import export_hf
    from megatron_hammer.tokenizer.train import train_tokenizer
    from megatron_hammer.train.run import run_rank

    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": value}) + "\n" for value in TEXTS.values()), encoding="utf-8")
    train_tokenizer(TextCorpus([text]), folder / "tokenizer", PIECES, allow_fewer=True, report=say)
    job = prepare_job([text], ["text"], folder / "tokenizer", append_eod=True, prepend_bos=True)
    build_datasets(job, folder / "data")
    config = golden.golden_config(folder / "data_text_document", folder / "run")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocab_size=None),
        tokenizer=dataclasses.replace(config.tokenizer, path=str(folder / "tokenizer")),
        train=dataclasses.replace(config.train, num_steps=2),
        schedule=dataclasses.replace(config.schedule, warmup_steps=1),
    )
    if code := run_rank(config, 0, 0, 1, None):
        raise wrong("the run to export", f"ended with exit code {code}")
    return certificate_line(export_hf(folder / "run", folder / "hf"))


PARTS = (
    SelftestPart(
        "tokenizer", try_tokenizer, f"{REINSTALL}; HAMMER_NO_EXTENSIONS=1 there leaves the compiled encoder out"
    ),
    SelftestPart(
        "index", try_index, f"{REINSTALL}; HAMMER_NO_EXTENSIONS=1 there leaves the compiled index builder out"
    ),
    SelftestPart(
        "training", try_training, "see with tools/doctor.py which kernels run here; kernels.NAME=torch leaves one out"
    ),
    SelftestPart(
        "resume", try_resume, "repeat it on your config with tools/drill.py, which says of each fault what differs"
    ),
    SelftestPart(
        "layout", try_layout, "repeat it on your config with tools/verify_parallel.py, which names rank and cause"
    ),
    SelftestPart("export", try_export, "install the versions of torch and transformers that pyproject.toml admits"),
)


def main() -> int:
    """``PART FOLDER``: run one part in a folder, which gets its verdict."""
    from megatron_hammer.base.cli import keep_torch_quiet

    keep_torch_quiet()
    name, folder = sys.argv[1], Path(sys.argv[2])
    part = next(part for part in PARTS if part.name == name)
    try:
        verdict: dict[str, object] = {"found": part.run(folder)}
    except Exception as error:
        known = from_exception(error, f"the part {name}")
        if known is None:
            raise
        traceback.print_exception(error)
        verdict = {"error": to_fields(known)}
    (folder / VERDICT).write_text(json.dumps(verdict), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
