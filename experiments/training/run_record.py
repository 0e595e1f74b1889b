# SPDX-License-Identifier: Apache-2.0
"""Run records: the arguments, weights and data that determine the results of a run.

Runs with equal records give equal results. An output folder, a sweep and a checkpoint each hold a record.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy

from experiments.errors import BadInput
from experiments.files import read_json, write_json
from experiments.tasks.base import PreparedTask, Task
from experiments.tasks.redrawn_examples import RedrawnExamples
from experiments.training.fingerprints import data_fingerprint, digest_of

# File of an output folder that holds the run record.
ARGUMENTS_FILE = "arguments.json"
# Arguments that are not recorded: secrets and caches.
NOT_RECORDED = ("token", "cache_dir", "overwrite_cache")
# Arguments that name the source of a model or of data. They are recorded but not compared: the fingerprints
# of the content that was read from there are compared instead.
SOURCE_ARGUMENTS = (
    "model_name_or_path", "model_revision", "config_name", "tokenizer_name", "image_processor_name",
    "trust_remote_code", "code_revision", "dataset_name", "train_file", "validation_file", "test_file", "train_dir",
    "validation_dir", "test_dir", "teacher_name_or_path",
)  # fmt: skip
# Fields of `TrainingArguments` that change neither weights nor figures, so are not recorded.
WITHOUT_EFFECT = frozenset({
    "output_dir", "do_train", "do_eval", "do_predict", "resume_from_checkpoint",
    "logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter",
    "log_level", "log_level_replica", "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id",
    "trackio_bucket_id", "trackio_static_space_id", "include_num_input_tokens_seen", "debug",
    "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision",
    "per_device_eval_batch_size", "eval_accumulation_steps", "eval_use_gather_object", "eval_do_concat_batches",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "torch_empty_cache_steps", "save_on_each_node", "enable_jit_checkpoint",
    "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_find_unused_parameters", "ddp_backend",
    "ddp_timeout", "local_rank",
})  # fmt: skip
# Fields that are recorded only if evaluations during training decide the learning rate or which weights are kept. The
# schedule of evaluations itself is always recorded: an evaluation draws random numbers, which changes later dropout.
SAVING_FIELDS = frozenset({
    "save_strategy", "save_steps", "save_total_limit", "save_only_model", "metric_for_best_model", "greater_is_better",
})  # fmt: skip
# Fields of `TrainingArguments` that change the figures of an evaluation.
EVALUATION_FIELDS = ("bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "tf32", "label_smoothing_factor")
# Keys of `RunRecord.content`: weights and config before training, those of the final model, and data.
INITIAL_WEIGHTS, INITIAL_CONFIG, WEIGHTS, CONFIG = "weights_to_start_from", "config_to_start_from", "weights", "config"
TRAIN, CALIBRATION, PREDICTION = "train", "calibration", "prediction"
# Keys of `RunRecord.notes`: the merging that a budget chose, the length of training before it was extended, and the
# fingerprints of files that training saved, without the weights, whose fingerprint is in `content`.
RESOLVED, CONTINUED, SAVED_FILES = "resolved_merging", "continued_from", "saved_files"
# The fingerprint of the inputs covers this many preprocessed inputs.
FIRST_INPUTS = 8


@dataclass(frozen=True)
class RunRecord:
    """Arguments and content that determine the results of a run.

    Attributes:
        arguments: values of arguments by name.
        content: fingerprints of weights, config and data by name.
        notes: further values, which are not compared.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    content: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, fields: Any) -> RunRecord:
        """Return the record from a mapping that `flatten` returned.

        Raises:
            ValueError: for a value that is no such mapping.
        """
        if not isinstance(fields, dict) or not isinstance(fields.get("content"), dict):
            raise ValueError("is no record of a run")
        notes = {name: fields[name] for name in (RESOLVED, CONTINUED, SAVED_FILES) if name in fields}
        arguments = {name: value for name, value in fields.items() if name != "content" and name not in notes}
        return cls(arguments, fields["content"], notes)

    def flatten(self) -> dict[str, Any]:
        """Return the record as one mapping for a JSON file."""
        return {**self.arguments, "content": dict(self.content), **self.notes}

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        """Read the record of an output folder; an empty record if it has none.

        Raises:
            BadInput: if the record cannot be read.
        """
        path = folder / ARGUMENTS_FILE
        try:
            return cls.parse(read_json(path)) if path.exists() else cls()
        except ValueError as error:
            raise BadInput(f"--output_dir {folder}: its {ARGUMENTS_FILE} {error}; use another folder") from error

    def write(self, folder: Path) -> None:
        """Write the record into an output folder, which is created if needed."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / ARGUMENTS_FILE, self.flatten())

    def difference(self, current: RunRecord, may_differ: Collection[str] = (), only_shared: bool = False) -> str | None:
        """Describe the first difference between two records, or return None.

        Args:
            current: record of the present run; only its arguments and content are compared.
            may_differ: names of arguments that may differ.
            only_shared: skip arguments and content that this record lacks.
        """
        # Convert to JSON and back, as the recorded values were: this changes types, such as tuples to lists.
        for name, value in json.loads(json.dumps(dict(current.arguments))).items():
            compared = (
                name not in SOURCE_ARGUMENTS
                and name not in may_differ
                and not (only_shared and name not in self.arguments)
            )
            if compared and self.arguments.get(name) != value:
                return f"{name} {self.arguments.get(name)}, now {value}"
        for name, value in current.content.items():
            if self.content.get(name) != value and not (only_shared and name not in self.content):
                return f"other content of its {name.replace('_', ' ')}"
        return None


def update_record(
    folder: Path, content: Mapping[str, str | None] | None = None, notes: Mapping[str, Any] | None = None
) -> None:
    """Add content and notes to the record of an output folder; content of value None is removed."""
    record = RunRecord.read(folder)
    contents = {name: value for name, value in {**record.content, **(content or {})}.items() if value is not None}
    RunRecord(record.arguments, contents, {**record.notes, **(notes or {})}).write(folder)


def recorded_arguments(*groups: Any) -> dict[str, Any]:
    """Return dataclasses of arguments as one mapping, without secrets and cache settings."""
    return {name: value for group in groups for name, value in asdict(group).items() if name not in NOT_RECORDED}


def data_fields(data: Any) -> dict[str, Any]:
    """Return the data arguments that are not the default, without those that name the source of the data."""
    defaults = {
        argument.name: argument.default if argument.default_factory is MISSING else argument.default_factory()
        for argument in fields(data)
    }
    return {
        name: value
        for name, value in recorded_arguments(data).items()
        if name not in (*SOURCE_ARGUMENTS, "task_name", "dataset_config_name") and value != defaults[name]
    }


def training_fields(arguments: TrainingArguments) -> dict[str, Any]:
    """Return the training arguments that change weights or figures, as JSON values, and the number of processes."""
    evaluation_decides = (
        arguments.load_best_model_at_end
        or arguments.save_strategy == SaveStrategy.BEST
        or _to_json(arguments.lr_scheduler_type) == "reduce_lr_on_plateau"
    )
    left_out = WITHOUT_EFFECT if evaluation_decides else WITHOUT_EFFECT | SAVING_FIELDS
    names = [name for name in type(arguments).__dataclass_fields__ if name not in left_out and name[0] != "_"]
    fields = {name: _to_json(getattr(arguments, name)) for name in names}
    return fields | {"processes": int(os.environ.get("WORLD_SIZE", "1"))}


def evaluation_fields(arguments: TrainingArguments) -> dict[str, Any]:
    """Return the training arguments that change the figures of an evaluation, as JSON values."""
    return {name: _to_json(getattr(arguments, name)) for name in EVALUATION_FIELDS}


def content_fingerprints(task: Task, prepared: PreparedTask, *, train: bool, calibrates: bool) -> dict[str, str]:
    """Return the fingerprints of the examples, and of the first inputs as the model receives them.

    Args:
        task: task with the raw data.
        prepared: task with the data prepared for the model.
        train: whether the run trains.
        calibrates: whether the run measures a frontier, on training examples if there are no other samples.
    """

    def fingerprint(splits: Mapping[str, Any], desc: str) -> str:
        return data_fingerprint(splits, desc, task.labels)

    content = {"evaluation": fingerprint(prepared.evaluation, "evaluated examples")}
    if calibrates and prepared.calibration is not None:
        content[CALIBRATION] = fingerprint({"": prepared.calibration}, "samples to calibrate on")
    if train or calibrates and prepared.calibration is None:
        examples = prepared.train.examples if isinstance(prepared.train, RedrawnExamples) else prepared.train
        content[TRAIN] = fingerprint({"": examples}, "training examples")
        if prepared.trained_with is not None:
            content[TRAIN] = digest_of([content[TRAIN], prepared.trained_with])
    if prepared.prediction:
        content[PREDICTION] = fingerprint(prepared.prediction, "examples to predict")
    # A tokenizer or image processor is compared by its output, because its files also hold settings of its last call.
    return content | {"inputs": digest_of(prepared.batch(FIRST_INPUTS))}


def _to_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=lambda other: getattr(other, "value", str(other))))
