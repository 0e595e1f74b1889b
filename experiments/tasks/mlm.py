# SPDX-License-Identifier: Apache-2.0
"""Masked language modelling: sentences of which some tokens are hidden, to be found again.

Letters: B batch, S input positions, P positions that the model decodes (`config.max_position_embeddings`), V tokens of
the vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from transformers import DataCollatorForLanguageModeling, DataCollatorForTokenClassification

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.errors import BadInput
from experiments.tasks.base import LABELS, Batch, PreparedTask, Source, Splits
from experiments.tasks.labels import listed
from experiments.tasks.reading import TEXT_FORMATS, read_dataset, read_file
from experiments.tasks.redrawn_examples import RedrawnExamples
from experiments.tasks.scores import NOT_ASKED
from experiments.tasks.text import Columns, TextDataArguments, TextTask
from experiments.tasks.text_columns import SENTENCE, Line, Split, distinct, masked_columns, read_sentences

MODEL_CLASS = "ToMePerceiverForMaskedLM"
# Number of splits whose columns are told to a user.
MOST_SHOWN = 4
TRAIN, VALIDATION, TEST = "train", "validation", "test"
# Decides the order of evaluated sentences and what is hidden in them: the same for all models that are compared.
EVALUATION_SEED = 0
CLASSIFICATION_ONLY = "masked language models, which predict nothing, refuse it"


@dataclass
class MlmDataArguments(TextDataArguments):
    """Which sentences, and how many of their tokens are hidden."""

    file_formats: ClassVar[tuple[str, ...]] = TEXT_FORMATS

    dataset_config_name: str | None = field(
        default=None,
        metadata={"help": "Configuration of the dataset; for masked language modelling also several: sst2,mrpc,rte."},
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "help": f"Own data ({', '.join(TEXT_FORMATS)}), also beside --dataset_name: each line of a .txt file, or "
            "each text of the column 'text' or of those whose names mean text, is a sentence."
        },
    )
    test_file: str | None = field(default=None, metadata={"help": f"The same, to predict; {CLASSIFICATION_ONLY}."})
    max_predict_samples: int | None = field(
        default=None, metadata={"help": f"Predict for at most this many; {CLASSIFICATION_ONLY}."}
    )
    text_column: list[str] = field(
        default_factory=list,
        metadata={"help": "Masked language modelling: columns with the sentences, if their names do not say so."},
    )
    mlm_probability: float = field(
        default=0.15, metadata={"help": "Masked language modelling: share of the tokens to be found again."}
    )
    mask_replace_prob: float = field(
        default=0.8,
        metadata={
            "help": "Masked language modelling: share of these that a mask replaces. The less, the more a model "
            "learns to carry what it sees; a small one from scratch learns that first."
        },
    )
    random_replace_prob: float = field(
        default=0.1, metadata={"help": "Masked language modelling: share of these that another token replaces."}
    )
    line_by_line: bool = field(
        default=True,
        metadata={
            "help": "Masked language modelling: each line or sentence is an input of its own. False: they are joined "
            "in their order, the sentences of a row one after another, and cut to inputs of --max_seq_length."
        },
    )
    validation_split_percentage: int = field(
        default=5,
        metadata={
            "help": "Masked language modelling: percentage of the sentences to evaluate on, if there is no validation "
            "split; of joined lines it is the first ones."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.validation_split_percentage < 100:
            raise BadInput(
                f"--validation_split_percentage {self.validation_split_percentage}: must be an integer from 1 to 99"
            )
        if not 0 < self.mlm_probability <= 1:
            raise BadInput(f"--mlm_probability {self.mlm_probability}: must be a number above 0, up to 1")
        replaced = {name: getattr(self, name) for name in ("mask_replace_prob", "random_replace_prob")}
        for name, value in replaced.items():
            if value < 0 or sum(replaced.values()) > 1:
                raise BadInput(f"--{name} {value}: must be a number of 0 or more, at most 1 with the other one")


@dataclass
class MlmTask(TextTask):
    """Sentences, in the column `sentence`, to be masked."""

    arguments: MlmDataArguments

    hub_task: ClassVar[str] = "fill-mask"
    classifies: ClassVar[bool] = False

    def model_class_name(self, config: ToMePerceiverConfig) -> str:
        """Return the masked language model, and no other."""
        for name in map(str, config.architectures or []):
            if "ForMaskedLM" not in name:
                raise BadInput(
                    f"architectures = {config.architectures}: choose for masked language modelling from "
                    f"PerceiverForMaskedLM and {MODEL_CLASS}"
                )
        return MODEL_CLASS

    def fit_config(self, config: ToMePerceiverConfig, processing_class: Any) -> None:
        """Give the model an embedding for each token, and no more positions than inputs have: each is decoded."""
        super().fit_config(config, processing_class)
        config.max_position_embeddings = self.arguments.max_seq_length or config.max_position_embeddings

    def prepared(self, config: ToMePerceiverConfig, processing_class: Any, seed: int) -> PreparedTask:
        """Mask training sentences anew whenever they are read, evaluated ones once, in the same way for every model.

        An evaluated sentence of which nothing is masked is left out.
        """
        if processing_class.mask_token is None:
            raise BadInput(
                "--tokenizer_name: has no mask token; use a tokenizer with one, such as that of "
                "examples/train_tokenizer.py"
            )
        tokens = self.tokens(config, processing_class)
        if not self.arguments.line_by_line:
            tokens = self._drawn(tokens, seed)
        masking = Masking(processing_class, self.arguments)
        once = Masking(processing_class, self.arguments, EVALUATION_SEED)
        pad = DataCollatorForTokenClassification(processing_class, label_pad_token_id=NOT_ASKED)

        def masked(example: dict[str, Any], index: int, random: np.random.Generator) -> dict[str, Tensor]:
            masking.generator.manual_seed(int(random.integers(2**63)))
            return masking(example)

        def collate(examples: list[dict[str, Any]]) -> Batch:
            """Return inputs (B, S) and, if there are any, labels (B, P) for each position that the model decodes."""
            batch = dict(pad(examples))
            if LABELS in batch:
                missing = config.max_position_embeddings - batch[LABELS].shape[1]
                batch[LABELS] = F.pad(batch[LABELS], (0, missing), value=NOT_ASKED)
            return batch

        return PreparedTask(
            train=RedrawnExamples(tokens.train, masked, seed),
            evaluation={suffix: masked_once(split, once) for suffix, split in tokens.evaluation.items()},
            prediction=tokens.prediction,
            calibration=masked_once(tokens.calibration, once) if tokens.calibration else None,
            processing_class=processing_class,
            collate=collate,
            predicted=lambda predictions: predictions,
            kind="masked_lm",
            reduce_logits=lambda logits, labels: logits.argmax(dim=-1),  # the likeliest tokens (B, P) of (B, P, V)
        )

    def tokenizing(self, tokenizer: Any, length: int, label_ids: Sequence[int]) -> Callable[[Columns], Columns]:
        """Make each sentence an input, or join all of them, with special tokens around each, to inputs of `length`.

        What is left of a batch at its end is dropped, as by the official run_mlm.py.
        """
        if self.arguments.line_by_line:
            return super().tokenizing(tokenizer, length, label_ids)
        tokenizer(["a"])  # as in `experiments.tasks.text`

        def join(batch: Columns) -> Columns:
            sentences = [sentence for line in batch[SENTENCE] for sentence in line]
            # Which are not too long: they are cut below.
            ids = list(chain.from_iterable(tokenizer(sentences, verbose=False)["input_ids"]))
            rows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
            return {"input_ids": rows, "attention_mask": [[1] * length for _ in rows]}

        return join

    def _drawn(self, tokens: TextTask, seed: int) -> TextTask:
        """Return as many inputs of joined lines as are asked for, once it is known what they are.

        Raises:
            BadInput: if there are none.
        """
        for role, split in ((TRAIN, tokens.train), (VALIDATION, tokens.evaluation[""])):
            if not len(split):
                raise BadInput(
                    f"{self.source.argument}: has fewer tokens for '{role}' than an input of joined lines; use more "
                    "text, a smaller --max_seq_length, or --line_by_line"
                )
        evaluated = first_shuffled(tokens.evaluation[""], self.arguments.max_eval_samples, EVALUATION_SEED)
        train = first_shuffled(tokens.train, self.arguments.max_train_samples, seed)
        return replace(tokens, train=train, evaluation={"": evaluated})


class Masking:
    """Masks tokens as BERT does (Devlin et al., 2019, section 3.1): by default, of the tokens that are chosen, 80% are
    masked, 10% random and 10% left as they are."""

    def __init__(self, tokenizer: Any, arguments: MlmDataArguments, seed: int = 0) -> None:
        self.collate = DataCollatorForLanguageModeling(
            tokenizer,
            mlm_probability=arguments.mlm_probability,
            mask_replace_prob=arguments.mask_replace_prob,
            random_replace_prob=arguments.random_replace_prob,
        )
        self.generator = self.collate.generator = torch.Generator().manual_seed(seed)

    def __call__(self, example: dict[str, list]) -> dict[str, Tensor]:
        """Return `input_ids`, `attention_mask` and `labels` (S,) of the tokens of an example."""
        return {name: value[0] for name, value in self.collate([example]).items()}


def masked_once(split: Dataset, masking: Masking) -> list[dict[str, Tensor]]:
    """Return the examples, masked one by one in their order, of which any token is masked.

    Raises:
        BadInput: if that is none.
    """
    examples = [example for example in map(masking, split) if (example["labels"] != NOT_ASKED).any()]
    if not examples:
        raise BadInput(
            f"--mlm_probability {masking.collate.mlm_probability}: masks no token of the evaluated sentences; use a "
            "larger one, or more sentences"
        )
    return examples


def load_mlm_task(
    arguments: MlmDataArguments,
    predict: bool,
    seed: int,
    evaluate: bool = True,
    calibration_samples: int = 0,
    **download: Any,
) -> MlmTask:
    """Load the sentences that the arguments mean, of several configurations as one.

    What is evaluated is dropped from training, and sentences that differ by case and punctuation alone are one.
    Arguments and errors are those of `load_glue_task`; whatever `evaluate` says, something is evaluated.

    Raises:
        BadInput: also if predictions are asked for.
    """
    _refuse_prediction(arguments, predict)
    pools, source = _load_splits(arguments, download)
    if not calibration_samples:
        pools[TEST] = []
    lines = {
        role: read_sentences(pool, arguments.text_column, not arguments.line_by_line, arguments.overwrite_cache)
        for role, pool in pools.items()
    }
    places = {role: distinct(split) for role, split in lines.items()}
    known = {sentence for role in (TRAIN, VALIDATION) for line in places[role] for sentence in line}
    unseen = lines[TEST].select([place for line, place in places[TEST].items() if known.isdisjoint(line)])
    if not pools[VALIDATION]:
        lines[VALIDATION], places[VALIDATION] = lines[TRAIN], _held_out(places[TRAIN], arguments)
    seen = {sentence for line in places[VALIDATION] for sentence in line}
    trained = {line: place for line, place in places[TRAIN].items() if seen.isdisjoint(line)}
    selected = {}
    for role, chosen, count, drawn in (
        (TRAIN, trained, arguments.max_train_samples, seed),
        (VALIDATION, places[VALIDATION], arguments.max_eval_samples, EVALUATION_SEED),
    ):
        if not chosen:
            hint = " but duplicates of evaluated ones" if role == TRAIN and places[TRAIN] else ""
            raise BadInput(f"{source.argument}: has no sentences for '{role}'{hint}; use text with others")
        split = lines[role].select(list(chosen.values()))
        selected[role] = first_shuffled(split, count, drawn) if arguments.line_by_line else split
    return MlmTask(
        source=source,
        labels=[],
        train=selected[TRAIN],
        evaluation={"": selected[VALIDATION]},
        prediction={},
        calibration=Splits(source.argument, {TEST: unseen}).unseen(TEST, (), calibration_samples),
        main_metric="accuracy",
        read=_read_lines(pools[TRAIN], selected, arguments.text_column),
        arguments=arguments,
        sentence_columns=(SENTENCE,),
    )


def _held_out(train: dict[Line, int], arguments: MlmDataArguments) -> dict[Line, int]:
    """Return the training lines to evaluate on where there are no others: of joined lines the first ones."""
    count = len(train) * arguments.validation_split_percentage // 100
    chosen = (
        random.Random(EVALUATION_SEED).sample(list(train), count) if arguments.line_by_line else list(train)[:count]
    )
    return {line: train[line] for line in chosen}


def _refuse_prediction(arguments: MlmDataArguments, predict: bool) -> None:
    if predict:
        raise BadInput("--do_predict: is for classification; masked language models take --do_train and --do_eval")
    for name, instead in (("test_file", "validation_file"), ("max_predict_samples", "max_eval_samples")):
        if (value := getattr(arguments, name)) is not None:
            raise BadInput(
                f"--{name} {value}: is for classification; masked language models predict nothing, and are evaluated "
                f"on --{instead}"
            )


def _read_lines(pool: list[Split], selected: dict[str, Dataset], named: Sequence[str]) -> list[str]:
    """Return lines that say which columns of what are sentences, and how many of these there are."""
    lines: dict[str, None] = {}
    for argument, examples in pool:
        columns = masked_columns(examples.column_names, argument, named)
        others = [name for name in examples.column_names if name not in columns]
        unused = f", not {listed(others, ordered=True)}" if others else ""
        lines[f"{argument}: sentences from {listed(columns, ordered=True)}{unused}"] = None
    counts = ", ".join(f"{name}: {len(split):,} sentences" for name, split in selected.items())
    return [*lines][:MOST_SHOWN] + [f"{counts}, without repetitions"]


def _load_splits(arguments: MlmDataArguments, download: dict[str, Any]) -> tuple[dict[str, list[Split]], Source]:
    """The splits to train on, to evaluate on and to calibrate on; of the last two there may be none."""
    configs, anew = arguments.dataset_config_name, arguments.overwrite_cache
    pools: dict[str, list[Split]] = {TRAIN: [], VALIDATION: [], TEST: []}
    sources = []
    if arguments.dataset_name is not None:
        source = Source.of_dataset(arguments.dataset_name, configs)
        sources.append(source)
        for config in [None] if configs is None else configs.split(","):
            splits = read_dataset(source.argument, arguments.dataset_name, config, anew, **download)
            if TRAIN not in splits:
                raise BadInput(f"{source.argument}: has no split '{TRAIN}', only {listed(splits)}")
            for role, pool in pools.items():
                pool += [
                    Split(f"{source.argument}: split '{name}'", split)
                    for name, split in splits.items()
                    if name.partition("_")[0] == role
                ]
    if arguments.train_file is not None:
        sources.append(Source(f"--train_file {arguments.train_file}", Path(arguments.train_file).stem))
    if not sources:
        raise BadInput("--train_file: not given; use --dataset_name, a file of your own, or both")
    for role, path in ((TRAIN, arguments.train_file), (VALIDATION, arguments.validation_file)):
        if path is not None:
            argument = f"--{role}_file {path}"
            pools[role].append(Split(argument, read_file(argument, path, anew, **download)))
    return pools, sources[0]


def first_shuffled(examples: Dataset, count: int | None, seed: int) -> Dataset:
    """Return the first `count` examples, by default all, of an order in which all are mixed."""
    return examples.select(random.Random(seed).sample(range(len(examples)), len(examples))[:count])
