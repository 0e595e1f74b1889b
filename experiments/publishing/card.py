# SPDX-License-Identifier: Apache-2.0
"""Model card of a checkpoint: `card.md.jinja` filled with the results and arguments of a run, with YAML for the Hub."""

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
from merging_tome_perceiver import EXPERIMENT_ONLY_METHODS

R = int | list[int] | str

CARD_FILE = "README.md"
TEMPLATE = Path(__file__).with_name("card.md.jinja")
# Line of the card's example code that names the checkpoint to load.
CHECKPOINT_LINE = re.compile(r'^checkpoint = ".*"$', re.MULTILINE)
# Training arguments that every card lists; all others are listed only if they are not the default.
ALWAYS_LISTED = (
    "seed", "num_train_epochs", "max_steps", "learning_rate", "weight_decay", "warmup_steps", "lr_scheduler_type",
    "optim", "bf16", "fp16", "per_device_train_batch_size", "gradient_accumulation_steps", "processes",
)  # fmt: skip
# Values that `TrainingArguments` fills in when an argument is not given, so they count as defaults.
FILLED_DEFAULTS = {"accelerator_config": str(AcceleratorConfig())}
METRIC_NAMES = {"f1": "F1", "mse": "MSE", "pearson": "Pearson", "spearmanr": "Spearman"}


class Usage(NamedTuple):
    """Names of the classes that load a checkpoint and preprocess its inputs, and example inputs as source code."""

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
"""Usage by pipeline tag, the Hub's name of a task."""


@dataclass(frozen=True)
class ResultRow:
    """A row of a card's table of results.

    Attributes:
        name: name of the row.
        r: latents merged in each layer, from `shown_r`.
        scores: scores by name.
    """

    name: str
    r: R
    scores: Scores


def undefined_note(table: str) -> str:
    """Return a sentence that explains undefined scores if the table has any, otherwise an empty string."""
    note = " A score is undefined where all labels or all predictions are equal."
    return note if UNDEFINED in table else ""


def metric_name(metric: str) -> str:
    """Return the name of a metric for readers, such as "F1"."""
    return METRIC_NAMES.get(metric, metric.replace("_", " ").capitalize())


def shown_r(merging: Merging | ToMePerceiverConfig) -> R:
    """Return the value of the column r: r of a config, or words if fixed groups merge latents."""
    if not (merging.merge_groups or merging.latent_groups):
        return merging.r
    merges = any(merging.r) if isinstance(merging.r, list) else merging.r
    return f"fixed groups, then {spelled_r(merging.r)}" if merges else "fixed groups"


def results_table(results: Sequence[ResultRow]) -> str:
    """Return a Markdown table of the results, with the change of every score that was compared."""
    header, columns = ["", "r"], [[row.name, spelled_r(row.r)] for row in results]
    for name in results[0].scores:
        compared = any(row.scores[name].compared for row in results)
        header += [metric_name(name), *(["change, paired by example"] if compared else [])]
        for row, cells in zip(results, columns, strict=True):
            score = row.scores[name]
            cells.append(with_error(score.value, score.stderr, ".4f"))
            if compared:
                cells.append(with_error(score.change, score.change_stderr, "+.4f") if score.compared else "")
    return markdown_table(header, columns)


