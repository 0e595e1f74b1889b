# SPDX-License-Identifier: Apache-2.0
"""What a model is trained and scored on, whatever the inputs are: datasets, labels, metrics.

Letters: B batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, DownloadMode, VerificationMode
from datasets.exceptions import DatasetsError
from torch import Tensor
from transformers import EvalPrediction, TrainerCallback

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.bad_input import BadInput
from experiments.scores import standard_errors

Batch = dict[str, Tensor]
NOT_THERE: tuple[type[Exception], ...] = (OSError, ValueError, DatasetsError)
"""What `datasets` raises of data that are not there or cannot be read."""
READ_ANEW = {"download_mode": DownloadMode.FORCE_REDOWNLOAD, "verification_mode": VerificationMode.NO_CHECKS}
"""For `datasets.load_dataset`, which knows a folder with several configurations by its name, whatever has changed."""


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


@dataclass
class PreparedTask:
    """A task as a model sees it.

    Attributes:
        train: examples that `collate` takes.
        evaluation, prediction: the same, by the suffix that their results carry: "" and, for MNLI, "_mm".
        processing_class: the tokenizer or image processor that made them.
        collate: from examples to a batch.
        predicted: from logits to classes or numbers, one for each example, or to a row of tokens for each.
        kind: how predictions are scored, a key of `experiments.scores.SCORES`.
        callbacks: that training needs.
        reduce_logits: from a batch's logits and labels to what `predicted` takes, while the evaluation still runs; for
            logits that would not fit in memory all at once. `None`: they are kept as they are.
    """

    train: Any
    evaluation: dict[str, Any]
    prediction: dict[str, Any]
    processing_class: Any
    collate: Callable[[list[dict[str, Any]]], Batch]
    predicted: Callable[[np.ndarray], np.ndarray]
    kind: str
    callbacks: list[TrainerCallback] = field(default_factory=list)
    reduce_logits: Callable[[Tensor, Tensor], Tensor] | None = None

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """From logits and labels to figures by name, each with its standard error under NAME_stderr."""
        from experiments.glue_metric import GlueMetric  # takes seconds

        predicted, labels = self.predicted(prediction.predictions), prediction.label_ids
        metric = GlueMetric(config_name=self.kind, keep_in_memory=True)
        return metric.compute(predictions=predicted, references=labels) | standard_errors(self.kind, predicted, labels)

    def batch(self, size: int) -> Batch:
        """The first `size` evaluated inputs, fewer if there are no more, without their labels."""
        dataset = self.evaluation[""]
        batch = dict(self.collate([dataset[index] for index in range(min(size, len(dataset)))]))
        batch.pop("labels", None)
        return batch


@dataclass
class Task(ABC):
    """Data, unprocessed, and what is asked of it.

    Attributes:
        source: where it is from.
        labels: names of the classes; empty for regression, and where nothing is classified.
        train, evaluation, prediction: examples, as in `PreparedTask`.
        main_metric: the figure that tables and pictures show.
    """

    source: Source
    labels: list[str]
    train: Dataset
    evaluation: dict[str, Dataset]
    prediction: dict[str, Dataset]
    main_metric: str

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

    @abstractmethod
    def prepared(self, config: ToMePerceiverConfig, processing_class: Any, seed: int) -> PreparedTask:
        """The task as a model with this config sees it.

        Raises:
            BadInput: if the processing class does not fit the config.
        """


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
    return dataset if count is None else dataset.select(range(min(count, len(dataset))))


def check_labels(split: Dataset, train: Dataset, column: str, labels: list[str], where: str) -> None:
    """Check that training has all the labels of a split.

    Args:
        split, train: with the labels in `column`, as names, or as places in the names of a `ClassLabel`.
        column: their name.
        labels: names of the classes.
        where: what the split is, for the message.

    Raises:
        BadInput: naming the labels that training has not.
    """
    seen = _label_names(train, column) & set(labels)
    if unseen := _label_names(split, column) - seen:
        raise BadInput(f"{where} has the labels {listed(unseen)}; allowed are those of training, {listed(seen)}")


def listed(names: Iterable[object]) -> str:
    """Names in quotes, in order."""
    return ", ".join(f"'{name}'" for name in sorted(map(str, names)))


def _label_names(dataset: Dataset, column: str) -> set[str]:
    feature, found = dataset.features[column], dataset.unique(column)
    if isinstance(feature, ClassLabel):
        return {
            feature.names[label] if label is not None and 0 <= label < len(feature.names) else str(label)
            for label in found
        }
    return {str(label) for label in found}
