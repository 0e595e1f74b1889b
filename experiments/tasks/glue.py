# SPDX-License-Identifier: Apache-2.0
"""Text classification and regression: the GLUE tasks (Wang et al., 2019), or sentences of one's own."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset, DatasetDict, Value
from transformers import AutoTokenizer, DataCollatorWithPadding, PerceiverTokenizer

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.errors import BadInput, naming
from experiments.tasks.base import PreparedTask, SampleArguments, Source, Task, evaluated_split, take_split
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
from experiments.tasks.reading import TABLE_FORMATS, ending, read_dataset, read_file
from experiments.tasks.scores import classes, numbers

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
LABEL = "label"


@dataclass
class GlueDataArguments(SampleArguments):
    """Which sentences."""

    _argument_group_name: ClassVar[str] = "sentences"
    file_formats: ClassVar[tuple[str, ...]] = TABLE_FORMATS

    task_name: str | None = field(default=None, metadata={"help": f"GLUE task: {', '.join(sorted(SENTENCES))}."})
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or local folder, as `datasets.load_dataset` takes it. With --task_name: where GLUE is, "
            f"instead of {GLUE_DATASET}."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_file: str | None = field(
        default=None,
        metadata={
            "help": f"Own data ({', '.join(TABLE_FORMATS)}): a column 'label' (a number with a point: regression) and "
            "'sentence1', 'sentence2', or else the first two other columns of text, or the only one."
        },
    )
    validation_file: str | None = field(default=None, metadata={"help": "The same, to evaluate on."})
    test_file: str | None = field(default=None, metadata={"help": "The same, to predict; it needs no labels."})
    max_seq_length: int | None = field(
        default=None, metadata={"help": "Longer inputs are cut, in tokens. By default: as many as the model can read."}
    )
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad to --max_seq_length, and not just to the longest of the batch."}
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Read and tokenize anew what is cached."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_name is not None:
            self.task_name = self.task_name.lower()
            if self.task_name not in SENTENCES:
                raise BadInput(f"--task_name {self.task_name}: allowed are {', '.join(sorted(SENTENCES))}")
        if self.max_seq_length is not None and self.max_seq_length < 1:
            raise BadInput(f"--max_seq_length {self.max_seq_length}: allowed is an integer of 1 or more")
        for name in ("train_file", "validation_file", "test_file"):
            path = getattr(self, name)
            if path is None:
                continue
            if ending(path) not in self.file_formats:
                raise BadInput(f"--{name} {path}: allowed are files that end in .{', .'.join(self.file_formats)}")
            if not Path(path).is_file():
                raise BadInput(f"--{name} {path}: there is no such file")


@dataclass
class GlueTask(Task):
    """Sentences, or pairs of them, and a class or a number for each.

    Attributes:
        arguments: how they become tokens.
        sentence_columns: one or two.
    """

    arguments: GlueDataArguments
    sentence_columns: tuple[str, ...]

    hub_task: ClassVar[str] = "text-classification"
    input_name: ClassVar[str] = "input_ids"

    def model_class_name(self, config: ToMePerceiverConfig) -> str:
        """Any text model may start a classifier; its decoder is new if it was no classifier."""
        for name in map(str, config.architectures or []):
            if "ForSequenceClassification" not in name and "ForMaskedLM" not in name:
                raise BadInput(
                    f"architectures = {config.architectures}: allowed for text are PerceiverForSequenceClassification, "
                    "PerceiverForMaskedLM and their ToMe twins"
                )
        return "ToMePerceiverForSequenceClassification"

    def processing_class(self, config: ToMePerceiverConfig, name: str | None, **download: Any) -> Any:
        """The tokenizer; with no name, the published language model's, whose tokens are bytes."""
        if name is None:
            return PerceiverTokenizer()
        with naming(f"--tokenizer_name {name}", Exception):
            return AutoTokenizer.from_pretrained(name, **download)

    def fit_config(self, config: ToMePerceiverConfig, processing_class: Any) -> None:
        """An embedding for each token."""
        config.vocab_size = len(processing_class)

    def prepared(self, config: ToMePerceiverConfig, processing_class: Any, seed: int) -> PreparedTask:
        """Tokens and labels, padded to the longest of each batch unless the arguments say otherwise.

        The tokenizer learns how many positions the model has, so that what is saved cuts to them.
        """
        tokenizer = processing_class
        if len(tokenizer) > config.vocab_size:
            raise BadInput(
                f"--tokenizer_name: has {len(tokenizer)} tokens, the model {config.vocab_size}; allowed is the "
                "model's own tokenizer"
            )
        positions = config.max_position_embeddings
        length = self.arguments.max_seq_length or positions
        if length > positions:
            raise BadInput(f"--max_seq_length {length}: allowed are 1 to {positions}, the positions of the model")
        if tokenizer.pad_token is None:
            raise BadInput("--tokenizer_name: has no token to pad with; allowed is a tokenizer with a pad_token")
        special = tokenizer.num_special_tokens_to_add(pair=len(self.sentence_columns) > 1)
        if length <= special:
            raise BadInput(
                f"--max_seq_length {length}: allowed are {special + 1} to {positions}, since {special} tokens are "
                "around the text"
            )
        tokenizer.model_max_length = positions
        padding = "max_length" if self.arguments.pad_to_max_length else False
        ids = label_ids(config, self.labels) if self.labels else []

        def tokenize(batch: dict[str, list]) -> dict[str, list]:
            sentences = [batch[column] for column in self.sentence_columns]
            tokens = tokenizer(
                *sentences, truncation=True, max_length=length, padding=padding, return_attention_mask=True
            )
            columns = {name: tokens[name] for name in ("input_ids", "attention_mask")}
            if LABEL in batch:
                columns["labels"] = [ids[label] if ids else float(label) for label in batch[LABEL]]
            return columns

        def tokens(dataset: Dataset, description: str) -> Dataset:
            return dataset.map(
                tokenize,
                batched=True,
                remove_columns=dataset.column_names,
                load_from_cache_file=not self.arguments.overwrite_cache,
                desc=f"Tokenizing {description}",
            )

        return PreparedTask(
            train=tokens(self.train, "train"),
            evaluation={suffix: tokens(split, f"eval{suffix}") for suffix, split in self.evaluation.items()},
            prediction={suffix: tokens(split, f"predict{suffix}") for suffix, split in self.prediction.items()},
            processing_class=tokenizer,
            collate=DataCollatorWithPadding(tokenizer),
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
    suffixes = SPLITS.get(arguments.task_name or "", {"": ""})
    evaluated = {suffix: f"validation{end}" for suffix, end in suffixes.items()}
    if arguments.task_name is None:
        labelled = lambda split: has_labels(split, LABEL)  # noqa: E731
        if evaluate or "validation" in splits:
            evaluated = {"": evaluated_split(splits, source.argument, labelled)}
            source = replace(source, split=evaluated[""])
        else:
            evaluated = {}
    predicted = {suffix: f"test{end}" for suffix, end in suffixes.items()} if predict else {}

    train = take_split(splits, "train", source.argument, None)
    sentence_columns = _sentence_columns(arguments, train, source.argument)
    labels = _labels(arguments, train, source.argument)

    def taken(name: str, count: int | None, may_lack: bool = False) -> Dataset:
        split, where = take_split(splits, name, source.argument, count), f"{source.argument}: split '{name}'"
        _check_sentences(split, sentence_columns, where)
        if may_lack and not has_labels(split, LABEL):
            return split.remove_columns(LABEL) if LABEL in split.features else split
        if LABEL not in split.features:
            raise BadInput(f"{where} has no column '{LABEL}'")
        if not labels:
            return with_numbers(split, LABEL, where)
        split = with_label_ids(split, LABEL, labels, where)
        check_trained(split, train, LABEL, where)
        return split

    where = f"{source.argument}: split 'train'"
    _check_sentences(train, sentence_columns, where)
    train = with_label_ids(train, LABEL, labels, where) if labels else with_numbers(train, LABEL, where)
    task = GlueTask(
        source=source,
        labels=labels,
        train=train,
        evaluation={suffix: taken(name, arguments.max_eval_samples) for suffix, name in evaluated.items()},
        prediction={suffix: taken(name, arguments.max_predict_samples, True) for suffix, name in predicted.items()},
        main_metric=MAIN_METRIC.get(arguments.task_name or "", "accuracy" if labels else "pearson"),
        arguments=arguments,
        sentence_columns=sentence_columns,
    )
    if arguments.max_train_samples is not None:
        task.train = train.shuffle(seed=seed).select(range(min(arguments.max_train_samples, len(train))))
    return task


def _load_splits(arguments: GlueDataArguments, predict: bool, download: dict[str, Any]) -> tuple[DatasetDict, Source]:
    task, dataset = arguments.task_name, arguments.dataset_name
    if task is not None:
        # A folder that stands in for GLUE holds what the Hub does.
        argument = f"--task_name {task}" if dataset is None else f"--dataset_name {dataset}"
        source = Source(argument, GLUE_DATASET, True, task, f"validation{SPLITS.get(task, {'': ''})['']}")
        return read_dataset(argument, dataset or GLUE_DATASET, task, arguments.overwrite_cache, **download), source
    if dataset is not None:
        source = Source.of_dataset(dataset, arguments.dataset_config_name, "validation")
        config = arguments.dataset_config_name
        return read_dataset(source.argument, dataset, config, arguments.overwrite_cache, **download), source
    paths = {"train": arguments.train_file, "validation": arguments.validation_file, "test": arguments.test_file}
    needed = {"train"} | ({"test"} if predict else set())
    if arguments.validation_file is None and arguments.test_file is None:
        needed.add("validation")
    if missing := sorted(name for name in needed if paths[name] is None):
        raise BadInput(
            f"--{missing[0]}_file: not given; allowed are --task_name, --dataset_name, or files of one's own to train "
            "on and to evaluate on (a test file for --do_predict)"
        )
    source = Source(f"--train_file {arguments.train_file}", Path(str(arguments.train_file)).stem)
    if not predict and arguments.validation_file is not None:
        del paths["test"]
    return DatasetDict(
        {
            name: read_file(f"--{name}_file {path}", path, arguments.overwrite_cache, **download)
            for name, path in paths.items()
            if path is not None
        }
    ), source


def _is_text(dataset: Dataset, column: str) -> bool:
    feature = dataset.features[column]
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def _sentence_columns(arguments: GlueDataArguments, train: Dataset, argument: str) -> tuple[str, ...]:
    if arguments.task_name is not None:
        return SENTENCES[arguments.task_name]
    others = [name for name in train.column_names if name not in (LABEL, "idx")]
    if {"sentence1", "sentence2"} <= set(others):
        return ("sentence1", "sentence2")
    # A number beside the text, such as an identity, is none of it.
    columns = [name for name in others if _is_text(train, name)]
    if not columns:
        raise BadInput(f"{argument}: has no column with sentences, of text, beside {listed(train.features)}")
    return tuple(columns[:2])


def _check_sentences(split: Dataset, columns: tuple[str, ...], where: str) -> None:
    """Check that there is text for each example, which may be of no letters."""
    if missing := set(columns) - set(split.column_names):
        raise BadInput(f"{where} has no column {listed(missing)}")
    for column in columns:
        if not _is_text(split, column):
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
