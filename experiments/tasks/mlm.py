# SPDX-License-Identifier: Apache-2.0
"""Masked language modelling: load sentences, remove duplicates, mask tokens; called by run_mlm.py and eval_sweep.py.

Shapes: B batch size, S input positions, P positions that the model decodes (`config.max_position_embeddings`), V
vocabulary size.
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
from experiments.tasks.scores import IGNORE_INDEX
from experiments.tasks.text import Columns, TextDataArguments, TextTask
from experiments.tasks.text_columns import SENTENCE, LineKey, Split, find_distinct, masked_columns, read_sentences

MODEL_CLASS = "ToMePerceiverForMaskedLM"
# Maximum number of splits whose columns are shown to the user.
MAX_SOURCES_SHOWN = 4
TRAIN, VALIDATION, TEST = "train", "validation", "test"
# Seed for the order and the masks of evaluated sentences: fixed, so that all compared models see the same inputs.
EVALUATION_SEED = 0
CLASSIFICATION_ONLY = "for classification only, not for masked language modelling"


@dataclass
class MlmDataArguments(TextDataArguments):
    """Arguments that choose the sentences and how they are masked."""

    file_formats: ClassVar[tuple[str, ...]] = TEXT_FORMATS

    dataset_config_name: str | None = field(
        default=None,
        metadata={
            "help": "Configuration of the dataset; for masked language modelling also several, such as sst2,mrpc,rte."
        },
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "help": f"File to train on ({', '.join(TEXT_FORMATS)}), may be combined with --dataset_name. Sentences are "
            "the lines of a .txt file, or the rows of the column 'text', or else of all columns named like text."
        },
    )
    test_file: str | None = field(default=None, metadata={"help": f"File to predict, {CLASSIFICATION_ONLY}."})
    max_predict_samples: int | None = field(
        default=None, metadata={"help": f"Predict for at most this many examples, {CLASSIFICATION_ONLY}."}
    )
    text_column: list[str] = field(
        default_factory=list,
        metadata={"help": "Masked language modelling: columns with the sentences (default: found by their names)."},
    )
    mlm_probability: float = field(
        default=0.15, metadata={"help": "Masked language modelling: share of the tokens to predict."}
    )
    mask_replace_prob: float = field(
        default=0.8,
        metadata={
            "help": "Masked language modelling: share of the tokens to predict that the mask token replaces. A "
            "smaller share trains more on copying visible tokens, which a small model from scratch learns first."
        },
    )
    random_replace_prob: float = field(
        default=0.1,
        metadata={"help": "Masked language modelling: share of the tokens to predict that a random token replaces."},
    )
    line_by_line: bool = field(
        default=True,
        metadata={
            "help": "Masked language modelling: make each line or sentence an input of its own. False: join all in "
            "order, and cut them into inputs of --max_seq_length tokens."
        },
    )
    validation_split_percentage: int = field(
        default=5,
        metadata={
            "help": "Masked language modelling: percentage of the training sentences to hold out for evaluation if "
            "there is no validation split: random ones, or the first ones with --line_by_line false."
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
                raise BadInput(
                    f"--{name} {value}: must be 0 or more, and --mask_replace_prob and --random_replace_prob together "
                    "at most 1"
                )


@dataclass
class MlmTask(TextTask):
    """Sentences to mask, in the column `sentence`."""

    arguments: MlmDataArguments

    hub_task: ClassVar[str] = "fill-mask"
    classifies: ClassVar[bool] = False

    def model_class_name(self, config: ToMePerceiverConfig) -> str:
        """Return the masked language model; refuse a config for another architecture."""
        for name in map(str, config.architectures or []):
            if "ForMaskedLM" not in name:
                raise BadInput(
                    f"architectures = {config.architectures}: for masked language modelling, choose from "
                    f"PerceiverForMaskedLM and {MODEL_CLASS}"
                )
        return MODEL_CLASS

    def fit_config(self, config: ToMePerceiverConfig, processing_class: Any) -> None:
        """Set the vocabulary size and, since every position is decoded, the number of positions: the inputs' length."""
        super().fit_config(config, processing_class)
        config.max_position_embeddings = self.arguments.max_seq_length or config.max_position_embeddings

    def prepare(self, config: ToMePerceiverConfig, processing_class: Any, seed: int) -> PreparedTask:
        """Tokenize and mask: training sentences differently in each epoch, evaluated ones alike for every model.

        Evaluated sentences without any masked token are left out.
        """
        if processing_class.mask_token is None:
            raise BadInput(
                "--tokenizer_name: has no mask token; use a tokenizer with one, such as one made by "
                "examples/train_tokenizer.py"
            )
        tokens = self.tokenize(config, processing_class)
        if not self.arguments.line_by_line:
            tokens = self._select_inputs(tokens, seed)
        masking = Masking(processing_class, self.arguments)
        evaluation_masking = Masking(processing_class, self.arguments, EVALUATION_SEED)
        pad = DataCollatorForTokenClassification(processing_class, label_pad_token_id=IGNORE_INDEX)

        def masked(example: dict[str, Any], index: int, random: np.random.Generator) -> dict[str, Tensor]:
            masking.generator.manual_seed(int(random.integers(2**63)))
            return masking(example)

        def collate(examples: list[dict[str, Any]]) -> Batch:
            """Return inputs (B, S) and, for masked examples, labels (B, P) of all positions that the model decodes."""
            batch = dict(pad(examples))
            if LABELS in batch:
                missing = config.max_position_embeddings - batch[LABELS].shape[1]
                batch[LABELS] = F.pad(batch[LABELS], (0, missing), value=IGNORE_INDEX)
            return batch

        return PreparedTask(
            train=RedrawnExamples(tokens.train, masked, seed),
            evaluation={suffix: mask_once(split, evaluation_masking) for suffix, split in tokens.evaluation.items()},
            prediction=tokens.prediction,
            calibration=mask_once(tokens.calibration, evaluation_masking) if tokens.calibration else None,
            processing_class=processing_class,
            collate=collate,
            decode_logits=lambda predictions: predictions,
            kind="masked_lm",
            reduce_logits=lambda logits, labels: logits.argmax(dim=-1),  # (B, P, V) to (B, P)
        )

    def make_tokenize(self, tokenizer: Any, length: int, label_ids: Sequence[int]) -> Callable[[Columns], Columns]:
        """Return the function that tokenizes each sentence, or joins sentences and cuts them into inputs of `length`.

        Joined sentences keep their special tokens. The remainder of a batch, shorter than `length`, is dropped, as in
        the official run_mlm.py.
        """
        if self.arguments.line_by_line:
            return super().make_tokenize(tokenizer, length, label_ids)
        tokenizer(["a"])  # makes the hash for the cache independent of earlier calls, as in `TextTask`

        def join(batch: Columns) -> Columns:
            sentences = [sentence for line in batch[SENTENCE] for sentence in line]
            # No warnings about long sentences: they are cut below.
            ids = list(chain.from_iterable(tokenizer(sentences, verbose=False)["input_ids"]))
            rows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
            return {"input_ids": rows, "attention_mask": [[1] * length for _ in rows]}

        return join

    def _select_inputs(self, tokens: TextTask, seed: int) -> TextTask:
        """Shuffle and limit the inputs made of joined lines; before tokenization it is unknown how many there are.

        Raises:
            BadInput: if a split has no input.
        """
        for role, split in ((TRAIN, tokens.train), (VALIDATION, tokens.evaluation[""])):
            if not len(split):
                raise BadInput(
                    f"{self.source.argument}: has fewer tokens for '{role}' than one input of joined lines; use more "
                    "text, a smaller --max_seq_length, or --line_by_line"
                )
        evaluated = shuffle_and_cut(tokens.evaluation[""], self.arguments.max_eval_samples, EVALUATION_SEED)
        train = shuffle_and_cut(tokens.train, self.arguments.max_train_samples, seed)
        return replace(tokens, train=train, evaluation={"": evaluated})


