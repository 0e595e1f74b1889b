# SPDX-License-Identifier: Apache-2.0
"""Names and messages from outside, made safe for the place that shows them: a terminal, a log or a spreadsheet.

Names of labels, columns, files and models come from datasets and configs that anyone may have written.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any

# Arguments whose values are secret, and variables that may hold a token of the Hub.
SECRET_ARGUMENTS = ("--token", "--hub_token", "--hub-token")
SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
# A token as the Hub makes it.
TOKEN = re.compile(r"\bhf_\w{8,}")
HIDDEN = "..."


def printable(text: str) -> str:
    """Return a text on one line, with control characters escaped, which could move a terminal's cursor or hide text."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def hide_tokens(text: str) -> str:
    """Return a text in which tokens of the Hub are replaced by "...": those of this process, and all that look so."""
    words = [*sys.argv, ""]
    given = [
        word.partition("=")[2] if "=" in word else following
        for word, following in zip(words, words[1:], strict=False)
        if word.partition("=")[0] in SECRET_ARGUMENTS
    ]
    for secret in (*given, *(os.environ.get(name, "") for name in SECRET_VARIABLES)):
        if secret.strip():
            text = text.replace(secret.strip(), HIDDEN)
    return TOKEN.sub(HIDDEN, text)


def spreadsheet_cell(value: Any) -> Any:
    """Return a cell that no spreadsheet takes for a formula: a text that begins like one gets an apostrophe in front.

    Numbers stay as they are, also those written as text.
    """
    if not isinstance(value, str) or not value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value
