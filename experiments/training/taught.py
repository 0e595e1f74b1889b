# SPDX-License-Identifier: Apache-2.0
"""Training a masked language model that learns a teacher's states beside the masked tokens.

Letters: B batch, S input positions, P positions that the model decodes, D its channels, T those of the teacher.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerCallback, TrainerControl, TrainerState

from cost_tome_perceiver import undisturbed
from experiments.errors import BadInput
from experiments.tasks.base import LABELS, Batch
from experiments.tasks.scores import NOT_ASKED
from experiments.tasks.teacher import Teacher
from experiments.training.from_bert import why_not_from_bert
from experiments.training.trainer import TaskTrainer

MASKED_WEIGHT = 0.3
"""Of the loss of the masked tokens, beside the distance to the teacher's states."""
# Of the learning rate, for what tells positions apart and for the embeddings, see `experiments.training.findable`.
SLOWER = 0.1
MAP_FILE = "teacher_map.safetensors"
# So many training examples say what mean and deviation the teacher's states have.
STANDARDISED_ON = 256
STANDARDISED_AT_ONCE = 32
LEAST_DEVIATION = 1e-6
# Of the states' mean square, added to each in fitting the map.
RIDGE = 1e-3


class TeacherMap(nn.Module):
    """From the decoder's states to the teacher's, standardised by dimension: linear, 0 at the start.

    A map that began at random would push the states to say what it is, before they say anything of the text; and of
    states that are not standardised, their mean is most of what there is to learn, which one constant vector does.
    """

    def __init__(self, channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, teacher_channels)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("mean", torch.zeros(teacher_channels))
        self.register_buffer("deviation", torch.ones(teacher_channels))

    def standardise_by(self, states: Tensor) -> None:
        """Take the mean and the deviation from states (number, T)."""
        self.mean.copy_(states.mean(dim=0))
        self.deviation.copy_(states.std(dim=0).clamp(min=LEAST_DEVIATION))

    @torch.no_grad()
    def fit(self, states: Tensor, teachers: Tensor) -> None:
        """Begin with what reads the teacher's states (number, T) off a student's (number, D) best, by least squares:
        for a student that knows them already."""
        known, wanted = states.double(), (teachers.double() - self.mean) / self.deviation
        mean = known.mean(dim=0)
        known = known - mean
        squares = known.T @ known
        squares += RIDGE * squares.diagonal().mean() * torch.eye(len(squares), device=squares.device)
        weight = torch.linalg.solve(squares, known.T @ wanted).T
        self.linear.weight.copy_(weight)
        self.linear.bias.copy_(wanted.mean(dim=0) - weight @ mean)

    def distance(self, states: Tensor, teachers: Tensor) -> Tensor:
        """The mean squared error, a scalar, of states (number, D) for those of the teacher (number, T)."""
        return F.mse_loss(self.linear(states.float()), (teachers.float() - self.mean) / self.deviation)


