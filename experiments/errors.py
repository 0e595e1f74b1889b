# SPDX-License-Identifier: Apache-2.0
"""Errors that end a script with one line and an exit code; only a fault of the program shows a traceback.

Each script runs inside `exit_on_bad_input`; the modules below it raise `BadInput` and `Stopped`, or use `naming`.
"""

from __future__ import annotations

import errno
import io
import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import format_exception
from types import TracebackType
from typing import Any, NoReturn

from experiments.escaping import hide_tokens, printable
from experiments.interruption import FILES_ARE_WHOLE, SHELL_SIGNAL_BASE, Interrupted, ignore_signals, receiving_signals

# Error numbers of a disk that has no room, cannot be written to or fails.
DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)
# Texts of such errors: some libraries pass on only the text of the original error, and `torch.save` not even that.
DISK_TEXTS = (os.strerror(errno.ENOSPC), os.strerror(errno.EFBIG), "PytorchStreamWriter failed", "iostream error")
# Error numbers of a file or folder that cannot be read or written.
NO_ACCESS_ERRNOS = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
# Texts of PyTorch's errors for full memory.
FULL_MEMORY_TEXTS = ("can't allocate memory", "not enough memory", "out of memory")
# Longest message, in characters: a name or a value from a file may be of any length.
MAX_LINE = 1200
# Texts of the errors of PyTorch and datasets for a worker process that has ended.
DEAD_WORKER_TEXTS = ("DataLoader worker", "subprocesses has abruptly died")


class Stopped(Exception):
    """Error that ends a script; its message explains it in one line."""

    exit_code = 1


class BadInput(Stopped):
    """User's mistake. Its message names the argument, its value and what the value must be, in one line."""

    exit_code = 2


