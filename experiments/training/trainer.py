# SPDX-License-Identifier: Apache-2.0
"""Trainer of all training runs: stops if training diverges, and writes the run record into each checkpoint."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from experiments.errors import Stopped
from experiments.interruption import leave_process_group
from experiments.tasks.base import LABELS, Batch
from experiments.tasks.scores import IGNORE_INDEX
from experiments.training.progress import Progress, StepLines, results_line, say
from experiments.training.resume import (
    last_checkpoint,
    read_loss_sum,
    record_checkpoint,
    remove_for_signal,
    remove_old_checkpoints,
)
from experiments.training.run_record import RunRecord
from experiments.training.stop_on_signal import StopOnSignal

# Durations that differ by more seconds from the wall clock's show that this clock was set meanwhile.
CLOCK_TOLERANCE = 1.0


class Diverged(Stopped):
    """Error for a training whose loss or weights are no longer finite."""


class TaskTrainer(Trainer):
    """transformers' `Trainer`.

    Modifications:
    - masked language models decode only the masked positions, see `decoding_only_masked`
    - stops at the first loss that is not finite, and saves no weights that are not finite
    - writes the run record into each checkpoint, see `experiments.training.resume`, and only then removes older ones
    - a signal ends training after the next step, with a checkpoint, see `StopOnSignal`
    - durations are measured by a monotonic clock
    - `train_loss` is the mean over all steps; upstream's leaves out the steps before a resume
    - logs no gradient norm that is not finite, which `trainer_state.json` could not hold as standard JSON
    - under FSDP, a model that is not being trained is evaluated with whole weights
    - an undefined metric never counts as the best
    - prints the results of a stage in one line, see `experiments.training.progress`
    - reports no FLOPs: upstream counts 0 if the main input of a model has an unexpected name

    Args:
        record: run record.
    """

    def __init__(self, *args: Any, record: RunRecord | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.record = record or RunRecord()
        self._loss_sum = 0.0
        # Arguments of `compile_repeated_blocks`, if the model is compiled.
        self.compile_options: dict[str, Any] | None = None
        # Start of each stage by a monotonic clock, in seconds, by the prefix of its metrics.
        self._started: dict[str, float] = {}
        self._stop = StopOnSignal(self.accelerator, Path(self.args.output_dir))
        self.add_callback(self._stop)
        for upstream, replacement in ((ProgressCallback, Progress), (PrinterCallback, StepLines)):
            if self.pop_callback(upstream) is not None:
                self.add_callback(replacement)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        loss_sum = 0.0 if resume_from_checkpoint is None else read_loss_sum(Path(resume_from_checkpoint))
        # A sum that was not finite is read as None; as NaN it makes the mean NaN, which `log` leaves out.
        self._loss_sum = math.nan if loss_sum is None else loss_sum
        self._started["train"] = time.monotonic()
        result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        result.metrics.pop("total_flos", None)
        return result

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_fsdp_enabled and not self.accelerator._models:
            # Outside training the weights are whole; accelerate would refuse to shard them without an optimizer.
            self.accelerator.prepare_model(self.model, device_placement=True, evaluation_mode=True)
        return super().evaluation_loop(*args, **kwargs)

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        if loader.num_workers and (seed_worker := loader.worker_init_fn) is not None:
            loader.worker_init_fn = partial(_start_worker, seed_worker)
        return loader

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        self._started[metric_key_prefix] = time.monotonic()
        return super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)

    def predict(self, *args: Any, metric_key_prefix: str = "test", **kwargs: Any) -> Any:
        self._started[metric_key_prefix] = time.monotonic()
        output = super().predict(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        self._correct_durations(output.metrics)
        return output

    def training_step(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Tensor:
        if self.args.n_gpu > 1:  # DataParallel splits labels by row; `decoding_only_masked` leaves a single row
            loss = super().training_step(model, inputs, *args, **kwargs)
        else:
            with decoding_only_masked(self.model, inputs) as masked_inputs:
                loss = super().training_step(model, masked_inputs, *args, **kwargs)
        value = loss.item()
        if not math.isfinite(value):
            raise self._diverged(f"the loss is {value}")
        self._loss_sum += value
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "train_loss" in logs:
            logs["train_loss"] = self._mean_over_processes() / max(self.state.global_step, 1)
        for name in ("train_loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                del logs[name]
        self._correct_durations(logs)
        super().log(logs, *args, **kwargs)

    def _correct_durations(self, metrics: dict[str, Any]) -> None:
        """Replace durations by the wall clock if it was set meanwhile, and remove speeds computed from them."""
        for split, started in self._started.items():
            seconds = time.monotonic() - started
            if abs(metrics.get(f"{split}_runtime", seconds) - seconds) > CLOCK_TOLERANCE:
                metrics[f"{split}_runtime"] = round(seconds, 4)
                for name in [name for name in metrics if name.startswith(split) and name.endswith("_per_second")]:
                    del metrics[name]

    def log_metrics(self, split: str, metrics: dict[str, Any]) -> None:
        if self.is_world_process_zero():
            say(results_line(split, metrics))

    def _determine_best_metric(self, metrics: dict[str, Any], trial: Any) -> bool:
        name = f"eval_{str(self.args.metric_for_best_model).removeprefix('eval_')}"
        return metrics.get(name, 0.0) is not None and super()._determine_best_metric(metrics, trial)

    def check_weights(self) -> None:
        """Check that the weights are finite.

        Raises:
            Diverged: if any is not.
        """
        for name, parameter in self.model.named_parameters():
            # Each process checks its own shard of sharded weights.
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            if not local.isfinite().all():
                raise self._diverged(f"{name} is not finite")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.check_weights()
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save and folder.exists():
            shutil.rmtree(folder)  # left by a killed run
        self.accelerator.wait_for_everyone()
        # Upstream would remove older checkpoints before this one has its record.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        loss_sum = self._mean_over_processes()
        # Other processes may still be writing their files.
        self.accelerator.wait_for_everyone()
        if not self.args.should_save or not folder.exists():
            return
        for_signal = self._stop.asked_to_save
        record_checkpoint(folder, self.record, loss_sum if math.isfinite(loss_sum) else None, for_signal)
        if not for_signal:
            remove_for_signal(folder.parent, self.state.global_step)
            remove_old_checkpoints(folder.parent, limit, self.state.best_model_checkpoint)

    def _mean_over_processes(self) -> float:
        local_sum = torch.tensor(self._loss_sum, dtype=torch.float64, device=self.args.device)
        return float(self.accelerator.gather(local_sum.reshape(1)).mean())

    def _diverged(self, evidence: str) -> Diverged:
        newest = last_checkpoint(Path(self.args.output_dir))
        kept = "no checkpoint was written before" if newest is None else f"{newest} is the last good checkpoint"
        step, rate = self.state.global_step, self._get_learning_rate()
        return Diverged(
            f"training has diverged: {evidence} after step {step}, at a learning rate of {rate:.3g}; {kept}; try a "
            "smaller --learning_rate, more --warmup_steps or a smaller --max_grad_norm"
        )


def _start_worker(seed_worker: Callable[[int], object], worker: int) -> None:
    """Start a worker process that reads data: seeded, and out of reach of signals to the first process's group."""
    leave_process_group()
    seed_worker(worker)


@contextmanager
def decoding_only_masked(model: nn.Module, inputs: Batch) -> Iterator[Batch]:
    """Make a masked language model compute only the logits of masked positions, inside the block.

    Loss and gradients stay the same, because other positions do not contribute to them. Decoding all P positions to a
    vocabulary of V tokens takes a third of a training step for V = 16,384. Other models stay unchanged.

    Args:
        model: model that is called inside the block.
        inputs: inputs of the model, with `labels` (B, P) that are `IGNORE_INDEX` at positions that are not masked.

    Yields:
        Inputs with the labels of the M masked positions, (1, M), for logits (1, M, V).
    """
    decoder = getattr(model, "embedding_decoder", None)
    if decoder is None or LABELS not in inputs:
        yield inputs
        return
    masked = inputs[LABELS] != IGNORE_INDEX

    def select(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        states: Tensor = args[0]  # (B, P, channels)
        return (states[masked.to(states.device)][None], *args[1:]), kwargs

    handle = decoder.register_forward_pre_hook(select, with_kwargs=True)
    try:
        yield inputs | {LABELS: inputs[LABELS][masked][None]}
    finally:
        handle.remove()
