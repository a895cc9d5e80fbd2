"""The engine for clusters without a cluster: tasks run in this process, in a shuffled order, and may be lost."""

from __future__ import annotations

import json
import os
import random
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_hammer.base.errors import ConfigError, DataError, RefusedError
from megatron_hammer.base.signals import Stopped
from megatron_hammer.corpus import readers
from megatron_hammer.dataset.make import parts
from megatron_hammer.dataset.make import ray as build_ray
from megatron_hammer.dataset.make.job import prepare_job
from megatron_hammer.dataset.make.journal import Journal
from megatron_hammer.dataset.make.ray import build_datasets_on_ray
from tests.dataset.built import build_datasets, memory_path  # noqa: F401  its name as a fixture is tmp_path
from tests.dataset.make.ray_corpus import lines, local, outputs, write_corpus

SHARD_BYTES = 3000


class RayError(Exception):
    pass


class RayTaskError(RayError):
    pass


class FakeRay:
    """The functions of Ray that the driver calls. ``fail(task, calls so far)`` may raise what a cluster would."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self) -> None:
        self.calls = 0
        self.fail = lambda task, calls: None
        self.made: list[str] = []
        self.cpus = 2.0
        self.most_waiting = 0
        self._waiting: dict[int, tuple] = {}
        self._results: dict[int, object] = {}
        self._rng = random.Random(0)

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict]:
        return [{"Alive": True, "Resources": {"CPU": self.cpus}}, {"Alive": False, "Resources": {"CPU": 64.0}}]

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": self.cpus}

    def remote(self, **options: object):
        assert options["max_retries"]

        def submit(*args: object) -> int:
            self.calls += 1
            self._waiting[self.calls] = args
            self.most_waiting = max(self.most_waiting, len(self._waiting))
            return self.calls

        return lambda function: SimpleNamespace(remote=submit)

    def wait(self, references: list[int], num_returns: int, timeout: float) -> tuple[list[int], list[int]]:
        chosen = self._rng.choice(references)
        task, version = self._waiting.pop(chosen)
        try:
            self.fail(task, len(self.made))
            self._results[chosen] = {**parts.run_task(task, version), "node": f"node {self._rng.randint(0, 1)}"}
        except RayError as error:
            self._results[chosen] = error
        self.made.append(task.name)
        return [chosen], []

    def get(self, reference: int) -> object:
        result = self._results.pop(reference)
        if isinstance(result, Exception):
            raise result
        return result

    def cancel(self, reference: int, force: bool) -> None:
        assert force


@pytest.fixture
def ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setattr(build_ray, "_import_ray", lambda: fake)
    monkeypatch.chdir(tmp_path)
    return fake


def spread(inputs: list[str], tokenizer: Path, prefix: Path, keys: tuple[str, ...] = ("text",), **options: object):
    settings = {"shard_bytes": SHARD_BYTES, **options}
    return build_datasets(inputs, keys, tokenizer, prefix, True, True, engine=build_datasets_on_ray, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("keys", [("text",), ("text", "title")])
@pytest.mark.parametrize("on_error", ["stop", "skip", "quarantine"])
def test_the_bytes_of_a_local_run(
    tmp_path: Path, tokenizer: Path, ray: FakeRay, keys: tuple[str, ...], on_error: str, capfd
) -> None:
    inputs = write_corpus(tmp_path, bad=0.0 if on_error == "stop" else 0.1)
    inputs.append(str(tmp_path / inputs[0]))  # once more, by another name
    before = local(inputs, tokenizer, tmp_path / "whole", keys, on_error=on_error)
    summaries = spread(inputs, tokenizer, tmp_path / "p", keys, on_error=on_error)
    found = outputs(tmp_path / "p")
    assert found == outputs(tmp_path / "whole")
    assert ("_text_document.rejected.jsonl" in found) == (on_error == "quarantine")
    assert [(s.documents, s.empty_documents, s.tokens, s.text_bytes, s.rejected, s.encoder) for s in summaries] == [
        (s.documents, s.empty_documents, s.tokens, s.text_bytes, s.rejected, s.encoder) for s in before
    ]
    assert len(ray.made) > 15 and ray.most_waiting == 4, "the corpus should be cut, and the tasks bounded"
    assert (
        f"{len([n for n in ray.made if n[:4] != 'hash'])} parts made on 2 nodes of the Ray cluster"
        in capfd.readouterr().err
    )


def test_lines_of_text_are_cut_too(tmp_path: Path, tokenizer: Path, ray: FakeRay) -> None:
    content = [b"\xff" if k % 40 == 7 else b"\xef\xbb\xbfline" if k % 3 else b"text, x" * (k % 9) for k in range(900)]
    (tmp_path / "a.txt").write_bytes(b"\r\n".join(content))
    options = {"text_documents": "line", "on_error": "quarantine"}
    local(["a.txt"], tokenizer, tmp_path / "whole", **options)
    spread(["a.txt"], tokenizer, tmp_path / "p", **options)
    assert outputs(tmp_path / "p") == outputs(tmp_path / "whole") and len(ray.made) > 5


@pytest.mark.parametrize("place", [0.3, 0.6, None])
def test_a_damaged_parquet_file_ends_where_it_ends_locally(
    tmp_path: Path, tokenizer: Path, ray: FakeRay, place: float | None
) -> None:
    inputs = write_corpus(tmp_path, bad=0.0, rows=200)
    content = bytearray((tmp_path / "d.parquet").read_bytes())
    if place is None:
        content = content[:-20]  # cannot be opened
    else:
        content[int(place * len(content)) : int(place * len(content)) + 300] = bytes(300)
    (tmp_path / "d.parquet").write_bytes(content)
    for number, on_error in enumerate(("skip", "quarantine")):
        local(inputs, tokenizer, tmp_path / f"whole{number}", on_error=on_error)
        spread(inputs, tokenizer, tmp_path / f"p{number}", on_error=on_error, shard_bytes=1000)
        found = outputs(tmp_path / f"p{number}")
        assert found == outputs(tmp_path / f"whole{number}")
        assert b"E347" in found["_text_document.meta.json"]
    errors = []
    for run in (local, spread):
        with pytest.raises(DataError, match="E347") as caught:
            run(inputs, tokenizer, tmp_path / "q", on_error="stop")
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("bad", [(b"{", 250, "E304"), (b"\xef\xbb\xbf{}", 100, "E304"), (b'{"text": 1}', 1, "E307")])
def test_the_first_error_has_its_true_line_and_spoils_nothing(
    tmp_path: Path, tokenizer: Path, ray: FakeRay, bad: tuple[bytes, int, str], capfd
) -> None:
    raw, line, code = bad
    content = lines(300, 1, bad=0).splitlines()
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*content[: line - 1], raw, *content[line:], b"[]"]) + b"\n")
    (tmp_path / "b.jsonl").write_bytes(b"{\n")
    inputs = ["a.jsonl", "b.jsonl"]
    local(["a.jsonl"], tokenizer, tmp_path / "p", on_error="skip")
    old = outputs(tmp_path / "p")
    with pytest.raises(DataError) as expected:
        local(inputs, tokenizer, tmp_path / "q")
    with pytest.raises(DataError) as caught:
        spread(inputs, tokenizer, tmp_path / "p")
    assert str(caught.value) == str(expected.value)
    assert f"error[{code}]: a.jsonl:{line} (byte" in str(caught.value)
    now = outputs(tmp_path / "p")
    assert {name: now[name] for name in old} == old
    assert now.get("_text_document.parts", b"") == (
        b"parts" if "keeps what was done" in capfd.readouterr().err else b""
    )

    local(inputs, tokenizer, tmp_path / "whole", on_error="skip")
    made = len(ray.made)
    spread(inputs, tokenizer, tmp_path / "p", on_error="skip")  # parts without a bad document are good for this too
    again = len(ray.made) - made
    assert outputs(tmp_path / "p") == outputs(tmp_path / "whole")
    assert again < made or line < 250, "parts were there to be taken"


@pytest.mark.parametrize("raw", [b"\xef\xbb\xbf{}", b"\x1f\x8bno gzip"])
def test_a_range_does_not_begin_as_a_file_does(tmp_path: Path, tokenizer: Path, ray: FakeRay, raw: bytes) -> None:
    """Its first line is not searched for the marks of an encoding or of compression."""
    (tmp_path / "a.jsonl").write_bytes(lines(300, 1, bad=0))
    content = (tmp_path / "a.jsonl").read_bytes()
    for part in list(readers.plan_ranges([tmp_path / "a.jsonl"], "file", SHARD_BYTES))[1:]:
        start, end = part.start.offset, content.index(b"\n", part.start.offset)
        content = content[:start] + raw.ljust(end - start) + content[end:]
    (tmp_path / "a.jsonl").write_bytes(content)
    local(["a.jsonl"], tokenizer, tmp_path / "whole", on_error="quarantine")
    spread(["a.jsonl"], tokenizer, tmp_path / "p", on_error="quarantine")
    found = outputs(tmp_path / "p")
    assert found == outputs(tmp_path / "whole")
    assert len(found["_text_document.rejected.jsonl"].splitlines()) == len(ray.made) - 2 > 5  # a hash, the first part


def test_parts_of_other_options_are_not_taken(tmp_path: Path, tokenizer: Path, ray: FakeRay) -> None:
    (tmp_path / "a.txt").write_bytes(b"text\n\nline\n" * 5)
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "x", "title": "line", "other": "y"}\n')
    (tmp_path / "c.jsonl").write_bytes(b"{")
    runs: list[dict] = [{"text_documents": kind} for kind in ("file", "line", "blank-line")]
    runs += [{"json_keys": ["text", "other"]}, {"prepend_bos": False}, {"append_eod": False}]
    usual: dict = {"json_keys": ["text", "title"], "append_eod": True, "prepend_bos": True}
    for number, options in enumerate(runs):
        with pytest.raises(DataError, match=r"E304.*c.jsonl:1"):
            build_datasets(
                ["a.txt", "b.jsonl", "c.jsonl"],
                tokenizer_path=tokenizer,
                output_prefix=tmp_path / "p",
                engine=build_datasets_on_ray,
                **(usual | options),
            )
        spread(["a.txt", "b.jsonl"], tokenizer, tmp_path / "p", ("text", "title"))
        local(["a.txt", "b.jsonl"], tokenizer, tmp_path / f"whole{number}", ("text", "title"))
        assert outputs(tmp_path / "p") == outputs(tmp_path / f"whole{number}")


def test_parts_of_rejected_documents_serve_only_runs_that_want_them(
    tmp_path: Path, tokenizer: Path, ray: FakeRay
) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(300, 1, bad=0.2))

    def interrupted(on_error: str) -> int:
        """Parts that a run makes which loses a worker at its last task."""
        before = len(ray.made)

        def fail(task: object, calls: int) -> None:
            if isinstance(task, parts.PartTask) and task.file_range.end is None:
                raise RayError("worker died")

        ray.fail = fail
        with pytest.raises(ConfigError, match=r"E298.*lost its worker 4 times \(RayError: worker died\)"):
            spread(["a.jsonl"], tokenizer, tmp_path / "p", on_error=on_error)
        ray.fail = lambda task, calls: None
        return len(ray.made) - before

    assert interrupted("skip") > 5
    assert interrupted("skip") == 1
    assert interrupted("quarantine") > 5  # their text is wanted now
    before = len(ray.made)
    spread(["a.jsonl"], tokenizer, tmp_path / "p", on_error="skip")
    assert len(ray.made) == before + 1
    assert interrupted("quarantine") > 5
    with pytest.raises(DataError, match="E30"):
        spread(["a.jsonl"], tokenizer, tmp_path / "p")


def test_only_what_is_missing_is_made_and_nothing_else_is_taken(
    tmp_path: Path, tokenizer: Path, ray: FakeRay, capfd
) -> None:
    inputs = write_corpus(tmp_path, bad=0.1)
    options: dict = {"on_error": "quarantine"}
    local(inputs, tokenizer, tmp_path / "whole", **options)
    folder = tmp_path / "p_text_document.parts"

    def stopped_after(calls: int) -> int:
        stop = threading.Event()
        before = len(ray.made)

        def fail(task: object, made: int) -> None:
            if made - before >= calls:
                stop.set()

        ray.fail = fail
        with pytest.raises(Stopped, match=r"stopped with \d+ parts? done; the same command goes on from there"):
            spread(inputs, tokenizer, tmp_path / "p", stop=stop, **options)
        ray.fail = lambda task, made: None
        return len(ray.made) - before

    def finish(again: int) -> None:
        before = len(ray.made)
        capfd.readouterr()
        spread(inputs, tokenizer, tmp_path / "p", **options)
        assert "going on from" in capfd.readouterr().err
        assert outputs(tmp_path / "p") == outputs(tmp_path / "whole")
        assert len(ray.made) - before == again
        for path in tmp_path.glob("p_*"):
            path.unlink()

    spread(inputs, tokenizer, tmp_path / "p", **options)
    everything = len(ray.made)
    finish_after = stopped_after(9)
    (folder / "attempt-host-1-abc").mkdir()  # of a killed task
    (folder / "attempt-host-1-abc" / "0.bin").write_bytes(b"half")
    finish(everything - finish_after)

    made = stopped_after(9)  # damage of every kind: each damaged part is made again
    there = sorted(path for path in folder.iterdir() if path.is_dir())
    (there[0] / "0.idx").unlink()
    (there[1] / "0.bin").write_bytes(b"")
    content = bytearray((there[2] / "0.bin").read_bytes())
    content[len(content) // 2] ^= 1
    (there[2] / "0.bin").write_bytes(content)
    there[3].joinpath("0.meta.json").unlink()
    os.rename(there[4], folder / "0123")
    finish(everything - made + 5)

    made = stopped_after(9)
    content = bytearray((tmp_path / "a.jsonl").read_bytes())
    os.utime(tmp_path / "a.jsonl", (1, 1))  # may be another content: all of it is made again
    of_others = sum(path.is_dir() and _file_of(path) != "a.jsonl" for path in folder.iterdir())
    finish(everything - of_others)

    stopped_after(9)
    options["on_error"] = "skip"
    spread(inputs[:2], tokenizer, tmp_path / "p", restart=True, **options)
    local(inputs[:2], tokenizer, tmp_path / "other", **options)
    assert outputs(tmp_path / "p") == outputs(tmp_path / "other")


def _file_of(part: Path) -> str:
    header = json.loads((part / "0.meta.json").read_text())
    return Path(header["options"]["part"]["identity"]["file"]["path"]).name


def test_the_engines_do_not_take_each_other_for_themselves(tmp_path: Path, tokenizer: Path, ray: FakeRay) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(300, 1, bad=0))
    stop = threading.Event()
    ray.fail = lambda task, made: stop.set() if made > 3 else None
    with pytest.raises(Stopped):
        spread(["a.jsonl"], tokenizer, tmp_path / "p", stop=stop)
    ray.fail = lambda task, made: None
    with pytest.raises(RefusedError, match=r"E534.*p_text_document.parts.*engine ray, now local"):
        local(["a.jsonl"], tokenizer, tmp_path / "p")
    local(["a.jsonl"], tokenizer, tmp_path / "p", restart=True)
    whole = outputs(tmp_path / "p")
    assert "_text_document.parts" not in whole

    journal = tmp_path / "p_text_document.journal.json"
    Journal({}, [], "stop").save(journal)
    with pytest.raises(RefusedError, match=r"E534.*engine local, now ray"):
        spread(["a.jsonl"], tokenizer, tmp_path / "p")
    spread(["a.jsonl"], tokenizer, tmp_path / "p", restart=True)
    assert outputs(tmp_path / "p") == whole


def test_a_second_driver_is_kept_away(tmp_path: Path, tokenizer: Path, ray: FakeRay) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(300, 1, bad=0))
    refused: list[str] = []

    def meanwhile(task: object, made: int) -> None:
        if made == 3:
            for options in ({}, {"restart": True}):
                with pytest.raises(DataError) as caught:
                    spread(["a.jsonl"], tokenizer, tmp_path / "p", **options)
                refused.append(caught.value.code)

    ray.fail = meanwhile
    spread(["a.jsonl"], tokenizer, tmp_path / "p")
    local(["a.jsonl"], tokenizer, tmp_path / "whole")
    assert refused == ["E342", "E342"] and outputs(tmp_path / "p") == outputs(tmp_path / "whole")


def test_mistakes_of_the_command_and_of_the_cluster(tmp_path: Path, tokenizer: Path, ray: FakeRay) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(100, 1, bad=0))
    os.mkfifo(tmp_path / "pipe")

    def refused(kind: type[Exception], words: str, inputs: str = "a.jsonl", **options: object) -> None:
        with pytest.raises(kind, match=words):
            spread([inputs], tokenizer, tmp_path / "p", **options)
        assert outputs(tmp_path / "p") == {}

    refused(ConfigError, "E275.*--workers=0", workers=0)
    refused(ConfigError, "E275.*--workers-per-task=0", task_workers=0)
    refused(ConfigError, "E278", shard_bytes=0)
    refused(ConfigError, "E277", on_error="ignore")
    refused(ConfigError, "E298.*--workers-per-task=3 is more than the CPUs of any node.*at most 2", task_workers=3)
    refused(DataError, "E377.*pipe", inputs="pipe")
    refused(DataError, "E301.*b.jsonl", inputs="b.jsonl")

    def unknown(task: object, made: int) -> None:
        raise RayTaskError("The remote function failed to import on the worker.")

    ray.fail = unknown
    refused(DataError, "E375.*a node of the cluster lacks megatron_hammer; install megatron_hammer")
    ray.fail = lambda task, made: None
    (tmp_path / "a.jsonl").write_bytes(b'{"text": ""}\n')
    with pytest.raises(DataError, match="E343"):
        spread(["a.jsonl"], tokenizer, tmp_path / "p")
    assert outputs(tmp_path / "p") == {"_text_document.parts": b"parts"}


def test_the_number_of_tasks_under_way_follows_the_workers(tmp_path: Path, tokenizer: Path, ray: FakeRay) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(300, 1, bad=0))
    for options, most in (
        ({"workers": 3, "address": "auto"}, 3),
        ({"workers": 3, "address": "auto", "task_workers": 2}, 1),
        ({"workers": 1, "address": None}, 4),  # twice the CPUs: no node waits
        ({"task_workers": 2}, 2),
    ):
        ray.most_waiting = 0
        spread(["a.jsonl"], tokenizer, tmp_path / "p", **options)
        assert ray.most_waiting == most, options


def test_without_ray(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(3, 1, bad=0))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"E297.*pip install 'megatron_hammer\[ray\]'"):
        spread([str(tmp_path / "a.jsonl")], tokenizer, tmp_path / "p")
    assert outputs(tmp_path / "p") == {}


# ---- a task by itself ----


@pytest.fixture
def task(tmp_path: Path, tokenizer: Path) -> parts.PartTask:
    (tmp_path / "a.jsonl").write_bytes(lines(30, 1, bad=0.1))
    job = prepare_job([tmp_path / "a.jsonl"], ["text"], tokenizer, True, True, "quarantine", "file")
    ((found,),) = parts.plan_tasks(job, tmp_path / "parts", 1 << 20, 2)
    (tmp_path / "parts").mkdir()
    assert isinstance(found, parts.PartTask)
    return found


def error_of(task: parts.PartTask, version: str = parts.__version__) -> str:
    fields = parts.run_task(task, version)["error"]
    assert list(task.folder.iterdir()) == []
    return f"E{fields['exit_code']}{fields['number']:02} {fields['what']} {fields['rule']}"


def test_what_a_node_may_lack(tmp_path: Path, task: parts.PartTask) -> None:
    at_node = f"(on the node {parts.socket.gethostname()})"
    assert error_of(task, "0.0.0").startswith("E375 megatron_hammer ")
    assert error_of(replace(task, fingerprint="0" * 32)).endswith(at_node)
    assert error_of(replace(task, tokenizer_path=tmp_path / "no.model")) == (
        f"E310 {tmp_path}/no.model does not exist {at_node}"
    )
    assert error_of(replace(task, path=tmp_path / "no.jsonl")) == f"E301 {tmp_path}/no.jsonl does not exist {at_node}"
    with open(task.path, "ab") as file:
        file.write(b'{"text": "more"}\n')
    assert error_of(task).startswith("E349 ")


def test_a_second_attempt_finds_the_work_done(tmp_path: Path, task: parts.PartTask) -> None:
    first = parts.run_task(task, parts.__version__)
    made = {path.name: path.read_bytes() for path in (task.folder / task.name).iterdir()}
    assert parts.run_task(task, parts.__version__) == first and "error" not in first
    assert {path.name: path.read_bytes() for path in (task.folder / task.name).iterdir()} == made
    assert [path.name for path in task.folder.iterdir()] == [task.name]


def test_a_folder_that_is_not_shared(task: parts.PartTask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_VISIBLE_SECONDS", 0.0)
    with pytest.raises(DataError, match=r"E376.*parts does not show here.*a folder that all nodes share"):
        parts.Parts(task.folder, "quarantine").await_visible(task)
