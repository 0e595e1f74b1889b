# SPDX-License-Identifier: Apache-2.0
"""The Trainer of every training here: it stops where training diverges, and records whose each checkpoint is."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from experiments.errors import Stopped
from experiments.tasks.base import LABELS, Batch
from experiments.tasks.scores import IGNORE_INDEX
from experiments.training.progress import Progress, StepLines, results_line, say
from experiments.training.resume import last_checkpoint, read_loss_sum, record_checkpoint
from experiments.training.run_record import RunRecord


class Diverged(Stopped):
    """A training whose loss or weights are not finite any more."""


class TaskTrainer(Trainer):
    """transformers' `Trainer`.

    Modifications:
    - of a masked language model only the masked positions are decoded, see `decoding_only_masked`
    - stops at the first loss that is not finite, and saves no weights that are not
    - writes the record of the run into each checkpoint, see `experiments.training.resume`
    - `train_loss` is the mean over all steps, also after a resume; upstream's is over those since
    - logs no gradient norm that is not finite, which would make `trainer_state.json` unreadable to other parsers
    - a figure that is not defined is never the best
    - prints the results of a stage in one line, see `experiments.training.progress`
    - counts no FLOPs, which upstream gives as 0 for a model that has inputs of another name

    Args:
        record: of the run that trains.
    """

    def __init__(self, *args: Any, record: RunRecord | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.record = record or RunRecord()
        self._loss_sum = 0.0
        for upstreams, ours in ((ProgressCallback, Progress), (PrinterCallback, StepLines)):
            if self.pop_callback(upstreams) is not None:
                self.add_callback(ours)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        loss_sum = 0.0 if resume_from_checkpoint is None else read_loss_sum(Path(resume_from_checkpoint))
        # NaN where it is not known leaves the mean out of the figures.
        self._loss_sum = math.nan if loss_sum is None else loss_sum
        result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        result.metrics.pop("total_flos", None)
        return result

    def training_step(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Tensor:
        if self.args.n_gpu > 1:  # by DataParallel, which takes labels apart as it does inputs
            loss = super().training_step(model, inputs, *args, **kwargs)
        else:
            with decoding_only_masked(self.model, inputs) as some:
                loss = super().training_step(model, some, *args, **kwargs)
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
        super().log(logs, *args, **kwargs)

    def log_metrics(self, split: str, metrics: dict[str, Any]) -> None:
        if self.is_world_process_zero():
            say(results_line(split, metrics))

    def _determine_best_metric(self, metrics: dict[str, Any], trial: Any) -> bool:
        name = f"eval_{str(self.args.metric_for_best_model).removeprefix('eval_')}"
        return metrics.get(name, 0.0) is not None and super()._determine_best_metric(metrics, trial)

    def check_weights(self) -> None:
        """Check that the weights are worth saving.

        Raises:
            Diverged: if any of them is not finite.
        """
        for name, parameter in self.model.named_parameters():
            # Of sharded weights each process looks at its own.
            own = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            if not own.isfinite().all():
                raise self._diverged(f"{name} is not finite")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.check_weights()
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save and folder.exists():
            shutil.rmtree(folder)  # left by a run that was killed
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        loss_sum = self._mean_over_processes()
        # Each process writes files of its own.
        self.accelerator.wait_for_everyone()
        if self.args.should_save and folder.exists():
            record_checkpoint(folder, self.record, loss_sum if math.isfinite(loss_sum) else None)

    def _mean_over_processes(self) -> float:
        summed = torch.tensor(self._loss_sum, dtype=torch.float64, device=self.args.device)
        return float(self.accelerator.gather(summed.reshape(1)).mean())

    def _diverged(self, what: str) -> Diverged:
        newest = last_checkpoint(Path(self.args.output_dir))
        kept = "no checkpoint was written before" if newest is None else f"{newest} is the last good checkpoint"
        step, rate = self.state.global_step, self._get_learning_rate()
        return Diverged(
            f"training has diverged: {what} after step {step}, at a learning rate of {rate:.3g}; {kept}. A smaller "
            "--learning_rate, more --warmup_steps or a smaller --max_grad_norm may help"
        )


@contextmanager
def decoding_only_masked(model: nn.Module, inputs: Batch) -> Iterator[Batch]:
    """Make a masked language model compute the logits of the masked positions alone, inside the block.

    Loss and gradients stay the same: no other position has a part in them. Decoding all P positions to the V tokens of
    the vocabulary is a third of a training step for V = 16,384. Other models are left as they are.

    Args:
        model: the model that is called inside.
        inputs: with `labels` (B, P), `IGNORE_INDEX` where nothing is masked.

    Yields:
        The inputs with the labels of the M masked positions, (1, M), for logits (1, M, V).
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
