# SPDX-License-Identifier: Apache-2.0
"""Masked language modelling: sentences of which some tokens are hidden, to be found again.

Letters: B batch, S input positions, P positions that the model decodes (`config.max_position_embeddings`), V tokens of
the vocabulary.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
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
from experiments.tasks.base import Batch, PreparedTask, Source
from experiments.tasks.labels import listed
from experiments.tasks.reading import TEXT_FORMATS, read_dataset, read_file
from experiments.tasks.redrawn_examples import NextEpoch, RedrawnExamples
from experiments.tasks.scores import NOT_ASKED
from experiments.tasks.text import LABEL, TextDataArguments, TextTask, is_text

MODEL_CLASS = "ToMePerceiverForMaskedLM"
SENTENCE = "sentence"
TRAIN, VALIDATION = "train", "validation"
# Of the order of evaluated sentences and of what is hidden in them: the same for all models that are compared, whatever
# they were trained with.
EVALUATION_SEED = 0


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
            "help": f"Own data ({', '.join(TEXT_FORMATS)}): each line, or each text of any column but 'label', is a "
            "sentence."
        },
    )
    mlm_probability: float = field(
        default=0.15, metadata={"help": "Masked language modelling: share of the tokens to be found again."}
    )
    mask_replace_prob: float = field(
        default=0.8,
        metadata={
            "help": "Masked language modelling: share of these that a mask stands for. The less, the more a model "
            "learns to carry what it sees; a small one from scratch learns that first."
        },
    )
    random_replace_prob: float = field(
        default=0.1, metadata={"help": "Masked language modelling: share of these that another token stands for."}
    )
    line_by_line: bool = field(
        default=True, metadata={"help": "Masked language modelling: each line or sentence is an input of its own."}
    )
    validation_split_percentage: int = field(
        default=5,
        metadata={
            "help": "Masked language modelling: percentage of the sentences to evaluate on, if there is no validation "
            "split."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.line_by_line:
            raise BadInput("--line_by_line False: allowed is True; lines are not joined to longer inputs here")
        if not 0 < self.validation_split_percentage < 100:
            raise BadInput(
                f"--validation_split_percentage {self.validation_split_percentage}: allowed are the integers 1 to 99"
            )
        if not 0 < self.mlm_probability <= 1:
            raise BadInput(f"--mlm_probability {self.mlm_probability}: allowed is a number above 0, up to 1")
        replaced = {name: getattr(self, name) for name in ("mask_replace_prob", "random_replace_prob")}
        for name, value in replaced.items():
            if value < 0 or sum(replaced.values()) > 1:
                raise BadInput(f"--{name} {value}: allowed are two numbers of 0 or more, together at most 1")


@dataclass
class MlmTask(TextTask):
    """Sentences, in the column `sentence`, to be masked."""

    arguments: MlmDataArguments

    hub_task: ClassVar[str] = "fill-mask"
    classifies: ClassVar[bool] = False

    def model_class_name(self, config: ToMePerceiverConfig) -> str:
        """The masked language model, and no other."""
        for name in map(str, config.architectures or []):
            if "ForMaskedLM" not in name:
                raise BadInput(
                    f"architectures = {config.architectures}: allowed for masked language modelling are "
                    f"PerceiverForMaskedLM and {MODEL_CLASS}"
                )
        return MODEL_CLASS

    def fit_config(self, config: ToMePerceiverConfig, processing_class: Any) -> None:
        """An embedding for each token, and no more positions than inputs may have: each is decoded, used or not."""
        super().fit_config(config, processing_class)
        config.max_position_embeddings = self.arguments.max_seq_length or config.max_position_embeddings

    def prepared(self, config: ToMePerceiverConfig, processing_class: Any, seed: int) -> PreparedTask:
        """Training sentences masked anew whenever they are read, evaluated ones once, in the same way for every model.

        An evaluated sentence of which nothing is masked is left out.
        """
        if processing_class.mask_token is None:
            raise BadInput(
                "--tokenizer_name: has no mask token; allowed is a tokenizer with one, such as that of "
                "examples/train_tokenizer.py"
            )
        tokens = self.tokens(config, processing_class)
        masking, once = (Masking(processing_class, self.arguments) for _ in range(2))
        once.reseed(EVALUATION_SEED)

        def masked(example: dict[str, Any], index: int, random: np.random.Generator) -> dict[str, Tensor]:
            masking.reseed(int(random.integers(2**63)))
            return masking(example)

        train = RedrawnExamples(tokens.train, masked, seed)
        return PreparedTask(
            train=train,
            evaluation={suffix: masked_once(split, once) for suffix, split in tokens.evaluation.items()},
            prediction=tokens.prediction,
            processing_class=processing_class,
            collate=MaskedCollate(processing_class, config.max_position_embeddings),
            predicted=lambda predictions: predictions,
            kind="masked_lm",
            callbacks=[NextEpoch(train)],
            reduce_logits=likeliest_tokens,
        )


class Masking:
    """Hides tokens as BERT does (Devlin et al., 2019, section 3.1): by default 80% of those that are asked are masked,
    10% random, 10% left as they are."""

    def __init__(self, tokenizer: Any, arguments: MlmDataArguments) -> None:
        self.collate = DataCollatorForLanguageModeling(
            tokenizer,
            mlm_probability=arguments.mlm_probability,
            mask_replace_prob=arguments.mask_replace_prob,
            random_replace_prob=arguments.random_replace_prob,
        )
        self.collate.generator = torch.Generator()

    def reseed(self, seed: int) -> None:
        """Draw from here on what this seed says."""
        self.collate.generator.manual_seed(seed)

    def __call__(self, example: dict[str, list]) -> dict[str, Tensor]:
        """From the tokens of an example to its `input_ids`, `attention_mask` and `labels` (S,)."""
        return {name: value[0] for name, value in self.collate([example]).items()}


def masked_once(split: Dataset, masking: Masking) -> list[dict[str, Tensor]]:
    """The examples, masked one by one in their order, of which anything is asked.

    Raises:
        BadInput: if that is none.
    """
    examples = [example for example in map(masking, split) if (example["labels"] != NOT_ASKED).any()]
    if not examples:
        raise BadInput(
            f"--mlm_probability {masking.collate.mlm_probability}: masks no token of the evaluated sentences; allowed "
            "is a larger one, or more sentences"
        )
    return examples


class MaskedCollate:
    """From examples to a batch; labels, if there are any, for each of the P positions that the model decodes."""

    def __init__(self, tokenizer: Any, positions: int) -> None:
        self.pad = DataCollatorForTokenClassification(tokenizer, label_pad_token_id=NOT_ASKED)
        self.positions = positions

    def __call__(self, examples: list[dict[str, Any]]) -> Batch:
        """`input_ids` and `attention_mask` (B, S), and `labels` (B, P) with `NOT_ASKED` where nothing is masked."""
        batch = dict(self.pad(examples))
        if "labels" in batch:
            batch["labels"] = F.pad(batch["labels"], (0, self.positions - batch["labels"].shape[1]), value=NOT_ASKED)
        return batch


def likeliest_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    """From logits (B, P, V) to the likeliest of V tokens, (B, P)."""
    return logits.argmax(dim=-1)


def load_mlm_task(
    arguments: MlmDataArguments, predict: bool, seed: int, evaluate: bool = True, **download: Any
) -> MlmTask:
    """Load the sentences that the arguments mean, of several configurations as one.

    What is evaluated is dropped from training, and sentences that differ by case and punctuation alone are one.

    Args:
        arguments: which sentences.
        predict: whether predictions are asked for; there are none.
        seed: of the order in which training sentences are cut off by `max_train_samples`.
        evaluate: whether anything is evaluated; there always is something.
        download: `cache_dir` and `token` for `datasets.load_dataset`.

    Raises:
        BadInput: for a dataset or split that is not there, or no sentences in it.
    """
    if predict:
        raise BadInput("--do_predict: allowed for classification; masked language models take --do_train and --do_eval")
    pools, source = _load_splits(arguments, download)
    train, evaluated = (_distinct(pools[role]) for role in (TRAIN, VALIDATION))
    if not pools[VALIDATION]:
        count = len(train) * arguments.validation_split_percentage // 100
        evaluated = dict(random.Random(EVALUATION_SEED).sample(list(train.items()), count))
    trained = {key: sentence for key, sentence in train.items() if key not in evaluated}
    return MlmTask(
        source=source,
        labels=[],
        train=_shuffled(trained, TRAIN, arguments.max_train_samples, seed, source.argument),
        evaluation={"": _shuffled(evaluated, VALIDATION, arguments.max_eval_samples, EVALUATION_SEED, source.argument)},
        prediction={},
        main_metric="accuracy",
        arguments=arguments,
        sentence_columns=(SENTENCE,),
    )


def _load_splits(arguments: MlmDataArguments, download: dict[str, Any]) -> tuple[dict[str, list[Dataset]], Source]:
    """The splits to train on and those to evaluate on, which may be none."""
    configs, anew = arguments.dataset_config_name, arguments.overwrite_cache
    pools: dict[str, list[Dataset]] = {TRAIN: [], VALIDATION: []}
    if arguments.dataset_name is not None:
        source = Source.of_dataset(arguments.dataset_name, configs, VALIDATION)
        for config in [None] if configs is None else configs.split(","):
            splits = read_dataset(source.argument, arguments.dataset_name, config, anew, **download)
            if TRAIN not in splits:
                raise BadInput(f"{source.argument}: has no split '{TRAIN}', only {listed(splits)}")
            for role, pool in pools.items():
                # MNLI has two to validate on.
                pool += [split for name, split in splits.items() if name.partition("_")[0] == role]
        return pools, source
    if arguments.train_file is None:
        raise BadInput("--train_file: not given; allowed are --dataset_name, or a file of one's own")
    source = Source(f"--train_file {arguments.train_file}", Path(arguments.train_file).stem)
    for role, path in ((TRAIN, arguments.train_file), (VALIDATION, arguments.validation_file)):
        if path is not None:
            pools[role].append(read_file(f"--{role}_file {path}", path, anew, **download))
    return pools, source


def _distinct(splits: list[Dataset]) -> dict[str, str]:
    """The sentences of all columns of text, by what tells them apart: their letters and digits, in any case."""
    columns = (split[name] for split in splits for name in split.column_names if name != LABEL and is_text(split, name))
    sentences = (sentence.strip() for column in columns for sentence in column if sentence is not None)
    return {re.sub(r"\W+", "", sentence).casefold() or sentence: sentence for sentence in sentences if sentence}


def _shuffled(sentences: dict[str, str], role: str, count: int | None, seed: int, argument: str) -> Dataset:
    """The first few in an order in which all configurations are mixed."""
    if not sentences:
        raise BadInput(f"{argument}: has no sentences for '{role}'; allowed is text, and not only duplicates of it")
    texts = random.Random(seed).sample(list(sentences.values()), len(sentences))
    return Dataset.from_dict({SENTENCE: texts[:count]})
