# SPDX-License-Identifier: Apache-2.0
"""Train with sharded weights (FSDP). Weights are sharded during training only; before and after it they are whole.

accelerate shards a model in place and cannot undo it, and parts of a sharded model cannot run alone. So a copy is
trained; evaluation, budgets, saving and the next stage use the model itself, as without FSDP.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, StateDictType
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from experiments.errors import BadInput, naming
from experiments.training.trainer import TaskTrainer

# Kinds of several processes that accelerate never shards; it would train them unsharded, without a message.
UNSHARDED = (DistributedType.NO, DistributedType.MULTI_CPU)


def check_sharding(arguments: TrainingArguments) -> None:
    """Check that the settings of FSDP work with this project, if FSDP is asked for.

    Raises:
        BadInput: for a setting that would be ignored, or fail after long work.
    """
    if not (arguments.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"):
        return
    asked = f"--fsdp {arguments.fsdp}" if arguments.fsdp else "ACCELERATE_USE_FSDP=true"
    if arguments.distributed_state is None or arguments.distributed_state.distributed_type in UNSHARDED:
        raise BadInput(f"{asked}: FSDP needs several GPUs, one for each process; leave it out to train on CPUs")
    with naming(f"{asked} --fsdp_config {arguments.fsdp_config}", Exception):
        plugin = FullyShardedDataParallelPlugin(**(arguments.fsdp_plugin_args or {}))
    for name, value, needed in (
        ("version", plugin.fsdp_version, 2),
        ("state_dict_type", plugin.state_dict_type.name, StateDictType.FULL_STATE_DICT.name),
        ("cpu_ram_efficient_loading", str(plugin.cpu_ram_efficient_loading).lower(), "false"),
    ):
        if value != needed:
            raise BadInput(
                f"fsdp_{name} {value}: must be {needed} in --fsdp_config or accelerate's config, as in "
                "examples/accelerate_fsdp.yaml"
            )
    if arguments.resume_from_checkpoint and arguments.optim == "sgd" and "momentum" not in (arguments.optim_args or ""):
        raise BadInput(
            "--optim sgd: PyTorch cannot resume an optimizer without state under FSDP; use --resume_from_checkpoint "
            "false, or another optimizer from the start"
        )


@contextmanager
def sharding_only_inside(trainer: TaskTrainer) -> Iterator[None]:
    """Make a Trainer under FSDP train a copy of its model inside the block; after it, the model has the new weights.

    Without FSDP, the Trainer trains its model as usual.
    """
    if not trainer.is_fsdp_enabled:
        yield
        return
    model = trainer.model
    # Off the GPU, so that only the shards take its memory.
    trained = copy.deepcopy(model.to("cpu"))
    if trainer.compile_options is not None:
        trained.compile_repeated_blocks(**trainer.compile_options)  # a copy is no longer compiled
    # accelerate shards the input embeddings as a module of their own; a Perceiver has no such module.
    trained.get_input_embeddings = lambda: None
    trainer.model = trainer.model_wrapped = trained
    yield
    # Every process takes part, and has all weights afterwards.
    weights = get_model_state_dict(trainer.model, options=StateDictOptions(full_state_dict=True))
    model.load_state_dict(weights)
    trainer.model = trainer.model_wrapped = trainer.callback_handler.model = model.to(trainer.args.device)
    # The accelerator forgets the sharded copy, so that an evaluation prepares the model.
    trainer.accelerator.free_memory()


class RestoreClassName(TrainerCallback):
    """Callback that restores the name of the model's class for checkpoints, after FSDP has changed it."""

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if isinstance(model, FSDPModule):
            sharded = type(model)
            ours = next(base for base in sharded.__mro__[1:] if not issubclass(base, FSDPModule))
            sharded.__name__, sharded.__module__ = ours.__name__, ours.__module__
