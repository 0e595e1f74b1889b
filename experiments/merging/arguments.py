# SPDX-License-Identifier: Apache-2.0
"""Arguments that say what merges: settings or a budget, checked and applied to a model."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from transformers.hf_argparser import HfArg

import experiments.merging.controls  # noqa: F401  registers methods that only experiments have
from configuration_tome_perceiver import MERGE_METRICS, MERGING_FIELDS, ToMePerceiverConfig
from cost_tome_perceiver import DEFAULT_SCHEDULE, SCHEDULES, SKIP_BLOCKS, FlopsShare, Merging
from experiments.errors import BadInput, Stopped, one_line
from frontier_tome_perceiver import GROUPS, NO_DATA_METHOD, NO_DATA_METRIC, Batch, Choice, held_out_to_promise
from merging_tome_perceiver import MERGE_METHODS
from modeling_tome_perceiver import ToMePerceiverPreTrainedModel

logger = logging.getLogger(__name__)

SEARCH = "search"
SCHEDULE_NAMES = (*SCHEDULES, SKIP_BLOCKS, SEARCH)
BUDGETS = ("flops_ratio", "latency_ratio", "max_changed")
# Arguments that say how much merges; at most one of them is given.
AMOUNTS = ("r", *BUDGETS)
# Config fields that say how latents merge; a search finds the first two unless they are given.
WAYS = ("merge_method", "merge_metric", "proportional_attention")
# Least number of batches of samples, and most rows of one. A search looks at every fourth batch, so that at least this
# share of the samples measures the frontier.
BATCHES, ROWS, MEASURING = 16, 32, 11 / 16
# Samples to calibrate on by default: as many as cost about a few minutes on two cores, measured at six unmerged passes
# for each sample (the rows of a frontier, at 0.4 of the FLOPs in the mean).
MOST_SAMPLES, LEAST_SAMPLES = 1024, 64
MEASURING_FLOPS, PASSES = 2e13, 6


@dataclass(frozen=True)
class Samples:
    """Unlabelled samples that a frontier is measured on.

    Attributes:
        take: returns the first n of them, in batches of B.
        available: number of samples.
        name: name of the samples in messages.
        unseen: whether the model was not trained on them, so that figures hold for other inputs.
    """

    take: Callable[[int, int], Sequence[Batch]]
    available: int
    name: str
    unseen: bool


@dataclass
class MergeArguments:
    """How latents merge. Config fields that are not given stay as they are in the checkpoint."""

    _argument_group_name: ClassVar[str] = "merging"

    r: str | None = HfArg(
        default=None, help="Latents merged in each layer: an integer, or a comma-separated list, one entry a layer."
    )
    flops_ratio: float | None = HfArg(
        default=None,
        help="Instead of --r: largest share of the unmerged model's FLOPs. Merging is then chosen so that it changes "
        "the outputs least on unlabelled samples.",
    )
    latency_ratio: float | None = HfArg(
        default=None, help="Instead of --r: largest share of the unmerged model's time, measured on this machine."
    )
    max_changed: float | None = HfArg(
        default=None,
        help="Instead of --r: largest share of inputs whose answer merging may change (95 percent confidence). Needs "
        "samples that the model was not trained on: a test split, or --calibration_samples with --do_train.",
    )
    schedule: str = HfArg(
        default=SEARCH,
        help=f"How such a budget is spread over the layers. '{SEARCH}' finds that, with the method, the metric or "
        f"fixed groups of latents. {', '.join(sorted(SCHEDULE_NAMES[:-1]))}: fixed schedules, by '{NO_DATA_METHOD}' on "
        f"{NO_DATA_METRIC}s unless a method or metric is given. A model trained from scratch with merging on takes "
        f"'{DEFAULT_SCHEDULE}'.",
    )
    calibration_samples: int | None = HfArg(
        default=None,
        help="Number of unlabelled samples for a search: from the test split if there is one that is not evaluated on; "
        "otherwise, with --do_train, held out from training. By default as many as take a few minutes, at most "
        f"{MOST_SAMPLES}, and training samples if there is no test split.",
    )
    r_inflection: float | None = HfArg(
        default=None, help="-1: merge early (2r falling to 0), 0: constant, 1: merge late."
    )
    min_latents: int | None = HfArg(default=None, help="Never merge below this many latents.")
    merge_method: str | None = HfArg(
        default=None,
        help=f"How latents are matched: {', '.join(sorted(MERGE_METHODS))}. '{GROUPS}', with a budget and --schedule "
        f"{SEARCH}: fixed groups of latents, which need no matching.",
    )
    merge_metric: str | None = HfArg(default=None, help="What latents are compared by: key, value or hidden.")
    proportional_attention: bool | None = HfArg(
        default=None, help="Weight merged latents by their size in attention (the default)."
    )

    def __post_init__(self) -> None:
        if self.r is not None:
            self.r = spelled_r(self.r)
            parse_r(self.r)
        self._check_values()
        if len(given := self._given) > 1:
            raise BadInput(f"{given[1]}: use one of --{', --'.join(AMOUNTS)}; {given[0]} is given")
        budgets = f"a budget (--{', --'.join(BUDGETS)})"
        if self.schedule != SEARCH and not self.has_budget:
            raise BadInput(f"--schedule {self.schedule}: needs {budgets}")
        if self.merge_method == GROUPS and not (self.has_budget and self.schedule == SEARCH):
            raise BadInput(
                f"--merge_method {GROUPS}: needs {budgets} and --schedule {SEARCH}, which finds them; leave out --r "
                "and other schedules"
            )
        if self.calibration_samples is not None and not self.searches:
            raise BadInput(
                f"--calibration_samples {self.calibration_samples}: has no effect without {budgets} and --schedule "
                f"{SEARCH}"
            )

    def _check_values(self) -> None:
        """Check each argument by itself."""
        known = {
            "schedule": SCHEDULE_NAMES, "merge_method": (*MERGE_METHODS, GROUPS), "merge_metric": MERGE_METRICS
        }  # fmt: skip
        for name, value in vars(self).items():
            if value is None:
                continue
            if name in BUDGETS and not 0 < value <= 1:
                raise BadInput(f"--{name} {value}: must be a number above 0, up to 1")
            if name == "r_inflection" and not -1 <= value <= 1:
                raise BadInput(f"--{name} {value}: must be a number from -1 to 1")
            if name in ("min_latents", "calibration_samples") and value < 1:
                raise BadInput(f"--{name} {value}: must be 1 or more")
            if name in known and value not in known[name]:
                raise BadInput(f"--{name} {value}: choose from {', '.join(sorted(known[name]))}")

    @property
    def _given(self) -> list[str]:
        return [f"--{name} {value}" for name in AMOUNTS if (value := getattr(self, name)) is not None]

    @property
    def has_budget(self) -> bool:
        """Whether a budget says what merges."""
        return any(getattr(self, name) is not None for name in BUDGETS)

    @property
    def searches(self) -> bool:
        """Whether a frontier is measured on samples."""
        return self.has_budget and (self.schedule == SEARCH or self.max_changed is not None)

    @property
    def merges(self) -> bool:
        """Whether any merging is asked for."""
        return self.has_budget or bool(self.config_fields().get("r"))

    @property
    def budget_line(self) -> str | None:
        """The budget in words, for a card; `None` without one."""
        if not self.has_budget:
            return None
        if self.max_changed is not None:
            return f"at most {self.max_changed:g} of the answers changed, schedule {self.schedule}"
        kind, ratio = ("FLOPs", self.flops_ratio) if self.latency_ratio is None else ("time", self.latency_ratio)
        return f"at most {ratio:g} of the unmerged model's {kind}, schedule {self.schedule}"

    @property
    def without_samples(self) -> MergeArguments:
        """The same budget by a schedule that needs no data, for a model that has learned nothing."""
        if not self.searches:
            return self
        method = None if self.merge_method == GROUPS else self.merge_method
        return replace(self, schedule=DEFAULT_SCHEDULE, merge_method=method, calibration_samples=None)

    @property
    def most_samples(self) -> int:
        """Largest number of samples to read; 0 if nothing is calibrated."""
        if not self.searches:
            return 0
        return self.calibration_samples or max(MOST_SAMPLES, self._promising_samples)

    @property
    def _promising_samples(self) -> int:
        """Least number of samples that can promise `max_changed`: enough if none of their answers changes."""
        if self.max_changed is None or self.max_changed == 1:
            return 0
        return math.ceil(held_out_to_promise(self.max_changed) / MEASURING)

    def config_fields(self) -> dict[str, Any]:
        """Return the fields that were given, as the config takes them."""
        given = {name: value for name, value in vars(self).items() if name in MERGING_FIELDS and value is not None}
        if self.r is not None:
            given["r"] = parse_r(self.r)
        if self.merge_method == GROUPS:
            del given["merge_method"]  # a search sets the groups that it finds
        return given

    def sample_count(self, model: ToMePerceiverPreTrainedModel, samples: Samples, input_shape: tuple[int, ...]) -> int:
        """Return the number of samples to calibrate on: as given, or as many as take a few minutes.

        Raises:
            BadInput: if they cannot promise `max_changed`.
        """
        flops = FlopsShare(model.unmerged.asked_of(model.config), input_shape, type(model).__name__).unmerged_flops
        affordable = min(MOST_SAMPLES, max(LEAST_SAMPLES, int(MEASURING_FLOPS / (PASSES * flops))))
        count = min(self.calibration_samples or max(affordable, self._promising_samples), samples.available)
        if count == 0:
            raise BadInput(f"{self._given[0]}: needs samples; give a test split or a training split")
        if self.max_changed is not None and not samples.unseen:
            raise BadInput(
                f"--max_changed {self.max_changed}: the model was trained on all samples there are, so nothing can be "
                "promised; give a test split (--test_file, --test_dir), or --calibration_samples with --do_train"
            )
        if self.max_changed is not None and count < self._promising_samples:
            raise BadInput(
                f"--max_changed {self.max_changed}: {count} {samples.name} cannot promise it at 95 % confidence; use "
                f"{self._promising_samples} or more, or a larger --max_changed"
            )
        return count

    def calibrate(
        self,
        model: ToMePerceiverPreTrainedModel,
        samples: Samples,
        count: int,
        input_shape: tuple[int, ...],
        flops_ratios: Sequence[float] | None = None,
    ) -> None:
        """Measure the frontier of a model and keep it in its config, in place of an older one.

        Args:
            model: model to run.
            samples: samples to measure on. If the model was trained on them, no share of changed answers is kept.
            count: number of samples, from `sample_count`.
            input_shape: shape of one input, for the FLOPs.
            flops_ratios: shares to have rows for; by default that of the budget.

        Raises:
            BadInput: if the budget cannot be met.
            Stopped: if the model's outputs are not finite.
        """
        options = self._restrictions()
        if self.schedule != SEARCH:
            options = {"merge_methods": [NO_DATA_METHOD], "merge_metrics": [NO_DATA_METRIC]} | options
        if flops_ratios is None:
            flops_ratios = [] if self.flops_ratio is None else [self.flops_ratio]
        batches = samples.take(count, min(ROWS, max(1, count // BATCHES)))
        with naming_arguments():
            model.calibrate(batches, flops_ratios=flops_ratios, input_shape=input_shape, **options)
        if not samples.unseen:
            logger.warning(
                "calibrated on %s, whose answers change less than those of other inputs, so no share of changed "
                "answers is kept; give a test split (--test_file, --test_dir) or --calibration_samples with --do_train",
                samples.name,
            )
            for row in model.config.merge_frontier["rows"]:
                row |= {"changed": None, "changed_bound": None, "who": {}}

    def choose(
        self,
        model: ToMePerceiverPreTrainedModel,
        samples: Samples,
        input_shape: tuple[int, ...],
        timed: int = ROWS,
    ) -> Choice | None:
        """With a budget, set the merging that meets it; from the frontier in the config if the schedule is searched.

        Args:
            model, samples, input_shape: as for `calibrate`.
            timed: number of inputs in the batch of `latency_ratio`.

        Raises:
            BadInput: if the budget cannot be met.
        """
        if not self.has_budget:
            return None
        options = {} if self.searches else self._restrictions() | {"input_shape": input_shape}
        if self.latency_ratio is not None:
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise BadInput("--latency_ratio: use one process; several do not measure the same time")
            options["samples"] = samples.take(timed, timed)
        with naming_arguments():
            return model.merge_to(**{name: getattr(self, name) for name in BUDGETS}, **options)

    def _restrictions(self) -> dict[str, Any]:
        """Return the options of `calibrate` and `merge_to` for the method, metric and schedule that were given."""
        options: dict[str, Any] = {f"{name}s": [value] for name in WAYS[:2] if (value := getattr(self, name))}
        return options if self.schedule == SEARCH else options | {"schedules": [self.schedule]}


@contextmanager
def naming_arguments() -> Iterator[None]:
    """Turn errors of a model or config about its merging into errors that end a script in one line.

    Raises:
        BadInput: in place of a `ValueError`.
        Stopped: in place of a `FloatingPointError`, for outputs that are not finite.
    """
    try:
        yield
    except FloatingPointError as error:
        raise Stopped(f"--schedule {SEARCH}: {error}") from error
    except ValueError as error:
        raise BadInput(one_line(error)) from error


def apply_fields(config: ToMePerceiverConfig, fields: dict[str, Any]) -> None:
    """Set merging fields on a config and check what they mean together.

    Raises:
        BadInput: naming the field, the value and what is wrong.
    """
    with naming_arguments():
        replace(Merging.of(config), **fields).apply(config)


def spelled_r(r: object) -> str:
    """Return `r` as on a command line: a list is separated by commas."""
    return ",".join(map(str, r)) if isinstance(r, list) else str(r)


def parse_r(text: str) -> int | list[int]:
    """Return the `r` of a command line: 8 for "8", [26, 26, 0] for "26,26,0".

    Raises:
        BadInput: for anything else.
    """
    entries = text.split(",")
    if not all(entry.strip().isdecimal() for entry in entries):
        raise BadInput(f"--r {text}: must be an integer of 0 or more, or a comma-separated list of them, one a layer")
    numbers = [int(entry) for entry in entries]
    return numbers if "," in text else numbers[0]
