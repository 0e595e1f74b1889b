# SPDX-License-Identifier: Apache-2.0
"""Masked language modelling: sentences of which some tokens are hidden, to be found again.

Letters: B batch, S input positions, P positions that the model decodes (`config.max_position_embeddings`), V tokens of
the vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset, DatasetDict, Value, load_dataset
from torch import Tensor
from torch.nn import functional as F
from transformers import DataCollatorForLanguageModeling, DataCollatorForTokenClassification

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.bad_input import BadInput, naming
from experiments.glue_task import GlueDataArguments, GlueTask
from experiments.scores import NOT_ASKED
from experiments.task import NOT_THERE, Batch, PreparedTask, Source, listed

MODEL_CLASS = "ToMePerceiverForMaskedLM"
SENTENCE = "sentence"
TRAIN, VALIDATION = "train", "validation"
# Of the order of evaluated sentences and of what is hidden in them: the same for all models that are compared, whatever
# they were trained with.
EVALUATION_SEED = 0


@dataclass
class MlmDataArguments(GlueDataArguments):
    """Which sentences, and how many of their tokens are hidden."""

    _argument_group_name: ClassVar[str] = "sentences"

    dataset_config_name: str | None = field(
        default=None,
        metadata={"help": "Configuration of the dataset; for masked language modelling also several: sst2,mrpc,rte."},
    )
    mlm_probability: float = field(
        default=0.15, metadata={"help": "Masked language modelling: share of the tokens to be found again."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mlm_probability <= 1:
            raise BadInput(f"--mlm_probability {self.mlm_probability}: allowed is a number above 0, up to 1")


@dataclass
class MlmTask(GlueTask):
    """Sentences, in the column `sentence`, to be masked."""

    arguments: MlmDataArguments

    hub_task: ClassVar[str] = "fill-mask"
    classifies: ClassVar[bool] = False

    def model_class_name(self, config: ToMePerceiverConfig) -> str:
        """The masked language model, and no other."""
        for name in config.architectures or []:
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
        tokens = super().prepared(config, processing_class, seed)
        mask = Masking(processing_class, self.arguments.mlm_probability)
        mask_once = Masking(processing_class, self.arguments.mlm_probability, EVALUATION_SEED)
        return replace(
            tokens,
            train=tokens.train.with_transform(mask),
            evaluation={suffix: masked_once(split, mask_once) for suffix, split in tokens.evaluation.items()},
            collate=MaskedCollate(processing_class, config.max_position_embeddings),
            predicted=lambda predictions: predictions,
            kind="masked_lm",
            reduce_logits=likeliest_tokens,
        )


class Masking:
    """Hides tokens as BERT does (Devlin et al., 2019, section 3.1): 80% masked, 10% random, 10% left as they are."""

    def __init__(self, tokenizer: Any, mlm_probability: float, seed: int | None = None) -> None:
        self.collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=mlm_probability, seed=seed)

    def __call__(self, columns: dict[str, list]) -> dict[str, Tensor]:
        """From columns of lists to `input_ids`, `attention_mask` and `labels` (B, S), padded to the longest."""
        return dict(self.collate([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]))


def masked_once(split: Dataset, masking: Masking) -> list[dict[str, Tensor]]:
    """The examples, masked one by one in their order, of which anything is asked.

    Raises:
        BadInput: if that is none.
    """
    rows = (masking({name: [value] for name, value in row.items()}) for row in split)
    examples = [{name: value[0] for name, value in row.items()} for row in rows if (row["labels"] != NOT_ASKED).any()]
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


def load_mlm_task(arguments: MlmDataArguments, predict: bool, seed: int, **download: Any) -> MlmTask:
    """Load the sentences that the arguments mean, of several configurations as one.

    What stands in a validation split is dropped from training, whatever its case and punctuation.

    Args:
        arguments: which sentences.
        predict: whether a test split is asked for; there is none.
        seed: of the order in which training sentences are cut off by `max_train_samples`.
        download: `cache_dir` and `token` for `datasets.load_dataset`.

    Raises:
        BadInput: for a dataset or split that is not there, or no sentences in it.
    """
    if predict:
        raise BadInput("--do_predict: allowed are --do_train and --do_eval; there is nothing to predict without labels")
    if arguments.task_name is not None:
        raise BadInput(
            f"--task_name {arguments.task_name}: allowed for classification; masked language modelling takes "
            "--dataset_name and --dataset_config_name, or files"
        )
    pools, source = _load_splits(arguments, download)
    sentences = {
        name: _distinct(sentence for split in splits for sentence in _sentences(split))
        for name, splits in pools.items()
    }
    train = [text for key, text in sentences[TRAIN].items() if key not in sentences[VALIDATION]]
    datasets = {}
    for name, texts, count, order in (
        (TRAIN, train, arguments.max_train_samples, seed),
        (VALIDATION, list(sentences[VALIDATION].values()), arguments.max_eval_samples, EVALUATION_SEED),
    ):
        if not texts:
            raise BadInput(f"{source.argument}: split '{name}' has no sentences; allowed is one column of text or more")
        dataset = Dataset.from_dict({SENTENCE: texts}).shuffle(seed=order)
        datasets[name] = dataset if count is None else dataset.select(range(min(count, len(dataset))))
    return MlmTask(
        source=source,
        labels=[],
        train=datasets[TRAIN],
        evaluation={"": datasets[VALIDATION]},
        prediction={},
        main_metric="accuracy",
        arguments=arguments,
        sentence_columns=(SENTENCE,),
    )


def _load_splits(arguments: MlmDataArguments, download: dict[str, Any]) -> tuple[dict[str, list[Dataset]], Source]:
    """The splits to train and those to evaluate on."""
    if arguments.dataset_name is None:
        return _load_files(arguments, download)
    names = arguments.dataset_config_name
    source = Source.of_dataset(arguments.dataset_name, names, VALIDATION)
    pools: dict[str, list[Dataset]] = {TRAIN: [], VALIDATION: []}
    for config in [None] if names is None else names.split(","):
        with naming(source.argument, *NOT_THERE):
            splits: DatasetDict = load_dataset(arguments.dataset_name, config, **download)
        for role, pool in pools.items():
            # MNLI has two to validate on.
            found = [split for name, split in splits.items() if name.partition("_")[0] == role]
            if not found:
                raise BadInput(f"{source.argument}: has no split '{role}', only {listed(splits)}")
            pool += found
    return pools, source


def _load_files(arguments: MlmDataArguments, download: dict[str, Any]) -> tuple[dict[str, list[Dataset]], Source]:
    files = {TRAIN: arguments.train_file, VALIDATION: arguments.validation_file}
    pools = {}
    for name, path in files.items():
        if path is None:
            raise BadInput(f"--{name}_file: not given; allowed are --dataset_name, or a file for {' and '.join(files)}")
        with naming(f"--{name}_file {path}", *NOT_THERE):
            pools[name] = [load_dataset(Path(path).suffix[1:], data_files=path, split="train", **download)]
    return pools, Source(f"--train_file {files[TRAIN]}", Path(str(files[TRAIN])).stem)


def _sentences(split: Dataset) -> Iterator[str]:
    for name, feature in split.features.items():
        if isinstance(feature, Value) and feature.dtype in ("string", "large_string"):
            yield from (text.strip() for text in split[name] if text is not None and text.strip())


def _distinct(sentences: Iterable[str]) -> dict[str, str]:
    """Sentences by what tells them apart: their letters and digits, in any case."""
    return {re.sub(r"\W+", "", sentence).casefold() or sentence: sentence for sentence in sentences}
