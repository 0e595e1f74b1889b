# SPDX-License-Identifier: Apache-2.0
"""Text classification and regression: the GLUE tasks (Wang et al., 2019), or sentences of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from datasets import ClassLabel, Dataset
from transformers import DataCollatorWithPadding

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.errors import BadInput
from experiments.tasks.base import LABELS, PreparedTask, Source, Splits, first_examples, read_lines, without_column
from experiments.tasks.labels import LABEL, label_ids, label_names, listed, spelling, with_labels
from experiments.tasks.reading import TABLE_FORMATS, column_key, ending, means_text, read_dataset, read_file
from experiments.tasks.scores import classes, numbers
from experiments.tasks.text import TextDataArguments, TextTask
from experiments.tasks.text_columns import input_columns, with_text

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
# A line or two of a terminal have room for this much of the first input.
SHOWN_CHARACTERS = 120


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
            "'sentence1', 'sentence2', or 'text', 'sentence' or the like, or one other column of text."
        },
    )
    sentence1_column: str | None = field(
        default=None, metadata={"help": "Own data: column with the sentences, if its name does not say so."}
    )
    sentence2_column: str | None = field(
        default=None, metadata={"help": "Own data: column with the second sentence of each pair."}
    )
    do_regression: bool | None = field(
        default=None,
        metadata={
            "help": "Own data: true if labels are numbers to predict, false if they are classes. By default numbers "
            "with a point are predicted, if not all are whole, and all other labels are classes."
        },
    )
    task_name: str | None = field(default=None, metadata={"help": f"GLUE task: {', '.join(sorted(SENTENCES))}."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_name is not None:
            self.task_name = self.task_name.lower()
            if self.task_name not in SENTENCES:
                raise BadInput(f"--task_name {self.task_name}: choose from {', '.join(sorted(SENTENCES))}")
            for name in ("sentence1_column", "sentence2_column", "do_regression"):
                if (value := getattr(self, name)) is not None:
                    raise BadInput(f"--{name} {value}: is for own data; --task_name {self.task_name} says which it is")


@dataclass
class GlueTask(TextTask):
    """Sentences, or pairs of them, and a class or a number for each, in the column `label`."""

    arguments: GlueDataArguments

    hub_task: ClassVar[str] = "text-classification"

    def model_class_name(self, config: ToMePerceiverConfig) -> str:
        """Return the classifier, which any text model may start; its decoder is new if it was no classifier."""
        for name in map(str, config.architectures or []):
            if "ForSequenceClassification" not in name and "ForMaskedLM" not in name:
                raise BadInput(
                    f"architectures = {config.architectures}: choose for text from PerceiverForSequenceClassification, "
                    "PerceiverForMaskedLM and their ToMe twins"
                )
        return "ToMePerceiverForSequenceClassification"

    def first_input(self, prepared: PreparedTask) -> str | None:
        """Return the first example's tokens as text, with the name of its class or its number."""
        splits = (prepared.train, *prepared.evaluation.values(), *prepared.prediction.values())
        example = next(split for split in splits if len(split))[0]
        shown = prepared.processing_class.decode(example["input_ids"])
        shown = shown if len(shown) <= SHOWN_CHARACTERS else f"{shown[:SHOWN_CHARACTERS]}..."
        label = example.get(LABELS)
        if label is not None:
            label = f", {prepared.labels[prepared.label_ids.index(label)]!r}" if prepared.labels else f", {label:g}"
        return f"first input, {len(example['input_ids'])} tokens: {shown!r}{label or ''}"

    def prepared(self, config: ToMePerceiverConfig, processing_class: Any, seed: int) -> PreparedTask:
        """Return tokens and labels, padded to the longest of each batch unless the arguments say otherwise."""
        ids = label_ids(config, self.labels) if self.labels else []
        tokens = self.tokens(config, processing_class, ids)
        return PreparedTask(
            train=tokens.train,
            evaluation=tokens.evaluation,
            prediction=tokens.prediction,
            calibration=tokens.calibration,
            processing_class=processing_class,
            collate=DataCollatorWithPadding(processing_class),
            predicted=classes if self.labels else numbers,
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
    """Load the sentences that the arguments mean.

    Args:
        arguments: which sentences.
        predict: whether the test split is needed too.
        seed: of the order in which training examples are cut off by `max_train_samples`.
        evaluate: whether anything is evaluated; if not, there may be nothing to evaluate on.
        classes: those of the checkpoint, for a run that does not train, which then needs no training split; empty for
            regression.
        calibration_samples: number of unlabelled examples of the test split to take at most.
        download: `cache_dir` and `token` for `datasets.load_dataset`.

    Raises:
        BadInput: for data that are not there or do not fit.
    """
    splits, source = _load_splits(arguments, predict, evaluate, classes, calibration_samples > 0, download)
    ends = SPLITS.get(arguments.task_name or "", {"": ""})
    if arguments.task_name is not None:
        evaluated = {suffix: f"validation{end}" for suffix, end in ends.items()}
    else:
        evaluated = {"": splits.evaluated()} if evaluate or "validation" in splits.by_name else {}
    predicted = {suffix: f"test{end}" for suffix, end in ends.items()} if predict else {}
    has_train = "train" in splits.by_name or classes is None
    first = splits.take("train" if has_train else next(iter((evaluated or predicted).values())))
    if (has_train or evaluated) and LABEL not in first.features:
        raise BadInput(
            f"{splits.argument}: has no column '{LABEL}', only {listed(first.column_names)}; give the column with the "
            "labels this name (in the first line of a csv or tsv file)"
        )
    sentences = _sentences(arguments, splits.argument, first, is_predicted=not has_train and not evaluated)
    labels = _label_names(arguments, first, splits.argument) if has_train else list(classes or ())
    labels = _positive_last(labels, arguments.task_name, splits.argument if has_train else "--model_name_or_path")

    def taken(name: str, count: int | None) -> Dataset:
        return with_text(splits.take(name, count), sentences, splits.where(name))

    def labelled(name: str, count: int | None = None, train: Dataset | None = None) -> Dataset:
        return with_labels(taken(name, count), LABEL, labels, splits.where(name), train)

    train = labelled("train") if has_train else None
    evaluation = {suffix: labelled(name, arguments.max_eval_samples, train) for suffix, name in evaluated.items()}
    # Whatever labels examples to predict have, they do not matter.
    prediction = {
        suffix: without_column(taken(name, arguments.max_predict_samples), LABEL) for suffix, name in predicted.items()
    }
    test = f"test{ends['']}"
    calibration = splits.unseen(test, evaluated.values(), calibration_samples)
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
        calibration=None if calibration is None else with_text(calibration, sentences, splits.where(test)),
        main_metric=MAIN_METRIC.get(arguments.task_name or "", "accuracy" if labels else "pearson"),
        read=read_lines(_used(arguments, splits.argument, first, sentences, read), read, labels),
        arguments=arguments,
        sentence_columns=sentences,
    )


