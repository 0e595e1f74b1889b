# SPDX-License-Identifier: Apache-2.0
"""Cases of a change between two runs into the same folder: old results must never be taken for new ones.

The law: the command is refused and the folder stays as it is, or it leaves what it would leave in an empty folder.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from tests.reliability.case import PASSED, Attempt, Finding, changed_paths, contents, said, shown
from tests.reliability.inputs import LAST, OUTPUT, Command, Inputs, Scenario, edit_json, edit_value
from tests.reliability.left import left, where
from tests.reliability.running import Outcome, run_forked

RETRAINED: Command = ("--r", 2, "--retrain_epochs", 1)
SWEPT: Command = ("--r", 0, 2, "--retrain_epochs", 1, "--save_strategy", "no")
BUDGET: Command = ("--flops_ratio", 0.985, "--calibration_samples", 4)
SCENARIOS = (
    Scenario("training", "run_glue.py", "text_training", ("--r", 1), LAST),
    Scenario("training on from a checkpoint", "run_glue.py", "text_training_on", (), LAST),
    Scenario("two stages", "run_image.py", "image_training", RETRAINED, LAST),
    Scenario("masked tokens", "run_mlm.py", "mlm_training", ("--r", 1), LAST),
    Scenario("evaluation", "run_glue.py", "text_evaluation", ("--do_predict", "--r", 1)),
    Scenario("sweep", "eval_sweep.py", "text_sweep", SWEPT),
    Scenario("sweep of budgets", "eval_sweep.py", "image_sweep", (*BUDGET, "--schedule", "floor", "search")),
    Scenario("fixed groups", "run_glue.py", "text_evaluation", (*BUDGET, "--merge_method", "groups")),
)
RUNS = {scenario.name: scenario for scenario in SCENARIOS}
# Non-default values of training arguments that `other_values` cannot derive; `None` if no other value runs here.
VALUES: dict[str, Command | None] = {
    **dict.fromkeys(("output_dir", "resume_from_checkpoint", "do_train", "use_cpu", "local_rank"), None),
    **dict.fromkeys(("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy"), None),
    **dict.fromkeys(("hub_always_push", "hub_revision", "project", "trackio_space_id", "trackio_bucket_id"), None),
    **dict.fromkeys(("trackio_static_space_id", "liger_kernel_config", "parallelism_config"), None),
    "lr_scheduler_type": ("cosine",), "lr_scheduler_kwargs": ('{"num_cycles": 1}', "--lr_scheduler_type", "cosine"),
    "optim": ("sgd",), "optim_args": ("momentum=0.5", "--optim", "sgd"), "optim_target_modules": ("all-linear",),
    "logging_strategy": ("epoch",), "log_level": ("error",), "log_level_replica": ("error",), "report_to": ("none",),
    "run_name": ("mine",), "eval_strategy": ("epoch",), "save_strategy": ("epoch",), "eval_steps": (2,),
    "include_for_metrics": ("loss",), "metric_for_best_model": ("loss",), "label_names": ("labels",),
    "train_sampling_strategy": ("sequential",), "length_column_name": ("lengths",), "debug": ("underflow_overflow",),
    "adam_beta1": (0.8,), "adam_beta2": (0.9,), "adam_epsilon": (1e-3,), "learning_rate": (1e-3,), "seed": (7,),
    "data_seed": (7,), "weight_decay": (0.1,), "warmup_steps": (2,), "num_train_epochs": (3,), "max_steps": (5,),
    "max_grad_norm": (0.1,), "label_smoothing_factor": (0.2,), "gradient_accumulation_steps": (2,),
    "per_device_train_batch_size": (4,), "per_device_eval_batch_size": (3,), "neftune_noise_alpha": (1.0,),
    "torch_compile_backend": ("eager",), "torch_compile_mode": ("default",), "ddp_backend": ("gloo",),
    "activation_checkpointing_kwargs": ('{"use_reentrant": false}',),
    "accelerator_config": ('{"split_batches": true}',),
    "gradient_checkpointing_kwargs": ('{"use_reentrant": false}',), "deepspeed": ("none.json",),
    "fsdp": ("full_shard",), "fsdp_config": ('{"min_num_params": 1}',), "include_num_input_tokens_seen": ("all",),
    "dataloader_multiprocessing_context": ("fork",), "logging_steps": (1,), "save_steps": (2,),
    "torch_compile": ("true", "--torch_compile_backend", "eager"),
}  # fmt: skip
# Non-default values of our own arguments that change results, by run.
OWN: dict[str, tuple[str, ...]] = {
    "training": (
        "--r 2", "--r 1,0,1,0", "--flops_ratio 0.98", "--r_inflection -1", "--min_latents 6", "--merge_method prune",
        "--merge_metric hidden", "--proportional_attention false", "--config_overrides num_latents=6",
        "--max_train_samples 12", "--max_eval_samples 5", "--max_seq_length 6", "--pad_to_max_length", "--elastic",
        "--task_name mrpc", "--retrain_epochs 1", "--elastic --distillation_weight 0.5",
    ),
    "two stages": (
        "--retrain_epochs 2", "--retrain_learning_rate 1e-3", "--elastic", "--crop_scale 0.5", "--horizontal_flip 0.5",
        "--r 1", "--merge_method k_center", "--merge_metric value", "--max_train_samples 12", "--max_eval_samples 5",
        "--proportional_attention false", "--min_latents 6", "--num_train_epochs 3", "--max_steps 3",
        "--train_val_split 0.5", "--label_smoothing_factor 0.2", "--seed 7", "--flops_ratio 0.9 --r_inflection 0",
    ),
    "masked tokens": (
        "--mlm_probability 0.3", "--mask_replace_prob 0.5", "--random_replace_prob 0.2", "--dataset_config_name one",
        "--max_train_samples 12", "--max_eval_samples 5", "--max_seq_length 40", "--r 2", "--seed 7",
    ),
    "evaluation": ("--r 2", "--max_eval_samples 5", "--max_predict_samples 3", "--merge_method prune"),
    "sweep": (
        "--r 0 1", "--r 0 2 1", "--merge_method prune", "--merge_metric hidden", "--proportional_attention false",
        "--min_latents 6", "--r_inflection -1", "--max_eval_samples 5", "--max_train_samples 12",
        "--retrain_epochs 2", "--retrain_learning_rate 1e-3", "--elastic", "--elastic --distillation_weight 0.5",
        "--learning_rate 1e-3", "--seed 7", "--label_smoothing_factor 0.2", "--max_grad_norm 0.1", "--adam_beta1 0.8",
        "--adam_epsilon 1e-3", "--weight_decay 0.1", "--lr_scheduler_type cosine", "--optim sgd",
        "--per_device_train_batch_size 4", "--gradient_accumulation_steps 2", "--warmup_steps 2", "--data_seed 7",
        "--max_seq_length 6", "--timing_rounds 2", "--timing_batch_size 3", "--flops_ratio 0.98",
        "--per_device_eval_batch_size 3", "--ignore_mismatched_sizes", "--retrain_epochs 0",
    ),
    "sweep of budgets": (
        "--flops_ratio 0.98", "--schedule search", "--schedule search floor", "--calibration_samples 5", "--frontier",
        "--schedule search --merge_method groups",
        "--merge_method prune", "--merge_method bipartite prune", "--merge_metric hidden", "--min_latents 4",
        "--proportional_attention false", "--max_eval_samples 5", "--max_train_samples 12", "--seed 7", "--r 0 1",
        "--crop_scale 0.5",
    ),
    "fixed groups": (
        "--flops_ratio 0.98", "--merge_method bipartite", "--proportional_attention false", "--min_latents 4",
        "--calibration_samples 5", "--max_train_samples 12", "--max_eval_samples 5", "--seed 7",
    ),
}  # fmt: skip
# A resumed run may raise these to train for longer; its results then differ from those of one in an empty folder.
LENGTH = ("num_train_epochs", "max_steps")
# Files that may differ from those of a run in an empty folder: arguments, logs, training states.
NOT_COMPARED = re.compile(
    r"arguments\.json$|trainer_state\.json$|checkpoint-\d+/|\.png$|training_args\.bin$|README\.md$"
)
CHECKPOINT_PATH = re.compile(r"(^|/)checkpoint-\d+/")


@dataclass(frozen=True)
class Change:
    """One change between two runs into the same folder."""

    run: str  # key of `RUNS`
    name: str  # of the change
    added: Command = ()  # arguments of the second run
    edit: Edit | None = None  # edits an input; `None` if only arguments change
    resume: bool = False  # whether the second run resumes

    kind = "one thing changed"

    @property
    def id(self) -> str:
        return f"{self.run}: {self.name}{', resumed' if self.resume else ''}"

    @property
    def row(self) -> str:
        is_training = self.name in TrainingArguments.__dataclass_fields__
        what = "an input" if self.edit else "a training argument" if is_training else "one of our arguments"
        return f"{self.run}, {what} changed"

    def attempt(self, inputs: Inputs, folder: Path) -> Attempt:
        """Run to the end, change one thing, run again, and compare with the changed run in an empty folder."""
        scenario = RUNS[self.run]
        if self.edit:
            shutil.copytree(inputs.folder, folder / "inputs", ignore=shutil.ignore_patterns("finished"), symlinks=True)
            inputs = Inputs(folder / "inputs")
        command = (*scenario.command(inputs), *self.added)
        finished, first = inputs.finished(scenario)
        if first.exit_code:
            finding = f"the run before the change fails: exit code {first.exit_code}", "other"
            return Attempt(shown(scenario.script, command), finding, said(first))
        folder = folder / "run"
        shutil.copytree(finished, folder)
        if self.edit:
            self.edit(inputs)
        before = contents(folder / OUTPUT)
        outcome = run_forked(scenario.script, (*command, *(scenario.resume if self.resume else ())), folder)
        finding = self._judge(outcome, before, folder, command)
        return Attempt(shown(scenario.script, command), finding, said(outcome))

    def _judge(self, outcome: Outcome, before: dict[str, str], folder: Path, command: Command) -> Finding:
        if outcome.fault != PASSED:
            return outcome.fault
        if outcome.exit_code:
            if len(outcome.errors) != 1:
                return f"exit code {outcome.exit_code} and {len(outcome.errors)} lines that say why", "other"
            changed = changed_paths(before, contents(folder / OUTPUT))
            return (f"refused, but written or changed: {changed}", "other") if changed else PASSED
        fresh = folder / "fresh"
        fresh.mkdir()
        expected = run_forked(RUNS[self.run].script, command, fresh)
        if expected.exit_code:
            return f"in an empty folder it ends with exit code {expected.exit_code}", "other"
        if self.resume and self.name in LENGTH:
            steps, asked = (
                json.loads((each / OUTPUT / "trainer_state.json").read_text())["global_step"]
                for each in (folder, fresh)
            )
            return PASSED if steps >= asked and steps > 8 else (f"only {steps} steps", "silently wrong")
        wrong = _stale(left(folder / OUTPUT), left(fresh / OUTPUT), self.resume)
        return ("; ".join(wrong[:3]), "silently wrong") if wrong else PASSED


def changes() -> Iterator[Change]:
    """Yield a change of every training argument, own argument and input, one at a time, and resumed if possible."""
    once = [Change("training", name, (f"--{name}", *value)) for name, value in other_values().items()]
    once += [Change(run, line, tuple(shlex.split(line))) for run, lines in OWN.items() for line in lines]
    once += [Change(run, name, edit=edit) for run, edits in EDITED.items() for name, edit in edits.items()]
    for change in once:
        yield change
        if RUNS[change.run].resume:
            yield replace(change, resume=True)


def other_values() -> dict[str, Command]:
    """Return a non-default value for every training argument that can be given here."""
    found: dict[str, Command] = {}
    for field in dataclasses.fields(TrainingArguments):
        if field.name in VALUES:
            value = VALUES[field.name]
        elif isinstance(field.default, bool) or "bool" in str(field.type):
            value = ("false",) if field.default is True else ("true",)
        elif isinstance(field.default, int):
            value = (field.default + 1,)
        elif isinstance(field.default, float):
            value = (field.default / 2 or 0.1,)
        else:
            value = (2,)
        if value is not None:
            found[field.name] = value
    return found


def _stale(found: dict[str, Any], expected: dict[str, Any], resumed: bool) -> list[str]:
    """Return results that differ from those in an empty folder, and checkpoints that the second run did not write."""
    wrong = []
    for path, value in expected.items():
        if not NOT_COMPARED.search(path) and not _alike(found.get(path), value):
            wrong.append(f"{path} is not what an empty folder gets{where(found.get(path), value)}")
    theirs, ours = ({path for path in each if CHECKPOINT_PATH.search(path)} for each in (expected, found))
    folders = {path.rpartition("/")[0] for path in ours} - {path.rpartition("/")[0] for path in theirs}
    if theirs and folders and not resumed:
        wrong.append(f"of another run: {', '.join(sorted(folders))}")
    return wrong


def _alike(one: Any, other: Any) -> bool:
    """Return whether two results are equal up to rounding."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-7)
    return bool(one == other)


