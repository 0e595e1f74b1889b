# SPDX-License-Identifier: Apache-2.0
"""A signal stops a script where it is, or after a block that must not be cut in two."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from experiments.interruption import Interrupted, deferring, pending_signal, receiving_signals


@pytest.fixture(autouse=True)
def python_handlers() -> Iterator[None]:
    """Handle signals as Python does, also if the tests run in the background, where a shell ignores some of them."""
    handlers = dict.fromkeys((signal.SIGTERM, signal.SIGHUP), signal.SIG_DFL)
    handlers |= {signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_raised_and_names_itself(number):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"stopped by {number.name}; ") as caught, receiving_signals():
        send(number)
    assert caught.value.exit_code == 128 + number and signal.getsignal(number) == before


def test_a_block_ends_before_it_is_interrupted():
    done = []
    with pytest.raises(Interrupted), receiving_signals(), deferring():
        with deferring():
            send()
            done.append("inner")
        done.append("outer")
    assert done == ["inner", "outer"]


def test_a_second_signal_does_not_wait():
    done = []
    with pytest.raises(Interrupted, match="SIGINT"), receiving_signals(), deferring():
        send()
        assert pending_signal() == signal.SIGTERM
        send(signal.SIGINT)
        done.append("too late")
    assert not done


def test_an_ignored_signal_stays_ignored():
    """As `nohup` asks."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with receiving_signals():
            send(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_forked_process_ends_without_a_word(capfd):
    """`multiprocessing.Pool` sends SIGTERM to its workers, which inherit the handler."""
    with receiving_signals():
        if (child := os.fork()) == 0:
            send()
            os._exit(0)
        _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM and capfd.readouterr().err == ""
