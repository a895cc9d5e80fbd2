"""Hostile files, of every kind that is read: each ends in one documented line, at little cost, and nothing in it runs.

No time is asserted: what is refused before it is parsed or built cannot be slow, so each case says by its words which
rule refused it. ``HAMMER_HOSTILE_LIMITS=1`` runs each in a process of its own and holds it to 2 s and 200 MB, and the
largest ones too (``large``), each just within or just beyond a limit of size.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import gzip
import json
import os
import struct
import time
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hammer.base.errors import HammerError, from_exception
from megatron_hammer.base.files import canonical_json, hash_bytes
from megatron_hammer.checkpoint.manifest import read_manifest, saved_model
from megatron_hammer.config import load_config
from megatron_hammer.corpus.documents import read_texts
from megatron_hammer.dataset.reader import IndexedDataset
from megatron_hammer.huggingface.config import model_config_from_hf, read_json
from megatron_hammer.huggingface.weights import HfWeights, check_tensors
from megatron_hammer.megatron.importing import open_reader
from megatron_hammer.megatron.translation import model_of
from megatron_hammer.metrics.plot import read_curves
from megatron_hammer.sampling.ledger import read_ledger
from megatron_hammer.tokenizer.load import load_tokenizer
from megatron_hammer.tokenizer.symbols import read_symbols

PICKLE = b"cos\nsystem\n(S'touch ran'\ntR."
Make = Callable[[Path], object]
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 100,
}  # fmt: skip
TOKENIZER: dict[str, Any] = {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
MODEL = "model: {hidden_size: 64, ffn_hidden_size: 64, num_attention_heads: 8, num_layers: 2}\n"
RANKS = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))


# ---- what reads each kind ----


def config(folder: Path) -> object:
    load_config(folder / "f.yaml").validate(1)
    return None


def huggingface(folder: Path) -> object:
    model = model_config_from_hf(read_json(folder / "config.json"))
    return check_tensors(HfWeights(folder), model)


def curves(folder: Path) -> object:
    return read_curves(folder / "metrics.jsonl")


def corpus(folder: Path) -> object:
    return [None for path in sorted(folder.iterdir()) for _ in read_texts(path, "text")]


def checkpoint(folder: Path) -> object:
    return saved_model(read_manifest(folder))


def dataset(folder: Path) -> object:
    return IndexedDataset(folder / "p")


def megatron(folder: Path) -> object:
    source = open_reader(folder)
    return model_of(source.args, 131, "it"), [source.tensor(*name) for name in source.names()]


def ledger(folder: Path) -> object:
    return read_ledger(folder / "ledger.jsonl")


def symbols(folder: Path) -> object:
    return read_symbols(folder / "symbols.txt")


def tokenizer(folder: Path) -> object:
    definition = folder / "tokenizer.json"
    return load_tokenizer(definition if os.path.lexists(definition) else next(folder.iterdir())).read_pieces()


# ---- what makes them ----


def text(name: str, content: str | bytes) -> Make:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def pipe(name: str) -> Make:
    return lambda folder: os.mkfifo(folder / name)


def endless(name: str) -> Make:
    return lambda folder: (folder / name).symlink_to("/dev/zero")


def sparse(name: str) -> Make:
    def make(folder: Path) -> None:
        (folder / name).touch()
        os.truncate(folder / name, 10**11)

    return make


def both(*makers: Make) -> Make:
    return lambda folder: [make(folder) for make in makers]


def llama(**changed: object) -> Make:
    return text("config.json", json.dumps(LLAMA | changed))


def tensors(header: bytes, length: int | None = None) -> Make:
    stated = struct.pack("<Q", len(header) if length is None else length)
    return both(llama(), text("model.safetensors", stated + header))


def index(*names: str) -> Make:
    weight_map = {f"t{number}": name for number, name in enumerate(names)}
    return both(llama(), text("model.safetensors.index.json", json.dumps({"weight_map": weight_map})))


def manifest(**changed: object) -> Make:
    tree: dict[str, Any] = {
        "format": "megatron_hammer.checkpoint", "version": 1, "step": 1, "layout": {}, "config": {"model": {}},
        "state": {}, "weights_dtype": "float32", "tensors": [], "files": [], "tokenizer": None, **changed,
    }  # fmt: skip
    tree["digest"] = hash_bytes(canonical_json(tree))
    return text("manifest.json", canonical_json(tree) + b"\n")


def vocabulary(**entries: object) -> Make:
    return text("tokenizer.json", json.dumps(TOKENIZER | {"model": TOKENIZER["model"] | {"vocab": entries}}))


def tokenizer_text(before: bytes, repeated: bytes, size: int, behind: bytes) -> Make:
    """A tokenizer.json with one stretch that is repeated up to a size."""
    return lambda folder: (folder / "tokenizer.json").write_bytes(
        before + repeated * ((size - len(before + behind)) // len(repeated)) + behind
    )


def empty_tensors(count: int) -> Make:
    entry = b'"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return tensors(b"{%s}" % b",".join(entry % number for number in range(count)))


def indexed(*more: Make) -> Make:
    start = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 1, 2) + struct.pack("<iqqq", 4, 0, 0, 1)
    return both(text("p.idx", start), text("p.bin", b"\0" * 8), *more)


def indexed_zeros(size: int) -> Make:
    """An .idx of so many bytes that says so itself, with nothing in it but its start and its end."""

    def make(folder: Path) -> None:
        sequences = (size - 34 - 8) // 20
        with (folder / "p.idx").open("wb") as file:
            file.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, sequences, sequences + 1))
            file.truncate(34 + 12 * sequences + 8 * sequences)
            file.seek(0, os.SEEK_END)
            file.write(struct.pack("<q", sequences))
        (folder / "p.bin").touch()

    return make


def archive(pickled: bytes, data: bytes = b"", method: int = zipfile.ZIP_STORED, zeros: int = 0) -> Make:
    """A file of ``torch.save`` of a rank of Megatron-LM, so many zeros behind its pickle."""

    def make(folder: Path) -> None:
        (folder / "mp_rank_00").mkdir()
        with zipfile.ZipFile(folder / "mp_rank_00" / "model_optim_rng.pt", "w", method) as file:
            file.writestr("a/data.pkl", pickled + bytes(zeros))
            file.writestr("a/data/0", data)

    return make


def metadata(pickled: bytes) -> Make:
    """A ``torch_dist`` checkpoint with this ``.metadata``."""

    def make(folder: Path) -> None:
        (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
        torch.save({"args": argparse.Namespace(num_layers=1)}, folder / "common.pt")
        (folder / ".metadata").write_bytes(pickled)

    return make


def state(inner: bytes) -> bytes:
    """A pickle of a rank's state, in which the model has one thing, made by these operations."""
    return b"\x80\x02}(X\x12\0\0\0checkpoint_versionG@\x08\0\0\0\0\0\0X\x05\0\0\0model}X\x01\0\0\0a" + inner + b"su."


