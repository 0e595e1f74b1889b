# SPDX-License-Identifier: Apache-2.0
"""A search finds, within a budget, a schedule that changes the output no more than any it began with."""

from __future__ import annotations

import json

import pytest
import torch

from experiments.merging.budget import flops_ratios
from experiments.merging.schedules import UNMERGED, unmerged_fields, weakest_member
from experiments.merging.search import ScheduleSearch, output_divergence, postponed, starting_families, undisturbed
from tests.support.tiny_models import tiny_config, tiny_model

HEAD = "ForSequenceClassification"
SHAPE = (1, 9)


def batches(count: int = 2, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(6, 262, (4, 9), generator=generator)} for _ in range(count)]


def flops(model):
    return flops_ratios(model.config, SHAPE, type(model).__name__)


def test_what_is_found_keeps_the_budget_and_changes_least():
    model = tiny_model(HEAD)
    search = ScheduleSearch(model, batches())
    found = search.best(0.9, flops(model))
    assert flops(model)(found) <= 0.9
    starts = [weakest_member(family, 0.9, flops(model)) for family in starting_families(model.config)]
    assert search.divergence(found) <= min(search.divergence(start) for start in starts if start is not None)
    assert 0 < search.divergence(found) == pytest.approx(by_hand(model, found))


def by_hand(model, fields) -> float:
    """Mean Kullback-Leibler divergence of the classes from those without merging."""
    total = 0.0
    with torch.no_grad():
        for batch in batches():
            log_p = model(**batch).logits.log_softmax(-1)
            with undisturbed(model):
                for name, value in fields.items():
                    setattr(model.config, name, value)
                log_q = model(**batch).logits.log_softmax(-1)
            total += float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    return total / len(batches())


def test_a_model_whose_last_layers_do_nothing_merges_there():
    """Where merging early costs something and merging late nothing, the search merges late."""
    model = tiny_model(HEAD, num_blocks=1, num_self_attends_per_block=4)
    with torch.no_grad():
        # Of the first two layers, keys and values are as they were; the others add nothing to the latents.
        for layer in model.perceiver.encoder.self_attends[2:]:
            for part in (layer.attention.output.dense, layer.mlp.dense2):
                part.weight.zero_()
                part.bias.zero_()
    ratio = 0.9
    search = ScheduleSearch(model, batches(4))
    found = search.best(ratio, flops(model))
    earliest = weakest_member(list(starting_families(model.config))[2], ratio, flops(model))
    assert search.divergence(found) < search.divergence(earliest)


def test_the_model_is_as_it_was():
    model = tiny_model(HEAD, r=2).train()
    ScheduleSearch(model, batches()).best(0.95, flops(model))
    assert model.r == 2 and model.training and model.config.num_blocks == 2


def test_no_budget_is_no_merging():
    model = tiny_model(HEAD)
    search = ScheduleSearch(model, batches())
    found = search.best(1.0, flops(model))
    assert sum(found["r"]) == 0 and found["num_blocks"] == 2 and search.divergence(found) == 0


def test_a_budget_below_every_candidate_finds_none():
    model = tiny_model(HEAD)
    assert ScheduleSearch(model, batches()).best(0.01, flops(model)) is None


def test_a_stopped_search_goes_on(tmp_path, monkeypatch):
    """From its log; not with other samples."""
    model, log = tiny_model(HEAD), tmp_path / "out" / "search.json"
    first = ScheduleSearch(model, batches(), log)
    found = first.best(0.9, flops(model))
    known = json.loads(log.read_text())["divergences"]
    again = ScheduleSearch(model, batches(), log)
    forward = type(model).forward
    calls = []
    monkeypatch.setattr(type(model), "forward", lambda self, **inputs: calls.append(1) or forward(self, **inputs))
    assert again.best(0.9, flops(model)) == found
    assert len(calls) == 2  # of the unmerged model alone, one a batch
    other = ScheduleSearch(model, batches(seed=1), log)
    other.best(0.9, flops(model))
    assert json.loads(log.read_text())["divergences"] != known


def test_a_postponed_merge_keeps_more_there_and_the_budget():
    config = tiny_config()
    cost_ratio = flops_ratios(config, SHAPE, f"ToMePerceiver{HEAD}")
    start = UNMERGED | {"r": [6, 0, 0, 0, 0, 0], "num_blocks": 2}
    ratio = cost_ratio(start)
    moves = [weakest_member(family, ratio, cost_ratio) for family in postponed(config, start)]
    assert moves and all(cost_ratio(move) <= ratio for move in moves if move is not None)
    assert any(move is not None and move["r"][0] < 6 and sum(move["r"]) > 6 for move in moves)


def test_divergence_by_hand():
    before = torch.tensor([[0.0, 0.0], [0.0, 0.0]]).log_softmax(-1)
    output = torch.tensor([[0.0, 0.0], [0.75, 0.25]])
    output[1] = output[1].log()
    expected = 0.5 * torch.log(torch.tensor(0.5 / 0.75)) + 0.5 * torch.log(torch.tensor(0.5 / 0.25))
    assert output_divergence(output, before, regression=False).tolist() == pytest.approx([0, float(expected)])
    numbers = output_divergence(torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [1.0]]), regression=True)
    assert numbers.tolist() == [0, 4]


def test_padding_of_a_masked_language_model_does_not_count():
    model = tiny_model("ForMaskedLM")
    (batch,) = batches(1)
    mask = torch.ones(4, 9, dtype=torch.int64)
    mask[:, 6:] = 0
    search = ScheduleSearch(model, [batch | {"attention_mask": mask}])
    assert search._outputs(unmerged_fields(model.config))[0].shape == (24, 262)
