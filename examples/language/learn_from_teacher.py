# SPDX-License-Identifier: Apache-2.0
"""Train a masked language model, and distil the last hidden states of a pretrained encoder, its teacher, into it.

  python examples/language/learn_from_teacher.py examples/language/pretrain.yaml \\
      --train_file TRAIN.parquet --validation_file VALIDATION.parquet

It takes the arguments of run_mlm.py and --teacher_name_or_path. Start from a checkpoint of
examples/language/from_bert.py: from random weights a model does not learn from its teacher. The result is a stock
masked language model.

Letters: B batch, S input positions, P positions that the model decodes, D channels of the model, T channels of the
teacher.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.hf_argparser import HfArg

# Python adds this script's folder to sys.path, but not the repository root, which holds the modules.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configuration_tome_perceiver import ToMePerceiverConfig
from cost_tome_perceiver import undisturbed
from examples.language.from_bert import Teacher, load_teacher
from experiments.errors import BadInput, exit_on_bad_input
from experiments.tasks.base import LABELS, Batch, PreparedTask
from experiments.tasks.mlm import MlmDataArguments, MlmTask, load_mlm_task
from experiments.tasks.scores import IGNORE_INDEX
from experiments.training.fingerprints import digest_of, weights_fingerprint
from experiments.training.trainer import TaskTrainer

MASKED_WEIGHT = 0.3
"""Weight of the masked language modelling loss; the distance to the teacher's states has the weight 1."""
SLOW_RATE = 0.1
"""Learning rate of `slow_parameters`, as a share of --learning_rate."""
MAP_FILE = "teacher_map.safetensors"
FIT_EXAMPLES, FIT_BATCH_SIZE = 256, 32
"""Number of training examples that the teacher map is fitted to, and their batch size."""
LEAST_DEVIATION = 1e-6
RIDGE = 1e-3
"""Ridge penalty of that fit, as a share of the mean square of the states."""


