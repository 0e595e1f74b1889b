# SPDX-License-Identifier: Apache-2.0
"""`TrainingArguments` whose values are checked before anything is loaded."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import ClassVar

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from experiments.errors import BadInput, naming
from experiments.files import check_writable
from experiments.training.sharding import check_sharding

logger = logging.getLogger(__name__)

# Instruction sets with bfloat16 multiplication on x86 and Arm, by their names in `torch.cpu.get_capabilities`.
BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
# Upper limits of numbers and of numbers of steps; larger values are typing errors.
LARGEST_NUMBER, LARGEST_STEPS = 1e30, 10**12
# Arguments that are whole numbers of 1 or more.
COUNT_ARGUMENTS = (
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "eval_accumulation_steps", "torch_empty_cache_steps", "save_total_limit", "dataloader_prefetch_factor",
)  # fmt: skip
# Smallest and largest value by argument.
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(COUNT_ARGUMENTS, (1, 10**6)),
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm"), (0, LARGEST_NUMBER)),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), (1e-9, LARGEST_STEPS)),
    **dict.fromkeys(("warmup_steps", "eval_delay"), (0, LARGEST_STEPS)),
    **dict.fromkeys(("seed", "data_seed"), (0, 2**32 - 1)),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0, 1 - 1e-12)),
    "num_train_epochs": (0, 10**6),
    "max_steps": (-1, LARGEST_STEPS),
    "label_smoothing_factor": (0, 1),
    "dataloader_num_workers": (0, 512),
}
# Arguments that do not work with a Perceiver or with these scripts, and why.
UNSUPPORTED = {
    "batch_eval_metrics": "metrics need all predictions at once; use --eval_accumulation_steps to save memory",
    "eval_do_concat_batches": "metrics need all predictions at once",
    "prediction_loss_only": "metrics need the predictions",
    "include_for_metrics": "metrics take predictions and labels only",
    "label_names": "the column of labels is always called labels",
    "dataloader_drop_last": "it would also drop evaluated examples",
    "neftune_noise_alpha": "a Perceiver has no embedding module to add noise to",
    "enable_jit_checkpoint": "every training saves a checkpoint when a signal such as SIGTERM stops it",
    "use_liger_kernel": "Liger has no kernels for a Perceiver",
}
# Arguments that need another argument: without it, they have no effect or fail late.
NEEDED_ARGUMENTS = {
    "dataloader_persistent_workers": "dataloader_num_workers",
    "dataloader_multiprocessing_context": "dataloader_num_workers",
    "fsdp_config": "fsdp",
}
# Arguments that are a mapping, given as JSON or as the name of a JSON file.
MAPPINGS_IN_FILES = ("accelerator_config", "fsdp_config", "deepspeed")


class TrainerArguments(TrainingArguments):
    """`TrainingArguments`.

    Modifications:
    - `--help` lists the most common arguments, `--help_all` all of them
    - common mistakes raise `BadInput` before anything is loaded
    - warns if the processor would emulate bfloat16
    """

    _argument_group_name = "other TrainingArguments of transformers"
    in_help: ClassVar[dict[str, tuple[str, ...]]] = {
        "what to run": ("do_train", "do_eval", "do_predict", "output_dir", "resume_from_checkpoint"),
        "training and evaluation": (
            "num_train_epochs", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps",
            "weight_decay", "warmup_steps", "lr_scheduler_type", "seed", "bf16", "use_cpu",
            "per_device_eval_batch_size", "eval_strategy", "save_strategy", "save_total_limit",
            "load_best_model_at_end", "metric_for_best_model", "logging_steps", "report_to",
        ),
        "pushing to the Hub": ("push_to_hub", "hub_model_id", "hub_private_repo", "hub_token"),
    }  # fmt: skip
    # Texts for `--help` that replace those of transformers.
    help_texts: ClassVar[dict[str, str]] = {
        "do_train": "Train.",
        "do_eval": "Evaluate. With a budget and without --do_train: evaluate unmerged and merged, and save the merged "
        "model.",
        "do_predict": "Write a prediction for each test input.",
        "output_dir": "Folder for the checkpoint, its card and all results.",
        "resume_from_checkpoint": "After an interruption: 'last' resumes at the newest checkpoint, 'false' begins "
        "anew; or the folder of a checkpoint.",
        "push_to_hub": "Push the contents of --output_dir to the Hub at the end, in one commit.",
        "hub_model_id": "Repository, OWNER/NAME (default: the name of --output_dir).",
        "hub_private_repo": "Whether to create the repository, if it is new, as private: true or false.",
    }

    def __post_init__(self) -> None:
        self._check_values()
        self._check_mappings()
        self._check_best_checkpoint()
        with naming("arguments", Exception):
            super().__post_init__()
        check_sharding(self)
        self._check_optimization()
        self._check_folders()
        if (self.bf16 or self.bf16_full_eval) and self.device.type == "cpu":
            capabilities = torch.cpu.get_capabilities()
            if not any(capabilities.get(name) for name in BFLOAT16_INSTRUCTIONS):
                logger.warning("--bf16: this processor has no instructions for bfloat16; float32 is many times faster")

    def _check_values(self) -> None:
        """Check each argument by itself, before transformers changes any."""
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise BadInput(f"--{name} {value}: must be a number from {least} to {most}")
        if self.max_steps == 0:
            raise BadInput("--max_steps 0: must be 1 or more, or -1 for all --num_train_epochs")
        for name, reason in UNSUPPORTED.items():
            field = type(self).__dataclass_fields__[name]
            default = field.default_factory() if callable(field.default_factory) else field.default
            if getattr(self, name) != default:
                raise BadInput(f"--{name} {getattr(self, name)}: must be left out; {reason}")
        for name, needed in NEEDED_ARGUMENTS.items():
            # Versions of transformers before 5.23 lack some of these arguments.
            if getattr(self, name, None) and not getattr(self, needed):
                raise BadInput(f"--{name} {getattr(self, name)}: needs --{needed}")
        for name in ("fsdp", "ddp_backend"):
            if getattr(self, name) and "RANK" not in os.environ:
                raise BadInput(
                    f"--{name} {getattr(self, name)}: needs several processes; use torchrun or accelerate launch"
                )
        trackers = vars(self)["report_to"] or "none"
        self.report_to = trackers.split(",") if isinstance(trackers, str) else trackers
        known = ["none", "all", *get_available_reporting_integrations()]
        for tracker in self.report_to:
            if tracker not in known:
                raise BadInput(
                    f"--report_to {tracker}: choose from {', '.join(known)}, or install the tracker's package"
                )

    def _check_mappings(self) -> None:
        for name in self._VALID_DICT_FIELDS:
            value = getattr(self, name)
            if not isinstance(value, str):
                continue
            with naming(f"--{name} {value}", OSError, ValueError):
                is_file = name in MAPPINGS_IN_FILES and not value.startswith("{")
                mapping = json.loads(Path(value).read_text(encoding="utf-8") if is_file else value)
            if not isinstance(mapping, dict):
                raise BadInput(f"--{name} {value}: must be a mapping in JSON")

    def _check_optimization(self) -> None:
        """Create the optimizer, scheduler and compiled code on trial, because each accepts different arguments."""
        with naming(f"--optim {self.optim.value} --optim_args {self.optim_args}", Exception):
            Trainer.get_optimizer_cls_and_kwargs(self)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        options = dict(self.lr_scheduler_kwargs or {})
        with naming(f"--lr_scheduler_type {self.lr_scheduler_type.value} --lr_scheduler_kwargs {options}", Exception):
            get_scheduler(self.lr_scheduler_type, optimizer, self.get_warmup_steps(2), 2, options)
        if self.torch_compile:
            backend, mode = self.torch_compile_backend, self.torch_compile_mode
            with naming(f"--torch_compile_backend {backend} --torch_compile_mode {mode}", Exception):
                torch.compile(torch.nn.Identity(), backend=backend, mode=mode)

    def _check_best_checkpoint(self) -> None:
        saves_best = self.save_strategy == SaveStrategy.BEST
        if (self.load_best_model_at_end or saves_best) and self.eval_strategy == IntervalStrategy.NO:
            given = "--save_strategy best" if saves_best else "--load_best_model_at_end"
            raise BadInput(f"{given}: needs --eval_strategy steps or epoch")
        if self.load_best_model_at_end and not saves_best and self.save_strategy != self.eval_strategy:
            raise BadInput(
                "--load_best_model_at_end: needs the same --save_strategy and --eval_strategy, not "
                f"{self.save_strategy} and {self.eval_strategy}"
            )
        if saves_best and self.metric_for_best_model is None:
            raise BadInput("--save_strategy best: needs --metric_for_best_model")

    def _check_folders(self) -> None:
        """Check every folder that training writes to."""
        check_writable(f"--output_dir {self.output_dir}", Path(self.output_dir))
        with naming("TMPDIR", OSError):
            folder = tempfile.gettempdir()
        check_writable(f"TMPDIR={folder}", Path(folder))
        written = ["TENSORBOARD_LOGGING_DIR"] if "tensorboard" in self.report_to else []
        written += ["TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"] if self.torch_compile else []
        for name in written:
            if given := os.environ.get(name):
                check_writable(f"{name}={given}", Path(given).expanduser())
