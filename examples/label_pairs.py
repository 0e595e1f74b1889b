# SPDX-License-Identifier: Apache-2.0
"""Pair sentences and let a teacher say how alike they are, from 0 to 5: what a small model learns to compare by.

A task such as MRPC has a few thousand pairs, too few to learn from that two sentences are to be compared at all. A
sentence encoder, the teacher, knows that, and pairs can be had without labels. Of the pairs of a sentence one in two is
with a near neighbour, one in four with a far one, and one in four with any.

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

# A script's own folder is on the path, the repository's root, where the modules are, is not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.errors import BadInput, exit_on_bad_input, naming
from experiments.files import check_writable, write_whole
from experiments.tasks.base import Splits
from experiments.tasks.reading import read_dataset
from experiments.tasks.text_columns import masked_columns

# Characters of a sentence: two of them are to be read at once, and a word or two say little.
SHORTEST, LONGEST = 20, 200
ENCODED_AT_ONCE, COMPARED_AT_ONCE = 64, 1000
# Ranks by likeness of near neighbours and of far ones.
NEAR, FAR = (1, 8), (9, 500)
HIGHEST = 5.0
"""As in STS-B."""
VALIDATION = 0.05
"""Share of the sentences whose pairs are to evaluate on."""


@torch.no_grad()
def encode(name: str, sentences: Sequence[str]) -> Tensor:
    """The mean of each sentence's last hidden states, (S, C), of length 1."""
    with naming(f"--teacher_name_or_path {name}", Exception):
        tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name, dtype=torch.float32)
    means = torch.zeros(len(sentences), model.config.hidden_size)
    # Sentences of a length together need little padding.
    order = sorted(range(len(sentences)), key=lambda place: len(sentences[place]))
    for start in tqdm(range(0, len(order), ENCODED_AT_ONCE), desc="reading sentences", disable=None):
        places = order[start : start + ENCODED_AT_ONCE]
        inputs = tokenizer([sentences[place] for place in places], padding=True, return_tensors="pt")
        states = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        means[places] = F.normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)
    return means


def pairs_of(means: Tensor, pairs: int, seed: int) -> Iterator[tuple[int, int, float]]:
    """Sentences with partners, and how alike they are.

    Args:
        means: (S, C) of length 1, S at least 2.
        pairs: of each sentence.
        seed: of the choice.

    Yields:
        places of both sentences, and their cosine, below 0 as 0.
    """
    chosen = random.Random(seed)
    count = len(means)
    for start in tqdm(range(0, count, COMPARED_AT_ONCE), desc="pairing sentences", disable=None):
        alike = means[start : start + COMPARED_AT_ONCE] @ means.T
        ranked = alike.topk(min(FAR[1] + 1, count), dim=1).indices.tolist()
        for row, partners in enumerate(ranked):
            for _ in range(pairs):
                low, high = chosen.choice((NEAR, NEAR, FAR, (0, 0)))
                rank = chosen.randint(min(low, count - 1), min(high, count - 1))
                other = partners[rank] if high else chosen.randrange(count)
                if other != start + row:
                    yield start + row, other, max(0.0, float(alike[row, other]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--teacher_name_or_path", required=True, help="Hub id or folder of a sentence encoder")
    parser.add_argument("--task_name", help="GLUE task, or another configuration; several: sst2,mrpc")
    parser.add_argument("--dataset_name", default="nyu-mll/glue", help="Hub id or folder (default: %(default)s)")
    parser.add_argument("--max_sentences", type=int, default=40_000, help="read at most (default: %(default)s)")
    parser.add_argument("--pairs_per_sentence", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of what is chosen (default: %(default)s)")
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
        if sentence is not None and SHORTEST <= len(sentence) <= LONGEST
    )
    if len(found) < 2:
        raise BadInput(f"{argument}: has {len(found)} sentences of {SHORTEST} to {LONGEST} characters; use two or more")
    sentences = list(found)
    random.Random(arguments.seed).shuffle(sentences)
    sentences = sentences[: arguments.max_sentences]
    means = encode(arguments.teacher_name_or_path, sentences)

    pairs = list(pairs_of(means, arguments.pairs_per_sentence, arguments.seed))
    first = round((1 - VALIDATION) * len(sentences))

    def write(path: Path, rows: Sequence[tuple[int, int, float]]) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(("sentence1", "sentence2", "label"))
            table.writerows((sentences[one], sentences[other], f"{HIGHEST * alike:.3f}") for one, other, alike in rows)

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
