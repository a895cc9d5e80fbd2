"""Stop signals: noted, given back, left alone where they are ignored."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from megatron_hammer.base.signals import StopRequest, on_signals, restore


def test_a_signal_is_noted_and_repeating_it_changes_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest((signal.SIGTERM,)) as request:
        assert not request.received and request.exit_code == 0
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        assert request.received and request.exit_code == 75
    assert signal.getsignal(signal.SIGTERM) is before


def test_once_gives_the_signals_back_with_the_first() -> None:
    with StopRequest((signal.SIGINT,), once=True) as request:
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        assert request.received and request.exit_code == 130
        with pytest.raises(KeyboardInterrupt):
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)


def test_a_blocked_signal_arrives_when_the_block_begins() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1,))
    signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
    with StopRequest((signal.SIGUSR1,)) as request:
        assert request.received


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        handlers = on_signals((signal.SIGHUP, signal.SIGUSR1), lambda *_: None)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN and set(handlers) == {signal.SIGUSR1}
        restore(handlers)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_stop_signal_ends_a_program_that_is_deep_in_compiled_code() -> None:
    """Where no handler of Python's runs: in a wait that is started again after each signal, without the GIL."""
    code = (
        "from megatron_hammer.base.signals import end_at_once\n"
        "end_at_once('before it began')\n"
        "import ctypes\nprint('there', flush=True)\n"
        "libc = ctypes.CDLL(None)\nwhile True: libc.pause()\n"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", f"{code}"], stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "there\n"
        process.send_signal(signal.SIGHUP)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 75
    assert err == "stopped by SIGHUP before it began; run the same command again\n"
