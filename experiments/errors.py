# SPDX-License-Identifier: Apache-2.0
"""Errors that end a script with one line and an exit code; only a fault of the program shows a traceback."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NoReturn

INTERRUPTED = 130
# Errors of a disk that takes no more.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# The text of a full disk: libraries hide the error that it came with.
DISK_FULL = os.strerror(errno.ENOSPC)
# Errors of a place that cannot be written to or read.
NO_ACCESS = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
# PyTorch's texts for a full memory; of a GPU it has an error of its own.
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
WHOLE = "what was written before is whole"


class Stopped(Exception):
    """What stops a script and is explained by its message, in one line."""

    exit_code = 1


class BadInput(Stopped):
    """A mistake of the user's. The message names the argument, its value and what it must be, in one line."""

    exit_code = 2


@contextmanager
def naming(argument: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn `errors` raised inside into a `BadInput` that names `argument`.

    Use it only around what can fail by the user's input: everything else keeps its traceback. `Exception` stands for
    all errors, tightly around the one call of a library that reads what the user gave. A `Stopped` and a full disk or
    memory pass.
    """
    try:
        yield
    except errors as error:
        if isinstance(error, Stopped) or _full_line(error) is not None:
            raise
        lines = [one_line(error)] + ([one_line(error.__cause__)] if error.__cause__ is not None else [])
        raise BadInput(f"{argument}: {'; '.join(dict.fromkeys(lines))}") from error


@contextmanager
def exit_on_bad_input() -> Iterator[None]:
    """Guard a whole script: print what stopped the block inside as one line, and exit.

    No print ends a script: see `_keep_printing`.

    Of several processes, the first one prints. Exit codes: 2 for `BadInput` and for a disk, a place or a memory that
    the script cannot use, 1 for another `Stopped`, 130 for Ctrl-C. Any other error is a fault of the program: Python
    shows its traceback, and a line that says so follows.
    """
    _keep_printing()
    try:
        yield
        _leave_processes()
    except KeyboardInterrupt:
        _exit(f"interrupted; {WHOLE}", INTERRUPTED)
    except Exception as error:
        stopped = next((cause for cause in _causes(error) if isinstance(cause, Stopped)), None)
        if stopped is not None:
            _exit(one_line(stopped), stopped.exit_code)
        unusable = _full_line(error) or _no_access_line(error)
        if unusable is not None:
            _exit(unusable, BadInput.exit_code)
        sys.excepthook = _report_fault
        raise


class _LastingOutput(io.FileIO):
    """A standard stream that is dropped, and stops nothing, once it cannot be written to: the reader of a pipe has left
    (`| head -1`), the disk behind it is full or the terminal is gone."""

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:
                select.select([], [self], [])  # another program has made the terminal non-blocking
            return written
        except OSError as error:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.fileno())
            if error.errno != errno.EPIPE and self.fileno() == 1:
                print(f"warning: standard output: {os.strerror(error.errno or 0)}; no more is printed", file=sys.stderr)
            return memoryview(data).nbytes


def _keep_printing() -> None:
    """Make standard output and error survive a character that they lack, and what `_LastingOutput` says."""
    for name, errors in (("stdout", "replace"), ("stderr", "backslashreplace")):
        stream = getattr(sys, name)
        if stream is None:  # closed before the script began
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
            continue
        raw = getattr(getattr(stream, "buffer", None), "raw", getattr(stream, "buffer", None))
        if type(raw) is io.FileIO and raw.fileno() in (1, 2):
            stream.flush()
            lasting = _LastingOutput(raw.fileno(), "w", closefd=False)
            buffer = lasting if stream.buffer is raw else io.BufferedWriter(lasting)
            modes = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
            setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, errors, **modes))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def one_line(error: BaseException) -> str:
    """Return an error's message in one line that can be understood without the traceback.

    Libraries announce the message in lines that end in a colon; some errors have nothing but a key.
    """
    text, name = str(error), type(error).__name__
    if "\nOriginal Traceback" in text:  # the message of a worker's error is the worker's traceback
        text = text.rstrip().rpartition(f"{name}: ")[2]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return name
    count = 1
    while count < len(lines) and lines[count - 1].endswith(":"):
        count += 1
    line = " ".join(lines[:count])
    return line if " " in line and not isinstance(error, KeyError) else f"{name}: {line}"


def _exit(line: str, code: int) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":
        # A progress bar that was stopped leaves the cursor behind it; the line is one of its own.
        bars = sys.modules.get("tqdm")
        write = print if bars is None else bars.tqdm.write
        write(f"error: {line}", file=sys.stderr)
    _leave_processes()
    sys.exit(code)


def _leave_processes() -> None:
    """Close the connections to other processes: one in four that exit with them open is aborted by their threads."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _report_fault(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    sys.__excepthook__(kind, error, traceback)
    print(
        "error: this is a fault of the program, not of what it was given; please report it in the project's issue "
        "tracker, with the command and the traceback above",
        file=sys.stderr,
    )


def _full_line(error: BaseException) -> str | None:
    """Return the line for a full disk or memory, which may stop any block."""
    for cause in _causes(error, context=True):
        if getattr(cause, "errno", None) in FULL or DISK_FULL in str(cause):
            lines = dict.fromkeys((one_line(cause), one_line(error)))
            return f"{'; '.join(lines)}; make room there or use another disk (--output_dir, HF_HOME, TMPDIR); {WHOLE}"
        if isinstance(cause, MemoryError) or any(text in str(cause) for text in NO_MEMORY):
            return f"out of memory ({one_line(cause)}); use smaller batches, inputs or models"
    return None


def _no_access_line(error: BaseException) -> str | None:
    """Return the line for a file or folder that cannot be used, if nothing nearer to it has named the argument."""
    for cause in _causes(error, context=True):
        if isinstance(cause, OSError) and cause.errno in NO_ACCESS and cause.filename is not None:
            return f"{one_line(cause)}; use a file or folder with the permissions for it; {WHOLE}"
    return None


def _causes(error: BaseException | None, context: bool = False) -> Iterator[BaseException]:
    """Yield an error and the errors it came from; with `context` also the ones being handled when it was raised."""
    seen: set[int] = set()  # libraries may raise errors whose causes form a cycle
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (error.__context__ if context else None)
