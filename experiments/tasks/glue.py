# SPDX-License-Identifier: Apache-2.0
"""Text classification and regression: the GLUE tasks (Wang et al., 2019), or sentences of one's own."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset, DatasetDict, Value
from transformers import DataCollatorWithPadding

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.errors import BadInput
from experiments.tasks.base import PreparedTask, Source, evaluated_split, first_examples, take_split
from experiments.tasks.labels import (
    check_none_missing,
    check_trained,
    has_labels,
    label_ids,
    label_names,
    listed,
    refuse_missing,
    spelling,
    with_label_ids,
    with_numbers,
)
from experiments.tasks.reading import TABLE_FORMATS, read_dataset, read_file
from experiments.tasks.scores import classes, numbers
from experiments.tasks.text import LABEL, TextDataArguments, TextTask, is_text

GLUE_DATASET = "nyu-mll/glue"
SENTENCES = {
    "cola": ("sentence",), "mnli": ("premise", "hypothesis"), "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"), "qqp": ("question1", "question2"), "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence",), "stsb": ("sentence1", "sentence2"), "wnli": ("sentence1", "sentence2"),
}  # fmt: skip
MAIN_METRIC = {"cola": "matthews_correlation", "stsb": "pearson"}
# MNLI is evaluated on sentences of the training set's genres and, with results that end in _mm, of others.
SPLITS = {"mnli": {"": "_matched", "_mm": "_mismatched"}}
# The class that F1 is about, by task; GLUE has it last.
POSITIVE = {"mrpc": "equivalent", "qqp": "duplicate"}
REGRESSION = "stsb"


@dataclass
class GlueDataArguments(TextDataArguments):
    """Which sentences, each with a class or a number."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or local folder, as `datasets.load_dataset` takes it. With --task_name: where GLUE is, "
            f"instead of {GLUE_DATASET}."
        },
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "help": f"Own data ({', '.join(TABLE_FORMATS)}): a column 'label' (a number with a point: regression) and "
            "'sentence1', 'sentence2', or else the first two other columns of text, or the only one."
        },
    )
    task_name: str | None = field(default=None, metadata={"help": f"GLUE task: {', '.join(sorted(SENTENCES))}."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_name is not None:
            self.task_name = self.task_name.lower()
            if self.task_name not in SENTENCES:
                raise BadInput(f"--task_name {self.task_name}: allowed are {', '.join(sorted(SENTENCES))}")


@dataclass
class GlueTask(TextTask):
    """Sentences, or pairs of them, and a class or a number for each, in the column `label`."""

    arguments: GlueDataArguments

    hub_task: ClassVar[str] = "text-classification"

    def model_class_name(self, config: ToMePerceiverConfig) -> str:
        """Any text model may start a classifier; its decoder is new if it was no classifier."""
        for name in map(str, config.architectures or []):
            if "ForSequenceClassification" not in name and "ForMaskedLM" not in name:
                raise BadInput(
                    f"architectures = {config.architectures}: allowed for text are PerceiverForSequenceClassification, "
                    "PerceiverForMaskedLM and their ToMe twins"
                )
        return "ToMePerceiverForSequenceClassification"

    def prepared(self, config: ToMePerceiverConfig, processing_class: Any, seed: int) -> PreparedTask:
        """Tokens and labels, padded to the longest of each batch unless the arguments say otherwise."""
        ids = label_ids(config, self.labels) if self.labels else []
        tokens = self.tokens(config, processing_class, ids)
        return PreparedTask(
            train=tokens.train,
            evaluation=tokens.evaluation,
            prediction=tokens.prediction,
            processing_class=processing_class,
            collate=DataCollatorWithPadding(processing_class),
            predicted=classes if self.labels else numbers,
            kind=self.arguments.task_name or ("classification" if self.labels else "regression"),
            labels=self.labels,
            label_ids=ids,
        )


def load_glue_task(
    arguments: GlueDataArguments, predict: bool, seed: int, evaluate: bool = True, **download: Any
) -> GlueTask:
    """Load the sentences that the arguments mean.

    Args:
        arguments: which sentences.
        predict: whether the test split is needed too.
        seed: of the order in which training examples are cut off by `max_train_samples`.
        evaluate: whether anything is evaluated; if not, there may be nothing to evaluate on.
        download: `cache_dir` and `token` for `datasets.load_dataset`.

    Raises:
        BadInput: for a dataset, split or column that is not there, an empty split, text or labels that are missing or
            no text and no labels, or labels that are not among those of the training split.
    """
    splits, source = _load_splits(arguments, predict, download)
    argument = source.argument
    evaluated = _evaluated_names(arguments, splits, argument, evaluate)
    train = take_split(splits, "train", argument, None)
    columns = _Columns(_sentence_columns(arguments, train, argument), _labels(arguments, train, argument))
    train = columns.checked(train, f"{argument}: split 'train'")

    def taken(name: str, count: int | None, may_lack: bool = False) -> Dataset:
        split = take_split(splits, name, argument, count)
        return columns.checked(split, f"{argument}: split '{name}'", train, may_lack)

    evaluation = {suffix: taken(name, arguments.max_eval_samples) for suffix, name in evaluated.items()}
    prediction = {}
    if predict:
        ends = _split_ends(arguments.task_name)
        prediction = {suffix: taken(f"test{end}", arguments.max_predict_samples, True) for suffix, end in ends.items()}
    if arguments.max_train_samples is not None:
        train = first_examples(train.shuffle(seed=seed), arguments.max_train_samples)
    return GlueTask(
        source=replace(source, split=evaluated.get("", source.split)),
        labels=columns.labels,
        train=train,
        evaluation=evaluation,
        prediction=prediction,
        main_metric=MAIN_METRIC.get(arguments.task_name or "", "accuracy" if columns.labels else "pearson"),
        arguments=arguments,
        sentence_columns=columns.sentences,
    )


@dataclass(frozen=True)
class _Columns:
    """What the examples of every split are to have.

    Attributes:
        sentences: columns with their text.
        labels: names of the classes, in the order in which they are scored; empty where labels are numbers.
    """

    sentences: tuple[str, ...]
    labels: list[str]

    def checked(self, split: Dataset, where: str, train: Dataset | None = None, may_lack: bool = False) -> Dataset:
        """The same examples with their classes as places in `labels`, or with numbers.

        Args:
            split: as it was read.
            where: what it is, for the message.
            train: what was trained on, which must have all the classes.
            may_lack: whether labels may be kept back; then there is no column of them.

        Raises:
            BadInput: for text or labels that are missing or of another kind, or classes that training has not.
        """
        _check_sentences(split, self.sentences, where)
        if may_lack and not has_labels(split, LABEL):
            return split.remove_columns(LABEL) if LABEL in split.features else split
        if LABEL not in split.features:
            raise BadInput(f"{where} has no column '{LABEL}'")
        if not self.labels:
            return with_numbers(split, LABEL, where)
        split = with_label_ids(split, LABEL, self.labels, where)
        if train is not None:
            check_trained(split, train, LABEL, where)
        return split


def _load_splits(arguments: GlueDataArguments, predict: bool, download: dict[str, Any]) -> tuple[DatasetDict, Source]:
    task, dataset, anew = arguments.task_name, arguments.dataset_name, arguments.overwrite_cache
    if task is not None:
        # A folder that stands in for GLUE holds what the Hub does.
        argument = f"--task_name {task}" if dataset is None else f"--dataset_name {dataset}"
        source = Source(argument, GLUE_DATASET, True, task)
        return read_dataset(argument, dataset or GLUE_DATASET, task, anew, **download), source
    if dataset is not None:
        config = arguments.dataset_config_name
        source = Source.of_dataset(dataset, config, "validation")
        return read_dataset(source.argument, dataset, config, anew, **download), source
    files = _own_files(arguments, predict)
    source = Source(f"--train_file {files['train']}", Path(files["train"]).stem)
    read = {name: read_file(f"--{name}_file {path}", path, anew, **download) for name, path in files.items()}
    return DatasetDict(read), source


def _own_files(arguments: GlueDataArguments, predict: bool) -> dict[str, str]:
    """The files to read, by their split."""
    paths = {"train": arguments.train_file, "validation": arguments.validation_file, "test": arguments.test_file}
    needed = {"train"} | ({"test"} if predict else set())
    if arguments.validation_file is None and arguments.test_file is None:
        needed.add("validation")
    if missing := sorted(name for name in needed if paths[name] is None):
        raise BadInput(
            f"--{missing[0]}_file: not given; allowed are --task_name, --dataset_name, or files of one's own to train "
            "on and to evaluate on (a test file for --do_predict)"
        )
    if not predict and arguments.validation_file is not None:
        del paths["test"]
    return {name: path for name, path in paths.items() if path is not None}


def _split_ends(task: str | None) -> dict[str, str]:
    """What the names of the splits to evaluate on and to predict for end in, by what their results end in."""
    return SPLITS.get(task or "", {"": ""})


def _evaluated_names(
    arguments: GlueDataArguments, splits: DatasetDict, argument: str, evaluate: bool
) -> dict[str, str]:
    """The splits to evaluate on, by what their results end in; none only if nothing is evaluated."""
    if arguments.task_name is not None:
        return {suffix: f"validation{end}" for suffix, end in _split_ends(arguments.task_name).items()}
    if not evaluate and "validation" not in splits:
        return {}
    return {"": evaluated_split(splits, argument, lambda split: has_labels(split, LABEL))}


def _sentence_columns(arguments: GlueDataArguments, train: Dataset, argument: str) -> tuple[str, ...]:
    if arguments.task_name is not None:
        return SENTENCES[arguments.task_name]
    others = [name for name in train.column_names if name not in (LABEL, "idx")]
    if {"sentence1", "sentence2"} <= set(others):
        return ("sentence1", "sentence2")
    # A number beside the text, such as an identity, is none of it.
    columns = [name for name in others if is_text(train, name)]
    if not columns:
        raise BadInput(f"{argument}: has no column with sentences, of text, beside {listed(train.features)}")
    return tuple(columns[:2])


def _check_sentences(split: Dataset, columns: tuple[str, ...], where: str) -> None:
    """Check that there is text for each example, which may be of no letters."""
    if missing := set(columns) - set(split.column_names):
        raise BadInput(f"{where} has no column {listed(missing)}")
    for column in columns:
        if not is_text(split, column):
            feature = split.features[column]
            kind = feature.dtype if isinstance(feature, Value) else type(feature).__name__
            raise BadInput(f"{where}: column '{column}' holds {kind}; allowed is text")
        missing_rows = [index for index, value in enumerate(split[column]) if value is None]
        refuse_missing(missing_rows, len(split), column, where)


def _labels(arguments: GlueDataArguments, train: Dataset, argument: str) -> list[str]:
    """Names of the classes, in the order in which they are scored; none where labels are numbers."""
    if LABEL not in train.features:
        raise BadInput(f"{argument}: has no column '{LABEL}', only {listed(train.column_names)}")
    task = arguments.task_name
    if task == REGRESSION:
        return []
    labels = label_names(train, LABEL, argument)
    if labels is None:
        # A missing label makes numbers with a point of all others in a .csv file.
        check_none_missing(train[LABEL], LABEL, f"{argument}: split 'train'")
        values = np.unique(train[LABEL])
        if task is not None or len(values) <= 2 and np.array_equal(values, np.round(values)):
            raise BadInput(
                f"{argument}: column '{LABEL}' holds numbers with a point, {listed(values)}; allowed are classes by "
                "name or as integers (with a point they are numbers to predict)"
            )
        return []
    if len(labels) < 2:
        raise BadInput(f"{argument}: column '{LABEL}' has the class {listed(labels)} alone; allowed are two or more")
    if task in POSITIVE:
        return _positive_last(labels, POSITIVE[task], argument)
    return labels


def _positive_last(labels: list[str], positive: str, argument: str) -> list[str]:
    """The two classes as GLUE has them, whatever their order in the data."""
    by_spelling = {spelling(label): label for label in labels}
    for known in ((f"not_{positive}", positive), ("0", "1")):
        if set(by_spelling) == set(known) and len(labels) == 2:
            return [by_spelling[name] for name in known]
    raise BadInput(
        f"{argument}: has the classes {listed(labels)}; allowed are 'not_{positive}' and '{positive}', or 0 and 1, "
        "since F1 is about one of them"
    )
