# SPDX-License-Identifier: Apache-2.0
"""The README.md of a checkpoint: what it is, how to use it, what was measured, in the form that the Hub reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig, TrainingArguments

from experiments.files import write_text
from experiments.measurement import describe_environment, environment_line
from experiments.merging.cost import forward_cost
from experiments.merging.schedules import UNMERGED
from experiments.publishing.schedule_picture import draw_schedule
from experiments.publishing.tables import markdown_table, with_error
from experiments.tasks.base import Source

R = int | list[int]

CARD_FILE = "README.md"
SCHEDULE_FILE = "schedule.png"
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
# What `usage_section` writes.
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
        metrics: figures by name, each with its standard error under NAME_stderr.
    """

    name: str
    r: R
    metrics: dict[str, float]


def metric_name(metric: str) -> str:
    """A metric as people write it."""
    return METRIC_NAMES.get(metric, metric.replace("_", " ").capitalize())


def shown_r(r: R) -> str:
    """`r` as on a command line."""
    return ",".join(map(str, r)) if isinstance(r, list) else str(r)


def card_data(
    source: Source, hub_task: str, name: str, measured: Sequence[Measured], base_model: str | None
) -> ModelCardData:
    """The YAML at the head of a card, with every figure in `model-index`.

    Args:
        source: the data.
        hub_task: the Hub's name of the task.
        name: of the model.
        measured: the figures; r stands in each one's name and arguments, since the Hub keys results by these.
        base_model: what was finetuned; folders of this machine are nothing to the Hub and are left out.
    """
    results = [
        EvalResult(
            task_type=hub_task,
            dataset_type=source.dataset,
            dataset_name=source.name,
            dataset_config=source.config,
            dataset_split=source.split,
            metric_type=metric,
            metric_name=f"{metric_name(metric)} (r={shown_r(row.r)}, {row.name})",
            metric_value=value,
            metric_args={"r": row.r, "model": row.name, "standard_error": row.metrics[f"{metric}_stderr"]},
        )
        for row in measured
        for metric, value in row.metrics.items()
        if f"{metric}_stderr" in row.metrics
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=hub_task,
        tags=["perceiver", "token-merging"],
        datasets=[source.dataset] if source.on_hub else None,
        base_model=None if base_model is None or Path(base_model).exists() else base_model,
        model_name=name,
        eval_results=results or None,
    )


def usage_section(hub_task: str, model_id: str, revision: str | None = None, other_merging: str = SET_R) -> str:
    """How to load what the card belongs to, a folder until `address_card` says which repository it became.

    Args:
        hub_task: the Hub's name of the task.
        model_id: the folder.
        revision: branch of the repository, if not the main one.
        other_merging: line of code that makes the model merge otherwise.
    """
    pinned = "" if revision is None else f', revision="{revision}"'
    return f"""## Use it

```python
from transformers import {AUTO_CLASSES[hub_task]}, pipeline

pipe = pipeline("{hub_task}", "{model_id}"{pinned}, trust_remote_code=True)
pipe({PIPELINE_INPUTS[hub_task]})

model = {AUTO_CLASSES[hub_task]}.from_pretrained("{model_id}"{pinned}, trust_remote_code=True)
{other_merging}
```

Every file that it needs, its code too, is in the repository. Pin `revision` to a commit for results that stay."""


def results_table(measured: Sequence[Measured]) -> str:
    """A line for each row, a column for each metric, as value and standard error."""
    metrics = [name for name in measured[0].metrics if f"{name}_stderr" in measured[0].metrics]
    rows = [
        (
            row.name,
            shown_r(row.r),
            *(with_error(row.metrics[each], row.metrics[f"{each}_stderr"], ".4f") for each in metrics),
        )
        for row in measured
    ]
    return markdown_table(["", "r", *map(metric_name, metrics)], rows)


