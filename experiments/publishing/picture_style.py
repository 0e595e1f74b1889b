# SPDX-License-Identifier: Apache-2.0
"""The style of all pictures: one colour for one thing, and a legend below that explains every line.

Stock transformers are black, the unmerged model is grey, merged blue, trained with merging on green, and a control, to
which merging is compared, orange. Several lines of one colour have shades of it, dark to light, and their own markers.
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
# A schedule that merges nothing, and methods that ignore the latents or drop them.
CONTROL_NAMES = frozenset({"skip_blocks", "random", "prune"})
POINT_STYLE: dict[str, Any] = {"markersize": 6, "linewidth": 1.5, "elinewidth": 1, "capsize": 3}
SCHEDULE_LABELS = {"r": "r as given", "search": "as a search found it", "frontier": "rows of the frontier"}


def shades(base: Colormap, count: int) -> list[tuple[float, ...]]:
    """Return distinguishable shades of a base colour, such as `MERGED`, dark to light."""
    if count == 1:
        return [base(0.75)]
    return [base(0.95 - 0.5 * index / (count - 1)) for index in range(count)]


def is_control(series: str) -> bool:
    """Return whether a series of a sweep, such as "floor random", is a control."""
    return not CONTROL_NAMES.isdisjoint(series.split())


def series_label(series: str) -> str:
    """Return a series of a sweep in words: its schedule, and its method if it names one."""
    schedule, _, method = series.partition(" ")
    words = SCHEDULE_LABELS.get(schedule, f"schedule {schedule}")
    return f"{words}, {method}" if method else words


def add_legend(figure: Figure, panels: Iterable[Axes], columns: int, title: str | None = None) -> None:
    """Put a legend below the panels, with each label once."""
    named = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())}  # noqa: B905
    figure.legend(
        named.values(), named, loc="outside lower center", ncols=columns, fontsize=9, title=title, title_fontsize=9
    )


def save_picture(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all, and close the figure."""
    write_whole(path, lambda partial: figure.savefig(partial, dpi=110, format="png"))
    plt.close(figure)
