# SPDX-License-Identifier: Apache-2.0
"""A process that stops in the middle of writing leaves the old files."""

from __future__ import annotations

import os

import pytest

from experiments.errors import BadInput
from experiments.files import check_writable, save_whole, write_whole


@pytest.mark.parametrize("stop", [OSError, KeyboardInterrupt])
def test_a_stop_in_between_leaves_the_old_file(tmp_path, stop):
    path = tmp_path / "results.json"
    write_whole(path, lambda partial: partial.write_text("first"))

    def stop_halfway(partial):
        partial.write_text("sec")
        raise stop

    with pytest.raises(stop):
        write_whole(path, stop_halfway)
    assert path.read_text() == "first"
    if stop is OSError:
        assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]
    write_whole(path, lambda partial: partial.write_text("third"))
    assert path.read_text() == "third"


@pytest.mark.parametrize("stop", [OSError, KeyboardInterrupt])
def test_a_stop_while_a_checkpoint_is_saved_leaves_the_old_one(tmp_path, stop):
    folder = tmp_path / "out"

    def save(text, stops=False):
        def write(partial):
            (partial / "config.json").write_text(text)
            (partial / "code").mkdir()
            (partial / "code" / "module.py").write_text(text)
            if stops:
                raise stop

        save_whole(folder, write)

    def held():
        return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}

    save("first")
    (folder / "results.json").write_text("mine")
    with pytest.raises(stop):
        save("second", stops=True)
    assert held() == {"config.json": "first", "code/module.py": "first", "results.json": "mine"}
    (folder / ".partial").mkdir()  # as a run that is killed leaves it
    (folder / ".partial" / "module.py").write_text("ha")
    save("third")
    assert held() == {"config.json": "third", "code/module.py": "third", "results.json": "mine"}
    assert not (folder / ".partial").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(BadInput, match="Permission denied"):
        check_writable("--output_dir out", tmp_path)


def test_a_folder_that_can_be_made_is_not_made_yet(tmp_path):
    check_writable("--output_dir out", tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    check_writable("--output_dir out", tmp_path)
    assert tmp_path.exists()
