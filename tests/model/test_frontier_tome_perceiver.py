# SPDX-License-Identifier: Apache-2.0
"""Tests of `model.calibrate` and `model.merge_to`: figures match a direct computation, bounds hold, runs repeat."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from scipy.stats import beta

import frontier_tome_perceiver as frontier_module
from cost_tome_perceiver import FlopsShare, Merging
from frontier_tome_perceiver import Frontier, FrontierRow, average_linkage, binomial_bound, output_divergence
from tests.support.tiny_merges import AT_START
from tests.support.tiny_models import repeat_latents, run, tiny_config, tiny_inputs, tiny_model, tome_class

HEAD = "ForSequenceClassification"
SHAPE = (1, 9)
DUPLICATES = [0, 1, 2, 1, 3, 0, 1, 4, 4, 0, 1, 2]


def batches(rows: int = 64, size: int = 4, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Draw `rows` texts in batches of `size`, the batch size of a search, so that a search uses them as they are."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(6, 262, (size, 9), generator=generator)} for _ in range(rows // size)]


def outputs(model, given) -> torch.Tensor:
    """Return (B, P, K): the outputs at the labelled word, at all pixels, or the only output."""
    with torch.no_grad():
        logits = torch.cat(
            [model(**{name: batch[name] for name in batch if name != "labels"}).logits for batch in given]
        )
    if "labels" in given[0]:
        return logits[:, 3:4]
    return logits[:, None] if logits.dim() == 2 else logits.flatten(1, -2)


@pytest.fixture(scope="module")
def calibrated():
    model = tiny_model(HEAD)
    return model, model.calibrate(batches())


def test_rows_go_from_mild_to_strong_and_cost_what_they_say(calibrated):
    model, frontier = calibrated
    share = FlopsShare(tiny_config(), SHAPE, type(model).__name__)
    shares = [row.flops_ratio for row in frontier.rows]
    assert len(shares) >= 8 and shares == sorted(shares, reverse=True) and shares[0] <= 0.9
    assert shares == [pytest.approx(share(row.merging)) for row in frontier.rows]
    assert (frontier.searched, frontier.held_out) == (16, 48) and "measured on 48 others" in str(frontier)
    assert Merging.of(model.config) == Merging.of(tiny_config()) and Frontier.of(model.config) == frontier


@pytest.mark.parametrize("case", ["class", "word", "number", "flow"])
def test_rows_have_the_figures_of_a_direct_computation(case):
    """On held-out samples. A regression output counts as changed if it moves by a tenth of its standard deviation."""
    regression = {"num_labels": 1, "problem_type": "regression"} if case == "number" else {}
    head = {"word": "ForMaskedLM", "flow": "ForOpticalFlow"}.get(case, HEAD)
    model, given = tiny_model(head, num_blocks=1, **regression), batches()
    if case == "word":
        for batch in given:
            batch["labels"] = torch.full((4, 9), -100)
            batch["labels"][:, 3] = 7
    elif case == "flow":
        given = [{"inputs": each} for each in tiny_inputs(head, batch=64)["inputs"].split(4)]
    frontier, held_out = model.calibrate(given), [batch for place, batch in enumerate(given) if place % 4]
    before, deviation = outputs(model, held_out), outputs(model, given[::4]).flatten(0, 1).std(dim=0).mean()
    for row in frontier.rows:
        with row.merging.applied(model.config):
            after = outputs(model, held_out)
        numbers = case in ("number", "flow")
        divergence = output_divergence(after.flatten(0, 1), before.flatten(0, 1), numbers).mean()
        assert row.divergence == pytest.approx(float(divergence), rel=1e-3, abs=1e-12)
        changed = (after.argmax(-1) != before.argmax(-1))[:, 0]
        if numbers:
            changed = (after - before).abs().amax(-1).mean(1) > 0.1 * deviation
        assert row.changed == float(changed.double().mean())
        assert row.changed_bound == pytest.approx(binomial_bound(int(changed.sum()), 48))


def test_the_same_samples_give_the_same_frontier_on_any_number_of_threads(calibrated):
    before = torch.get_num_threads()
    torch.set_num_threads(1 if before > 1 else 2)
    try:
        again = tiny_model(HEAD)
        again.calibrate(batches())
    finally:
        torch.set_num_threads(before)
    assert again.config.merge_frontier == calibrated[0].config.merge_frontier


def test_exact_duplicates_are_found_and_nothing_changes():
    """Twelve latents are copies of five. With a budget for five, the logits stay, whichever merging is chosen."""
    model = repeat_latents(tiny_model(HEAD), DUPLICATES)
    inputs = tiny_inputs(HEAD, batch=64)
    before = run(model, inputs).logits
    five = FlopsShare(model.config, SHAPE, type(model).__name__).for_latents([12, 6, 5, 5, 5, 5, 5], "leader", "hidden")
    choice = model.merge_to(flops_ratio=five, samples=inputs)
    assert choice.chosen.divergence < 1e-12 and choice.chosen.changed == 0
    assert (run(model, inputs).logits - before).abs().max() < 1e-5


@pytest.mark.parametrize("ratio", [0.9, 0.4])
def test_a_share_is_met_at_once_by_the_row_that_changes_least(calibrated, ratio):
    model, frontier = calibrated
    within = [row for row in frontier.rows if row.flops_ratio <= ratio]
    inputs = batches()[0]
    with torch.no_grad(), model.merged(flops_ratio=ratio) as choice:
        assert choice.chosen.divergence == min(row.divergence for row in within)
        expected = model(**inputs).logits
    assert Merging.of(model.config) == Merging.of(tiny_config())
    with torch.no_grad():
        assert torch.equal(model(**inputs, flops_ratio=ratio).logits, expected)
        assert not torch.equal(model(**inputs).logits, expected)


def test_a_saved_checkpoint_carries_its_frontier(calibrated, tmp_path):
    model, frontier = calibrated
    model.save_pretrained(tmp_path)
    loaded = tome_class(HEAD).from_pretrained(tmp_path, flops_ratio=0.5, dtype=torch.float64)
    assert loaded.config.merge_frontier == json.loads(json.dumps(model.config.merge_frontier))
    assert Merging.of(loaded.config) == model.merge_to(flops_ratio=0.5).chosen.merging
    Merging.none(model.config).apply(model.config)
    assert loaded.merge_to(max_changed=0.2).chosen.changed_bound <= 0.2
    promising = tome_class(HEAD).from_pretrained(tmp_path, max_changed=0.2, dtype=torch.float64)
    assert Merging.of(promising.config) == Merging.of(loaded.config)
    assert loaded.unmerged.num_blocks == model.unmerged.num_blocks and loaded.unmerged.r == 0


def test_a_row_reads_alike_before_and_after_it_was_saved():
    """A saved config has sorted keys, which puts "over 9" before "up to 9 tokens"."""
    groups = {"class LABEL_1": [0.5, 4], "up to 9 tokens": [0.5, 2], "over 9": [0.5, 2]}
    row = FrontierRow(
        Merging.of(tiny_config(r=2)), 0.5, 0.1, 0.5, 0.9, {"samples": 4, "groups": groups, "worst_tenth": 1}
    )
    saved = replace(row, who=json.loads(json.dumps(row.who, sort_keys=True)))
    assert list(saved.who["groups"]) != list(groups) and saved.lines() == row.lines()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "nothing merges"),
        ({"r": 2}, "bipartite on key, 2 in each layer"),
        ({"r": [0, 3, 0, 1, 0, 0], "merge_method": "leader"}, "leader on key, 3 in layer 2, 1 in layer 4"),
        ({"r": [1, 0, 0], "num_blocks": 1}, "bipartite on key, 1 in layer 1 (1 block)"),
        ({"latent_groups": AT_START}, "9 groups of learned latents"),
        ({"merge_groups": [DUPLICATES, *[None] * 5]}, "fixed groups, 5 in layer 1"),
    ],
)
def test_a_row_names_what_merges_and_the_blocks_if_some_are_left_out(settings, said):
    assert FrontierRow(Merging.of(tiny_config(**settings)), 0.5).describe(num_blocks=2) == said


def test_a_frontier_of_other_weights_makes_no_promise(calibrated):
    model = tiny_model(HEAD)
    model.config.merge_frontier = calibrated[0].config.merge_frontier
    model.merge_to(max_changed=0.2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    with pytest.raises(ValueError, match="other weights"):
        model.merge_to(max_changed=0.2)


def with_figures(bounds: list[float], held_out: int = 1000):
    """Build a model whose frontier has rows with these bounds, from mild to strong."""
    model = tiny_model(HEAD)
    who = {"samples": held_out, "groups": {}, "worst_tenth": 0.5}
    rows = [
        FrontierRow(model.unmerged.by([place + 1, 0, 0, 0, 0, 0]), 0.9 - 0.1 * place, float(place), 0.0, bound, who)
        for place, bound in enumerate(bounds)
    ]
    frontier = Frontier(rows, 2, SHAPE, 300, held_out, frontier_module._weight_fingerprint(model))
    model.config.merge_frontier = frontier.to_dict()
    return model


def test_a_promise_goes_down_the_rows_and_stops_at_the_first_that_breaks_it():
    """The third row is above 0.03, so the fourth, which is below, must not be chosen."""
    model = with_figures([0.005, 0.02, 0.1, 0.03])
    for limit, place in ((0.01, 0), (0.03, 1), (0.2, 3)):
        assert model.merge_to(max_changed=limit).chosen.merging.r == [place + 1, 0, 0, 0, 0, 0]
    with pytest.warns(UserWarning, match="nothing merges"):
        choice = model.merge_to(max_changed=0.004)
    assert choice.chosen.merging.r == model.r == 0 and "nothing merges" in str(choice)


def test_no_share_is_promised_of_a_frontier_that_has_none():
    """One that was measured on training samples has none: nothing may be said of other inputs."""
    model = with_figures([0.0])
    for row in model.config.merge_frontier["rows"]:
        row |= {"changed": None, "changed_bound": None, "who": {}}
    with pytest.raises(ValueError, match="no shares of changed answers"):
        model.merge_to(max_changed=0.1)


def test_too_few_samples_are_told_how_many_would_do():
    with pytest.raises(ValueError, match="415 samples"):
        with_figures([0.0], held_out=100).merge_to(max_changed=0.01)
    assert binomial_bound(0, 299) <= 0.01 < binomial_bound(0, 298)


def test_a_budget_of_time_takes_the_row_that_changes_least_of_those_fast_enough(monkeypatch, calibrated):
    model, frontier = calibrated

    def seconds(run, variants, rounds, bar=None):
        return [[sum([12, *merging.asked_of(tiny_config()).latents_per_layer]) for merging in variants]] * rounds

    monkeypatch.setattr(frontier_module, "interleaved_seconds", seconds)
    taken = seconds(None, [Merging.of(tiny_config()), *(row.merging for row in frontier.rows)], 1)[0]
    with model.merged(latency_ratio=0.6, samples=batches()[0]) as choice:
        fast = [row for row, time in zip(frontier.rows, taken[1:], strict=True) if time / taken[0] <= 0.6]
        assert choice.chosen.divergence == min(row.divergence for row in fast)
        assert choice.chosen.speedup >= 1 / 0.6
    with pytest.raises(ValueError, match="out of reach"):
        model.merge_to(latency_ratio=0.01, samples=batches()[0])


def test_a_bound_is_the_exact_binomial_one():
    for changed, samples in ((0, 10), (3, 50), (40, 768), (767, 768), (5, 5)):
        expected = 1.0 if changed == samples else beta.ppf(0.95, changed + 1, samples - changed)
        assert binomial_bound(changed, samples) == pytest.approx(expected, abs=1e-9)


def test_without_samples_a_share_is_met_early_by_what_is_most_alike():
    model = tiny_model(HEAD, merge_method="k_center")
    chosen = model.merge_to(flops_ratio=0.9, input_shape=SHAPE).chosen
    assert (chosen.merging.merge_method, chosen.merging.merge_metric) == ("leader", "key")
    assert chosen.divergence is None and chosen.flops_ratio <= 0.9
    named = model.merge_to(flops_ratio=0.9, input_shape=SHAPE, schedules=["constant"], merge_methods=["bipartite"])
    assert named.chosen.merging.merge_method == "bipartite" and max(named.chosen.merging.r) <= 2


@pytest.mark.parametrize(
    ("options", "holds"),
    [
        ({"merge_methods": ["ward"], "merge_metrics": ["value"]}, lambda each: each.merge_method == "ward"),
        ({"merge_methods": ["groups"]}, lambda each: each.merge_groups is not None or not any(np.atleast_1d(each.r))),
        ({"schedules": ["skip_blocks"]}, lambda each: not any(np.atleast_1d(each.r)) and each.num_blocks == 1),
        ({"schedules": ["floor"], "merge_methods": ["leader"]}, lambda each: sorted(each.r, reverse=True) == each.r),
    ],
)
def test_a_search_can_be_held_to_methods_and_schedules(options, holds):
    frontier = tiny_model(HEAD).merge_to(max_changed=0.9, samples=batches(), **options).frontier
    assert all(holds(row.merging) for row in frontier.rows)


def test_a_share_that_a_search_cannot_reach_is_known_without_samples():
    model, said = tiny_model(HEAD, num_blocks=1), []
    for check in (
        lambda: frontier_module.check_reach(model, 0.15, SHAPE),
        lambda: model.calibrate(batches(), flops_ratios=[0.15]),
    ):
        with pytest.raises(ValueError, match="out of reach: merging reaches") as error:
            check()
        said.append(str(error.value))
    assert said[0] == said[1]
    frontier_module.check_reach(model, 0.5, SHAPE)


def test_shares_that_are_asked_for_have_rows_of_their_own(calibrated):
    frontier = tiny_model(HEAD).calibrate(batches(), flops_ratios=[0.63])
    assert len(frontier.rows) == len(calibrated[1].rows) + 1


def test_states_that_are_dropped_at_any_time_change_nothing(calibrated, monkeypatch):
    monkeypatch.setattr(frontier_module, "CACHED_BYTES", 0)
    assert tiny_model(HEAD).calibrate(batches()) == calibrated[1]


def test_a_search_that_is_out_of_time_has_rows_all_the_same():
    """They keep to every budget, but have no measured figures and no bound."""
    model = tiny_model(HEAD)
    with (
        pytest.warns(UserWarning, match="seconds=0.0"),
        pytest.raises(ValueError, match="max_changed=0.1: 0 held-out samples"),
    ):
        model.merge_to(max_changed=0.1, samples=batches(), seconds=0.0)
    frontier = Frontier.of(model.config)
    assert len(frontier.rows) >= 8 and frontier.held_out == 0
    assert all(row.divergence is None and row.changed_bound is None for row in frontier.rows)


def test_the_class_and_the_length_that_change_most_are_named():
    torch.manual_seed(1)
    model, given = tiny_model(HEAD, num_blocks=1), batches(256, size=16)
    for place, batch in enumerate(given):
        batch["attention_mask"] = torch.ones(16, 9, dtype=torch.int64)
        batch["attention_mask"][:8, 4 + place % 2 :] = 0
    row = model.calibrate(given).rows[-1]
    assert row.who["samples"] == 192 and 0.1 <= row.who["worst_tenth"] <= 1
    assert {"up to 5 tokens", "over 5"} <= set(row.who["groups"])
    lengths = [figures for name, figures in row.who["groups"].items() if "class" not in name]
    shares, counts = zip(*lengths, strict=True)
    assert sum(counts) == 192 and np.average(shares, weights=counts) == pytest.approx(row.changed)
    assert len(row.lines()) <= 3 and all("\n" not in line for line in row.lines())


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "use one of"),
        ({"flops_ratio": 0.5, "max_changed": 0.1}, "use one of"),
        ({"flops_ratio": 0}, "flops_ratio=0"),
        ({"max_changed": 0.01}, "max_changed: needs samples"),
        ({"latency_ratio": 0.5}, "latency_ratio: needs samples"),
        ({"flops_ratio": 0.5, "samples": []}, "samples: none given"),
        ({"flops_ratio": 0.5, "samples": ["a", "b"]}, "samples: a str"),
        ({"flops_ratio": 0.5, "samples": {"input_ids": [[1]]}}, "samples: input_ids is a list"),
        ({"flops_ratio": 0.5, "samples": {"pixels": torch.ones(2, 9)}}, "samples: have pixels"),
        ({"flops_ratio": 0.5, "merge_methods": "leader"}, "merge_methods='leader': must be a list"),
        ({"flops_ratio": 0.5, "samples": batches(), "merge_methods": ["magic"]}, "merge_method"),
        ({"flops_ratio": 0.5, "samples": batches(), "merge_metrics": ["magic"]}, "merge_metrics: 'magic'"),
        ({"flops_ratio": 0.01, "samples": batches()}, "flops_ratio=0.01 is out of reach"),
        ({"flops_ratio": 0.01, "input_shape": SHAPE}, "flops_ratio=0.01 is out of reach"),
        ({"flops_ratio": 0.5, "seconds": 3}, "seconds: needs samples"),
        ({"flops_ratio": 0.5, "samples": batches(), "seconds": -1}, "seconds=-1: must be a number"),
        ({"max_changed": 0.5, "samples": batches(), "flops_ratios": 0.63}, "flops_ratios=0.63: must be a list"),
    ],
)
def test_wrong_arguments_are_one_line_and_change_nothing(asked, said):
    model = tiny_model(HEAD, r=2)
    with pytest.raises(ValueError) as error:
        model.merge_to(**asked)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert Merging.of(model.config) == Merging.of(tiny_config(r=2)) and model.config.merge_frontier is None
    with pytest.raises(ValueError, match="samples: none given"):
        model.calibrate(None)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ([], "must be a dict"),
        ({"rows": [{}] * 1000}, "1 to 100 rows"),
        ({"rows": [{"merging": {"hidden_act": "x"}}]}, "row 0: must have merging settings"),
        ({"rows": [{"merging": {"r": 2}, "flops_ratio": "half"}]}, "row 0: must have a number"),
        ({"rows": [{"merging": {"r": 2}}]}, "row 0: must have a number"),
        ({"rows": [{"merging": {"r": [1]}, "flops_ratio": 0.5}]}, "row 0: r"),
        ({"rows": [{"merging": {"latent_groups": [99] * 12}, "flops_ratio": 0.5}]}, "row 0: latent_groups"),
        ({"rows": [{"merging": {"r": 1}, "flops_ratio": 0.5, "who": [1]}]}, "row 0: must have"),
        ({"rows": [{"merging": {"r": 1}, "flops_ratio": 0.5}], "num_blocks": "two"}, "num_blocks"),
    ],
)
def test_a_broken_frontier_in_a_config_is_one_line(broken, said):
    with pytest.raises(ValueError) as error:
        tiny_config(merge_frontier=broken).check_merging()
    assert said in str(error.value) and "\n" not in str(error.value)


def test_outputs_that_are_not_finite_are_refused():
    model = tiny_model(HEAD)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        model.calibrate(batches())


def test_few_samples_and_samples_that_are_all_alike_are_warned_of():
    with pytest.warns(UserWarning, match="mostly noise"):
        tiny_model(HEAD, num_blocks=1).calibrate(batches(16))
    alike = [{"input_ids": torch.full((4, 9), 7)} for _ in range(16)]
    with pytest.warns(UserWarning, match="alike"):
        tiny_model(HEAD, num_blocks=1).calibrate(alike)


def test_divergence_is_that_of_kullback_and_leibler_or_squared():
    output, before = torch.tensor([[1.0, 2.0], [0.0, 0.5]]), torch.tensor([[1.0, 2.0], [0.5, 0.0]])
    p, q = before[1].softmax(-1), output[1].softmax(-1)
    expected = float((p * (p / q).log()).sum())
    assert output_divergence(output, before, regression=False).tolist() == pytest.approx([0, expected])
    numbers = output_divergence(torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [1.0]]), regression=True)
    assert numbers.tolist() == [0, 4]


@pytest.mark.parametrize("count", [1, 5, 9])
def test_average_linkage_is_that_of_scipy(count):
    vectors = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
    similarity = torch.cosine_similarity(vectors[:, None], vectors[None], dim=-1).numpy()
    distance = 1 - similarity
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), method="average")
    labels = fcluster(tree, count, criterion="maxclust").tolist()
    expected = [list(dict.fromkeys(labels)).index(label) for label in labels]
    assert average_linkage(torch.from_numpy(similarity), count) == expected
