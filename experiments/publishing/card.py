# SPDX-License-Identifier: Apache-2.0
"""The model card of a checkpoint: `card.md.jinja`, filled from what a run recorded, and its scores as `model-index`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from yaml import YAMLError

from configuration_tome_perceiver import ToMePerceiverConfig
from cost_tome_perceiver import ForwardCost, Merging, forward_cost
from experiments.files import write_text
from experiments.measurement import Quartiles, describe_environment, environment_line
from experiments.merging.arguments import spelled_r
from experiments.publishing.card_pictures import draw_frontier, draw_schedule
from experiments.publishing.tables import UNDEFINED, escape_markdown, markdown_table, with_error, without_local_paths
from experiments.tasks.base import Source
from experiments.tasks.scores import Scores
from frontier_tome_perceiver import Frontier

R = int | list[int] | str

CARD_FILE = "README.md"
TEMPLATE = Path(__file__).with_name("card.md.jinja")
# The line of the template that says where code loads the checkpoint from.
CHECKPOINT_LINE = re.compile(r'^checkpoint = ".*"$', re.MULTILINE)
# Training arguments that every card lists; others are listed where they are not the default.
ALWAYS_LISTED = (
    "seed", "num_train_epochs", "max_steps", "learning_rate", "weight_decay", "warmup_steps", "lr_scheduler_type",
    "optim", "bf16", "fp16", "per_device_train_batch_size", "gradient_accumulation_steps", "processes",
)  # fmt: skip
# Values that `TrainingArguments` gives to arguments that were left out, where they are not the field's default.
FILLED_DEFAULTS = {"accelerator_config": str(AcceleratorConfig())}
METRIC_NAMES = {"f1": "F1", "mse": "MSE", "pearson": "Pearson", "spearmanr": "Spearman"}


class Usage(NamedTuple):
    """The classes that load a checkpoint and its inputs, and example inputs, as code."""

    auto_class: str
    processor_class: str
    processor: str
    inputs: str
    pipeline_inputs: str


SENTENCE, IMAGE = '"a sentence", truncation=True', '"picture.png"'
USAGES = {
    "text-classification": Usage(
        "AutoModelForSequenceClassification", "AutoTokenizer", "tokenizer", SENTENCE, SENTENCE
    ),
    "image-classification": Usage(
        "AutoModelForImageClassification", "AutoImageProcessor", "image_processor",
        f'Image.open({IMAGE}).convert("RGB")', IMAGE,
    ),
    "fill-mask": Usage(
        "AutoModelForMaskedLM", "AutoTokenizer", "tokenizer",
        'f"a {tokenizer.mask_token}."', 'f"a {pipe.tokenizer.mask_token}."',
    ),
}  # fmt: skip
"""By the Hub's name of the task."""


@dataclass(frozen=True)
class ResultRow:
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
    """Return the sentence that explains undefined figures, if a table has any."""
    why = " An undefined figure has no value on these examples, because all labels or all predictions are equal."
    return why if UNDEFINED in table else ""


def metric_name(metric: str) -> str:
    """Return a metric's name as people write it."""
    return METRIC_NAMES.get(metric, metric.replace("_", " ").capitalize())


def shown_r(merging: Merging | ToMePerceiverConfig) -> R:
    """Return the entry of the column r: a config's r, or words where fixed groups merge latents too."""
    if not (merging.merge_groups or merging.latent_groups):
        return merging.r
    merges = any(merging.r) if isinstance(merging.r, list) else merging.r
    return f"fixed groups, then {spelled_r(merging.r)}" if merges else "fixed groups"


def results_table(measured: Sequence[ResultRow]) -> str:
    """Return a table with a row for each of `measured`, and columns for each metric and its change, if it has any."""
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


