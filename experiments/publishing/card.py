# SPDX-License-Identifier: Apache-2.0
"""The README.md of a checkpoint: what it is, how to use it, what was measured, in the form that the Hub reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import TrainingArguments

from budget_tome_perceiver import Merging
from configuration_tome_perceiver import ToMePerceiverConfig
from cost_tome_perceiver import ForwardCost, forward_cost
from experiments.files import write_text
from experiments.measurement import describe_environment, environment_line
from experiments.merging.arguments import spelled_r
from experiments.publishing.schedule_picture import draw_schedule
from experiments.publishing.tables import markdown_table, with_error
from experiments.tasks.base import Source

R = int | list[int]

CARD_FILE = "README.md"
SCHEDULE_FILE = "schedule.png"
TOKEN_MERGING = "[Token Merging](https://arxiv.org/abs/2210.09461)"
AUTO_CLASSES = {
    "text-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "fill-mask": "AutoModelForMaskedLM",
}
PIPELINE_INPUTS = {
    "text-classification": '"a sentence"',
    "image-classification": '"picture.png"',
    "fill-mask": 'f"a {pipe.tokenizer.mask_token}."',
}
SET_R = "model.r = 0  # merge nothing; any other r works too, without reloading"
# What `Card.usage` writes.
LOADED_FROM = re.compile(r'(pipeline\("[a-z-]+", |\.from_pretrained\()"[^"]*"')
# What a card says of a training in any case; whatever else decides it is said where it is not the default.
TRAINING_SHOWN = (
    "seed", "num_train_epochs", "max_steps", "learning_rate", "weight_decay", "warmup_steps", "lr_scheduler_type",
    "optim", "bf16", "fp16", "per_device_train_batch_size", "gradient_accumulation_steps", "processes",
)  # fmt: skip
METRIC_NAMES = {"f1": "F1", "mse": "MSE", "pearson": "Pearson", "spearmanr": "Spearman"}


@dataclass(frozen=True)
class Measured:
    """One row of a card's results.

    Attributes:
        name: of the row.
        r: of the config.
        metrics: figures by name, each with its standard error under NAME_stderr; also changes from another row.
    """

    name: str
    r: R
    metrics: dict[str, float]

    @property
    def scores(self) -> dict[str, tuple[float, float]]:
        """The figures that are no changes, each with its standard error."""
        return {
            metric: (value, self.metrics[f"{metric}_stderr"])
            for metric, value in self.metrics.items()
            if f"{metric}_stderr" in self.metrics and not metric.endswith("_change")
        }


def metric_name(metric: str) -> str:
    """A metric as people write it."""
    return METRIC_NAMES.get(metric, metric.replace("_", " ").capitalize())


def results_table(measured: Sequence[Measured]) -> str:
    """A line for each row, a column for each metric, as value and standard error."""
    metrics = list(measured[0].scores)
    rows = [
        (row.name, spelled_r(row.r), *(with_error(*row.scores[metric], ".4f") for metric in metrics))
        for row in measured
    ]
    return markdown_table(["", "r", *map(metric_name, metrics)], rows)


def training_lines(fields: Mapping[str, Any], trained_on: int) -> str:
    """What decided a training, as a list: its main arguments, and all others that are not the defaults."""
    defaults = TrainingArguments.__dataclass_fields__

    def shown(name: str, value: Any) -> bool:
        if name in TRAINING_SHOWN or name not in defaults:
            return value is not None
        return value not in (None, [], {}, False, defaults[name].default)

    lines = [f"- `{name}`: {value}" for name, value in fields.items() if shown(name, value)]
    return "\n".join([f"- training samples: {trained_on:,}", *lines])


@dataclass(frozen=True)
class WhatMerges:
    """What merges in a checkpoint, and what that saves.

    Attributes:
        config: of the checkpoint.
        input_shape: of one input, (1, S) or (1, 3, height, width), to state its cost.
        budget: that decided what merges, in words, if one did.
        start: config of the model that is compared with; by default the same without merging.
    """

    config: ToMePerceiverConfig
    input_shape: Sequence[int]
    budget: str | None = None
    start: ToMePerceiverConfig | None = None

    @property
    def unmerged(self) -> ToMePerceiverConfig:
        """What the cost is compared with."""
        return self.start or Merging.none(self.config).asked_of(self.config)

    @cached_property
    def costs(self) -> tuple[ForwardCost, ForwardCost]:
        """Of a forward pass, merged and unmerged."""
        merged, unmerged = (
            forward_cost(config, self.input_shape, self.config.architectures[0])
            for config in (self.config, self.unmerged)
        )
        return merged, unmerged

    def section(self) -> str:
        """What it saves, in words and as a picture, every setting, and the budget that these follow from."""
        config, (cost, unmerged) = self.config, (cost.total_with_matching for cost in self.costs)
        settings = {
            "r": spelled_r(config.r) if config.merge_groups is None else "fixed groups, `merge_groups`",
            "latents left after each layer": spelled_r(config.latents_per_layer),
            "merge_method": config.merge_method,
            "merge_metric": config.merge_metric,
            "proportional_attention": config.proportional_attention,
            "min_latents": config.min_latents,
            "r_inflection": config.r_inflection or None,
            "num_blocks": config.num_blocks,
            "budget": self.budget,
        }
        lines = "\n".join(f"- {name}: {value}" for name, value in settings.items() if value is not None)
        return f"""It goes from {self.unmerged.num_latents} latents to {config.latents_per_layer[-1]} and takes \
{cost / 1e9:.4g} GFLOPs for an input of shape {tuple(self.input_shape[1:])}, {cost / unmerged:.1%} of what it takes \
unmerged.

