# SPDX-License-Identifier: Apache-2.0
"""A picture of what a config's merging means, layer by layer."""

from __future__ import annotations

from pathlib import Path

from matplotlib import pyplot as plt
from transformers import PreTrainedConfig

from cost_tome_perceiver import ForwardCost
from experiments.publishing.picture_style import MERGED, UNMERGED, add_legend, save_picture, shades


def draw_schedule(config: PreTrainedConfig, cost: ForwardCost, unmerged: ForwardCost, path: Path) -> None:
    """Draw the latents that are left after each layer, and the FLOPs of each layer beside those of no merging.

    Args:
        config: a model's, with its merging settings.
        cost, unmerged: its forward pass, and that without merging.
        path: of the PNG.
    """
    figure, (latents, flops) = plt.subplots(1, 2, figsize=(10, 3.4), constrained_layout=True)
    left = [config.latents_at_start, *config.latents_per_layer]
    (merged,) = shades(MERGED, 1)
    latents.step(range(len(left)), left, where="post", color=merged)
    latents.set(xlabel="self-attention layer", ylabel="latents left", ylim=(0, None))
    # Unmerged there may be more layers, where weight-shared blocks run more often.
    for each, color, label in ((unmerged, UNMERGED, "unmerged"), (cost, merged, "merged")):
        gflops = [layer / 1e9 for layer in each.self_attention]
        flops.bar(range(1, len(gflops) + 1), gflops, color=color, label=label)
    flops.set(xlabel="self-attention layer", ylabel="GFLOPs")
    for axes in (latents, flops):
        axes.grid(alpha=0.3)
    add_legend(figure, [flops], 2)
    save_picture(figure, path)
