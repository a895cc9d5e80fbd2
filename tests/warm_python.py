"""A ``python`` for the commands of pages: programs that use torch, transformers or matplotlib start with all imported.

::

    bin/python tools/generate.py ... --> client ---its words, folder, environment, streams---> server, libraries only
                                           '-- waits, passes signals on, ends with its code <-- a fork, the program

An export, its proof and a generation import for ten seconds and compute for one. The package itself is imported anew by
each program. The ranks of its launcher are forked where they are spawned anywhere else, so that they have the
libraries, too; what spawning itself could break is held by the tests that start programs in the plain interpreter
(``tests/supervise/test_start.py`` and ``test_nodes.py``, ``tests/train/test_run.py``). ``write_python`` makes such a
``bin/python``; programs other than ``WARM`` run in the plain interpreter. Run as a program this file is the server
(``--serve SOCKET``) or the client, which imports nothing that it does not need.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys

WARM = ("checkpoint_to_hf.py", "generate.py", "evaluate.py", "hf_to_checkpoint.py", "verify_tokenizer.py",
        "convert_tokenizer.py", "extend_embeddings.py", "analyze_tokenizer.py", "plot_loss.py",
        "megatron_hammer.launch", "megatron_hammer.train",
        "megatron_hammer.huggingface.prover", "test_start.py")  # fmt: skip
MESSAGE_BYTES = 2**20  # words and environment, of a few thousand bytes


def write_python(path: str | os.PathLike[str]) -> None:
    """Make an executable ``python`` there."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(f'#!/bin/sh\nexec "{sys.executable}" -IS "{__file__}" "{_server()}" "{sys.executable}" "$0" "$@"\n')
    os.chmod(path, 0o755)


def warm_python() -> str:
    """One that is there as long as this process."""
    path = os.path.join(os.path.dirname(_server()), "python")
    if not os.path.exists(path):
        write_python(path)
    return path


_started: list[str] = []


def _server() -> str:
    """The socket of this process's server, which ends with it."""
    if not _started:
        import subprocess
        import tempfile

        place = os.path.join(tempfile.mkdtemp(prefix="hammer-python-"), "socket")
        command = [sys.executable, __file__, "--serve", place]
        server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # its input ends with us
        assert server.stdout is not None and server.stdout.readline() == b"ready\n"
        _started.append(place)
    return _started[0]


# ---- client ----------------------------------------------------------------------------------------------------------


def ask(place: str, interpreter: str, python: str, words: list[str]) -> int:
    """Have the server run the program, and return its exit code."""
    named = next((word for word in words if word != "-m"), "")
    if os.path.basename(named) not in WARM:
        os.execv(interpreter, [interpreter, *words])
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(place)
        question = {
            "words": words,
            "python": os.path.abspath(python),
            "folder": os.getcwd(),
            "environment": dict(os.environ),
        }
        socket.send_fds(server, [json.dumps(question).encode()], [0, 1, 2])
        pid = int(server.recv(100))
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(signum, lambda number, _: os.kill(pid, number))
        return int(server.recv(100) or 1)


# ---- server ----------------------------------------------------------------------------------------------------------


def serve(place: str) -> None:
    """Import the libraries, and fork for each program until standard input ends."""
    sys.path.pop(0)  # this file's folder, whose names are not for others
    import gc
    import select
    import shutil

    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import torch  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

    gc.collect()
    gc.freeze()  # a program's collector neither searches nor writes to what all of them share
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how a fork ended
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(place)
        listener.listen()
        print("ready", flush=True)
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _answer(connection)
            connection.close()
    shutil.rmtree(os.path.dirname(place))


def _answer(connection: socket.socket) -> None:
    """In a fork: run the program in another, and tell its number, then its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, streams, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, 3)
    pid = os.fork()
    if pid == 0:
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        _become(**json.loads(message))
    connection.send(str(pid).encode())
    connection.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
    os._exit(0)


def _become(words: list[str], python: str, folder: str, environment: dict[str, str]) -> None:
    """Run the program as the interpreter would, and end this process."""
    import atexit
    import runpy
    import tempfile
    import threading
    import traceback
    from multiprocessing import context

    context.SpawnProcess._Popen = staticmethod(context.ForkProcess._Popen)  # type: ignore[assignment]
    tempfile.tempdir = None  # as the program's environment says
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.executable = python  # what a program starts by that name is warm, too
    import torch

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    sys.path[:0] = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    code: object = 0
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            sys.path.insert(0, folder)
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(code or 0))  # type: ignore[call-overload]


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2])
    else:
        place, interpreter, python, *words = sys.argv[1:]
        sys.exit(ask(place, interpreter, python, words))
