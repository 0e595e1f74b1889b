# SPDX-License-Identifier: Apache-2.0
"""`model.merge_to`: a budget becomes what changes the outputs least within it, or one clear line."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest
import torch

import search_tome_perceiver as search
from budget_tome_perceiver import Merging, flops_ratios, named_family, postponed, undisturbed, weakest_member
from cost_tome_perceiver import forward_cost
from search_tome_perceiver import output_divergence
from tests.support.tiny_merges import AT_START
from tests.support.tiny_models import repeat_latents, run, tiny_config, tiny_inputs, tiny_model

HEAD = "ForSequenceClassification"
SHAPE = (1, 9)
DUPLICATES = [0, 1, 2, 1, 3, 0, 1, 4, 4, 0, 1, 2]


def batches(count: int = 2, seed: int = 0, rows: int = 8) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(6, 262, (rows, 9), generator=generator)} for _ in range(count)]


def flops(model):
    return flops_ratios(model.config, SHAPE, type(model).__name__)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """A machine on which a pass takes as long as its latents, whatever the machine of the tests does."""

    def seconds(run, variants, rounds, bar=None):
        config = tiny_config()
        taken = []
        for merging in variants:
            run(merging)
            asked = merging.asked_of(config)
            taken.append(float(sum([12, *asked.latents_per_layer])))
        return [taken] * rounds

    monkeypatch.setattr(search, "interleaved_seconds", seconds)


@pytest.mark.parametrize("ratio", [0.95, 0.85, 0.8])
def test_what_is_chosen_keeps_the_budget_and_is_set(ratio):
    model = tiny_model(HEAD)
    choice = model.merge_to(flops_ratio=ratio, samples=batches())
    assert Merging.of(model.config) == choice.chosen.merging
    assert choice.chosen.flops_ratio == flops(tiny_model(HEAD))(choice.chosen.merging) <= ratio
    assert all(each.flops_ratio <= ratio for each in choice.candidates)
    assert choice.samples == 16 and choice.tried >= len(choice.candidates) > 1
    assert choice.chosen.divergence == min(each.divergence for each in choice.candidates if each.speedup >= 1)


def judged(merging, given):
    """The divergence by hand, of every second row."""
    model, apart = tiny_model(HEAD), []
    for batch in given:
        with torch.no_grad():
            log_p = model(**batch).logits.log_softmax(-1)[1::2]
        with undisturbed(model), merging.applied(model.config):
            log_q = model(**batch).logits.log_softmax(-1)[1::2]
        apart.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return float(torch.cat(apart).mean())


def test_the_divergence_is_that_of_the_half_that_did_not_choose():
    given = batches()
    choice = tiny_model(HEAD).merge_to(flops_ratio=0.9, samples=given)
    assert choice.chosen.divergence == pytest.approx(judged(choice.chosen.merging, given))


def test_it_does_no_worse_than_what_needs_no_search():
    """On the samples that judge: what there is without samples, and `floor` with ToMe's matching, which it tries."""
    given = batches(4)
    chosen = tiny_model(HEAD).merge_to(flops_ratio=0.85, samples=given)
    unseen = tiny_model(HEAD).merge_to(flops_ratio=0.85)
    assert chosen.chosen.divergence <= judged(unseen.chosen.merging, given)
    plain = tiny_model(HEAD).merge_to(flops_ratio=0.85, merge_methods=["bipartite"], merge_metrics=["key"])
    (same,) = [each for each in chosen.candidates if each.merging == plain.chosen.merging]
    assert chosen.chosen.divergence <= same.divergence


def test_exact_duplicates_are_found_and_nothing_changes():
    """Of five latents that stand twelve times, with a budget for five: whichever way, the logits stay."""
    model = repeat_latents(tiny_model(HEAD), DUPLICATES)
    inputs = tiny_inputs(HEAD, batch=8)
    before = run(model, inputs).logits
    five = Merging.none(model.config).by([6, 1, 0, 0, 0, 0])
    choice = model.merge_to(flops_ratio=flops(model)(five), samples=inputs)
    assert choice.chosen.divergence < 1e-12
    assert (run(model, inputs).logits - before).abs().max() < 1e-5


@pytest.mark.parametrize("named", [{}, {"merge_methods": ["ward"], "merge_metrics": ["value"]}])
def test_without_samples_it_merges_early_and_what_is_most_alike(named):
    model = tiny_model(HEAD, merge_method="k_center", merge_metric="hidden")
    choice = model.merge_to(flops_ratio=0.9, input_shape=SHAPE, **named)
    method, metric = ("ward", "value") if named else ("leader", "key")
    config = tiny_config(merge_method=method, merge_metric=metric)
    assert choice.chosen.merging == weakest_member(named_family(config, "floor"), 0.9, flops(model))
    assert choice.chosen.merging == Merging.of(model.config)
    assert choice.chosen.divergence is None and choice.samples == 0


