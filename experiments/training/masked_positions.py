# SPDX-License-Identifier: Apache-2.0
"""Training a masked language model, of which only the masked positions are decoded to the vocabulary.

Letters: B batch, P positions that the model decodes, D channels, V tokens of the vocabulary, M masked positions of the
whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from experiments.tasks.base import LABELS, Batch
from experiments.tasks.scores import NOT_ASKED


@contextmanager
def decoding_only_masked(model: nn.Module, inputs: Batch) -> Iterator[Batch]:
    """While it lasts, a masked language model's logits are those of the masked positions, (1, M, V), and no others.

    The loss and its gradients are what they would be: no other position has a part in them. All P of them, times V, is
    a third of a training step for 16,384 tokens. Any other model goes on as it is.

    Args:
        model: to be called with what comes out.
        inputs: with `labels` (B, P), `NOT_ASKED` where nothing is masked.

    Yields:
        The same with the labels of the masked positions, (1, M).
    """
    decoder = getattr(model, "embedding_decoder", None)
    if decoder is None or LABELS not in inputs:
        yield inputs
        return
    masked = inputs[LABELS] != NOT_ASKED

    def select(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        states: Tensor = args[0]  # (B, P, D)
        return (states[masked.to(states.device)][None], *args[1:]), kwargs

    handle = decoder.register_forward_pre_hook(select, with_kwargs=True)
    try:
        yield inputs | {LABELS: inputs[LABELS][masked][None]}
    finally:
        handle.remove()
