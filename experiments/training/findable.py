# SPDX-License-Identifier: Apache-2.0
"""The start of a masked language model from scratch that is to learn a teacher's states.

From a plain start it does not: within a few steps all latents take on one constant vector whose length grows and drowns
the rest, and the distance to the teacher stays that of its mean. So nothing that is constant is left to be learnt,
every part begins small beside what it is added to, and each position can be found from the first step on.

Letters: N latents, P positions, D channels of inputs, C of latents, V tokens.
"""

from __future__ import annotations

import math

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor, nn

from experiments.tasks.teacher import Teacher
from modeling_tome_perceiver import ToMePerceiverForMaskedLM

PRODUCT_SCALE = 1.5
"""Of the query and key products of both cross-attentions, the identity: sharp enough for a latent to read its token."""
BRANCH_SCALE = 0.2
"""Of the output products of attention and MLP in the self-attention layers: latents stay apart at first."""
LATENT_SCALE = 10.0
"""How much longer a latent is than a position: what it has read does not hide which latent it is."""
READ_AT_ONCE = 1000


@torch.no_grad()
def start_findable(model: ToMePerceiverForMaskedLM, teacher: Teacher, counts: Tensor) -> None:
    """Start a model from scratch so that it learns from a teacher.

    - The bias of the tokens' logits is their log frequency, so that it is not learnt through the states; embeddings of
      tokens are the teacher's, where they are as wide.
    - The output products of attention and MLP in the self-attention layers are scaled by `BRANCH_SCALE`.
    - Positions are random, so nearly orthogonal, as long as an embedding, and the same for inputs, latents and the
      decoder's queries; query and key products of both cross-attentions are the identity. So latent i reads token i,
      or its part of the tokens if there are fewer latents than positions, and position i reads it back.

    Args:
        model: of which all has been drawn.
        teacher: that it is to learn from.
        counts: (V,), how often each token stands in the training examples.
    """
    perceiver = model.perceiver
    inputs, layers = perceiver.input_preprocessor, perceiver.encoder.self_attends
    model.embedding_decoder.bias.copy_(log_frequencies(counts))
    tokens = teacher.model.get_input_embeddings().weight[teacher.ids]
    if tokens.shape == inputs.embeddings.weight.shape:
        inputs.embeddings.weight.copy_(tokens)

    for layer in layers:
        for product in (layer.attention.output.dense, layer.mlp.dense2):
            product.weight.mul_(BRANCH_SCALE)

    positions = torch.randn_like(inputs.position_embeddings.weight) * inputs.embeddings.weight.std()
    inputs.position_embeddings.weight.copy_(positions)
    perceiver.decoder.output_position_encodings.position_embeddings.copy_(positions)
    perceiver.embeddings.latents.copy_(LATENT_SCALE * _latents_of(positions, perceiver.embeddings.latents))
    for crossing in (perceiver.encoder.cross_attention, perceiver.decoder.decoding_cross_attention):
        for product in (crossing.attention.self.query, crossing.attention.self.key):
            nn.init.eye_(product.weight).mul_(PRODUCT_SCALE)
            nn.init.zeros_(product.bias)


def log_frequencies(counts: Tensor) -> Tensor:
    """(V,), of tokens with such counts (V,), each counted once more, so that none is impossible."""
    return ((counts.double() + 1) / (counts.sum() + len(counts))).log()


def token_counts(examples: Dataset, tokens: int) -> Tensor:
    """(V,), how often each of so many tokens stands in the `input_ids` of examples."""
    counts = torch.zeros(tokens, dtype=torch.int64)
    for batch in examples.with_format("arrow").iter(READ_AT_ONCE):
        ids = pc.list_flatten(batch.column("input_ids")).to_numpy()
        counts += torch.from_numpy(np.bincount(ids, minlength=tokens))
    return counts


def _latents_of(positions: Tensor, latents: Tensor) -> Tensor:
    """(N, C), each the sum of the positions (P, D) that it stands for, as long as one of them; what no position is for,
    in latents or channels, is random."""
    count, width = latents.shape
    found = torch.randn_like(latents) * positions.std()
    shared = min(width, positions.shape[1])
    owner = torch.arange(len(positions)) * min(count, len(positions)) // len(positions)
    for latent in range(min(count, len(positions))):
        own = positions[owner == latent, :shared]
        found[latent, :shared] = own.sum(dim=0) / math.sqrt(len(own))
    return found
