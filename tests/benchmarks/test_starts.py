# SPDX-License-Identifier: Apache-2.0
"""benchmarks/starts.py, really run on a tiny teacher."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks import starts
from tests.support.script_run import bad_input_line, call_script
from tests.support.tiny_teachers import TEACHER_CHANNELS, write_student_tokenizer, write_teacher
from tests.support.tiny_texts import write_model_config, write_sentences

SCRIPT = "benchmarks.starts.py"
POSITIONS, CHANNELS = 16, 24
ROOM = {
    "architectures": ["PerceiverForMaskedLM"], "num_latents": POSITIONS, "max_position_embeddings": POSITIONS,
    "d_model": CHANNELS, "d_latents": CHANNELS, "qk_channels": TEACHER_CHANNELS, "v_channels": CHANNELS,
    "num_blocks": 1, "num_self_attends_per_block": 2, "num_self_attention_heads": 2, "num_cross_attention_heads": 1,
    "self_attention_widening_factor": 1, "hidden_act": "gelu",
}  # fmt: skip


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("starts")
    return {
        "--config_name": write_model_config(folder, **ROOM),
        "--tokenizer_name": write_student_tokenizer(folder / "student"),
        "--dataset_name": write_sentences(folder / "data", "one"),
        "--dataset_config_name": "one",
        "--teacher_name_or_path": write_teacher(folder / "teacher"),
        "--max_seq_length": POSITIONS,
    }


def words(given: dict[str, object]) -> list[object]:
    return [word for pair in given.items() for word in pair]


def test_the_three_starts_are_three_and_learn_the_same_text(given, tmp_path, capsys):
    call_script(
        SCRIPT, *words(given), "--use_cpu", "--max_steps", 3, "--logging_steps", 1, "--learning_rate", 1e-3,
        "--save_strategy", "no", "--output_dir", tmp_path,
    )  # fmt: skip
    rows = {row["start"]: row for row in json.loads((tmp_path / "starts.json").read_text())["rows"]}
    assert list(rows) == ["plain", "findable", "teacher"]
    firsts = [row["losses"][0][1] for row in rows.values()]
    assert len(set(firsts)) == 3 and all([step for step, _ in row["losses"]] == [1, 2, 3] for row in rows.values())
    # A random teacher's layers say nothing of masked tokens, but what the teacher says they do.
    assert rows["teacher"]["distance"] < min(rows["plain"]["distance"], rows["findable"]["distance"])
    assert all(math.isfinite(row["masked_loss"]) for row in rows.values())
    out = capsys.readouterr().out
    assert f"{100 * rows['plain']['accuracy']:.2f} ± " in out
    picture = (tmp_path / starts.PICTURE).read_bytes()
    (tmp_path / starts.PICTURE).unlink()
    assert starts.redraw(tmp_path).read_bytes() == picture


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"--start": "cold"}, "--start cold: allowed are plain, findable, teacher"),
        ({"--teacher_name_or_path": None}, "--teacher_name_or_path: not given"),
        ({"--config_name": None, "--model_name_or_path": "there"}, "--model_name_or_path: allowed is --config_name"),
        ({"--config_overrides": "num_latents=8", "--start": "teacher"}, "num_latents is 8; allowed is 16 and more"),
    ],
)
def test_what_cannot_be_meant_is_one_line(given, tmp_path, capsys, change, says):
    changed = {name: value for name, value in (given | change).items() if value is not None}
    assert says in bad_input_line(capsys, SCRIPT, *words(changed), "--use_cpu", "--output_dir", tmp_path)
