# SPDX-License-Identifier: Apache-2.0
"""Which merges a sweep tries: from the command line to what each row merges."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.errors import BadInput
from experiments.merging.arguments import check_merging, parse_r, spelled_r
from experiments.merging.budget import SCHEDULE_NAMES, Budget, check_schedule, flops_ratios, latency_ratios, searching
from experiments.merging.schedules import DEFAULT_SCHEDULE, Fields, apply_merging, unmerged_fields
from experiments.merging.search import SEARCH
from experiments.tasks.base import Batch, PreparedTask
from modeling_tome_perceiver import ToMePerceiverPreTrainedModel

# Fields of the config that a sweep may cross with every row.
VARIED = ("merge_method", "merge_metric", "proportional_attention")
# Of rounds and samples: more would only be a slip of the finger.
MOST = 10**6
BOOLEANS = {"true": True, "false": False}


@dataclass(frozen=True)
class Merge:
    """What one row of a sweep merges.

    Attributes:
        name: of the row.
        series: rows of the same one are joined by a line.
        fields: of the config, all that decide what merges.
    """

    name: str
    series: str
    fields: Fields

    @property
    def branch(self) -> str:
        """Of the Hub repository, and folder below `retrained/`."""
        return re.sub(r"[^A-Za-z0-9.]+", "_", self.name.replace("=", ""))

    def apply(self, config: ToMePerceiverConfig) -> None:
        """Set it on a config, whatever that merged before.

        Raises:
            BadInput: for what the config cannot mean.
        """
        apply_merging(config, self.fields)


@dataclass
class SweepArguments:
    """Which merges to try, and how to time them."""

    _argument_group_name: ClassVar[str] = "sweep"

    r: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Each an integer, or a comma-separated list, one a layer. 0, the unmerged model that all others "
            "are compared with, is always among them."
        },
    )
    flops_ratio: list[float] = field(
        default_factory=list,
        metadata={"help": "Each a share of the unmerged model's FLOPs, for a row with every --schedule."},
    )
    latency_ratio: list[float] = field(
        default_factory=list,
        metadata={"help": "The same of the unmerged model's time for a timed batch, measured on this machine."},
    )
    schedule: list[str] = field(
        default_factory=lambda: [DEFAULT_SCHEDULE],
        metadata={"help": f"How such a share is spread over the layers: {', '.join(sorted(SCHEDULE_NAMES))}."},
    )
    calibration_samples: int = field(
        default=256, metadata={"help": "Training samples, without labels, on which --schedule search compares outputs."}
    )
    merge_method: list[str] = field(
        default_factory=list,
        metadata={"help": "What merges with what. Several: every row with each, such as with the controls."},
    )
    merge_metric: list[str] = field(
        default_factory=list,
        metadata={"help": "What of the latents is compared: key, value, hidden. Several: every row with each."},
    )
    proportional_attention: list[str] = field(
        default_factory=list,
        metadata={"help": "Whether a merged latent counts as often as it stands for: true, false, or both in turn."},
    )
    r_inflection: float | None = field(default=None, metadata={"help": "Shape of the schedule of an integer r."})
    min_latents: int | None = field(default=None, metadata={"help": "Never merge below this many latents."})
    timing_rounds: int = field(default=15, metadata={"help": "Rounds in which every row is timed once. 0: no timing."})
    timing_batch_size: int = field(
        default=32, metadata={"help": "Inputs in a timed batch: the first ones that are evaluated."}
    )

    def __post_init__(self) -> None:
        for name, smallest in (("timing_rounds", 0), ("timing_batch_size", 1), ("calibration_samples", 1)):
            if not smallest <= getattr(self, name) <= MOST:
                raise BadInput(f"--{name} {getattr(self, name)}: allowed is an integer from {smallest} to {MOST}")
        budgets = self.flops_ratio or self.latency_ratio
        self.proportional_attention = [str(value).lower() for value in self.proportional_attention]
        for value in self.proportional_attention:
            if value not in BOOLEANS:
                raise BadInput(f"--proportional_attention {value}: allowed are {', '.join(BOOLEANS)}")
        self.r = [spelled_r(r) for r in self.r]
        for name in ("r", "flops_ratio", "latency_ratio", "schedule", *VARIED):
            values = getattr(self, name)
            for value in values:
                check_merging(**{name: value})
            if repeated := {value for value in values if values.count(value) > 1}:
                raise BadInput(f"--{name} {min(repeated)}: stands there twice; allowed is each once")
        check_merging(r_inflection=self.r_inflection, min_latents=self.min_latents)
        for name in self.schedule:
            check_schedule(name)
            if name != DEFAULT_SCHEDULE and not budgets:
                raise BadInput(f"--schedule {name}: allowed with a budget only, --flops_ratio or --latency_ratio")

    def merges(
        self,
        model: ToMePerceiverPreTrainedModel,
        prepared: PreparedTask,
        batch: Batch,
        input_shape: tuple[int, ...],
        log_dir: Path | None,
    ) -> list[Merge]:
        """What each row merges: nothing, then with every variant every r, and every budget with every schedule.

        Args:
            model: whose merging it is; a search runs it, and so does a budget of time.
            prepared: the task, whose training samples a search looks at.
            batch: that is timed.
            input_shape: of one input, (1, S) or (1, 3, height, width); a share of the FLOPs is for it.
            log_dir: where a search keeps what it has found; `None`: nowhere.

        Raises:
            BadInput: for what the config cannot mean.
        """
        config = model.config
        baseline = unmerged(config)
        merges = [baseline]
        attention = [BOOLEANS[value] for value in self.proportional_attention]
        given: dict[str, list] = dict(zip(VARIED, (self.merge_method, self.merge_metric, attention), strict=True))
        variants = {name: values or [getattr(config, name)] for name, values in given.items()}
        for values in product(*variants.values()):
            variant = dict(zip(variants, values, strict=True))
            if self.min_latents is not None:
                variant["min_latents"] = self.min_latents
            # A budget is for what a method costs, and a search for what it does to the outputs.
            apply_merging(config, baseline.fields | variant)
            named = [_spelled(variant[name]) for name in VARIED if len(variants[name]) > 1]
            for name, series, fields in self._rows(model, prepared, batch, input_shape, log_dir):
                merged = baseline.fields | variant | fields
                if _merges(merged, config):
                    merges.append(Merge(" ".join([name, *named]), " ".join([series, *named]), merged))
                elif name not in (merge.name for merge in merges):
                    # How it would merge makes no difference, so there is one of it.
                    merges.append(Merge(name, series, merged))
        return merges

    def _rows(
        self,
        model: ToMePerceiverPreTrainedModel,
        prepared: PreparedTask,
        batch: Batch,
        input_shape: tuple[int, ...],
        log_dir: Path | None,
    ) -> list[tuple[str, str, Fields]]:
        """Name, series and fields of each row, for what the config says of method and metric."""
        config = model.config
        inflection = {} if self.r_inflection is None else {"r_inflection": self.r_inflection}
        rows = [(f"r={r}", "r", inflection | {"r": parse_r(r)}) for r in self.r]
        cost = {
            "flops_ratio": flops_ratios(config, input_shape, type(model).__name__),
            "latency_ratio": latency_ratios(model, batch),
        }
        budgets = [Budget(argument, ratio, cost[argument]) for argument in cost for ratio in getattr(self, argument)]
        search = None
        if budgets and SEARCH in self.schedule:
            search = searching(model, prepared, self.calibration_samples, log_dir)
        for name, budget in product(self.schedule, budgets):
            found = budget.fields(name, config, search)
            rows.append((f"{budget.name}={budget.ratio:g} {name}", name, found))
        return rows


def _merges(fields: Fields, config: ToMePerceiverConfig) -> bool:
    """Whether anything merges or is left out; if not, how it would merge makes no difference."""
    return fields["r"] not in (0, [0] * config.num_self_attention_layers)


def unmerged(config: ToMePerceiverConfig) -> Merge:
    """The row that merges nothing, for this model: its other fields, of those a sweep changes, are the config's."""
    own = {name: getattr(config, name) for name in (*VARIED, "min_latents")}
    return Merge("r=0", "r", own | unmerged_fields(config))


def _spelled(value: Any) -> str:
    """A variant in the name of a row."""
    return {True: "proportional", False: "plain"}[value] if isinstance(value, bool) else str(value)
