# SPDX-License-Identifier: Apache-2.0
"""The arguments that say which model and how it merges."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from configuration_tome_perceiver import MERGE_METRICS
from experiments.errors import BadInput
from experiments.merging.budget import SCHEDULE_NAMES, Budget, check_schedule, flops_ratios, latency_ratios, searching
from experiments.merging.schedules import DEFAULT_SCHEDULE, apply_merging
from experiments.merging.search import SEARCH
from experiments.tasks.base import PreparedTask
from merging_tome_perceiver import MERGE_METHODS
from modeling_tome_perceiver import ToMePerceiverPreTrainedModel

TIMED_INPUTS = 32
# The arguments that say how much merges, of which one is given at most.
MEANS = ("r", "flops_ratio", "latency_ratio")


@dataclass
class ModelArguments:
    """Which model: a checkpoint, or a small one from scratch."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Hub id or local folder of a checkpoint, stock Perceiver or ours. Without it: from scratch."},
    )
    config_name: str | None = field(
        default=None,
        metadata={"help": "For a model from scratch: a JSON file with its config, or a checkpoint to take it from."},
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Changes to the config of a model from scratch: num_latents=64,d_latents=128,..."},
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer, if it is not that of --model_name_or_path."}
    )
    image_processor_name: str | None = field(
        default=None, metadata={"help": "Image processor, if it is not that of --model_name_or_path."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads from the Hub are kept."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the checkpoint."})
    token: str | None = field(
        default=None,
        metadata={"help": "Token for gated or private repositories; by default the one of `hf auth login`."},
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run a tokenizer's or image processor's own code. The model's is always this repository's."},
    )
    code_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of that code, if it is in a repository of its own."}
    )
    ignore_mismatched_sizes: bool = field(
        default=False,
        metadata={"help": "Start a head of another size anew, for a checkpoint finetuned on other labels."},
    )

    def download_options(self) -> dict[str, Any]:
        """What every `from_pretrained` takes."""
        return {"cache_dir": self.cache_dir, "revision": self.model_revision, "token": self.token}

    def dataset_options(self) -> dict[str, Any]:
        """What `datasets.load_dataset` takes."""
        return {"cache_dir": self.cache_dir, "token": self.token}


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
        metadata={"help": "Instead of --r: a share of the unmerged model's FLOPs, which a --schedule keeps to."},
    )
    latency_ratio: float | None = field(
        default=None,
        metadata={
            "help": f"The same of the unmerged model's time for {TIMED_INPUTS} inputs, measured on this machine."
        },
    )
    schedule: str = field(
        default=DEFAULT_SCHEDULE,
        metadata={
            "help": f"How such a share is spread over the layers: {', '.join(sorted(SCHEDULE_NAMES))}. '{SEARCH}' "
            "finds the one that changes the outputs least."
        },
    )
    calibration_samples: int = field(
        default=256, metadata={"help": f"Training samples, without labels, that --schedule {SEARCH} looks at."}
    )
    r_inflection: float | None = field(
        default=None, metadata={"help": "-1: merge early (2r falling to 0), 0: constant, 1: merge late."}
    )
    min_latents: int | None = field(default=None, metadata={"help": "Never merge below this many latents."})
    merge_method: str | None = field(
        default=None, metadata={"help": f"What merges with what: {', '.join(sorted(MERGE_METHODS))}."}
    )
    merge_metric: str | None = field(
        default=None, metadata={"help": "What of the latents is compared: key (the default), value or hidden."}
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
        check_schedule(self.schedule)
        if self.schedule != DEFAULT_SCHEDULE and not self.has_budget:
            raise BadInput(f"--schedule {self.schedule}: allowed with a budget only, --flops_ratio or --latency_ratio")
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

    def apply_budget(
        self,
        model: ToMePerceiverPreTrainedModel,
        prepared: PreparedTask,
        input_shape: tuple[int, ...],
        log_dir: Path | None,
        schedule: str | None = None,
    ) -> None:
        """With a budget, set the list of r that keeps to it, in place of whatever merged.

        Args:
            model: whose config it is; a search runs it, and so does a budget of time.
            prepared: the task, whose training samples a search looks at.
            input_shape: of one input, that the FLOPs are for.
            log_dir: where a search keeps what it has found; `None`: nowhere.
            schedule: in place of `--schedule`.

        Raises:
            BadInput: if the schedule cannot keep to it.
        """
        if not self.has_budget:
            return
        schedule, config = schedule or self.schedule, model.config
        if self.flops_ratio is not None:
            budget = Budget("flops_ratio", self.flops_ratio, flops_ratios(config, input_shape, type(model).__name__))
        else:
            assert self.latency_ratio is not None
            batch = prepared.batch(TIMED_INPUTS)
            budget = Budget("latency_ratio", self.latency_ratio, latency_ratios(model, batch))
        search = searching(model, prepared, self.calibration_samples, log_dir) if schedule == SEARCH else None
        apply_merging(config, budget.fields(schedule, config, search))

    def config_fields(self) -> dict[str, Any]:
        """The fields that were given, as the config takes them."""
        given: dict[str, Any] = {
            "r_inflection": self.r_inflection,
            "min_latents": self.min_latents,
            "merge_method": self.merge_method,
            "merge_metric": self.merge_metric,
            "proportional_attention": self.proportional_attention,
        }
        if self.r is not None:
            given["r"] = parse_r(self.r)
        return {name: value for name, value in given.items() if value is not None}


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
    for name, known in (("merge_method", MERGE_METHODS), ("merge_metric", MERGE_METRICS)):
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
