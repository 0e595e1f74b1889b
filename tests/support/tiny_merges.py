# SPDX-License-Identifier: Apache-2.0
"""Merging settings for the tiny models, and checks that several tests of the model share."""

import pytest
import torch

import experiments.merging.controls  # noqa: F401  registers the controls
from tests.support.tiny_models import HEADS, flat_logits, relative_difference

# Leaves 5 of 12 latents; some layers merge nothing.
R_LIST = [3, 0, 2, 1, 0, 1]
GROUPS = [None, [0, 1, 2, 0, 3, 4, 4, 0, 5, 6, 2, 0], None, [0, 1, 1, 2, 3, 0, 3], None, None]
AT_START = [0, 1, 2, 3, 4, 1, 5, 6, 7, 8, 0, 1]
MERGES = {
    "bipartite": dict(r=R_LIST),
    "value": dict(r=R_LIST, merge_metric="value"),
    "hidden": dict(r=R_LIST, merge_metric="hidden"),
    "k_center": dict(r=R_LIST, merge_method="k_center"),
    "leader": dict(r=R_LIST, merge_method="leader"),
    "random": dict(r=R_LIST, merge_method="random"),
    "groups": dict(merge_groups=GROUPS),
    "groups at the start": dict(latent_groups=AT_START, r=[1, 0, 2, 1, 0, 0]),
    "groups everywhere": dict(latent_groups=AT_START, merge_groups=[None, [0, 1, 2, 0, 3, 4, 4, 0, 3], *[None] * 4]),
}
MERGES_AND_PRUNE = {**MERGES, "prune": dict(r=R_LIST, merge_method="prune")}
ATTENTION = ["eager", "sdpa"]

every_head = pytest.mark.parametrize("head", HEADS)
# Every head with one merging setting, and every setting with one head, because the two are independent.
HEAD_AND_MERGE = [(head, "bipartite") for head in HEADS if head != "ForMaskedLM"] + [
    ("ForMaskedLM", merge) for merge in MERGES_AND_PRUNE
]
every_head_and_every_merge = pytest.mark.parametrize("head, merge", HEAD_AND_MERGE)
every_attention = pytest.mark.parametrize("attention", ATTENTION)

DUPLICATES = {
    # r is chosen so that duplicates at even and odd positions meet in two merges; sizes are 3, 1 and 2 after the first.
    "matched at once": (dict(r=[3, 1, 0, 0, 0, 0]), [0, 0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7]),
    "matched late, over two blocks": (dict(r=[0, 3, 0, 0, 1, 0]), [0, 0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7]),
    "matched, one size": (dict(r=[1, 0, 0, 0, 0, 0]), [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9, 10]),
    # These methods find copies at any positions, if at least as many latents are kept as there are different ones.
    "k_center": (dict(r=[5, 2, 0, 1, 0, 0], merge_method="k_center"), [0, 1, 0, 2, 0, 3, 1, 0, 0, 2, 0, 2]),
    "leader": (dict(r=[5, 2, 0, 1, 0, 0], merge_method="leader"), [0, 1, 0, 2, 0, 3, 1, 0, 0, 2, 0, 2]),
    "groups in two steps": (
        dict(merge_groups=[[0, 1, 2, 0, 3, 1, 1, 0, 1, 3, 4, 2], None, None, [0, 1, 2, 3, 2], None, None]),
        [0, 1, 2, 0, 3, 1, 1, 0, 1, 3, 2, 2],
    ),
    "groups at the start": (
        dict(latent_groups=[0, 1, 2, 0, 3, 1, 1, 0, 1, 3, 4, 2]),
        [0, 1, 2, 0, 3, 1, 1, 0, 1, 3, 4, 2],
    ),
    "groups at the start, then matched": (
        dict(latent_groups=[0, 1, 2, 0, 3, 1, 4, 0, 5, 6, 7, 8], r=[0, 2, 0, 0, 2, 0], merge_method="leader"),
        [0, 1, 0, 0, 2, 1, 3, 0, 4, 0, 0, 3],
    ),
}


def assert_same(value, reference, tolerance=1e-12):
    """Check that nested tuples, dicts and tensors have the same layout and, except for rounding, the same numbers."""
    if isinstance(reference, dict):
        assert list(value) == list(reference)
        value, reference = list(value.values()), list(reference.values())
    if isinstance(reference, (tuple, list)):
        assert isinstance(value, (tuple, list)) and len(value) == len(reference)
        for one, other in zip(value, reference, strict=True):
            assert_same(one, other, tolerance)
    else:
        assert value.shape == reference.shape and value.dtype == reference.dtype
        assert relative_difference(value, reference) <= tolerance


def labels_for(head, rows=2):
    if head == "ForMaskedLM":
        labels = torch.randint(0, 262, (rows, 20))
        labels[:, 3:] = -100
        return labels
    return torch.arange(rows) % 3


def loss_and_gradients(model, inputs):
    model.zero_grad()
    logits = flat_logits(model(**inputs))
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5)).to(logits.dtype)
    loss = (logits * weights).sum()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
