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
from transformers.trainer_pt_utils import AcceleratorConfig
from yaml import YAMLError

from configuration_tome_perceiver import ToMePerceiverConfig
from cost_tome_perceiver import ForwardCost, Merging, forward_cost
from experiments.files import write_text
from experiments.measurement import Quartiles, describe_environment, environment_line
from experiments.merging.arguments import spelled_r
from experiments.publishing.frontier_section import FRONTIER_FILE, draw_frontier, example_share, frontier_section
from experiments.publishing.schedule_picture import draw_schedule
from experiments.publishing.tables import UNDEFINED, markdown_table, with_error
from experiments.tasks.base import Source
from experiments.tasks.scores import Scores, parse_scores
from frontier_tome_perceiver import Frontier

R = int | list[int] | str

CARD_FILE = "README.md"
SCHEDULE_FILE = "schedule.png"
TOKEN_MERGING = "[Token Merging](https://arxiv.org/abs/2210.09461)"
AUTO_CLASSES = {
    "text-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "fill-mask": "AutoModelForMaskedLM",
}
PIPELINE_INPUTS = {
    "text-classification": '"a sentence", truncation=True',
    "image-classification": '"picture.png"',
    "fill-mask": 'f"a {pipe.tokenizer.mask_token}."',
}
# What makes a model's inputs of such a thing: its Auto class, what it is called, and what it is given.
PROCESSORS = {
    "text-classification": ("AutoTokenizer", "tokenizer", '"a sentence", truncation=True'),
    "image-classification": ("AutoImageProcessor", "image_processor", 'Image.open("picture.png").convert("RGB")'),
    "fill-mask": ("AutoTokenizer", "tokenizer", 'f"a {tokenizer.mask_token}."'),
}
SET_R = "model.r = 0  # or merge nothing; any other r works too, without reloading"
# A model of fixed groups takes no r beside them.
DROP_GROUPS = "model.unmerged.apply(model.config)  # or merge nothing; then any r works too, without reloading"
# What `Card.usage` writes.
LOADED_FROM = re.compile(r'(pipeline\("[a-z-]+", |\.from_pretrained\()"[^"]*"')
# What a card says of a training in any case; whatever else decides it is said where it is not the default.
TRAINING_SHOWN = (
    "seed", "num_train_epochs", "max_steps", "learning_rate", "weight_decay", "warmup_steps", "lr_scheduler_type",
    "optim", "bf16", "fp16", "per_device_train_batch_size", "gradient_accumulation_steps", "processes",
)  # fmt: skip
# How arguments that are not given come out of `TrainingArguments`, where that is not their default.
FILLED_IN = {"accelerator_config": str(AcceleratorConfig())}
# More classes than these are counted, not named.
CLASSES_NAMED = 20
CODE_LICENCE = "The code in `*_tome_perceiver.py` is under Apache-2.0."
METRIC_NAMES = {"f1": "F1", "mse": "MSE", "pearson": "Pearson", "spearmanr": "Spearman"}


@dataclass(frozen=True)
class Measured:
    """One row of a card's results.

    Attributes:
        name: of the row.
        r: as `shown_r` gives it.
        scores: by name.
    """

    name: str
    r: R
    scores: Scores


def undefined_note(table: str) -> str:
    """Say why figures of a table are undefined, if any are."""
    why = " What is undefined has no value on these examples, whose labels or predictions are all alike."
    return why if UNDEFINED in table else ""


def metric_name(metric: str) -> str:
    """A metric as people write it."""
    return METRIC_NAMES.get(metric, metric.replace("_", " ").capitalize())


def shown_r(merging: Merging | ToMePerceiverConfig) -> R:
    """What stands in the column r: a config's r, and in words what fixed groups merge, of which r says nothing."""
    if not (merging.merge_groups or merging.latent_groups):
        return merging.r
    merges = any(merging.r) if isinstance(merging.r, list) else merging.r
    return f"fixed groups, then {spelled_r(merging.r)}" if merges else "fixed groups"


def results_table(measured: Sequence[Measured]) -> str:
    """A line for each row, for each metric a column as value and standard error, and one for what has changed."""
    header, columns = ["", "r"], [[row.name, spelled_r(row.r)] for row in measured]
    for name in measured[0].scores:
        compared = any(row.scores[name].compared for row in measured)
        header += [metric_name(name), *(["change, paired by example"] if compared else [])]
        for row, cells in zip(measured, columns, strict=True):
            score = row.scores[name]
            cells.append(with_error(score.value, score.stderr, ".4f"))
            if compared:
                cells.append(with_error(score.change, score.change_stderr, "+.4f") if score.compared else "")
    return markdown_table(header, columns)


