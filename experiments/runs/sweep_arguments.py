# SPDX-License-Identifier: Apache-2.0
"""Which merges a sweep tries: from the command line to what each row merges."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

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
    check_groups,
    check_merging,
    check_samples,
    check_schedule,
    spelled_r,
)
from frontier_tome_perceiver import GROUPS, Frontier
from modeling_tome_perceiver import ToMePerceiverPreTrainedModel

# Of rounds and samples: more would only be a slip of the finger.
MOST = 10**6
BOOLEANS = {"true": True, "false": False}
# Method, metric, attention and least number of latents as the checkpoint has them, or a search finds them.
ANY_WAY = dict.fromkeys((*WAYS, "min_latents"))


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
        metadata={"help": "Each a share of the unmerged model's time for a timed batch, measured on this machine."},
    )
    max_changed: list[float] = field(
        default_factory=list,
        metadata={
            "help": "Each a share of inputs whose answer merging may change, at 95 percent confidence. Needs a test "
            "split that is not evaluated on."
        },
    )
    frontier: bool = field(
        default=False,
        metadata={"help": "A row for each row of the checkpoint's frontier, which is measured first if it has none."},
    )
    schedule: list[str] = field(
        default_factory=lambda: [SEARCH],
        metadata={
            "help": f"How such a share is spread over the layers: {', '.join(sorted(SCHEDULE_NAMES))}. '{SEARCH}' "
            "finds that, with the method and the metric if they are not given."
        },
    )
    calibration_samples: int | None = field(
        default=None,
        metadata={
            "help": f"Unlabelled samples that --schedule {SEARCH} looks at, of the test split if there is one that is "
            "not evaluated on, otherwise of the training split. By default as many as take a few minutes, at most "
            f"{MOST_SAMPLES}."
        },
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
        metadata={"help": "Weight merged latents by their size in attention: true, false, or both in turn."},
    )
    r_inflection: float | None = field(default=None, metadata={"help": "Shape of the schedule of an integer r."})
    min_latents: int | None = field(default=None, metadata={"help": "Never merge below this many latents."})
    timing_rounds: int = field(default=15, metadata={"help": "Rounds in which every row is timed once. 0: no timing."})
    timing_batch_size: int = field(
        default=32, metadata={"help": "Inputs in a timed batch: the first ones that are evaluated."}
    )

    def __post_init__(self) -> None:
        for name, smallest in (("timing_rounds", 0), ("timing_batch_size", 1)):
            if not smallest <= getattr(self, name) <= MOST:
                raise BadInput(f"--{name} {getattr(self, name)}: must be an integer from {smallest} to {MOST}")
        budgets = any(getattr(self, name) for name in BUDGETS)
        self.proportional_attention = [str(value).lower() for value in self.proportional_attention]
        for value in self.proportional_attention:
            if value not in BOOLEANS:
                raise BadInput(f"--proportional_attention {value}: choose from {', '.join(BOOLEANS)}")
        self.r = [spelled_r(r) for r in self.r]
        for name in (*AMOUNTS, "schedule", *WAYS):
            values = getattr(self, name)
            for value in values:
                check_merging(**{name: value})
            if repeated := {value for value in values if values.count(value) > 1}:
                raise BadInput(f"--{name} {min(repeated)}: is given twice; give each once")
        check_merging(r_inflection=self.r_inflection, min_latents=self.min_latents)
        for name in self.schedule:
            check_schedule(name, budgets)
        only_searches = self.schedule == [SEARCH] and set(self.r) <= {"0"}
        check_groups(self.merge_method, self.searches and only_searches)
        check_samples(self.calibration_samples, self.searches)

    @property
    def searches(self) -> bool:
        """Whether a frontier may be measured on samples."""
        budgets = any(getattr(self, name) for name in BUDGETS)
        return self.frontier or bool(self.max_changed) or SEARCH in self.schedule and budgets

    @property
    def most_samples(self) -> int:
        """Number of samples that are read at most; 0 if nothing is calibrated."""
        return max((arguments.most_samples for arguments in self._searching), default=0)

    def sample_count(self, model: ToMePerceiverPreTrainedModel, samples: Samples, input_shape: tuple[int, ...]) -> int:
        """Return the number of samples that all budgets are calibrated on; 0 if nothing is searched for.

        Raises:
            BadInput: if they cannot promise the least `--max_changed`.
        """
        carried = self.frontier and model.config.merge_frontier is not None
        searching = self._searching[:-1] if carried else self._searching
        return max((each.sample_count(model, samples, input_shape) for each in searching), default=0)

    @property
    def _searching(self) -> list[MergeArguments]:
        rows = [arguments for *_, arguments in self._rows(next(self._ways())) if arguments.searches]
        return [*rows, *([self._for_frontier] if self.frontier else [])]

    def variants(
        self,
        model: ToMePerceiverPreTrainedModel,
        samples: Samples,
        input_shape: tuple[int, ...],
        log_dir: Path | None,
    ) -> list[Variant]:
        """What each row merges: nothing, then in every way every r, and every budget with every schedule.

        Args:
            model: whose merging it is; a search runs it, and so does a budget of time. Afterwards it merges nothing,
                and has its frontier: the one that it came with, or the one that was measured for it here, if any.
            samples: as for `MergeArguments.calibrate`.
            input_shape: of one input, (1, S) or (1, 3, height, width); a share of the FLOPs is for it.
            log_dir: where a search keeps what it has found; `None`: nowhere.

        Raises:
            BadInput: for what the config cannot mean.
        """
        config, carried = model.config, model.config.merge_frontier
        baseline = unmerged(model)
        count = self.sample_count(model, samples, input_shape)
        rows = [(way, *row) for way in self._ways() for row in self._rows(way)]
        merging: dict[int, Merging] = {}
        # By way and schedule: one frontier serves all budgets.
        calibrated: dict[str, dict[str, Any] | None] = {}

        def prepare(way: dict[str, Any], arguments: MergeArguments) -> None:
            baseline.merging.apply(config)
            apply_fields(config, arguments.config_fields())
            key = repr((way, arguments.schedule))
            if arguments.searches and key not in calibrated:
                shares = self.flops_ratio if arguments.schedule == SEARCH else []
                # Divergences of other attention are no part of the log.
                log = log_dir if way["proportional_attention"] is None else None
                arguments.calibrate(model, samples, count, input_shape, log, shares)
                calibrated[key] = config.merge_frontier
            config.merge_frontier = calibrated.get(key, carried)

        # What cannot be kept to is refused before anything is searched for, and the least budget is the first to be.
        for place in sorted(range(len(rows)), key=lambda place: _effort(rows[place][-1])):
            way, *_, arguments = rows[place]
            prepare(way, arguments)
            arguments.choose(model, samples, input_shape, self.timing_batch_size)
            merging[place] = Merging.of(config)
        found = [baseline]
        for place, (way, name, series, _) in enumerate(rows):
            named = [_spelled(way[name]) for name in WAYS if len(getattr(self, name)) > 1]
            if merging[place].merges(baseline.merging.asked_of(config)):
                found.append(Variant(" ".join([name, *named]), " ".join([series, *named]), merging[place]))
            elif name not in (variant.name for variant in found):
                # How it would merge makes no difference, so there is one of it.
                found.append(Variant(name, series, merging[place]))
        if self.frontier and carried is None:
            prepare(ANY_WAY, self._for_frontier)
        else:
            # Rows of another attention or least number of latents are not what the checkpoint would do.
            config.merge_frontier = carried or calibrated.get(repr((ANY_WAY, SEARCH)))
        baseline.merging.apply(config)
        return found + (frontier_variants(model) if self.frontier else [])

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
            for budget in BUDGETS:
                for ratio in getattr(self, budget):
                    given: dict[str, Any] = {budget: ratio, "schedule": schedule} | way
                    if schedule == SEARCH or budget == "max_changed":
                        given["calibration_samples"] = self.calibration_samples
                    name = budget.removesuffix("_ratio").removeprefix("max_")
                    yield f"{name}={ratio:g} {schedule}", schedule, MergeArguments(**given)

    @property
    def _for_frontier(self) -> MergeArguments:
        """Arguments that measure the checkpoint's frontier, of which every row counts and no budget."""
        return MergeArguments(flops_ratio=1.0, calibration_samples=self.calibration_samples)


