# SPDX-License-Identifier: Apache-2.0
"""Lines that a run prints: the name of each stage, bars, and the results of the stage in one line."""

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
from transformers.utils.logging import set_tqdm_hook

from experiments.tasks.scores import Score, parse_scores

# Logged values that say nothing of the model, or are in a line elsewhere.
NOT_SHOWN = re.compile(
    r"_stderr|_change|runtime|_per_second|samples|preparation_time|flos|epoch|grad_norm|resumed_from"
)
NO_MODEL_TYPE = "of type `tome_perceiver` to instantiate a model of type ``"
# Seconds; bars of shorter work are not shown.
WORTH_A_BAR = 2.0


def announce(stage: str) -> None:
    """Say that a stage begins. Of several processes, the first one does."""
    say(f"\n-- {stage}")


def say(line: str) -> None:
    """Write a line of its own, also while a bar is shown. Of several processes, the first one does."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(line)
        sys.stdout.flush()


def quieten_transformers() -> None:
    """Hide bars of short work, such as reading weights, and the warning of `AutoTokenizer`, which reads the config of
    each of our checkpoints without its model type."""
    set_tqdm_hook(lambda make, args, kwargs: make(*args, **{"delay": WORTH_A_BAR} | kwargs))
    upstream = logging.getLogger("transformers.configuration_utils")
    upstream.addFilter(lambda record: NO_MODEL_TYPE not in record.getMessage())


def results_line(split: str, metrics: Mapping[str, Any]) -> str:
    """Return the results of a training or an evaluation: figures with errors, then number of examples and time.

    The metrics are as Trainer gives them, with `split` as prefix of their names.
    """
    plain = {name.removeprefix(f"{split}_"): value for name, value in metrics.items()}
    parts = [figures(plain)] if figures(plain) else []
    for name, count in plain.items():
        if not name.startswith("samples") or "per_second" in name:
            continue
        suffix = name.removeprefix("samples")
        seconds = plain.get(f"runtime{suffix}")
        read = f"{count:,} examples{suffix.replace('_', ' ')}"
        if split == "train" and "epoch" in plain:
            read += f", {plain['epoch']:g} epochs" if plain["epoch"] != 1 else ", 1 epoch"
        if seconds is not None:
            read += f", {seconds:.1f} s" if seconds < 60 else f", {timedelta(seconds=round(seconds))}"
        parts.append(read)
    return "; ".join(parts)


def figures(plain: Mapping[str, Any]) -> str:
    """Return scores with their standard errors and paired changes, then losses and learning rates, in a line."""
    scores, shown = parse_scores(plain), []
    for name, value in plain.items():
        if NOT_SHOWN.search(name) or not isinstance(value, (int, float, type(None))):
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
    """Return what Trainer logs during training as a line; `None` for results that the end of a stage shows."""
    if "train_runtime" in logs:
        return None
    plain = {name.removeprefix("eval_"): value for name, value in logs.items()}
    where = f"epoch {logs['epoch']:.4g}" if "epoch" in logs else ""
    evaluated = ", evaluated" if any(name.startswith("eval_") for name in logs) else ""
    return f"{where}{evaluated}: {figures(plain)}" if figures(plain) else None


class StepLines(TrainerCallback):
    """Writes logged values as a line to read, not as a dictionary."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and (line := step_line(logs or {})) is not None:
            say(line)


class Progress(StepLines, ProgressCallback):
    """transformers' `ProgressCallback` with lines to read; bars have names, and are removed when they are done."""

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
