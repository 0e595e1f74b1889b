# SPDX-License-Identifier: Apache-2.0
"""What a model is trained and scored on, whatever the inputs are: splits of examples, tasks, prepared tasks.

Letters: B batch.
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
# A line of a terminal has room for about this many names of classes with their counts.
CLASSES_SHOWN = 12


@dataclass
class DataArguments:
    """Which data, and how much of them."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id or local folder, as `datasets.load_dataset` takes it."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
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
    """Where data are from, for reports and model cards.

    Attributes:
        argument: that chose the data, with its value, for error messages.
        dataset: Hub id, or the name of a folder or file on this machine.
        on_hub: whether `dataset` is a Hub id.
        config: name of the dataset's configuration, such as "mrpc".
        split: that is evaluated on.
    """

    argument: str
    dataset: str
    on_hub: bool = False
    config: str | None = None
    split: str = "validation"

    @property
    def name(self) -> str:
        """What people call it: "mrpc", "fashion_mnist"."""
        return self.config or self.dataset.rpartition("/")[2]

    @classmethod
    def of_dataset(cls, dataset: str, config: str | None, split: str = "validation") -> Source:
        """Return the source that `--dataset_name` names."""
        on_hub = not Path(dataset).exists()
        return cls(f"--dataset_name {dataset}", dataset if on_hub else Path(dataset).name, on_hub, config, split)


@dataclass(kw_only=True)
class PreparedTask:
    """A task as a model sees it.

    Classes are the model's in batches and logits, and the task's, by their names, in whatever is scored or written.

    Attributes:
        train: examples that `collate` takes.
        evaluation, prediction: the same, by the suffix that their results carry: "" and, for MNLI, "_mm".
        calibration: examples that are neither trained nor evaluated on, to measure what merging changes; `None` where
            only training examples can be.
        processing_class: the tokenizer or image processor that made them.
        collate: makes a batch of examples.
        predicted: turns logits, with the task's classes in their order, into a class or number for each example, or
            into a row of tokens for each.
        kind: how predictions are scored, a key of `experiments.tasks.scores.SCORES`.
        labels: names of the classes, in the order in which they are scored; empty where nothing is classified.
        label_ids: the model's index of each.
        file_names: of the inputs to predict, by suffix, if they are files.
        reduce_logits: turns a batch's logits and labels into what `predicted` takes, while the evaluation still runs;
            for logits that would not fit in memory all at once. `None`: they are kept as they are.
        trainer_class: makes the Trainer that trains this task, in place of the plain one.
        trained_with: fingerprint of whatever else decides training, such as a teacher.
    """

    train: Any
    evaluation: dict[str, Any]
    prediction: dict[str, Any]
    processing_class: Any
    collate: Callable[[list[dict[str, Any]]], Batch]
    predicted: Callable[[np.ndarray], np.ndarray]
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
        """Callbacks that training needs."""
        return [NextEpoch(self.train)] if isinstance(self.train, RedrawnExamples) else []

    def metrics(self, prediction: EvalPrediction) -> dict[str, float | None]:
        """Score logits for Trainer, which takes figures by name."""
        predictions, references = self.predictions(prediction.predictions), self.references(prediction.label_ids)
        return flatten_scores(score(self.kind, predictions, references))

    def predictions(self, logits: np.ndarray) -> np.ndarray:
        """Turn logits into what is scored: for each example a place in `labels`, a number or a row of tokens."""
        return self.predicted(logits[:, self.label_ids] if self.label_ids else logits)

    def references(self, label_ids: np.ndarray) -> np.ndarray:
        """Turn the labels of a batch into what predictions are compared with."""
        return np.argsort(self.label_ids)[label_ids] if self.label_ids else label_ids

    def written(self, predictions: np.ndarray) -> list[str]:
        """Return predictions as people read them: the names of classes, or numbers."""
        return [self.labels[value] if self.labels else f"{value:.3f}" for value in predictions.tolist()]

    def batch(self, size: int) -> Batch:
        """Return the first `size` evaluated inputs, or fewer, without their labels.

        Where nothing is evaluated, they are those to predict or to train on.
        """
        dataset = next(iter((self.evaluation or self.prediction).values()), self.train)
        batch = dict(self.collate([dataset[index] for index in range(min(size, len(dataset)))]))
        batch.pop(LABELS, None)
        return batch

    def samples(self, count: int, batch_size: int) -> list[Batch]:
        """Return `count` samples, or all there are, spread evenly over those to calibrate on, or else to train on."""
        examples = self.train if self.calibration is None else self.calibration
        # A list, since augmentation makes other images of the same examples every time.
        return list(self.unlabelled(Subset(examples, spread(len(examples), count)), batch_size))

    def unlabelled(self, examples: Any, batch_size: int) -> DataLoader:
        """Return batches of examples without their labels.

        The labels of masked tokens, which come from the text itself, stay: they say which positions are asked for.
        """
        dropped = () if self.kind == "masked_lm" else (LABELS,)

        def collate(batch: list[dict[str, Any]]) -> Batch:
            return dict(self.collate([{name: each[name] for name in each if name not in dropped} for each in batch]))

        return DataLoader(examples, batch_size, collate_fn=collate)


