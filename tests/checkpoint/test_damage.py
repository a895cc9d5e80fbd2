"""Damaged, incomplete and hostile checkpoints: an error that names the file, every time; never a wrong tensor."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from pathlib import Path

import pytest

from megatron_hammer.base.errors import CheckpointError
from megatron_hammer.base.files import canonical_json, hash_bytes
from megatron_hammer.checkpoint import manifest as checkpoint_format
from megatron_hammer.checkpoint.inspect import verify_checkpoint
from megatron_hammer.checkpoint.manifest import checked_tokenizer_folder, read_manifest
from megatron_hammer.checkpoint.tensor_files import TensorFileReader, TensorFileWriter
from tests.checkpoint.layouts import FakeTokenizer, load_layout, random_logical, tiny_model, write_layout

FLIPS = 200  # in every file
MODEL = tiny_model(hidden_size=8, ffn_hidden_size=8, num_attention_heads=2, num_query_groups=1, vocab_size=33)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine")
    return write_layout(folder, MODEL, random_logical(MODEL), 2, 2, tokenizer=FakeTokenizer()).folder


@pytest.fixture
def checkpoint(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / pristine.name))


def use(folder: Path) -> None:
    """All that a program does with a checkpoint that it loads."""
    manifest = read_manifest(folder)
    checked_tokenizer_folder(manifest)
    load_layout(manifest, MODEL, 1, 1)


def files_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def must_name(path: Path, folder: Path, what: object = "") -> None:
    with pytest.raises(CheckpointError) as caught:
        use(folder)
        pytest.fail(f"{path.name}, {what}: damage was not noticed")
    assert path.name in str(caught.value), (path.name, what, str(caught.value))


def test_the_pristine_checkpoint_loads(checkpoint):
    use(checkpoint)
    verify_checkpoint(read_manifest(checkpoint))


def test_one_flipped_bit_anywhere_is_noticed(checkpoint):
    generator = random.Random(3)
    for path in files_of(checkpoint):
        content = bytearray(path.read_bytes())
        for _ in range(FLIPS):
            bit = generator.randrange(8 * len(content))
            content[bit // 8] ^= 1 << bit % 8
            path.write_bytes(content)
            must_name(path, checkpoint, f"bit {bit}")
            content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
    use(checkpoint)


def test_a_file_of_another_length_is_noticed(checkpoint):
    generator = random.Random(4)
    for path in files_of(checkpoint):
        content = path.read_bytes()
        cut = generator.randrange(len(content))
        hole = content[: len(content) // 2].ljust(len(content), b"\0")
        for damaged in (content[:cut], content[:-1], content + b"\0", content + b"\n", b"", hole):
            path.write_bytes(damaged)
            must_name(path, checkpoint, f"{len(damaged)} of {len(content)} bytes")
        path.write_bytes(content)


def test_size_and_header_are_those_of_the_manifest(checkpoint):
    """Whatever else would notice it too."""
    file = read_manifest(checkpoint).files[0]
    path = checkpoint / file.name
    with pytest.raises(CheckpointError, match="E409"):
        TensorFileReader(path, file.size + 1)
    with pytest.raises(CheckpointError, match=r"E410.*another header"):
        TensorFileReader(path, file.size, "0" * 32)
    TensorFileReader(path, file.size, file.header_hash).close()


def test_a_missing_file_is_noticed(checkpoint):
    for path in files_of(checkpoint):
        content = path.read_bytes()
        path.unlink()
        must_name(path, checkpoint)
        path.write_bytes(content)


def test_swapped_files_are_noticed(checkpoint, tmp_path):
    a, b = checkpoint / "rank-00000.safetensors", checkpoint / "rank-00001.safetensors"
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    must_name(a, checkpoint, "swapped between ranks")
    other = write_layout(tmp_path / "other", MODEL, random_logical(MODEL, seed=1), 2, 2, step=7).folder
    a.write_bytes((other / a.name).read_bytes())
    b.write_bytes(second)
    assert a.stat().st_size == len(first)  # the same header: only the hashes of the tensors can tell
    must_name(a, checkpoint, "of another run")
    shutil.copy(other / "manifest.json", checkpoint)
    a.write_bytes(first)
    with pytest.raises(CheckpointError, match=r"rank-\d+"):
        use(checkpoint)


def test_a_manifest_of_another_step_is_noticed(checkpoint):
    renamed = checkpoint.with_name("step-00000008")
    checkpoint.rename(renamed)
    must_name(renamed / "manifest.json", renamed)
    use(Path(shutil.move(renamed, renamed.with_name("any-other-name"))))


@pytest.mark.parametrize("make", ["symlink", "fifo", "folder"])
def test_what_is_not_a_plain_file_is_refused(checkpoint, tmp_path, make):
    for path in files_of(checkpoint):
        kept = tmp_path / "kept"
        path.rename(kept)
        if make == "symlink":
            path.symlink_to(kept)  # even to the very same bytes
        elif make == "fifo":
            os.mkfifo(path)
        else:
            path.mkdir()
        must_name(path, checkpoint, make)
        path.rmdir() if make == "folder" else path.unlink()
        kept.rename(path)
    use(checkpoint)


def test_a_file_that_the_tokenizer_folder_did_not_have_is_refused(checkpoint):
    (checkpoint / "tokenizer" / "tokenizer.json").write_text("{}")
    must_name(checkpoint / "tokenizer" / "tokenizer.json", checkpoint)


def forge(folder: Path, change) -> None:
    """Change the manifest and give it a right digest, as an attacker would."""
    path = folder / "manifest.json"
    tree = json.loads(path.read_bytes())
    del tree["digest"]
    change(tree)
    tree["digest"] = hash_bytes(canonical_json(tree))
    path.write_bytes(canonical_json(tree) + b"\n")


def test_forging_is_possible_so_that_the_tests_below_test_something(checkpoint):
    forge(checkpoint, lambda tree: tree["state"].update(consumed_samples=4))
    use(checkpoint)


@pytest.mark.parametrize("name", [
    "../rank-00000.safetensors", "/etc/passwd", "rank-00000.safetensors/../rank-00001.safetensors", "", ".",
    "rank-00000.bin",
    "rank-00000.safetensors\n", "rank-0.safetensors", "$(touch x).safetensors", None, 3, ["rank-00000.safetensors"],
])  # fmt: skip
def test_a_file_name_that_could_lead_elsewhere_is_refused(checkpoint, name):
    forge(checkpoint, lambda tree: tree["files"][0].update(name=name))
    with pytest.raises(CheckpointError, match=r"E406"):
        read_manifest(checkpoint)


@pytest.mark.parametrize("change", [
    lambda t: t["files"][0]["slices"].pop(),
    lambda t: t["files"][0]["slices"].append(t["files"][0]["slices"][0]),
    lambda t: t["files"].pop(),
    lambda t: t["files"].append(t["files"][0]),
    lambda t: t["files"][0]["slices"][0].__setitem__(1, -1),
    lambda t: t["files"][0]["slices"][0].__setitem__(2, 10**6),
    lambda t: t["files"][0]["slices"][0].__setitem__(1, True),
    lambda t: t["files"][0]["slices"][0].__setitem__(0, 10**9),
    lambda t: t["files"][0]["slices"][0].__setitem__(0, -1),
    lambda t: t["files"][0]["slices"][0].__setitem__(5, "x"),
    lambda t: t["files"][0]["slices"][0].clear(),
    lambda t: t["tensors"][0].__setitem__(2, [2**60, 2**60]),
    lambda t: t["tensors"][0].__setitem__(2, [0, 8]),
    lambda t: t["tensors"][0].__setitem__(2, 8),
    lambda t: t["tensors"][0].__setitem__(3, "pickle"),
    lambda t: t["tensors"].append(t["tensors"][0]),
    lambda t: t.pop("tensors"),
    lambda t: t.update(files=None),
    lambda t: t.update(config=[]),
    lambda t: t.update(step="7"),
    lambda t: t.update(step=8),
    lambda t: t["layout"].update(unknown=1),
    lambda t: t["layout"].update(cp="2"),
    lambda t: t["layout"].update(world=0),
    lambda t: t["layout"].update(sequence_parallel=1),
    lambda t: t["state"].update(consumed_samples=-1),
    lambda t: t["state"].update(consumed_samples=1.0),
    lambda t: t["state"].update(consumed_samples=[8]),
    lambda t: t["state"].update(samples_digest=7),
    lambda t: t["state"].update(samples_digest="../x"),
    lambda t: t["state"].update(optimizer=[1]),
    lambda t: t["state"].update(optimizer={"updates": "3"}),
    lambda t: t["state"].update(optimizer={"updates": -3.0}),
    lambda t: t["state"].update(optimizer={"updates": 10**350}),
    lambda t: t["state"].update(owed_line="{"),
    lambda t: t["state"].update(owed_line="[1]"),
    lambda t: t["state"].update(data=[]),
    lambda t: t["state"].update(accepted=[1]),
    lambda t: t["state_digest"]["sums"].pop(),
    lambda t: t["state_digest"]["sums"].__setitem__(0, "x"),
    lambda t: t.update(state_digest=None),
    lambda t: t["state_digest"].update(digest=3),
    lambda t: t["tokenizer"]["files"].update({"../../x": [1, "0" * 32]}),
    lambda t: t["tokenizer"]["files"].update({"x": [1]}),
    lambda t: t.update(tokenizer=7),
    lambda t: t.update(tokenizer={"fingerprint": "0" * 32, "files": []}),
    lambda t: t.update(version=2),
    lambda t: t.update(format="something else"),
])  # fmt: skip
def test_a_forged_manifest_is_refused_when_it_is_read(checkpoint, change):
    forge(checkpoint, change)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        read_manifest(checkpoint)


@pytest.mark.parametrize("text", [
    b"", b"{", b"[]", b"null", b"\x80\x04K\x01.", b"[" * 200_000, b'{"a":' * 100_000, b"1" * 100_000, b'{"step":NaN}',
    b'{"format":"megatron_hammer.checkpoint"}', b'\xff\xfe{\0}\0',
], ids=range(11))  # fmt: skip
def test_a_manifest_that_is_no_manifest_is_refused(checkpoint, text):
    (checkpoint / "manifest.json").write_bytes(text)
    must_name(checkpoint / "manifest.json", checkpoint)


def test_a_huge_manifest_is_not_read_whole(checkpoint, monkeypatch):
    monkeypatch.setattr(checkpoint_format, "MAX_MANIFEST_BYTES", 100)
    must_name(checkpoint / "manifest.json", checkpoint)


def header_file(path: Path, header: object, data: bytes = bytes(16), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


GOOD = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize("header", [
    {"a": {**GOOD, "data_offsets": [0, 32]}},
    {"a": {**GOOD, "data_offsets": [4, 20]}},
    {"a": {**GOOD, "data_offsets": [-16, 0]}},
    {"a": {**GOOD, "data_offsets": [16, 0]}},
    {"a": {**GOOD, "shape": [2**31, 2**33]}},
    {"a": {**GOOD, "shape": [-4]}},
    {"a": {**GOOD, "shape": [4.0]}},
    {"a": {**GOOD, "shape": [True, 4]}},
    {"a": {**GOOD, "shape": 4}},
    {"a": {**GOOD, "dtype": "F99"}},
    {"a": {**GOOD, "dtype": ["F32"]}},
    {"a": {**GOOD, "extra": 1}},
    {"a": {"dtype": "F32"}},
    {"a": 3},
    {"a": GOOD, "b": GOOD},  # overlap
    {"a": {**GOOD, "shape": [2], "data_offsets": [0, 8]}},  # data that no tensor accounts for
    {},
    [GOOD],
    b'{"a": {}, "a": {}}',
    b"[" * 100_000,
    b"\x80\x04K\x01.",
], ids=range(21))  # fmt: skip
def test_a_hostile_tensor_file_header_is_refused(tmp_path, header):
    TensorFileReader(header_file(tmp_path / "good", {"a": GOOD}))
    with pytest.raises(CheckpointError, match=r"E410.*bad"):
        TensorFileReader(header_file(tmp_path / "bad", header))


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9, 60])
def test_a_header_longer_than_the_file_is_not_allocated(tmp_path, length):
    with pytest.raises(CheckpointError, match=r"E410"):
        TensorFileReader(header_file(tmp_path / "x", {"a": GOOD}, length=length))
    sparse = header_file(tmp_path / "sparse", {"a": GOOD}, length=2**35)
    os.truncate(sparse, 2**36)  # costs nothing on disk
    with pytest.raises(CheckpointError, match="more than"):
        TensorFileReader(sparse)


def test_the_hash_is_of_memory_and_a_lying_disk_is_noticed(tmp_path, monkeypatch):
    """What the writer is given counts, not what reached the file."""
    from megatron_hammer.checkpoint.commit import write_rank
    from megatron_hammer.checkpoint.write import slices_to_write
    from tests.checkpoint.layouts import rank_shards

    original = TensorFileWriter.__exit__

    def lie(self, *rest):
        original(self, *rest)
        with open(self.path, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)[0]
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last ^ 1]))

    monkeypatch.setattr(TensorFileWriter, "__exit__", lie)
    with pytest.raises(CheckpointError, match=r"E416.*rank-00000"):
        write_rank(tmp_path, 0, slices_to_write(rank_shards(MODEL, 0, 1, 1, random_logical(MODEL))))


def test_reading_needs_no_torch_and_no_pickle():
    import subprocess

    code = ("import sys, megatron_hammer.checkpoint.manifest, megatron_hammer.checkpoint.tensor_files\n"
            "print([m for m in ('torch', 'numpy', 'safetensors', 'transformers') if m in sys.modules])")  # fmt: skip
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    package = Path(checkpoint_format.__file__).parent
    for path in package.glob("*.py"):
        text = path.read_text()
        assert "import pickle" not in text and "torch.load" not in text and "torch.save" not in text
