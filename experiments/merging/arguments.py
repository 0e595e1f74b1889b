# SPDX-License-Identifier: Apache-2.0
"""Command line arguments of merging: settings or a budget, checked and applied to a model."""

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
# Arguments that set how much to merge; they exclude each other.
AMOUNT_ARGUMENTS = ("r", *BUDGETS)
# Config fields that set how latents are matched and merged; a search chooses the first two unless the user does.
MATCHING_FIELDS = ("merge_method", "merge_metric", "proportional_attention")
# Calibration samples are cut into at least this many batches.
LEAST_BATCHES = 16
# Largest batch size of calibration samples.
LARGEST_BATCH = 32
# The search uses every fourth batch; the frontier is measured on the others, at least this share of the samples.
MEASURED_SHARE = 11 / 16
# Range of the default number of calibration samples.
LEAST_SAMPLES, MOST_SAMPLES = 64, 1024
# FLOPs that calibration may cost by default: a few minutes on two cores.
CALIBRATION_FLOPS = 2e13
# Measured cost of calibrating on one sample, in unmerged forward passes. A merged pass for a row of the frontier takes
# 0.4 of the unmerged FLOPs on average.
PASSES_PER_SAMPLE = 6


@dataclass(frozen=True)
class Samples:
    """Unlabelled samples to measure a frontier on.

    Attributes:
        take: function of n and B that returns the first n samples in batches of size B.
        available: number of samples.
        name: name of the samples in messages.
        unseen: whether the model was not trained on them; only then do shares of changed answers hold for new inputs.
    """

    take: Callable[[int, int], Sequence[Batch]]
    available: int
    name: str
    unseen: bool