![Latents that are left after each layer, and the FLOPs of each layer]({SCHEDULE_FILE})

{lines}"""

    def draw(self, path: Path) -> None:
        """The latents that are left and the FLOPs, layer by layer."""
        draw_schedule(self.config, *self.costs, path)


@dataclass(frozen=True, kw_only=True)
class Card:
    """What the card of a checkpoint says.

    Attributes:
        model_id: the folder that becomes the repository.
        revision: branch of it that the checkpoint becomes, if not the main one.
        source, hub_task: the data, and the Hub's name of the task.
        base_model: what the checkpoint was made from; `None` is from scratch.
        what: it is, after "A Perceiver IO"; by default, that it merges and what it was trained on.
        merging: what merges in it, if anything does before somebody sets it.
        other_merging: line of code that makes the model merge otherwise.
        measured: the figures; r stands in each one's name and arguments, since the Hub keys results by these.
        evaluated_on: number of examples behind them.
        report: what stands under "Results"; by default a table of `measured`.
        steps: what decided each training, or what else made it, as `experiments.training.identity.training_fields`,
            under its heading.
        trained_on: number of examples that each step read.
        sections: others, under their headings.
        environment: what it was made in; by default this one.
    """

    model_id: str
    revision: str | None = None
    source: Source
    hub_task: str
    base_model: str | None
    what: str | None = None
    merging: WhatMerges | None = None
    other_merging: str = SET_R
    measured: Sequence[Measured] = ()
    evaluated_on: int = 0
    report: str | None = None
    steps: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    trained_on: int = 0
    sections: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=describe_environment)

    def write(self, output_dir: Path) -> None:
        """Write the card and its picture, last of all files in the folder: Trainer may have written a card too."""
        if self.merging is not None:
            self.merging.draw(output_dir / SCHEDULE_FILE)
        write_text(output_dir / CARD_FILE, str(ModelCard(f"---\n{self.data.to_yaml()}\n---\n\n{self.text}")))

    @property
    def title(self) -> str:
        """Name of the model."""
        name = Path(self.model_id).resolve().name
        return name if self.revision is None else f"{name}, {self.revision}"

    @property
    def data(self) -> ModelCardData:
        """The YAML at the head, with every figure in `model-index`."""
        results = [
            EvalResult(
                task_type=self.hub_task,
                dataset_type=self.source.dataset,
                dataset_name=self.source.name,
                dataset_config=self.source.config,
                dataset_split=self.source.split,
                metric_type=metric,
                metric_name=f"{metric_name(metric)} (r={spelled_r(row.r)}, {row.name})",
                metric_value=value,
                metric_args={"r": row.r, "model": row.name, "standard_error": error},
            )
            for row in self.measured
            for metric, (value, error) in row.scores.items()
        ]
        # A folder of this machine is nothing to the Hub.
        on_hub = self.base_model is not None and not Path(self.base_model).exists()
        return ModelCardData(
            library_name="transformers",
            pipeline_tag=self.hub_task,
            tags=["perceiver", "token-merging"],
            datasets=[self.source.dataset] if self.source.on_hub else None,
            base_model=self.base_model if on_hub else None,
            model_name=self.title,
            eval_results=results or None,
        )

    @property
    def text(self) -> str:
        """What people read: what it is, and the sections that there is something to say in."""
        sections = {
            "Merging": "" if self.merging is None else self.merging.section(),
            "Use it": self.usage,
            "Results": self.results,
            **{heading: training_lines(fields, self.trained_on) for heading, fields in self.steps.items()},
            **self.sections,
        }
        shown = "\n\n".join(f"## {heading}\n\n{text}" for heading, text in sections.items() if text)
        return f"""# {self.title}