def test_a_share_of_the_time_is_kept():
    model = tiny_model(HEAD)
    choice = model.merge_to(latency_ratio=0.7, samples=batches())
    assert all(1 / each.speedup <= 0.7 + 1e-9 for each in choice.candidates)
    assert Merging.of(model.config) == choice.chosen.merging


def test_what_is_slower_than_unmerged_is_not_chosen(monkeypatch):
    """On a machine on which every matching at run time costs ten passes, fixed groups or fewer blocks are left."""

    def seconds(run, variants, rounds, bar=None):
        return [
            [10.0 if any(v.r if isinstance(v.r, list) else [v.r]) else 1.0 - 0.1 * i for i, v in enumerate(variants)]
        ]

    monkeypatch.setattr(search, "interleaved_seconds", seconds)
    chosen = tiny_model(HEAD).merge_to(flops_ratio=0.85, samples=batches()).chosen
    assert chosen.speedup >= 1 and (chosen.merging.merge_groups is not None or not any(chosen.merging.r))


def test_what_is_much_slower_than_others_at_the_same_flops_is_not_chosen(monkeypatch):
    """On a machine on which `ward` takes as long as it saves: not if there is another, however little it changes."""

    def seconds(run, variants, rounds, bar=None):
        return [[1.0 if not any(v.r) or v.merge_method == "ward" else 0.5 for v in map(as_list, variants)]] * rounds

    def as_list(merging):
        return replace(merging, r=merging.r if isinstance(merging.r, list) else [merging.r])

    monkeypatch.setattr(search, "interleaved_seconds", seconds)
    given = {"flops_ratio": 0.85, "samples": batches(), "merge_metrics": ["hidden"]}
    model = tiny_model(HEAD)
    assert model.merge_to(**given, merge_methods=["ward"]).chosen.merging.merge_method == "ward"
    choice = model.merge_to(**given, merge_methods=["ward", "random"])
    assert choice.chosen.merging.merge_method == "random" and choice.chosen.speedup == 2


def test_methods_metrics_and_schedules_can_be_narrowed_down():
    model = tiny_model(HEAD)
    given = {"schedules": ["geometric"], "merge_methods": ["k_center"], "merge_metrics": ["value"]}
    choice = model.merge_to(flops_ratio=0.9, samples=batches(), **given)
    assert (model.config.merge_method, model.config.merge_metric) == ("k_center", "value")
    assert choice.chosen.name == "geometric, k_center value"
    choice = model.merge_to(flops_ratio=0.9, samples=batches(), merge_methods=["ward"])
    assert {each.merging.merge_method for each in choice.candidates} == {"ward"}
    assert all(each.merging.merge_groups is None for each in choice.candidates)
    choice = model.merge_to(flops_ratio=0.9, samples=batches(), merge_methods=["groups"])
    assert all(each.merging.merge_groups is not None for each in choice.candidates)


def test_learned_latents_that_say_the_same_merge_before_the_first_layer():
    """Of nine latents that stand twelve times, where the first layer alone on twelve is over the budget."""
    model = repeat_latents(tiny_model(HEAD), AT_START)
    inputs = tiny_inputs(HEAD, batch=8)
    before = run(model, inputs).logits
    cost = flops(model)
    nine = replace(Merging.none(model.config), latent_groups=AT_START)
    assert cost(nine) < cost(Merging.none(model.config).by([3, 0, 0, 0, 0, 0]))
    choice = model.merge_to(flops_ratio=cost(nine), samples=inputs)
    assert model.config.latents_at_start == 9 and not any(model.config.merge_schedule)
    assert model.config.latent_groups == AT_START and choice.chosen.name.startswith("floor of 9 groups")
    assert (run(model, inputs).logits - before).abs().max() < 1e-5


def test_shares_are_of_all_blocks_however_few_run_now():
    """A model that was merged before, to fewer runs of shared blocks or to groups, is merged anew."""
    model, fresh = tiny_model(HEAD), tiny_model(HEAD)
    model.merge_to(flops_ratio=0.75, samples=batches(), schedules=["skip_blocks"])
    assert model.config.num_blocks == 1
    assert model.merge_to(flops_ratio=0.95, samples=batches()).chosen == (
        fresh.merge_to(flops_ratio=0.95, samples=batches()).chosen
    )


