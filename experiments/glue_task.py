# SPDX-License-Identifier: Apache-2.0
"""Text classification and regression: the GLUE tasks (Wang et al., 2019), or sentences of one's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from datasets import ClassLabel, Dataset, DatasetDict, Value, load_dataset
from transformers import AutoTokenizer, DataCollatorWithPadding, PerceiverTokenizer

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.bad_input import BadInput, naming
from experiments.scores import classes, numbers
from experiments.task import (
    NOT_THERE,
    READ_ANEW,
    PreparedTask,
    SampleArguments,
    Source,
    Task,
    check_labels,
    listed,
    take_split,
)

GLUE_DATASET = "nyu-mll/glue"
SENTENCES = {
    "cola": ("sentence",), "mnli": ("premise", "hypothesis"), "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"), "qqp": ("question1", "question2"), "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence",), "stsb": ("sentence1", "sentence2"), "wnli": ("sentence1", "sentence2"),
}  # fmt: skip
MAIN_METRIC = {"cola": "matthews_correlation", "stsb": "pearson"}
# MNLI is evaluated on sentences of the training set's genres and, with results that end in _mm, of others.
SPLITS = {"mnli": {"": "_matched", "_mm": "_mismatched"}}
FILE_FORMATS = ("csv", "json", "parquet")
LABEL = "label"
# What test splits have in place of labels that are kept back: GLUE's, and files without the column beside others.
NO_LABEL = (-1, None)


@dataclass
class GlueDataArguments(SampleArguments):
    """Which sentences."""

    _argument_group_name: ClassVar[str] = "sentences"
    file_formats: ClassVar[tuple[str, ...]] = FILE_FORMATS

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
            "help": f"Own data ({', '.join(FILE_FORMATS)}): a column 'label' (a number with a point: regression) and "
            "'sentence1', 'sentence2', or else the first two other columns, or the only one."
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
            if Path(path).suffix.removeprefix(".") not in self.file_formats:
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
        for name in config.architectures or []:
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
        with naming(f"--tokenizer_name {name}", OSError, ValueError):
            return AutoTokenizer.from_pretrained(name, **download)

    def fit_config(self, config: ToMePerceiverConfig, processing_class: Any) -> None:
        """An embedding for each token."""
        config.vocab_size = len(processing_class)

    def prepared(self, config: ToMePerceiverConfig, processing_class: Any, seed: int) -> PreparedTask:
        """Tokens and labels, padded to the longest of each batch unless the arguments say otherwise."""
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
        padding = "max_length" if self.arguments.pad_to_max_length else False
        # The checkpoint's order of the same labels, which may be another one.
        label_ids = [config.label2id[label] for label in self.labels]

        def tokenize(batch: dict[str, list]) -> dict[str, list]:
            sentences = [batch[column] for column in self.sentence_columns]
            tokens = tokenizer(*sentences, truncation=True, max_length=length, padding=padding)
            columns = {name: tokens[name] for name in ("input_ids", "attention_mask")}
            if LABEL in batch:
                columns["labels"] = [label_ids[label] if label_ids else float(label) for label in batch[LABEL]]
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
        )


def load_glue_task(arguments: GlueDataArguments, predict: bool, seed: int, **download: Any) -> GlueTask:
    """Load the sentences that the arguments mean.

    Args:
        arguments: which sentences.
        predict: whether the test split is needed too.
        seed: of the order in which training examples are cut off by `max_train_samples`.
        download: `cache_dir` and `token` for `datasets.load_dataset`.

    Raises:
        BadInput: for a dataset, split or column that is not there, an empty split, or labels that are not among those
            of the training split.
    """
    splits, source = _load_splits(arguments, predict, download)
    suffixes = SPLITS.get(arguments.task_name or "", {"": ""})
    names = {
        "train": ["train"],
        "validation": [f"validation{ending}" for ending in suffixes.values()],
        "test": [f"test{ending}" for ending in suffixes.values()] if predict else [],
    }
    counts = {"train": None, "validation": arguments.max_eval_samples, "test": arguments.max_predict_samples}
    taken = {
        name: take_split(splits, name, source.argument, counts[role]) for role, roles in names.items() for name in roles
    }
    sentence_columns = _sentence_columns(arguments, taken["train"], source.argument)
    labels = _labels(taken["train"], source.argument)
    for name, split in taken.items():
        needed = set(sentence_columns) | (set() if name in names["test"] else {LABEL})
        if missing := needed - set(split.column_names):
            raise BadInput(f"{source.argument}: split '{name}' has no column {listed(missing)}")
        where = f"{source.argument}: split '{name}'"
        taken[name] = _with_labels(split, labels, name in names["test"], where, splits["train"])
    train = taken["train"]
    if arguments.max_train_samples is not None:
        train = train.shuffle(seed=seed).select(range(min(arguments.max_train_samples, len(train))))
    return GlueTask(
        source=source,
        labels=labels,
        train=train,
        evaluation={suffix: taken[f"validation{ending}"] for suffix, ending in suffixes.items()},
        prediction={suffix: taken[f"test{ending}"] for suffix, ending in suffixes.items()} if predict else {},
        main_metric=MAIN_METRIC.get(arguments.task_name or "", "accuracy" if labels else "pearson"),
        arguments=arguments,
        sentence_columns=sentence_columns,
    )


def _load_splits(arguments: GlueDataArguments, predict: bool, download: dict[str, Any]) -> tuple[DatasetDict, Source]:
    task, dataset = arguments.task_name, arguments.dataset_name
    if arguments.overwrite_cache:
        # datasets knows a folder with several configurations by its name alone, whatever has changed in it.
        download = download | READ_ANEW
    if task is not None:
        # A folder that stands in for GLUE holds what the Hub does.
        argument = f"--task_name {task}" if dataset is None else f"--dataset_name {dataset}"
        source = Source(argument, GLUE_DATASET, True, task, f"validation{SPLITS.get(task, {'': ''})['']}")
        with naming(argument, *NOT_THERE):
            return load_dataset(dataset or GLUE_DATASET, task, **download), source
    if dataset is not None:
        source = Source.of_dataset(dataset, arguments.dataset_config_name, "validation")
        with naming(source.argument, *NOT_THERE):
            return load_dataset(dataset, arguments.dataset_config_name, **download), source
    paths = {"train": arguments.train_file, "validation": arguments.validation_file}
    if predict:
        paths["test"] = arguments.test_file
    files = {split: path for split, path in paths.items() if path is not None}
    if missing := set(paths) - set(files):
        raise BadInput(
            f"--{min(missing)}_file: not given; allowed are --task_name, --dataset_name, or files of one's own for "
            "every split (a test file only with --do_predict)"
        )
    formats = {Path(path).suffix.removeprefix(".") for path in files.values()}
    source = Source(f"--train_file {files['train']}", Path(files["train"]).stem)
    if len(formats) > 1:
        raise BadInput(f"{source.argument}: allowed are files of one format, here {listed(formats)}")
    with naming(source.argument, *NOT_THERE):
        return load_dataset(formats.pop(), data_files=files, **download), source


def _sentence_columns(arguments: GlueDataArguments, train: Dataset, argument: str) -> tuple[str, ...]:
    if arguments.task_name is not None:
        return SENTENCES[arguments.task_name]
    others = [name for name in train.column_names if name not in (LABEL, "idx")]
    if not others:
        raise BadInput(f"{argument}: has no column with sentences beside {listed(train.column_names)}")
    if {"sentence1", "sentence2"} <= set(others):
        return ("sentence1", "sentence2")
    return tuple(others[:2])


def _labels(train: Dataset, argument: str) -> list[str]:
    """Names of the classes; none where labels are numbers with a point."""
    if LABEL not in train.features:
        raise BadInput(f"{argument}: has no column '{LABEL}', only {listed(train.column_names)}")
    feature = train.features[LABEL]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    if feature.dtype.startswith("float"):
        return []
    return [str(label) for label in sorted(train.unique(LABEL))]


def _with_labels(split: Dataset, labels: list[str], may_lack: bool, where: str, train: Dataset) -> Dataset:
    """The split with its labels as places in `labels`, or without any where they are kept back."""
    if may_lack and (LABEL not in split.features or set(split.unique(LABEL)) <= set(NO_LABEL)):
        return split.remove_columns(LABEL) if LABEL in split.features else split
    if not labels:
        with naming(f"{where}, column '{LABEL}'", ValueError, TypeError):
            return split.cast_column(LABEL, Value("float32"))
    check_labels(split, train, LABEL, labels, where)
    if isinstance(split.features[LABEL], ClassLabel):
        return split
    return split.cast_column(LABEL, Value("string")).cast_column(LABEL, ClassLabel(names=labels))
