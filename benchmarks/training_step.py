# SPDX-License-Identifier: Apache-2.0
"""Time a training step of the scripts: unmerged, merged and `--elastic`, each with and without `--torch_compile`.

The scripts' Trainers take turns on models with the same random weights and one random batch. A step is the forward and
the backward pass as accelerate runs them, without the optimizer step, which is the same for all. The speed-up is the
time of the first Trainer over the time of another in the same round, as median and quartiles. Each step of `--elastic`
draws another merging setting, so its quartiles are wide, and compiled models take 40 steps before they are timed.

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

# Python adds this script's folder to sys.path, but not the repository root, which holds the modules.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.published_models import DTYPES
from benchmarks.speed_rows import Cell, SpeedArguments, Table, format_quartiles, run_cells
from experiments.command_line import parse_arguments
from experiments.errors import exit_on_bad_input
from experiments.measurement import Timing, time_interleaved
from experiments.publishing.tables import markdown_table
from experiments.training.elastic import ElasticTrainer
from experiments.training.progress import quieten_transformers
from experiments.training.trainer import TaskTrainer

ELASTIC = "--elastic"
COMPILED = ", --torch_compile"
# Steps of a compiled model before it is timed, so that most settings that --elastic draws are compiled by then.
COMPILED_WARM_UP_STEPS = 40


@dataclass
class TrainingStepArguments(SpeedArguments):
    """Settings of this benchmark."""

    defaults: ClassVar[dict[str, Any]] = {"batch_size": [32], "r": [0], "flops_ratio": [0.6], "rounds": 40}
    small_defaults: ClassVar[dict[str, Any]] = {"batch_size": [4], "r": [0], "flops_ratio": [0.6], "rounds": 10}

    bf16: bool = field(
        default=False, metadata={"help": "Run under autocast to bfloat16, as training with --bf16 does."}
    )
    torch_compile: bool = field(default=False, metadata={"help": "Also time each with compiled self-attention layers."})
    output_dir: str = field(default="outputs/training_step", metadata={"help": "Output folder."})

    def described(self) -> dict[str, Any]:
        turn = "forward and backward pass of the scripts' Trainer, without the optimizer"
        return super().described() | {"each turn": f"{turn}, under autocast to bfloat16" if self.bf16 else turn}


@dataclass(frozen=True)
class Row:
    """Figures of one Trainer."""

    name: str
    timing: Timing  # of a step; its speed-up is over the first row
    first_steps_seconds: float  # warm-up steps, compilation included


def build_trainers(arguments: TrainingStepArguments, cell: Cell, folder: Path) -> dict[str, TaskTrainer]:
    """Build a Trainer for each merging setting and for --elastic, each with its own model and the same weights."""
    stock = arguments.model.build_stock(DTYPES[cell.dtype], arguments.device)
    variants = [*((name, TaskTrainer, fields) for name, fields in cell.settings.items()), (ELASTIC, ElasticTrainer, {})]
    trainers: dict[str, TaskTrainer] = {}
    for ending in ("", COMPILED) if arguments.torch_compile else ("",):
        for name, trainer_class, fields in variants:
            model = arguments.model.build_merging(stock, **fields).train().requires_grad_(True)
            model.config.problem_type = "single_label_classification"
            if ending:
                model.compile_repeated_blocks()
            training = TrainingArguments(
                output_dir=str(folder), bf16=arguments.bf16, use_cpu=arguments.device == "cpu", report_to="none",
                disable_tqdm=True, remove_unused_columns=False,
            )  # fmt: skip
            trainer = trainer_class(model=model, args=training)
            # `Trainer.train` does the same at its start; accelerate adds autocast.
            trainer.model_wrapped = trainer.accelerator.prepare(model)
            trainer.current_gradient_accumulation_steps = 1
            trainers[name + ending] = trainer
    return trainers


def step(trainer: TaskTrainer, inputs: dict[str, torch.Tensor]) -> None:
    """Run a training step without the optimizer step."""
    trainer.training_step(trainer.model_wrapped, dict(inputs))
    trainer.model.zero_grad(set_to_none=True)
    trainer.state.global_step += 1


def measure(arguments: TrainingStepArguments, cell: Cell) -> Table:
    """Time one cell."""
    published = arguments.model
    pixels_or_text = published.draw_inputs(cell.input_shape, DTYPES[cell.dtype], arguments.device)
    labels = torch.zeros(len(pixels_or_text), dtype=torch.int64, device=arguments.device)
    inputs = {"inputs": pixels_or_text, "labels": labels}
    with tempfile.TemporaryDirectory() as folder:
        trainers = build_trainers(arguments, cell, Path(folder))
        first_seconds = {}
        for name, trainer in trainers.items():
            start = time.perf_counter()
            for _ in tqdm(range(COMPILED_WARM_UP_STEPS if COMPILED in name else 1), desc=f"first steps, {name}"):
                step(trainer, inputs)
            first_seconds[name] = time.perf_counter() - start
        turns = [partial(step, trainer, inputs) for trainer in trainers.values()]
        timings = time_interleaved(lambda turn: turn(), turns, turns[0], arguments.rounds or 1, desc=cell.name)
    return Table(
        cell.name, [Row(name, timing, first_seconds[name]) for name, timing in zip(trainers, timings, strict=True)]
    )


def as_markdown(table: Table) -> str:
    """Return a heading and a table with one row for each Trainer."""
    cells = [
        (
            row.name,
            f"{row.timing.latency_ms.median:.1f}",
            *format_quartiles(row.timing.speedup),
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