class Masking:
    """Masking of tokens as in BERT (Devlin et al., 2019, section 3.1).

    By default, 80% of the chosen tokens are masked, 10% are replaced by random tokens and 10% stay.
    """

    def __init__(self, tokenizer: Any, arguments: MlmDataArguments, seed: int = 0) -> None:
        self.collate = DataCollatorForLanguageModeling(
            tokenizer,
            mlm_probability=arguments.mlm_probability,
            mask_replace_prob=arguments.mask_replace_prob,
            random_replace_prob=arguments.random_replace_prob,
        )
        self.generator = self.collate.generator = torch.Generator().manual_seed(seed)

    def __call__(self, example: dict[str, list]) -> dict[str, Tensor]:
        """Mask an example: return `input_ids`, `attention_mask` and `labels`, each (S,)."""
        return {name: value[0] for name, value in self.collate([example]).items()}


def mask_once(split: Dataset, masking: Masking) -> list[dict[str, Tensor]]:
    """Mask examples one by one, in order, and return those with at least one masked token.

    Raises:
        BadInput: if there is none.
    """
    examples = [example for example in map(masking, split) if (example["labels"] != IGNORE_INDEX).any()]
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
    """Load the sentences that the arguments choose, from all configurations together.

    Sentences that differ only in case and punctuation are duplicates: one of them is kept, and sentences that are
    evaluated are not trained on. Arguments and errors are those of `load_glue_task`, except that `evaluate` is ignored:
    there is always an evaluation split.

    Raises:
        BadInput: also if `predict` is true.
    """
    _refuse_prediction(arguments, predict)
    pools, source = _load_splits(arguments, download)
    if not calibration_samples:
        pools[TEST] = []
    lines = {
        role: read_sentences(pool, arguments.text_column, not arguments.line_by_line, arguments.overwrite_cache)
        for role, pool in pools.items()
    }
    indices = {role: find_distinct(split) for role, split in lines.items()}
    known = {sentence for role in (TRAIN, VALIDATION) for line in indices[role] for sentence in line}
    unseen = lines[TEST].select([index for line, index in indices[TEST].items() if known.isdisjoint(line)])
    if not pools[VALIDATION]:
        lines[VALIDATION], indices[VALIDATION] = lines[TRAIN], _choose_held_out(indices[TRAIN], arguments)
    evaluated = {sentence for line in indices[VALIDATION] for sentence in line}
    trained = {line: index for line, index in indices[TRAIN].items() if evaluated.isdisjoint(line)}
    selected = {}
    for role, chosen, count, shuffle_seed in (
        (TRAIN, trained, arguments.max_train_samples, seed),
        (VALIDATION, indices[VALIDATION], arguments.max_eval_samples, EVALUATION_SEED),
    ):
        if not chosen:
            hint = " except duplicates of evaluated ones" if role == TRAIN and indices[TRAIN] else ""
            raise BadInput(f"{source.argument}: has no sentences for '{role}'{hint}; add other sentences")
        split = lines[role].select(list(chosen.values()))
        selected[role] = shuffle_and_cut(split, count, shuffle_seed) if arguments.line_by_line else split
    return MlmTask(
        source=source,
        labels=[],
        train=selected[TRAIN],
        evaluation={"": selected[VALIDATION]},
        prediction={},
        calibration=Splits(source.argument, {TEST: unseen}).take_unlabelled(TEST, (), calibration_samples),
        main_metric="accuracy",
        summary=_summarize(pools[TRAIN], selected, arguments.text_column),
        arguments=arguments,
        sentence_columns=(SENTENCE,),
    )