def listed_arguments(fields: Mapping[str, Any], previous: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the training arguments to list: the main ones and those that are not the default, or what has changed.

    Args:
        fields: the arguments of a training.
        previous: those of the training before it; then only differences are listed.
    """
    if previous is not None:
        return {name: value for name, value in fields.items() if value != previous.get(name)}
    defaults = TrainingArguments.__dataclass_fields__

    def is_listed(name: str, value: Any) -> bool:
        if name in ALWAYS_LISTED or name not in defaults:
            return value is not None
        return value not in (None, [], {}, False, defaults[name].default, FILLED_DEFAULTS.get(name))

    return {name: value for name, value in fields.items() if is_listed(name, value)}


@dataclass(frozen=True)
class MergingSummary:
    """The merging of a checkpoint, and what it saves.

    Attributes:
        config: of the checkpoint.
        input_shape: of one input, (1, S) or (1, 3, height, width), that FLOPs are for.
        budget: the budget that chose the merging, in words, if there was one.
        unmerged: config of the model it is compared with.
        speedup: measured times as fast as that model, with `batch_size` inputs at once.
        batch_size: number of these inputs.
    """

    config: ToMePerceiverConfig
    input_shape: Sequence[int]
    budget: str | None
    unmerged: ToMePerceiverConfig
    speedup: Quartiles | None = None
    batch_size: int = 0

    @property
    def merges(self) -> bool:
        """Whether anything merges."""
        return Merging.of(self.config).merges(self.unmerged)

    @cached_property
    def costs(self) -> tuple[ForwardCost, ForwardCost]:
        """Costs of a forward pass, merged and unmerged."""
        architecture = self.config.architectures[0]
        merged, unmerged = (forward_cost(each, self.input_shape, architecture) for each in (self.config, self.unmerged))
        return merged, unmerged

    @property
    def gflops(self) -> tuple[float, float]:
        """GFLOPs of a forward pass with its matching, merged and unmerged."""
        merged, unmerged = self.costs
        return merged.total_with_matching / 1e9, unmerged.total_with_matching / 1e9


@dataclass(frozen=True, kw_only=True)
class Card:
    """The content of a checkpoint's card.

    Attributes:
        model_id: the folder that becomes the repository.
        revision: branch that the checkpoint becomes, if not the main one.
        source, hub_task: the data, and the Hub's name of the task.
        base_model: the checkpoint that training started from; `None` is from scratch.
        merging: what merges, if anything does before somebody sets it.
        frontier: of the checkpoint, from which others choose what merges.
        measured: the scores. Each one's name and arguments in `model-index` contain r, since the Hub keys results by
            these.
        evaluated_on: number of examples of the scores.
        report: the results of a sweep, in Markdown, in place of a table of `measured`.
        steps: the arguments of each training, `experiments.training.run_record.training_fields`, by its heading.
        trained_on: number of examples of each training.
        labels: names of the classes, if there are any.
        data_fields: the data arguments that are not the default.
        sections: further sections in Markdown, by heading; an empty one is left out.
        environment: machine and versions; by default those of this process.
    """

    model_id: str
    revision: str | None = None
    source: Source
    hub_task: str
    base_model: str | None
    merging: MergingSummary | None = None
    frontier: Frontier | None = None
    measured: Sequence[ResultRow] = ()
    evaluated_on: int = 0
    report: str | None = None
    steps: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    trained_on: int = 0
    labels: Sequence[str] = ()
    data_fields: Mapping[str, Any] = field(default_factory=dict)
    sections: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=describe_environment)

    def write(self, output_dir: Path) -> None:
        """Write the card and its pictures, after all other files of the folder: Trainer may write a card too."""
        if self.merging is not None and self.merging.merges:
            draw_schedule(self.merging.config, *self.merging.costs, output_dir / "schedule.png")
        if self.frontier is not None:
            draw_frontier(self.frontier, output_dir / "frontier.png")
        write_text(output_dir / CARD_FILE, f"{self.render()}\n")

    def render(self) -> ModelCard:
        """Return the card, with every name and value escaped."""
        table = results_table(self.measured) if self.measured else ""
        return ModelCard.from_template(
            self.data,
            str(TEMPLATE),
            card=self,
            usage=USAGES[self.hub_task],
            results_table=table,
            undefined_note=undefined_note(table),
            environment=environment_line(self.environment),
            plain=lambda value: escape_markdown(without_local_paths(value)),
            without_local_paths=without_local_paths,
            quoted=lambda name: json.dumps(name, ensure_ascii=False),
            spelled_r=spelled_r,
            tuple=tuple,
        )

    @property
    def name(self) -> str:
        """Name of the folder or repository."""
        return Path(self.model_id).resolve().name

    @property
    def title(self) -> str:
        """Name of the model."""
        return self.name if self.revision is None else f"{self.name}, {self.revision}"

    @property
    def base_on_hub(self) -> bool:
        """Whether the base model is on the Hub, and not a folder of this machine."""
        return self.base_model is not None and not Path(self.base_model).exists()

    @property
    def licence(self) -> str | None:
        """Licence of the base model, if it is a folder with a card that names it."""
        path = Path(self.base_model or "") / CARD_FILE
        if self.base_model is None or not path.is_file():
            return None
        try:
            return ModelCard.load(path).data.get("license")
        except (ValueError, OSError, YAMLError):
            return None

    @property
    def data(self) -> ModelCardData:
        """The YAML at the head, with every score in `model-index`."""
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
    def trainings(self) -> list[tuple[str, str | None, dict[str, Any]]]:
        """Of each training its heading, that of the one before it, and the arguments to list."""
        listed: list[tuple[str, str | None, dict[str, Any]]] = []
        previous: str | None = None
        for heading, fields in self.steps.items():
            arguments = listed_arguments(fields, None if previous is None else self.steps[previous])
            listed.append((heading, previous, arguments))
            previous = heading
        return listed

    @property
    def example_share(self) -> float | None:
        """A budget that the frontier meets: half of the FLOPs, or the least share, in hundredths."""
        if self.frontier is None:
            return None
        return max(0.5, math.ceil(100 * min(row.flops_ratio for row in self.frontier.rows)) / 100)

    @property
    def example_bound(self) -> float | None:
        """A share of changed answers that the frontier promises, if it promises any: that of its mildest row."""
        if self.frontier is None or all(row.changed_bound is None for row in self.frontier.rows):
            return None
        bound = math.ceil(100 * max(0.01, self.frontier.rows[0].changed_bound or 0.0)) / 100
        return bound if bound < 1 else None


def set_card_repository(folder: Path, repo_id: str) -> None:
    """Make the code in a folder's card load the checkpoint from a repository."""
    path = folder / CARD_FILE
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    addressed = CHECKPOINT_LINE.sub(f'checkpoint = "{repo_id}"', text, count=1)
    if addressed != text:
        write_text(path, addressed)
