"""Preprocessing that is killed at any moment goes on, and ends in the bytes of a run that nobody killed."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from megatron_hammer.base.errors import DataError, HammerError, RefusedError
from megatron_hammer.base.signals import Stopped
from megatron_hammer.corpus import file_blocks
from megatron_hammer.dataset.make.encoding import EncodedBlock
from megatron_hammer.dataset.make.output import BuildSummary, DatasetOutput
from megatron_hammer.dataset.reader import IndexedDataset
from tests.dataset.built import build_datasets, memory_path  # noqa: F401  its name as a fixture is tmp_path

REPOSITORY = Path(__file__).parents[3]
KILLED = 9
SHARD_BYTES = 4000
_DURABLE = ("replace", "unlink", "fsync", "ftruncate", "rename")


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Plain, compressed, text and parquet, with bad lines here and there."""
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(file_blocks, "BLOCK_BYTES", 700)
    rng = random.Random(0)
    words = ["model ", "world", "世界", "你好", "x", " ", "\n", "text"]

    def lines(count: int) -> bytes:
        found = []
        for _ in range(count):
            text = "".join(rng.choices(words, k=rng.randint(0, 40)))
            line = json.dumps({"text": text, "title": text[:5]}, ensure_ascii=rng.random() < 0.5).encode()
            found.append(rng.choice([b"", b"{", b'{"text": "\xff"}']) if rng.random() < 0.03 else line)
        return b"\n".join(found) + b"\n"

    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(lines(90))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines(30)))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(lines(30)))
    (folder / "d.txt").write_bytes(b"plain text\n" * 30)
    texts = [None if k == 9 else "".join(rng.choices(words, k=20)) for k in range(30)]
    table = pyarrow.table({"text": pyarrow.array(texts, pyarrow.string()), "title": ["t"] * 30})
    pyarrow.parquet.write_table(table, folder / "e.parquet", row_group_size=15)
    return sorted(folder.iterdir())


def run(corpus: list[Path], tokenizer: Path, prefix: Path, **options: object) -> list[BuildSummary]:
    settings = {"on_error": "quarantine", "shard_bytes": SHARD_BYTES, "workers": 2, "keys": ["text"]} | options
    keys = settings.pop("keys")
    return build_datasets(corpus, keys, tokenizer, prefix, True, True, **settings)  # type: ignore[arg-type]


