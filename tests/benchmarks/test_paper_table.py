# SPDX-License-Identifier: Apache-2.0
"""benchmarks/paper_table.py puts sweeps beside the paper's figures, by what r means, and draws both."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from tests.support.script_run import run_script

LAYERS, LATENTS = 12, 64


def write_sweep(folder, shift: float = 0.0, strengths=(0, 3, 5, 20), method="bipartite", examples=400) -> str:
    """A sweep with constant r and one budget, whose changes are -r points and the shift."""

    def row(name: str, r: list[int], series: str, share: float, **measured: float):
        return {"name": name, "series": series, "r": r, "merge_method": method, "flops_ratio": share,
                "latents_left": LATENTS - sum(r), "merged": {"accuracy": 0.8, **measured}}  # fmt: skip

    def changes(change: float):
        return {"accuracy_change": change / 100, "accuracy_change_stderr": 0.003}

    rows = [
        row(f"r={r}", [r] * LAYERS, "r", 1 - r / 30, **(changes(shift - r) if r else {})) for r in strengths
    ]  # fmt: skip
    rows.append(row("flops=0.5 search", [30] + [0] * (LAYERS - 1), "search", 0.5, **changes(shift - 0.5)))
    folder.mkdir(parents=True)
    results = {"metric": "accuracy", "evaluated_on": examples, "rows": rows}
    (folder / "sweep_results.json").write_text(json.dumps(results))
    return str(folder)


def test_rows_stand_beside_what_merges_as_much_of_the_latents(tmp_path):
    sweep, out = write_sweep(tmp_path / "mrpc"), tmp_path / "out"
    result = run_script("benchmarks/paper_table.py", f"mrpc={sweep}", "--output_dir", out)
    assert result.returncode == 0, result.stderr
    lines = (out / "paper_table.md").read_text().splitlines()
    (six,) = [line for line in lines if line.startswith("| 6 |")]
    # 6 x 26 / 256 and 3 x 12 / 64.
    assert six == "| 6 | 0.61 | 0.692 | 86.03 | 85.29 | 1.30 | r=3 | 0.56 | 0.900 | 80.00 (-3.00 ± 0.30) |  |  |"
    (ten,) = [line for line in lines if line.startswith("| 10 |")]
    assert "| r=5 | 0.94 |" in ten
    (eight,) = [line for line in lines if line.startswith("| 8 |")]
    assert eight.endswith("|  |  |  |  |  |  |")
    (far,) = [line for line in lines if line.startswith("| r=20 |")]  # left beside none, and not left out
    assert far.startswith("| r=20 | 3.75 |")
    assert "| flops=0.5 search |  | 0.500 | 80.00 (-0.50 ± 0.30) |  |  |" in lines
    with Image.open(out / "paper_table.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_seeds_are_averaged_and_their_spread_is_shown(tmp_path):
    sweeps = [f"rte={write_sweep(tmp_path / str(seed), shift)}" for seed, shift in enumerate((0.0, 1.0))]
    result = run_script("benchmarks/paper_table.py", *sweeps, "--output_dir", tmp_path / "out")
    assert "80.00 (-2.50 ± 0.30; -3.00 to -2.00)" in result.stdout
    assert "means of 2 seeds" in result.stdout


@pytest.mark.parametrize("wrong", ["no task", "no sweep", "other rows", "another method", "other examples"])
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, wrong):
    sweep = write_sweep(tmp_path / "one")
    sweeps, says = {
        "no task": ([f"qqp={sweep}"], "mrpc, rte, stsb"),
        "no sweep": (["mrpc=not/there"], "not/there"),
        "other rows": ([f"mrpc={sweep}", f"mrpc={write_sweep(tmp_path / 'two', strengths=(0, 3))}"], "same rows"),
        "another method": (
            [f"mrpc={sweep}", f"mrpc={write_sweep(tmp_path / 'three', method='leader')}"], "in the same way",
        ),
        "other examples": (
            [f"mrpc={sweep}", f"mrpc={write_sweep(tmp_path / 'four', examples=40)}"], "the same examples",
        ),
    }[wrong]  # fmt: skip
    result = run_script("benchmarks/paper_table.py", *sweeps, "--output_dir", tmp_path / "out")
    assert result.returncode == 2 and says in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
