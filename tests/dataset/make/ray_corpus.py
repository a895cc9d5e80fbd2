"""What the tests of parts and of the Ray engine share: a corpus of all kinds with bad documents, and a local run."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

from tests.dataset.built import build_datasets

_WORDS = ["model ", "world", "世界", "你好", "x", " ", "\n", "text", "return"]
_BAD = [b"", b"{", b'{"text": "\xff"}', b'\xef\xbb\xbf{"text": "x", "title": "y"}', b'{"text": 1, "title": "t"}']


def lines(count: int, seed: int, bad: float = 0.05, words: int = 40) -> bytes:
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        text = "".join(rng.choices(_WORDS, k=rng.randint(0, words)))
        line = json.dumps({"text": text, "title": text[:5]}, ensure_ascii=rng.random() < 0.5).encode()
        found.append(rng.choice(_BAD) if rng.random() < bad else line)
    return b"\n".join(found) + b"\n"


def write_corpus(folder: Path, bad: float = 0.05, rows: int = 60) -> list[str]:
    """Names, relative to the folder: plain, compressed, text, parquet with row groups of 10."""
    import pyarrow
    import pyarrow.parquet

    rng = random.Random(7)
    (folder / "a.jsonl").write_bytes(lines(300, 1, bad))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines(40, 2, bad)))
    (folder / "c.txt").write_bytes(b"plain text\n" * 30)
    texts = [None if k % 17 == 9 and bad else "".join(rng.choices(_WORDS, k=20)) for k in range(rows)]
    table = pyarrow.table({"text": pyarrow.array(texts, pyarrow.string()), "title": ["t"] * rows})
    pyarrow.parquet.write_table(table, folder / "d.parquet", row_group_size=10)
    (folder / "e.jsonl").write_bytes(lines(100, 3, bad)[:-1])  # its last line lacks an ending
    return ["a.jsonl", "b.jsonl.gz", "c.txt", "d.parquet", "e.jsonl"]


def local(inputs: list[str], tokenizer: Path, prefix: Path, keys: tuple[str, ...] = ("text",), **options: object):
    return build_datasets(inputs, keys, tokenizer, prefix, True, True, **options)  # type: ignore[arg-type]


def outputs(prefix: Path) -> dict[str, bytes]:
    """All files of this prefix, by what follows it; a folder of parts has the content ``b"parts"``."""
    return {
        path.name.removeprefix(prefix.name): b"parts" if path.is_dir() else path.read_bytes()
        for path in sorted(prefix.parent.glob(f"{prefix.name}_*"))
    }
