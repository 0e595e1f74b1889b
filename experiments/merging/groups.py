# SPDX-License-Identifier: Apache-2.0
"""Calibrated merging: which latents merge is decided once, from a few unlabelled samples, and stored in the config.

Latents are learned parameters, the same for every input. So which of them say the same can be read off their mean
similarity over samples, and nothing has to be matched as the model runs.

Letters: B batch, L self-attention layers, N latents that reach a layer, M groups that are left of them, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform
from torch.utils.data import DataLoader
from tqdm import tqdm

from experiments.errors import Stopped
from experiments.merging.search import undisturbed
from experiments.merging.similarity import SIMILARITIES
from experiments.tasks.base import Batch, PreparedTask
from modeling_tome_perceiver import ToMePerceiverPreTrainedModel

LABELS = "labels"


def calibrate_groups(
    model: ToMePerceiverPreTrainedModel,
    batches: Iterable[Batch],
    left_after: Sequence[int],
    similarity: str = "key",
) -> list[list[int] | None]:
    """Group latents by their mean similarity over samples, layer by layer, each with the layers before it merged.

    Args:
        model: a head or a base model; afterwards it is as it was before.
        batches: what the model takes, without labels; gone through anew for each layer that merges.
        left_after: M for each of the L layers; the same as before it where nothing is to merge.
        similarity: a key of `SIMILARITIES`.

    Returns:
        What `config.merge_groups` takes.

    Raises:
        ValueError: for a number of latents that cannot be left, an unknown similarity, or no batches.
    """
    config = model.config
    reaching = [config.num_latents, *left_after]
    if len(left_after) != config.num_self_attention_layers or any(
        not 1 <= after <= before for before, after in pairwise(reaching)
    ):
        raise ValueError(
            f"left_after = {list(left_after)}: allowed are {config.num_self_attention_layers} numbers, one a layer, "
            f"that never rise, from {config.num_latents} to 1"
        )
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity = {similarity!r}: allowed are {', '.join(map(repr, sorted(SIMILARITIES)))}")
    merge_groups: list[list[int] | None] = [None] * len(left_after)
    with undisturbed(model), torch.no_grad():
        for layer, (before, after) in enumerate(pairwise(reaching)):
            if after < before:
                # Set anew, so that the config takes a copy and not the list that grows here.
                config.r, config.merge_groups = 0, list(merge_groups)
                merge_groups[layer] = average_linkage(mean_similarity(model, batches, layer, similarity), after)
    return merge_groups


def mean_similarity(
    model: ToMePerceiverPreTrainedModel, batches: Iterable[Batch], layer: int, similarity: str
) -> np.ndarray:
    """How alike each two latents are that reach a layer, (N, N), as the mean over samples.

    Args:
        model: in evaluation mode, with the merging of the layers before set.
        batches: what the model takes.
        layer: counted from 0 in the order in which they run.
        similarity: a key of `SIMILARITIES`.

    Raises:
        ValueError: if there are no batches.
        Stopped: if similarities are not finite.
    """
    total, samples = torch.zeros((), dtype=torch.float64), 0
    for batch in tqdm(batches, desc=f"calibrating layer {layer}", unit="batch"):
        on_device = {name: value.to(model.device) for name, value in batch.items()}
        (each,) = SIMILARITIES[similarity](model, on_device, [layer])
        total = total + each.sum(dim=0).to("cpu", torch.float64)
        samples += len(each)
    if samples == 0:
        raise ValueError("batches: there are none; allowed is what can be gone through anew for each layer that merges")
    if not total.isfinite().all():
        raise Stopped(
            f"the similarities of the latents that reach layer {layer} are not finite: the weights of the model are "
            "damaged or training has diverged"
        )
    return (total / samples).numpy()


def average_linkage(similarity: np.ndarray, num_groups: int) -> list[int]:
    """Cluster by average linkage: the two clusters whose members are most similar on average merge first.

    Args:
        similarity: (N, N).
        num_groups: M, from 1 to N. So many come out, whatever is tied.

    Returns:
        The group of each of the N latents, numbered in the order of their first latent.
    """
    latents = len(similarity)
    members = {latent: [latent] for latent in range(latents)}
    if num_groups < latents:
        distance = 1 - (similarity + similarity.T) / 2
        np.fill_diagonal(distance, 0)
        tree = linkage(squareform(distance, checks=False), "average")
        # Each row merges two clusters, and is itself cluster N + row. `fcluster` cuts at a distance, and where
        # distances are tied no distance leaves the number that is wanted.
        for row, (one, other) in enumerate(tree[: latents - num_groups, :2].astype(int).tolist()):
            members[latents + row] = members.pop(one) + members.pop(other)
    groups = [0] * latents
    for number, cluster in enumerate(sorted(members.values(), key=min)):
        for latent in cluster:
            groups[latent] = number
    return groups


def unlabelled_batches(task: PreparedTask, batch_size: int) -> DataLoader:
    """The training samples as batches without labels, which can be gone through again.

    Args:
        task: with the samples.
        batch_size: B.
    """

    def collate(examples: list[dict[str, Any]]) -> Batch:
        return dict(task.collate([{name: example[name] for name in example if name != LABELS} for example in examples]))

    return DataLoader(task.train, batch_size, collate_fn=collate)
