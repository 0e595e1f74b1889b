# SPDX-License-Identifier: Apache-2.0
"""Measure how long calibration takes, whether it repeats, and how often `merge_to(max_changed=...)` breaks its bound.

Time and repeatability: the same samples are calibrated on all threads, on all threads again, and on one thread; the
three frontiers must be equal.

The bound: `--searches` calibrations run on different samples. Then, `--draws` times in all, held-out samples are drawn
from the evaluation data, `max_changed` chooses a row of the frontier by them, and the share of changed answers is
measured on all other evaluation inputs. A bound at 95 % confidence may be broken in 5 % of the draws.

    python benchmarks/calibration.py --model_name_or_path FOLDER --dataset_name zalando-datasets/fashion_mnist
    python benchmarks/calibration.py --model_name_or_path FOLDER --dataset_name nyu-mll/glue --task_name mrpc --draws 0

OUTPUT_DIR gets calibration.json and calibration.md.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from tqdm.auto import tqdm

# Python adds this script's folder to sys.path, but not the repository root, which holds the modules.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cost_tome_perceiver import undisturbed
from experiments.command_line import parse_arguments, shown_command
from experiments.errors import BadInput, exit_on_bad_input
from experiments.files import write_json, write_text
from experiments.measurement import describe_environment, environment_line
from experiments.publishing.tables import markdown_table
from experiments.runs.checkpoint_task import SweepDataArguments, load_sweep_task
from experiments.runs.start import load
from experiments.training.model_arguments import ModelArguments
from experiments.training.trainer_arguments import TrainerArguments
from frontier_tome_perceiver import Frontier, binomial_bound, choose


@dataclass
class CalibrationArguments:
    """Sizes of the measurement."""

    _argument_group_name: ClassVar[str] = "calibration"

    samples: int = field(
        default=1024,
        metadata={
            "help": "Samples per calibration, from the test split, or from training if the test split is evaluated on."
        },
    )
    searches: int = field(default=5, metadata={"help": "Calibrations, each on different samples, that test the bound."})
    draws: int = field(
        default=200, metadata={"help": "Draws of held-out samples over all calibrations; 0 measures only the time."}
    )
    max_changed: list[float] = field(
        default_factory=lambda: [0.01, 0.02, 0.05],
        metadata={"help": "Bounds on the share of changed answers, one or more."},
    )

    def __post_init__(self) -> None:
        if self.samples < 4 or self.searches < 1 or self.draws < 0:
            raise BadInput("--samples must be 4 or more, --searches 1 or more, --draws 0 or more")


def measure_time(model: Any, samples: list) -> list[dict[str, Any]]:
    """Calibrate on all threads, on all threads again, and on one; compare each frontier with the first."""
    threads, rows, first = torch.get_num_threads(), [], None
    for count in (threads, threads, 1):
        torch.set_num_threads(count)
        start = time.perf_counter()
        frontier = model.calibrate(samples)
        seconds = time.perf_counter() - start
        first = first or frontier
        rows.append({"threads": count, "seconds": seconds, "rows": len(frontier.rows), "equal": frontier == first})
    torch.set_num_threads(threads)
    return rows


def changed_answers(model: Any, frontier: Frontier, batches: list) -> np.ndarray:
    """Return a boolean array (rows of the frontier, inputs): whether merging changes the unmerged model's answer."""
    found = []
    with undisturbed(model):
        for batch in tqdm(batches, desc="evaluating every row"):
            with model.unmerged.applied(model.config):
                before = model(**batch).logits.argmax(-1)
            for row in frontier.rows:
                with row.merging.applied(model.config):
                    found.append((model(**batch).logits.argmax(-1) != before).numpy())
    sizes = range(len(frontier.rows))
    return np.stack([np.concatenate(found[place :: len(frontier.rows)]) for place in sizes])


def broken_promises(
    model: Any, frontiers: list[tuple[Frontier, np.ndarray]], arguments: CalibrationArguments, seed: int
) -> list[dict[str, Any]]:
    """Draw held-out samples, choose a row by each bound, and count how often the other inputs break the bound."""
    random = np.random.default_rng(seed)
    rows = []
    for limit in arguments.max_changed:
        broken, truths, shares = 0, [], []
        for draw in range(arguments.draws):
            frontier, changed = frontiers[draw % len(frontiers)]
            order = random.permutation(changed.shape[1])
            tested, others = order[: frontier.held_out], order[frontier.held_out :]
            counts = changed[:, tested].sum(axis=1).tolist()
            bounds = [binomial_bound(count, len(tested)) for count in counts]
            tests = zip(frontier.rows, counts, bounds, strict=True)
            drawn = replace(
                frontier,
                rows=[replace(row, changed=count / len(tested), changed_bound=bound) for row, count, bound in tests],
            )
            model.config.merge_frontier = drawn.to_dict()
            chosen = choose(model, max_changed=limit).chosen
            truth = 0.0
            if chosen.flops_ratio < 1:
                place = next(index for index, row in enumerate(drawn.rows) if row.merging == chosen.merging)
                truth = float(changed[place, others].mean())
            broken += truth > limit
            truths.append(truth)
            shares.append(chosen.flops_ratio)
        rows.append(
            {
                "max_changed": limit,
                "draws": arguments.draws,
                "broken": broken / arguments.draws,
                "changed_mean": float(np.mean(truths)),
                "changed_largest": float(np.max(truths)),
                "flops_ratio_mean": float(np.mean(shares)),
            }
        )
    return rows


def as_table(rows: list[dict[str, Any]]) -> str:
    """Format rows of figures as a Markdown table."""
    cells = [[f"{value:.3g}" if isinstance(value, float) else value for value in row.values()] for row in rows]
    return markdown_table(list(rows[0]), cells, "r")


def main() -> None:
    model_args, data, arguments, training = parse_arguments(
        __doc__, ModelArguments, SweepDataArguments, CalibrationArguments, TrainerArguments
    )
    loaded = load(
        partial(load_sweep_task, data, model_args, training.seed, arguments.samples * arguments.searches),
        model_args,
        training,
    )
    model, prepared = loaded.model, loaded.prepared
    samples = prepared.samples(arguments.samples * arguments.searches, 32)
    each = -(-len(samples) // arguments.searches)
    report = {"time": measure_time(model, samples[:each]), "environment": describe_environment()}
    if arguments.draws:
        batches = list(prepared.unlabelled(prepared.evaluation[""], 250))
        frontiers = []
        for start in range(0, len(samples), each):
            frontier = model.calibrate(samples[start : start + each])
            frontiers.append((frontier, changed_answers(model, frontier, batches)))
        report["promise"] = broken_promises(model, frontiers, arguments, training.seed)
        report["evaluated"] = frontiers[0][1].shape[1]
    report["frontier"] = model.calibrate(samples[:each]).to_dict()
    folder = Path(training.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "calibration.json", report)
    tables = [as_table(report[name]) for name in ("time", "promise") if name in report]
    text = [f"# Calibration on {arguments.samples} samples", *tables, str(Frontier.of(model.config))]
    text += [f"Made by\n\n```\n{shown_command()}\n```", f"Measured on: {environment_line(report['environment'])}."]
    write_text(folder / "calibration.md", "\n\n".join(text) + "\n")
    print("\n\n".join(text))


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
