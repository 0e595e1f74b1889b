# SPDX-License-Identifier: Apache-2.0
"""Training examples of which something is drawn anew in every epoch: crops of images, masks of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState


class RedrawnExamples(torch.utils.data.Dataset):
    """Training examples, each drawn anew in every epoch: fill `epoch` before it begins.

    What is drawn for an example depends on the seed, the epoch and its place, and on nothing else: a run that is killed
    and resumed, or that has more workers or processes, sees the same examples. Random numbers of the process would not
    do: batches are made ahead of the step that a checkpoint is of.

    Args:
        examples: what is drawn from.
        draw: from an example, its place and a generator to what the model takes.
        seed: of what is drawn.
    """

    def __init__(
        self, examples: Dataset, draw: Callable[[dict[str, Any], int, np.random.Generator], dict[str, Any]], seed: int
    ) -> None:
        self.examples, self.draw, self.seed = examples, draw, seed
        # Shared, so that data loader workers that live on hear of it.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.draw(self.examples[index], index, np.random.default_rng((self.seed, int(self.epoch), index)))


class NextEpoch(TrainerCallback):
    """Tells the training examples which epoch it is; accelerate would only tell a sampler.

    Args:
        examples: to train on.
    """

    def __init__(self, examples: RedrawnExamples) -> None:
        self.examples = examples

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.examples.epoch.fill_(int(state.epoch or 0))