@contextmanager
def naming(argument: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn `errors` raised inside into a `BadInput` that names `argument`.

    Wrap only code that can fail because of the user's input: other errors keep their traceback. Pass `Exception` only
    around a single library call that reads the user's input. A `Stopped` and the errors of the machine, such as a full
    disk, pass.
    """
    try:
        yield
    except errors as error:
        if isinstance(error, Stopped) or _machine_line(error) is not None:
            raise
        lines = [one_line(error)] + ([one_line(error.__cause__)] if error.__cause__ is not None else [])
        raise BadInput(f"{argument}: {'; '.join(dict.fromkeys(lines))}") from error


@contextmanager
def exit_on_bad_input() -> Iterator[None]:
    """Guard a whole script: print the error that stopped the block inside as one line, and exit.

    Of several processes, only the first one prints. Exit codes: 2 for `BadInput`; 1 for another `Stopped`, a full disk
    or memory, a file or folder without access and a worker process that was killed; for a signal, 128 and its number,
    such as 130 for Ctrl-C and 143 for SIGTERM. Any other error is a fault of the program: Python shows its traceback,
    and a line asks to report it. A failing print does not stop the script, see `_make_output_fault_tolerant`.
    """
    _make_output_fault_tolerant()
    with receiving_signals():
        try:
            yield
            _close_process_group()
        except Interrupted as error:
            _exit(str(error), error.exit_code)
        except KeyboardInterrupt:
            _exit(f"interrupted; {FILES_ARE_WHOLE}", SHELL_SIGNAL_BASE + signal.SIGINT)
        except Exception as error:
            stopped = next((cause for cause in _walk_causes(error) if isinstance(cause, Stopped)), None)
            if stopped is not None:
                _exit(one_line(stopped), stopped.exit_code)
            unusable = _machine_line(error) or _no_access_line(error)
            if unusable is not None:
                _exit(unusable, Stopped.exit_code)
            sys.excepthook = _report_fault
            raise


class _FaultTolerantOutput(io.FileIO):
    """Standard stream that discards its output, without an error, after a write has failed.

    A write fails if the reader of a pipe has ended (`| head -1`), the disk is full or the terminal is closed.
    """

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:
                select.select([], [self], [])  # another program may have made the terminal non-blocking
            return written
        except OSError as error:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.fileno())
            if error.errno != errno.EPIPE and self.fileno() == 1:
                print(
                    f"warning: standard output: {os.strerror(error.errno or 0)}; further output is lost",
                    file=sys.stderr,
                )
            return memoryview(data).nbytes


def _make_output_fault_tolerant() -> None:
    """Make standard output and error survive failed writes and characters that their encoding lacks."""
    for name, errors in (("stdout", "replace"), ("stderr", "backslashreplace")):
        stream = getattr(sys, name)
        if stream is None:  # closed before the script began
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
            continue
        raw = getattr(getattr(stream, "buffer", None), "raw", getattr(stream, "buffer", None))
        if type(raw) is io.FileIO and raw.fileno() in (1, 2):
            stream.flush()
            lasting = _FaultTolerantOutput(raw.fileno(), "w", closefd=False)
            buffer = lasting if stream.buffer is raw else io.BufferedWriter(lasting)
            modes = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
            setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, errors, **modes))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def one_line(error: BaseException) -> str:
    """Return an error's message in one line that is clear without the traceback.

    Leading lines that end in a colon are joined with the line that they announce. A message that is only a key gets the
    name of the error in front. Control characters are escaped, tokens hidden, and long messages
    shortened in the middle.
    """
    text, name = str(error), type(error).__name__
    if "\nOriginal Traceback" in text:  # the message of an error in a worker process is its traceback
        text = text.rstrip().rpartition(f"{name}: ")[2]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return name
    count = 1
    while count < len(lines) and lines[count - 1].endswith(":"):
        count += 1
    line = printable(hide_tokens(" ".join(lines[:count])))
    if len(line) > MAX_LINE:
        line = f"{line[: MAX_LINE - 300]} ... {line[-290:]}"  # the end says what to do
    return line if " " in line and not isinstance(error, KeyError) else f"{name}: {line}"


def _exit(line: str, code: int) -> NoReturn:
    ignore_signals()
    if os.environ.get("RANK", "0") == "0":
        # After an interrupted progress bar the cursor is not at the start of a line; tqdm.write moves it there.
        tqdm = sys.modules.get("tqdm")
        write = print if tqdm is None else tqdm.tqdm.write
        write(f"error: {line}", file=sys.stderr)
    _close_process_group()
    sys.exit(code)


def _close_process_group() -> None:
    """Close the connections to other processes: about one in four processes that exit with open ones is aborted."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _report_fault(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    print(hide_tokens("".join(format_exception(kind, error, traceback))), end="", file=sys.stderr)
    print(
        "error: this is a fault of the program, not of its input; please report it in the project's issue tracker, "
        "with the command and the traceback above",
        file=sys.stderr,
    )


def _machine_line(error: BaseException) -> str | None:
    """Return the message for a full or failing disk, full memory or a dead worker; `None` for other errors."""
    for cause in _walk_causes(error, context=True):
        if getattr(cause, "errno", None) in DISK_ERRNOS or any(text in str(cause) for text in DISK_TEXTS):
            lines = dict.fromkeys((one_line(cause), one_line(error)))
            return (
                f"{'; '.join(lines)}; make room or use another disk (--output_dir, HF_HOME, TMPDIR); {FILES_ARE_WHOLE}"
            )
        if isinstance(cause, MemoryError) or any(text in str(cause) for text in FULL_MEMORY_TEXTS):
            return f"out of memory ({one_line(cause)}); use smaller batches, inputs or models"
        if isinstance(cause, RuntimeError) and any(text in str(cause) for text in DEAD_WORKER_TEXTS):
            return (
                f"a worker process has ended ({one_line(cause)}), as if killed because memory ran out; use fewer "
                f"--dataloader_num_workers or smaller batches; {FILES_ARE_WHOLE}"
            )
    return None


def _no_access_line(error: BaseException) -> str | None:
    """Return the message for denied access to a file or folder that `naming` did not catch; else `None`."""
    for cause in _walk_causes(error, context=True):
        if isinstance(cause, OSError) and cause.errno in NO_ACCESS_ERRNOS and cause.filename is not None:
            return f"{one_line(cause)}; use one with the needed permissions; {FILES_ARE_WHOLE}"
    return None


def _walk_causes(error: BaseException | None, context: bool = False) -> Iterator[BaseException]:
    """Yield an error and its causes; with `context` also the errors that were being handled when it was raised."""
    seen: set[int] = set()  # libraries may raise errors whose causes form a cycle
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (error.__context__ if context else None)
