# SPDX-License-Identifier: Apache-2.0
"""Train a masked language model that also learns the last hidden states of a pretrained encoder, its teacher.

  python examples/language/learn_from_teacher.py examples/language/pretrain.yaml \\
      --train_file TRAIN.parquet --validation_file VALIDATION.parquet

It takes the arguments of run_mlm.py and --teacher_name_or_path. A model without a good start does not learn from a
teacher; start with examples/language/from_bert.py. The result is a stock masked language model.

Letters: B batch, S input positions, P positions that the model decodes, D its channels, T those of the teacher.
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

# A script's own folder is on the path, the repository's root, where the modules are, is not.
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
"""Weight of the loss of the masked tokens, beside the distance to the teacher's states."""
SLOWER = 0.1
"""Share of the learning rate for embeddings and for the weights by which a position finds its latent."""
MAP_FILE = "teacher_map.safetensors"
FITTED_ON, FITTED_AT_ONCE = 256, 32
"""Training examples that the map of states is fitted on."""
LEAST_DEVIATION = 1e-6
RIDGE = 1e-3
"""Added to the squares in that fit, as a share of their mean."""


@dataclass
class TaughtArguments(MlmDataArguments):
    """The data of run_mlm.py, and the teacher."""

    teacher_name_or_path: str | None = HfArg(
        default=None,
        help="An encoder, folder or Hub id, whose last hidden states are learnt beside the masked tokens, with its "
        "tokenizer, which must have every token of the model's.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_name_or_path is None:
            raise BadInput("--teacher_name_or_path: not given; without a teacher, use run_mlm.py")


@dataclass
class TaughtTask(MlmTask):
    """The task of run_mlm.py with a teacher.

    Attributes:
        arguments: as for run_mlm.py, and the teacher.
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
    """Load the sentences as `experiments.tasks.mlm.load_mlm_task`, for a `TaughtTask`."""
    task = load_mlm_task(arguments, *options, **named)
    download = {name: named[name] for name in ("cache_dir", "token") if name in named}
    return TaughtTask(**vars(task), download=download)


class TeacherMap(nn.Module):
    """Linear map from the decoder's states to the teacher's, standardised by channel.

    Without standardising, the mean of the states is most of what there is to learn, and one constant vector does that.
    """

    def __init__(self, channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, teacher_channels)
        self.register_buffer("mean", torch.zeros(teacher_channels))
        self.register_buffer("deviation", torch.ones(teacher_channels))

    @torch.no_grad()
    def fit(self, states: Tensor, teachers: Tensor) -> None:
        """Take the teacher's mean and deviation, and fit the map from states (number, D) to the teacher's (number, T)
        by least squares."""
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
        """Return the mean squared error, a scalar, of states (number, D) for those of the teacher (number, T)."""
        return F.mse_loss(self.linear(states.float()), (teachers.float() - self.mean) / self.deviation)


class FreshGradients(TrainerCallback):
    """Clears the gradients of a module before each step; Trainer clears the model's alone."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.module.zero_grad()


class TaughtTrainer(TaskTrainer):
    """A `TaskTrainer` for a masked language model with a teacher.

    Modifications: the training loss is the distance of the decoder's states to the teacher's at every token, after a
    linear map, and `MASKED_WEIGHT` times the loss of the masked tokens. The map is trained along. A checkpoint holds it
    in a file of its own, as it holds the optimizer's state, so its model is a stock one. `slower_parameters` take a
    tenth of the learning rate.

    Args:
        teacher: what to learn.

    Raises:
        BadInput: under FSDP or DeepSpeed, which shard the model's parameters alone.
    """

    def __init__(self, *args: Any, teacher: Teacher, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise BadInput("--teacher_name_or_path: FSDP and DeepSpeed do not train a teacher's map; train without")
        self.teacher = teacher.to(self.args.device)
        self.teacher_map = TeacherMap(self.model.config.d_latents, teacher.model.config.hidden_size)
        self.teacher_map.to(self.args.device)
        self.add_callback(FreshGradients(self.teacher_map))
        self._unmasked = self._states = torch.empty(0)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        handle = self.model.embedding_decoder.register_forward_pre_hook(self._hold_states)
        attention = self.model.config._attn_implementation
        if self.args.bf16 and self.args.device.type == "cpu":
            # The backward pass of the fused kernel is slower there than separate products.
            self.model.set_attn_implementation("eager")
        try:
            if resume_from_checkpoint is None:
                self._fit_map()
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            handle.remove()
            self.model.set_attn_implementation(attention)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        made = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        if made:
            return optimizer
        slower = {id(parameter) for parameter in slower_parameters(self.model)}
        for group in list(optimizer.param_groups):
            own = [parameter for parameter in group["params"] if id(parameter) in slower]
            if own:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in slower]
                optimizer.add_param_group({**group, "params": own, "lr": SLOWER * group["lr"]})
        optimizer.add_param_group({"params": list(self.teacher_map.parameters()), "weight_decay": 0.0})
        return optimizer

    def training_step(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Tensor:
        self._unmasked = unmasked(inputs).to(self.args.device)
        loss = super().training_step(model, inputs, *args, **kwargs)
        for parameter in self.teacher_map.parameters():
            # No wrapper of the model averages the map's gradients over processes.
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
        # Trainer puts the student alone in half precision.
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16):
            teachers = self.teacher.states(self._unmasked, inputs["attention_mask"])
        states = self._states[:, : attended.shape[1]]
        loss = self.teacher_map.distance(states[attended], teachers[attended]) + MASKED_WEIGHT * loss
        return (loss, outputs) if return_outputs else loss

    def _hold_states(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._states = args[0]  # (B, P, D)

    @torch.no_grad()
    def _fit_map(self) -> None:
        """Fit the map on some training examples, the same in every process."""
        wanted, known = [], []
        examples = self.train_dataset
        places = range(0, len(examples), max(1, len(examples) // FITTED_ON))[:FITTED_ON]
        with undisturbed(self.model):
            for start in range(0, len(places), FITTED_AT_ONCE):
                some = [examples[place] for place in places[start : start + FITTED_AT_ONCE]]
                batch = self._prepare_inputs(self.data_collator(some))
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
    """Return the tokens (B, S) of a batch as they were before masking."""
    ids = batch["input_ids"]
    labels = batch[LABELS][:, : ids.shape[1]]
    return torch.where(labels == IGNORE_INDEX, ids, labels)


def slower_parameters(model: nn.Module) -> list[nn.Parameter]:
    """List the embeddings of tokens and positions, latents, the decoder's queries, and the query and key products of
    both cross-attentions."""
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