def _used(
    arguments: GlueDataArguments, argument: str, first: Dataset, sentences: Sequence[str], read: dict[str, Dataset]
) -> str:
    """Say which columns of the first split are used for what, and which are not."""
    used = [f"sentence in column {listed([name])}" for name in sentences]
    if labelled := next((split for split in read.values() if LABEL in split.features), None):
        used.append(f"{'class' if isinstance(labelled.features[LABEL], ClassLabel) else 'number'} in column '{LABEL}'")
    others = [name for name in first.column_names if name not in (*sentences, LABEL)]
    dataset = arguments.dataset_name
    where = " (a folder here)" if dataset is not None and Path(dataset).is_dir() else ""
    return f"{argument}{where}: {', '.join(used)}" + (f"; not used: {listed(others)}" if others else "")


def _load_splits(
    arguments: GlueDataArguments,
    predict: bool,
    evaluate: bool,
    classes: Sequence[str] | None,
    calibrate: bool,
    download: dict[str, Any],
) -> tuple[Splits, Source]:
    task, dataset, anew = arguments.task_name, arguments.dataset_name, arguments.overwrite_cache
    config, own = arguments.dataset_config_name, {}
    if task is not None:
        if dataset is None and Path(GLUE_DATASET).exists():
            raise BadInput(
                f"--task_name {task}: is read from {GLUE_DATASET} on the Hub, and here is a folder of that name; use "
                f"--dataset_name ./{GLUE_DATASET} for the folder, or start in another place"
            )
        # A folder in place of GLUE holds what the Hub does.
        argument = f"--task_name {task}" if dataset is None else f"--dataset_name {dataset}"
        source = Source(argument, GLUE_DATASET, True, task)
        by_name = read_dataset(argument, dataset or GLUE_DATASET, task, anew, **download)
    elif dataset is not None:
        source = Source.of_dataset(dataset, config)
        by_name = read_dataset(source.argument, dataset, config, anew, **download)
    else:
        files = _own_files(arguments, predict, evaluate, classes is None, calibrate)
        own = {name: f"--{name}_file {path}" for name, path in files.items()}
        source = Source(next(iter(own.values())), Path(next(iter(files.values()))).stem)
        by_name = {name: read_file(own[name], path, anew, **download) for name, path in files.items()}
    return Splits(source.argument, {name: _with_label(split) for name, split in by_name.items()}, own), source