class FreshGradients(TrainerCallback):
    """Clears the gradients of a module before each step; Trainer clears the model's, and asks no optimizer to."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.module.zero_grad()


class TaughtTrainer(TaskTrainer):
    """A `TaskTrainer` for a masked language model with a teacher.

    Modifications: the loss of training is the distance of the decoder's states to the teacher's, at every position that
    is no padding, and `MASKED_WEIGHT` times that of the masked tokens. The teacher reads what stood there before it was
    masked. The map between the two is trained along and is part of each checkpoint, as the optimizer's state is, in a
    file of its own, so that a checkpoint's model is whole without it; gradients are clipped without it. What
    `slower_parameters` names takes a tenth of the learning rate.

    Args:
        teacher: what to learn.

    Raises:
        BadInput: under FSDP or DeepSpeed, which shard the model's parameters alone.
    """

    def __init__(self, *args: Any, teacher: Teacher, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise BadInput("--teacher_name_or_path: allowed without FSDP and DeepSpeed")
        self.teacher = teacher.to(self.args.device)
        self.teacher_map = TeacherMap(self.model.config.d_latents, teacher.channels).to(self.args.device)
        self.add_callback(FreshGradients(self.teacher_map))
        self._unmasked = self._states = torch.empty(0)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        handle = self.model.embedding_decoder.register_forward_pre_hook(self._hold_states)
        attention = self.model.config._attn_implementation
        if self.args.bf16 and self.args.device.type == "cpu":
            # There the fused kernel goes back through bfloat16 more slowly than the products one by one.
            self.model.set_attn_implementation("eager")
        try:
            if resume_from_checkpoint is None:
                self._begin_map()
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            handle.remove()
            self.model.set_attn_implementation(attention)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        made = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        if not made:
            slower = {id(parameter) for parameter in slower_parameters(self.model)}
            for group in list(optimizer.param_groups):
                options = {name: value for name, value in group.items() if name != "params"}
                both: dict[bool, list[nn.Parameter]] = {False: [], True: []}
                for parameter in group["params"]:
                    both[id(parameter) in slower].append(parameter)
                group["params"] = both[False]
                if both[True]:
                    optimizer.add_param_group(options | {"params": both[True], "lr": SLOWER * group["lr"]})
            optimizer.add_param_group({"params": list(self.teacher_map.parameters()), "weight_decay": 0.0})
        return optimizer

    def training_step(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Tensor:
        self._unmasked = unmasked(inputs).to(self.args.device)
        loss = super().training_step(model, inputs, *args, **kwargs)
        for parameter in self.teacher_map.parameters():
            # Each process has a map of its own, which no wrapper of the model knows.
            parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not model.training:
            return found
        loss, outputs = found if return_outputs else (found, None)
        attended = inputs["attention_mask"].bool()
        # Trainer puts nothing but the student in half precision.
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16):
            teachers = self.teacher.states(self._unmasked, inputs["attention_mask"])
        states = self._states[:, : attended.shape[1]]
        loss = self.teacher_map.distance(states[attended], teachers[attended]) + MASKED_WEIGHT * loss
        return (loss, outputs) if return_outputs else loss

    def _hold_states(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._states = args[0]  # (B, P, D)

    @torch.no_grad()
    def _begin_map(self) -> None:
        """Take the teacher's mean and deviation from some training examples, in every process from the same; and fit
        the map on them if the model has, from the start or from an earlier training, the teacher's layers."""
        wanted, known = [], []
        knows = why_not_from_bert(self.model.config, self.teacher.model) is None
        count, examples = len(self.train_dataset), self.train_dataset
        places = range(0, count, max(1, count // STANDARDISED_ON))[:STANDARDISED_ON]
        with undisturbed(self.model):
            for start in range(0, len(places), STANDARDISED_AT_ONCE):
                some = [examples[place] for place in places[start : start + STANDARDISED_AT_ONCE]]
                batch = self._prepare_inputs(self.data_collator(some))
                ids, mask = unmasked(batch), batch["attention_mask"]
                wanted.append(self.teacher.states(ids, mask)[mask.bool()])
                if knows:
                    self.model(ids, attention_mask=mask)
                    known.append(self._states[:, : mask.shape[1]][mask.bool()])
        self.teacher_map.standardise_by(torch.cat(wanted))
        if knows:
            self.teacher_map.fit(torch.cat(known), torch.cat(wanted))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            save_model(self.teacher_map, str(Path(output_dir) / MAP_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_model(self.teacher_map, Path(checkpoint) / MAP_FILE)


def unmasked(batch: Batch) -> Tensor:
    """The tokens (B, S) that stood there before some were masked: what labels ask for, and the others as they are."""
    ids = batch["input_ids"]
    labels = batch[LABELS][:, : ids.shape[1]]
    return torch.where(labels == NOT_ASKED, ids, labels)


def slower_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What takes a tenth of the learning rate: embeddings of tokens and positions, latents, the decoder's queries, and
    the query and key products of both cross-attentions, through which a position finds its latent."""
    perceiver = model.perceiver
    crossings = (perceiver.encoder.cross_attention, perceiver.decoder.decoding_cross_attention)
    products = [getattr(each.attention.self, name) for each in crossings for name in ("query", "key")]
    parts = [perceiver.input_preprocessor, perceiver.embeddings, perceiver.decoder.output_position_encodings, *products]
    return [parameter for part in parts for parameter in part.parameters()]