A [Perceiver IO](https://arxiv.org/abs/2107.14795) {self.what or self._trained}

{shown}

{environment_line(self.environment)}.
"""

    @property
    def _trained(self) -> str:
        start = "from scratch" if self.base_model is None else f"from {Path(self.base_model).name}"
        return f"that merges its latents as it runs ({TOKEN_MERGING}), trained on {self.source.name} ({start})."

    @property
    def usage(self) -> str:
        """How to load the checkpoint, from its folder until `address_card` says which repository that became."""
        auto_class = AUTO_CLASSES[self.hub_task]
        pinned = "" if self.revision is None else f', revision="{self.revision}"'
        return f"""```python
from transformers import {auto_class}, pipeline

pipe = pipeline("{self.hub_task}", "{self.model_id}"{pinned}, trust_remote_code=True)
pipe({PIPELINE_INPUTS[self.hub_task]})

model = {auto_class}.from_pretrained("{self.model_id}"{pinned}, trust_remote_code=True)
{self.other_merging}
```

Every file that it needs, its code too, is in the repository. Pin `revision` to a commit for results that stay."""

    @property
    def results(self) -> str:
        """The report, or else the figures, if there are any."""
        if self.report is not None or not self.measured:
            return self.report or ""
        return f"{results_table(self.measured)}\n\nOn {self.evaluated_on:,} examples, with standard errors."


def address_card(folder: Path, repo_id: str) -> None:
    """Make the examples in a folder's card load from a repository, whatever they loaded from so far."""
    path = folder / CARD_FILE
    text = path.read_text() if path.exists() else ""
    addressed = LOADED_FROM.sub(lambda match: f'{match[1]}"{repo_id}"', text)
    if addressed != text:
        write_text(path, addressed)


def measured_in(folder: Path, split: str, name: str, r: R) -> list[Measured]:
    """The figures that `SPLIT_results.json` in a folder holds, if it is there.

    Args:
        folder: of results.
        split: what the file, and the names in it, begin with.
        name, r: of the row.
    """
    path = folder / f"{split}_results.json"
    return [Measured(name, r, scores(json.loads(path.read_text()), split))] if path.exists() else []


def scores(metrics: dict[str, Any], split: str) -> dict[str, float]:
    """Of all that an evaluation gave, the figures that have a standard error, with it and without the prefix."""
    plain = {name.removeprefix(f"{split}_"): value for name, value in metrics.items()}
    names = [name for name in plain if f"{name}_stderr" in plain]
    return {name: plain[name] for scored in names for name in (scored, f"{scored}_stderr")}