@dataclass
class TaughtArguments(MlmDataArguments):
    """Data arguments of run_mlm.py, and the teacher."""

    teacher_name_or_path: str | None = HfArg(
        default=None,
        help="Folder or Hub id of the encoder, whose last hidden states the model learns beside the masked tokens; "
        "its tokenizer must have every token of the model's tokenizer.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_name_or_path is None:
            raise BadInput("--teacher_name_or_path: not given; without a teacher, use run_mlm.py")


@dataclass
class TaughtTask(MlmTask):
    """Masked language modelling with a teacher.

    Attributes:
        arguments: those of run_mlm.py, and the teacher.
        download: `cache_dir` and `token`.
    """

    arguments: TaughtArguments
    download: dict[str, Any] = field(default_factory=dict)

    def prepare(self, config: ToMePerceiverConfig, processing_class: Any, seed: int) -> PreparedTask:
        prepared = super().prepare(config, processing_class, seed)
        name, length = str(self.arguments.teacher_name_or_path), self._length(processing_class, config)
        teacher = load_teacher(name, processing_class, length, **self.download)
        return replace(
            prepared,
            trainer_class=partial(TaughtTrainer, teacher=teacher),
            trained_with=digest_of([weights_fingerprint(teacher.model), teacher.ids]),
        )


def load_taught_task(arguments: TaughtArguments, *options: Any, **named: Any) -> TaughtTask:
    """Load the data as `experiments.tasks.mlm.load_mlm_task` does, and return a `TaughtTask`."""
    task = load_mlm_task(arguments, *options, **named)
    download = {name: named[name] for name in ("cache_dir", "token") if name in named}
    return TaughtTask(**vars(task), download=download)


class TeacherMap(nn.Module):
    """Linear map from the decoder's states to the teacher's, which are standardised by channel.

    Without standardising, most of the loss would be the mean of the states, which one constant vector already fits.
    """

    def __init__(self, channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, teacher_channels)
        self.register_buffer("mean", torch.zeros(teacher_channels))
        self.register_buffer("deviation", torch.ones(teacher_channels))

    @torch.no_grad()
    def fit(self, states: Tensor, teachers: Tensor) -> None:
        """Store the mean and deviation of the teacher's states (number, T), and fit the map from states (number, D) to
        them by ridge regression."""
        self.mean.copy_(teachers.mean(dim=0))
        self.deviation.copy_(teachers.std(dim=0).clamp(min=LEAST_DEVIATION))
        known, wanted = states.double(), (teachers.double() - self.mean) / self.deviation
        mean = known.mean(dim=0)
        known = known - mean
        squares = known.T @ known
        squares += RIDGE * squares.diagonal().mean() * torch.eye(len(squares), device=squares.device)
        weight = torch.linalg.solve(squares, known.T @ wanted).T
        self.linear.weight.copy_(weight)
        self.linear.bias.copy_(wanted.mean(dim=0) - weight @ mean)

    def distance(self, states: Tensor, teachers: Tensor) -> Tensor:
        """Return the mean squared error, a scalar, between mapped states (number, D) and the teacher's (number, T)."""
        return F.mse_loss(self.linear(states.float()), (teachers.float() - self.mean) / self.deviation)


class FreshGradients(TrainerCallback):
    """Callback that clears the gradients of a module before each step; Trainer clears only those of the model."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.module.zero_grad()


class TaughtTrainer(TaskTrainer):
    """A `TaskTrainer` for a masked language model with a teacher.

    The training loss is the distance between the decoder's states, after a linear map, and the teacher's states, at
    every token, plus `MASKED_WEIGHT` times the masked language modelling loss. The map is trained too. A checkpoint
    stores it in a file beside the optimizer's state, so the model in it is a stock one. `slow_parameters` train at a
    tenth of the learning rate.

    Args:
        teacher: the encoder whose states the model learns.

    Raises:
        BadInput: under FSDP or DeepSpeed, which would not train the map.
    """

    def __init__(self, *args: Any, teacher: Teacher, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise BadInput("--teacher_name_or_path: does not work with FSDP or DeepSpeed; train without them")
        self.teacher = teacher.to(self.args.device)
        self.teacher_map = TeacherMap(self.model.config.d_latents, teacher.model.config.hidden_size)
        self.teacher_map.to(self.args.device)
        self.add_callback(FreshGradients(self.teacher_map))
        self._unmasked = self._states = torch.empty(0)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        handle = self.model.embedding_decoder.register_forward_pre_hook(self._hold_states)
        attention = self.model.config._attn_implementation
        if self.args.bf16 and self.args.device.type == "cpu":
            # On a CPU in bfloat16, the backward pass of fused attention is slower than that of eager attention.
            self.model.set_attn_implementation("eager")
        try:
            if resume_from_checkpoint is None:
                self._fit_map()
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            handle.remove()
            self.model.set_attn_implementation(attention)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        was_created = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        if was_created:
            return optimizer
        slow_ids = {id(parameter) for parameter in slow_parameters(self.model)}
        for group in list(optimizer.param_groups):
            own = [parameter for parameter in group["params"] if id(parameter) in slow_ids]
            if own:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in slow_ids]
                optimizer.add_param_group({**group, "params": own, "lr": SLOW_RATE * group["lr"]})
        optimizer.add_param_group({"params": list(self.teacher_map.parameters()), "weight_decay": 0.0})
        return optimizer

    def training_step(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Tensor:
        self._unmasked = unmasked(inputs).to(self.args.device)
        loss = super().training_step(model, inputs, *args, **kwargs)
        for parameter in self.teacher_map.parameters():
            # DDP averages only the gradients of the model, so average those of the map here.
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
        # Trainer runs only the student under autocast.
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16):
            teachers = self.teacher.states(self._unmasked, inputs["attention_mask"])
        states = self._states[:, : attended.shape[1]]
        loss = self.teacher_map.distance(states[attended], teachers[attended]) + MASKED_WEIGHT * loss
        return (loss, outputs) if return_outputs else loss

    def _hold_states(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._states = args[0]  # (B, P, D)

    @torch.no_grad()
    def _fit_map(self) -> None:
        """Fit the map to a few training examples, the same ones in every process."""
        wanted, known = [], []
        examples = self.train_dataset
        places = range(0, len(examples), max(1, len(examples) // FIT_EXAMPLES))[:FIT_EXAMPLES]
        with undisturbed(self.model):
            for start in range(0, len(places), FIT_BATCH_SIZE):
                batch_examples = [examples[place] for place in places[start : start + FIT_BATCH_SIZE]]
                batch = self._prepare_inputs(self.data_collator(batch_examples))
                ids, mask = unmasked(batch), batch["attention_mask"]
                self.model(ids, attention_mask=mask)
                wanted.append(self.teacher.states(ids, mask)[mask.bool()])
                known.append(self._states[:, : mask.shape[1]][mask.bool()])
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
    """Return the tokens (B, S) of a batch before masking."""
    ids = batch["input_ids"]
    labels = batch[LABELS][:, : ids.shape[1]]
    return torch.where(labels == IGNORE_INDEX, ids, labels)


def slow_parameters(model: nn.Module) -> list[nn.Parameter]:
    """List the parameters that train slowly: those that tell positions apart.

    They are the embeddings of tokens and positions, the latents, the decoder's queries, and the query and key
    projections of both cross-attention layers.
    """
    perceiver = model.perceiver
    crossings = (perceiver.encoder.cross_attention, perceiver.decoder.decoding_cross_attention)
    products = [getattr(each.attention.self, name) for each in crossings for name in ("query", "key")]
    parts = [perceiver.input_preprocessor, perceiver.embeddings, perceiver.decoder.output_position_encodings, *products]
    return [parameter for part in parts for parameter in part.parameters()]


def main() -> None:
    from experiments.runs.finetune import finetune

    finetune(__doc__, TaughtArguments, load_taught_task)


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
