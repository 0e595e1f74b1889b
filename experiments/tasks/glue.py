# SPDX-License-Identifier: Apache-2.0
"""Text classification and regression: the GLUE tasks (Wang et al., 2019), or sentences of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset, DatasetDict
from transformers import DataCollatorWithPadding

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.errors import BadInput
from experiments.tasks.base import (
    LABELS,
    PreparedTask,
    Source,
    evaluated_split,
    first_examples,
    read_lines,
    take_split,
    unseen_split,
)
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
from experiments.tasks.reading import TABLE_FORMATS, column_key, ending, means_text, read_dataset, read_file
from experiments.tasks.scores import classes, numbers
from experiments.tasks.text import LABEL, TextDataArguments, TextTask, as_text, sentence_columns

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
# Of the first input, as much as a line or two of a terminal have room for.
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

    @property
    def texts(self) -> list[str]:
        """Columns that are named as those with the sentences."""
        return [name for name in (self.sentence1_column, self.sentence2_column) if name is not None]


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

    def first_input(self, prepared: PreparedTask) -> str | None:
        """The first example's tokens as text, with the name of its class or its number."""
        splits = (prepared.train, *prepared.evaluation.values(), *prepared.prediction.values())
        example = next(split for split in splits if len(split))[0]
        shown = prepared.processing_class.decode(example["input_ids"])
        shown = shown if len(shown) <= SHOWN_CHARACTERS else f"{shown[:SHOWN_CHARACTERS]}..."
        label = example.get(LABELS)
        if label is not None:
            label = f", {prepared.labels[prepared.label_ids.index(label)]!r}" if prepared.labels else f", {label:g}"
        return f"first input, {len(example['input_ids'])} tokens: {shown!r}{label or ''}"

    def prepared(self, config: ToMePerceiverConfig, processing_class: Any, seed: int) -> PreparedTask:
        """Tokens and labels, padded to the longest of each batch unless the arguments say otherwise."""
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
        BadInput: for a dataset, split or column that is not there, an empty split, text or labels that are missing or
            no text and no labels, or labels that are not among those of the training split.
    """
    splits, source = _load_splits(arguments, predict, evaluate, classes, calibration_samples > 0, download)
    argument = source.argument
    evaluated = _evaluated_names(arguments, splits, argument, evaluate)
    ends = _split_ends(arguments.task_name) if predict else {}
    predicted = {suffix: f"test{end}" for suffix, end in ends.items()}
    has_train = "train" in splits or classes is None
    first_name = "train" if has_train else next(iter((evaluated or predicted).values()))
    first = take_split(splits, first_name, argument, None)
    if (has_train or evaluated) and LABEL not in first.features:
        raise BadInput(
            f"{argument}: has no column '{LABEL}', only {listed(first.column_names)}; give the column with the labels "
            "this name (in the first line of a csv or tsv file)"
        )
    sentences = SENTENCES.get(arguments.task_name or "") or sentence_columns(
        first, argument, arguments.sentence1_column, arguments.sentence2_column
    )
    if not has_train and not evaluated and arguments.sentence1_column is None and ending(argument) in ("csv", "tsv"):
        _check_header(first, sentences, argument)
    columns = _Columns(sentences, _labels(arguments, first, argument) if has_train else list(classes or ()))
    train = columns.checked(first, f"{argument}: split 'train'") if has_train else None

    def taken(name: str, count: int | None, is_predicted: bool = False) -> Dataset:
        split = take_split(splits, name, argument, count)
        path = getattr(arguments, f"{name}_file", None) if ending(argument) in TABLE_FORMATS else None
        where = argument if path is None else f"--{name}_file {path}"
        return columns.checked(split, f"{where}: split '{name}'", train, is_predicted)

    evaluation = {suffix: taken(name, arguments.max_eval_samples) for suffix, name in evaluated.items()}
    prediction = {suffix: taken(name, arguments.max_predict_samples, True) for suffix, name in predicted.items()}
    unseen = f"test{_split_ends(arguments.task_name)['']}"
    calibration = unseen_split(splits, unseen, evaluated.values(), calibration_samples)
    if calibration is not None:
        unlabelled = calibration.select_columns([name for name in calibration.column_names if name != LABEL])
        calibration = columns.checked(unlabelled, f"{argument}: split '{unseen}'", None, True)
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
        labels=columns.labels,
        train=train,
        evaluation=evaluation,
        prediction=prediction,
        calibration=calibration,
        main_metric=MAIN_METRIC.get(arguments.task_name or "", "accuracy" if columns.labels else "pearson"),
        read=columns.read(arguments, argument, first, read),
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

    def read(
        self, arguments: GlueDataArguments, argument: str, first: Dataset, splits: dict[str, Dataset]
    ) -> list[str]:
        """Say what was read: which columns of the first split for what, and which were not."""
        used = [f"sentence in column {listed([name])}" for name in self.sentences]
        if any(LABEL in split.column_names for split in splits.values()):
            used.append(f"{'class' if self.labels else 'number'} in column '{LABEL}'")
        others = [name for name in first.column_names if name not in (*self.sentences, LABEL)]
        unused = f"; not used: {listed(others)}" if others else ""
        dataset = arguments.dataset_name
        where = " (a folder here)" if dataset is not None and Path(dataset).is_dir() else ""
        return read_lines(f"{argument}{where}", f"{', '.join(used)}{unused}", splits, LABEL, self.labels)

    def checked(self, split: Dataset, where: str, train: Dataset | None = None, is_predicted: bool = False) -> Dataset:
        """The same examples with text, and with their classes as places in `labels`, or with numbers.

        Args:
            split: as it was read.
            where: what it is, for the message.
            train: what was trained on, which must have all the classes.
            is_predicted: whether it is only predicted; then it has no labels, whatever stands there.

        Raises:
            BadInput: for text or labels that are missing or of another kind, or classes that training has not.
        """
        split = _with_text(split, self.sentences, where)
        if is_predicted:
            return split.remove_columns(LABEL) if LABEL in split.features else split
        if LABEL not in split.features:
            raise BadInput(f"{where} has no column '{LABEL}', only {listed(split.column_names)}")
        if not self.labels:
            return with_numbers(split, LABEL, where)
        split = with_label_ids(split, LABEL, self.labels, where)
        if train is not None:
            check_trained(split, train, LABEL, where)
        return split


def _load_splits(
    arguments: GlueDataArguments,
    predict: bool,
    evaluate: bool,
    classes: Sequence[str] | None,
    calibrate: bool,
    download: dict[str, Any],
) -> tuple[DatasetDict, Source]:
    task, dataset, anew = arguments.task_name, arguments.dataset_name, arguments.overwrite_cache
    if task is not None:
        if dataset is None and Path(GLUE_DATASET).exists():
            raise BadInput(
                f"--task_name {task}: is read from {GLUE_DATASET} on the Hub, and here is a folder of that name; use "
                f"--dataset_name ./{GLUE_DATASET} for the folder, or start in another place"
            )
        # A folder that stands in for GLUE holds what the Hub does.
        argument = f"--task_name {task}" if dataset is None else f"--dataset_name {dataset}"
        source = Source(argument, GLUE_DATASET, True, task)
        splits = read_dataset(argument, dataset or GLUE_DATASET, task, anew, **download)
    elif dataset is not None:
        config = arguments.dataset_config_name
        source = Source.of_dataset(dataset, config, "validation")
        splits = read_dataset(source.argument, dataset, config, anew, arguments.texts, **download)
    else:
        files = _own_files(arguments, predict, evaluate, classes is None, calibrate)
        name, path = next(iter(files.items()))
        source = Source(f"--{name}_file {path}", Path(path).stem)
        splits = DatasetDict(
            {
                name: read_file(f"--{name}_file {path}", path, anew, arguments.texts, **download)
                for name, path in files.items()
            }
        )
    return DatasetDict({name: _with_label(split) for name, split in splits.items()}), source


def _with_label(split: Dataset) -> Dataset:
    """The same examples with the column `label` if its name is only spelled in another way: "Label", "labels"."""
    found = [name for name in split.column_names if column_key(name) in (LABEL, f"{LABEL}s")]
    return split.rename_column(found[0], LABEL) if len(found) == 1 and found != [LABEL] else split


def _own_files(
    arguments: GlueDataArguments, predict: bool, evaluate: bool, train: bool, calibrate: bool
) -> dict[str, str]:
    """The files to read, by their split."""
    paths = {"train": arguments.train_file, "validation": arguments.validation_file, "test": arguments.test_file}
    needed = {"train"} if train else set()
    if predict:
        needed.add("test")
    if evaluate and arguments.validation_file is None and arguments.test_file is None:
        needed.add("validation")
    if missing := [name for name in paths if name in needed and paths[name] is None]:
        raise BadInput(
            f"--{missing[0]}_file: not given; use --task_name, --dataset_name, or files of your own: --train_file to "
            "train on, --validation_file to evaluate on, --test_file for --do_predict"
        )
    if not (predict or calibrate) and arguments.validation_file is not None:
        del paths["test"]
    if not evaluate and not train:
        paths = {"test": paths["test"]}
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


def _with_text(split: Dataset, columns: tuple[str, ...], where: str) -> Dataset:
    """The same examples with text in these columns, which may be of no letters."""
    if missing := set(columns) - set(split.column_names):
        raise BadInput(f"{where} has no column {listed(missing)}, only {listed(split.column_names)}")
    for column in columns:
        split = as_text(split, column, where)
        missing_rows = [index for index, value in enumerate(split[column]) if value is None]
        refuse_missing(missing_rows, len(split), column, where)
    return split


def _check_header(split: Dataset, sentences: tuple[str, ...], argument: str) -> None:
    """Refuse a file to predict whose first line may be an example, which would be taken for the names of columns."""
    names = split.column_names
    if not any(map(means_text, sentences)) and (len(names) == 1 or any(name.isdecimal() for name in names)):
        raise BadInput(
            f"{argument}: its first line may be an example, {listed(names)}; put a line with the names of the columns "
            "above it, such as 'text', or if it is one, use --sentence1_column"
        )


def _labels(arguments: GlueDataArguments, train: Dataset, argument: str) -> list[str]:
    """Names of the classes, in the order in which they are scored; none where labels are numbers."""
    task = arguments.task_name
    if task == REGRESSION:
        return []
    labels = label_names(train, LABEL, argument, arguments.do_regression if task is None else False)
    if labels is None:
        return []
    if len(labels) < 2:
        check_none_missing(train[LABEL], LABEL, f"{argument}: split 'train'")
        raise BadInput(f"{argument}: column '{LABEL}' has the class {listed(labels)} alone; there must be two or more")
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
        f"{argument}: has the classes {listed(labels)}; they must be 'not_{positive}' and '{positive}', or 0 and 1, "
        "since F1 is about one of them"
    )
