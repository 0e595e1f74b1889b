# SPDX-License-Identifier: Apache-2.0
"""benchmarks/similarity_stability.py: what it measures of made-up similarities, and really run on tiny checkpoints."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from scipy.stats import spearmanr
from transformers import PerceiverImageProcessorPil, PerceiverTokenizer

from benchmarks.similarity_stability import measure, running_means
from configuration_tome_perceiver import ToMePerceiverConfig
from modeling_tome_perceiver import ToMePerceiverForImageClassificationConvProcessing
from tests.support.script_run import bad_input_line, call_script
from tests.support.tiny_images import LABELS, MODEL, NUM_LATENTS, NUM_LAYERS, write_images
from tests.support.tiny_models import spread_weights, stock_model
from tests.support.tiny_texts import POSITIONS, write_glue

SCRIPT = "benchmarks.similarity_stability.py"
LATENTS = 8
PAIRS = LATENTS * (LATENTS - 1) // 2


def drawn(common: float, own: float, count: int, seed: int = 0) -> list[np.ndarray]:
    """Similarities of two layers: a part that all inputs have in common, and a part of each one's own."""
    random = np.random.default_rng(seed)
    shared = random.normal(size=(2, PAIRS))
    return [common * shared + own * random.normal(size=(2, PAIRS)) for _ in range(count)]


def test_inputs_that_are_all_alike_agree_in_everything():
    for row in measure(iter(drawn(1, 0, 16)), "key", [2, 8], [4, 2], 5):
        assert row.rank_correlation.mean == pytest.approx(1) and row.rank_correlation.lower == pytest.approx(1)
        assert {each.mean for each in row.adjusted_rand.values()} == {1.0}
        assert [mean.samples for mean in row.means] == [2, 8]
        assert all(mean.rank_correlation == pytest.approx(1) for mean in row.means)
        assert all(set(mean.adjusted_rand.values()) == {1.0} for mean in row.means)
        assert row.spread_of_inputs == pytest.approx(0, abs=1e-9) and row.spread_of_pairs > 0.5


def test_inputs_with_nothing_in_common_agree_by_chance():
    rows = measure(iter(drawn(0, 1, 1024)), "key", [512], [4], 50)
    for row in rows:
        assert abs(row.rank_correlation.mean) < 0.1 and abs(row.adjusted_rand[4].mean) < 0.1
        assert row.spread_of_inputs == pytest.approx(1, abs=0.05)
        assert row.spread_of_pairs == pytest.approx(512**-0.5, rel=0.4)


def test_means_of_more_samples_agree_better():
    rows = measure(iter(drawn(1, 2, 2048)), "hidden", [4, 64, 1024], [4], 50)
    for row in rows:
        few, some, many = (mean.rank_correlation for mean in row.means)
        # In theory 1 / (1 + 4 / count).
        assert few < some < many and few < 0.75 and many > 0.98
        # In theory 1 / sqrt(5).
        assert 0.3 < row.rank_correlation.mean < 0.6
        assert (row.similarity, row.layer) == ("hidden", rows.index(row))


def test_the_two_sets_are_disjoint_and_single_inputs_are_of_the_second():
    samples = drawn(1, 1, 12)
    (row, _) = measure(iter(samples), "key", [3, 6], [4], 2)
    first, second = (np.mean([sample[0] for sample in part], axis=0) for part in (samples[:6], samples[6:]))
    assert row.means[1].rank_correlation == pytest.approx(spearmanr(first, second).statistic)
    early = (np.mean([sample[0] for sample in part], axis=0) for part in (samples[:3], samples[6:9]))
    assert row.means[0].rank_correlation == pytest.approx(spearmanr(*early).statistic)
    own = [spearmanr(samples[index][0], first).statistic for index in (6, 7)]
    assert row.rank_correlation.mean == pytest.approx(np.mean(own))


