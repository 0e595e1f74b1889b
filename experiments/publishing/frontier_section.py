# SPDX-License-Identifier: Apache-2.0
"""The frontier of a checkpoint for its card: a table, a picture and how to move along it."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib import pyplot as plt

from experiments.publishing.picture_style import MERGED, POINTS, add_legend, save_picture, shades
from frontier_tome_perceiver import Frontier

FRONTIER_FILE = "frontier.png"


def example_share(frontier: Frontier) -> float:
    """Return half of the FLOPs, or the least share in reach if that is more, in hundredths."""
    return max(0.5, math.ceil(100 * min(row.flops_ratio for row in frontier.rows)) / 100)


def frontier_section(frontier: Frontier) -> str:
    """Return the section of a card, Markdown with the picture that `draw_frontier` writes."""
    promised = any(row.changed_bound is not None for row in frontier.rows)
    # What the mildest row keeps: with fewer samples, or a worse row, less than 1 % cannot be promised.
    bound = math.ceil(100 * max(0.01, frontier.rows[0].changed_bound or 0.0)) / 100
    quality = f", or `model.merge_to(max_changed={bound})`," if promised and bound < 1 else ""
    share = example_share(frontier)
    what = "Share of changed answers" if promised else "Divergence of the outputs"
    return f"""`model.merge_to(flops_ratio={share})`{quality} takes the best of these rows within a budget, and \
`model(**inputs, flops_ratio={share})` does so for one call; nothing is measured again. They hold for inputs like the \
samples, at up to {frontier.input_shape[1:]} an input.

![{what} over the share of the FLOPs]({FRONTIER_FILE})

{frontier}"""


def draw_frontier(frontier: Frontier, path: Path) -> None:
    """Draw the changed answers of each row, or its divergence if they were not measured, over its share of the FLOPs.

    Args:
        frontier: with a row or more.
        path: of the PNG.
    """
    figure, axes = plt.subplots(figsize=(8, 4), constrained_layout=True)
    rows = frontier.rows
    shares = [row.flops_ratio for row in rows]
    dark, light = shades(MERGED, 2)
    if all(row.changed is not None for row in rows):
        changed = [100 * (row.changed or 0.0) for row in rows]
        label = f"of {frontier.held_out} held-out samples"
        axes.errorbar(shares, changed, **POINTS, marker="o", color=dark, label=label)
        if all(row.changed_bound is not None for row in rows):
            bounds = [100 * (row.changed_bound or 0.0) for row in rows]
            axes.plot(shares, bounds, linestyle="--", color=light, label="at most, at 95 % confidence")
        axes.set(ylabel="changed answers, %")
    else:
        divergences = [row.divergence or 0.0 for row in rows]
        axes.errorbar(shares, divergences, **POINTS, marker="o", color=dark, label="divergence of the outputs")
        axes.set(ylabel="divergence from unmerged")
    axes.set(xlabel="share of the unmerged model's FLOPs", ylim=(0, None))
    axes.invert_xaxis()
    axes.grid(alpha=0.3)
    add_legend(figure, [axes], 2)
    save_picture(figure, path)
