"""The Ray engine on a real cluster: two nodes (raylets) on this machine, each with one CPU."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_hammer.base.errors import DataError
from megatron_hammer.base.signals import Stopped
from megatron_hammer.dataset.make.ray import build_datasets_on_ray
from tests.dataset.built import build_datasets
from tests.dataset.make.ray_corpus import lines, local, outputs, write_corpus
from tests.progress_lines import without_activity

pytest.importorskip("ray", reason="the Ray engine needs: pip install 'megatron_hammer[ray]'")
pytestmark = pytest.mark.timeout(120)

REPOSITORY = Path(__file__).parents[3]
OBJECT_STORE_BYTES = 80 << 20  # Ray's least is 75 MB


def ray_processes() -> set[int]:
    """All of this machine: raylets, their servers and workers."""
    found = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if b"/ray/core/src/" in command or command.startswith(b"ray::"):
                found.add(int(folder.name))
    return found


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def cluster() -> Iterator:
    """Two nodes; this process is connected, so that the tests share the workers."""
    before = ray_processes()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE_BYTES)
        ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
    wait_for(lambda: ray_processes() <= before, 20)


@pytest.fixture
def large(tmp_path: Path) -> list[str]:
    """8 MB in 40 shards: long enough to be hit."""
    (tmp_path / "large.jsonl").write_bytes(lines(8000, 5, bad=0.0, words=400))
    return [str(tmp_path / "large.jsonl")]


LARGE_SHARD = 200_000


def parts_of(prefix: Path) -> list[Path]:
    """Those that are done."""
    folder = Path(f"{prefix}_text_document.parts")
    try:
        return [path for path in folder.iterdir() if path.is_dir() and len(path.name) == 32]
    except FileNotFoundError:
        return []


def spread(inputs: list[str], tokenizer: Path, prefix: Path, keys: tuple[str, ...] = ("text",), **options: object):
    settings = {"shard_bytes": 3000, **options}
    return build_datasets(inputs, keys, tokenizer, prefix, True, True, engine=build_datasets_on_ray, **settings)  # type: ignore[arg-type]


def start_workers() -> None:
    """One on each node: starting takes seconds, in which another node would do all of so little work."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    @ray.remote(num_cpus=1)
    def ready() -> int:
        import megatron_hammer.dataset.make.ray

        return len(megatron_hammer.dataset.make.ray.__name__)

    nodes = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in ray.nodes() if node["Alive"]]
    ray.get([ready.options(scheduling_strategy=node).remote() for node in nodes], timeout=60)


