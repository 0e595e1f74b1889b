# SPDX-License-Identifier: Apache-2.0
"""Signals that ask a script to stop: Ctrl-C, a scheduler's warning (SIGTERM) and a closed terminal (SIGHUP).

`exit_on_bad_input` turns each of them into an `Interrupted`, raised where the script happens to be. A block inside
`deferring` is finished first, or ends by itself at a good place, as a training does after its next step.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if name in signal.Signals.__members__)
# A shell reports a program that a signal ended with this number plus that of the signal.
SHELL_SIGNAL_BASE = 128
# End of messages of a script that stops early.
FILES_ARE_WHOLE = "files written before are complete"


class Interrupted(KeyboardInterrupt):
    """A signal asked the script to stop.

    Args:
        number: number of the signal.
        state: what is on disk, and how to continue.
    """

    def __init__(self, number: int, state: str = FILES_ARE_WHOLE) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; {state}")
        self.exit_code = SHELL_SIGNAL_BASE + number


class _Receiver:
    """Handler of the signals; the process has one.

    Attributes:
        pending: number of a signal that came inside `deferring`.
        depth: number of `deferring` blocks that the process is in.
    """

    def __init__(self) -> None:
        self.pending: int | None = None
        self.depth = 0
        self._process = os.getpid()
        self._replaced: dict[int, Any] = {}

    def install(self) -> None:
        self.pending, self.depth, self._process = None, 0, os.getpid()
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread may set handlers
        for number in SIGNALS:
            # `nohup` and background jobs ignore some signals.
            if signal.getsignal(number) != signal.SIG_IGN:
                self._replaced[number] = signal.signal(number, self._receive)

    def ignore(self) -> None:
        for number in self._replaced:
            signal.signal(number, signal.SIG_IGN)

    def remove(self) -> None:
        for number, handler in self._replaced.items():
            signal.signal(number, handler)
        self._replaced.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked worker, which inherits the handler, ends at once
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif self.depth and self.pending is None:
            self.pending = number
        else:
            raise Interrupted(number)


_receiver = _Receiver()


@contextmanager
def receiving_signals() -> Iterator[None]:
    """Raise `Interrupted` inside the block when a signal asks to stop; the main thread of a script enters it."""
    _receiver.install()
    try:
        yield
    finally:
        _receiver.remove()


def ignore_signals() -> None:
    """Ignore further signals until the end of `receiving_signals`, because the script is ending."""
    _receiver.ignore()


@contextmanager
def deferring() -> Iterator[None]:
    """Finish the block before a signal raises `Interrupted`; a second signal raises it at once."""
    _receiver.depth += 1
    try:
        yield
    finally:
        _receiver.depth -= 1
    if _receiver.depth == 0 and _receiver.pending is not None:
        raise Interrupted(_receiver.pending)


def pending_signal() -> int | None:
    """Return the number of the signal that came inside `deferring`, if any."""
    return _receiver.pending


def leave_process_group() -> None:
    """Keep signals to the process group, such as Ctrl-C, from a worker that reads data: the first process ends it."""
    if hasattr(os, "setsid"):  # not on Windows
        os.setsid()
