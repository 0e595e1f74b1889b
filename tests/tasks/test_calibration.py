# SPDX-License-Identifier: Apache-2.0
"""Tests of calibration samples: unlabelled, and not used for training or evaluation if there are such."""

from __future__ import annotations

import pytest
from datasets import Dataset
from transformers import PerceiverImageProcessorPil, PerceiverTokenizer

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.errors import BadInput
from experiments.tasks.base import Splits, hold_out, spread_evenly
from experiments.tasks.glue import GlueDataArguments, load_glue_task
from experiments.tasks.images import ImageDataArguments, load_image_task
from experiments.tasks.mlm import MlmDataArguments, load_mlm_task
from experiments.tasks.scores import IGNORE_INDEX
from tests.support.tiny_images import LABELS, write_images
from tests.support.tiny_images import MODEL as IMAGE_MODEL
from tests.support.tiny_texts import MODEL as TEXT_MODEL
from tests.support.tiny_texts import write_glue, write_table


@pytest.mark.parametrize(("available", "count"), [(10, 4), (1500, 1024), (3, 9), (5, 5)])
def test_samples_are_spread_over_all_of_a_split(available, count):
    """Because data are often sorted by class."""
    places = spread_evenly(available, count)
    assert len(places) == len(set(places)) == min(available, count)
    assert max(places) >= available - 1 - available / count


def test_a_split_that_is_evaluated_on_or_empty_is_not_unseen():
    splits = Splits("x", {"test": Dataset.from_dict({"a": [1, 2, 3]}), "empty": Dataset.from_dict({"a": []})})
    assert splits.take_unlabelled("test", ["validation"], 2)["a"] == [1, 2]
    assert splits.take_unlabelled("test", ["test"], 2) is splits.take_unlabelled("empty", [], 2) is None
    assert splits.take_unlabelled("other", [], 2) is splits.take_unlabelled("test", [], 0) is None


@pytest.mark.parametrize("task", ["sst2", "mnli", "stsb"])
def test_of_a_glue_task_the_test_split_has_no_labels(tmp_path, task):
    arguments = GlueDataArguments(task_name=task, dataset_name=str(write_glue(tmp_path, task)))
    loaded = load_glue_task(arguments, predict=False, seed=0, calibration_samples=4)
    assert len(loaded.calibration) == 4 and "label" not in loaded.calibration.column_names and not loaded.prediction
    config = ToMePerceiverConfig(**TEXT_MODEL | {"id2label": dict(enumerate(loaded.labels or ["number"]))})
    prepared = loaded.prepare(config, PerceiverTokenizer(), 0)
    (batch,) = prepared.samples(9, 32)
    assert set(batch) == {"input_ids", "attention_mask"} and len(batch["input_ids"]) == 4
    assert load_glue_task(arguments, predict=False, seed=0).calibration is None


def test_a_test_file_is_read_to_calibrate_on(tmp_path):
    """Also with a validation file, and without --do_predict."""
    table = {"sentence": ["a text", "b text", "c text"], "label": ["x", "y", "x"]}
    files = {f"{name}_file": str(write_table(tmp_path / f"{name}.csv", table)) for name in ("train", "validation")}
    unlabelled = write_table(tmp_path / "test.csv", {"sentence": ["d text", "e text"]})
    arguments = GlueDataArguments(**files, test_file=str(unlabelled))
    loaded = load_glue_task(arguments, predict=False, seed=0, calibration_samples=9)
    assert loaded.calibration["sentence"] == ["d text", "e text"]


def test_images_of_the_test_split_are_calibrated_on_unless_they_are_evaluated_on(tmp_path):
    arguments = [
        ImageDataArguments(dataset_name=str(write_images(tmp_path / name, dict.fromkeys(splits, 12))))
        for name, splits in (("three", ("train", "validation", "test")), ("two", ("train", "test")))
    ]
    with_validation, without = (load_image_task(each, False, 0, calibration_samples=5) for each in arguments)
    assert without.calibration is None and "label" not in with_validation.calibration.column_names
    config = ToMePerceiverConfig(**IMAGE_MODEL | {"num_labels": len(LABELS)})
    processor = PerceiverImageProcessorPil(do_center_crop=False, size={"height": 16, "width": 16})
    (batch,) = with_validation.prepare(config, processor, 0).samples(9, 32)
    assert set(batch) == {"pixel_values"} and len(batch["pixel_values"]) == 5


def test_masked_sentences_of_the_test_split_are_none_that_are_trained_on(tmp_path):
    arguments = MlmDataArguments(
        dataset_name=str(write_glue(tmp_path, "sst2", test=40)), dataset_config_name="sst2", mlm_probability=0.5
    )
    loaded = load_mlm_task(arguments, False, 0, calibration_samples=16)
    known = {*loaded.train["sentence"], *loaded.evaluation[""]["sentence"]}
    assert 0 < len(loaded.calibration) <= 16 and known.isdisjoint(loaded.calibration["sentence"])
    config = ToMePerceiverConfig(**TEXT_MODEL | {"architectures": ["PerceiverForMaskedLM"]})
    (batch,) = loaded.prepare(config, PerceiverTokenizer(), 0).samples(16, 32)
    assert len(batch["input_ids"]) <= 16 and (batch["labels"] != IGNORE_INDEX).any(dim=1).all()


def test_held_out_samples_are_not_trained_on(tmp_path):
    arguments = GlueDataArguments(task_name="sst2", dataset_name=str(write_glue(tmp_path, "sst2")))
    loaded = load_glue_task(arguments, predict=False, seed=0)
    all_of_them = loaded.train["idx"]
    hold_out(loaded, 5)
    assert sorted([*loaded.train["idx"], *loaded.calibration["idx"]]) == sorted(all_of_them)
    assert len(loaded.calibration) == 5 and loaded.calibration_name == "held-out training samples"
    with pytest.raises(BadInput, match="--calibration_samples 10: .* at most 9"):
        hold_out(loaded, 10)
