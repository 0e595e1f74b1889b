# SPDX-License-Identifier: Apache-2.0
"""What a model is trained and scored on, whatever the inputs are: datasets, labels, metrics.

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
from datasets import Dataset, DatasetDict
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from transformers import EvalPrediction, TrainerCallback

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.errors import BadInput
from experiments.tasks.scores import flatten_scores, score

logger = logging.getLogger(__name__)

Batch = dict[str, Tensor]
LABELS = "labels"
# A line of a terminal has room for about as many names of classes with their counts.
CLASSES_SHOWN = 12


@dataclass
class SampleArguments:
    """How much of the data."""

    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many (shuffled) only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first so many only."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Predict for the first so many only."})

    def __post_init__(self) -> None:
        for name in SampleArguments.__dataclass_fields__:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadInput(f"--{name} {value}: allowed is an integer of 1 or more")


@dataclass(frozen=True)
class Source:
    """Where data are from, for reports and model cards.

    Attributes:
        argument: that chose the data, with its value, for error messages.
        dataset: Hub id, or the name of what is on this machine only.
        on_hub: which of them.
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
    def of_dataset(cls, dataset: str, config: str | None, split: str) -> Source:
        """Of what `--dataset_name` names."""
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
        collate: from examples to a batch.
        predicted: from logits, the task's classes in their order, to a class or number for each example, or to a row of
            tokens for each.
        kind: how predictions are scored, a key of `experiments.tasks.scores.SCORES`.
        labels: names of the classes, in the order in which they are scored; empty where nothing is classified.
        label_ids: the model's index of each.
        callbacks: that training needs.
        file_names: of the inputs to predict, by suffix, if they are files.
        reduce_logits: from a batch's logits and labels to what `predicted` takes, while the evaluation still runs; for
            logits that would not fit in memory all at once. `None`: they are kept as they are.
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
    callbacks: list[TrainerCallback] = field(default_factory=list)
    file_names: dict[str, list[str]] = field(default_factory=dict)
    reduce_logits: Callable[[Tensor, Tensor], Tensor] | None = None
    trainer_class: Callable[..., Any] | None = None
    trained_with: str | None = None
    calibration: Any = None

    def metrics(self, prediction: EvalPrediction) -> dict[str, float | None]:
        """Score logits for Trainer, which takes figures by name."""
        predictions, references = self.predictions(prediction.predictions), self.references(prediction.label_ids)
        return flatten_scores(score(self.kind, predictions, references))

    def predictions(self, logits: np.ndarray) -> np.ndarray:
        """From logits to what is scored: for each example a place in `labels`, a number or a row of tokens."""
        return self.predicted(logits[:, self.label_ids] if self.label_ids else logits)

    def references(self, label_ids: np.ndarray) -> np.ndarray:
        """The same of a batch's labels."""
        return np.argsort(self.label_ids)[label_ids] if self.label_ids else label_ids

    def written(self, predictions: np.ndarray) -> list[str]:
        """Predictions as people read them: the names of classes, or numbers."""
        return [self.labels[value] if self.labels else f"{value:.3f}" for value in predictions.tolist()]

    def batch(self, size: int) -> Batch:
        """The first `size` evaluated inputs, fewer if there are no more, without their labels.

        Where nothing is evaluated, those to predict or to train on.
        """
        dataset = next(iter((self.evaluation or self.prediction).values()), self.train)
        batch = dict(self.collate([dataset[index] for index in range(min(size, len(dataset)))]))
        batch.pop(LABELS, None)
        return batch

    def samples(self, count: int, batch_size: int) -> list[Batch]:
        """Return samples without their labels, spread evenly over those to calibrate on, or else to train on.

        Args:
            count: number of samples, or all if there are fewer.
            batch_size: B.
        """
        examples = self.train if self.calibration is None else self.calibration
        # Held, since what augmentation makes of an image is another every time.
        return list(self.unlabelled(Subset(examples, spread(len(examples), count)), batch_size))

    def unlabelled(self, examples: Any, batch_size: int) -> DataLoader:
        """Batches of examples without their labels, which can be gone through again.

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
        calibration_name: what the examples of `calibration` are, for messages.
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
        """Which of our classes a config is for.

        Raises:
            BadInput: if it is for another task.
        """

    @abstractmethod
    def processing_class(self, config: ToMePerceiverConfig, name: str | None, **download: Any) -> Any:
        """The tokenizer or image processor called `name`; with no name, one that fits a model from scratch."""

    @abstractmethod
    def fit_config(self, config: ToMePerceiverConfig, processing_class: Any) -> None:
        """Give the config of a model from scratch the sizes that the processing class asks for."""

    def first_input(self, prepared: PreparedTask) -> str | None:
        """The first example as the model sees it, if that can be shown in a line."""
        return None

    @abstractmethod
    def prepared(self, config: ToMePerceiverConfig, processing_class: Any, seed: int) -> PreparedTask:
        """The task as a model with this config sees it.

        Raises:
            BadInput: if the processing class does not fit the config.
        """


def read_lines(
    argument: str,
    used: str,
    splits: Mapping[str, Dataset],
    label: str,
    labels: Sequence[str],
    dropped: Sequence[str] = (),
) -> list[str]:
    """Lines that tell a user what was read of their data, at most four.

    Args:
        argument: that chose the data, with its value.
        used: which columns or folders were used for what, and which were not.
        splits: examples by split; the first one that has labels is counted.
        label: column of the labels: places in `labels`, or numbers where that is empty.
        labels: names of the classes.
        dropped: what was left out and why.
    """
    lines = [f"{argument}: {used}", ", ".join(f"{name}: {len(split):,} examples" for name, split in splits.items())]
    counted = next(((name, split[label]) for name, split in splits.items() if label in split.column_names), None)
    if counted is not None:
        name, values = counted[0], list(counted[1])
        if labels:
            counts = Counter(values)
            shown = [f"{each!r} {counts[index]:,}" for index, each in enumerate(labels[:CLASSES_SHOWN])]
            more = f" and {len(labels) - CLASSES_SHOWN} more" if len(labels) > CLASSES_SHOWN else ""
            lines.append(f"{len(labels)} classes, in {name}: {', '.join(shown)}{more}")
        elif values:
            lines.append(f"labels are numbers (regression), in {name} from {min(values):g} to {max(values):g}")
    return lines + ([f"left out: {'; '.join(dropped)}"] if dropped else [])


def take_split(splits: DatasetDict, name: str, argument: str, count: int | None) -> Dataset:
    """A split's first `count` examples.

    Args:
        splits: all there are.
        name: of the split.
        argument: that chose the data, with its value.
        count: `None` for all of them.

    Raises:
        BadInput: if there is no such split, or nothing in it.
    """
    if name not in splits:
        raise BadInput(f"{argument}: has no split '{name}', only {', '.join(sorted(splits))}")
    dataset = splits[name]
    if len(dataset) == 0:
        raise BadInput(f"{argument}: its split '{name}' is empty; allowed is one example or more")
    return first_examples(dataset, count)


def first_examples(dataset: Dataset, count: int | None) -> Dataset:
    """As many of a dataset's first examples, or all if there are fewer or `count` is `None`."""
    return dataset if count is None else dataset.select(range(min(count, len(dataset))))


