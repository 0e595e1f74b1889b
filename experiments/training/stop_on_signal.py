# SPDX-License-Identifier: Apache-2.0
"""Stop a training at a signal, with a checkpoint from which it resumes as if it had never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from experiments.interruption import Interrupted, pending_signal


class StopOnSignal(TrainerCallback):
    """Callback that saves a checkpoint at the end of the step in which a signal came, and stops the training.

    What is due at that step, such as an evaluation at the end of an epoch, is done first: a resumed training would
    leave it out.

    Args:
        accelerator: `Trainer.accelerator`; its processes stop at the same step.
        output_dir: folder of the checkpoints.

    Attributes:
        asked_to_save: whether the next checkpoint is saved only because of the signal.
    """

    def __init__(self, accelerator: Any, output_dir: Path) -> None:
        self.asked_to_save = False
        self._accelerator, self._output_dir = accelerator, output_dir
        self._may_stop = False
        self._saved_step: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.asked_to_save, self._may_stop, self._saved_step = False, False, None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # At the last step of an epoch, the callbacks of the epoch's end come next.
        self._may_stop = state.epoch is None or not float(state.epoch).is_integer()
        if self._may_stop and self._signal(state) is not None:
            self._ask_to_save(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._may_stop = True
        if (number := self._signal(state)) is None:
            return
        is_due = control.should_log or control.should_evaluate or control.should_save
        if self._saved_step == state.global_step and not is_due:
            self._stop(number, state)
        self._ask_to_save(control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.asked_to_save, self._saved_step = False, state.global_step
        if self._may_stop and (number := self._signal(state)) is not None:
            self._stop(number, state)

    def _ask_to_save(self, control: TrainerControl) -> None:
        self.asked_to_save, control.should_save = not control.should_save, True

    def _stop(self, number: int, state: TrainerState) -> None:
        checkpoint = self._output_dir / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        raise Interrupted(
            number, f"{checkpoint} is saved; repeat the command with --resume_from_checkpoint last to continue"
        )

    def _signal(self, state: TrainerState) -> int | None:
        """Return the number of the signal that any of the processes has received; after the last step, `None`."""
        number = pending_signal() or 0
        if self._accelerator.num_processes > 1:
            received = torch.tensor([number], device=self._accelerator.device)
            number = int(self._accelerator.gather(received).max())
        return number if number and state.global_step < state.max_steps else None
