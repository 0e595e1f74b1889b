# SPDX-License-Identifier: Apache-2.0
"""Write tiny text datasets and a tiny text config as files for the scripts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import ClassLabel, Dataset, Features, Value

from experiments.tasks.glue import SENTENCE_COLUMNS

LABELS = {
    "cola": ["unacceptable", "acceptable"], "mnli": ["entailment", "neutral", "contradiction"],
    "mrpc": ["not_equivalent", "equivalent"], "qnli": ["entailment", "not_entailment"],
    "qqp": ["not_duplicate", "duplicate"], "rte": ["entailment", "not_entailment"],
    "sst2": ["negative", "positive"], "stsb": [], "wnli": ["not_entailment", "entailment"],
}  # fmt: skip
NUM_LATENTS, NUM_LAYERS, POSITIONS = 8, 4, 64
MODEL = {
    "architectures": ["PerceiverForSequenceClassification"],
    "model_type": "perceiver",
    "num_latents": NUM_LATENTS,
    "d_latents": 8,
    "d_model": 8,
    "num_blocks": 2,
    "num_self_attends_per_block": 2,
    "num_self_attention_heads": 2,
    "num_cross_attention_heads": 2,
    "qk_channels": 8,
    "v_channels": 8,
    "vocab_size": 262,
    "max_position_embeddings": POSITIONS,
    "attention_probs_dropout_prob": 0.1,
    "initializer_range": 0.2,
}


def write_model_config(folder: Path, **changes: object) -> Path:
    """Write a JSON file for `--config_name`; without --tokenizer_name its tokens are bytes."""
    path = folder / "config.json"
    path.write_text(json.dumps(MODEL | changes))
    return path


def write_glue(
    folder: Path, task: str, train: int = 24, validation: int = 18, test: int = 6, labels: list[str] | None = None
) -> Path:
    """Write a folder that `load_dataset(folder, task)` reads like the Hub's GLUE: names, features, splits, hidden
    labels.

    `labels` replaces the names of the classes.
    """
    names = labels or LABELS[task]
    endings = ("_matched", "_mismatched") if task == "mnli" else ("",)
    counts = {"train": train}
    for ending in endings:
        # Splits of different lengths, so that a test notices if one is used for the other.
        counts |= {f"validation{ending}": validation + len(ending), f"test{ending}": test + len(ending)}
    (folder / task).mkdir(parents=True, exist_ok=True)
    for split, count in counts.items():
        values, sentences = _sentences(task, count, seed=len(split))
        label = ClassLabel(names=names) if names else Value("float32")
        if split.startswith("test"):
            values = [-1] * count
        columns = dict(zip(SENTENCE_COLUMNS[task], sentences, strict=True)) | {
            "label": values,
            "idx": list(range(count)),
        }
        features = Features(
            {name: Value("string") for name in SENTENCE_COLUMNS[task]} | {"label": label, "idx": Value("int32")}
        )
        Dataset.from_dict(columns, features=features).to_parquet(folder / task / f"{split}-00000-of-00001.parquet")
    lines = ["---", "configs:"]
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            lines += [f"- config_name: {path.name}", "  data_files:"]
            for file in sorted(path.iterdir()):
                split = file.name.partition("-")[0]
                lines += [f"  - split: {split}", f"    path: {path.name}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return folder


def write_table(path: Path, columns: dict[str, list]) -> Path:
    """Write a table in the format of the file's ending."""
    table = pd.DataFrame(columns)
    kinds = {".csv": table.to_csv, ".json": table.to_json, ".jsonl": table.to_json, ".parquet": table.to_parquet}
    write, lines = kinds[path.suffix], path.suffix.startswith(".json")
    options = {"orient": "records", "lines": True} if lines else {"index": False}
    write(path, **options)
    return path


def write_sentences(folder: Path, *configs: str) -> Path:
    """Write a folder that `load_dataset(folder, config)` reads: 111 sentences in all, a third for validation.

    Each sentence repeats one letter, so that a masked token can be inferred. Other columns hold numbers (`idx`),
    text that is no sentence (`label`) and nothing (`note`).
    """
    sentences = [letter * length for length in range(4, 41) for letter in "abc"]
    lines = ["---", "configs:"]
    for number, config in enumerate(configs):
        (folder / config).mkdir(parents=True, exist_ok=True)
        own = sentences[number :: len(configs)]
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, texts in (("validation", own[::3]), ("train", own)):
            columns = {
                "text": texts,
                "note": [None] * len(texts),
                "label": ["good"] * len(texts),
                "idx": [1] * len(texts),
            }
            features = Features({name: Value("int32" if name == "idx" else "string") for name in columns})
            Dataset.from_dict(columns, features=features).to_parquet(folder / config / f"{split}.parquet")
            lines += [f"  - split: {split}", f"    path: {config}/{split}.parquet"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return folder


def _sentences(task: str, count: int, seed: int) -> tuple[list, tuple[list[str], ...]]:
    """Return labels, and sentences whose first letter tells the label."""
    random = np.random.default_rng(seed)
    kinds = len(LABELS[task]) or 6
    labels = [index % kinds for index in range(count)]
    sentences = tuple(
        [chr(ord("a") + label) * 3 + "x" * int(random.integers(1, 12)) for label in labels]
        for _ in SENTENCE_COLUMNS[task]
    )
    return ([float(label) for label in labels] if not LABELS[task] else labels), sentences