def training_lines(
    fields: Mapping[str, Any], trained_on: int, before: tuple[str, Mapping[str, Any]] | None = None
) -> str:
    """What decided a training, as a list: its main arguments, and all others that are not the defaults.

    Args:
        fields: the arguments.
        trained_on: number of examples.
        before: name of the training before it, and its arguments; then only what is different is listed.
    """
    defaults = TrainingArguments.__dataclass_fields__

    def shown(name: str, value: Any) -> bool:
        if before is not None:
            return value != before[1].get(name)
        if name in TRAINING_SHOWN or name not in defaults:
            return value is not None
        return value not in (None, [], {}, False, defaults[name].default, FILLED_IN.get(name))

    lines = [f"- `{name}`: {_without_place(value)}" for name, value in fields.items() if shown(name, value)]
    if before is not None:
        return "\n".join([f"As {before[0].lower()}{', but:' if lines else '.'}\n", *lines])
    return "\n".join([f"- training samples: {trained_on:,}", *lines])


def _without_place(value: Any) -> Any:
    """A file by its name: where it is on this machine is nobody's business."""
    return Path(value).name if isinstance(value, str) and "/" in value and Path(value).exists() else value


@dataclass(frozen=True)
class WhatMerges:
    """What merges in a checkpoint, and what that saves.

    Attributes:
        config: of the checkpoint.
        input_shape: of one input, (1, S) or (1, 3, height, width), to state its cost.
        budget: that decided what merges, in words, if one did.
        start: config of the model that is compared with; by default the same without merging.
        speedup: times as fast as that, measured here with so many inputs at once.
        batch_size: that many.
    """

    config: ToMePerceiverConfig
    input_shape: Sequence[int]
    budget: str | None = None
    start: ToMePerceiverConfig | None = None
    speedup: Quartiles | None = None
    batch_size: int = 0

    @property
    def unmerged(self) -> ToMePerceiverConfig:
        """What the cost is compared with."""
        return self.start or Merging.none(self.config).asked_of(self.config)

    @property
    def merges(self) -> bool:
        """Whether anything does."""
        return Merging.of(self.config).merges(self.unmerged)

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
        if not self.merges:
            return "Nothing, until `model.merge_to` is called or `model.r` is set."
        settings = {
            "shape": f"{config.num_latents} latents of {config.d_latents} channels, {config.num_blocks} x "
            f"{config.num_self_attends_per_block} self-attention layers",
            "r": spelled_r(config.r) if config.merge_groups is None else "fixed groups, `merge_groups`",
            "learned latents in fixed groups, `latent_groups`": None
            if config.latent_groups is None
            else f"{config.latents_at_start} groups of {config.num_latents}",
            "latents left after each layer": spelled_r(config.latents_per_layer),
            "merge_method": config.merge_method if config.merge_groups is None else None,
            "merge_metric": config.merge_metric if config.merge_groups is None else None,
            "proportional_attention": config.proportional_attention,
            "min_latents": config.min_latents,
            "r_inflection": config.r_inflection or None,
            "budget": self.budget,
        }
        lines = "\n".join(f"- {name}: {value}" for name, value in settings.items() if value is not None)
        return f"""It goes from {config.num_latents} latents to {config.latents_per_layer[-1]} and takes \
{cost / 1e9:.4g} GFLOPs for an input of shape {tuple(self.input_shape[1:])}, {cost / unmerged:.1%} of what it takes \
unmerged ({unmerged / 1e9:.4g}).{self.speed}

![Latents that are left after each layer, and the FLOPs of each layer]({SCHEDULE_FILE})

{lines}"""

    @property
    def speed(self) -> str:
        """How fast it is, in a paragraph that follows another one, if that was measured."""
        if self.speedup is None:
            return ""
        machine = describe_environment()
        where = machine["processor"] if machine["gpu"] == "none" else machine["gpu"]
        threads = f", {machine['threads']} threads" if machine["gpu"] == "none" else ""
        return (
            f"\n\nOn {where}{threads}, it was {self.speedup.median:.2f} times as fast as unmerged "
            f"(quartiles {self.speedup.lower:.2f} to {self.speedup.upper:.2f}, {self.batch_size} inputs at once)."
        )

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
        frontier: of the checkpoint, from which others choose what merges.
        measured: the figures; r stands in each one's name and arguments, since the Hub keys results by these.
        evaluated_on: number of examples behind them.
        report: what stands under "Results"; by default a table of `measured`.
        steps: what decided each training, as `experiments.training.identity.training_fields`, under its heading; none
            if nothing was trained.
        trained_on: number of examples that each step read.
        labels: names of the classes, if there are any.
        data_fields: how the data were read, where that is not by default.
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
    frontier: Frontier | None = None
    measured: Sequence[Measured] = ()
    evaluated_on: int = 0
    report: str | None = None
    steps: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    trained_on: int = 0
    labels: Sequence[str] = ()
    data_fields: Mapping[str, Any] = field(default_factory=dict)
    sections: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=describe_environment)

    def write(self, output_dir: Path) -> None:
        """Write the card and its pictures, last of all files in the folder: Trainer may have written a card too."""
        if self.merging is not None and self.merging.merges:
            self.merging.draw(output_dir / SCHEDULE_FILE)
        if self.frontier is not None:
            draw_frontier(self.frontier, output_dir / FRONTIER_FILE)
        write_text(output_dir / CARD_FILE, str(ModelCard(f"---\n{self.data.to_yaml()}\n---\n\n{self.text}")))

    @property
    def title(self) -> str:
        """Name of the model."""
        name = Path(self.model_id).resolve().name
        return name if self.revision is None else f"{name}, {self.revision}"

    @property
    def address(self) -> str:
        """What it is loaded by: of a folder its name, until `address_card` says which repository that became."""
        return Path(self.model_id).resolve().name if Path(self.model_id).exists() else self.model_id

    @property
    def base_on_hub(self) -> bool:
        """Whether it was made from a checkpoint that others have; a folder of this machine is nothing to the Hub."""
        return self.base_model is not None and not Path(self.base_model).exists()

    @property
    def licence(self) -> str | None:
        """Of the weights, as the card of the checkpoint says it that they were made from, if that is here."""
        path = Path(self.base_model or "") / CARD_FILE
        if self.base_model is None or not path.is_file():
            return None
        try:
            return ModelCard.load(path).data.get("license")
        except (ValueError, OSError, YAMLError):
            return None

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
                metric_value=score.value,
                metric_args={"r": row.r, "model": row.name, "standard_error": score.stderr},
            )
            for row in self.measured
            for metric, score in row.scores.items()
            if score.value is not None
        ]
        return ModelCardData(
            license=self.licence,
            library_name="transformers",
            pipeline_tag=self.hub_task,
            tags=["perceiver", "token-merging"],
            datasets=[self.source.dataset] if self.source.on_hub else None,
            base_model=self.base_model if self.base_on_hub else None,
            metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
            model_name=self.title,
            eval_results=results or None,
        )

    @property
    def text(self) -> str:
        """What people read: what it is, and the sections that there is something to say in."""
        trainings, before = {}, None
        for heading, fields in self.steps.items():
            trainings[heading] = training_lines(fields, self.trained_on, before)
            before = heading, fields
        sections = {
            "Use it": self.usage,
            "What merges": "" if self.merging is None else self.merging.section(),
            "Frontier": "" if self.frontier is None else frontier_section(self.frontier),
            "Results": self.results,
            "Data": self.about_data,
            **trainings,
            **self.sections,
            "Limits": self.limits,
            "Licence": self.about_licence,
            "Made with": f"{environment_line(self.environment)}.",
        }
        shown = "\n\n".join(f"## {heading}\n\n{text}" for heading, text in sections.items() if text)
        return f"""# {self.title}

A [Perceiver IO](https://arxiv.org/abs/2107.14795) {self.what or self._made}

{shown}
"""

    @property
    def _made(self) -> str:
        name = None if self.base_model is None else Path(self.base_model).name
        linked = f"[{self.base_model}](https://huggingface.co/{self.base_model})" if self.base_on_hub else f"`{name}`"
        start = "from scratch" if name is None else f"from {linked}"
        how = f"trained on {self.source.name}, {start}" if self.steps else f"made {start}, without training"
        unmerged = self.merging is not None and not self.merging.merges
        merges = "whose latents can be merged" if unmerged else "that merges its latents"
        return f"{merges} as it runs ({TOKEN_MERGING}), {how}."

    @property
    def usage(self) -> str:
        """How to load the checkpoint, whole and in parts, and how to merge it otherwise."""
        auto_class = AUTO_CLASSES[self.hub_task]
        processor_class, processor, given = PROCESSORS[self.hub_task]
        revision = "" if self.revision is None else f', revision="{self.revision}"'
        where = f'"{self.address}"{revision}, trust_remote_code=True'
        images = "from PIL import Image\n" if "Image.open" in given else ""
        config = None if self.merging is None else self.merging.config
        budget, how = 0.9, "with samples=[inputs, ...] it is searched for what changes least"
        if self.frontier is not None:
            budget, how = example_share(self.frontier), "the best row of the frontier below within it"
        grouped = config is not None and (config.merge_groups or config.latent_groups)
        return f"""```python
{images}from transformers import {auto_class}, {processor_class}, pipeline

pipe = pipeline("{self.hub_task}", {where})
pipe({PIPELINE_INPUTS[self.hub_task]})

model = {auto_class}.from_pretrained({where})
{processor} = {processor_class}.from_pretrained({where})
inputs = {processor}({given}, return_tensors="pt")
logits = model(**inputs).logits

model.merge_to(flops_ratio={budget})  # another budget; {how}
{DROP_GROUPS if grouped else SET_R}
```

Every file that it needs, its code too, is in the repository; it takes transformers and torch. \
`trust_remote_code=True` runs that code: pin `revision` to a commit that you have read, which also keeps results as \
they are."""

    @property
    def results(self) -> str:
        """The report, or else the figures, if there are any."""
        if self.report is not None or not self.measured:
            return self.report or ""
        table = results_table(self.measured)
        return f"{table}\n\nOn {self.evaluated_on:,} examples, with standard errors.{undefined_note(table)}"

    @property
    def about_data(self) -> str:
        """Which data, how much of them, and how they were read."""
        source = self.source
        name = (
            f"[{source.dataset}](https://huggingface.co/datasets/{source.dataset})"
            if source.on_hub
            else (f"{source.dataset}, read from files")
        )
        lines = [name + (f", configuration {source.config}" if source.config else "")]
        lines += [f"{self.trained_on:,} training examples"] if self.steps and self.trained_on else []
        lines += (
            [f"{self.evaluated_on:,} evaluated examples, of its split '{source.split}'"] if self.evaluated_on else []
        )
        if self.labels:
            named = ", ".join(self.labels) if len(self.labels) <= CLASSES_NAMED else f"{len(self.labels):,} classes"
            lines.append(f"tells apart: {named}")
        lines += [f"`{name}`: {_without_place(value)}" for name, value in self.data_fields.items()]
        return "\n".join(f"- {line}" for line in lines)

    @property
    def limits(self) -> str:
        """What the figures do not say, as far as that can be known without looking at the model's use."""
        lines = [
            f"Nothing is known of other data than {self.source.name}, nor of how mistakes are spread over groups of "
            "people or topics: look before anything depends on it."
        ]
        if self.measured:
            lines.append(
                "Standard errors are over examples; another seed gives other figures, which was not tried here."
            )
        if self.merging is not None and self.merging.merges:
            lines += [
                "Single outputs move with merging even where the mean stays.",
                "FLOPs are those of matrix products. What is gained in time depends on the machine, the batch and the "
                "length of the input; small models gain less than their FLOPs say, or nothing.",
            ]
        return "\n".join(f"- {line}" for line in lines)

    @property
    def about_licence(self) -> str:
        """What is known of it."""
        if self.licence is not None:
            return f"The weights are under {self.licence}, as those that they were made from. {CODE_LICENCE}"
        base = f"The weights are made from {self.base_model}, whose terms hold. " if self.base_on_hub else ""
        return (
            f"{base}No licence of the weights is named here yet: who publishes them adds `license:` at the head of "
            f"this card. {CODE_LICENCE}"
        )


def address_card(folder: Path, repo_id: str) -> None:
    """Make the examples in a folder's card load from a repository, whatever they loaded from so far."""
    path = folder / CARD_FILE
    text = path.read_text(encoding="utf-8") if path.exists() else ""
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
    if not path.exists():
        return []
    return [Measured(name, r, parse_scores(json.loads(path.read_text(encoding="utf-8")), f"{split}_"))]
