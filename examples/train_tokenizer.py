# SPDX-License-Identifier: Apache-2.0
"""Train a subword tokenizer on the sentences of one GLUE task or several, for a small model from scratch.

  python examples/train_tokenizer.py --task_name sst2 --vocab_size 8000 --output_dir outputs/sst2_tokenizer
  python run_glue.py --task_name sst2 --tokenizer_name outputs/sst2_tokenizer \\
      --config_name examples/small_text_perceiver.json --do_train --do_eval --output_dir outputs/sst2
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

# A script's own folder is on the path, the repository's root, where the modules are, is not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.errors import exit_on_bad_input
from experiments.tasks.reading import read_dataset

SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def train_tokenizer(sentences: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A lower-case WordPiece tokenizer; a sentence becomes [CLS] A [SEP], a pair [CLS] A [SEP] B [SEP]."""
    tokenizer = Tokenizer(models.WordPiece(unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = list(SPECIAL_TOKENS.values())
    tokenizer.train_from_iterator(sentences, trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--task_name", required=True, help="GLUE task, or another configuration; several: sst2,mrpc")
    parser.add_argument("--dataset_name", default="nyu-mll/glue", help="Hub id or folder (default: %(default)s)")
    parser.add_argument("--vocab_size", type=int, default=8000, help="tokens at most (default: %(default)s)")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the tokenizer")
    arguments = parser.parse_args()
    splits = [
        read_dataset(f"--dataset_name {arguments.dataset_name}", arguments.dataset_name, name, anew=False)["train"]
        for name in arguments.task_name.split(",")
    ]
    sentences = (
        sentence
        for train in splits
        for column, feature in train.features.items()
        if getattr(feature, "dtype", None) == "string"
        for sentence in train[column]
    )
    tokenizer = train_tokenizer(sentences, arguments.vocab_size)
    tokenizer.save_pretrained(arguments.output_dir)
    print(f"{len(tokenizer)} tokens in {arguments.output_dir}")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