def test_the_whole_budget_is_no_merging():
    model = tiny_model(HEAD)
    choice = model.merge_to(flops_ratio=1.0, samples=batches())
    assert choice.chosen.divergence == 0 and not any(model.config.merge_schedule) and model.config.num_blocks == 2


def test_it_is_kept_by_what_is_saved(tmp_path):
    model = tiny_model(HEAD)
    choice = model.merge_to(flops_ratio=0.85, samples=batches())
    model.save_pretrained(tmp_path)
    assert Merging.of(type(model).from_pretrained(tmp_path).config) == choice.chosen.merging


def test_mode_and_gradients_are_as_they_were():
    model = tiny_model(HEAD, r=2).train()
    model.merge_to(flops_ratio=0.95, samples=batches())
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("samples", "says"),
    [
        (batches(1), "8 rows; a choice on fewer than 32"),
        ([batches(1)[0] | {"input_ids": torch.full((40, 9), 7)}], "alike"),
    ],
)
def test_samples_that_tell_little_are_warned_of(samples, says):
    with pytest.warns(UserWarning, match=says):
        tiny_model(HEAD).merge_to(flops_ratio=0.9, samples=samples)


def test_enough_samples_are_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny_model(HEAD).merge_to(flops_ratio=0.9, samples=batches(2, rows=16))


def test_a_large_model_is_searched_on_few_passes(monkeypatch):
    """Of 26 layers, and allowed 280 passes, as the published language model is. Rows are counted whole, on however few
    latents they run."""
    model = tiny_model(HEAD, num_blocks=1, num_self_attends_per_block=26)
    unmerged = Merging.none(model.config).asked_of(model.config)
    one_pass = forward_cost(unmerged, SHAPE, type(model).__name__).total_with_matching
    monkeypatch.setattr(search, "SEARCH_FLOPS", 280 * one_pass)
    rows, counts = [], []

    def seconds(run, variants, rounds, bar=None):
        counts.append(rounds)
        return [[[run(each), 1.0][1] for each in variants] for _ in range(rounds + 1)][1:]

    monkeypatch.setattr(search, "interleaved_seconds", seconds)
    for layer in model.base_model.encoder.self_attends:
        layer.register_forward_hook(lambda module, given, output: rows.append(len(given[0])))
    model.merge_to(flops_ratio=0.6, samples=batches(4, rows=16))
    assert sum(rows) / 26 < 2.5 * 280
    assert max(counts) < search.TIMED_ROUNDS


def test_groups_that_merge_in_many_layers_are_left_out_where_passes_are_few(monkeypatch):
    """Each such layer runs the samples anew. Asked for alone they are tried."""
    given = {"flops_ratio": 0.9, "samples": batches(), "schedules": ["constant"]}

    def grouped(*methods):
        choice = tiny_model(HEAD).merge_to(**given, merge_methods=methods)
        return [each for each in choice.candidates if each.merging.merge_groups is not None]

    assert grouped("bipartite", "groups")
    monkeypatch.setattr(search, "GROUPS_SHARE", 1e-9)
    assert not grouped("bipartite", "groups")
    assert grouped("groups")


