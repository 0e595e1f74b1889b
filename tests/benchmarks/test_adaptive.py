# SPDX-License-Identifier: Apache-2.0
"""benchmarks/adaptive.py: what leaving early says and costs, and what a threshold comes to.

Letters: B inputs, X blocks that run.
"""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from transformers import PerceiverImageProcessorPil

from benchmarks.adaptive import (
    TEST,
    TRAIN,
    Outputs,
    Policy,
    Setting,
    best_mix,
    logits_by_block,
    noting_latents,
    setting_of,
    similarity_scores,
)
from budget_tome_perceiver import Merging
from configuration_tome_perceiver import ToMePerceiverConfig
from cost_tome_perceiver import forward_cost
from experiments.runs.start import Loaded
from experiments.training.identity import weights_fingerprint
from modeling_tome_perceiver import ToMePerceiverForImageClassificationConvProcessing
from tests.support.script_run import bad_input_line, call_script
from tests.support.tiny_images import LABELS, MODEL, write_images
from tests.support.tiny_models import tiny_inputs, tiny_model

SCRIPT = "benchmarks.adaptive.py"
HEAD = "ForSequenceClassification"
SHAPE = (1, 9)


@pytest.mark.parametrize("r", [[0] * 6, [4, 0, 1, 2, 0, 0]])
def test_what_a_block_says_is_what_a_model_of_so_many_blocks_says(r):
    model, inputs = tiny_model(HEAD, r=r), tiny_inputs(HEAD)
    whole, first = logits_by_block(model, inputs), Merging.of(model.config).by(r[:3], num_blocks=1)
    assert len(whole) == 2
    with torch.no_grad():
        torch.testing.assert_close(whole[1], model(**inputs).logits)
        with first.applied(model.config):
            torch.testing.assert_close(whole[0], model(**inputs).logits)


def test_an_exit_costs_what_ran_before_it_and_every_decoder():
    model = tiny_model(HEAD)
    merging = Merging.of(model.config).by([4, 0, 1, 0, 0, 0])
    loaded = Loaded(task=None, prepared=None, model=model, input_shape=SHAPE)
    setting = setting_of("", merging, loaded)
    unmerged, merged, first = (
        forward_cost(each.asked_of(model.config), SHAPE, type(model).__name__)
        for each in (merging.by(0), merging, merging.by([4, 0, 1], num_blocks=1))
    )
    total = unmerged.total_with_matching
    assert setting.share == merged.total_with_matching / total
    leaving, staying = first.total_with_matching, merged.total_with_matching + first.decoder
    assert setting.exit_shares([0]) == pytest.approx([leaving / total, staying / total])
    assert setting.preprocessing + setting.reading == (merged.preprocessing + merged.cross_attention) / total
    # Other latents read.
    grouped = setting_of("", merging.by(0, latent_groups=[0, 0, *range(1, 11)]), loaded)
    assert setting.common(setting) - setting.common(grouped) == pytest.approx(setting.reading)


def test_scores_are_of_the_latents_before_any_merge():
    """Whatever merges after them, and in whichever block."""
    scores = []
    for r in (0, [6, 0, 0, 2, 0, 0]):
        model = tiny_model(HEAD, r=r)
        with torch.no_grad(), noting_latents(model) as latents:
            model(**tiny_inputs(HEAD, seed=1))
            model(**tiny_inputs(HEAD))
        scores.append(similarity_scores(latents))
    assert scores[0].keys() == scores[1].keys() and len(scores[0]) == 9
    for name, score in scores[0].items():
        assert score.shape == (2,) and score.equal(scores[1][name])


def test_alike_latents_score_highest():
    same = similarity_scores({"x": torch.ones(1, 5, 3)})
    assert all(score > 0.999 for score in same.values())


def policy(costs: list[float], doubts: list[list[float]], right: list[list[bool]] | None = None) -> Policy:
    """The same on both splits."""
    answers = np.array(right or [[True] * len(doubts[0])] * len(costs))
    return Policy("", "", np.array(costs), dict.fromkeys((TRAIN, TEST), np.array(doubts)), {TEST: answers})


def test_an_input_stays_with_the_first_option_it_is_sure_of():
    three = policy([0.25, 0.5, 1.0], [[0.1, 0.9, 0.9], [0.9, 0.2, 0.8]])
    assert three.options(TEST, 0.5).tolist() == [0, 1, 2] and three.spent(TEST, 0.5) == pytest.approx(1.75 / 3)


