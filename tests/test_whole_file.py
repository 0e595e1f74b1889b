# SPDX-License-Identifier: Apache-2.0
"""A stop in the middle of writing leaves what was there."""

from __future__ import annotations

import pytest

from experiments.whole_file import write_whole


def test_a_stop_in_between_leaves_what_was_there(tmp_path):
    path = tmp_path / "results.json"
    write_whole(path, lambda partial: partial.write_text("first"))

    def stop_halfway(partial):
        partial.write_text("sec")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, stop_halfway)
    assert path.read_text() == "first"
    write_whole(path, lambda partial: partial.write_text("third"))
    assert path.read_text() == "third"
