# SPDX-License-Identifier: Apache-2.0
"""`TrainingArguments` whose values are checked before anything is loaded."""

from __future__ import annotations

import importlib.util
import inspect
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import ClassVar

import torch
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from experiments.errors import BadInput, naming
from experiments.files import check_writable

logger = logging.getLogger(__name__)

# As `torch.cpu.get_capabilities` calls what multiplies bfloat16 on x86 and on Arm; without any it is emulated.
BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")

# The smallest and the largest value of each number. Not here: `max_steps`, of which 0 would mean none and not all.
MOST, MOST_STEPS, MOST_SEED = 1e30, 10**12, 2**32 - 1
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(
        (
            "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
            "eval_accumulation_steps", "torch_empty_cache_steps", "save_total_limit", "dataloader_prefetch_factor",
            "ddp_bucket_cap_mb",
        ),
        (1, 10**6),  # PyTorch makes room for as many entries
    ),
    **dict.fromkeys(
        ("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "neftune_noise_alpha"), (0, MOST)
    ),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), (1e-9, MOST_STEPS)),
    **dict.fromkeys(("warmup_steps", "eval_delay"), (0, MOST_STEPS)),
    **dict.fromkeys(("seed", "data_seed"), (0, MOST_SEED)),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0, 1 - 1e-12)),
    "num_train_epochs": (0, 10**6),
    "max_steps": (-1, MOST_STEPS),
    "label_smoothing_factor": (0, 1),
    "dataloader_num_workers": (0, 512),
    "ddp_timeout": (1, 10**8),
    "local_rank": (-1, 10**6),
}  # fmt: skip
# What is not for a Perceiver, or not for how predictions are scored and checkpoints are kept here.
REFUSED = {
    "batch_eval_metrics": "metrics are computed of all predictions at once; --eval_accumulation_steps saves memory",
    "prediction_loss_only": "metrics need the predictions",
    "include_for_metrics": "metrics take predictions and labels alone",
    "neftune_noise_alpha": "it adds noise to an embedding module, which the inputs of a Perceiver have not",
    "use_liger_kernel": "it has no kernels for a Perceiver",
    "liger_kernel_config": "it has no kernels for a Perceiver",
    "use_cache": "a Perceiver keeps no keys and values from one step to the next",
    "parallelism_config": "a mesh of processes is for accelerate's own configuration: accelerate launch --config_file",
    "label_names": "the labels are always called labels here",
    "optim_target_modules": "optimizers of low rank are not for layers that are shared between blocks",
    "dataloader_drop_last": "it would leave out evaluated examples, too",
    "length_column_name": "inputs have no column of lengths",
}
# Of the arguments that are mappings, those that may also be the name of a JSON file.
IN_FILES = ("accelerator_config", "fsdp_config", "deepspeed")
# How the names of optimizers of low rank begin.
LOW_RANK = ("galore", "apollo")


