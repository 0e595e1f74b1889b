# SPDX-License-Identifier: Apache-2.0
"""A user's mistake, or what else stops a script: one line on standard error and an exit code, never a traceback."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# How the operating system says it, and the libraries that hide the error it came with.
DISK_FULL = os.strerror(errno.ENOSPC)


class Stopped(Exception):
    """What stops a script and is explained by its message, in one line."""

    exit_code = 1


class BadInput(Stopped):
    """A mistake of the user's. The message names the argument, its value and what is allowed, in one line."""

    exit_code = 2


@contextmanager
def naming(argument: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn `errors` raised inside into a `BadInput` that names `argument`.

    Only for blocks whose failure is the user's input: everything else keeps its traceback.
    """
    try:
        yield
    except errors as error:
        lines = [_first_line(error)] + ([_first_line(error.__cause__)] if error.__cause__ is not None else [])
        raise BadInput(f"{argument}: {'; '.join(dict.fromkeys(lines))}") from error


@contextmanager
def exit_on_bad_input() -> Iterator[None]:
    """Print what stopped the block inside as one line and exit; of several processes, the first one prints.

    Exit codes: 2 for `BadInput` and a disk that is full, 1 for another `Stopped`.
    """
    try:
        yield
    except Stopped as error:
        _exit(_first_line(error), error.exit_code)
    except Exception as error:
        if not _disk_is_full(error):
            raise
        _exit(f"--output_dir: {DISK_FULL} ({_first_line(error)}); what was written before is whole", BadInput.exit_code)


def _exit(line: str, code: int) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {line}", file=sys.stderr)
    sys.exit(code)


def _disk_is_full(error: BaseException | None) -> bool:
    while error is not None:
        if getattr(error, "errno", None) == errno.ENOSPC or DISK_FULL in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
