# SPDX-License-Identifier: Apache-2.0
"""What a training step takes as the scripts make it: unmerged, merged, `--elastic`, and each with `--torch_compile`.

The Trainers of the scripts take turns on models with the same random weights and one random batch: forward and backward
pass with accelerate around them, without the optimizer, whose step is the same for all. A figure is the median, with
quartiles, of the first one's time over this one's within a round. Each step of `--elastic` draws another merging, so
its quartiles are wide, and what is compiled has seen some 40 of them before it is timed.

    python benchmarks/training_step.py --shapes small_vision --batch_size 128 --rounds 60
    python benchmarks/training_step.py --shapes small_language --batch_size 32 --length 64 --bf16 --rounds 60

By default --batch_size 32 --r 0 --flops_ratio 0.6 (for the small shapes 0.77 0.6) --rounds 40, with --small
--batch_size 4 --rounds 10. OUTPUT_DIR gets training_step.json and training_step.md.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from tqdm.auto import tqdm
from transformers import TrainingArguments

# A script's own folder is on the path, the repository's root, where the modules are, is not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.published_models import DTYPES
from benchmarks.speed_rows import Cell, SpeedArguments, Table, run_cells, spread
from experiments.command_line import parse_arguments
from experiments.errors import exit_on_bad_input
from experiments.measurement import Timing, time_interleaved
from experiments.publishing.tables import markdown_table
from experiments.training.elastic import ElasticTrainer
from experiments.training.progress import quieten_transformers
from experiments.training.trainer import TaskTrainer

ELASTIC = "--elastic"
COMPILED = ", --torch_compile"
# Draws of a merging that are compiled before anything is timed.
WARM_UP = 40


@dataclass
class TrainingStepArguments(SpeedArguments):
    """Settings of this benchmark."""

    usual: ClassVar[dict[str, Any]] = {"batch_size": [32], "r": [0], "flops_ratio": [0.6], "rounds": 40}
    reduced: ClassVar[dict[str, Any]] = {"batch_size": [4], "r": [0], "flops_ratio": [0.6], "rounds": 10}

    bf16: bool = field(default=False, metadata={"help": "Under autocast to bfloat16, as training with --bf16."})
    torch_compile: bool = field(default=False, metadata={"help": "Each also with its layers compiled."})
    output_dir: str = field(default="outputs/training_step", metadata={"help": "Where the results go."})

    def described(self) -> dict[str, Any]:
        turn = "forward and backward pass of the scripts' Trainer, without the optimizer"
        return super().described() | {"each turn": f"{turn}, under autocast to bfloat16" if self.bf16 else turn}


@dataclass(frozen=True)
class Row:
    """Figures of a way to train."""

    name: str
    timing: Timing  # time of a step; its speed-up is against the first row
    first_steps_seconds: float  # time of the steps before the timed ones, with compilation


def trainers(arguments: TrainingStepArguments, cell: Cell, folder: Path) -> dict[str, TaskTrainer]:
    """One for each way to train, with a model of its own and the same weights."""
    stock = arguments.model.build_stock(DTYPES[cell.dtype], arguments.device)
    ways = [*((name, TaskTrainer, fields) for name, fields in cell.settings.items()), (ELASTIC, ElasticTrainer, {})]
    made: dict[str, TaskTrainer] = {}
    for ending in ("", COMPILED) if arguments.torch_compile else ("",):
        for name, trainer_class, fields in ways:
            model = arguments.model.build_merging(stock, **fields).train().requires_grad_(True)
            model.config.problem_type = "single_label_classification"
            if ending:
                model.compile_repeated_blocks()
            training = TrainingArguments(
                output_dir=str(folder), bf16=arguments.bf16, use_cpu=arguments.device == "cpu", report_to="none",
                disable_tqdm=True, remove_unused_columns=False,
            )  # fmt: skip
            trainer = trainer_class(model=model, args=training)
            # As `Trainer.train` begins: autocast is accelerate's.
            trainer.model_wrapped = trainer.accelerator.prepare(model)
            trainer.current_gradient_accumulation_steps = 1
            made[name + ending] = trainer
    return made


def step(trainer: TaskTrainer, inputs: dict[str, torch.Tensor]) -> None:
    """A step without its optimizer."""
    trainer.training_step(trainer.model_wrapped, dict(inputs))
    trainer.model.zero_grad(set_to_none=True)
    trainer.state.global_step += 1


def measure(arguments: TrainingStepArguments, cell: Cell) -> Table:
    """Run the rounds of one cell."""
    published = arguments.model
    pixels_or_text = published.draw_inputs(cell.input_shape, DTYPES[cell.dtype], arguments.device)
    labels = torch.zeros(len(pixels_or_text), dtype=torch.int64, device=arguments.device)
    inputs = {"inputs": pixels_or_text, "labels": labels}
    with tempfile.TemporaryDirectory() as folder:
        made = trainers(arguments, cell, Path(folder))
        first = {}
        for name, trainer in made.items():
            start = time.perf_counter()
            for _ in tqdm(range(WARM_UP if COMPILED in name else 1), desc=f"first steps, {name}"):
                step(trainer, inputs)
            first[name] = time.perf_counter() - start
        turns = [partial(step, trainer, inputs) for trainer in made.values()]
        timings = time_interleaved(lambda turn: turn(), turns, turns[0], arguments.rounds or 1, desc=cell.name)
    return Table(cell.name, [Row(name, timing, first[name]) for name, timing in zip(made, timings, strict=True)])


def as_markdown(table: Table) -> str:
    """Return a heading and a line for each way to train."""
    cells = [
        (
            row.name,
            f"{row.timing.latency_ms.median:.1f}",
            *spread(row.timing.speedup),
            f"{row.first_steps_seconds:.1f}",
        )
        for row in table.rows
    ]
    columns = ["", "ms a step", "times as fast as the first", "quartiles", "steps before, s"]
    return f"## {table.cell}\n\n{markdown_table(columns, cells, 'lr')}\n"


def main() -> None:
    (arguments,) = parse_arguments(__doc__ or "", TrainingStepArguments)
    quieten_transformers()
    run_cells(arguments, "training_step", measure, as_markdown)


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
