# SPDX-License-Identifier: Apache-2.0
"""A user's mistake: one line on standard error and exit code 2, never a traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class BadInput(Exception):
    """A mistake of the user's. The message names the argument, its value and what is allowed, in one line."""


@contextmanager
def naming(argument: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn `errors` raised inside into a `BadInput` that names `argument`.

    Only for blocks whose failure is the user's input: everything else keeps its traceback.
    """
    try:
        yield
    except errors as error:
        raise BadInput(f"{argument}: {_first_line(error)}") from error


@contextmanager
def exit_on_bad_input() -> Iterator[None]:
    """Print a `BadInput` raised inside as one line and exit with code 2."""
    try:
        yield
    except BadInput as error:
        print(f"error: {_first_line(error)}", file=sys.stderr)
        sys.exit(2)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
