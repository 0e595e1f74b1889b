# SPDX-License-Identifier: Apache-2.0
"""What benchmarks of speed run by default can be run: each share of the FLOPs is one that a schedule comes down to."""

from __future__ import annotations

import pytest

from benchmarks.latency import LatencyArguments
from benchmarks.published_models import PUBLISHED_MODELS
from benchmarks.throughput import ThroughputArguments


@pytest.mark.parametrize("arguments", [LatencyArguments, ThroughputArguments])
@pytest.mark.parametrize("shapes", PUBLISHED_MODELS)
@pytest.mark.parametrize("small", [False, True])
def test_what_is_not_given_can_be_run(arguments, shapes, small):
    assert all(len(cell.settings) > 1 for cell in arguments(small=small, shapes=shapes).cells())
