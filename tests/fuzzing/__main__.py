# SPDX-License-Identifier: Apache-2.0
"""Try random configs, arguments, data files and images for a number of seconds, and print how many were tried.

python -m tests.fuzzing --seconds 600        # what `make fuzz` runs

Every law of `tests/fuzzing/test_*.py` gets an equal share of the time, with new random examples each time. The first
example that breaks a law ends the program with a traceback, which shows the example in its shortest form.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import time
import warnings
from collections.abc import Callable
from itertools import cycle

import datasets
from hypothesis import HealthCheck, settings

import tests.conftest  # noqa: F401  isolates the caches, and turns off the network
from experiments.publishing.tables import markdown_table
from tests.fuzzing.limits import OUTCOMES

MODULES = ("test_configs", "test_arguments", "test_files")
# Examples that a law tries before it is the next one's turn, unless its own settings say fewer.
EXAMPLES = 50


def laws() -> dict[str, Callable[[], None]]:
    """Return the laws that hypothesis draws examples for, by name."""
    modules = [importlib.import_module(f"tests.fuzzing.{name}") for name in MODULES]
    named = {name: value for module in modules for name, value in vars(module).items()}
    return {name: value for name, value in named.items() if hasattr(value, "hypothesis")}


def fuzz(seconds: float) -> dict[str, dict[str, int]]:
    """Try all laws in turn until the time is up, and return the number of examples by law and outcome."""
    # Loaded before the laws are imported, since a law with settings of its own takes the others from the profile.
    settings.register_profile(
        "fuzzing",
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    settings.load_profile("fuzzing")
    tried = laws()
    counts: dict[str, dict[str, int]] = {name: {"result": 0, "one line": 0} for name in tried}
    end = time.monotonic() + seconds
    for name, law in cycle(tried.items()):
        OUTCOMES.clear()
        law()
        for outcome, count in OUTCOMES.items():
            counts[name][outcome] += count
        if time.monotonic() > end:
            return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="time to try examples for (default: 600)")
    seconds = parser.parse_args().seconds
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    datasets.disable_progress_bars()
    started = time.monotonic()
    counts = fuzz(seconds)
    rows = [
        (name.removeprefix("test_").replace("_", " "), each["result"], each["one line"])
        for name, each in counts.items()
    ]
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    print(markdown_table(["law", "used", "refused in one line"], rows, align="lr"))
    print(f"\n{time.monotonic() - started:.0f} seconds, no law broken")


if __name__ == "__main__":
    main()