def test_running_means_are_those_of_the_first_samples():
    samples = drawn(1, 1, 7)
    means = running_means(samples, [1, 4, 7])
    assert all(np.allclose(means[count], np.mean(samples[:count], axis=0)) for count in (1, 4, 7))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[object, ...]:
    """A checkpoint, which itself merges, and images."""
    folder = tmp_path_factory.mktemp("inputs")
    config = ToMePerceiverConfig(**MODEL | {"model_type": "tome_perceiver", "num_labels": len(LABELS), "r": 3})
    spread_weights(ToMePerceiverForImageClassificationConvProcessing(config)).save_pretrained(folder / "model")
    PerceiverImageProcessorPil(do_center_crop=False, size={"height": 16, "width": 16}).save_pretrained(folder / "model")
    images = write_images(folder / "images", {"train": 16, "test": 3})
    return ("--model_name_or_path", folder / "model", "--dataset_name", images, "--use_cpu")


def test_every_layer_of_an_image_checkpoint_is_measured_and_drawn(inputs, tmp_path, capsys):
    call_script(
        SCRIPT, *inputs, "--sample_counts", 8, 2, "--num_inputs", 3, "--per_device_eval_batch_size", 5,
        "--output_dir", tmp_path / "out",
    )  # fmt: skip
    report = json.loads((tmp_path / "out" / "similarity_stability.json").read_text())
    rows = report["layers"]
    assert [(row["similarity"], row["layer"]) for row in rows] == [
        (name, layer) for name in ("key", "hidden") for layer in range(NUM_LAYERS)
    ]
    # Of the unmerged model, whatever the checkpoint says: all latents in all layers.
    assert (report["latents"], report["num_groups"]) == (NUM_LATENTS, [4, 2, 1])
    assert all([mean["samples"] for mean in row["means"]] == [2, 8] for row in rows)
    assert len({row["spread_of_pairs"] for row in rows}) == len(rows)
    assert report["environment"]["torch"] and report["source"]["dataset"] == "images"
    assert report["arguments"]["sample_counts"] == [2, 8]
    with Image.open(tmp_path / "out" / "similarity_stability.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 100
    printed = capsys.readouterr().out
    assert f"| hidden | {NUM_LAYERS - 1} | {rows[-1]['rank_correlation']['mean']:.2f} (" in printed


def test_a_text_checkpoint(tmp_path):
    stock_model("ForSequenceClassification", num_labels=2, max_position_embeddings=POSITIONS).save_pretrained(
        tmp_path / "stock"
    )
    PerceiverTokenizer().save_pretrained(tmp_path / "stock")
    call_script(
        SCRIPT, "--model_name_or_path", tmp_path / "stock", "--task_name", "sst2", "--dataset_name",
        write_glue(tmp_path / "glue", "sst2"), "--use_cpu", "--similarity", "hidden", "--sample_counts", 4,
        "--num_inputs", 2, "--num_groups", 5, "--output_dir", tmp_path / "out",
    )  # fmt: skip
    report = json.loads((tmp_path / "out" / "similarity_stability.json").read_text())
    assert report["num_groups"] == [5] and {row["similarity"] for row in report["layers"]} == {"hidden"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--similarity", "value"), ("--similarity value", "hidden, key")),
        (("--sample_counts", "9"), ("--sample_counts 9", "at most 8", "16 training samples")),
        (("--sample_counts", "0", "4"), ("--sample_counts 0 4", "1 or more")),
        (("--sample_counts", "4", "--num_inputs", "5"), ("--num_inputs 5", "1 to 4")),
        (("--sample_counts", "4", "--num_inputs", "2", "--num_groups", "8"), ("--num_groups 8", "1 to 7")),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(inputs, tmp_path, capsys, arguments, says):
    given = ("--num_inputs", 2) if "--num_inputs" not in arguments else ()
    line = bad_input_line(capsys, SCRIPT, *inputs, *given, *arguments, "--output_dir", tmp_path / "out")
    assert all(part in line for part in says), line
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_needed(tmp_path, capsys):
    assert "--model_name_or_path" in bad_input_line(capsys, SCRIPT, "--output_dir", tmp_path / "out")