def _choose_held_out(train: dict[LineKey, int], arguments: MlmDataArguments) -> dict[LineKey, int]:
    """Choose the training lines to hold out for evaluation: random ones, or the first ones of joined lines."""
    count = len(train) * arguments.validation_split_percentage // 100
    chosen = (
        random.Random(EVALUATION_SEED).sample(list(train), count) if arguments.line_by_line else list(train)[:count]
    )
    return {line: train[line] for line in chosen}


def _refuse_prediction(arguments: MlmDataArguments, predict: bool) -> None:
    if predict:
        raise BadInput(
            "--do_predict: is for classification; for masked language modelling use --do_train and --do_eval"
        )
    for name, instead in (("test_file", "validation_file"), ("max_predict_samples", "max_eval_samples")):
        if (value := getattr(arguments, name)) is not None:
            raise BadInput(f"--{name} {value}: is for classification; for masked language modelling use --{instead}")


def _summarize(pool: list[Split], selected: dict[str, Dataset], named: Sequence[str]) -> list[str]:
    """Return lines that tell the user which columns hold the sentences, and the number of sentences of each split."""
    lines: dict[str, None] = {}
    for argument, examples in pool:
        columns = masked_columns(examples.column_names, argument, named)
        others = [name for name in examples.column_names if name not in columns]
        unused = f", not {listed(others, ordered=True)}" if others else ""
        lines[f"{argument}: sentences from {listed(columns, ordered=True)}{unused}"] = None
    counts = ", ".join(f"{name}: {len(split):,} sentences" for name, split in selected.items())
    return [*lines][:MAX_SOURCES_SHOWN] + [f"{counts}, without repetitions"]


def _load_splits(arguments: MlmDataArguments, download: dict[str, Any]) -> tuple[dict[str, list[Split]], Source]:
    """Return the splits by role, and their source; there may be no splits to evaluate or to calibrate on."""
    configs, overwrite_cache = arguments.dataset_config_name, arguments.overwrite_cache
    pools: dict[str, list[Split]] = {TRAIN: [], VALIDATION: [], TEST: []}
    sources = []
    if arguments.dataset_name is not None:
        source = Source.of_dataset(arguments.dataset_name, configs)
        sources.append(source)
        for config in [None] if configs is None else configs.split(","):
            splits = read_dataset(source.argument, arguments.dataset_name, config, overwrite_cache, **download)
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
        raise BadInput("--train_file: not given; use --train_file, --dataset_name, or both")
    for role, path in ((TRAIN, arguments.train_file), (VALIDATION, arguments.validation_file)):
        if path is not None:
            argument = f"--{role}_file {path}"
            pools[role].append(Split(argument, read_file(argument, path, overwrite_cache, **download)))
    return pools, sources[0]


def shuffle_and_cut(examples: Dataset, count: int | None, seed: int) -> Dataset:
    """Shuffle the examples and return the first `count`, by default all."""
    return examples.select(random.Random(seed).sample(range(len(examples)), len(examples))[:count])
