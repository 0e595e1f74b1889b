# SPDX-License-Identifier: Apache-2.0
"""Arguments of a sweep, and the rows that they ask for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar, NamedTuple

from transformers.hf_argparser import HfArg

from cost_tome_perceiver import Merging
from experiments.errors import BadInput
from experiments.merging.arguments import (
    AMOUNTS,
    BUDGETS,
    MOST_SAMPLES,
    SCHEDULE_NAMES,
    SEARCH,
    WAYS,
    MergeArguments,
    Samples,
    apply_fields,
    spelled_r,
)
from experiments.runs.sweep_report import Row
from experiments.training.progress import say
from frontier_tome_perceiver import GROUPS, Frontier
from modeling_tome_perceiver import ToMePerceiverPreTrainedModel

# Largest number of timing rounds and inputs; a larger one is a typing mistake.
TIMING_LIMIT = 10**6
BOOLEANS = {"true": True, "false": False}
# Values of `proportional_attention` in the name of a row.
ATTENTIONS = {True: "proportional", False: "plain"}


class _RequestedRow(NamedTuple):
    """A row that the command line asks for, before it is resolved."""

    name: str
    series: str
    arguments: MergeArguments


@dataclass
class SweepArguments:
    """Which merges to try, and how to time them."""

    _argument_group_name: ClassVar[str] = "sweep"

    r: list[str] = HfArg(
        default_factory=list,
        help="Each an integer, or a comma-separated list, one a layer. 0, the unmerged model that all others "
        "are compared with, is always among them.",
    )
    flops_ratio: list[float] = HfArg(
        default_factory=list, help="Each a share of the unmerged model's FLOPs, for a row with every --schedule."
    )
    latency_ratio: list[float] = HfArg(
        default_factory=list,
        help="Each a share of the unmerged model's time for a timed batch, measured on this machine.",
    )
    max_changed: list[float] = HfArg(
        default_factory=list,
        help="Each a share of inputs whose answer merging may change, at 95 percent confidence. Needs a test "
        "split that is not evaluated on.",
    )
    frontier: bool = HfArg(
        default=False, help="A row for each row of the checkpoint's frontier, which is measured first if it has none."
    )
    schedule: list[str] = HfArg(
        default_factory=lambda: [SEARCH],
        help=f"How such a share is spread over the layers: {', '.join(sorted(SCHEDULE_NAMES))}. '{SEARCH}' "
        "finds that, with the method and the metric if they are not given.",
    )
    calibration_samples: int | None = HfArg(
        default=None,
        help=f"Unlabelled samples that --schedule {SEARCH} looks at, of the test split if there is one that is "
        "not evaluated on, otherwise of the training split. By default as many as take a few minutes, at most "
        f"{MOST_SAMPLES}.",
    )
    merge_method: list[str] = HfArg(
        default_factory=list,
        help="What merges with what. Several: every row with each, such as with the controls. "
        f"'{GROUPS}', with budgets and --schedule {SEARCH} alone: fixed groups of latents.",
    )
    merge_metric: list[str] = HfArg(
        default_factory=list, help="What of the latents is compared: key, value, hidden. Several: every row with each."
    )
    proportional_attention: list[str] = HfArg(
        default_factory=list, help="Weight merged latents by their size in attention: true, false, or both in turn."
    )
    r_inflection: float | None = HfArg(default=None, help="Shape of the schedule of an integer r.")
    min_latents: int | None = HfArg(default=None, help="Never merge below this many latents.")
    timing_rounds: int = HfArg(default=15, help="Rounds in which every row is timed once. 0: no timing.")
    timing_batch_size: int = HfArg(default=32, help="Inputs in a timed batch: the first ones that are evaluated.")

    def __post_init__(self) -> None:
        for name, smallest in (("timing_rounds", 0), ("timing_batch_size", 1)):
            if not smallest <= getattr(self, name) <= TIMING_LIMIT:
                raise BadInput(f"--{name} {getattr(self, name)}: must be an integer from {smallest} to {TIMING_LIMIT}")
        self.proportional_attention = [str(value).lower() for value in self.proportional_attention]
        for value in self.proportional_attention:
            if value not in BOOLEANS:
                raise BadInput(f"--proportional_attention {value}: choose from {', '.join(BOOLEANS)}")
        self.r = [spelled_r(r) for r in self.r]
        for name in (*AMOUNTS, "schedule", *WAYS):
            values = getattr(self, name)
            if repeated := {value for value in values if values.count(value) > 1}:
                raise BadInput(f"--{name} {min(repeated)}: is given twice; give each once")
        self._check_rows()

    def _check_rows(self) -> None:
        """Make the arguments of every row, which check themselves, and of what is given and in no row."""
        for schedule in [] if self._has_budget else self.schedule:
            MergeArguments(schedule=schedule)
        samples = self.calibration_samples
        shared = self._frontier_arguments if self.searches else MergeArguments(calibration_samples=samples)
        for way in self._combinations():
            replace(shared, r_inflection=self.r_inflection, **way)
        list(self._rows())

    @property
    def searches(self) -> bool:
        """Whether a frontier may be measured on samples."""
        return self.frontier or bool(self.max_changed) or SEARCH in self.schedule and self._has_budget

    @property
    def _has_budget(self) -> bool:
        return any(getattr(self, name) for name in BUDGETS)

    @property
    def most_samples(self) -> int:
        """Number of samples that are read at most; 0 if nothing is calibrated."""
        return max((arguments.most_samples for arguments in self._calibrating_arguments(carried=False)), default=0)

    def _calibrating_arguments(self, carried: bool) -> list[MergeArguments]:
        """Return the arguments of all rows that need a frontier measured; one that is carried serves `--frontier`."""
        rows = [row.arguments for row in self._rows() if row.arguments.searches]
        return [*rows, *([self._frontier_arguments] if self.frontier and not carried else [])]

    @property
    def _frontier_arguments(self) -> MergeArguments:
        """Arguments that measure the checkpoint's own frontier; every row counts, the budget has no effect."""
        return MergeArguments(flops_ratio=1.0, calibration_samples=self.calibration_samples)

    def _combinations(self) -> Iterator[dict[str, Any]]:
        """Yield the arguments that say how latents merge, each combination of those that are given."""
        attention = [BOOLEANS[value] for value in self.proportional_attention]
        given: tuple[list[Any], ...] = (self.merge_method, self.merge_metric, attention)
        for values in product(*(values or [None] for values in given)):
            yield dict(zip(WAYS, values, strict=True)) | {"min_latents": self.min_latents}

    def _rows(self) -> Iterator[_RequestedRow]:
        """Yield a row for every r and every budget with every schedule, in every way to merge."""
        for way in self._combinations():
            for r in self.r:
                # Fixed groups take no r; 0 stands for the unmerged model, which is always a row.
                if r != "0" or way["merge_method"] != GROUPS:
                    yield _RequestedRow(f"r={r}", "r", MergeArguments(r=r, r_inflection=self.r_inflection, **way))
            for schedule, budget in product(self.schedule, BUDGETS):
                for ratio in getattr(self, budget):
                    searches = schedule == SEARCH or budget == "max_changed"
                    given_samples = self.calibration_samples if searches else None
                    name = f"{budget.removesuffix('_ratio').removeprefix('max_')}={ratio:g} {schedule}"
                    budgeted: dict[str, Any] = {budget: ratio, "schedule": schedule} | way
                    yield _RequestedRow(name, schedule, MergeArguments(calibration_samples=given_samples, **budgeted))

    def resolve(
        self,
        model: ToMePerceiverPreTrainedModel,
        samples: Samples,
        input_shape: tuple[int, ...],
    ) -> list[Row]:
        """Return the rows: the unmerged model, then every r and budget in every way, then the frontier.

        Args:
            model: is run by a search and by a budget of time. Afterwards it merges nothing and has its frontier, if
                any: the one that it came with, or the one that was measured for it here.
            samples: as for `MergeArguments.calibrate`.
            input_shape: of one input, (1, S) or (1, 3, height, width); a share of the FLOPs is for it.

        Raises:
            BadInput: for settings that the config does not take, or samples that cannot promise `--max_changed`.
        """
        config, baseline, carried = model.config, model.unmerged, model.config.merge_frontier
        searching = self._calibrating_arguments(carried=carried is not None)
        # All budgets are calibrated on as many samples as the one that needs most.
        count = max((each.sample_count(model, samples, input_shape) for each in searching), default=0)
        if count:
            say(f"calibrating on {count:,} {samples.name}, without labels")
        # One frontier serves all budgets of a way and schedule.
        frontiers: dict[str, dict[str, Any] | None] = {}

        def prepare(arguments: MergeArguments) -> None:
            """Set the way to merge, and the frontier to choose from."""
            baseline.apply(config)
            apply_fields(config, arguments.config_fields())
            key = _frontier_key(arguments)
            if arguments.searches and key not in frontiers:
                shares = self.flops_ratio if arguments.schedule == SEARCH else []
                arguments.calibrate(model, samples, count, input_shape, shares)
                frontiers[key] = config.merge_frontier
            config.merge_frontier = frontiers.get(key, carried)

        asked = list(self._rows())
        chosen: dict[int, Merging] = {}
        # A budget out of reach is refused before any search: rows without a search first, and the least budget first.
        for place in sorted(range(len(asked)), key=lambda place: _resolving_order(asked[place].arguments)):
            prepare(asked[place].arguments)
            asked[place].arguments.choose(model, samples, input_shape, self.timing_batch_size)
            chosen[place] = Merging.of(config)
        found = {"r=0": ("r", baseline)}
        for place, (name, series, arguments) in enumerate(asked):
            if chosen[place].merges(baseline.asked_of(config)):
                values = [getattr(arguments, each) for each in WAYS if len(getattr(self, each)) > 1]
                way = "".join(f" {ATTENTIONS.get(value, value)}" for value in values)
                found[name + way] = (series + way, chosen[place])
            else:
                # The way makes no difference where nothing merges.
                found.setdefault(name, (series, chosen[place]))
        if self.frontier and carried is None:
            prepare(self._frontier_arguments)
        else:
            # Rows of another attention or least number of latents are not what the checkpoint would do.
            config.merge_frontier = carried or frontiers.get(_frontier_key(self._frontier_arguments))
        baseline.apply(config)
        frontier = Frontier.of(config) if self.frontier else None
        for row in frontier.rows if frontier is not None else ():
            name = f"frontier={row.flops_ratio:.3f}"
            name = name if name not in found else f"frontier={row.flops_ratio:.6f}"
            if row.merging.merges(config) and ("frontier", row.merging) not in found.values():
                found[name] = ("frontier", row.merging)
        return [Row.plan(model, input_shape, name, series, merging) for name, (series, merging) in found.items()]


def _frontier_key(arguments: MergeArguments) -> str:
    """Return what rows that share a frontier have in common."""
    return repr([getattr(arguments, name) for name in ("schedule", "min_latents", *WAYS)])


def _resolving_order(arguments: MergeArguments) -> tuple[bool, bool, float]:
    """Return a key to sort by: rows that are searched for or timed come last, strong ones first."""
    share = arguments.flops_ratio or arguments.latency_ratio or arguments.max_changed or 0.0
    return arguments.searches, arguments.latency_ratio is not None, share