def unmerged(model: ToMePerceiverPreTrainedModel) -> Variant:
    """The row that merges nothing, for this model."""
    return Variant("r=0", "r", model.unmerged)


def frontier_variants(model: ToMePerceiverPreTrainedModel) -> list[Variant]:
    """Return a row for each row of a model's frontier that merges anything, from mild to strong."""
    frontier = Frontier.of(model.config)
    assert frontier is not None
    start = model.unmerged.asked_of(model.config)
    merging = {row.merging.key: row for row in frontier.rows if row.merging.merges(start)}
    found: dict[str, Variant] = {}
    for row in merging.values():
        short = f"frontier={row.flops_ratio:.3f}"
        name = short if short not in found else f"frontier={row.flops_ratio:.6f}"
        found[name] = Variant(name, "frontier", row.merging)
    return list(found.values())


def _effort(arguments: MergeArguments) -> tuple[bool, bool, float]:
    """What is resolved at once comes before what is timed or searched for, and less before more."""
    share = arguments.flops_ratio or arguments.latency_ratio or arguments.max_changed or 0.0
    return arguments.searches, arguments.latency_ratio is not None, share


def _spelled(value: Any) -> str:
    """A way in the name of a row."""
    return {True: "proportional", False: "plain"}[value] if isinstance(value, bool) else str(value)
