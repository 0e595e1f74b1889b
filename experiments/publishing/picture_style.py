# SPDX-License-Identifier: Apache-2.0
"""Shared style of all pictures: fixed colours, and a legend below the panels.

Stock transformers are black, the unmerged model grey, the merged model blue, the model trained with merging green, and
controls orange. Lines of one colour differ in shade, from dark to light, and in marker.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.colors import Colormap

from experiments.files import write_whole

matplotlib.use("Agg")  # works without a screen
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STOCK, UNMERGED = "black", "gray"
MERGED, TRAINED, CONTROL = (matplotlib.colormaps[name] for name in ("Blues", "Greens", "Oranges"))
MARKERS = "osD^vP*X<>hp8d"
# Controls, to which merging is compared: skip blocks without merging, merge random latents, drop latents.
CONTROL_NAMES = frozenset({"skip_blocks", "random", "prune"})
POINT_STYLE: dict[str, Any] = {"markersize": 6, "linewidth": 1.5, "elinewidth": 1, "capsize": 3}
SCHEDULE_LABELS = {"r": "given r", "search": "searched schedule", "frontier": "frontier rows"}


def shades(base: Colormap, count: int) -> list[tuple[float, ...]]:
    """Return distinguishable shades of a base colour, such as `MERGED`, dark to light."""
    if count == 1:
        return [base(0.75)]
    return [base(0.95 - 0.5 * index / (count - 1)) for index in range(count)]


def is_control(series: str) -> bool:
    """Return whether a series of a sweep, such as "floor random", is a control."""
    return not CONTROL_NAMES.isdisjoint(series.split())


def series_label(series: str) -> str:
    """Return the label of a series of a sweep: its schedule, and its method if it names one."""
    schedule, _, method = series.partition(" ")
    label = SCHEDULE_LABELS.get(schedule, f"schedule {schedule}")
    return f"{label}, {method}" if method else label


def add_legend(figure: Figure, panels: Iterable[Axes], columns: int, title: str | None = None) -> None:
    """Add a legend below the panels that lists each label once."""
    named = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())}  # noqa: B905
    figure.legend(
        named.values(), named, loc="outside lower center", ncols=columns, fontsize=9, title=title, title_fontsize=9
    )


def save_picture(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all, and close the figure."""
    write_whole(path, lambda partial: figure.savefig(partial, dpi=110, format="png"))
    plt.close(figure)