def test_a_stopped_search_goes_on(tmp_path, monkeypatch):
    """From its log; not with other samples."""
    model, log = tiny_model(HEAD), tmp_path / "out" / "search.json"
    found = model.merge_to(flops_ratio=0.9, samples=batches(), log_file=log, merge_methods=["bipartite"])
    known = json.loads(log.read_text())
    calls = []
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, **inputs: calls.append(1) or forward(self, **inputs))
    again = model.merge_to(flops_ratio=0.9, samples=batches(), log_file=log, merge_methods=["bipartite"])
    assert again.chosen == found.chosen
    # Of the unmerged model alone, one for each half of a batch, and one for each batch whose latents are compared; on
    # the clock, unmerged and three metrics, then unmerged and the finalists.
    assert len(calls) == 4 + 2 + (1 + 3) + (1 + len(found.candidates))
    model.merge_to(flops_ratio=0.9, samples=batches(seed=1), log_file=log, merge_methods=["bipartite"])
    assert json.loads(log.read_text())["searched"] != known["searched"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "flops_ratio = None, latency_ratio = None: allowed is one of them"),
        ({"flops_ratio": 0.5, "latency_ratio": 0.5}, "allowed is one of them"),
        ({"flops_ratio": 0}, "flops_ratio = 0: allowed is a number above 0, up to 1"),
        ({"flops_ratio": 1.5}, "flops_ratio = 1.5: allowed is a number above 0, up to 1"),
        ({"flops_ratio": float("nan")}, "flops_ratio = nan: allowed is a number above 0, up to 1"),
        ({"flops_ratio": "0.5"}, "flops_ratio = '0.5'"),
        ({"latency_ratio": 0.5}, "latency_ratio = 0.5: allowed with samples only"),
        ({"flops_ratio": 0.01}, r"flops_ratio = 0.01: allowed are 0\.\d+, where schedule floor ends, to 1"),
        ({"flops_ratio": 0.01, "samples": batches()}, r"flops_ratio = 0.01: allowed are 0\.\d+, where merging ends"),
        ({"flops_ratio": 0.9, "samples": []}, "samples: there are none"),
        ({"flops_ratio": 0.9, "samples": [{"input_ids": [[1]]}]}, "samples: input_ids is a list; allowed are tensors"),
        ({"flops_ratio": 0.9, "samples": {"text": torch.ones(1, 2)}}, "samples: have text"),
        ({"flops_ratio": 0.9, "merge_methods": ["groups"]}, "merge_methods: 'groups'; allowed with samples only"),
        ({"flops_ratio": 0.9, "schedules": ["steep"]}, "schedules: 'steep'; allowed are constant"),
        ({"flops_ratio": 0.9, "samples": batches(), "merge_methods": ["magic"]}, "merge_method = 'magic': allowed are"),
        ({"flops_ratio": 0.9, "samples": batches(), "merge_metrics": ["color"]}, "merge_metrics: 'color'; allowed are"),
    ],
)
def test_what_cannot_be_meant_is_one_line_and_nothing_changes(given, says):
    model = tiny_model(HEAD, r=1)
    with pytest.raises(ValueError, match=says) as error:
        model.merge_to(**given)
    assert "\n" not in str(error.value) and model.r == 1


def test_outputs_that_are_not_finite_are_named():
    model = tiny_model(HEAD, r=1)
    with torch.no_grad():
        model.base_model.embeddings.latents[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="outputs of the model are not finite"):
        model.merge_to(flops_ratio=0.9, samples=batches())
    assert model.r == 1


@pytest.mark.parametrize(
    ("head", "ratio"),
    [("ForMaskedLM", 0.98), ("ForImageClassificationConvProcessing", 0.98), ("ForOpticalFlow", 0.995)],
)
def test_other_heads_are_merged_too(head, ratio):
    model = tiny_model(head)
    inputs = tiny_inputs(head, batch=4)
    shape = next(iter(inputs.values())).shape[1:]
    whole = forward_cost(model.config, (1, *shape), type(model).__name__).total_with_matching
    choice = model.merge_to(flops_ratio=ratio, samples=inputs, merge_methods=["bipartite"])
    spent = forward_cost(model.config, (1, *shape), type(model).__name__).total_with_matching
    assert spent / whole == choice.chosen.flops_ratio <= ratio


def test_padding_of_a_masked_language_model_does_not_count():
    model = tiny_model("ForMaskedLM")
    (batch,) = batches(1)
    mask = torch.ones(8, 9, dtype=torch.int64)
    mask[:, 6:] = 0
    garbage = batch["input_ids"].clone()
    garbage[:, 6:] = 5
    first, second = (
        model.merge_to(flops_ratio=0.98, samples={"input_ids": ids, "attention_mask": mask}).chosen
        for ids in (batch["input_ids"], garbage)
    )
    assert first.divergence == pytest.approx(second.divergence) and first.merging == second.merging


def test_a_postponed_merge_keeps_more_there_and_the_budget():
    config = tiny_config()
    cost_ratio = flops_ratios(config, SHAPE, f"ToMePerceiver{HEAD}")
    start = Merging.none(config).by([6, 0, 0, 0, 0, 0])
    ratio = cost_ratio(start)
    moves = [weakest_member(family, ratio, cost_ratio) for family in postponed(config, start)]
    assert moves and all(cost_ratio(move) <= ratio for move in moves if move is not None)
    assert any(move is not None and move.r[0] < 6 and sum(move.r) > 6 for move in moves)


def test_divergence_by_hand():
    before = torch.tensor([[0.0, 0.0], [0.0, 0.0]]).log_softmax(-1)
    output = torch.tensor([[0.0, 0.0], [0.75, 0.25]])
    output[1] = output[1].log()
    expected = 0.5 * torch.log(torch.tensor(0.5 / 0.75)) + 0.5 * torch.log(torch.tensor(0.5 / 0.25))
    assert output_divergence(output, before, regression=False).tolist() == pytest.approx([0, float(expected)])
    numbers = output_divergence(torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [1.0]]), regression=True)
    assert numbers.tolist() == [0, 4]
