# SPDX-License-Identifier: Apache-2.0
"""The list of slow tests names what there is."""

from __future__ import annotations

import pytest

from tests.conftest import SLOW
from tests.support.script_run import ROOT


@pytest.mark.parametrize("place", SLOW)
def test_what_is_slow_exists(place):
    file, _, test = place.partition("::")
    path = ROOT / "tests" / file
    assert path.exists() and (not test or f"def {test}(" in path.read_text())
