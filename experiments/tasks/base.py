# SPDX-License-Identifier: Apache-2.0
"""Base classes of all tasks: data arguments, splits, `Task` (raw data) and `PreparedTask` (model inputs and scoring).

`glue`, `mlm` and `images` subclass them; training, evaluation and the scripts use only what is defined here.

Shapes: B batch size.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from transformers import EvalPrediction, TrainerCallback

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.errors import BadInput
from experiments.tasks.labels import LABEL, has_labels
from experiments.tasks.redrawn_examples import NextEpoch, RedrawnExamples
from experiments.tasks.scores import flatten_scores, score

logger = logging.getLogger(__name__)

Batch = dict[str, Tensor]
LABELS = "labels"
# Maximum number of classes shown with their counts: about one line of a terminal.
MAX_CLASSES_SHOWN = 12


@dataclass
class DataArguments:
    """Arguments that choose the data and limit the number of examples."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset to load with `datasets.load_dataset`: Hub id or local folder."}
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of the dataset, as on the Hub."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Use at most this many training examples, shuffled."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on at most this many examples, the first ones."}
    )
    max_predict_samples: int | None = field(
        default=None, metadata={"help": "Predict for at most this many examples, the first ones."}
    )

    def __post_init__(self) -> None:
        for name in ("max_train_samples", "max_eval_samples", "max_predict_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadInput(f"--{name} {value}: must be an integer of 1 or more")


@dataclass(frozen=True)
class Source:
    """Origin of the data, for reports and model cards.

    Attributes:
        argument: the argument that chose the data, with its value, for error messages.
        dataset: Hub id, or the name of a local folder or file.
        on_hub: whether `dataset` is a Hub id.
        config: name of the dataset's configuration, such as "mrpc".
        split: the split used for evaluation.
    """

    argument: str
    dataset: str
    on_hub: bool = False
    config: str | None = None
    split: str = "validation"

    @property
    def name(self) -> str:
        """Short name of the data, such as "mrpc" or "fashion_mnist"."""
        return self.config or self.dataset.rpartition("/")[2]

    @classmethod
    def of_dataset(cls, dataset: str, config: str | None, split: str = "validation") -> Source:
        """Return the source for a value of `--dataset_name`, a Hub id or a local folder."""
        on_hub = not Path(dataset).exists()
        return cls(f"--dataset_name {dataset}", dataset if on_hub else Path(dataset).name, on_hub, config, split)


@dataclass(kw_only=True)
class PreparedTask:
    """A task as model inputs, with everything needed to train on it and score it.

    Class indices in batches and logits follow the model's config; predictions and references follow the order of
    `labels`. `label_ids` maps between the two.

    Attributes:
        train: training examples, in the form that `collate` takes.
        evaluation, prediction: examples to evaluate on and to predict, by the suffix of their results: "", and for MNLI
            also "_mm".
        calibration: unlabelled samples that are neither trained nor evaluated on, for measuring how merging changes
            outputs; `None`: use training examples.
        processing_class: the tokenizer or image processor that made the examples.
        collate: makes a batch from a list of examples.
        decode_logits: maps logits, whose columns are in the order of `labels`, to a class, a number or a row of tokens
            for each example.
        kind: how predictions are scored, a key of `experiments.tasks.scores.SCORES`.
        labels: names of the classes, in the order used for scoring; empty if the task is not classification.
        label_ids: the model's class index of each label.
        file_names: names of the input files to predict, by suffix; empty if inputs are not files.
        reduce_logits: maps a batch's logits and labels to the input of `decode_logits` during evaluation, for logits
            too large to keep in memory for all batches. `None`: keep the logits.
        trainer_class: Trainer class for this task; `None`: the default one.
        trained_with: fingerprint of anything else that affects training, such as a teacher.
    """

    train: Any
    evaluation: dict[str, Any]
    prediction: dict[str, Any]
    processing_class: Any
    collate: Callable[[list[dict[str, Any]]], Batch]
    decode_logits: Callable[[np.ndarray], np.ndarray]
    kind: str
    labels: list[str] = field(default_factory=list)
    label_ids: list[int] = field(default_factory=list)
    file_names: dict[str, list[str]] = field(default_factory=dict)
    reduce_logits: Callable[[Tensor, Tensor], Tensor] | None = None
    trainer_class: Callable[..., Any] | None = None
    trained_with: str | None = None
    calibration: Any = None

    @property
    def callbacks(self) -> list[TrainerCallback]:
        """Trainer callbacks that these training examples need."""
        return [NextEpoch(self.train)] if isinstance(self.train, RedrawnExamples) else []

    def metrics(self, prediction: EvalPrediction) -> dict[str, float | None]:
        """Score logits, as `compute_metrics` of a Trainer."""
        predictions, references = self.predictions(prediction.predictions), self.references(prediction.label_ids)
        return flatten_scores(score(self.kind, predictions, references))

    def predictions(self, logits: np.ndarray) -> np.ndarray:
        """Decode logits: for each example an index into `labels`, a number or a row of tokens."""
        return self.decode_logits(logits[:, self.label_ids] if self.label_ids else logits)

    def references(self, label_ids: np.ndarray) -> np.ndarray:
        """Map class indices of the model to indices into `labels`, to compare with `predictions`."""
        return np.argsort(self.label_ids)[label_ids] if self.label_ids else label_ids

    def to_text(self, predictions: np.ndarray) -> list[str]:
        """Return predictions as text for output files: names of classes, or numbers."""
        return [self.labels[value] if self.labels else f"{value:.3f}" for value in predictions.tolist()]

    def batch(self, size: int) -> Batch:
        """Return a batch of the first `size` evaluation inputs, or all if there are fewer, without labels.

        If nothing is evaluated, take inputs to predict, or else training inputs.
        """
        dataset = next(iter((self.evaluation or self.prediction).values()), self.train)
        batch = dict(self.collate([dataset[index] for index in range(min(size, len(dataset)))]))
        batch.pop(LABELS, None)
        return batch

    def samples(self, count: int, batch_size: int) -> list[Batch]:
        """Return batches of `count` unlabelled samples, or all if there are fewer.

        They are spread evenly over the calibration examples or, without any, over the training examples.
        """
        examples = self.train if self.calibration is None else self.calibration
        # A list keeps the samples fixed: augmentation would draw other images at every iteration.
        return list(self.unlabelled(Subset(examples, spread_evenly(len(examples), count)), batch_size))

    def unlabelled(self, examples: Any, batch_size: int) -> DataLoader:
        """Return batches of examples without labels.

        Labels of masked language modelling stay: they come from the text itself and mark the masked positions.
        """
        dropped = () if self.kind == "masked_lm" else (LABELS,)

        def collate(batch: list[dict[str, Any]]) -> Batch:
            return dict(self.collate([{name: row[name] for name in row if name not in dropped} for row in batch]))

        return DataLoader(examples, batch_size, collate_fn=collate)


@dataclass
class Task(ABC):
    """Unprocessed data of a task; each subclass defines the model classes and the processing for one kind of input.

    Attributes:
        source: origin of the data.
        labels: names of the classes, in the order used for scoring; empty if the task is not classification.
        train, evaluation, prediction, calibration: unprocessed examples, used as in `PreparedTask`.
        main_metric: name of the score shown in tables and pictures.
        summary: lines that tell the user what was read, see `summarize_data`.
        calibration_name: name of the calibration examples in messages.
    """

    source: Source
    labels: list[str]
    train: Dataset
    evaluation: dict[str, Dataset]
    prediction: dict[str, Dataset]
    main_metric: str
    summary: list[str] = field(default_factory=list, kw_only=True)
    calibration: Dataset | None = field(default=None, kw_only=True)
    calibration_name: str = field(default="inputs of the test split", kw_only=True)

    hub_task: ClassVar[str]
    """Name of the task on the Hub, such as "text-classification"."""
    input_name: ClassVar[str]
    """Name of the model's input argument, such as "input_ids"."""
    classifies: ClassVar[bool] = True
    """Whether the model has an output for each class, or one for regression; false for masked language models."""

    @abstractmethod
    def model_class_name(self, config: ToMePerceiverConfig) -> str:
        """Return the name of the model class for a config.

        Raises:
            BadInput: if the architecture in the config is for another task.
        """

    @abstractmethod
    def processing_class(self, config: ToMePerceiverConfig, name: str | None, **download: Any) -> Any:
        """Return the tokenizer or image processor called `name` or, for `None`, the default of a model from scratch."""

    @abstractmethod
    def fit_config(self, config: ToMePerceiverConfig, processing_class: Any) -> None:
        """Set the config's sizes that depend on the processing class; called for a model from scratch."""

    def first_input(self, prepared: PreparedTask) -> str | None:
        """Describe the first model input in one line, or return `None` if the input cannot be shown as text."""
        return None

    @abstractmethod
    def prepare(self, config: ToMePerceiverConfig, processing_class: Any, seed: int) -> PreparedTask:
        """Turn the data into inputs for a model with this config.

        Raises:
            BadInput: if the processing class does not fit the config.
        """


@dataclass(frozen=True)
class Splits:
    """Splits of the data by name, with the arguments that chose them.

    Attributes:
        argument: the argument that chose the data, with its value.
        by_name: the splits.
        own_arguments: for each split that has an argument of its own, this argument with its value.
    """

    argument: str
    by_name: Mapping[str, Dataset]
    own_arguments: Mapping[str, str] = field(default_factory=dict)

    def describe(self, name: str) -> str:
        """Return the name of a split for messages, with the argument that chose it."""
        return f"{self.own_arguments.get(name, self.argument)}: split '{name}'"

    def take(self, name: str, count: int | None = None) -> Dataset:
        """Return the first `count` examples of a split, by default all.

        Raises:
            BadInput: if the split is missing or empty.
        """
        if name not in self.by_name:
            raise BadInput(f"{self.argument}: has no split '{name}', only {', '.join(sorted(self.by_name))}")
        if len(self.by_name[name]) == 0:
            raise BadInput(f"{self.argument}: split '{name}' is empty; it must have at least one example")
        return first_examples(self.by_name[name], count)

    def has_labels(self, name: str) -> bool:
        """Whether a split of this name exists and has labels."""
        return name in self.by_name and has_labels(self.by_name[name], LABEL)

    def choose_evaluated(self) -> str:
        """Return the name of the split to evaluate on: "validation", or else "test" if it has labels.

        Raises:
            BadInput: if neither exists.
        """
        if "validation" in self.by_name:
            return "validation"
        if self.has_labels("test"):
            logger.warning("%s: has no split 'validation'; evaluating on its split 'test'", self.argument)
            return "test"
        raise BadInput(
            f"{self.argument}: has nothing to evaluate on; use data with a split 'validation', or 'test' with labels, "
            f"instead of {', '.join(sorted(self.by_name))}"
        )

    def take_unlabelled(self, name: str, evaluated: Collection[str], count: int) -> Dataset | None:
        """Return `count` unlabelled samples of a test split, spread evenly over it.

        Return `None` if `count` is 0, or if the split is missing, empty or evaluated.
        """
        split = self.by_name.get(name)
        if count == 0 or name in evaluated or not split:
            return None
        return without_column(split.select(spread_evenly(len(split), count)), LABEL)


def first_examples(dataset: Dataset, count: int | None) -> Dataset:
    """Return the first `count` examples of a dataset; all if it has fewer or `count` is `None`."""
    return dataset if count is None else dataset.select(range(min(count, len(dataset))))


def without_column(dataset: Dataset, column: str) -> Dataset:
    """Return a dataset without the column; unchanged if it has no such column."""
    return dataset.select_columns([name for name in dataset.column_names if name != column])


def spread_evenly(available: int, count: int) -> list[int]:
    """Return at most `count` indices, spread evenly over `range(available)`."""
    return [index * available // count for index in range(count)] if count < available else list(range(available))


def hold_out(task: Task, count: int) -> None:
    """Move `count` training examples to calibration, drawn at random with a fixed seed.

    Raises:
        BadInput: if that is more than half of the training examples.
    """
    available = len(task.train)
    if 2 * count > available:
        raise BadInput(
            f"--calibration_samples {count}: would hold out more than half of the {available:,} training samples; use "
            f"at most {available // 2}, or add a test split"
        )
    order = np.random.default_rng(0).permutation(available)
    task.calibration, task.calibration_name = task.train.select(np.sort(order[:count])), "held-out training samples"
    task.train = task.train.select(np.sort(order[count:]))


def summarize_data(used: str, splits: Mapping[str, Dataset], labels: Sequence[str]) -> list[str]:
    """Return lines that tell the user which data were read: columns, number of examples, labels.

    Args:
        used: the first line, which names the argument that chose the data and says how columns or folders are used.
        splits: examples by purpose; labels are summarized for the first split that has any.
        labels: names of the classes; empty if labels are numbers.
    """
    lines = [used, ", ".join(f"{name}: {len(split):,} examples" for name, split in splits.items())]
    for name, split in splits.items():
        if LABEL not in split.column_names:
            continue
        values = split[LABEL][:]
        if labels:
            counts = Counter(values)
            shown = [f"{label!r} {counts[index]:,}" for index, label in enumerate(labels[:MAX_CLASSES_SHOWN])]
            more = f" and {len(labels) - MAX_CLASSES_SHOWN} more" if len(labels) > MAX_CLASSES_SHOWN else ""
            lines.append(f"{len(labels)} classes, in {name}: {', '.join(shown)}{more}")
        elif values:
            lines.append(f"labels are numbers (regression), in {name} from {min(values):g} to {max(values):g}")
        break
    return lines
