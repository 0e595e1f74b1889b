# SPDX-License-Identifier: Apache-2.0
"""Pair sentences, and label each pair with its similarity, from 0 to 5, by a teacher: training data for a small model.

A task such as MRPC has a few thousand pairs, too few for a small model to learn to compare two sentences at all. A
pretrained sentence encoder, the teacher, labels any number of pairs. Half of a sentence's partners are near neighbours,
a quarter are far neighbours, and a quarter are random.

  python examples/label_pairs.py --teacher_name_or_path sentence-transformers/all-MiniLM-L6-v2 \\
      --task_name mrpc,rte,stsb,sst2 --output_dir outputs/pairs
  python run_glue.py --model_name_or_path FOLDER --train_file outputs/pairs/train.csv \\
      --validation_file outputs/pairs/validation.csv --do_train --do_eval --output_dir outputs/paired
  python run_glue.py --model_name_or_path outputs/paired --task_name stsb --do_train --do_eval --output_dir outputs/stsb

Letters: S sentences, C channels of the teacher.
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer

# Python adds this script's folder to sys.path, but not the repository root, which holds the modules.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.errors import BadInput, exit_on_bad_input, naming
from experiments.files import check_writable, write_whole
from experiments.tasks.base import Splits
from experiments.tasks.reading import read_dataset
from experiments.tasks.text_columns import masked_columns

MIN_CHARACTERS, MAX_CHARACTERS = 20, 200
"""Length of a sentence: shorter ones say little, and a pair must fit into one input."""
ENCODING_BATCH_SIZE, COMPARISON_BATCH_SIZE = 64, 1000
NEAR_RANKS, FAR_RANKS = (1, 8), (9, 500)
"""First and last rank, by similarity, of near and of far neighbours."""
MAX_SCORE = 5.0
"""Label of two equal sentences, as in STS-B."""
VALIDATION_SHARE = 0.05
"""Share of the sentences whose pairs are in validation.csv."""


@torch.no_grad()
def encode(name: str, sentences: Sequence[str]) -> Tensor:
    """Return the mean of each sentence's last hidden states (S, C), normalised to length 1."""
    with naming(f"--teacher_name_or_path {name}", Exception):
        tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name, dtype=torch.float32)
    means = torch.zeros(len(sentences), model.config.hidden_size)
    # Batches of sentences of similar length need little padding.
    order = sorted(range(len(sentences)), key=lambda index: len(sentences[index]))
    for start in tqdm(range(0, len(order), ENCODING_BATCH_SIZE), desc="encoding sentences", disable=None):
        indices = order[start : start + ENCODING_BATCH_SIZE]
        inputs = tokenizer([sentences[index] for index in indices], padding=True, return_tensors="pt")
        states = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        means[indices] = F.normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)
    return means


def draw_pairs(means: Tensor, pairs: int, seed: int) -> Iterator[tuple[int, int, float]]:
    """Draw partners for each sentence.

    Args:
        means: (S, C), encoded sentences of length 1; S is 2 or more.
        pairs: number of pairs of each sentence.
        seed: random seed.

    Yields:
        indices of both sentences, and their cosine similarity; negative ones become 0.
    """
    generator = random.Random(seed)
    count = len(means)
    for start in tqdm(range(0, count, COMPARISON_BATCH_SIZE), desc="pairing sentences", disable=None):
        similarities = means[start : start + COMPARISON_BATCH_SIZE] @ means.T
        ranked = similarities.topk(min(FAR_RANKS[1] + 1, count), dim=1).indices.tolist()
        for row, partners in enumerate(ranked):
            for _ in range(pairs):
                low, high = generator.choice((NEAR_RANKS, NEAR_RANKS, FAR_RANKS, (0, 0)))
                rank = generator.randint(min(low, count - 1), min(high, count - 1))
                other = partners[rank] if high else generator.randrange(count)
                if other != start + row:
                    yield start + row, other, max(0.0, float(similarities[row, other]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--teacher_name_or_path", required=True, help="Hub id or folder of a sentence encoder")
    parser.add_argument("--task_name", help="GLUE tasks or other configurations, separated by commas: sst2,mrpc")
    parser.add_argument("--dataset_name", default="nyu-mll/glue", help="Hub id or folder (default: %(default)s)")
    parser.add_argument("--max_sentences", type=int, default=40_000, help="most sentences (default: %(default)s)")
    parser.add_argument("--pairs_per_sentence", type=int, default=2, help="pairs of each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="random seed (default: %(default)s)")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for train.csv and validation.csv")
    arguments = parser.parse_args()
    for name in ("max_sentences", "pairs_per_sentence"):
        if (value := getattr(arguments, name)) < 1:
            raise BadInput(f"--{name} {value}: must be 1 or more")
    check_writable(f"--output_dir {arguments.output_dir}", arguments.output_dir)
    names = [None] if arguments.task_name is None else arguments.task_name.split(",")
    argument = f"--dataset_name {arguments.dataset_name}"
    splits = [
        Splits(argument, read_dataset(argument, arguments.dataset_name, name, overwrite_cache=False)).take("train")
        for name in names
    ]
    found = dict.fromkeys(
        sentence.strip()
        for train in splits
        for column in masked_columns(train.column_names, f"{argument}: split 'train'")
        for sentence in train[column]
        if sentence is not None and MIN_CHARACTERS <= len(sentence) <= MAX_CHARACTERS
    )
    if len(found) < 2:
        raise BadInput(
            f"{argument}: has {len(found)} sentences of {MIN_CHARACTERS} to {MAX_CHARACTERS} characters; use 2 or more"
        )
    sentences = list(found)
    random.Random(arguments.seed).shuffle(sentences)
    sentences = sentences[: arguments.max_sentences]
    means = encode(arguments.teacher_name_or_path, sentences)

    pairs = list(draw_pairs(means, arguments.pairs_per_sentence, arguments.seed))
    first = round((1 - VALIDATION_SHARE) * len(sentences))

    def write(path: Path, rows: Sequence[tuple[int, int, float]]) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(("sentence1", "sentence2", "label"))
            table.writerows(
                (sentences[one], sentences[other], f"{MAX_SCORE * cosine:.3f}") for one, other, cosine in rows
            )

    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    for name, rows in (
        ("train", [pair for pair in pairs if pair[0] < first]),
        ("validation", [pair for pair in pairs if pair[0] >= first]),
    ):
        write_whole(arguments.output_dir / f"{name}.csv", partial(write, rows=rows))
    print(f"{len(pairs):,} pairs of {len(sentences):,} sentences in {arguments.output_dir}")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
