# SPDX-License-Identifier: Apache-2.0
"""How a run ends: what merging costs and gains, in a few lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import inference_mode

from cost_tome_perceiver import FlopsShare, Merging, undisturbed
from experiments.measurement import Quartiles, time_interleaved
from experiments.publishing.card import Measured, metric_name
from experiments.publishing.tables import with_error
from experiments.tasks.base import Batch
from modeling_tome_perceiver import ToMePerceiverPreTrainedModel

ROUNDS = 5


@dataclass(frozen=True)
class Ending:
    """What a run came to.

    Attributes:
        measured: the figures of each stage, in their order.
        metric: the figure that is shown.
        flops_ratio: share of the unmerged model's FLOPs.
        speedup: times as fast as unmerged on this machine.
        batch_size: of what was timed.
        chosen: what merges, in words.
        changes: lines that say whose answers change.
        saved: where it is.
    """

    measured: Sequence[Measured]
    metric: str
    flops_ratio: float
    speedup: Quartiles
    batch_size: int
    chosen: str
    changes: Sequence[str]
    saved: str

    def __str__(self) -> str:
        """Unmerged, merged, retrained; cost; what merges; where it is."""
        lines = []
        for row in self.measured:
            score = row.scores[self.metric]
            line = f"{row.name}: {metric_name(self.metric)} {with_error(score.value, score.stderr, scale=100)}"
            if score.compared:
                change = with_error(score.change, score.change_stderr, "+.2f", scale=100)
                line += f", change, paired by example, {change}"
            lines.append(line)
        slower = "" if self.speedup.median >= 1 else "; slower than unmerged on this machine"
        lines.append(
            f"cost: {self.flops_ratio:.3f} of the FLOPs, {self.speedup.median:.2f} times as fast as unmerged "
            f"({self.speedup.lower:.2f} to {self.speedup.upper:.2f}, batch {self.batch_size}){slower}"
        )
        return "\n".join([*lines, f"merges: {self.chosen}", *self.changes, f"saved: {self.saved}"])


def cost_and_speed(
    model: ToMePerceiverPreTrainedModel, batch: Batch, input_shape: tuple[int, ...]
) -> tuple[float, Quartiles]:
    """What the model's merging leaves of its FLOPs, and how much faster it is than unmerged.

    Args:
        model: that merges.
        batch: that is timed, in alternating rounds.
        input_shape: that FLOPs are for.
    """
    merged, unmerged = Merging.of(model.config), model.unmerged
    inputs = {name: value.to(model.device) for name, value in batch.items()}
    share = FlopsShare(unmerged.asked_of(model.config), input_shape, type(model).__name__)

    def forward(merging: Merging) -> None:
        with merging.applied(model.config), inference_mode():
            model(**inputs)

    with undisturbed(model):
        (timing,) = time_interleaved(forward, [merged], unmerged, ROUNDS, desc="timing")
    return share(merged), timing.speedup