def text_of(words: str) -> bytes:
    return b"X" + struct.pack("<I", len(words.encode())) + words.encode()


def arguments(inner: bytes) -> bytes:
    """The same with ``args.position_embedding_type`` made by these operations, and a model of nothing."""
    namespace = b"cargparse\nNamespace\n)\x81}" + text_of("position_embedding_type") + inner + b"sb"
    start = b"\x80\x02}(" + text_of("checkpoint_version") + b"G@\x08\0\0\0\0\0\0" + text_of("model") + b"}"
    return start + text_of("args") + namespace + b"u."


def doubled(start: bytes, double: bytes, times: int) -> bytes:
    """Something that holds the one before twice, so many times."""
    return start + b"q\0" + b"".join(b"h\0" + double + b"q\0" for _ in range(times))


TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((" + text_of("storage") + b"ctorch\nFloatStorage\n" + text_of("0")
    + text_of("cpu") + b"K\1tQK\0J\0\0\0\x40J\0\0\0\x40\x86K\0K\0\x86\x89ccollections\nOrderedDict\n)RtR"
)  # fmt: skip
"""2**30 by 2**30 elements with strides of 0, in a storage of one."""
CALL = {
    "20 GB": b"c__builtin__\nbytearray\n(\x8a\x05" + (20 * 10**9).to_bytes(5, "little") + b"tR",
    "a codec": b"c_codecs\nencode\n(" + text_of("\u00e4" * 50_000) + text_of("punycode") + b"tR",
}
KEYED = b"}" + doubled(b")", b"h\0\x86", 60) + b"Ns"

DEEP, WIDE = "[" * 200_000, "[" + "[]," * 3_500_000 + "0]"
ANCHORS = "abcdefghi"
BOMB = "a: &a [x]\n" + "".join(f"{b}: &{b} [{f'*{a}, ' * 9}*{a}]\n" for a, b in pairwise(ANCHORS))
KEYS = "".join(f"k{number}: 1, " for number in range(20_000))
CASES: dict[str, tuple[Callable[[Path], object], Make, str]] = {
    "yaml aliases": (config, text("f.yaml", BOMB), "E208 10,000 values"),
    "yaml aliases in a value": (config, text("f.yaml", MODEL + "train: {output: [*a]}\n" + BOMB), "E208"),
    "yaml aliases of keys": (config, text("f.yaml", "a: &a {x: 1}\nb: {<<: [" + "*a, " * 9_000 + "]}"), "E208 10,000"),
    "yaml in itself": (config, text("f.yaml", "train: &a [*a]"), "E208 stands inside"),
    "yaml deep": (config, text("f.yaml", "train: " + DEEP), "E208 nested"),
    "yaml deep by indents": (config, text("f.yaml", "".join(" " * i + "a:\n" for i in range(600))), "E208 nested"),
    "yaml keys": (config, text("f.yaml", "train: {" + KEYS + "}"), "E208 10,000"),
    "yaml large": (config, text("f.yaml", "#" * 2**20), "E206 bytes"),
    "yaml digits": (config, text("f.yaml", MODEL + "train: {seed: 0x" + "f" * 5_000 + "}"), "E208 digits"),
    "yaml base 60": (config, text("f.yaml", MODEL + "train: {seed: 1" + ":1" * 5_000 + "}"), "E208 digits"),
    "yaml infinite": (config, text("f.yaml", MODEL + "train: {seed: 1" + ":1" * 5_000 + ".0}"), "E208"),
    "yaml tag": (config, text("f.yaml", "model: !!python/object/apply:os.system ['touch ran']"), "E208"),
    "yaml layers": (config, text("f.yaml", MODEL.replace("layers: 2", "layers: 1000000000")), "E204 10,000"),
    "yaml divisors": (config, text("f.yaml", MODEL.replace("heads: 8", "heads: 2147483646")), "E204|E205"),
    "yaml pipe": (config, pipe("f.yaml"), "E206 pipe"),
    "yaml endless": (config, endless("f.yaml"), "E206 device"),
    "yaml name with nul": (lambda folder: load_config(f"{folder}/a\0b"), text("x", ""), "E206"),
    "hf layers": (huggingface, llama(num_hidden_layers=10**9), "E422 10,000"),
    "hf sizes": (huggingface, llama(hidden_size=10**400), "E420 401 digits"),
    "hf deep": (huggingface, text("config.json", DEEP), "E420"),
    "hf wide": (huggingface, text("config.json", WIDE), "E420"),
    "hf pipe": (huggingface, pipe("config.json"), "E408 pipe"),
    "hf endless": (huggingface, endless("config.json"), "E408 link"),
    "hf pickle": (huggingface, both(llama(), text("pytorch_model.bin", PICKLE)), "E423 pickle"),
    "hf index leads out": (huggingface, index("../../etc/passwd"), "E428 plain name"),
    "hf index absolute": (huggingface, index("/etc/x.safetensors"), "E428 plain name"),
    "hf shard is a pipe": (huggingface, both(index("a.safetensors"), pipe("a.safetensors")), "E408 pipe"),
    "hf shard is a link": (huggingface, both(index("a.safetensors"), endless("a.safetensors")), "E408 link"),
    "safetensors announces 2^63": (huggingface, tensors(b"{}", 2**63), "E410 too short"),
    "safetensors large header": (huggingface, tensors(b"[" * (9 << 20)), "E410 allowed"),
    "safetensors deep": (huggingface, tensors(DEEP.encode()), "E410 JSON"),
    "safetensors wide": (huggingface, tensors(b'{"a":[' + b"[]," * 2_000_000 + b"0]}"), "E410 JSON"),
    "safetensors shapes": (
        huggingface,
        tensors(b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,0]}}' % (b"9" * 4_000)),
        "E410 4,000",
    ),
    "manifest deep": (checkpoint, text("manifest.json", DEEP), "E403 JSON"),
    "manifest wide": (checkpoint, text("manifest.json", WIDE), "E403 JSON"),
    "manifest pipe": (checkpoint, pipe("manifest.json"), "E408 pipe"),
    "manifest sparse": (checkpoint, sparse("manifest.json"), "E403 bytes"),
    "manifest leads out": (
        checkpoint, manifest(files=[{"name": "../x", "size": 1, "header": "0" * 32, "slices": []}]), "E406 file name"
    ),
    "manifest's tokenizer leads out": (
        checkpoint, manifest(tokenizer={"fingerprint": "0" * 32, "files": {"../x": [1, "0" * 32]}}), "E406 file name"
    ),
    "manifest layers": (
        checkpoint,
        manifest(config={"model": {"hidden_size": 64, "ffn_hidden_size": 64, "num_attention_heads": 8,
                                   "num_layers": 10**9}}),
        "E406 10,000",
    ),
    "header pipe": (dataset, indexed(pipe("p.meta.json")), "E339 pipe"),
    "header endless": (dataset, indexed(endless("p.meta.json")), "E339 device"),
    "header sparse": (dataset, indexed(sparse("p.meta.json")), "E339 never has more"),
    "header deep": (dataset, indexed(text("p.meta.json", DEEP)), "E339 deep"),
    "header wide": (dataset, indexed(text("p.meta.json", WIDE)), "E339 values"),
    "idx pipe": (dataset, pipe("p.idx"), "E330"),
    "idx endless": (dataset, endless("p.idx"), "E330"),
    "idx sparse": (dataset, both(sparse("p.idx"), text("p.bin", "")), "E331"),
    "idx of zeros": (dataset, indexed_zeros(10**11), "E334 never written"),
    "megatron: a zip bomb": (
        megatron, archive(state(b"N"), method=zipfile.ZIP_DEFLATED, zeros=20 << 20), "E433 compressed"
    ),
    "megatron: many operations": (megatron, archive(state(b"N0" * 400_000 + b"N")), "E433 operations"),
    "megatron: a key of keys": (megatron, archive(state(KEYED)), "E433 hold each other"),
    "megatron: a number of a million bits": (
        megatron, archive(state(b"\x8b" + struct.pack("<i", 200_000) + b"\1" * 200_000)), "E433 bits"
    ),
    "megatron: a tensor of nothing": (megatron, archive(state(TENSOR), b"\0" * 4), "E433 elements in a storage"),
    "megatron: 20 GB of zeros": (megatron, archive(arguments(CALL["20 GB"])), "E432 type=a bytearray"),
    "megatron: a slow codec": (megatron, archive(arguments(CALL["a codec"])), "E432 position_embedding_type=a encode"),
    "megatron: lists in lists": (
        megatron, archive(arguments(b"]" + doubled(b"]", b"(h\0h\0l0", 60) + b"h\0")), "E433|E432"
    ),
    "megatron: an end that leads away": (
        megatron, both(archive(state(b"N")), lambda folder: _end_with(folder, start=2**32 - 2)), "E433 directory"
    ),
    "megatron: sparse": (megatron, both(archive(state(b"N")), lambda f: os.truncate(_only(f), 10**11)), "E433 end"),
    "megatron: metadata sparse": (megatron, both(metadata(b""), sparse(".metadata")), "E433 never has more"),
    "megatron: metadata of keys": (megatron, metadata(b"\x80\x02" + KEYED + b"."), "E433 hold each other"),
    "megatron: metadata of one long tuple": (
        megatron,
        metadata(b"\x80\x02(" + b"N" * 90_000 + b"tq\0" + b"cmegatron\na\nh\0R0" * 9_000 + b"N."),
        "E433 hold each other",
    ),
    "megatron: metadata pipe": (megatron, both(metadata(b""), lambda f: (f / ".metadata").unlink(), pipe(".metadata")),
                                "E433 pipe"),
    "tokenizer of four billion": (tokenizer, vocabulary(a=4_000_000_000), "E313 below"),
    "tokenizer deep": (tokenizer, text("tokenizer.json", DEEP), "E313 deep"),
    "tokenizer wide": (tokenizer, text("tokenizer.json", WIDE), "E313 values"),
    "tokenizer that panics": (
        tokenizer,
        text("tokenizer.json", json.dumps(
            TOKENIZER | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}})),
        "E313",
    ),
    "tokenizer pipe": (tokenizer, pipe("tokenizer.json"), "E399"),
    "tokenizer endless": (tokenizer, endless("tokenizer.json"), "E399"),
    "tokenizer's config is a pipe": (tokenizer, both(vocabulary(a=0), pipe("tokenizer_config.json")), "E313 pipe"),
    "tokenizer's config deep": (tokenizer, both(vocabulary(a=0), text("tokenizer_config.json", DEEP)), "E313 deep"),
    "model of a pickle": (tokenizer, text("t.model", PICKLE), "E312"),
    "model sparse": (tokenizer, sparse("t.model"), "E312 never has more"),
    "model of empty pieces": (tokenizer, text("t.model", b"\x0a\x00" * (7 << 20)), "E312 never has more"),
    "tiktoken of a billion": (tokenizer, text("t.tiktoken", RANKS + b"YWI= 1000000000\n"), "E313 below"),
    "tiktoken digits": (tokenizer, text("t.tiktoken", RANKS + b"YWI= " + b"9" * 5_000 + b"\n"), "E312"),
    "metrics deep": (curves, text("metrics.jsonl", DEEP + "\n"), "E382 deep"),
    "metrics line without end": (curves, endless("metrics.jsonl"), "E380 device"),
    "metrics long line": (curves, text("metrics.jsonl", b"x" * (5 << 20)), "E382 longer"),
    "metrics infinite": (curves, text("metrics.jsonl", '{"step": 1e999, "loss": 1, "lr": 1}\n'), "E382"),
    "metrics digits": (curves, text("metrics.jsonl", '{"step": 1, "loss": 1%s, "lr": 1}\n' % ("0" * 400)), "E382"),
    "metrics pipe": (curves, pipe("metrics.jsonl"), "E380 pipe"),
    "corpus pipe": (corpus, pipe("a.jsonl"), "E301 pipe"),
    "corpus endless": (corpus, endless("a.jsonl"), "E301 device"),
    "corpus of parquet that is a pipe": (corpus, pipe("a.parquet"), "E301 pipe"),
    "corpus deep": (corpus, text("a.jsonl", '{"text": ' + DEEP + "\n"), "E304"),
    "corpus of one line": (corpus, text("a.jsonl.gz", gzip.compress(b"x" * (40 << 20), 9)), "E304|E309"),
}  # fmt: skip


