# SPDX-License-Identifier: Apache-2.0
"""The law of all fuzzing: a call returns, or raises an allowed error with one short line, within seconds and memory."""

from __future__ import annotations

import re
import resource
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.errors import Stopped, one_line

# Seconds of processor time, which a busy machine does not lengthen; a call that waits ends after WAITING_SECONDS.
SECONDS, WAITING_SECONDS, BYTES = 5.0, 60.0, 2**30
# Longest message, in characters: several lines of a terminal.
MOST_CHARACTERS = 1500
# Control characters, which move a terminal's cursor or hide text, and lone surrogates, which cannot be printed.
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

OUTCOMES: Counter[str] = Counter()
"""Number of calls by outcome, "result" or "one line"; `python -m tests.fuzzing` reports it."""


class Hang(BaseException):
    """A call took more than its seconds. Not an `Exception`, which the code under test may turn into one line."""


def check(call: Callable[[], Any], *allowed: type[Exception]) -> Any:
    """Return the result of a call, or the message of an allowed error, which must be one short printable line.

    Every other error, a hang and the use of too much memory fail the test.
    """
    try:
        with limited():
            result = call()
    except allowed as error:
        OUTCOMES["one line"] += 1
        # A script prints one line for each of its own errors, see `experiments.errors`.
        message = one_line(error) if isinstance(error, Stopped) else str(error)
        assert message.strip(), f"an empty message: {error!r}"
        assert len(message) <= MOST_CHARACTERS, f"a message of {len(message)} characters: {message[:200]} ..."
        assert not UNPRINTABLE.search(message), f"a message that is not one printable line: {message!r}"
        return None
    OUTCOMES["result"] += 1
    return result


@contextmanager
def limited(seconds: float = SECONDS, most_bytes: int = BYTES) -> Iterator[None]:
    """Raise `Hang` after `seconds`, and `MemoryError` if the process needs `most_bytes` more than before."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    timers = ((signal.ITIMER_PROF, signal.SIGPROF, seconds), (signal.ITIMER_REAL, signal.SIGALRM, WAITING_SECONDS))

    def stop(*_: object) -> None:
        raise Hang(f"still running after {seconds:g} seconds of work, or {WAITING_SECONDS:g} of waiting")

    before = [signal.signal(number, stop) for _, number, _ in timers]
    resource.setrlimit(resource.RLIMIT_AS, (used + most_bytes, hard))
    for timer, _, limit in timers:
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for timer, _, _ in timers:
            signal.setitimer(timer, 0)
        for (_, number, _), handler in zip(timers, before, strict=True):
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
