# SPDX-License-Identifier: Apache-2.0
"""Train a subword tokenizer on the sentences of a dataset, for a small model that is trained from scratch.

  python examples/train_tokenizer.py --task_name sst2 --vocab_size 8000 --output_dir outputs/sst2_tokenizer
  python run_glue.py --task_name sst2 --tokenizer_name outputs/sst2_tokenizer \\
      --config_name examples/small_text_perceiver.json --do_train --do_eval --output_dir outputs/sst2

Or reduce the tokenizer of a BERT to its most frequent tokens, for examples/language/from_bert.py:

  python examples/train_tokenizer.py --teacher_name_or_path sentence-transformers/all-MiniLM-L6-v2 \\
      --dataset_name Salesforce/wikitext --task_name wikitext-103-raw-v1 --vocab_size 16384 \\
      --output_dir outputs/smaller_tokenizer
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

# Python adds this script's folder to sys.path, but not the repository root, which holds the modules.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.errors import BadInput, exit_on_bad_input, naming
from experiments.files import check_writable
from experiments.tasks.base import Splits
from experiments.tasks.reading import read_dataset
from experiments.tasks.text_columns import as_text, masked_columns

SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
COUNTING_BATCH_SIZE = 1000


def train_tokenizer(sentences: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a lower-case WordPiece tokenizer; a sentence becomes [CLS] A [SEP], a pair [CLS] A [SEP] B [SEP]."""
    tokenizer = Tokenizer(models.WordPiece(unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = list(SPECIAL_TOKENS.values())
    tokenizer.train_from_iterator(sentences, trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=special))
    return _with_special_tokens(tokenizer, SPECIAL_TOKENS)


def smaller_tokenizer(teacher: Any, sentences: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Reduce the teacher's tokenizer to its special tokens and the tokens most frequent in the sentences.

    They keep the teacher's order and get new ids. A dropped token is split into kept ones, or becomes unknown.

    Args:
        teacher: a WordPiece tokenizer, such as BERT's.
        sentences: texts to count tokens in.
        vocab_size: most tokens to keep.

    Raises:
        BadInput: if the tokenizer is not WordPiece, or `vocab_size` leaves no room beside the special tokens.
    """
    state = json.loads(teacher.backend_tokenizer.to_str()) if teacher.is_fast else {"model": {"type": "slow"}}
    if state["model"]["type"] != "WordPiece":
        raise BadInput(f"--teacher_name_or_path: has a {state['model']['type']} tokenizer; must be WordPiece")
    special = set(teacher.all_special_ids)
    if vocab_size <= len(special):
        raise BadInput(
            f"--vocab_size {vocab_size}: must be {len(special) + 1} or more, because {len(special)} are the "
            "teacher's special tokens"
        )
    counts: Counter[int] = Counter()
    while batch := list(islice(sentences, COUNTING_BATCH_SIZE)):
        for ids in teacher(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            counts.update(ids)
    found = sorted((index for index in counts if index not in special), key=lambda index: (-counts[index], index))
    kept = [*sorted(special), *sorted(found[: vocab_size - len(special)])]
    vocab = {token: index for index, token in enumerate(teacher.convert_ids_to_tokens(kept))}
    state["model"]["vocab"] = vocab
    state["added_tokens"] = [
        each | {"id": vocab[each["content"]]} for each in state["added_tokens"] if each["content"] in vocab
    ]
    state |= {"truncation": None, "padding": None, "post_processor": None}
    return _with_special_tokens(Tokenizer.from_str(json.dumps(state)), teacher.special_tokens_map)


def _with_special_tokens(tokenizer: Tokenizer, special_tokens: dict[str, str]) -> PreTrainedTokenizerFast:
    """Add special tokens around each sentence, [CLS] A [SEP], and each pair, [CLS] A [SEP] B [SEP]."""
    first, last = special_tokens["cls_token"], special_tokens["sep_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B {last}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (first, last)],
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--task_name", help="GLUE tasks or other configurations, separated by commas: sst2,mrpc")
    parser.add_argument(
        "--teacher_name_or_path",
        help="Hub id or folder of a tokenizer; keep its most frequent tokens instead of training",
    )
    parser.add_argument("--dataset_name", default="nyu-mll/glue", help="Hub id or folder (default: %(default)s)")
    parser.add_argument(
        "--text_column", nargs="+", default=[], help="columns with the sentences (default: chosen by their names)"
    )
    parser.add_argument("--vocab_size", type=int, default=8000, help="most tokens (default: %(default)s)")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the tokenizer")
    arguments = parser.parse_args()
    if arguments.vocab_size <= len(SPECIAL_TOKENS):
        raise BadInput(
            f"--vocab_size {arguments.vocab_size}: must be {len(SPECIAL_TOKENS) + 1} or more, because "
            f"{len(SPECIAL_TOKENS)} are special tokens"
        )
    check_writable(f"--output_dir {arguments.output_dir}", arguments.output_dir)
    teacher = None
    if arguments.teacher_name_or_path is not None:
        with naming(f"--teacher_name_or_path {arguments.teacher_name_or_path}", Exception):
            teacher = AutoTokenizer.from_pretrained(arguments.teacher_name_or_path)
    argument, columns = f"--dataset_name {arguments.dataset_name}", []
    for name in [None] if arguments.task_name is None else arguments.task_name.split(","):
        splits = read_dataset(argument, arguments.dataset_name, name, overwrite_cache=False)
        train = Splits(argument, splits).take("train")
        for column in masked_columns(train.column_names, f"{argument}: split 'train'", arguments.text_column):
            columns.append(as_text(train, column, argument)[column])
    sentences = (sentence for column in columns for sentence in column if sentence and sentence.strip())
    first = list(islice(sentences, 1))
    if not first:
        raise BadInput(f"{argument}: has no text in its columns of sentences")
    sentences = chain(first, sentences)
    if teacher is None:
        tokenizer = train_tokenizer(sentences, arguments.vocab_size)
    else:
        tokenizer = smaller_tokenizer(teacher, sentences, arguments.vocab_size)
    if len(tokenizer) > arguments.vocab_size:
        raise BadInput(
            f"--vocab_size {arguments.vocab_size}: must be {len(tokenizer)} or more, to cover all characters"
        )
    tokenizer.save_pretrained(arguments.output_dir)
    print(f"{len(tokenizer)} tokens in {arguments.output_dir}")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