VOCABULARY = b'{"model": {"type": "BPE", "merges": [], "vocab": {"'
CASES |= {
    "tokenizer of one string": (tokenizer, tokenizer_text(VOCABULARY, b"x", 5 << 20, b'": 0}}}'), "E313 long strings"),
    "tokenizer of quotes": (
        tokenizer,
        tokenizer_text(VOCABULARY, rb"\\\",[{", 5 << 20, b'": 0}}}'),
        "E313 long strings",
    ),
    "tokenizer of objects": (tokenizer, tokenizer_text(b"[0", b',{"a":0}', 5 << 20, b"]"), "E313 values"),
    "tokenizer in UTF-16": (tokenizer, text("tokenizer.json", (" " * (3 << 20) + "[]").encode("utf-16")), "E313 UTF-8"),
    "tokenizer's config of one string": (
        tokenizer,
        both(vocabulary(a=0), text("tokenizer_config.json", '["%s"]' % ("x" * (5 << 20)))),
        "E313 long strings",
    ),
    "tiktoken of a long piece": (
        tokenizer,
        text("t.tiktoken", RANKS + base64.b64encode(b"ab" * 5_000) + b" 256\n"),
        "E312 longer",
    ),
    "hf of one string": (huggingface, text("config.json", '{"model_type": "%s"}' % ("x" * (5 << 20))), "E420"),
    "hf index of many": (huggingface, index(*["a.safetensors"] * 60_001), "E428 60,001"),
    "safetensors of many": (huggingface, empty_tensors(50_000), "E410 values"),
    "ledger of nothing": (ledger, text("ledger.jsonl", "\n" * (4 << 20)), "E436 line"),
    "ledger large": (ledger, sparse("ledger.jsonl"), "E436 never has more"),
    "symbols large": (symbols, text("symbols.txt", "ab\n" * (1 << 20)), "E261 never has more"),
    "corpus of empty arrays": (
        corpus,
        text("a.jsonl", '{"text": "a", "b": [[]%s]}\n' % (",[]" * (3 << 19))),
        "E304 values",
    ),
    "header of one string": (
        dataset,
        indexed(text("p.meta.json", '{"a": "%s"}' % ("x" * (5 << 20)))),
        "E339 long strings",
    ),
}
MEGABYTES = 47 << 20


