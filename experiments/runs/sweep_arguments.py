# SPDX-License-Identifier: Apache-2.0
"""Which merges a sweep tries: from the command line to what each row merges."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

from budget_tome_perceiver import Merging
from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.errors import BadInput
from experiments.merging.arguments import (
    MEANS,
    SCHEDULE_NAMES,
    WAYS,
    MergeArguments,
    Samples,
    apply_fields,
    check_groups,
    check_merging,
    check_schedule,
    spelled_r,
)
from modeling_tome_perceiver import ToMePerceiverPreTrainedModel
from search_tome_perceiver import GROUPS, SEARCH

# Of rounds and samples: more would only be a slip of the finger.
MOST = 10**6
BOOLEANS = {"true": True, "false": False}


@dataclass(frozen=True)
class Variant:
    """What one row of a sweep merges.

    Attributes:
        name: of the row.
        series: rows of the same one are joined by a line.
        merging: what it sets.
    """

    name: str
    series: str
    merging: Merging

    @property
    def branch(self) -> str:
        """Of the Hub repository, and folder below `retrained/`."""
        return re.sub(r"[^A-Za-z0-9.]+", "_", self.name.replace("=", ""))


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
        default_factory=lambda: [SEARCH],
        metadata={
            "help": f"How such a share is spread over the layers: {', '.join(sorted(SCHEDULE_NAMES))}. '{SEARCH}' "
            "finds that, with the method and the metric if they are not given."
        },
    )
    calibration_samples: int = field(
        default=1024,
        metadata={"help": "Training samples, without labels, on which --schedule search compares outputs."},
    )
    merge_method: list[str] = field(
        default_factory=list,
        metadata={
            "help": "What merges with what. Several: every row with each, such as with the controls. "
            f"'{GROUPS}', with budgets and --schedule {SEARCH} alone: fixed groups of latents."
        },
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
        for name in ("r", "flops_ratio", "latency_ratio", "schedule", *WAYS):
            values = getattr(self, name)
            for value in values:
                check_merging(**{name: value})
            if repeated := {value for value in values if values.count(value) > 1}:
                raise BadInput(f"--{name} {min(repeated)}: stands there twice; allowed is each once")
        check_merging(r_inflection=self.r_inflection, min_latents=self.min_latents)
        for name in self.schedule:
            check_schedule(name, bool(budgets))
        only_searches = self.schedule == [SEARCH] and set(self.r) <= {"0"}
        check_groups(self.merge_method, self.searches and only_searches)

    @property
    def searches(self) -> bool:
        """Whether any row is searched for."""
        return SEARCH in self.schedule and bool(self.flops_ratio or self.latency_ratio)

    def variants(
        self,
        model: ToMePerceiverPreTrainedModel,
        samples: Samples,
        input_shape: tuple[int, ...],
        log_dir: Path | None,
    ) -> list[Variant]:
        """What each row merges: nothing, then in every way every r, and every budget with every schedule.

        Args:
            model: whose merging it is; a search runs it, and so does a budget of time. Afterwards it merges nothing.
            samples: as for `MergeArguments.resolve`.
            input_shape: of one input, (1, S) or (1, 3, height, width); a share of the FLOPs is for it.
            log_dir: where a search keeps what it has found; `None`: nowhere.

        Raises:
            BadInput: for what the config cannot mean.
        """
        config = model.config
        baseline = unmerged(config)
        rows = [(way, *row) for way in self._ways() for row in self._rows(way)]
        merging: dict[int, Merging] = {}
        # What cannot be kept to is refused before anything is searched for, and the least budget is the first to be.
        for place in sorted(range(len(rows)), key=lambda place: _effort(rows[place][-1])):
            arguments = rows[place][-1]
            baseline.merging.apply(config)
            apply_fields(config, arguments.config_fields())
            arguments.resolve(model, samples, input_shape, log_dir)
            merging[place] = Merging.of(config)
        found = [baseline]
        for place, (way, name, series, _) in enumerate(rows):
            named = [_spelled(way[name]) for name in WAYS if len(getattr(self, name)) > 1]
            if merging[place].merges(baseline.merging.asked_of(config)):
                found.append(Variant(" ".join([name, *named]), " ".join([series, *named]), merging[place]))
            elif name not in (variant.name for variant in found):
                # How it would merge makes no difference, so there is one of it.
                found.append(Variant(name, series, merging[place]))
        baseline.merging.apply(config)
        return found

    def _ways(self) -> Iterator[dict[str, Any]]:
        """Every combination of what is given of method, metric and attention."""
        attention = [BOOLEANS[value] for value in self.proportional_attention]
        given: tuple[list[Any], ...] = (self.merge_method, self.merge_metric, attention)
        for values in product(*(values or [None] for values in given)):
            yield dict(zip(WAYS, values, strict=True)) | {"min_latents": self.min_latents}

    def _rows(self, way: dict[str, Any]) -> Iterator[tuple[str, str, MergeArguments]]:
        """Name, series and arguments of each row."""
        # Without merging there are no groups, and that row is there.
        for r in self.r if way["merge_method"] != GROUPS else ():
            yield f"r={r}", "r", MergeArguments(r=r, r_inflection=self.r_inflection, **way)
        for schedule in self.schedule:
            for budget in MEANS[1:]:
                for ratio in getattr(self, budget):
                    given: dict[str, Any] = {budget: ratio, "schedule": schedule} | way
                    arguments = MergeArguments(calibration_samples=self.calibration_samples, **given)
                    yield f"{budget.removesuffix('_ratio')}={ratio:g} {schedule}", schedule, arguments


def unmerged(config: ToMePerceiverConfig) -> Variant:
    """The row that merges nothing, for this model."""
    return Variant("r=0", "r", Merging.none(config))


def _effort(arguments: MergeArguments) -> tuple[bool, bool, float]:
    """What is resolved at once comes before what is timed or searched for, and less before more."""
    share = arguments.flops_ratio or arguments.latency_ratio or 0.0
    return arguments.searches, arguments.latency_ratio is not None, share


def _spelled(value: Any) -> str:
    """A way in the name of a row."""
    return {True: "proportional", False: "plain"}[value] if isinstance(value, bool) else str(value)