def test_two_nodes_make_the_bytes_of_a_local_run(
    cluster, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    monkeypatch.chdir(tmp_path)
    inputs = write_corpus(tmp_path, bad=0.05)
    for on_error, keys in (("quarantine", ("text", "title")), ("skip", ("text",))):
        local(inputs, tokenizer, tmp_path / f"{on_error}-whole", keys, on_error=on_error)
        for _ in range(3):  # on a busy machine one node may still be done before the other begins
            start_workers()
            capfd.readouterr()
            spread(inputs, tokenizer, tmp_path / on_error, keys, on_error=on_error)
            if "parts made on 2 nodes of the Ray cluster" in (said := capfd.readouterr().err):
                break
        assert "parts made on 2 nodes of the Ray cluster" in said
        found = outputs(tmp_path / on_error)
        assert found == outputs(tmp_path / f"{on_error}-whole") and len(found) == (7 if len(keys) == 2 else 3)
    records = outputs(tmp_path / "quarantine")["_text_document.rejected.jsonl"].splitlines()
    assert len(records) > 10

    errors = []
    for run in (local, spread):
        with pytest.raises(DataError) as caught:
            run(inputs, tokenizer, tmp_path / "p")
        errors.append(str(caught.value))
    assert errors[0] == errors[1] and "a.jsonl:" in errors[0]


def start(inputs: list[str], tokenizer: Path, prefix: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(REPOSITORY / "tools" / "preprocess_data.py"), "--input", *inputs,
               "--tokenizer-model", str(tokenizer), "--output-prefix", str(prefix), "--append-eod", "--prepend-bos",
               "--shard-mb", str(LARGE_SHARD / 1e6), "--engine", "ray", *options]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_a_killed_driver_goes_on(cluster, tmp_path: Path, large: list[str], tokenizer: Path, capfd) -> None:
    local(large, tokenizer, tmp_path / "whole")
    process = start(large, tokenizer, tmp_path / "p", "--address", cluster.address)
    wait_for(lambda: len(parts_of(tmp_path / "p")) >= 3 or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, stderr
    assert not (tmp_path / "p_text_document.idx").exists()
    there = len(parts_of(tmp_path / "p"))
    start_workers()
    capfd.readouterr()
    spread(large, tokenizer, tmp_path / "p", shard_bytes=LARGE_SHARD, text_documents="blank-line")  # as the program
    stderr = capfd.readouterr().err
    taken = re.search(r"made on \d nodes? of the Ray cluster, (\d+) were there", stderr)
    assert "going on from" in stderr and taken, stderr
    assert int(taken[1]) >= there  # a task may have ended after we counted
    assert outputs(tmp_path / "p") == outputs(tmp_path / "whole")


def test_a_lost_node_costs_no_document(cluster, tmp_path: Path, large: list[str], tokenizer: Path) -> None:
    local(large, tokenizer, tmp_path / "whole")
    node = cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE_BYTES)
    raylet = node.all_processes["raylet"][0].process.pid
    seen: list[int] = []
    over = threading.Event()

    def lose() -> None:
        """As soon as a worker of that node is at work."""

        def at_work() -> bool:
            for path in tmp_path.glob("p?_text_document.parts/attempt-*"):
                pid = int(path.name.split("-")[-2])
                try:
                    parent = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
                except OSError:
                    continue
                if parent == raylet:
                    seen.append(pid)
            return bool(seen) or over.is_set()

        wait_for(at_work)
        cluster.remove_node(node, allow_graceful=False)

    thread = threading.Thread(target=lose)
    thread.start()
    try:
        for attempt in range(3):  # on a busy machine that node may not be seen at work the first time
            start_workers()
            spread(large, tokenizer, tmp_path / f"p{attempt}", shard_bytes=LARGE_SHARD)
            if seen:
                break
    finally:
        over.set()
        thread.join(60)
    assert seen and not thread.is_alive()
    assert outputs(tmp_path / f"p{attempt}") == outputs(tmp_path / "whole")


def test_a_cluster_for_one_run_and_a_signal(cluster, tmp_path: Path, large: list[str], tokenizer: Path) -> None:
    """Without --address; the first SIGTERM keeps the parts, and nothing of Ray stays behind."""
    before = ray_processes()
    process = start(large, tokenizer, tmp_path / "p", "--workers", "2")
    wait_for(lambda: parts_of(tmp_path / "p") or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 75 and stdout == "", stderr
    stderr = without_activity(stderr)
    assert stderr.startswith("stopped with ") and stderr.endswith("the same command goes on from there\n"), stderr
    assert stderr.count("\n") == 1
    wait_for(lambda: ray_processes() <= before, 20)
    assert parts_of(tmp_path / "p")

    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped, match="the same command goes on from there"):
        spread(large, tokenizer, tmp_path / "p", shard_bytes=LARGE_SHARD, stop=stop)
    spread(large, tokenizer, tmp_path / "p", shard_bytes=LARGE_SHARD, text_documents="blank-line")  # as the program
    local(large, tokenizer, tmp_path / "whole")
    assert outputs(tmp_path / "p") == outputs(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--address", "127.0.0.1:1"], 2, "error[E298]: --address 127.0.0.1:1 is no Ray cluster that answers"),
        (["--engine", "local", "--address", "auto"], 2, "does nothing without --engine ray"),
        (["--engine", "local", "--workers-per-task", "2"], 2, "does nothing without --engine ray"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, tokenizer: Path, options: list[str], code: int, words: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(3, 1, bad=0.0))
    process = start([str(tmp_path / "a.jsonl")], tokenizer, tmp_path / "p", *options)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code and stdout == "", stderr
    stderr = without_activity(stderr)
    assert words in stderr and stderr.count("\n") == 1, stderr
    assert outputs(tmp_path / "p") == {}