def large() -> dict[str, tuple[Callable[[Path], object], Make, str]]:
    """Each just within or just beyond a limit of size; made only where they run: they take seconds and 300 MB."""
    return {
        "megatron: metadata of operations": (
            megatron,
            metadata(b"\x80\x02" + b"N0" * 400_000 + b"N."),
            "E433 operations",
        ),
        "megatron: metadata of classes": (
            megatron,
            metadata(b"\x80\x02" + b"".join(b"cmegatron.a%d\nb\n0" % n for n in range(90_000)) + b"N."),
            "E433 classes",
        ),
        "tokenizer of 47 MB": (tokenizer, tokenizer_text(VOCABULARY, b"x", MEGABYTES, b'": 0}}}'), "E313 long strings"),
        "tokenizer of 47 MB with a rare character": (
            tokenizer,
            tokenizer_text(VOCABULARY + "\U0001f600".encode(), b"x", MEGABYTES, b'": 0}}}'),
            "E313 long strings",
        ),
        "tokenizer of 47 MB of quotes": (
            tokenizer,
            tokenizer_text(VOCABULARY, rb"\"", MEGABYTES, b'": 0}}}'),
            "E313 long",
        ),
        "tokenizer of 47 MB of backslashes": (
            tokenizer,
            tokenizer_text(VOCABULARY, rb"\\", MEGABYTES, b'": 0}}}'),
            "E313 long",
        ),
        "tokenizer of 47 MB of commas": (
            tokenizer,
            tokenizer_text(VOCABULARY, b",[{:", MEGABYTES, b'": 0}}}'),
            "E313 long",
        ),
        "tokenizer of 47 MB of spaces": (tokenizer, tokenizer_text(b"{", b" ", MEGABYTES, b"}"), "E313 long"),
        "tokenizer of long pieces": (
            tokenizer,
            tokenizer_text(VOCABULARY + b'a":0', b',"' + b"x" * 65_536 + b'":0', MEGABYTES, b"}}}"),
            "E313 long",
        ),
        "tokenizer of a digit": (tokenizer, tokenizer_text(b'{"model": 0.', b"0", MEGABYTES, b"}"), "E313 long"),
        "tokenizer of the longest string": (
            tokenizer,
            tokenizer_text(VOCABULARY + "\U0001f600".encode(), b"x", 4 << 20, b'": 5000000}}}'),
            "E313 below",
        ),
        "tokenizer of objects to the limit": (
            tokenizer,
            tokenizer_text(b"[0", b',{"a":0}', 4_790_000, b"]"),
            "E313 describes",
        ),
        "tokenizer of arrays to the limit": (
            tokenizer,
            tokenizer_text(b"[0", b",[0]", 3_990_000, b"]"),
            "E313 describes",
        ),
        "tokenizer's four configs": (
            tokenizer,
            both(
                vocabulary(a=0),
                *(
                    text(name, f'{{"bos_token": ["\U0001f600{"x" * 4_190_000}"]}}')
                    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
                ),
                text("config.json", f'{{"bos_token": ["\U0001f600{"x" * 4_190_000}'),
            ),
            "E313 config.json",
        ),
        "model of one piece": (
            tokenizer,
            text("t.model", b"\x0a\x84\x80\x80\x05\x0a\xff\xff\xff\x04" + b"x" * 10_485_759),
            "E312",
        ),
        "tiktoken of many pieces": (
            tokenizer,
            text(
                "t.tiktoken",
                RANKS
                + b"".join(base64.b64encode(b"%06d" % n + b"ab" * 14) + b" %d\n" % (256 + n) for n in range(50_000))
                + b"x",
            ),
            "E312 line",
        ),
        "tiktoken of the longest pieces": (
            tokenizer,
            text(
                "t.tiktoken",
                RANKS
                + b"".join(
                    base64.b64encode(b"%02d" % n + b"ab" * 1_200) + b" %d\n" % (4_200_000 + n) for n in range(10)
                ),
            ),
            "E313 below",
        ),
        "safetensors of 80,000": (huggingface, empty_tensors(80_000), "E410 values"),
        "safetensors to the limit": (huggingface, empty_tensors(33_000), "E425"),
        "hf of 30 MB": (
            huggingface,
            text("config.json", '{"model_type": "\U0001f600%s"}' % ("x" * (30 << 20))),
            "E420",
        ),
        "hf of ten thousand layers": (huggingface, both(llama(num_hidden_layers=10_000), empty_tensors(1)), "E425"),
        "hf index to the limit": (
            huggingface,
            both(index(*["a.safetensors"] * 59_000), empty_tensors(1)),
            "E425|E428|E408",
        ),
        "manifest of slices": (
            checkpoint,
            manifest(
                files=[
                    {
                        "name": "rank-00000.safetensors",
                        "size": 1,
                        "header": "0" * 32,
                        "slices": [[0, n, n + 1, "0" * 32] for n in range(149_000)],
                    }
                ],
                tensors=[["a", "weight", [149_000], "float32"]],
            ),
            "E406 config",
        ),
        "manifest of tensors": (
            checkpoint,
            manifest(tensors=[[f"a{n}", "weight", [1], "float32"] for n in range(149_000)]),
            "E407",
        ),
        "manifest of one string": (checkpoint, manifest(config={"model": {"x": "y" * (15 << 20)}}), "E403"),
        "ledger of ranges": (
            ledger,
            text(
                "ledger.jsonl",
                "".join(
                    json.dumps(
                        {"rewind": n, "step": 9, "finding": "spike", "back_to_step": 1, "skipped_samples": [[n, n + 1]]}
                    )
                    + "\n"
                    for n in range(1, 40_000)
                )
                + "x\n",
            ),
            "E436 line",
        ),
        "corpus of many values": (corpus, text("a.jsonl", '{"text": 1, "b": [[]%s]}\n' % (",[]" * 330_000)), "E307"),
        "corpus of 30 MB of arrays": (
            corpus,
            text("a.jsonl", '{"text": 1, "b": [[]%s]}\n' % (",[]" * 10_000_000)),
            "E304 values",
        ),
    }


