# SPDX-License-Identifier: Apache-2.0
"""Text classification and regression: GLUE tasks (Wang et al., 2019) or a user's own data.

Called by run_glue.py and eval_sweep.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from datasets import ClassLabel, Dataset
from transformers import DataCollatorWithPadding

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.errors import BadInput
from experiments.tasks.base import LABELS, PreparedTask, Source, Splits, first_examples, summarize_data, without_column
from experiments.tasks.labels import LABEL, label_ids, label_names, listed, spelling, with_labels
from experiments.tasks.reading import TABLE_FORMATS, column_key, file_extension, means_text, read_dataset, read_file
from experiments.tasks.scores import choose_classes, squeeze_numbers
from experiments.tasks.text import TextDataArguments, TextTask
from experiments.tasks.text_columns import input_columns, with_text

GLUE_DATASET = "nyu-mll/glue"
# Columns with the sentences of each task.
SENTENCE_COLUMNS = {
    "cola": ("sentence",), "mnli": ("premise", "hypothesis"), "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"), "qqp": ("question1", "question2"), "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence",), "stsb": ("sentence1", "sentence2"), "wnli": ("sentence1", "sentence2"),
}  # fmt: skip
# Score shown in tables and pictures; accuracy for the other tasks.
MAIN_METRIC = {"cola": "matthews_correlation", "stsb": "pearson"}
# Suffixes of split names, by suffix of the results: MNLI has splits with the genres of training and with others.
SPLIT_SUFFIXES = {"mnli": {"": "_matched", "_mm": "_mismatched"}}
# Positive class of F1, by task; it is the last class in GLUE.
POSITIVE_CLASSES = {"mrpc": "equivalent", "qqp": "duplicate"}
REGRESSION_TASK = "stsb"
# Maximum number of characters shown of the first input: one or two lines of a terminal.
MAX_CHARACTERS_SHOWN = 120


@dataclass
class GlueDataArguments(TextDataArguments):
    """Arguments that choose a GLUE task, or own data with a class or number for each example."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Dataset to load with `datasets.load_dataset`: Hub id or local folder. With --task_name: a copy of "
            f"GLUE to use instead of {GLUE_DATASET}."
        },
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "help": f"File to train on ({', '.join(TABLE_FORMATS)}), with a column 'label' (numbers with a point: "
            "regression) and one with text, such as 'sentence' or 'text', or two: 'sentence1' and 'sentence2'."
        },
    )
    sentence1_column: str | None = field(
        default=None, metadata={"help": "Own data: column with the (first) sentences (default: found by name)."}
    )
    sentence2_column: str | None = field(
        default=None, metadata={"help": "Own data: column with the second sentence of each pair."}
    )
    do_regression: bool | None = field(
        default=None,
        metadata={
            "help": "Own data: true if labels are numbers to predict, false if they are classes (default: true for "
            "numbers with a point if not all are whole, else false)."
        },
    )
    task_name: str | None = field(default=None, metadata={"help": f"GLUE task: {', '.join(sorted(SENTENCE_COLUMNS))}."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_name is not None:
            self.task_name = self.task_name.lower()
            if self.task_name not in SENTENCE_COLUMNS:
                raise BadInput(f"--task_name {self.task_name}: choose from {', '.join(sorted(SENTENCE_COLUMNS))}")
            for name in ("sentence1_column", "sentence2_column", "do_regression"):
                if (value := getattr(self, name)) is not None:
                    raise BadInput(f"--{name} {value}: is for own data; remove it, or --task_name {self.task_name}")


@dataclass
class GlueTask(TextTask):
    """Sentences, or pairs of sentences, with a class or number for each in the column `label`."""

    arguments: GlueDataArguments

    hub_task: ClassVar[str] = "text-classification"

    def model_class_name(self, config: ToMePerceiverConfig) -> str:
        """Return the classifier's name; the checkpoint of a masked language model is accepted, with a new decoder."""
        for name in map(str, config.architectures or []):
            if "ForSequenceClassification" not in name and "ForMaskedLM" not in name:
                raise BadInput(
                    f"architectures = {config.architectures}: for text, choose from "
                    "PerceiverForSequenceClassification, PerceiverForMaskedLM and their ToMe classes"
                )
        return "ToMePerceiverForSequenceClassification"

    def first_input(self, prepared: PreparedTask) -> str | None:
        """Return the first input decoded to text, with its number of tokens and its label."""
        splits = (prepared.train, *prepared.evaluation.values(), *prepared.prediction.values())
        example = next(split for split in splits if len(split))[0]
        shown = prepared.processing_class.decode(example["input_ids"])
        shown = shown if len(shown) <= MAX_CHARACTERS_SHOWN else f"{shown[:MAX_CHARACTERS_SHOWN]}..."
        label = example.get(LABELS)
        if label is not None:
            label = f", {prepared.labels[prepared.label_ids.index(label)]!r}" if prepared.labels else f", {label:g}"
        return f"first input, {len(example['input_ids'])} tokens: {shown!r}{label or ''}"

    def prepare(self, config: ToMePerceiverConfig, processing_class: Any, seed: int) -> PreparedTask:
        """Tokenize the sentences; pad a batch to its longest input, or to the maximum with `--pad_to_max_length`."""
        ids = label_ids(config, self.labels) if self.labels else []
        tokens = self.tokenize(config, processing_class, ids)
        return PreparedTask(
            train=tokens.train,
            evaluation=tokens.evaluation,
            prediction=tokens.prediction,
            calibration=tokens.calibration,
            processing_class=processing_class,
            collate=DataCollatorWithPadding(processing_class),
            decode_logits=choose_classes if self.labels else squeeze_numbers,
            kind=self.arguments.task_name or ("classification" if self.labels else "regression"),
            labels=self.labels,
            label_ids=ids,
        )


def load_glue_task(
    arguments: GlueDataArguments,
    predict: bool,
    seed: int,
    evaluate: bool = True,
    classes: Sequence[str] | None = None,
    calibration_samples: int = 0,
    **download: Any,
) -> GlueTask:
    """Load the sentences that the arguments choose.

    Args:
        arguments: arguments that choose the sentences.
        predict: whether to load a test split to predict.
        seed: seed of the order in which `max_train_samples` takes training examples.
        evaluate: whether evaluation examples are required.
        classes: classes of the checkpoint, for a run without training, which needs no training split; empty for
            regression. `None`: read the classes from the training split.
        calibration_samples: maximum number of unlabelled samples to take from the test split.
        download: `cache_dir` and `token` for `datasets.load_dataset`.

    Raises:
        BadInput: for data that are missing or do not fit the arguments.
    """
    splits, source = _load_splits(arguments, predict, evaluate, classes, calibration_samples > 0, download)
    split_suffixes = SPLIT_SUFFIXES.get(arguments.task_name or "", {"": ""})
    if arguments.task_name is not None:
        evaluated = {suffix: f"validation{split}" for suffix, split in split_suffixes.items()}
    else:
        evaluated = {"": splits.choose_evaluated()} if evaluate or "validation" in splits.by_name else {}
    predicted = {suffix: f"test{split}" for suffix, split in split_suffixes.items()} if predict else {}
    has_train = "train" in splits.by_name or classes is None
    first = splits.take("train" if has_train else next(iter((evaluated or predicted).values())))
    sentences = _choose_sentence_columns(
        arguments, splits.argument, first, is_predicted=not has_train and not evaluated
    )
    labels = _read_label_names(arguments, first, splits.argument) if has_train else list(classes or ())
    labels = _put_positive_last(labels, arguments.task_name, splits.argument if has_train else "--model_name_or_path")

    def taken(name: str, count: int | None) -> Dataset:
        return with_text(splits.take(name, count), sentences, splits.describe(name))

    def labelled(name: str, count: int | None = None, train: Dataset | None = None) -> Dataset:
        return with_labels(taken(name, count), LABEL, labels, splits.describe(name), train)

    train = labelled("train") if has_train else None
    evaluation = {suffix: labelled(name, arguments.max_eval_samples, train) for suffix, name in evaluated.items()}
    # Labels of examples to predict are not used.
    prediction = {
        suffix: without_column(taken(name, arguments.max_predict_samples), LABEL) for suffix, name in predicted.items()
    }
    test = f"test{split_suffixes['']}"
    calibration = splits.take_unlabelled(test, evaluated.values(), calibration_samples)
    read = {evaluated[suffix]: split for suffix, split in evaluation.items()}
    read |= {f"{predicted[suffix]} (to predict)": split for suffix, split in prediction.items()}
    if train is None:
        train = next(iter(read.values())).select([])
    else:
        read = {"train": train, **read}
    if arguments.max_train_samples is not None:
        train = first_examples(train.shuffle(seed=seed), arguments.max_train_samples)
    return GlueTask(
        source=replace(source, split=evaluated.get("", source.split)),
        labels=labels,
        train=train,
        evaluation=evaluation,
        prediction=prediction,
        calibration=None if calibration is None else with_text(calibration, sentences, splits.describe(test)),
        main_metric=MAIN_METRIC.get(arguments.task_name or "", "accuracy" if labels else "pearson"),
        summary=summarize_data(_describe_columns(arguments, splits.argument, first, sentences, read), read, labels),
        arguments=arguments,
        sentence_columns=sentences,
    )


def _describe_columns(
    arguments: GlueDataArguments, argument: str, first: Dataset, sentences: Sequence[str], read: dict[str, Dataset]
) -> str:
    """Describe for the user how the columns of the first split are used, and which are not."""
    used = [f"sentence in column {listed([name])}" for name in sentences]
    if labelled := next((split for split in read.values() if LABEL in split.features), None):
        used.append(f"{'class' if isinstance(labelled.features[LABEL], ClassLabel) else 'number'} in column '{LABEL}'")
    others = [name for name in first.column_names if name not in (*sentences, LABEL)]
    dataset = arguments.dataset_name
    where = " (a local folder)" if dataset is not None and Path(dataset).is_dir() else ""
    return f"{argument}{where}: {', '.join(used)}" + (f"; not used: {listed(others)}" if others else "")


def _load_splits(
    arguments: GlueDataArguments,
    predict: bool,
    evaluate: bool,
    classes: Sequence[str] | None,
    calibrate: bool,
    download: dict[str, Any],
) -> tuple[Splits, Source]:
    task, dataset, overwrite_cache = arguments.task_name, arguments.dataset_name, arguments.overwrite_cache
    config, own = arguments.dataset_config_name, {}
    if task is not None:
        if dataset is None and Path(GLUE_DATASET).exists():
            raise BadInput(
                f"--task_name {task}: must be read from {GLUE_DATASET} on the Hub, but a local folder has this name; "
                f"use --dataset_name ./{GLUE_DATASET} for the folder, or run the script from another folder"
            )
        # A local copy of GLUE is reported as the dataset on the Hub.
        argument = f"--task_name {task}" if dataset is None else f"--dataset_name {dataset}"
        source = Source(argument, GLUE_DATASET, True, task)
        by_name = read_dataset(argument, dataset or GLUE_DATASET, task, overwrite_cache, **download)
    elif dataset is not None:
        source = Source.of_dataset(dataset, config)
        by_name = read_dataset(source.argument, dataset, config, overwrite_cache, **download)
    else:
        files = _choose_files(arguments, predict, evaluate, classes is None, calibrate)
        own = {name: f"--{name}_file {path}" for name, path in files.items()}
        source = Source(next(iter(own.values())), Path(next(iter(files.values()))).stem)
        by_name = {name: read_file(own[name], path, overwrite_cache, **download) for name, path in files.items()}
    return Splits(source.argument, {name: _with_label(split) for name, split in by_name.items()}, own), source


def _with_label(split: Dataset) -> Dataset:
    """Return the examples with a column "Label", "labels" or the like renamed to `label`."""
    found = [name for name in split.column_names if column_key(name) in (LABEL, f"{LABEL}s")]
    return split.rename_column(found[0], LABEL) if len(found) == 1 and found != [LABEL] else split


def _choose_files(
    arguments: GlueDataArguments, predict: bool, evaluate: bool, train: bool, calibrate: bool
) -> dict[str, str]:
    """Return the paths of the files to read, by split."""
    paths = {"train": arguments.train_file, "validation": arguments.validation_file, "test": arguments.test_file}
    needs_validation = evaluate and arguments.validation_file is None and arguments.test_file is None
    needed = {"train": train, "validation": needs_validation, "test": predict}
    if missing := [name for name in paths if needed[name] and paths[name] is None]:
        raise BadInput(
            f"--{missing[0]}_file: not given; use --task_name, --dataset_name, or your own files: --train_file to "
            "train on, --validation_file to evaluate on, --test_file for --do_predict"
        )
    if not (predict or calibrate) and arguments.validation_file is not None:
        del paths["test"]
    if not evaluate and not train:
        paths = {"test": paths["test"]}
    return {name: path for name, path in paths.items() if path is not None}


def _choose_sentence_columns(
    arguments: GlueDataArguments, argument: str, first: Dataset, is_predicted: bool
) -> tuple[str, ...]:
    """Return the columns with the sentences.

    Raises:
        BadInput: if no column or more than one may hold them, if examples to train or evaluate on have no labels, or
            if the first line of a file to predict may be an example instead of a header.
    """
    if not is_predicted and LABEL not in first.features:
        raise BadInput(
            f"{argument}: has no column '{LABEL}', only {listed(first.column_names)}; rename the column with the "
            "labels (in the first line of a csv or tsv file)"
        )
    if arguments.task_name is not None:
        return SENTENCE_COLUMNS[arguments.task_name]
    names, named = first.column_names, (arguments.sentence1_column, arguments.sentence2_column)
    sentences = input_columns(first, argument, *named)
    is_certain = any(named) or any(map(means_text, sentences)) or file_extension(argument) not in ("csv", "tsv")
    if is_predicted and not is_certain and (len(names) == 1 or any(name.isdecimal() for name in names)):
        raise BadInput(
            f"{argument}: its first line may be an example, {listed(names)}; put a line with the names of the columns "
            "above it, such as 'text', or use --sentence1_column if it already has the names"
        )
    return sentences


def _read_label_names(arguments: GlueDataArguments, train: Dataset, argument: str) -> list[str]:
    """Return the names of the classes in the training split; empty if labels are numbers."""
    if arguments.task_name == REGRESSION_TASK:
        return []
    regression = arguments.do_regression if arguments.task_name is None else False
    return label_names(train, LABEL, f"{argument}: split 'train'", regression) or []


def _put_positive_last(labels: list[str], task: str | None, argument: str) -> list[str]:
    """Return the classes in the order used for scoring, with the positive class of F1 last.

    Raises:
        BadInput: if a task with F1 has other classes.
    """
    if task not in POSITIVE_CLASSES:
        return labels
    positive, by_spelling = POSITIVE_CLASSES[task], {spelling(label): label for label in labels}
    for known in ((f"not_{positive}", positive), ("0", "1"), ("label_0", "label_1")):
        if set(by_spelling) == set(known) and len(labels) == 2:
            return [by_spelling[name] for name in known]
    raise BadInput(
        f"{argument}: has the classes {listed(labels)}; they must be 'not_{positive}' and '{positive}', or 0 and 1, "
        "since F1 is about one of them"
    )
