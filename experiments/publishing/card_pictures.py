# SPDX-License-Identifier: Apache-2.0
"""Pictures of a card: latents and FLOPs of each layer, and the frontier."""

from __future__ import annotations

from pathlib import Path

from matplotlib import pyplot as plt
from transformers import PreTrainedConfig

from cost_tome_perceiver import ForwardCost
from experiments.publishing.picture_style import MERGED, POINT_STYLE, UNMERGED, add_legend, save_picture, shades
from frontier_tome_perceiver import Frontier


def draw_schedule(config: PreTrainedConfig, merged: ForwardCost, unmerged: ForwardCost, path: Path) -> None:
    """Draw the latents left after each layer, and the FLOPs of each layer, merged and unmerged, as a PNG."""
    figure, (latents, flops) = plt.subplots(1, 2, figsize=(10, 3.4), constrained_layout=True)
    left = [config.latents_at_start, *config.latents_per_layer]
    (blue,) = shades(MERGED, 1)
    latents.step(range(len(left)), left, where="post", color=blue)
    latents.set(xlabel="self-attention layer", ylabel="latents left", ylim=(0, None))
    # The unmerged model has more layers if merging skips blocks.
    for cost, color, label in ((unmerged, UNMERGED, "unmerged"), (merged, blue, "merged")):
        gflops = [layer / 1e9 for layer in cost.self_attention]
        flops.bar(range(1, len(gflops) + 1), gflops, color=color, label=label)
    flops.set(xlabel="self-attention layer", ylabel="GFLOPs")
    for axes in (latents, flops):
        axes.grid(alpha=0.3)
    add_legend(figure, [flops], 2)
    save_picture(figure, path)


def draw_frontier(frontier: Frontier, path: Path) -> None:
    """Draw changed answers, or without them the divergence, against the share of FLOPs, as a PNG."""
    figure, axes = plt.subplots(figsize=(8, 4), constrained_layout=True)
    rows = frontier.rows
    shares = [row.flops_ratio for row in rows]
    dark, light = shades(MERGED, 2)
    points = POINT_STYLE | {"marker": "o", "color": dark}
    if all(row.changed is not None for row in rows):
        changed = [100 * (row.changed or 0.0) for row in rows]
        axes.errorbar(shares, changed, **points, label=f"measured on {frontier.held_out} held-out samples")
        if all(row.changed_bound is not None for row in rows):
            bounds = [100 * (row.changed_bound or 0.0) for row in rows]
            axes.plot(shares, bounds, linestyle="--", color=light, label="upper bound, 95 % confidence")
        axes.set(ylabel="changed answers, %")
    else:
        axes.errorbar(shares, [row.divergence or 0.0 for row in rows], **points, label="divergence of the outputs")
        axes.set(ylabel="divergence from unmerged")
    axes.set(xlabel="share of the unmerged model's FLOPs", ylim=(0, None))
    axes.invert_xaxis()
    axes.grid(alpha=0.3)
    add_legend(figure, [axes], 2)
    save_picture(figure, path)