@dataclass
class Task(ABC):
    """Data, unprocessed, and what is asked of it.

    Attributes:
        source: where it is from.
        labels: names of the classes, in the order in which they are scored; empty for regression, and where nothing is
            classified.
        train, evaluation, prediction, calibration: examples, as in `PreparedTask`.
        main_metric: the figure that tables and pictures show.
        read: lines that say what was read, as `read_lines` gives them.
        calibration_name: what messages call the examples of `calibration`.
    """

    source: Source
    labels: list[str]
    train: Dataset
    evaluation: dict[str, Dataset]
    prediction: dict[str, Dataset]
    main_metric: str
    read: list[str] = field(default_factory=list, kw_only=True)
    calibration: Dataset | None = field(default=None, kw_only=True)
    calibration_name: str = field(default="inputs of the test split", kw_only=True)

    hub_task: ClassVar[str]
    """The Hub's name for such a task, such as "text-classification"."""
    input_name: ClassVar[str]
    """The model's argument for the inputs."""
    classifies: ClassVar[bool] = True
    """Whether the model's labels are to be the task's: one for each class, or a single one for regression."""

    @abstractmethod
    def model_class_name(self, config: ToMePerceiverConfig) -> str:
        """Return the name of the model class for a config.

        Raises:
            BadInput: if the config is for another task.
        """

    @abstractmethod
    def processing_class(self, config: ToMePerceiverConfig, name: str | None, **download: Any) -> Any:
        """Return the tokenizer or image processor called `name`, by default one that fits a model from scratch."""

    @abstractmethod
    def fit_config(self, config: ToMePerceiverConfig, processing_class: Any) -> None:
        """Give the config of a model from scratch the sizes that the processing class asks for."""

    def first_input(self, prepared: PreparedTask) -> str | None:
        """Return the first example as the model sees it, if a line can show that."""
        return None

    @abstractmethod
    def prepared(self, config: ToMePerceiverConfig, processing_class: Any, seed: int) -> PreparedTask:
        """Return the task as a model with this config sees it.

        Raises:
            BadInput: if the processing class does not fit the config.
        """