def write_checkpoint_card(
    folder: Path,
    *,
    source: Source,
    hub_task: str,
    config: PreTrainedConfig,
    input_shape: Sequence[int],
    evaluated_on: int,
    trained_on: int,
    measured: Sequence[Measured],
    budget: str | None,
    trainings: Mapping[str, Mapping[str, Any]],
    base_model: str | None,
    model_id: str,
    revision: str | None = None,
) -> None:
    """Write the card of one checkpoint and its picture, `schedule.png`.

    Args:
        folder: of the checkpoint.
        source, hub_task: data and task.
        config: of the checkpoint.
        input_shape: of one input, (1, S) or (1, 3, height, width), to state its cost.
        evaluated_on, trained_on: numbers of examples.
        measured: the figures.
        budget: that decided what merges, in words, if one did.
        trainings: what decided each training, as `experiments.training.identity.training_fields`, under its heading.
        base_model: what was finetuned.
        model_id: the folder that becomes the repository.
        revision: branch of it that the checkpoint becomes, if not the main one.
    """
    cost, unmerged = (
        forward_cost(changed, input_shape, config.architectures[0])
        for changed in (config, type(config).from_dict(config.to_dict() | UNMERGED))
    )
    draw_schedule(config, cost, unmerged, folder / SCHEDULE_FILE)
    results = f"{results_table(measured)}\n\nOn {evaluated_on:,} examples, with standard errors." if measured else ""
    headed = [f"## {heading}\n\n{training_lines(fields, trained_on)}" for heading, fields in trainings.items()]
    sections = "\n\n".join(headed)
    name = folder.resolve().name if revision is None else f"{Path(model_id).resolve().name}, {revision}"
    body = f"""# {name}

A [Perceiver IO](https://arxiv.org/abs/2107.14795) that merges its latents as it runs
([Token Merging](https://arxiv.org/abs/2210.09461)), trained on {source.name}
({"from scratch" if base_model is None else f"from {Path(base_model).name}"}). With r = {shown_r(config.r)} it goes from
{config.num_latents} latents to {config.latents_per_layer[-1]} and takes {cost.total_with_matching / 1e9:.4g} GFLOPs
for an input of shape {tuple(input_shape[1:])}, {cost.total_with_matching / unmerged.total_with_matching:.1%} of what it
takes unmerged.

![Latents that are left after each layer, and the FLOPs of each layer]({SCHEDULE_FILE})

{usage_section(hub_task, model_id, revision)}

## Results

{results}

## Merging

{merging_lines(config, budget)}

{sections}

{environment_line(describe_environment())}.
"""
    write_card(folder, card_data(source, hub_task, name, measured, base_model), body)


def merging_lines(config: PreTrainedConfig, budget: str | None) -> str:
    """What merges, as a list: every setting, and the budget that it followed from."""
    lines = {
        "r": "fixed groups, `merge_groups`" if config.merge_groups is not None else shown_r(config.r),
        "latents left after each layer": shown_r(config.latents_per_layer),
        "merge_method": config.merge_method,
        "merge_metric": config.merge_metric,
        "proportional_attention": config.proportional_attention,
        "min_latents": config.min_latents,
        "r_inflection": config.r_inflection or None,
        "num_blocks": config.num_blocks,
        "budget": budget,
    }
    return "\n".join(f"- {name}: {value}" for name, value in lines.items() if value is not None)


def training_lines(fields: Mapping[str, Any], trained_on: int) -> str:
    """What decided a training, as a list: its main arguments, and all others that are not the defaults."""
    defaults = TrainingArguments.__dataclass_fields__

    def shown(name: str, value: Any) -> bool:
        if name in TRAINING_SHOWN or name not in defaults:
            return value is not None
        return value not in (None, [], {}, False, defaults[name].default)

    lines = [f"- `{name}`: {value}" for name, value in fields.items() if shown(name, value)]
    return "\n".join([f"- training samples: {trained_on:,}", *lines])


def write_card(folder: Path, data: ModelCardData, body: str) -> None:
    """Write a folder's card; last of all its files, and over the one that Trainer may have written."""
    write_text(folder / CARD_FILE, str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")))


def address_card(folder: Path, repo_id: str) -> None:
    """Make the examples in a folder's card load from a repository, whatever they loaded from so far."""
    path = folder / CARD_FILE
    if path.exists():
        write_text(path, LOADED_FROM.sub(lambda match: f'{match[1]}"{repo_id}"', path.read_text()))


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


def figures(cell: dict[str, float]) -> dict[str, float]:
    """Of a cell of a sweep or a calibration, the figures without what they changed from."""
    return {name: value for name, value in cell.items() if "_change" not in name}
