# SPDX-License-Identifier: Apache-2.0
"""Time a merged model in PyTorch, ONNX Runtime and OpenVINO, beside the unmerged model in the same runtime.

A model with random weights runs in each runtime with each merging setting, in float32, bfloat16 (where the processor
has it) and int8, as `export.py` exports it. In each round, all of them and stock transformers in eager PyTorch
(float32) take turns in this process. A row has the time of a forward pass, how many times as fast as stock and as the
unmerged model in the same runtime it is (medians and quartiles over the rounds), the speed-up that the FLOPs imply, and
the share of it that was reached. It also has the largest difference of the logits from eager PyTorch in float32,
relative to the largest logit.

    python benchmarks/runtimes.py                       # the published text model, less than 15 minutes on two cores
    python benchmarks/runtimes.py --shapes digits       # the model of `make demo`
    python benchmarks/runtimes.py --small --runtime eager onnx openvino pt2

By default --batch_size 1 8 --r 0 8 16 --flops_ratio 0.5 --rounds 5, with --small --batch_size 1 4 --r 0 8
--flops_ratio 0.6 --rounds 3. It needs `pip install -r requirements-export.txt`. OUTPUT_DIR gets runtimes.json,
runtimes.md and runtimes.csv, and while it runs the exported models: four times the size of the weights for each
setting.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

# Python adds this script's folder to sys.path, but not the repository root, which holds the modules.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.published_models import DTYPES, relative_difference
from benchmarks.speed_rows import Cell, Fields, SpeedArguments, Table, check_names, format_quartiles, run_cells
from cost_tome_perceiver import interleaved_seconds
from experiments.command_line import parse_arguments
from experiments.errors import BadInput, exit_on_bad_input
from experiments.exported_model import (
    CONVERTERS,
    LogitsModule,
    Runtime,
    check_format,
    compile_package,
    export_onnx,
    load_runtime,
)
from experiments.exported_model import DTYPES as EXPORTED_DTYPES
from experiments.files import write_text
from experiments.measurement import Quartiles
from experiments.publishing.tables import markdown_table
from experiments.training.progress import quieten_transformers

EAGER, STOCK, UNMERGED = "eager", "stock", "r = 0"
RUNTIMES: dict[str, tuple[str, ...]] = {EAGER: ("float32", "bfloat16"), **EXPORTED_DTYPES}
"""Dtypes of each runtime."""
# A turn calls the model until stock has run for this long: a single call of a small model is too short to time.
TURN_SECONDS = 0.05


def default_dtypes() -> list[str]:
    """Return the dtypes that this processor computes in fast."""
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported()
    return ["float32", *(["bfloat16"] if has_bfloat16 else []), "int8"]


@dataclass
class RuntimesArguments(SpeedArguments):
    """Settings of this benchmark."""

    defaults: ClassVar[dict[str, Any]] = {"batch_size": [1, 8], "r": [0, 8, 16], "flops_ratio": [0.5], "rounds": 5}
    small_defaults: ClassVar[dict[str, Any]] = {"batch_size": [1, 4], "r": [0, 8], "flops_ratio": [0.6], "rounds": 3}
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "int8")

    dtype: list[str] = field(
        default_factory=default_dtypes,
        metadata={
            "help": "Dtypes, one or more of float32, bfloat16, int8; each is timed in the runtimes that have it "
            "(default: all that the processor has)."
        },
    )
    runtime: list[str] = field(
        default_factory=lambda: [EAGER, "onnx", "openvino"],
        metadata={"help": f"Runtimes, one or more of {', '.join(RUNTIMES)}; pt2 compiles for minutes."},
    )
    output_dir: str = field(default="outputs/runtimes", metadata={"help": "Output folder."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("runtime", self.runtime, RUNTIMES)
        if self.device != "cpu":
            raise BadInput(f"--device {self.device}: must be cpu; exported models run on the CPU")
        for dtype in self.dtype:
            if not any(dtype in RUNTIMES[runtime] for runtime in self.runtime):
                raise BadInput(
                    f"--dtype {dtype}: is in none of --runtime {' '.join(self.runtime)}; add one that has it"
                )
        if 0 not in self.r:
            self.r = [0, *self.r]

    def cells(self) -> list[Cell]:
        """Build every combination of dtype and shape, without fixed groups."""
        return [
            replace(cell, settings={name: each for name, each in cell.settings.items() if not each.get("merge_groups")})
            for cell in super().cells()
        ]


@dataclass(frozen=True, kw_only=True)
class Row:
    """Figures of one merging setting in one runtime."""

    runtime: str
    setting: str
    milliseconds: Quartiles  # of a forward pass
    times_stock: Quartiles  # stock's time in eager PyTorch, float32, over this row's in the same round
    times_unmerged: Quartiles  # the unmerged model's time in the same runtime over this row's in the same round
    implied: float  # the unmerged model's FLOPs over this row's
    share_of_implied: float  # median of `times_unmerged` over `implied`
    difference: float | None  # of the logits from eager PyTorch in float32, relative to the largest; `None` for stock


class Exports:
    """Exported files of a model with random weights, each made once and used in every cell.

    Args:
        arguments: settings of the benchmark.
        folder: folder for the files.
    """

    def __init__(self, arguments: RuntimesArguments, folder: Path) -> None:
        self.model, self.folder = arguments.model, folder
        self.stock = {dtype: self.model.build_stock(DTYPES[dtype], "cpu") for dtype in DTYPES if dtype != "float16"}

    def load(self, runtime: str, dtype: str, fields: Fields, inputs: dict[str, Tensor]) -> Runtime:
        """Return a function that runs the model with merging fields in a runtime, exported from example inputs."""
        if runtime == EAGER:
            return eager(self.model.build_merging(self.stock[dtype], **fields))
        key = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]
        module = LogitsModule(self.model.build_merging(self.stock["float32"], **fields))
        # A dimension of size 1 would be exported as a constant.
        example = tuple(value[:1].repeat(2, *[1] * (value.dim() - 1)) for value in inputs.values())
        file = self.folder / f"{key}_{dtype}.{'xml' if runtime == 'openvino' else runtime}"
        if file.exists():
            return load_runtime(file, runtime, dtype)
        if runtime == "pt2":
            compile_package(module, example, file, dtype)
            return load_runtime(file, runtime, dtype)
        whole = self.folder / f"{key}_float32.onnx"
        if not whole.exists():
            export_onnx(module, example, whole)
        if file != whole:
            CONVERTERS[runtime, dtype](whole, file)
        return load_runtime(file, runtime, dtype)

    def measure(self, arguments: RuntimesArguments, cell: Cell) -> Table:
        """Time one cell: every setting in every runtime that has its dtype."""
        inputs = draw_inputs(arguments, cell)
        runs: dict[tuple[str, str], Runtime] = {(STOCK, UNMERGED): eager(self.stock["float32"])}
        differences: dict[tuple[str, str], float | None] = {(STOCK, UNMERGED): None}
        kept = [runtime for runtime in arguments.runtime if cell.dtype in RUNTIMES[runtime]]
        for setting, fields in tqdm(cell.settings.items(), desc=f"exporting, {cell.name}"):
            reference = eager(self.model.build_merging(self.stock["float32"], **fields))(inputs)
            for runtime in kept:
                run = self.load(runtime, cell.dtype, fields, inputs)
                runs[runtime, setting] = run
                differences[runtime, setting] = relative_difference(run(inputs), reference).item()
        seconds = time_in_turns(runs, inputs, arguments.rounds or 1, cell.name)
        flops = {
            name: self.model.cost(cell.input_shape, **each).total_with_matching for name, each in cell.settings.items()
        }
        rows = []
        for (runtime, setting), taken in seconds.items():
            times_unmerged, implied = seconds[runtime, UNMERGED] / taken, flops[UNMERGED] / flops[setting]
            rows.append(
                Row(
                    runtime=runtime,
                    setting=setting,
                    milliseconds=Quartiles.of(taken * 1e3),
                    times_stock=Quartiles.of(seconds[STOCK, UNMERGED] / taken),
                    times_unmerged=Quartiles.of(times_unmerged),
                    implied=implied,
                    share_of_implied=float(np.median(times_unmerged)) / implied,
                    difference=differences[runtime, setting],
                )
            )
        return Table(cell.name, rows)


def draw_inputs(arguments: RuntimesArguments, cell: Cell) -> dict[str, Tensor]:
    """Draw random inputs, by the names that an exported model has for them."""
    drawn = arguments.model.draw_inputs(cell.input_shape, torch.float32, "cpu")
    if arguments.model.takes_text:
        return {"input_ids": drawn, "attention_mask": torch.ones_like(drawn)}
    return {"pixel_values": drawn}


def eager(model: PreTrainedModel) -> Runtime:
    """Return a function that runs a model in eager PyTorch."""
    module = LogitsModule(model)

    @torch.inference_mode()
    def run(inputs: dict[str, Tensor]) -> Tensor:
        return module(*(each.to(model.dtype) if each.is_floating_point() else each for each in inputs.values()))

    return run


def time_in_turns(
    runs: dict[tuple[str, str], Runtime], inputs: dict[str, Tensor], rounds: int, name: str
) -> dict[tuple[str, str], np.ndarray]:
    """Return the seconds of a forward pass of each run in each round, (rounds,)."""
    stock = runs[STOCK, UNMERGED]
    stock(inputs)
    start = time.perf_counter()
    stock(inputs)
    calls = math.ceil(TURN_SECONDS / (time.perf_counter() - start))

    def take_turn(run: Callable[..., Tensor]) -> None:
        for _ in range(calls):
            run(inputs)

    with tqdm(total=rounds + 1, desc=name) as bar:
        seconds = np.array(interleaved_seconds(take_turn, [*runs.values()], rounds, bar)) / calls
    return dict(zip(runs, seconds.T, strict=True))


def as_markdown(table: Table) -> str:
    """Return a heading and a table with one row for each runtime and setting."""
    cells = [
        (
            row.runtime,
            row.setting,
            f"{row.milliseconds.median:.4g}",
            *format_quartiles(row.times_stock),
            *format_quartiles(row.times_unmerged),
            f"{row.implied:.2f}",
            f"{row.share_of_implied:.0%}",
            "" if row.difference is None else f"{row.difference:.1e}",
        )
        for row in table.rows
    ]
    header = ["runtime", "merging", "ms", "times stock", "quartiles", "times unmerged", "quartiles", "FLOPs imply"]
    return f"## {table.cell}\n\n{markdown_table([*header, 'share', 'difference'], cells, 'llr')}\n"


def write_csv(output_dir: Path) -> None:
    """Write the rows of runtimes.json as runtimes.csv, with one column for each median and quartile."""
    lines = []
    for table in json.loads((output_dir / "runtimes.json").read_text())["cells"]:
        for row in table["rows"]:
            line = {"cell": table["cell"]}
            for name, value in row.items():
                quartiles = value.items() if isinstance(value, dict) else []
                line |= {f"{name}_{part}": figure for part, figure in quartiles} if quartiles else {name: value}
            lines.append(line)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(output_dir / "runtimes.csv", text.getvalue())


def main() -> None:
    (arguments,) = parse_arguments(__doc__ or "", RuntimesArguments)
    for runtime in arguments.runtime:
        if runtime != EAGER:
            check_format(runtime, "float32")
    quieten_transformers()
    output_dir = Path(arguments.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir, prefix="exported_") as folder:
        exports = Exports(arguments, Path(folder))
        run_cells(arguments, "runtimes", exports.measure, as_markdown)
    write_csv(output_dir)


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