if os.environ.get("HAMMER_HOSTILE_LIMITS"):
    CASES |= large()


def _only(folder: Path) -> Path:
    return next(folder.rglob("*.pt"))


def _end_with(folder: Path, start: int) -> None:
    """The archive's end names another place for its directory."""
    content = bytearray(_only(folder).read_bytes())
    struct.pack_into("<I", content, len(content) - 6, start)
    _only(folder).write_bytes(content)


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_nothing_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use, make, words = CASES[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    make(tmp_path / "folder")
    if os.environ.get("HAMMER_HOSTILE_LIMITS"):
        _hold_to_limits(lambda: use(tmp_path / "folder"))
    with pytest.raises(Exception) as caught:
        use(tmp_path / "folder")
    error = from_exception(caught.value, "the test")
    assert isinstance(error, HammerError) and 2 <= error.exit_code <= 5, repr(caught.value)
    line, (code, _, word) = str(error), words.partition(" ")
    assert error.code in code.split("|") and word in line, line
    assert line.isprintable() and len(line) < 4_000 and not (tmp_path / "ran").exists()


def _hold_to_limits(use: Callable[[], object]) -> None:
    """In a process of its own: at most 2 s of the processor, and 200 MB beyond what the process had."""
    child = os.fork()
    if child == 0:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before, started = _peak_kilobytes(), time.process_time()
        with contextlib.suppress(BaseException):  # the caller looks at it
            use()
        fits = time.process_time() - started < 2 and _peak_kilobytes() - before < 200_000
        os._exit(0 if fits else 1)
    assert os.waitpid(child, 0)[1] == 0, "took more than 2 s or 200 MB"


def _peak_kilobytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
