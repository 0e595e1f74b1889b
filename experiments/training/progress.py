# SPDX-License-Identifier: Apache-2.0
"""Output of a run on the terminal: stages, progress bars, logged values, and results in one line each."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

from experiments.tasks.scores import Score, parse_scores

# Logged values that are not shown among the figures: they do not describe the model, or are shown elsewhere.
HIDDEN_METRICS = re.compile(
    r"_stderr|_change|runtime|_per_second|samples|preparation_time|flos|epoch|grad_norm|resumed_from"
)
# Part of a warning that transformers logs for each of our checkpoints.
MODEL_TYPE_WARNING = "of type `tome_perceiver` to instantiate a model of type ``"
# Progress bars appear only after this time.
BAR_DELAY_SECONDS = 2.0


def announce(stage: str) -> None:
    """Print that a stage begins. Of several processes, only the first one prints."""
    say(f"\n-- {stage}")


def say(line: str) -> None:
    """Print a line, even below a progress bar. Of several processes, only the first one prints."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(line)
        sys.stdout.flush()


def quieten_transformers() -> None:
    """Hide progress bars of short work, such as loading weights, and a warning that does not apply.

    `AutoTokenizer` reads the config of each of our checkpoints without its model type, and warns of it.
    """
    # transformers 5.0 has no such hook, and shows its bars.
    if hasattr(transformers_logging, "set_tqdm_hook"):
        transformers_logging.set_tqdm_hook(
            lambda make_bar, args, kwargs: make_bar(*args, **{"delay": BAR_DELAY_SECONDS} | kwargs)
        )
    upstream = logging.getLogger("transformers.configuration_utils")
    upstream.addFilter(lambda record: MODEL_TYPE_WARNING not in record.getMessage())


def results_line(split: str, metrics: Mapping[str, Any]) -> str:
    """Return the results of a training or an evaluation in one line: figures, number of examples and time.

    Args:
        split: prefix of the metrics' names.
        metrics: metrics as Trainer returns them.
    """
    plain = {name.removeprefix(f"{split}_"): value for name, value in metrics.items()}
    parts = [figures_line(plain)] if figures_line(plain) else []
    for name, count in plain.items():
        if not name.startswith("samples") or "per_second" in name:
            continue
        suffix = name.removeprefix("samples")
        seconds = plain.get(f"runtime{suffix}")
        part = f"{count:,} examples{suffix.replace('_', ' ')}"
        if split == "train" and "epoch" in plain:
            part += f", {plain['epoch']:g} epochs" if plain["epoch"] != 1 else ", 1 epoch"
        if seconds is not None:
            part += f", {seconds:.1f} s" if seconds < 60 else f", {timedelta(seconds=round(seconds))}"
        parts.append(part)
    return "; ".join(parts)


def figures_line(plain: Mapping[str, Any]) -> str:
    """Return metrics in one line: scores with standard errors and paired changes, then losses and learning rates."""
    scores, shown = parse_scores(plain), []
    for name, value in plain.items():
        if HIDDEN_METRICS.search(name) or not isinstance(value, (int, float, type(None))):
            continue
        score = scores.get(name, Score(value))
        form = ".4g" if score.stderr is None else ".4f"
        text = f"{name.replace('_', ' ')} {_with_error(score.value, score.stderr, form)}"
        if score.compared:
            text += f" (change {_with_error(score.change, score.change_stderr, '+.4f')})"
        shown.append(text)
    return ", ".join(sorted(shown, key=lambda text: "loss" in text or "learning" in text))


def _with_error(value: float | None, error: float | None, form: str) -> str:
    shown = "undefined" if value is None else f"{value:{form}}"
    return shown if value is None or error is None else f"{shown} ± {error:.4f}"


def step_line(logs: Mapping[str, Any]) -> str | None:
    """Return values that Trainer logs during training as a line; `None` for those that `results_line` shows."""
    if "train_runtime" in logs:
        return None
    plain = {name.removeprefix("eval_"): value for name, value in logs.items()}
    position = f"epoch {logs['epoch']:.4g}" if "epoch" in logs else ""
    evaluated = ", evaluated" if any(name.startswith("eval_") for name in logs) else ""
    return f"{position}{evaluated}: {figures_line(plain)}" if figures_line(plain) else None


class StepLines(TrainerCallback):
    """Callback that prints logged values as a readable line instead of a dictionary."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and (line := step_line(logs or {})) is not None:
            say(line)


class Progress(StepLines, ProgressCallback):
    """transformers' `ProgressCallback` with readable lines; progress bars have names, and disappear at their end."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("training")
            self.training_bar.unit, self.training_bar.leave = "step", False

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)
        if self.prediction_bar is not None and self.prediction_bar.leave:
            self.prediction_bar.set_description("evaluating")
            self.prediction_bar.unit, self.prediction_bar.leave = "batch", False
