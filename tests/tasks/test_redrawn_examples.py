# SPDX-License-Identifier: Apache-2.0
"""Tests of examples that are redrawn in every epoch."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import TrainerControl, TrainerState

from experiments.tasks.redrawn_examples import NextEpoch, RedrawnExamples


def drawn(count: int = 3, seed: int = 0) -> RedrawnExamples:
    examples = Dataset.from_dict({"number": list(range(count))})
    return RedrawnExamples(examples, lambda example, index, random: {"seen": index + random.random()}, seed)


def test_an_example_depends_on_seed_epoch_and_place_alone():
    """Not on what was read before, so a resumed run sees the same examples."""
    examples, again = drawn(), drawn()
    for each in (examples, again):
        each.epoch.fill_(2)
    first = [examples[index]["seen"] for index in (0, 1, 2)]
    np.random.random(), np.random.default_rng()
    assert [again[index]["seen"] for index in (2, 1, 0)] == first[::-1]
    assert first[0] + 1 != first[1]
    examples.epoch.fill_(3)
    assert examples[0]["seen"] != first[0]
    assert drawn(seed=1)[0]["seen"] != drawn()[0]["seen"]


@pytest.mark.parametrize(("epoch", "expected"), [(0, 0), (None, 0), (1.0, 1), (2.4, 2)])
def test_the_epoch_is_told(epoch, expected):
    """A run that resumes in the middle of an epoch continues that epoch."""
    examples = drawn()
    NextEpoch(examples).on_epoch_begin(None, TrainerState(epoch=epoch), TrainerControl())
    assert int(examples.epoch) == expected


def test_workers_that_live_on_hear_of_the_next_epoch():
    examples = drawn(count=2)
    loader = DataLoader(examples, num_workers=1, persistent_workers=True, collate_fn=lambda batch: batch)
    seen = []
    for epoch in (0, 1):
        examples.epoch.fill_(epoch)
        seen.append([example["seen"] for (example,) in loader])
        assert seen[-1] == [examples[index]["seen"] for index in (0, 1)]
    assert seen[0] != seen[1]