def spread(available: int, count: int) -> list[int]:
    """Return the places of at most `count` examples, spread evenly over all."""
    return [place * available // count for place in range(count)] if count < available else list(range(available))


def unseen_split(splits: Mapping[str, Dataset], name: str, evaluated: Collection[str], count: int) -> Dataset | None:
    """Return examples of the test split to calibrate on, spread evenly; `None` if none are wanted or there are none.

    Args:
        splits: all there are.
        name: of the test split.
        evaluated: splits that are evaluated on.
        count: number of examples at most; 0 for none.
    """
    if count == 0 or name in evaluated or not len(splits.get(name, ())):
        return None
    return splits[name].select(spread(len(splits[name]), count))


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


def evaluated_split(splits: DatasetDict, argument: str, labelled: Callable[[Dataset], bool]) -> str:
    """What there is to evaluate on: "validation", or else "test" if that has labels.

    Args:
        splits: all there are.
        argument: that chose the data, with its value.
        labelled: whether a split has labels.

    Raises:
        BadInput: if there is neither.
    """
    if "validation" in splits:
        return "validation"
    if "test" in splits and labelled(splits["test"]):
        logger.warning("%s: has no split 'validation'; evaluated on its split 'test'", argument)
        return "test"
    raise BadInput(
        f"{argument}: has nothing to evaluate on; allowed is a split 'validation', or 'test' with labels, here "
        f"{', '.join(sorted(splits))}"
    )