@dataclass(frozen=True)
class Splits:
    """The splits of the data.

    Attributes:
        argument: that chose the data, with its value.
        by_name: the splits.
        own_arguments: arguments that chose a single split, by its name.
    """

    argument: str
    by_name: Mapping[str, Dataset]
    own_arguments: Mapping[str, str] = field(default_factory=dict)

    def where(self, name: str) -> str:
        """Return what messages call a split."""
        return f"{self.own_arguments.get(name, self.argument)}: split '{name}'"

    def take(self, name: str, count: int | None = None) -> Dataset:
        """Return the first `count` examples of a split, by default all.

        Raises:
            BadInput: if there is no such split, or nothing in it.
        """
        if name not in self.by_name:
            raise BadInput(f"{self.argument}: has no split '{name}', only {', '.join(sorted(self.by_name))}")
        if len(self.by_name[name]) == 0:
            raise BadInput(f"{self.argument}: its split '{name}' is empty; it must have one example or more")
        return first_examples(self.by_name[name], count)

    def has_labels(self, name: str) -> bool:
        """Whether there is a split of this name with labels."""
        return name in self.by_name and has_labels(self.by_name[name], LABEL)

    def evaluated(self) -> str:
        """Return the split to evaluate on: "validation", or else "test" if it has labels.

        Raises:
            BadInput: if there is neither.
        """
        if "validation" in self.by_name:
            return "validation"
        if self.has_labels("test"):
            logger.warning("%s: has no split 'validation'; evaluated on its split 'test'", self.argument)
            return "test"
        raise BadInput(
            f"{self.argument}: has nothing to evaluate on; use data with a split 'validation', or 'test' with labels, "
            f"instead of {', '.join(sorted(self.by_name))}"
        )

    def unseen(self, name: str, evaluated: Collection[str], count: int) -> Dataset | None:
        """Return `count` examples of a test split without labels to calibrate on, spread evenly.

        `None` if none are wanted, there are none, or the split is one of those that are evaluated.
        """
        split = self.by_name.get(name)
        if count == 0 or name in evaluated or not split:
            return None
        return without_column(split.select(spread(len(split), count)), LABEL)


def first_examples(dataset: Dataset, count: int | None) -> Dataset:
    """Return the first `count` examples of a dataset, or all if there are fewer or `count` is `None`."""
    return dataset if count is None else dataset.select(range(min(count, len(dataset))))


def without_column(dataset: Dataset, column: str) -> Dataset:
    """Return a dataset without a column, if it has it."""
    return dataset.select_columns([name for name in dataset.column_names if name != column])


def spread(available: int, count: int) -> list[int]:
    """Return the places of at most `count` examples, spread evenly over all."""
    return [place * available // count for place in range(count)] if count < available else list(range(available))


def hold_out(task: Task, count: int) -> None:
    """Move examples from training to calibration, drawn at random but the same in every run.

    Raises:
        BadInput: if that is more than half of them.
    """
    available = len(task.train)
    if 2 * count > available:
        raise BadInput(
            f"--calibration_samples {count}: would hold out more than half of the {available:,} training samples; use "
            f"at most {available // 2}, or give a test split"
        )
    order = np.random.default_rng(0).permutation(available)
    task.calibration, task.calibration_name = task.train.select(np.sort(order[:count])), "held-out training samples"
    task.train = task.train.select(np.sort(order[count:]))


def read_lines(used: str, splits: Mapping[str, Dataset], labels: Sequence[str]) -> list[str]:
    """Return lines that tell a user what was read of their data.

    Args:
        used: the argument that chose the data, and which columns or folders were used for what.
        splits: examples by what they are for; the labels of the first that has any are counted.
        labels: names of the classes; empty where labels are numbers.
    """
    lines = [used, ", ".join(f"{name}: {len(split):,} examples" for name, split in splits.items())]
    for name, split in splits.items():
        if LABEL not in split.column_names:
            continue
        values = split[LABEL][:]
        if labels:
            counts = Counter(values)
            shown = [f"{each!r} {counts[index]:,}" for index, each in enumerate(labels[:CLASSES_SHOWN])]
            more = f" and {len(labels) - CLASSES_SHOWN} more" if len(labels) > CLASSES_SHOWN else ""
            lines.append(f"{len(labels)} classes, in {name}: {', '.join(shown)}{more}")
        elif values:
            lines.append(f"labels are numbers (regression), in {name} from {min(values):g} to {max(values):g}")
        break
    return lines