def _with_label(split: Dataset) -> Dataset:
    """Return the examples with the column `label` if its name is only spelled in another way: "Label", "labels"."""
    found = [name for name in split.column_names if column_key(name) in (LABEL, f"{LABEL}s")]
    return split.rename_column(found[0], LABEL) if len(found) == 1 and found != [LABEL] else split


def _own_files(
    arguments: GlueDataArguments, predict: bool, evaluate: bool, train: bool, calibrate: bool
) -> dict[str, str]:
    """Return the files to read, by their split."""
    paths = {"train": arguments.train_file, "validation": arguments.validation_file, "test": arguments.test_file}
    needs_validation = evaluate and arguments.validation_file is None and arguments.test_file is None
    needed = {"train": train, "validation": needs_validation, "test": predict}
    if missing := [name for name in paths if needed[name] and paths[name] is None]:
        raise BadInput(
            f"--{missing[0]}_file: not given; use --task_name, --dataset_name, or files of your own: --train_file to "
            "train on, --validation_file to evaluate on, --test_file for --do_predict"
        )
    if not (predict or calibrate) and arguments.validation_file is not None:
        del paths["test"]
    if not evaluate and not train:
        paths = {"test": paths["test"]}
    return {name: path for name, path in paths.items() if path is not None}


def _sentences(arguments: GlueDataArguments, argument: str, first: Dataset, is_predicted: bool) -> tuple[str, ...]:
    """Return the columns of sentences.

    Raises:
        BadInput: if they are not certain, or for a file to predict whose first line may be an example, which would be
            taken for the names of columns.
    """
    if arguments.task_name is not None:
        return SENTENCES[arguments.task_name]
    names, named = first.column_names, (arguments.sentence1_column, arguments.sentence2_column)
    sentences = input_columns(first, argument, *named)
    is_certain = any(named) or any(map(means_text, sentences)) or ending(argument) not in ("csv", "tsv")
    if is_predicted and not is_certain and (len(names) == 1 or any(name.isdecimal() for name in names)):
        raise BadInput(
            f"{argument}: its first line may be an example, {listed(names)}; put a line with the names of the columns "
            "above it, such as 'text', or if it is one, use --sentence1_column"
        )
    return sentences


def _label_names(arguments: GlueDataArguments, train: Dataset, argument: str) -> list[str]:
    """Return the names of the classes in the training split; none where labels are numbers."""
    if arguments.task_name == REGRESSION:
        return []
    regression = arguments.do_regression if arguments.task_name is None else False
    return label_names(train, LABEL, f"{argument}: split 'train'", regression) or []


def _positive_last(labels: list[str], task: str | None, argument: str) -> list[str]:
    """Return the classes in the order in which they are scored: last the one that F1 is about, whatever order the data
    or a checkpoint have.

    Raises:
        BadInput: for other classes than those of the task.
    """
    if task not in POSITIVE:
        return labels
    positive, by_spelling = POSITIVE[task], {spelling(label): label for label in labels}
    for known in ((f"not_{positive}", positive), ("0", "1"), ("label_0", "label_1")):
        if set(by_spelling) == set(known) and len(labels) == 2:
            return [by_spelling[name] for name in known]
    raise BadInput(
        f"{argument}: has the classes {listed(labels)}; they must be 'not_{positive}' and '{positive}', or 0 and 1, "
        "since F1 is about one of them"
    )
