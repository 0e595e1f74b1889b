# SPDX-License-Identifier: Apache-2.0
"""From a budget, a share of the unmerged model's FLOPs or time, to what merges in each layer.

Letters: B batch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.utils.data import Subset

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.errors import BadInput
from experiments.measurement import time_interleaved
from experiments.merging.cost import forward_cost
from experiments.merging.groups import unlabelled_batches
from experiments.merging.schedules import (
    SCHEDULES,
    SKIP_BLOCKS,
    CostRatio,
    Fields,
    apply_merging,
    named_family,
    unmerged_fields,
    weakest_member,
)
from experiments.merging.search import SEARCH, ScheduleSearch, starting_families, undisturbed
from experiments.tasks.base import Batch, PreparedTask
from modeling_tome_perceiver import ToMePerceiverPreTrainedModel

SCHEDULE_NAMES = (*SCHEDULES, SKIP_BLOCKS, SEARCH)
# Enough for a median that 1% of noise does not move from one number of latents to the next.
LATENCY_ROUNDS = 9
SEARCH_BATCH_SIZE = 64
SEARCH_LOG = "schedule_search.json"


@dataclass(frozen=True)
class Budget:
    """What a forward pass may cost.

    Attributes:
        argument: that gives it, "flops_ratio" or "latency_ratio".
        ratio: the share of the unmerged model's cost.
        cost_ratio: what that cost is.
    """

    argument: str
    ratio: float
    cost_ratio: CostRatio

    @property
    def name(self) -> str:
        """In a table: "flops", "latency"."""
        return self.argument.removesuffix("_ratio")

    def fields(self, name: str, config: ToMePerceiverConfig, search: ScheduleSearch | None) -> Fields:
        """The fields of a config that keep to the budget.

        Args:
            name: of the schedule, one of `SCHEDULE_NAMES`.
            config: of the model; its own merging does not count.
            search: what searches, if it is asked to.

        Raises:
            BadInput: for a share that the schedule cannot come down to, or that is not in (0, 1].
        """
        if not 0 < self.ratio <= 1:
            raise self._not_met(name, self._least(name, config))
        if name == SEARCH:
            assert search is not None
            found = search.best(self.ratio, self.cost_ratio)
        else:
            found = weakest_member(named_family(config, name), self.ratio, self.cost_ratio)
        if found is None:
            raise self._not_met(name, self._least(name, config))
        return found

    def _least(self, name: str, config: ToMePerceiverConfig) -> float:
        families = starting_families(config) if name == SEARCH else [named_family(config, name)]
        return min(self.cost_ratio(family(1.0)) for family in families)

    def _not_met(self, name: str, least: float) -> BadInput:
        return BadInput(
            f"--{self.argument} {self.ratio}: allowed are {least:.3f}, where schedule {name} ends, to 1, no merging"
        )


def check_schedule(name: str) -> None:
    """Check the name of a schedule.

    Raises:
        BadInput: for one that is not there.
    """
    if name not in SCHEDULE_NAMES:
        raise BadInput(f"--schedule {name}: allowed are {', '.join(sorted(SCHEDULE_NAMES))}")


def flops_ratios(config: ToMePerceiverConfig, input_shape: Sequence[int], architecture: str) -> CostRatio:
    """FLOPs of the whole forward pass with its matching.

    Args:
        config: of the model; its own merging does not count.
        input_shape: as `experiments.merging.cost.forward_cost` takes it.
        architecture: name of the model class.
    """

    def flops(fields: Fields) -> int:
        changed = type(config).from_dict(config.to_dict() | fields)
        return forward_cost(changed, input_shape, architecture).total_with_matching

    unmerged = flops(unmerged_fields(config))
    return lambda fields: flops(fields) / unmerged


def latency_ratios(model: ToMePerceiverPreTrainedModel, batch: Batch) -> CostRatio:
    """Time of a forward pass on this machine: the median of the ratios to the unmerged model in alternating rounds.

    Every list of r is measured once: asked again, a member costs the same.

    Args:
        model: on the device that counts; afterwards it merges as before.
        batch: what it takes, B inputs.

    Raises:
        BadInput: when asked for a member in one of several processes, which would not measure the same.
    """
    inputs = {name: value.to(model.device) for name, value in batch.items()}
    unmerged = unmerged_fields(model.config)
    measured: dict[str, float] = {}

    def forward(fields: Fields) -> None:
        apply_merging(model.config, fields)
        with torch.inference_mode():
            model(**inputs)

    def ratio(fields: Fields) -> float:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise BadInput("--latency_ratio: allowed in one process only, since several do not measure the same time")
        if not sum(fields["r"]) and fields["num_blocks"] == unmerged["num_blocks"]:
            return 1.0
        spelled = json.dumps(fields, sort_keys=True)
        if spelled not in measured:
            with undisturbed(model):
                (timing,) = time_interleaved(forward, [fields], unmerged, LATENCY_ROUNDS, desc="timing a schedule")
            measured[spelled] = 1 / timing.speedup.median
        return measured[spelled]

    return ratio


def searching(
    model: ToMePerceiverPreTrainedModel, prepared: PreparedTask, samples: int, log_dir: Path | None
) -> ScheduleSearch:
    """A search on unlabelled training samples, spread evenly over the training split.

    Args:
        model: to search for.
        prepared: the task.
        samples: how many, or all if there are fewer.
        log_dir: gets `schedule_search.json`, from which a search that was stopped goes on; `None`: nothing is written.
    """
    available = len(prepared.train)
    chosen = range(0, available, max(1, available // samples))[:samples]
    looked_at = replace(prepared, train=Subset(prepared.train, list(chosen)))
    # Held, since what augmentation makes of an image is another every time.
    batches = list(unlabelled_batches(looked_at, SEARCH_BATCH_SIZE))
    return ScheduleSearch(model, batches, None if log_dir is None else log_dir / SEARCH_LOG)
