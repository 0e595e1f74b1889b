# SPDX-License-Identifier: Apache-2.0
"""A user's mistake is one line and exit code 2; anything else keeps its traceback."""

from __future__ import annotations

import pytest

from experiments.bad_input import BadInput, exit_on_bad_input, naming


def test_bad_input_exits_with_code_2_and_one_line(capsys):
    with pytest.raises(SystemExit) as exit_info, exit_on_bad_input():
        raise BadInput("--r -1: allowed is 0 or more\nand more")
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == "error: --r -1: allowed is 0 or more\n"


def test_naming_adds_the_argument_to_the_first_line():
    with pytest.raises(BadInput, match=r"^--file x: no such file$"), naming("--file x", OSError):
        raise OSError("\n  no such file\nlong explanation")


def test_other_errors_pass():
    with pytest.raises(ZeroDivisionError), exit_on_bad_input(), naming("--file x", OSError):
        raise ZeroDivisionError
