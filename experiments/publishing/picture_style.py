# SPDX-License-Identifier: Apache-2.0
"""How the pictures look: one colour for one thing in all of them, and every line explained in a legend below.

Stock transformers are black, the unmerged model is grey, merged blue, trained with merging on green, and a control, to
which merging is compared, orange. Several of a kind have shades of its colour, dark to light, and marks of their own.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.colors import Colormap

from experiments.files import write_whole

matplotlib.use("Agg")  # there may be no screen
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STOCK, UNMERGED = "black", "gray"
MERGED, TRAINED, CONTROL = (matplotlib.colormaps[name] for name in ("Blues", "Greens", "Oranges"))
MARKERS = "osD^vP*X<>hp8d"
# A schedule that merges nothing, and methods that do not look at the latents or drop them.
CONTROLS = frozenset({"skip_blocks", "random", "prune"})
POINTS: dict[str, Any] = {"markersize": 6, "linewidth": 1.5, "elinewidth": 1, "capsize": 3}
SERIES = {"r": "r as given", "search": "as a search found it", "frontier": "rows of the frontier"}


def shades(kind: Colormap, count: int) -> list[tuple[float, ...]]:
    """Of a kind, such as `MERGED`, so many colours that can be told apart, dark to light."""
    if count == 1:
        return [kind(0.75)]
    return [kind(0.95 - 0.5 * index / (count - 1)) for index in range(count)]


def is_control(series: str) -> bool:
    """Whether a series of a sweep, such as "floor random", is one."""
    return not CONTROLS.isdisjoint(series.split())


def series_words(series: str) -> str:
    """A series of a sweep in words: its schedule, and how it merges if that is said."""
    schedule, _, way = series.partition(" ")
    words = SERIES.get(schedule, f"schedule {schedule}")
    return f"{words}, {way}" if way else words


def add_legend(figure: Figure, panels: Iterable[Axes], columns: int, title: str | None = None) -> None:
    """Explain below the panels all that is drawn in them, what is in several of them once."""
    named = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())}  # noqa: B905
    figure.legend(
        named.values(), named, loc="outside lower center", ncols=columns, fontsize=9, title=title, title_fontsize=9
    )


def save_picture(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all, and forget the figure."""
    write_whole(path, lambda partial: figure.savefig(partial, dpi=110, format="png"))
    plt.close(figure)
