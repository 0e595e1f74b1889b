# SPDX-License-Identifier: Apache-2.0
"""Whether a change of the model's code made it faster: the code as it was takes turns with the code as it is.

Both run on the same tensors in one process, in alternating rounds; a speed-up is the median, with quartiles, of the
time of the code before over that of the code now within a round. The code before runs twice in a round, and how far it
is from 1 against itself is the noise. It is a folder with the model files, as of any commit:

    mkdir before && git archive COMMIT -- '*_tome_perceiver.py' | tar -x -C before
    python benchmarks/compare_code.py --before before --batch_size 1 --rounds 30
    python benchmarks/compare_code.py --before before --small

By default --batch_size 1 --r 0 8 16 --flops_ratio 0.325 --rounds 20. With --small, 6 layers of the published widths,
--flops_ratio 0.4 --rounds 10. OUTPUT_DIR gets compare_code.json and compare_code.md.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch

# A script's own folder is on the path, the repository's root, where the modules are, is not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import modeling_tome_perceiver as now
from benchmarks.published_models import DTYPES, check_outputs
from benchmarks.speed_rows import Cell, SpeedArguments, write_results
from experiments.command_line import parse_arguments
from experiments.errors import BadInput, exit_on_bad_input, naming
from experiments.measurement import Timing, time_interleaved
from experiments.publishing.tables import markdown_table


@dataclass
class CompareCodeArguments(SpeedArguments):
    """What runs, and how."""

    usual: ClassVar[dict[str, Any]] = {"batch_size": [1], "r": [0, 8, 16], "flops_ratio": [0.325], "rounds": 20}
    reduced: ClassVar[dict[str, Any]] = {"batch_size": [1], "r": [0, 8, 16], "flops_ratio": [0.4], "rounds": 10}

    before: str = field(default="", metadata={"help": "Folder with the model files of another commit (see above)."})
    output_dir: str = field(default="outputs/compare_code", metadata={"help": "Where the results go."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (Path(self.before) / "modeling_tome_perceiver.py").is_file():
            raise BadInput(f"--before {self.before}: allowed is a folder with modeling_tome_perceiver.py and the rest")


def modeling_code(folder: Path) -> ModuleType:
    """The module `modeling_tome_perceiver` of a folder, with the modules beside it, apart from those that run now."""
    package = ModuleType("before")
    package.__path__ = [str(folder.resolve())]
    for name in [name for name in sys.modules if name.startswith("before.")]:
        del sys.modules[name]
    sys.modules["before"] = package
    return importlib.import_module("before.modeling_tome_perceiver")


@dataclass(frozen=True)
class Row:
    """What a setting took.

    Attributes:
        name: of the setting.
        before, now: with the code of the folder and with the present one; `before.speedup` is against itself.
    """

    name: str
    before: Timing
    now: Timing


@torch.inference_mode()
def measure(arguments: CompareCodeArguments, before: ModuleType, cell: Cell) -> list[Row]:
    """Run the rounds of one cell, setting by setting."""
    published, dtype = arguments.model, DTYPES[cell.dtype]
    stock = published.build_stock(arguments.seed, dtype, arguments.device)
    inputs = published.draw_inputs(cell.input_shape, dtype, arguments.device)
    rows = []
    for name, fields in cell.settings.items():
        ours = [published.build_merging(stock, modeling=code, **fields) for code in (before, now)]
        check_outputs(*ours, inputs)
        turns = [partial(model, inputs=inputs) for model in ours]
        timings = time_interleaved(
            lambda turn: turn(), turns, turns[0], arguments.rounds or 1, desc=f"{cell.name}, {name}"
        )
        rows.append(Row(name, *timings))
    return rows


def as_markdown(cell: Cell, rows: list[Row]) -> str:
    """A heading and a line for each setting."""
    cells = [
        (
            row.name,
            f"{row.before.latency_ms.median:.4g}",
            f"{row.now.latency_ms.median:.4g}",
            f"{row.now.speedup.median:.3f}",
            f"{row.now.speedup.lower:.3f} to {row.now.speedup.upper:.3f}",
            f"{row.before.speedup.median:.3f}",
        )
        for row in rows
    ]
    columns = ["", "ms before", "ms now", "times as fast", "quartiles", "before against itself"]
    return f"## {cell.name}\n\n{markdown_table(columns, cells, 'lr')}\n"


def main() -> None:
    (arguments,) = parse_arguments(__doc__ or "", CompareCodeArguments)
    # All that can be wrong with the arguments shows here, before any model is built.
    cells = arguments.cells()
    with naming(f"--before {arguments.before}", ImportError, SyntaxError):
        before = modeling_code(Path(arguments.before))
    arguments.use_device()
    measured = [(cell, measure(arguments, before, cell)) for cell in cells]
    cells_measured = [{"cell": cell.name, "rows": [asdict(row) for row in rows]} for cell, rows in measured]
    tables = [as_markdown(*each) for each in measured]
    print(write_results(arguments, "compare_code", {"cells": cells_measured}, tables), end="")
    print(f"written to {arguments.output_dir}: compare_code.json and compare_code.md")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
