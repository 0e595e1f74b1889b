# SPDX-License-Identifier: Apache-2.0
"""Fewer latents from the start: the learned latents themselves are merged, before anything runs.

Letters: N latents, M groups of them, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from merging_tome_perceiver import match_groups, merge_latents
from modeling_tome_perceiver import ToMePerceiverPreTrainedModel


@torch.no_grad()
def merge_latent_parameters(model: ToMePerceiverPreTrainedModel, groups: Sequence[int]) -> None:
    """Put in place of a model's N learned latents (N, C) the means of their groups (M, C).

    What is left is a model of M latents that merges nothing. How many latents a mean stands for is lost: the encoder's
    cross-attention reads the inputs anew for each, so there are no sizes to keep.

    Args:
        model: a head or a base model, changed in place, and its config with it.
        groups: the group (0, 1, ..., M - 1) of each of the N latents.

    Raises:
        ValueError: for groups that are not of the N latents, or leave fewer than `config.min_latents`.
    """
    config, embeddings = model.config, model.base_model.embeddings
    # As groups of the first layer they are checked, by the rules of the config.
    checked = type(config).from_dict(
        config.to_dict()
        | {"r": 0, "r_inflection": 0.0}
        | {"merge_groups": [list(groups), *[None] * (config.num_self_attention_layers - 1)]}
    )
    latents = embeddings.latents
    means, _ = merge_latents(latents[None], None, match_groups(groups, latents.device))
    embeddings.latents = nn.Parameter(means[0], requires_grad=latents.requires_grad)
    config.r, config.r_inflection, config.merge_groups = 0, 0.0, None
    config.num_latents = checked.latents_per_layer[0]