def test_a_threshold_is_the_lowest_within_the_budget():
    two = policy([0.5, 1.0], [[0.1, 0.2, 0.3, 0.4]])
    assert two.threshold(0.75) == two.threshold(0.8) == 0.2 and two.spent(TRAIN, 0.2) == 0.75
    assert two.threshold(0.51) == 0.4
    assert two.threshold(0.5) is None and two.threshold(1.0) is None


def test_an_oracle_spends_on_what_the_dearer_option_alone_answers_right():
    right = [[True, False, False, True], [False, True, True, True]]
    assert policy([0.5, 1.0], [[0.0] * 4], right).oracle(0.75) == 1.0
    assert policy([0.5, 1.0], [[0.0] * 4], right).oracle(0.625) == 0.75


def test_a_mix_is_of_the_best_two_settings_on_training_inputs():
    """The middle one of three is worse than chance between the others."""
    settings = [
        Setting(name, None, [share], [0.0], 0.0, 0.0) for name, share in zip("abc", (0.2, 0.4, 0.6), strict=True)
    ]
    logits = {"a": [[1.0, 0.0], [0.0, 1.0]], "b": [[0.0, 1.0], [0.0, 1.0]], "c": [[1.0, 0.0], [1.0, 0.0]]}
    outputs = {name: Outputs(np.array([values]), np.array([0, 0]), {}) for name, values in logits.items()}
    both = {TRAIN: outputs, TEST: outputs}
    assert best_mix(settings, both, 0.4).tolist() == pytest.approx([1.0, 0.5])
    assert best_mix(settings, both, 0.5).tolist() == pytest.approx([1.0, 0.75])
    assert best_mix(settings, both, 0.1).tolist() == [1.0, 0.0] and best_mix(settings, both, 0.9).tolist() == [1.0, 1.0]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    config = ToMePerceiverConfig(**MODEL | {"model_type": "tome_perceiver", "num_labels": len(LABELS)})
    model = ToMePerceiverForImageClassificationConvProcessing(config)
    model.save_pretrained(folder / "model")
    PerceiverImageProcessorPil(do_center_crop=False, size={"height": 16, "width": 16}).save_pretrained(folder / "model")
    images = write_images(folder / "images", {"train": 24, "test": 20})
    merging = Merging.none(config)
    rows = [
        {"name": name, "fields": asdict(merging.by(r))}
        for name, r in {"r=0": 0, "flops=0.9 search": [3, 0, 0, 0], "flops=0.8 search": [4, 2, 0, 0]}.items()
    ]
    sweep = {"content": {"weights_to_start_from": weights_fingerprint(model)}, "rows": rows}
    for name, changes in {"sweep": {}, "of_another": {"content": {}}, "of_one_budget": {"rows": rows[:2]}}.items():
        (folder / name).mkdir()
        (folder / name / "sweep_results.json").write_text(json.dumps(sweep | changes))
    return folder, ("--model_name_or_path", folder / "model", "--dataset_name", images, "--use_cpu")


def test_every_way_is_compared_at_the_share_of_a_setting(inputs, tmp_path, capsys):
    folder, arguments = inputs
    command = (SCRIPT, *arguments, "--sweep_dir", folder / "sweep", "--threshold_samples", 12, "--output_dir", tmp_path)
    call_script(*command)
    results = json.loads((tmp_path / "adaptive.json").read_text())
    assert [each["name"] for each in results["settings"]] == ["flops=0.8 search", "flops=0.9 search", "unmerged"]
    assert {row["way"] for row in results["rows"]} == {"route", "exit", "cascade", "cascade, reading kept"}
    for row in results["rows"]:
        assert row[TRAIN]["share"] <= row["budget"] and 0 <= row[TEST]["accuracy"] <= 1
    assert (tmp_path / "adaptive.md").read_text() in capsys.readouterr().out
    # What was run is read.
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")}
    assert len(kept) == 6
    call_script(*command)
    assert kept == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")}
    assert json.loads((tmp_path / "adaptive.json").read_text())["rows"] == results["rows"]


@pytest.mark.parametrize(
    ("sweep", "says"),
    [
        (None, "--sweep_dir: not given"),
        ("nowhere", "has no sweep_results.json"),
        ("of_another", "of other weights"),
        ("of_one_budget", "has 1 budgets"),
    ],
)
def test_bad_input_is_one_line(inputs, tmp_path, capsys, sweep, says):
    folder, arguments = inputs
    given = () if sweep is None else ("--sweep_dir", folder / sweep)
    line = bad_input_line(capsys, SCRIPT, *arguments, *given, "--output_dir", tmp_path / "out")
    assert says in line and not (tmp_path / "out").exists()