def killed_at(step: int, work: Callable[[], object]) -> bool:
    """Do the work in a child process that dies at its step-th durable operation; whether it came so far."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            count = 0

            def dying(function: Callable) -> Callable:
                def call(*args: object, **kwargs: object) -> object:
                    nonlocal count
                    count += 1
                    if count == step:
                        os._exit(KILLED)  # as SIGKILL does: nothing is cleaned up
                    return function(*args, **kwargs)

                return call

            for name in _DURABLE:
                setattr(os, name, dying(getattr(os, name)))
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, 2)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFEXITED(status) and os.WEXITSTATUS(status) in (0, KILLED), status
    return os.WEXITSTATUS(status) == KILLED


def outputs(prefix: Path) -> dict[str, bytes]:
    """Final files by what follows the prefix; temporaries and journal are not expected to be there."""
    return {p.name.removeprefix(prefix.name): p.read_bytes() for p in sorted(prefix.parent.glob(f"{prefix.name}*"))}


def check_no_half(prefix: Path, whole: dict[str, bytes]) -> None:
    """What has its final name is a whole dataset."""
    idx = Path(f"{prefix}_text_document.idx")
    if idx.exists():
        assert IndexedDataset(f"{prefix}_text_document").header is not None
        for suffix in (".bin", ".idx", ".meta.json", ".rejected.jsonl"):
            name = f"_text_document{suffix}"
            assert Path(f"{prefix}{name}").read_bytes() == whole[name], suffix


def test_killed_at_every_durable_step(tmp_path: Path, corpus: list[Path], tokenizer: Path, capfd) -> None:
    corpus = [corpus[0], corpus[2], corpus[4]]
    run(corpus, tokenizer, tmp_path / "whole")
    whole = outputs(tmp_path / "whole")
    assert len(whole["_text_document.rejected.jsonl"].splitlines()) >= 3
    prefix, step, resumed = tmp_path / "p", 0, 0
    while True:
        step += 1
        if not killed_at(step, lambda: run(corpus, tokenizer, prefix)):
            break
        check_no_half(prefix, whole)
        capfd.readouterr()
        (summary,) = run(corpus, tokenizer, prefix, workers=1 + step % 3)
        resumed += "going on from" in capfd.readouterr().err
        assert outputs(prefix) == whole, step
        assert summary.documents == IndexedDataset(summary.prefix).num_documents
        for path in prefix.parent.glob("p_*"):
            path.unlink()
    assert step > 30 and resumed > step / 2, (step, resumed)


def test_killed_several_times_in_a_row_with_two_keys(tmp_path: Path, corpus: list[Path], tokenizer: Path) -> None:
    corpus = [path for path in corpus if path.suffix != ".txt"]
    run(corpus, tokenizer, tmp_path / "whole", keys=["text", "title"])
    whole = outputs(tmp_path / "whole")
    rng = random.Random(3)
    for _ in range(4):
        kills = 0
        while killed_at(rng.randint(1, 25), lambda: run(corpus, tokenizer, tmp_path / "p", keys=["text", "title"])):
            check_no_half(tmp_path / "p", whole)
            kills += 1
        assert outputs(tmp_path / "p") == whole and kills
        for path in tmp_path.glob("p_*"):
            path.unlink()


def test_the_old_dataset_stays_until_the_new_one_is_whole(tmp_path: Path, corpus: list[Path], tokenizer: Path) -> None:
    run(corpus, tokenizer, tmp_path / "whole")
    whole = outputs(tmp_path / "whole")
    run(corpus[:1], tokenizer, tmp_path / "p")
    old = outputs(tmp_path / "p")
    assert killed_at(20, lambda: run(corpus, tokenizer, tmp_path / "p"))
    now = outputs(tmp_path / "p")
    assert {name: now[name] for name in old} == old and "_text_document.journal.json" in now
    run(corpus, tokenizer, tmp_path / "p")
    assert outputs(tmp_path / "p") == whole


def leave_journal(corpus: list[Path], tokenizer: Path, prefix: Path, step: int = 15, **options: object) -> Path:
    assert killed_at(step, lambda: run(corpus, tokenizer, prefix, **options))
    journal = Path(f"{prefix}_text_document.journal.json")
    assert journal.exists()
    return journal


def test_the_journal_of_another_command_is_refused(tmp_path: Path, corpus: list[Path], tokenizer: Path) -> None:
    journal = leave_journal(corpus, tokenizer, tmp_path / "p")
    before = outputs(tmp_path / "p")
    for inputs, options, words in (
        (corpus[:-1], {}, "inputs"),
        (corpus, {"text_documents": "line"}, "text_documents file, now line"),
        (corpus, {"on_error": "skip"}, "on_error quarantine, now skip"),
        (corpus, {"keys": ["text", "title"]}, "json_keys text, now text, title"),
    ):
        with pytest.raises(RefusedError, match=f"E534.*{words}.*--restart"):
            run(inputs, tokenizer, tmp_path / "p", **options)
        assert outputs(tmp_path / "p") == before
    run(corpus[:2], tokenizer, tmp_path / "p", restart=True)
    run(corpus[:2], tokenizer, tmp_path / "q")
    assert outputs(tmp_path / "p") == outputs(tmp_path / "q") and not journal.exists()
    journal.write_text("{}")
    with pytest.raises(DataError, match=r"E348"):
        run(corpus, tokenizer, tmp_path / "p")


def test_an_input_that_has_changed_is_refused_where_it_was_read(
    tmp_path: Path, corpus: list[Path], tokenizer: Path, capfd
) -> None:
    run(corpus, tokenizer, tmp_path / "whole")
    whole = outputs(tmp_path / "whole")
    journal = leave_journal(corpus, tokenizer, tmp_path / "p")
    state = json.loads(journal.read_text())
    assert state["source"] == 0 and state["offset"] > 0, "the test wants to be in the middle of the first file"
    content = corpus[0].read_bytes()
    corpus[0].write_bytes(b"!" + content[1:])
    with pytest.raises(RefusedError, match=r"E535.*a.jsonl has changed"):
        run(corpus, tokenizer, tmp_path / "p")
    corpus[0].write_bytes(content)  # its time of change is another one now, its content is not
    capfd.readouterr()
    run(corpus, tokenizer, tmp_path / "p")
    assert outputs(tmp_path / "p") == whole and "going on from" in capfd.readouterr().err

    journal = leave_journal(corpus, tokenizer, tmp_path / "p", 40)
    source = json.loads(journal.read_text())["source"]
    assert source > 0
    os.utime(corpus[0], (1, 1))
    with pytest.raises(RefusedError, match=r"E535.*a.jsonl"):
        run(corpus, tokenizer, tmp_path / "p")


def test_a_mended_line_or_leave_to_skip_goes_on(tmp_path: Path, corpus: list[Path], tokenizer: Path, capfd) -> None:
    good = [line for line in corpus[0].read_bytes().splitlines() if len(line) > 20]
    path = tmp_path / "a.jsonl"
    options = {"on_error": "stop"}
    bad = [*good[:60], b'{"text"!: 1}', *good[60:]]
    path.write_bytes(b"\n".join(bad) + b"\n")
    for mended in (True, False):
        with pytest.raises(DataError, match=r"E304.*a.jsonl:61"):
            run([path], tokenizer, tmp_path / "p", **options)
        assert "the same command goes on from there" in capfd.readouterr().err
        if mended:
            path.write_bytes(b"\n".join([*good[:60], b'{"text": "1"}', *good[60:]]) + b"\n")
        else:
            options = {"on_error": "skip"}
        run([path], tokenizer, tmp_path / "p", **options)
        assert "going on from" in capfd.readouterr().err
        run([path], tokenizer, tmp_path / "whole", **options)
        assert outputs(tmp_path / "p") == outputs(tmp_path / "whole")
        path.write_bytes(b"\n".join(bad) + b"\n")


def test_foreign_temporaries_are_not_taken(tmp_path: Path, corpus: list[Path], tokenizer: Path, capfd) -> None:
    run(corpus, tokenizer, tmp_path / "whole")
    whole = outputs(tmp_path / "whole")
    for suffix, change in ((".bin", "other"), (".bin", "short"), (".idx", "short"), (".documents", "gone"),
                           (".bin", "gone"), (".rejected.jsonl", "short"), (".rejected.jsonl", "gone")):  # fmt: skip
        leave_journal(corpus, tokenizer, tmp_path / "p", 30)
        path = tmp_path / f"p_text_document{suffix}.tmp"
        content = path.read_bytes()
        if change == "gone":
            path.unlink()
        else:
            path.write_bytes(content[:5] if change == "short" else bytes(len(content)))
        capfd.readouterr()
        run(corpus, tokenizer, tmp_path / "p")
        assert "beginning again" in capfd.readouterr().err
        assert outputs(tmp_path / "p") == whole, (suffix, change)


def test_the_lock_keeps_a_second_run_and_its_journal_away(
    tmp_path: Path, corpus: list[Path], tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[HammerError] = []
    append = DatasetOutput.append

    def meanwhile(self: DatasetOutput, item: EncodedBlock) -> None:
        append(self, item)
        if not refused and self.journal_path.exists():
            monkeypatch.setattr(DatasetOutput, "append", append)
            for restart in (False, True):
                try:
                    run(corpus, tokenizer, tmp_path / "p", restart=restart)
                except HammerError as error:
                    refused.append(error)

    monkeypatch.setattr(DatasetOutput, "append", meanwhile)
    run(corpus, tokenizer, tmp_path / "p")
    run(corpus, tokenizer, tmp_path / "whole")
    assert [error.code for error in refused] == ["E342", "E342"]
    assert outputs(tmp_path / "p") == outputs(tmp_path / "whole")


def test_an_input_that_changes_meanwhile_is_an_error(
    tmp_path: Path, corpus: list[Path], tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = DatasetOutput.append

    def meanwhile(self: DatasetOutput, item: EncodedBlock) -> None:
        with open(corpus[0], "ab") as file:
            file.write(b'{"text": "more"}\n')
        append(self, item)

    monkeypatch.setattr(DatasetOutput, "append", meanwhile)
    with pytest.raises(DataError, match=r"E349.*a.jsonl"):
        run(corpus[:1], tokenizer, tmp_path / "p", shard_bytes=1 << 30)
    assert outputs(tmp_path / "p") == {}


# ---- the program, killed from outside ----


def start(corpus: list[Path], tokenizer: Path, prefix: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(REPOSITORY / "tools" / "preprocess_data.py"), "--input", *map(str, corpus),
               "--tokenizer-model", str(tokenizer), "--output-prefix", str(prefix), "--append-eod", "--workers", "2",
               "--shard-mb", "2"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def large(tmp_path: Path) -> list[Path]:
    """24 MB: some journals, and long enough to be hit."""
    line = json.dumps({"text": "model world x line text is " * 300}).encode() + b"\n"
    (tmp_path / "large.jsonl").write_bytes(line * (24_000_000 // len(line)))
    return [tmp_path / "large.jsonl"]


def test_sigkill_at_random_moments(tmp_path: Path, large: list[Path], tokenizer: Path) -> None:
    whole = start(large, tokenizer, tmp_path / "whole")
    assert whole.wait(120) == 0
    rng = random.Random(1)
    journal = tmp_path / "p_text_document.journal.json"
    kills = 0
    while True:
        process = start(large, tokenizer, tmp_path / "p")
        seen = journal.stat().st_mtime_ns if journal.exists() else 0
        if kills < 4:
            wait_for(lambda: journal.exists() and journal.stat().st_mtime_ns != seen, process)  # noqa: B023
            time.sleep(rng.random() * 0.05)
            process.send_signal(signal.SIGKILL)
        _, stderr = process.communicate(timeout=120)
        assert ("going on from" in stderr) == (kills > 0), stderr
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, stderr
        if (tmp_path / "p_text_document.idx").exists():
            break  # hit behind the last rename: what has the name must be whole
        kills += 1
    assert kills >= 1
    assert outputs(tmp_path / "p") == outputs(tmp_path / "whole")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_keeps_everything_that_is_done(
    tmp_path: Path, large: list[Path], tokenizer: Path, number: int, code: int
) -> None:
    process = start(large, tokenizer, tmp_path / "p")
    wait_for((tmp_path / "p_text_document.journal.json").exists, process)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code and stdout == "", stderr
    assert stderr.startswith("stopped after ") and stderr.endswith("the same command goes on from there\n")
    assert stderr.count("\n") == 1 and not (tmp_path / "p_text_document.idx").exists()
    again = start(large, tokenizer, tmp_path / "p")
    stdout, stderr = again.communicate(timeout=120)
    assert again.returncode == 0 and stderr.startswith("going on from") and stderr.count("\n") == 1
    whole = start(large, tokenizer, tmp_path / "whole")
    whole.communicate(timeout=120)
    assert outputs(tmp_path / "p") == outputs(tmp_path / "whole")


def test_stop_before_the_first_document_leaves_nothing(tmp_path: Path, corpus: list[Path], tokenizer: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped, match="before the first document"):
        run(corpus, tokenizer, tmp_path / "p", stop=stop)
    assert outputs(tmp_path / "p") == {}
