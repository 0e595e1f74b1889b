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

logger = logging.getLogger(__name__)

# Instructions that multiply bfloat16 on x86 and on Arm, as `torch.cpu.get_capabilities` names them.
BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
# Range of numbers by argument. Most upper ends only refuse slips of the finger.
MOST, MOST_STEPS = 1e30, 10**12
COUNTS = (
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "eval_accumulation_steps", "torch_empty_cache_steps", "save_total_limit", "dataloader_prefetch_factor",
)  # fmt: skip
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(COUNTS, (1, 10**6)),
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm"), (0, MOST)),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), (1e-9, MOST_STEPS)),
    **dict.fromkeys(("warmup_steps", "eval_delay"), (0, MOST_STEPS)),
    **dict.fromkeys(("seed", "data_seed"), (0, 2**32 - 1)),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0, 1 - 1e-12)),
    "num_train_epochs": (0, 10**6),
    "max_steps": (-1, MOST_STEPS),
    "label_smoothing_factor": (0, 1),
    "dataloader_num_workers": (0, 512),
}
# Arguments that do not fit a Perceiver, or how predictions are scored and checkpoints are kept here.
UNSUPPORTED = {
    "batch_eval_metrics": "metrics need all predictions at once; --eval_accumulation_steps saves memory",
    "eval_do_concat_batches": "metrics need all predictions at once",
    "prediction_loss_only": "metrics need the predictions",
    "include_for_metrics": "metrics take predictions and labels only",
    "label_names": "the labels are always called labels here",
    "dataloader_drop_last": "it would leave out evaluated examples, too",
    "neftune_noise_alpha": "a Perceiver has no embedding module for its noise",
    "use_liger_kernel": "it has no kernels for a Perceiver",
}
# Arguments that have no effect, or fail late, without another one.
NEEDED = {
    "dataloader_persistent_workers": "dataloader_num_workers",
    "dataloader_multiprocessing_context": "dataloader_num_workers",
    "fsdp_config": "fsdp",
}
# Arguments that take a mapping as JSON, or the name of a JSON file.
MAPPINGS_IN_FILES = ("accelerator_config", "fsdp_config", "deepspeed")


class TrainerArguments(TrainingArguments):
    """`TrainingArguments`.

    Modifications:
    - `--help` lists those that are needed most, `--help_all` the rest
    - the mistakes that users make most are a `BadInput` before anything is loaded
    - a warning if bfloat16 would be emulated
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
    # Texts of `--help` in place of those of transformers.
    help_texts: ClassVar[dict[str, str]] = {
        "do_train": "Train.",
        "do_eval": "Evaluate. With a budget and without --do_train: unmerged and merged, and save it merged.",
        "do_predict": "Write a prediction for each test input.",
        "output_dir": "Folder for the checkpoint, its card and all results.",
        "resume_from_checkpoint": "After a stop: 'last' resumes at the newest checkpoint, 'false' begins anew; or the "
        "folder of a checkpoint.",
        "push_to_hub": "Push what is in --output_dir, in one commit, when all is done.",
        "hub_model_id": "Repository, OWNER/NAME; named like --output_dir if it is not given.",
        "hub_private_repo": "Whether a repository that has to be created is private: true or false.",
    }

    def __post_init__(self) -> None:
        self._check_values()
        self._check_mappings()
        with naming("arguments", Exception):
            super().__post_init__()
        self._check_optimization()
        self._check_best_checkpoint()
        self._check_places()
        if (self.bf16 or self.bf16_full_eval) and self.device.type == "cpu":
            capabilities = torch.cpu.get_capabilities()
            if not any(capabilities.get(name) for name in BFLOAT16_INSTRUCTIONS):
                logger.warning("--bf16: this processor has no instructions for it; float32 is many times faster here")

    def _check_values(self) -> None:
        """Check each argument as it was given."""
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
        for name, needed in NEEDED.items():
            if getattr(self, name) and not getattr(self, needed):
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
                    f"--report_to {tracker}: choose from {', '.join(known)}; or install the tracker's package"
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
        """Make optimizer, scheduler and compiled code on trial: each takes other arguments."""
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
        if saves_best and self.metric_for_best_model is None:
            raise BadInput("--save_strategy best: needs --metric_for_best_model")

    def _check_places(self) -> None:
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
