# SPDX-License-Identifier: Apache-2.0
"""The arguments that say what merges, and what they come to for a model."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from budget_tome_perceiver import DEFAULT_SCHEDULE, SCHEDULES, SKIP_BLOCKS, Merging
from configuration_tome_perceiver import MERGE_METRICS, ToMePerceiverConfig
from experiments.errors import BadInput, Stopped
from groups_tome_perceiver import Batch
from merging_tome_perceiver import MERGE_METHODS
from modeling_tome_perceiver import ToMePerceiverPreTrainedModel
from search_tome_perceiver import GROUPS, SEARCH, UNSEEN_METHOD, UNSEEN_METRIC, Choice

SCHEDULE_NAMES = (*SCHEDULES, SKIP_BLOCKS, SEARCH)
SEARCH_LOG = "schedule_search.json"
# The arguments that say how much merges, of which one is given at most.
MEANS = ("r", "flops_ratio", "latency_ratio")
# Fields of the config that say how; a search finds the first two, unless they are given.
WAYS = ("merge_method", "merge_metric", "proportional_attention")

Samples = Callable[[int], Sequence[Batch]]
"""From a number to so many unlabelled samples, in batches as large as those that are timed."""


@dataclass
class MergeArguments:
    """How latents merge; each also a field of the config that is saved. What is not given stays as it is there."""

    _argument_group_name: ClassVar[str] = "merging"

    r: str | None = field(
        default=None,
        metadata={"help": "Latents merged in each layer: an integer, or a comma-separated list, one entry a layer."},
    )
    flops_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Instead of --r: a share of the unmerged model's FLOPs. What merges then is what changes the "
            "outputs least on some training samples."
        },
    )
    latency_ratio: float | None = field(
        default=None, metadata={"help": "The same of the unmerged model's time, measured on this machine."}
    )
    schedule: str = field(
        default=SEARCH,
        metadata={
            "help": f"How such a share is spread over the layers. '{SEARCH}' finds that, with the method, the metric "
            f"or fixed groups of latents; {', '.join(sorted(SCHEDULE_NAMES[:-1]))} are taken as they are, and merge by "
            f"'{UNSEEN_METHOD}' on {UNSEEN_METRIC}s, unless a method or a metric is given. A model that is trained "
            f"from scratch with merging on takes '{DEFAULT_SCHEDULE}'."
        },
    )
    calibration_samples: int = field(
        default=1024, metadata={"help": f"Training samples, without labels, that --schedule {SEARCH} looks at."}
    )
    r_inflection: float | None = field(
        default=None, metadata={"help": "-1: merge early (2r falling to 0), 0: constant, 1: merge late."}
    )
    min_latents: int | None = field(default=None, metadata={"help": "Never merge below this many latents."})
    merge_method: str | None = field(
        default=None,
        metadata={
            "help": f"What merges with what: {', '.join(sorted(MERGE_METHODS))}. '{GROUPS}', with a budget and "
            f"--schedule {SEARCH}: fixed groups of latents, which match nothing as the model runs."
        },
    )
    merge_metric: str | None = field(
        default=None, metadata={"help": "What of the latents is compared: key, value or hidden."}
    )
    proportional_attention: bool | None = field(
        default=None, metadata={"help": "Whether a merged latent counts as often as it stands for (the default)."}
    )

    def __post_init__(self) -> None:
        if self.r is not None:
            self.r = spelled_r(self.r)
        check_merging(
            r=self.r,
            flops_ratio=self.flops_ratio,
            latency_ratio=self.latency_ratio,
            r_inflection=self.r_inflection,
            min_latents=self.min_latents,
            merge_method=self.merge_method,
            merge_metric=self.merge_metric,
        )
        check_schedule(self.schedule, self.has_budget)
        check_groups([self.merge_method], self.searches)
        if self.calibration_samples < 1:
            raise BadInput(f"--calibration_samples {self.calibration_samples}: allowed is an integer of 1 or more")
        given = [f"--{name} {value}" for name in MEANS if (value := getattr(self, name)) is not None]
        if len(given) > 1:
            raise BadInput(f"{given[1]}: allowed is one of --{', --'.join(MEANS)}, and {given[0]} is given")

    @property
    def has_budget(self) -> bool:
        """Whether a budget says what merges."""
        return self.flops_ratio is not None or self.latency_ratio is not None

    @property
    def searches(self) -> bool:
        """Whether what merges is searched for."""
        return self.has_budget and self.schedule == SEARCH

    @property
    def merges(self) -> bool:
        """Whether any merging is asked for."""
        return self.has_budget or bool(self.config_fields().get("r"))

    @property
    def budget_line(self) -> str | None:
        """The budget in words, for a card; `None` without one."""
        if not self.has_budget:
            return None
        kind, ratio = ("FLOPs", self.flops_ratio) if self.latency_ratio is None else ("time", self.latency_ratio)
        return f"at most {ratio:g} of the unmerged model's {kind}, schedule {self.schedule}"

    @property
    def without_samples(self) -> MergeArguments:
        """The same by a schedule that needs no data, for a model that has no outputs to keep."""
        if not self.searches:
            return self
        method = None if self.merge_method == GROUPS else self.merge_method
        return replace(self, schedule=DEFAULT_SCHEDULE, merge_method=method)

    def config_fields(self) -> dict[str, Any]:
        """The fields that were given, as the config takes them."""
        given = {name: getattr(self, name) for name in ("r_inflection", "min_latents", *WAYS)}
        if self.merge_method == GROUPS:
            # For a search, which sets what it finds.
            del given["merge_method"]
        if self.r is not None:
            given["r"] = parse_r(self.r)
        return {name: value for name, value in given.items() if value is not None}

    def resolve(
        self,
        model: ToMePerceiverPreTrainedModel,
        samples: Samples,
        input_shape: tuple[int, ...],
        log_dir: Path | None = None,
    ) -> Choice | None:
        """With a budget, choose what merges within it, and set it in place of whatever merged; otherwise `None`.

        Args:
            model: whose config it is; a search runs it, and so does a budget of time.
            samples: that a search looks at, and that are timed.
            input_shape: of one input, that the FLOPs are for.
            log_dir: where a search keeps what it has found; `None`: nowhere.

        Raises:
            BadInput: if the budget cannot be kept to.
            Stopped: if the model's outputs are not finite.
        """
        if not self.has_budget:
            return None
        if self.latency_ratio is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise BadInput("--latency_ratio: allowed in one process only, since several do not measure the same time")
        options: dict[str, Any] = {"input_shape": input_shape}
        options |= {f"{name}s": [value] for name in WAYS[:2] if (value := getattr(self, name)) is not None}
        if self.searches:
            options |= {"samples": samples(self.calibration_samples)}
            options |= {} if log_dir is None else {"log_file": log_dir / SEARCH_LOG}
        else:
            options["schedules"] = [self.schedule]
            if self.latency_ratio is not None:
                # For its time alone, so the way to match is that of a budget without samples.
                options = {"merge_methods": [UNSEEN_METHOD], "merge_metrics": [UNSEEN_METRIC]} | options
                options["samples"] = samples(1)
        with naming_arguments():
            return model.merge_to(self.flops_ratio, self.latency_ratio, **options)


@contextmanager
def naming_arguments() -> Iterator[None]:
    """Turn what model and config say of a value into the line for the argument that gave it.

    Raises:
        BadInput: in place of a `ValueError`.
        Stopped: in place of a `FloatingPointError`, for outputs that are not finite.
    """
    try:
        yield
    except FloatingPointError as error:
        raise Stopped(f"--schedule {SEARCH}: {error}") from error
    except ValueError as error:
        given = re.match(rf"({'|'.join((*MEANS[1:], *WAYS))}) = (\S+): (.*)", str(error))
        line = f"merging: {error}" if given is None else f"--{given[1]} {given[2]}: {given[3]}"
        raise BadInput(line) from error


def apply_fields(config: ToMePerceiverConfig, fields: dict[str, Any]) -> None:
    """Set merging fields on a config and check what they mean together.

    Raises:
        BadInput: naming the field, the value and what is allowed.
    """
    with naming_arguments():
        replace(Merging.of(config), **fields).apply(config)


def check_schedule(name: str, has_budget: bool) -> None:
    """Check the name of a schedule.

    Raises:
        BadInput: for one that is not there, or that has no budget to spread.
    """
    if name not in SCHEDULE_NAMES:
        raise BadInput(f"--schedule {name}: allowed are {', '.join(sorted(SCHEDULE_NAMES))}")
    if name != SEARCH and not has_budget:
        raise BadInput(f"--schedule {name}: allowed with a budget only, --flops_ratio or --latency_ratio")


def check_groups(methods: Sequence[str | None], searches: bool) -> None:
    """Check that fixed groups are asked for where they are searched for.

    Raises:
        BadInput: if they are not.
    """
    if GROUPS in methods and not searches:
        raise BadInput(
            f"--merge_method {GROUPS}: allowed with --flops_ratio or --latency_ratio and --schedule {SEARCH}, which "
            "finds them; without --r and other schedules"
        )


def check_merging(**given: Any) -> None:
    """Check merging arguments as far as they can be without a model.

    Args:
        given: one value for each argument, by its name; `None` for what is not given.

    Raises:
        BadInput: for a value that no model can mean.
    """
    if given.get("r") is not None:
        parse_r(given["r"])
    for names, lowest, highest in (
        (("flops_ratio", "latency_ratio"), 0, 1), (("r_inflection",), -1, 1), (("min_latents",), 1, math.inf),
    ):  # fmt: skip
        for name in names:
            value = given.get(name)
            if value is not None and (not lowest <= value <= highest or value == 0 and "ratio" in name):
                above = "above 0 to 1" if "ratio" in name else f"from {lowest} to {highest}"
                allowed = "of 1 or more" if highest == math.inf else above
                raise BadInput(f"--{name} {value}: allowed is a number {allowed}")
    for name, known in (("merge_method", (*MERGE_METHODS, GROUPS)), ("merge_metric", MERGE_METRICS)):
        value = given.get(name)
        if value is not None and value not in known:
            raise BadInput(f"--{name} {value}: allowed are {', '.join(sorted(known))}")


def spelled_r(r: object) -> str:
    """`r` as on a command line, also if it is a number or a list because it comes from a JSON or YAML file."""
    return ",".join(map(str, r)) if isinstance(r, list) else str(r)


def parse_r(text: str) -> int | list[int]:
    """`r` from a command line: `"8"` -> 8, `"26,26,0"` -> [26, 26, 0].

    Raises:
        BadInput: for anything else.
    """
    try:
        entries = [int(entry) for entry in text.split(",")]
        if min(entries) < 0:
            raise ValueError("a negative number")
    except ValueError:
        raise BadInput(
            f"--r {text}: allowed is an integer of 0 or more, or a comma-separated list of them, one a layer"
        ) from None
    return entries if "," in text else entries[0]
