# SPDX-License-Identifier: Apache-2.0
"""Training examples with random changes, drawn again in every epoch: crops of images, masks of tokens.

Used by `experiments.tasks.images` and `experiments.tasks.mlm`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState


class RedrawnExamples(torch.utils.data.Dataset):
    """Training examples that are randomly changed, differently in each epoch; `NextEpoch` sets the epoch.

    The change depends only on the seed, the epoch and the index of the example, so a resumed run, or one with more
    workers or processes, sees the same examples. The global random state would not ensure that: data loaders prepare
    batches ahead of the step that a checkpoint saves.

    Args:
        examples: the unchanged examples.
        draw: makes model inputs from an example, its index and a random generator.
        seed: seed of the random changes.
    """

    def __init__(
        self, examples: Dataset, draw: Callable[[dict[str, Any], int, np.random.Generator], dict[str, Any]], seed: int
    ) -> None:
        self.examples, self.draw, self.seed = examples, draw, seed
        # Shared memory, so that persistent data loader workers see the new epoch.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.draw(self.examples[index], index, np.random.default_rng((self.seed, int(self.epoch), index)))


class NextEpoch(TrainerCallback):
    """Callback that sets the epoch of the training examples: accelerate sets it for samplers only.

    Args:
        examples: the training examples.
    """

    def __init__(self, examples: RedrawnExamples) -> None:
        self.examples = examples

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.examples.epoch.fill_(int(state.epoch or 0))