@dataclass
class MergeArguments:
    """Arguments of merging. A field of the config whose argument is not given keeps the checkpoint's value."""

    _argument_group_name: ClassVar[str] = "merging"

    r: str | None = HfArg(
        default=None,
        help="Latents to merge in each layer: an integer, or a comma-separated list with one entry for each layer.",
    )
    flops_ratio: float | None = HfArg(
        default=None,
        help="Instead of --r: largest share of the unmerged model's FLOPs. The merging that changes the outputs least "
        "on unlabelled samples is chosen.",
    )
    latency_ratio: float | None = HfArg(
        default=None, help="Instead of --r: largest share of the unmerged model's time, measured on this machine."
    )
    max_changed: float | None = HfArg(
        default=None,
        help="Instead of --r: largest share of inputs whose answer may change by merging (95 percent confidence). "
        "Needs samples that the model was not trained on: a test split, or --calibration_samples with --do_train.",
    )
    schedule: str = HfArg(
        default=SEARCH,
        help=f"How a budget is spread over the layers. '{SEARCH}' finds the latents to merge in each layer, the "
        "matching method and the similarity metric, or fixed groups of latents. The fixed schedules "
        f"{', '.join(sorted(SCHEDULE_NAMES[:-1]))} use the method '{NO_DATA_METHOD}' and the metric '{NO_DATA_METRIC}' "
        f"unless others are given. A model trained from scratch with merging on uses '{DEFAULT_SCHEDULE}'.",
    )
    calibration_samples: int | None = HfArg(
        default=None,
        help="Number of unlabelled samples for a search. They come from the test split if there is one that is not "
        "used for evaluation; otherwise, with --do_train, they are held out from training. By default as many as take "
        f"a few minutes, at most {MOST_SAMPLES}; without a test split these are training samples.",
    )
    r_inflection: float | None = HfArg(
        default=None,
        help="How r is spread over the layers: -1 merges early (2r falling to 0), 0 is constant, 1 merges late.",
    )
    min_latents: int | None = HfArg(default=None, help="Least number of latents to leave in any layer.")
    merge_method: str | None = HfArg(
        default=None,
        help=f"Matching method: {', '.join(sorted(MERGE_METHODS))}. With a budget and --schedule {SEARCH} also "
        f"'{GROUPS}': fixed groups of latents, which need no matching.",
    )
    merge_metric: str | None = HfArg(
        default=None, help="Similarity metric, what latents are compared by: key, value or hidden."
    )
    proportional_attention: bool | None = HfArg(
        default=None, help="Weight merged latents by their size in attention (default: true)."
    )

    def __post_init__(self) -> None:
        if self.r is not None:
            self.r = spelled_r(self.r)
            parse_r(self.r)
        self._check_values()
        if len(given := self._given) > 1:
            raise BadInput(f"{given[1]}: use one of --{', --'.join(AMOUNT_ARGUMENTS)}; {given[0]} is given")
        budgets = f"a budget (--{', --'.join(BUDGETS)})"
        if self.schedule != SEARCH and not self.has_budget:
            raise BadInput(f"--schedule {self.schedule}: needs {budgets}")
        if self.merge_method == GROUPS and not (self.has_budget and self.schedule == SEARCH):
            raise BadInput(
                f"--merge_method {GROUPS}: needs {budgets} and --schedule {SEARCH}, which finds them; leave out --r "
                "and other schedules"
            )
        if self.calibration_samples is not None and not self.calibrates:
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
        return [f"--{name} {value}" for name in AMOUNT_ARGUMENTS if (value := getattr(self, name)) is not None]

    @property
    def has_budget(self) -> bool:
        """Whether a budget, and not `r`, sets how much to merge."""
        return any(getattr(self, name) is not None for name in BUDGETS)

    @property
    def calibrates(self) -> bool:
        """Whether the budget needs a frontier measured on samples: for a search, or for `max_changed`."""
        return self.has_budget and (self.schedule == SEARCH or self.max_changed is not None)

    @property
    def merges(self) -> bool:
        """Whether the arguments ask for any merging."""
        return self.has_budget or bool(self.config_fields().get("r"))

    @property
    def budget_line(self) -> str | None:
        """Description of the budget for a model card; `None` without one."""
        if not self.has_budget:
            return None
        if self.max_changed is not None:
            return f"at most {self.max_changed:g} of the answers changed, schedule {self.schedule}"
        kind, ratio = ("FLOPs", self.flops_ratio) if self.latency_ratio is None else ("time", self.latency_ratio)
        return f"at most {ratio:g} of the unmerged model's {kind}, schedule {self.schedule}"

    @property
    def without_samples(self) -> MergeArguments:
        """Same budget with a fixed schedule, which needs no samples, for an untrained model."""
        if not self.calibrates:
            return self
        method = None if self.merge_method == GROUPS else self.merge_method
        return replace(self, schedule=DEFAULT_SCHEDULE, merge_method=method, calibration_samples=None)

    @property
    def most_samples(self) -> int:
        """Largest number of samples to read; 0 without calibration."""
        if not self.calibrates:
            return 0
        return self.calibration_samples or max(MOST_SAMPLES, self._samples_to_promise)

    @property
    def _samples_to_promise(self) -> int:
        """Least number of samples that can promise `max_changed`; it is enough if none of their answers changes."""
        if self.max_changed is None or self.max_changed == 1:
            return 0
        return math.ceil(held_out_to_promise(self.max_changed) / MEASURED_SHARE)

    def config_fields(self) -> dict[str, Any]:
        """Return the config fields whose arguments were given, with values of the config's types."""
        given = {name: value for name, value in vars(self).items() if name in MERGING_FIELDS and value is not None}
        if self.r is not None:
            given["r"] = parse_r(self.r)
        if self.merge_method == GROUPS:
            del given["merge_method"]  # not a value of the config field; the search sets `merge_groups`
        return given

    def sample_count(self, model: ToMePerceiverPreTrainedModel, samples: Samples, input_shape: tuple[int, ...]) -> int:
        """Return the number of samples to calibrate on: as given, or as many as take a few minutes.

        Raises:
            BadInput: if there are none, or too few to promise `max_changed`.
        """
        flops = FlopsShare(model.unmerged.asked_of(model.config), input_shape, type(model).__name__).unmerged_flops
        affordable = min(MOST_SAMPLES, max(LEAST_SAMPLES, int(CALIBRATION_FLOPS / (PASSES_PER_SAMPLE * flops))))
        count = min(self.calibration_samples or max(affordable, self._samples_to_promise), samples.available)
        if count == 0:
            raise BadInput(f"{self._given[0]}: needs samples; use data with a test split or a training split")
        if self.max_changed is not None and not samples.unseen:
            raise BadInput(
                f"--max_changed {self.max_changed}: cannot be promised from samples that the model was trained on; use "
                "a test split (--test_file, --test_dir), or --calibration_samples with --do_train"
            )
        if self.max_changed is not None and count < self._samples_to_promise:
            raise BadInput(
                f"--max_changed {self.max_changed}: {count} {samples.name} are too few for 95 % confidence; use "
                f"{self._samples_to_promise} or more, or a larger --max_changed"
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
        """Measure the frontier of a model and store it in its config, replacing an older one.

        Args:
            model: model to run.
            samples: samples to measure on. If the model was trained on them, shares of changed answers are not stored.
            count: number of samples, from `sample_count`.
            input_shape: shape of one input, for the FLOPs.
            flops_ratios: shares of FLOPs that get a row each; by default the budget's.

        Raises:
            BadInput: if the budget cannot be met.
            Stopped: if the model's outputs are not finite.
        """
        options = self._restrictions()
        if self.schedule != SEARCH:
            options = {"merge_methods": [NO_DATA_METHOD], "merge_metrics": [NO_DATA_METRIC]} | options
        if flops_ratios is None:
            flops_ratios = [] if self.flops_ratio is None else [self.flops_ratio]
        batches = samples.take(count, min(LARGEST_BATCH, max(1, count // LEAST_BATCHES)))
        with naming_arguments():
            model.calibrate(batches, flops_ratios=flops_ratios, input_shape=input_shape, **options)
        if not samples.unseen:
            logger.warning(
                "calibrated on %s: their answers change less than those of other inputs, so shares of changed answers "
                "are not stored; use a test split (--test_file, --test_dir) or --calibration_samples with --do_train",
                samples.name,
            )
            for row in model.config.merge_frontier["rows"]:
                row |= {"changed": None, "changed_bound": None, "who": {}}

    def choose(
        self,
        model: ToMePerceiverPreTrainedModel,
        samples: Samples,
        input_shape: tuple[int, ...],
        timed: int = LARGEST_BATCH,
    ) -> Choice | None:
        """Set the merging that meets the budget; it comes from the stored frontier if `calibrates` is true.

        Args:
            model, samples, input_shape: as for `calibrate`.
            timed: batch size at which time is measured for `latency_ratio`.

        Returns:
            The choice; `None` without a budget.

        Raises:
            BadInput: if the budget cannot be met.
        """
        if not self.has_budget:
            return None
        options = {} if self.calibrates else self._restrictions() | {"input_shape": input_shape}
        if self.latency_ratio is not None:
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise BadInput(
                    f"--latency_ratio {self.latency_ratio}: must run in one process; several measure different times"
                )
            options["samples"] = samples.take(timed, timed)
        with naming_arguments():
            return model.merge_to(**{name: getattr(self, name) for name in BUDGETS}, **options)

    def _restrictions(self) -> dict[str, Any]:
        """Return the options that limit `calibrate` and `merge_to` to the method, metric and schedule given."""
        options: dict[str, Any] = {
            f"{name}s": [value] for name in MATCHING_FIELDS[:2] if (value := getattr(self, name))
        }
        return options if self.schedule == SEARCH else options | {"schedules": [self.schedule]}


@contextmanager
def naming_arguments() -> Iterator[None]:
    """Turn errors about merging, raised by a model or config, into errors that end a script with one line.

    Raises:
        BadInput: in place of a `ValueError`.
        Stopped: in place of a `FloatingPointError`, for outputs that are not finite.
    """
    try:
        yield
    except FloatingPointError as error:
        raise Stopped(f"--schedule {SEARCH}: {error}") from error
    except ValueError as error:
        line = one_line(error)
        for name in BUDGETS:
            line = line.replace(f"{name}=", f"--{name} ")
        raise BadInput(line) from error


def apply_fields(config: ToMePerceiverConfig, fields: dict[str, Any]) -> None:
    """Set merging fields on a config, and check that they fit together.

    Raises:
        BadInput: naming the field, the value and what is wrong.
    """
    with naming_arguments():
        replace(Merging.of(config), **fields).apply(config)


def spelled_r(r: object) -> str:
    """Return `r` as typed on a command line: a list is separated by commas."""
    return ",".join(map(str, r)) if isinstance(r, list) else str(r)


def parse_r(text: str) -> int | list[int]:
    """Return the `r` of a command line: 8 for "8", [26, 26, 0] for "26,26,0".

    Raises:
        BadInput: for anything else.
    """
    entries = text.split(",")
    if not all(entry.strip().isdecimal() for entry in entries):
        raise BadInput(
            f"--r {text}: must be an integer of 0 or more, or a comma-separated list of them, one for each layer"
        )
    numbers = [int(entry) for entry in entries]
    return numbers if "," in text else numbers[0]
