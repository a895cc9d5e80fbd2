"""The options of Megatron-LM's and GPT-NeoX's preprocessing programs, so that their command lines run here unchanged.

Theirs are ``tools/preprocess_data.py`` (Megatron-LM, from 2020 to core 0.17) and ``tools/datasets/preprocess_data.py``
(GPT-NeoX). An option that has a counterpart is translated. One that has nothing to decide here is taken and left aside,
and a note says why. One that asks for what this package does not do, such as splitting sentences or a tokenizer of
another kind, is refused before anything is read: its dataset would be another one.
"""

from __future__ import annotations

import argparse
import difflib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_hammer.base.errors import ConfigError

if TYPE_CHECKING:  # --help must not wait for what a job needs
    from megatron_hammer.dataset.make.job import Job

_KINDS = {
    **dict.fromkeys(("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"), "sentencepiece"),
    "SPMTokenizer": "sentencepiece",  # GPT-NeoX
    **dict.fromkeys(("HuggingFaceTokenizer", "HFTokenizer", "PretrainedFromHF"), "tokenizers"),
}
"""What their names of tokenizers mean, as ``Tokenizer.kind``. HFTokenizer is GPT-NeoX's, and as PretrainedFromHF that
of Megatron's descendants."""

_FROM_VOCAB_AND_MERGES = ("GPT2BPETokenizer", "HFGPT2Tokenizer")
_OTHER_KINDS = (
    "BertWordPieceLowerCase", "BertWordPieceCase", "TikTokenizer", "TiktokenTokenizer", "CharLevelTokenizer",
    "NullTokenizer", "NullMultimodalTokenizer", "MultimodalTokenizer", "SFTTokenizer",
)  # fmt: skip

_LEFT_ASIDE: dict[str, tuple[int | str, str]] = {
    # option: (values that it takes, why it has nothing to decide)
    "--log-interval": (1, "progress is shown by time, not by documents"),
    "--partitions": (1, "all threads work on all files, so nothing is cut up beforehand and merged afterwards"),
    "--keep-sequential-samples": (0, "documents always keep their order"),
    "--chunk-size": (1, "threads take a megabyte of text at a time"),
    "--find-optimal-num-workers": (0, "there is nothing to find: the datasets are made, on --workers threads, by "
                                   "default one for each core, which is the fastest"),
    "--workers-to-check": ("+", "see --find-optimal-num-workers"),
    "--max-documents": (1, "it limits --find-optimal-num-workers alone; all documents are taken"),
    "--num-docs": (1, "progress is measured in bytes"),
    "--lang": (1, "it only matters with --split-sentences"),
    "--keep-newlines": (0, "it only matters with --split-sentences; line breaks are always kept"),
    "--vocab-size": (1, "the tokenizer's file says it"),
    "--merge-file": (1, "the tokenizer's file holds the merges"),
    "--padded-vocab-size": (1, "datasets do not depend on it"),
    "--make-vocab-size-divisible-by": (1, "datasets do not depend on it"),
    "--pad-vocab-size": (0, "datasets do not depend on it"),
    "--no-pad-vocab-size": (0, "datasets do not depend on it"),
    "--chat-template": (1, "documents are plain text"),
    "--trust-remote-code": (0, "no program code of a tokenizer is ever run"),
    "--tokenizer-hf-use-fast": (0, "the tokenizer.json is always run as it is"),
    "--tokenizer-hf-no-use-fast": (0, "the tokenizer.json is always run as it is"),
    "--tokenizer-sentencepiece-legacy": (0, "it only matters with special tokens of one's own"),
    "--use-gigatoken": (0, "our encoders are used"),
    "--legacy-tokenizer": (0, "our encoders are used"),
}  # fmt: skip

_REFUSED: dict[str, tuple[int | str, str, str]] = {
    # option: (values that it takes, the rule, the remedy)
    "--split-sentences": (0, "cuts documents into sentences, for BERT and T5, which this package does not train",
                          "leave it out: a document becomes one sequence, as GPT and Llama models take it"),
    "--ftfy": (0, "changes the text, which preprocessing here never does", "run ftfy on the corpus beforehand"),
    "--vocab-extra-ids": (1, "adds ids behind the vocabulary, for T5, which this package does not train",
                          "leave it out"),
    "--tokenizer-special-tokens": ("+", "adds pieces to the tokenizer", "name a tokenizer that has them"),
    "--special-tokens": ("+", "adds pieces to the tokenizer", "name a tokenizer that has them"),
    "--tokenizer-metadata": (1, "describes tokenizers that only Megatron-LM reads",
                             "name the .model or tokenizer.json itself with --tokenizer-model"),
}  # fmt: skip


