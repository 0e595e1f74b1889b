# SPDX-License-Identifier: Apache-2.0
"""Measure whether a change of the model's code made it faster, by timing the old and the new code in turns.

The model files of another commit ("before"), the present ones ("now") and stock transformers run on the same tensors in
one process, each once a round. The speed-up is the old code's time over the new code's in the same round, as median and
quartiles; stock's time over either is reported too. The old code runs twice a round: how far its ratio to itself is
from 1 shows the noise. Extract the model files of a commit to a folder, and name it with --before:

    mkdir before && git archive COMMIT -- '*_tome_perceiver.py' | tar -x -C before
    python benchmarks/compare_code.py --before before --batch_size 1 --rounds 30
    python benchmarks/compare_code.py --before before --shapes small_language --training --autocast --batch_size 32
    python benchmarks/compare_code.py --before before --small

By default --batch_size 1 --r 0 8 16 --flops_ratio 0.325 --rounds 20. With --small, 6 layers of the published widths,
--flops_ratio 0.4 --rounds 10. OUTPUT_DIR gets compare_code.json and compare_code.md.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

# Python adds this script's folder to sys.path, but not the repository root, which holds the modules.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import modeling_tome_perceiver as now
from benchmarks.published_models import DTYPES, OUTPUT_TOLERANCE, check_outputs, relative_difference
from benchmarks.speed_rows import Cell, StepArguments, Table, format_quartiles, run_cells
from cost_tome_perceiver import interleaved_seconds
from experiments.command_line import parse_arguments
from experiments.errors import BadInput, exit_on_bad_input, naming
from experiments.measurement import Quartiles, Timing
from experiments.publishing.tables import markdown_table


@dataclass
class CompareCodeArguments(StepArguments):
    """Settings of this benchmark."""

    defaults: ClassVar[dict[str, Any]] = {"batch_size": [1], "r": [0, 8, 16], "flops_ratio": [0.325], "rounds": 20}
    small_defaults: ClassVar[dict[str, Any]] = {"batch_size": [1], "r": [0, 8, 16], "flops_ratio": [0.4], "rounds": 10}

    before: str = field(default="", metadata={"help": "Folder with the model files of another commit (see above)."})
    output_dir: str = field(default="outputs/compare_code", metadata={"help": "Output folder."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (Path(self.before) / "modeling_tome_perceiver.py").is_file():
            raise BadInput(f"--before {self.before}: must be a folder with all *_tome_perceiver.py files")
        with naming(f"--before {self.before}", ImportError, SyntaxError):
            self.before_code = modeling_code(Path(self.before))


def modeling_code(folder: Path) -> ModuleType:
    """Import `modeling_tome_perceiver` and the modules beside it from a folder, separate from the present ones."""
    package = ModuleType("before")
    package.__path__ = [str(folder.resolve())]
    for name in [name for name in sys.modules if name.startswith("before.")]:
        del sys.modules[name]
    sys.modules["before"] = package
    return importlib.import_module("before.modeling_tome_perceiver")


@dataclass(frozen=True)
class Row:
    """Figures of one merging setting."""

    name: str
    implied_speedup: float  # stock's FLOPs over this setting's
    before: Timing  # code in --before; its speed-up is against itself
    now: Timing  # present code; its speed-up is against the code in --before
    stock_ms: Quartiles  # of a turn of stock transformers, unmerged
    before_times_stock: Quartiles  # stock's time over the old code's in the same round
    now_times_stock: Quartiles


@torch.inference_mode()
def check_most_rows(before: PreTrainedModel, now: PreTrainedModel, inputs: Tensor) -> None:
    """Check that the outputs of two float32 models agree for at least half of the rows.

    In a single row, rounding may decide which of two equally similar latents merges; in coarser dtypes that happens in
    most rows.

    Raises:
        AssertionError: if the outputs differ, because then the two models do different work.
    """
    rows = zip(*(model(inputs=inputs).logits for model in (before, now)), strict=True)
    difference = np.median([relative_difference(each, expected).item() for expected, each in rows])
    tolerance = OUTPUT_TOLERANCE[torch.float32]
    assert difference <= tolerance, f"outputs differ by {difference} of the largest, more than {tolerance}"


def measure(arguments: CompareCodeArguments, cell: Cell) -> Table:
    """Time one cell, setting by setting."""
    published, dtype, codes = arguments.model, DTYPES[cell.dtype], (arguments.before_code, now)
    stock = published.build_stock(dtype, arguments.device)
    inputs = published.draw_inputs(cell.input_shape, dtype, arguments.device)
    # Without merging, both codes must give the same outputs on the same weights.
    check_outputs(*(published.build_merging(stock, modeling=code) for code in codes), inputs)
    turn = partial(arguments.take_turn, inputs=inputs)
    stock_flops = arguments.turn_flops({}, cell.input_shape)
    rows = []
    for name, fields in cell.settings.items():
        ours = [published.build_merging(stock, modeling=code, **fields) for code in codes]
        if dtype == torch.float32:
            check_most_rows(*ours, inputs)
        models = [*ours, stock]
        for model in models:
            model.train(arguments.training).requires_grad_(arguments.training)
        with tqdm(total=(arguments.rounds or 1) + 1, desc=f"{cell.name}, {name}") as bar:
            turns = interleaved_seconds(turn, [ours[0], *models], arguments.rounds or 1, bar)
        baseline, *taken, stocks = np.array(turns).T
        timings = [Timing(Quartiles.of(1e3 * each), Quartiles.of(baseline / each)) for each in taken]
        times_stock = [Quartiles.of(stocks / each) for each in taken]
        implied = stock_flops / arguments.turn_flops(fields, cell.input_shape)
        rows.append(Row(name, implied, *timings, Quartiles.of(1e3 * stocks), *times_stock))
        stock.eval().requires_grad_(False)
    return Table(cell.name, rows)


def as_markdown(table: Table) -> str:
    """Return a heading and a table with one row for each setting."""
    cells = [
        (
            row.name,
            *(f"{each.median:.4g}" for each in (row.stock_ms, row.before.latency_ms, row.now.latency_ms)),
            *format_quartiles(row.now.speedup, ".3f"),
            f"{row.before.speedup.median:.3f}",
            f"{row.before_times_stock.median:.2f}",
            f"{row.now_times_stock.median:.2f}",
            f"{row.implied_speedup:.2f}",
        )
        for row in table.rows
    ]
    columns = ["", "ms stock", "ms before", "ms now", "times as fast", "quartiles", "before against itself"]
    columns += ["before, times stock", "now, times stock", "FLOPs imply"]
    return f"## {table.cell}\n\n{markdown_table(columns, cells, 'lr')}\n"


def main() -> None:
    (arguments,) = parse_arguments(__doc__ or "", CompareCodeArguments)
    run_cells(arguments, "compare_code", measure, as_markdown)


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
