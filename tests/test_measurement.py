# SPDX-License-Identifier: Apache-2.0
"""Tests of interleaved timing: order of the variants, speed-ups, peak memory."""

from __future__ import annotations

import pytest
import torch

import cost_tome_perceiver
from experiments.measurement import Quartiles, peak_memory_mb, time_interleaved


class Clock:
    """Fake clock that moves only when a variant runs."""

    def __init__(self) -> None:
        self.now, self.ran = 0.0, []

    def run(self, seconds: float) -> None:
        self.ran.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(cost_tome_perceiver.time, "perf_counter", lambda: clock.now)
    return clock


def test_speedup_is_the_baselines_time_over_the_variants(clock):
    fast, slow = time_interleaved(clock.run, [1.0, 8.0], baseline=4.0, rounds=3)
    assert fast.speedup == Quartiles(4.0, 4.0, 4.0)
    assert slow.speedup == Quartiles(0.5, 0.5, 0.5)
    assert fast.latency_ms.median == pytest.approx(1000)


def test_every_round_runs_everything_and_starts_with_another(clock):
    time_interleaved(clock.run, [1.0, 2.0], baseline=3.0, rounds=2)
    rounds = [clock.ran[start : start + 3] for start in range(0, 9, 3)]
    assert all(sorted(ran) == [1.0, 2.0, 3.0] for ran in rounds)
    assert {ran[0] for ran in rounds} == {1.0, 2.0, 3.0}


def test_the_first_round_does_not_count(clock):
    """A variant that is slow only in its first run is as fast as the others."""
    first = iter([100.0])
    (timing,) = time_interleaved(
        lambda name: clock.run(next(first, 1.0) if name == "variant" else 1.0), ["variant"], "baseline", rounds=3
    )
    assert timing.speedup.median == 1.0


def test_the_profiler_behind_it_says_nothing(capfd):
    peak_memory_mb(lambda: torch.ones(3) + 1, torch.nn.Linear(1, 1))
    assert capfd.readouterr() == ("", "")


def test_peak_memory_is_what_is_held_at_once_and_the_models_own():
    """The model has 4 MB of weights and holds at most two of three 4 MB tensors at once, besides the input."""
    model = torch.nn.Linear(1000, 1000, bias=False)
    batch = torch.randn(1000, 1000)

    def forward() -> None:
        first = model(batch)
        second = first * 2
        del first
        assert (second + 1).shape == batch.shape

    with torch.inference_mode():
        assert peak_memory_mb(forward, model) == pytest.approx(4 + 8, rel=0.01)