class TrainerArguments(TrainingArguments):
    """`TrainingArguments`.

    Modifications:
    - `--help` lists those that are needed most, `--help_all` the rest
    - every mistake that the arguments alone show is a `BadInput`: values out of range, what is not for a Perceiver,
      what is not installed, a folder that cannot be written to
    - a warning if bfloat16 would be emulated
    """

    _argument_group_name = "all others that transformers' Trainer takes"
    in_help: ClassVar[dict[str, dict[str, str]]] = {
        "what to run": {
            "do_train": "Train.",
            "do_eval": "Evaluate. With a budget and without --do_train: unmerged and merged, and save it merged.",
            "do_predict": "Write a prediction for each test input.",
            "output_dir": "Folder for the checkpoint, its card and all figures.",
            "resume_from_checkpoint": "After a stop: 'last' goes on where training was, 'false' begins anew; or the "
            "folder of a checkpoint.",
        },
        "training and evaluation": {
            "num_train_epochs": "Epochs of training.",
            "learning_rate": "Highest learning rate.",
            "per_device_train_batch_size": "Inputs of a training step, on each device.",
            "gradient_accumulation_steps": "Batches that make up one training step.",
            "weight_decay": "Weight decay, of weights but not of biases and norms.",
            "warmup_steps": "Steps in which the learning rate rises from 0; below 1: a share of all steps.",
            "lr_scheduler_type": "How the learning rate falls: linear, cosine, constant, ...",
            "seed": "Decides whatever is drawn.",
            "bf16": "Train in bfloat16 mixed precision.",
            "use_cpu": "Leave a GPU alone.",
            "per_device_eval_batch_size": "Inputs evaluated at once, on each device.",
            "eval_strategy": "When to evaluate while training.",
            "save_strategy": "When to save checkpoints while training.",
            "save_total_limit": "How many of these to keep; all if it is not given.",
            "load_best_model_at_end": "End with the best evaluated checkpoint, not with the last one.",
            "metric_for_best_model": "What is best: loss if it is not given, or a metric such as accuracy.",
            "logging_steps": "Report the loss every so many steps; below 1: a share of all steps.",
            "report_to": "Trackers to report to, such as wandb or tensorboard.",
        },
        "pushing to the Hub": {
            "push_to_hub": "Push what is in --output_dir, in one commit, when all is done.",
            "hub_model_id": "Repository, OWNER/NAME; named like --output_dir if it is not given.",
            "hub_private_repo": "Whether a repository that has to be created is private: true or false.",
            "hub_token": "Token to push with; that of `hf auth login` if it is not given.",
        },
    }

    def __post_init__(self) -> None:
        self._check_given()
        with naming("arguments", Exception):
            super().__post_init__()
        self._check_meant()
        self._check_places()
        if (self.bf16 or self.bf16_full_eval) and self.device.type == "cpu":
            capabilities = torch.cpu.get_capabilities()
            if not any(capabilities.get(name) for name in BFLOAT16_INSTRUCTIONS):
                logger.warning("--bf16: this processor has no instructions for it; float32 is many times faster here")

    def _check_places(self) -> None:
        """Check every place that training writes to."""
        check_writable(f"--output_dir {self.output_dir}", Path(self.output_dir))
        with naming("TMPDIR", OSError):
            folder = tempfile.gettempdir()
        check_writable(f"TMPDIR={folder}", Path(folder))
        written = ["TENSORBOARD_LOGGING_DIR"] if "tensorboard" in self.report_to else []
        written += ["TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"] if self.torch_compile else []
        for name in written:
            if given := os.environ.get(name):
                check_writable(f"{name}={given}", Path(given).expanduser())

    def _check_given(self) -> None:
        """Check each argument by itself, as it was given."""
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise BadInput(f"--{name} {value}: allowed is a number from {least} to {most}")
        if self.max_steps == 0:
            raise BadInput("--max_steps 0: allowed is 1 or more, or -1 for as many as --num_train_epochs says")
        for name, why in REFUSED.items():
            field = type(self).__dataclass_fields__[name]
            default = field.default_factory() if callable(field.default_factory) else field.default
            if getattr(self, name) != default:
                raise BadInput(f"--{name} {getattr(self, name)}: allowed is to leave it out; {why}")
        if not self.eval_do_concat_batches:
            raise BadInput("--eval_do_concat_batches false: allowed is true; metrics are computed of all predictions")
        self._check_mappings()
        trackers = self.__dict__["report_to"] or "none"
        trackers = trackers.split(",") if isinstance(trackers, str) else trackers
        self.__dict__["report_to"] = trackers
        available = get_available_reporting_integrations()
        for tracker in trackers:
            if tracker not in ("all", "none", *available):
                raise BadInput(
                    f"--report_to {tracker}: allowed are {', '.join(['none', 'all', *available])}; another tracker's "
                    "package is to be installed first"
                )
        if self.deepspeed and importlib.util.find_spec("deepspeed") is None:
            raise BadInput(f"--deepspeed {self.deepspeed}: its package is not installed: pip install deepspeed")
        for name in ("fsdp", "ddp_backend"):
            if getattr(self, name) and "RANK" not in os.environ:
                raise BadInput(
                    f"--{name} {getattr(self, name)}: allowed with several processes only, which torchrun or "
                    "accelerate launch start"
                )
        for name, needed in (
            ("dataloader_persistent_workers", "dataloader_num_workers"),
            ("dataloader_multiprocessing_context", "dataloader_num_workers"),
            ("fsdp_config", "fsdp"),
        ):
            if getattr(self, name) and not getattr(self, needed):
                raise BadInput(f"--{name} {getattr(self, name)}: allowed with --{needed} only")

    def _check_mappings(self) -> None:
        """Check that what stands for a mapping is one: JSON, or the file that holds it where a file is allowed."""
        for name in self._VALID_DICT_FIELDS:
            value = getattr(self, name)
            if not isinstance(value, str):
                continue
            with naming(f"--{name} {value}", OSError, ValueError):
                is_file = name in IN_FILES and not value.startswith("{")
                mapping = json.loads(Path(value).read_text(encoding="utf-8") if is_file else value)
            if not isinstance(mapping, dict):
                raise BadInput(f"--{name} {value}: allowed is a mapping in JSON")

    def _check_meant(self) -> None:
        """Check what several arguments say together."""
        if self.optim.value.startswith(LOW_RANK):
            raise BadInput(f"--optim {self.optim.value}: {REFUSED['optim_target_modules']}; allowed are others")
        given = f"--optim {self.optim.value}" + (f" --optim_args {self.optim_args}" if self.optim_args else "")
        with naming(given, Exception):
            Trainer.get_optimizer_cls_and_kwargs(self)
        self._rehearse_scheduler()
        if self.torch_compile:
            given = (
                f"--torch_compile_backend {self.torch_compile_backend} --torch_compile_mode {self.torch_compile_mode}"
            )
            with naming(given, Exception):
                torch.compile(torch.nn.Identity(), backend=self.torch_compile_backend, mode=self.torch_compile_mode)
        allowed = {"every_n_layers", "preserve_rng_state", *inspect.signature(checkpoint).parameters} - {
            "function",
            "args",
            "kwargs",
        }
        if unknown := set(self.activation_checkpointing_kwargs or {}) - allowed:
            raise BadInput(
                f"--activation_checkpointing_kwargs {min(unknown)}: allowed are {', '.join(sorted(allowed))}"
            )
        for given, needs in (
            ("--load_best_model_at_end", self.load_best_model_at_end),
            ("--save_strategy best", self.save_strategy == SaveStrategy.BEST),
        ):
            if needs and self.eval_strategy == IntervalStrategy.NO:
                raise BadInput(f"{given}: allowed with an --eval_strategy only, steps or epoch")
        if self.save_strategy == SaveStrategy.BEST and self.metric_for_best_model is None:
            raise BadInput("--save_strategy best: allowed with --metric_for_best_model only")

    def _rehearse_scheduler(self) -> None:
        """Make the scheduler for a parameter of no model: of its arguments, each kind takes others."""
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        given = f"--lr_scheduler_type {self.lr_scheduler_type.value}"
        if self.lr_scheduler_kwargs:
            given += f" --lr_scheduler_kwargs {json.dumps(self.lr_scheduler_kwargs)}"
        with naming(given, Exception):
            get_scheduler(
                self.lr_scheduler_type,
                optimizer,
                num_warmup_steps=self.get_warmup_steps(2),
                num_training_steps=2,
                scheduler_specific_kwargs=dict(self.lr_scheduler_kwargs or {}),
            )
