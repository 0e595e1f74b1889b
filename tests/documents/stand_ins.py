# SPDX-License-Identifier: Apache-2.0
"""Tiny datasets and checkpoints in folders with the names that commands of the pages give.

A folder is taken before a Hub id of the same name, so the commands run as they are written, without a network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import disable_progress_bars
from transformers import PerceiverConfig, PerceiverImageProcessorPil, PerceiverTokenizer, PreTrainedModel
from transformers.models.perceiver import modeling_perceiver as upstream

from tests.support import tiny_images, tiny_texts
from tests.support.tiny_models import spread_weights

GLUE_TASKS = ("mrpc", "rte", "sst2", "stsb")
# Without --dataset_name, the scripts insist on the Hub's GLUE.
TASK, TASK_OF_STAND_IN = "--task_name ", "--dataset_name ./nyu-mll/glue --task_name "
# Wide enough that merging can save two thirds of the FLOPs.
SIZES = {"num_latents": 64, "d_latents": 64, "qk_channels": 64, "v_channels": 64, "num_self_attends_per_block": 3}
# Enough unlabelled samples for `--max_changed 0.02`.
TEST_SAMPLES = 320
SENTENCES = [f"{'abc'[index % 3] * 3} {'x' * (index % 11)}" for index in range(60)]


def write_stand_ins(folder: Path) -> None:
    """Write all stand-ins.

    The folders, relative to `folder`:

    - `nyu-mll/glue` and `zalando-datasets/fashion_mnist`, datasets
    - `deepmind/language-perceiver` and `deepmind/vision-perceiver-conv`, stock checkpoints
    - `tiny/TASK` for each GLUE task here, `tiny/images` and `tiny/masked`, classifiers and a masked language model
    - `tiny/train.csv` and `tiny/validation.csv`, labelled sentences, and `tiny/a.txt` and `tiny/b.txt`, sentences
    """
    disable_progress_bars()
    for task in GLUE_TASKS:
        tiny_texts.write_glue(folder / "nyu-mll/glue", task, test=TEST_SAMPLES)
        labels = tiny_texts.LABELS[task] or ["score"]
        names: dict[str, Any] = {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}}
        _save_text(folder / "tiny" / task, "PerceiverForSequenceClassification", **names)
    splits = {"train": 24, "validation": 18, "test": TEST_SAMPLES}
    tiny_images.write_images(folder / "zalando-datasets/fashion_mnist", splits)
    for name in ("deepmind/language-perceiver", "tiny/masked"):
        _save_text(folder / name, "PerceiverForMaskedLM")
    for name in ("deepmind/vision-perceiver-conv", "tiny/images"):
        labels = tiny_images.LABELS
        _save_images(folder / name, id2label=dict(enumerate(labels)), label2id={n: i for i, n in enumerate(labels)})
    rows = {"sentence": SENTENCES, "label": [SENTENCES[index][0] for index in range(len(SENTENCES))]}
    for name in ("train", "validation"):
        tiny_texts.write_table(folder / f"tiny/{name}.csv", rows)
    for name in ("a", "b"):
        (folder / f"tiny/{name}.txt").write_text("\n".join(f"{name} {sentence}" for sentence in SENTENCES))


def _save_text(folder: Path, kind: str, **names: Any) -> None:
    _save(folder, kind, tiny_texts.MODEL | names)
    PerceiverTokenizer(model_max_length=tiny_texts.POSITIONS).save_pretrained(folder)


def _save_images(folder: Path, **names: Any) -> None:
    _save(folder, "PerceiverForImageClassificationConvProcessing", tiny_images.MODEL | names)
    size = {"height": tiny_images.MODEL["image_size"], "width": tiny_images.MODEL["image_size"]}
    PerceiverImageProcessorPil(size=size, crop_size=size).save_pretrained(folder)


def _save(folder: Path, kind: str, settings: dict[str, Any]) -> None:
    """Save a stock checkpoint with random weights that are large enough for different answers."""
    model: PreTrainedModel = getattr(upstream, kind)(PerceiverConfig(**settings | SIZES))
    spread_weights(model).save_pretrained(folder)