def listed_arguments(fields: Mapping[str, Any], previous: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the training arguments to list: the main ones, and others that are not the default.

    Args:
        fields: arguments of a training.
        previous: arguments of the training before it; if given, only the differences are listed.
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
    """Merging settings of a checkpoint, their cost and their measured speed-up.

    Attributes:
        config: config of the checkpoint.
        input_shape: shape of one input, (1, S) or (1, 3, height, width), for which FLOPs are counted.
        budget: description of the budget that the merging was chosen for, if any.
        unmerged: config of the unmerged model.
        speedup: measured speed-up over the unmerged model.
        batch_size: batch size of that measurement.
    """

    config: ToMePerceiverConfig
    input_shape: Sequence[int]
    budget: str | None
    unmerged: ToMePerceiverConfig
    speedup: Quartiles | None = None
    batch_size: int = 0

    @property
    def merges(self) -> bool:
        """Whether the checkpoint merges anything."""
        return Merging.of(self.config).merges(self.unmerged)

    @cached_property
    def costs(self) -> tuple[ForwardCost, ForwardCost]:
        """Costs of a forward pass, merged and unmerged."""
        architecture = self.config.architectures[0]
        merged, unmerged = (
            forward_cost(config, self.input_shape, architecture) for config in (self.config, self.unmerged)
        )
        return merged, unmerged

    @property
    def gflops(self) -> tuple[float, float]:
        """GFLOPs of a forward pass, including matching, merged and unmerged."""
        merged, unmerged = self.costs
        return merged.total_with_matching / 1e9, unmerged.total_with_matching / 1e9


@dataclass(frozen=True, kw_only=True)
class Card:
    """Content of a checkpoint's card.

    Attributes:
        model_id: folder of the checkpoint; its name becomes that of the repository.
        revision: Hub branch of the checkpoint; `None` for the main branch.
        source: origin of the data.
        hub_task: pipeline tag, the Hub's name of the task.
        base_model: checkpoint that training started from; `None` for a model from scratch.
        merging: merging settings saved in the checkpoint's config; `None` for the unmerged checkpoint of a sweep.
        frontier: frontier saved in the checkpoint's config, if any.
        results: rows of the table of results. In `model-index`, names and arguments contain r, since the Hub tells
            results apart by these.
        evaluated_on: number of evaluated examples.
        report: report of a sweep in Markdown, which replaces the table of results.
        trainings: arguments of each training, from `experiments.training.run_record.training_fields`, by heading.
        trained_on: number of training examples.
        labels: names of the classes, if any.
        data_fields: data arguments that are not the default.
        sections: further sections in Markdown by heading; empty ones are left out.
        environment: machine and versions; by default those of this process.
    """

    model_id: str
    revision: str | None = None
    source: Source
    hub_task: str
    base_model: str | None
    merging: MergingSummary | None = None
    frontier: Frontier | None = None
    results: Sequence[ResultRow] = ()
    evaluated_on: int = 0
    report: str | None = None
    trainings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    trained_on: int = 0
    labels: Sequence[str] = ()
    data_fields: Mapping[str, Any] = field(default_factory=dict)
    sections: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=describe_environment)

    def write(self, output_dir: Path) -> None:
        """Write the card and its pictures. Call it after the Trainer, which may write a card of its own."""
        if self.merging is not None and self.merging.merges:
            draw_schedule(self.merging.config, *self.merging.costs, output_dir / "schedule.png")
        if self.frontier is not None:
            draw_frontier(self.frontier, output_dir / "frontier.png")
        write_text(output_dir / CARD_FILE, f"{self.render()}\n")

    def render(self) -> ModelCard:
        """Return the card, with every name and value escaped."""
        table = results_table(self.results) if self.results else ""
        return ModelCard.from_template(
            self.data,
            str(TEMPLATE),
            card=self,
            usage=USAGES[self.hub_task],
            results_table=table,
            undefined_note=undefined_note(table),
            environment=environment_line(self.environment),
            plain=lambda value: escape_markdown(without_local_paths(value)),
            quoted=lambda name: json.dumps(name, ensure_ascii=False),
            spelled_r=spelled_r,
            experiment_only_methods=EXPERIMENT_ONLY_METHODS,
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
        """Whether the base model is on the Hub rather than in a local folder."""
        return self.base_model is not None and not Path(self.base_model).exists()

    @property
    def licence(self) -> str | None:
        """Licence of the base model, if that is a local folder whose card names one."""
        path = Path(self.base_model or "") / CARD_FILE
        if self.base_model is None or not path.is_file():
            return None
        try:
            return ModelCard.load(path).data.get("license")
        except (ValueError, OSError, YAMLError):
            return None

    @property
    def data(self) -> ModelCardData:
        """YAML metadata at the head of the card, with all scores in `model-index`."""
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
            for row in self.results
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
    def listed_trainings(self) -> list[tuple[str, str | None, dict[str, Any]]]:
        """For each training: its heading, the heading of the training before it, and the arguments to list."""
        listed: list[tuple[str, str | None, dict[str, Any]]] = []
        previous: str | None = None
        for heading, fields in self.trainings.items():
            arguments = listed_arguments(fields, None if previous is None else self.trainings[previous])
            listed.append((heading, previous, arguments))
            previous = heading
        return listed

    @property
    def example_share(self) -> float | None:
        """A share of the FLOPs for example code: 0.5, or the frontier's lowest share if that is higher."""
        if self.frontier is None:
            return None
        return max(0.5, math.ceil(100 * min(row.flops_ratio for row in self.frontier.rows)) / 100)

    @property
    def example_bound(self) -> float | None:
        """Bound on changed answers for example code that the frontier's mildest row keeps; `None` without one."""
        if self.frontier is None or all(row.changed_bound is None for row in self.frontier.rows):
            return None
        bound = math.ceil(100 * max(0.01, self.frontier.rows[0].changed_bound or 0.0)) / 100
        return bound if bound < 1 else None


def set_card_repository(folder: Path, repo_id: str) -> None:
    """Make the example code of a folder's card load the checkpoint from a Hub repository."""
    path = folder / CARD_FILE
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    changed = CHECKPOINT_LINE.sub(f'checkpoint = "{repo_id}"', text, count=1)
    if changed != text:
        write_text(path, changed)
