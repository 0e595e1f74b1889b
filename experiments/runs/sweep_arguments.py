# SPDX-License-Identifier: Apache-2.0
"""Arguments of eval_sweep.py, and the rows that they describe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar, NamedTuple

from transformers.hf_argparser import HfArg

from cost_tome_perceiver import Merging
from experiments.errors import BadInput
from experiments.merging.arguments import (
    AMOUNT_ARGUMENTS,
    BUDGETS,
    MATCHING_FIELDS,
    MOST_SAMPLES,
    SCHEDULE_NAMES,
    SEARCH,
    MergeArguments,
    Samples,
    apply_fields,
    spelled_r,
)
from experiments.runs.sweep_report import Row
from experiments.training.progress import say
from frontier_tome_perceiver import GROUPS, Frontier
from modeling_tome_perceiver import ToMePerceiverPreTrainedModel

# Largest number of timing rounds and of inputs in a timed batch; anything larger is taken for a typing mistake.
TIMING_LIMIT = 10**6
BOOLEANS = {"true": True, "false": False}
# Words for the values of `proportional_attention` in row names.
ATTENTIONS = {True: "proportional", False: "plain"}


class _RequestedRow(NamedTuple):
    """A row of the command line before its budget is resolved."""

    name: str
    series: str
    arguments: MergeArguments


@dataclass
class SweepArguments:
    """Merging settings to compare, and how to time them."""

    _argument_group_name: ClassVar[str] = "sweep"

    r: list[str] = HfArg(
        default_factory=list,
        help="Latents merged in each layer: integers, or comma-separated lists with one entry for each layer. 0, the "
        "unmerged model that all other rows are compared with, is always included.",
    )
    flops_ratio: list[float] = HfArg(
        default_factory=list,
        help="Largest shares of the unmerged model's FLOPs: a row for each, with every --schedule.",
    )
    latency_ratio: list[float] = HfArg(
        default_factory=list,
        help="Largest shares of the unmerged model's time for a timed batch, measured on this machine.",
    )
    max_changed: list[float] = HfArg(
        default_factory=list,
        help="Largest shares of inputs whose answer merging may change, with 95 percent confidence. Needs a test "
        "split that is not evaluated on.",
    )
    frontier: bool = HfArg(
        default=False, help="Add a row for each row of the checkpoint's frontier, measuring it first if there is none."
    )
    schedule: list[str] = HfArg(
        default_factory=lambda: [SEARCH],
        help=f"How a budget is spread over the layers: {', '.join(sorted(SCHEDULE_NAMES))}. '{SEARCH}' "
        "also chooses the method and the metric unless they are given.",
    )
    calibration_samples: int | None = HfArg(
        default=None,
        help=f"Number of unlabelled samples for --schedule {SEARCH}, from the test split if there is one that is "
        "not evaluated on, otherwise from the training split. By default as many as take a few minutes, at most "
        f"{MOST_SAMPLES}.",
    )
    merge_method: list[str] = HfArg(
        default_factory=list,
        help="How latents are matched. Several: every row with each. "
        f"'{GROUPS}', only with budgets and --schedule {SEARCH}: fixed groups of latents, which need no matching.",
    )
    merge_metric: list[str] = HfArg(
        default_factory=list, help="What latents are compared by: key, value, hidden. Several: every row with each."
    )
    proportional_attention: list[str] = HfArg(
        default_factory=list, help="Weight merged latents by their size in attention: true, false, or both."
    )
    r_inflection: float | None = HfArg(
        default=None, help="For an integer r. -1: merge early (2r falling to 0), 0: constant, 1: merge late."
    )
    min_latents: int | None = HfArg(default=None, help="Never merge below this many latents.")
    timing_rounds: int = HfArg(default=15, help="Number of timing rounds; each times every row once. 0: no timing.")
    timing_batch_size: int = HfArg(default=32, help="Size of the timed batch: the first evaluated inputs.")

    def __post_init__(self) -> None:
        for name, smallest in (("timing_rounds", 0), ("timing_batch_size", 1)):
            if not smallest <= getattr(self, name) <= TIMING_LIMIT:
                raise BadInput(f"--{name} {getattr(self, name)}: must be an integer from {smallest} to {TIMING_LIMIT}")
        self.proportional_attention = [str(value).lower() for value in self.proportional_attention]
        for value in self.proportional_attention:
            if value not in BOOLEANS:
                raise BadInput(f"--proportional_attention {value}: choose from {', '.join(BOOLEANS)}")
        self.r = [spelled_r(r) for r in self.r]
        for name in (*AMOUNT_ARGUMENTS, "schedule", *MATCHING_FIELDS):
            values = getattr(self, name)
            if repeated := {value for value in values if values.count(value) > 1}:
                raise BadInput(f"--{name} {min(repeated)}: is given twice; give each once")
        self._check_rows()

    def _check_rows(self) -> None:
        """Check all arguments, even those that no row uses, by creating `MergeArguments` from them."""
        for schedule in [] if self._has_budget else self.schedule:
            MergeArguments(schedule=schedule)
        samples = self.calibration_samples
        shared = self._frontier_arguments if self.calibrates else MergeArguments(calibration_samples=samples)
        for settings in self._combinations():
            replace(shared, r_inflection=self.r_inflection, **settings)
        list(self._rows())

    @property
    def calibrates(self) -> bool:
        """Whether a frontier may be measured on samples."""
        return self.frontier or bool(self.max_changed) or SEARCH in self.schedule and self._has_budget

    @property
    def _has_budget(self) -> bool:
        return any(getattr(self, name) for name in BUDGETS)

    @property
    def most_samples(self) -> int:
        """Largest number of samples to load; 0 if nothing is calibrated."""
        return max((arguments.most_samples for arguments in self._calibrating_arguments(has_frontier=False)), default=0)

    def _calibrating_arguments(self, has_frontier: bool) -> list[MergeArguments]:
        """Return the arguments that need calibration; `--frontier` needs it only if the checkpoint has no frontier."""
        rows = [row.arguments for row in self._rows() if row.arguments.calibrates]
        return [*rows, *([self._frontier_arguments] if self.frontier and not has_frontier else [])]

    @property
    def _frontier_arguments(self) -> MergeArguments:
        """Arguments that measure the checkpoint's frontier; the budget is 1, which excludes no row."""
        return MergeArguments(flops_ratio=1.0, calibration_samples=self.calibration_samples)

    def _combinations(self) -> Iterator[dict[str, Any]]:
        """Yield every combination of the given matching methods, similarity metrics and kinds of attention."""
        attention = [BOOLEANS[value] for value in self.proportional_attention]
        given: tuple[list[Any], ...] = (self.merge_method, self.merge_metric, attention)
        for values in product(*(values or [None] for values in given)):
            yield dict(zip(MATCHING_FIELDS, values, strict=True)) | {"min_latents": self.min_latents}

    def _rows(self) -> Iterator[_RequestedRow]:
        """Yield a row for every r, and for every budget and schedule, in every combination of method settings."""
        for settings in self._combinations():
            for r in self.r:
                # Fixed groups take no r. r=0 is accepted with them, since `resolve` always adds the unmerged row.
                if r != "0" or settings["merge_method"] != GROUPS:
                    yield _RequestedRow(f"r={r}", "r", MergeArguments(r=r, r_inflection=self.r_inflection, **settings))
            for schedule, budget in product(self.schedule, BUDGETS):
                for ratio in getattr(self, budget):
                    searches = schedule == SEARCH or budget == "max_changed"
                    given_samples = self.calibration_samples if searches else None
                    name = f"{budget.removesuffix('_ratio').removeprefix('max_')}={ratio:g} {schedule}"
                    budgeted: dict[str, Any] = {budget: ratio, "schedule": schedule} | settings
                    yield _RequestedRow(name, schedule, MergeArguments(calibration_samples=given_samples, **budgeted))

    def resolve(
        self,
        model: ToMePerceiverPreTrainedModel,
        samples: Samples,
        input_shape: tuple[int, ...],
    ) -> list[Row]:
        """Return the rows: the unmerged model first, then every r and budget, then the rows of the frontier.

        Args:
            model: model that searches and latency budgets run. Afterwards it merges nothing, and its config holds the
                frontier that it was loaded with or that was measured here, if any.
            samples: unlabelled samples, as for `MergeArguments.calibrate`.
            input_shape: shape of one input, (1, S) or (1, 3, height, width), for which FLOPs are counted.

        Raises:
            BadInput: for settings that the config rejects, or too few samples to promise `--max_changed`.
        """
        config, unmerged, loaded_frontier = model.config, model.unmerged, model.config.merge_frontier
        calibrating = self._calibrating_arguments(has_frontier=loaded_frontier is not None)
        # All budgets use the same samples, as many as the most demanding one needs.
        count = max((arguments.sample_count(model, samples, input_shape) for arguments in calibrating), default=0)
        if count:
            say(f"calibrating on {count:,} {samples.name}, without labels")
        # All budgets of one schedule and combination of method settings share a frontier.
        frontiers: dict[str, dict[str, Any] | None] = {}

        def set_frontier(arguments: MergeArguments) -> None:
            """Set the method settings and the frontier of a row, measuring the frontier if it is new."""
            unmerged.apply(config)
            apply_fields(config, arguments.config_fields())
            key = _frontier_key(arguments)
            if arguments.calibrates and key not in frontiers:
                shares = self.flops_ratio if arguments.schedule == SEARCH else []
                arguments.calibrate(model, samples, count, input_shape, shares)
                frontiers[key] = config.merge_frontier
            config.merge_frontier = frontiers.get(key, loaded_frontier)

        requested = list(self._rows())
        chosen: dict[int, Merging] = {}
        # Rows without a search first, and low budgets before high ones, so that an unreachable one is refused early.
        for index in sorted(range(len(requested)), key=lambda index: _resolving_order(requested[index].arguments)):
            set_frontier(requested[index].arguments)
            requested[index].arguments.choose(model, samples, input_shape, self.timing_batch_size)
            chosen[index] = Merging.of(config)
        mergings = {"r=0": ("r", unmerged)}
        for index, (name, series, arguments) in enumerate(requested):
            if chosen[index].merges(unmerged.asked_of(config)):
                values = [getattr(arguments, each) for each in MATCHING_FIELDS if len(getattr(self, each)) > 1]
                suffix = "".join(f" {ATTENTIONS.get(value, value)}" for value in values)
                mergings[name + suffix] = (series + suffix, chosen[index])
            else:
                # Method settings make no difference where nothing merges.
                mergings.setdefault(name, (series, chosen[index]))
        if self.frontier and loaded_frontier is None:
            set_frontier(self._frontier_arguments)
        else:
            # Frontiers of other method settings do not describe this checkpoint, so they are not kept.
            config.merge_frontier = loaded_frontier or frontiers.get(_frontier_key(self._frontier_arguments))
        unmerged.apply(config)
        frontier = Frontier.of(config) if self.frontier else None
        for row in frontier.rows if frontier is not None else ():
            name = f"frontier={row.flops_ratio:.3f}"
            name = name if name not in mergings else f"frontier={row.flops_ratio:.6f}"
            if row.merging.merges(config) and ("frontier", row.merging) not in mergings.values():
                mergings[name] = ("frontier", row.merging)
        return [Row.plan(model, input_shape, name, series, merging) for name, (series, merging) in mergings.items()]


def _frontier_key(arguments: MergeArguments) -> str:
    """Return the settings that rows must have in common to share a frontier."""
    return repr([getattr(arguments, name) for name in ("schedule", "min_latents", *MATCHING_FIELDS)])


def _resolving_order(arguments: MergeArguments) -> tuple[bool, bool, float]:
    """Return a sort key: rows without a search before searched ones, untimed before timed, low budgets before high."""
    share = arguments.flops_ratio or arguments.latency_ratio or arguments.max_changed or 0.0
    return arguments.calibrates, arguments.latency_ratio is not None, share
