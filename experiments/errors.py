# SPDX-License-Identifier: Apache-2.0
"""What stops a script: one line on standard error and an exit code. A traceback is for a fault of the program alone."""

from __future__ import annotations

import errno
import io
import os
import re
import select
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

INTERRUPTED = 130
# What the disk says to whoever writes.
NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# How the operating system says it, and the libraries that hide the error it came with.
DISK_FULL = os.strerror(errno.ENOSPC)
# What a place says to whoever writes or reads there.
NO_ACCESS = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
# How PyTorch says that there is no memory; of a GPU it has an error of its own.
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
WHOLE = "what was written before is whole"
# Under this many bytes, a disk is what stopped a write.
NOTHING_FREE = 1_000_000
# The places that a script writes to, by the argument or variable that chose each, such as "--output_dir out".
PLACES: dict[str, Path] = {}
IN_A_WORKER = re.compile(r"Caught \w+ in .*\nOriginal Traceback")


class Stopped(Exception):
    """What stops a script and is explained by its message, in one line."""

    exit_code = 1


class BadInput(Stopped):
    """A mistake of the user's. The message names the argument, its value and what is allowed, in one line."""

    exit_code = 2


@contextmanager
def naming(argument: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn `errors` raised inside into a `BadInput` that names `argument`.

    Only for blocks whose failure is the user's input: everything else keeps its traceback. `Exception` stands for all
    errors, tightly around the one call of a library that reads what the user gave. What stops the script for another
    reason, a `Stopped` or a full disk or memory, passes.
    """
    try:
        yield
    except errors as error:
        if isinstance(error, Stopped) or _from_outside(error) is not None:
            raise
        if (place := _failed_place(error, argument.partition(" ")[2])) is not None:
            argument = place  # that it reads through, such as a cache
        lines = [one_line(error)] + ([one_line(error.__cause__)] if error.__cause__ is not None else [])
        raise BadInput(f"{argument}: {'; '.join(dict.fromkeys(lines))}") from error


@contextmanager
def exit_on_bad_input() -> Iterator[None]:
    """The one guard around a script: print what stopped the block inside as one line, and exit.

    No print ends a script: see `_keep_printing`.

    Of several processes, the first one prints. Exit codes: 2 for `BadInput` and for a disk, a place or a memory that
    the script cannot use, 1 for another `Stopped`, 130 for Ctrl-C. Any other error is a fault of the program: it goes
    on, for Python to show its traceback, and a line that says so comes after it.
    """
    _keep_printing()
    PLACES.clear()
    try:
        yield
        _leave_processes()
    except KeyboardInterrupt:
        _exit(f"interrupted; {WHOLE}", INTERRUPTED)
    except Stopped as error:
        _exit(one_line(error), error.exit_code)
    except Exception as error:
        stopped = next((cause for cause in _causes(error) if isinstance(cause, Stopped)), None)
        if stopped is not None:
            _exit(one_line(stopped), stopped.exit_code)
        outside = _from_outside(error) or _no_access(error)
        if outside is not None:
            _exit(outside, BadInput.exit_code)
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
    """What an error says, in one line that can be understood without the traceback.

    Libraries announce what is wrong in a line that ends in a colon, of which the next one is the message; and some
    errors say nothing but a key.
    """
    text = str(error)
    name = type(error).__name__
    if IN_A_WORKER.match(text):
        # The error of a worker comes with the worker's traceback as its message.
        found = re.findall(rf"^(?:[\w.]+\.)?{name}: (.*)", text, re.MULTILINE)
        text = found[-1] if found else text
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return name
    count = 1
    while count < len(lines) and lines[count - 1].endswith(":"):
        count += 1
    if re.match(r"\d+ validation errors? for ", lines[0]):  # pydantic: the field, then what is wrong with it
        count = 3
    line = " ".join(lines[:count])
    return f"{name}: {line}" if isinstance(error, KeyError) or not re.search(r"\w\s+\S", line) else line


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


def _from_outside(error: BaseException) -> str | None:
    """The line for a disk or a memory that is full, which may stop any block."""
    for cause in _causes(error, context=True):
        number = getattr(cause, "errno", None)
        if number in NOT_WRITABLE or DISK_FULL in str(cause):
            what = os.strerror(number) if number in NOT_WRITABLE else DISK_FULL
            # A quota shows nowhere.
            place = _failed_place(cause) or " or ".join(filter(_is_full, PLACES)) or " or ".join(PLACES) or "disk"
            return f"{place}: {what} ({one_line(error)}); make room there or use another; {WHOLE}"
        if isinstance(cause, MemoryError) or any(text in str(cause) for text in NO_MEMORY):
            return f"out of memory ({one_line(cause)}); use smaller batches, inputs or models"
    return None


def _no_access(error: BaseException) -> str | None:
    """The line for a file or folder that cannot be used, if nothing nearer to it has named the argument."""
    for cause in _causes(error, context=True):
        if isinstance(cause, OSError) and cause.errno in NO_ACCESS and cause.filename is not None:
            place = _failed_place(cause) or cause.filename
            return f"{place}: {one_line(cause)}; use a file or folder with the permissions for it; {WHOLE}"
    return None


def _failed_place(error: BaseException, given: str = "") -> str | None:
    """Which of `PLACES` the file of an error is in, unless it is in what was `given` to be read."""
    for cause in _causes(error, context=True):
        if not isinstance(cause, OSError) or not isinstance(cause.filename, (str, os.PathLike)):
            continue
        path = Path(cause.filename).absolute()
        if given and path.is_relative_to(Path(given).absolute()):
            return None
        # Of files in a temporary folder, those that are only read are the user's.
        places = {name: place for name, place in PLACES.items() if name[:3] != "TMP" or cause.errno in NOT_WRITABLE}
        around = [name for name, place in places.items() if path.is_relative_to(place)]
        # A folder that cannot be made fails at the first of its parents that is not there.
        below = [name for name, place in places.items() if place.is_relative_to(path)]
        nearest = sorted(around or below, key=lambda name: len(places[name].parts))
        return nearest[-1 if around else 0] if nearest else None
    return None


def _is_full(name: str) -> bool:
    place = next((path for path in (PLACES[name], *PLACES[name].parents) if path.exists()), None)
    return place is not None and shutil.disk_usage(place).free < NOTHING_FREE


def _causes(error: BaseException | None, context: bool = False) -> Iterator[BaseException]:
    """An error and what it came from; with `context` also what was being handled when it came."""
    while error is not None:
        yield error
        error = error.__cause__ or (error.__context__ if context else None)