Edit = Callable[[Inputs], None]


def _byte(file: str) -> Edit:
    """Change one byte in the middle of a file, the low bits of one number."""

    def edit(inputs: Inputs) -> None:
        data = bytearray((inputs.folder / file).read_bytes())
        data[len(data) * 3 // 4] ^= 0x55
        (inputs.folder / file).write_bytes(bytes(data))

    return edit


def _fields(file: str, **values: object) -> Edit:
    return lambda inputs: edit_json(inputs.folder / file, **values)


def _value(file: str, column: str, change: Callable[[Any], Any]) -> Edit:
    return lambda inputs: edit_value(next(inputs.folder.glob(file)), column, change)


def _other_label(label: int) -> int:
    return 1 - label


def _next_label(label: int) -> int:
    return (label + 1) % 3


def _other_text(text: str) -> str:
    return "zzzzzzz"


def _inverted(image: Any) -> Any:
    return image.point(lambda value: 255 - value)


EVALUATED: dict[str, Edit] = {
    "one label to evaluate on": _value("glue/sst2/validation-*", "label", _other_label),
    "one sentence to evaluate on": _value("glue/sst2/validation-*", "sentence", _other_text),
}
TEXT = EVALUATED | {
    "one label to train on": _value("glue/sst2/train-*", "label", _other_label),
    "one sentence to train on": _value("glue/sst2/train-*", "sentence", _other_text),
}
IMAGES: dict[str, Edit] = {
    "one image to train on": _value("images/train.parquet", "image", _inverted),
    "one image to evaluate on": _value("images/test.parquet", "image", _inverted),
    "one image label to train on": _value("images/train.parquet", "label", _next_label),
    "one image label to evaluate on": _value("images/test.parquet", "label", _next_label),
}
CHECKPOINT: dict[str, Edit] = {
    "one byte of the text weights": _byte("text_model/model.safetensors"),
    "one field of the text checkpoint": _fields("text_model/config.json", layer_norm_eps=0.1),
    "the tokenizer": _fields("text_model/tokenizer_config.json", padding_side="left", cls_token="[SEP]"),
}
IMAGE_CHECKPOINT: dict[str, Edit] = {
    "one byte of the image weights": _byte("image_model/model.safetensors"),
    "one field of the image checkpoint": _fields("image_model/config.json", layer_norm_eps=0.1),
    "the image processor": _fields("image_model/preprocessor_config.json", image_mean=[0.1, 0.2, 0.3]),
}
EDITED: dict[str, dict[str, Edit]] = {
    "training": {"one field of the config": _fields("text_config.json", num_self_attends_per_block=1)} | TEXT,
    "training on from a checkpoint": CHECKPOINT | TEXT,
    "two stages": {"one field of the image config": _fields("image_config.json", num_latents=6)} | IMAGES,
    "masked tokens": {
        "one field of the masked config": _fields("mlm_config.json", num_latents=6),
        "one masked sentence": _value("sentences/one/train.parquet", "text", _other_text),
    },
    "evaluation": (
        CHECKPOINT | EVALUATED | {"one sentence to predict": _value("glue/sst2/test-*", "sentence", _other_text)}
    ),
    "sweep": CHECKPOINT | TEXT,
    "sweep of budgets": IMAGE_CHECKPOINT | IMAGES,
    "fixed groups": CHECKPOINT | TEXT,
}