@dataclass(frozen=True)
class Translation:
    """A command line of theirs in our terms."""

    inputs: list[str]
    tokenizer: str
    """Path of the tokenizer's file or folder."""
    kind: str | None
    """``Tokenizer.kind`` that the command line asks for; None where it names none."""
    type_name: str | None
    with_special_tokens: bool
    """What a Hugging Face tokenizer itself puts around a text belongs to each document."""
    notes: tuple[str, ...]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the options of both programs; those that are left aside are not in its help."""
    group = parser.add_argument_group(
        "as Megatron-LM and GPT-NeoX spell it",
        "Their command lines run as they are; notes say what each option means here. All of their options are in "
        "docs/data.md.",
    )
    group.add_argument("--tokenizer-type", metavar="TYPE", help=", ".join(_KINDS))
    group.add_argument("--tokenizer-name-or-path", metavar="PATH", help="the same as --tokenizer-model")
    group.add_argument("--vocab-file", metavar="PATH", help="the same, for GPT-NeoX's SPMTokenizer and HFTokenizer")
    group.add_argument("--dataset-impl", metavar="IMPL", help="mmap, the only format that is written")
    group.add_argument("--tokenizer-hf-no-include-special-tokens", action="store_true", help=argparse.SUPPRESS)
    for option, (count, *_) in (_LEFT_ASIDE | _REFUSED).items():
        if count == 0:
            group.add_argument(option, dest=option, action="store_const", const="", help=argparse.SUPPRESS)
        else:
            nargs = None if count == 1 else "+"
            group.add_argument(option, dest=option, nargs=nargs, help=argparse.SUPPRESS)


def translate(args: argparse.Namespace) -> Translation:
    """What a parsed command line asks for.

    Raises:
        ConfigError: E279 something that this package does not do, E201 no tokenizer.
    """
    given: dict[str, str | list[str] | None] = vars(args)
    for option, (_, rule, remedy) in _REFUSED.items():
        if (value := given[option]) is not None:
            raise ConfigError(79, f"{option} {_words(value)}".strip(), rule, remedy)
    if args.dataset_impl not in (None, "mmap"):
        raise ConfigError(79, f"--dataset-impl={args.dataset_impl}", "is a format that Megatron-LM gave up in 2023",
                          "choose mmap, which every version reads")  # fmt: skip
    kind = None if args.tokenizer_type is None else _kind_of(args.tokenizer_type)
    notes = [] if args.dataset_impl is None else ["--dataset-impl mmap: the format that is always written"]
    notes += [
        f"{f'{option} {_words(value)}'.strip()}: left aside, {reason}"
        for option, (_, reason) in _LEFT_ASIDE.items()
        if (value := given[option]) is not None
    ]
    tokenizer, of_tokenizer = args.tokenizer_model, list[str]()
    if tokenizer is None or any(other is not None for other in (args.tokenizer_name_or_path, args.vocab_file, kind)):
        tokenizer, of_tokenizer = _tokenizer_of(args, kind)
    return Translation(
        inputs=[path for item in args.input for path in ([item] if os.path.exists(item) else _several(item))],
        tokenizer=tokenizer,
        kind=kind,
        type_name=args.tokenizer_type,
        with_special_tokens=kind == "tokenizers" and not args.tokenizer_hf_no_include_special_tokens,
        notes=(*of_tokenizer, *notes),
    )


def fit_job(translation: Translation, job: Job) -> tuple[Job, list[str]]:
    """The job as the named type of tokenizer would have it, with notes for the user; only where one is named.

    Raises:
        ConfigError: E279 a tokenizer of another kind than the type names.
    """
    what, tokenizer = f"--tokenizer-type {translation.type_name}", job.tokenizer
    if translation.kind != tokenizer.kind:
        fitting = "HuggingFaceTokenizer" if tokenizer.kind == "tokenizers" else "SentencePieceTokenizer"
        raise ConfigError(79, f"{what} with {tokenizer.path}", f"is another kind of tokenizer: this is a "
                          f"{'tokenizer.json' if tokenizer.kind == 'tokenizers' else 'sentencepiece model'}",
                          f"say --tokenizer-type {fitting}, or leave the option out: the file says")  # fmt: skip
    notes = [f"{what}: {tokenizer.path}"]
    if translation.type_name == "Llama2Tokenizer" and not job.prepend_bos:
        notes.append(f"{what}: no bos id is put before documents, as in Megatron-LM since 2026; for what it did "
                     "before, add --prepend-bos")  # fmt: skip
    if translation.with_special_tokens:
        around = tokenizer.template_ids()
        if around == [tokenizer.bos_id] and not job.prepend_bos:
            notes.append(f"{what}: the tokenizer begins every text with its bos id {tokenizer.bos_id}, and so does "
                         "every document (not with --tokenizer-hf-no-include-special-tokens)")  # fmt: skip
            job = replace(job, prepend_bos=True)
        elif around and around != [tokenizer.bos_id]:
            notes.append(f"{what}: the ids {around} that the tokenizer itself puts around a text are left out; "
                         "--prepend-bos and --append-eod decide")  # fmt: skip
    if job.append_eod:
        notes.append(f"{what}: documents end with the tokenizer's eos id {tokenizer.eos_id}")
    return job, notes


def _kind_of(name: str) -> str:
    known = {item.lower(): kind for item, kind in _KINDS.items()}
    if name.lower() in known:
        return known[name.lower()]
    what = f"--tokenizer-type={name}"
    if name in _FROM_VOCAB_AND_MERGES:
        raise ConfigError(79, what, "is made of a vocabulary and merges, which are not read here",
                          "name the model's tokenizer.json, which is the same tokenizer: --tokenizer-type "
                          "HuggingFaceTokenizer --tokenizer-model tokenizer.json")  # fmt: skip
    if name in _OTHER_KINDS:
        raise ConfigError(79, what, "is a kind of tokenizer that this package does not have",
                          f"use one of {', '.join(_KINDS)}")  # fmt: skip
    near = difflib.get_close_matches(name, _KINDS, 1)
    raise ConfigError(79, what, "is no type of tokenizer",
                      f"did you mean {near[0]}?" if near else f"use one of {', '.join(_KINDS)}")  # fmt: skip


def _tokenizer_of(args: argparse.Namespace, kind: str | None) -> tuple[str, list[str]]:
    """The tokenizer's path, and notes."""
    named_by: dict[str, str | None] = {
        "--tokenizer-model": args.tokenizer_model,
        "--tokenizer-name-or-path": args.tokenizer_name_or_path,
        "--vocab-file": args.vocab_file,
    }
    given = {option: value for option, value in named_by.items() if value is not None}
    if not given:
        raise ConfigError(1, "preprocess_data.py", "was called wrongly: the following arguments are required: "
                          "--tokenizer-model", "add --tokenizer-model PATH (or see --help)")  # fmt: skip
    chosen, path = next(iter(given.items()))
    notes = [f"{option} {value}: left aside, {chosen} names the tokenizer"
             for option, value in given.items() if value != path]  # fmt: skip
    named = Path(path)
    if not named.exists() and chosen == "--tokenizer-name-or-path" and path.count("/") <= 1 and not named.suffix:
        raise ConfigError(79, f"{chosen}={path}", "is neither a file nor a folder here, and nothing is fetched from "
                          "the Hub", f"run: hf download {path} --include 'tokenizer*' --local-dir tokenizer, then give "
                          "--tokenizer-model tokenizer")  # fmt: skip
    wanted = {"sentencepiece": "tokenizer.model", "tokenizers": "tokenizer.json"}.get(kind or "")
    if wanted and (named / wanted).is_file():  # a folder may hold both
        return os.path.join(path, wanted), notes
    return path, notes


def _several(item: str) -> list[str]:
    """The files of an argument that is not there: GPT-NeoX has several in one, with commas between them."""
    parts = [part for part in item.split(",") if part]
    return parts if len(parts) > 1 and all(map(os.path.exists, parts)) else [item]


def _words(value: str | list[str]) -> str:
    return value if isinstance(value, str) else " ".join(value)
