# SPDX-License-Identifier: Apache-2.0
"""Export a checkpoint, check that the exported model agrees with PyTorch, and time both: the work of export.py.

Letters: B batch size, S length of a text, N latents.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoTokenizer, TrainingArguments

import modeling_tome_perceiver as modeling
from cost_tome_perceiver import Merging
from experiments.command_line import shown_command
from experiments.errors import BadInput, Stopped, naming
from experiments.exported_model import (
    IMAGE_INPUTS,
    ExportedModel,
    LogitsModule,
    check_exportable,
    check_format,
    export_model,
    input_names,
)
from experiments.files import save_whole, write_json, write_text
from experiments.measurement import describe_environment, environment_line, time_interleaved
from experiments.merging.arguments import naming_arguments, parse_r, spelled_r
from experiments.publishing.card import metric_name
from experiments.publishing.tables import markdown_table, with_error
from experiments.runs.checkpoint_task import SweepDataArguments, load_sweep_task
from experiments.runs.start import load
from experiments.tasks.base import LABELS, Batch, PreparedTask
from experiments.tasks.scores import Scores, score
from experiments.training.loading import requested_config, used_weights
from experiments.training.model_arguments import ModelArguments
from experiments.training.output_folder import LOCK_FILE, lock_folder
from experiments.training.progress import announce, quieten_transformers, say

REPORT_FILE = "export_report.json"
# Entries of an output folder that an export may write to: what a failed or a killed one leaves.
FREE_ENTRIES = {LOCK_FILE, ".partial", REPORT_FILE}
BATCH_SIZES = (1, 3, 8)
# Number of compared samples: every batch size at both lengths, twice.
SAMPLES = 48
RANDOM_LENGTH = 128
TIMED_BATCH_SIZES, ROUNDS = (1, 8), 7
# Logits are close if they differ by less than this, in standard deviations of the logits. Measured on float32: 1e-5.
CLOSE = 1e-3
# Least share of samples with close logits (float32 only), and of equal answers. It is below 1 because rounding may turn
# a near tie of two similarities, so that other latents merge.
LEAST_AGREEMENT = {"float32": 0.98, "bfloat16": 0.9, "int8": 0.9}
# Answers of a regression are equal within this share of the standard deviation of the outputs.
EQUAL_NUMBERS = 0.1
MERGED, UNMERGED, REPEATED = "merged", "unmerged", "equal latents"
DATA_CHOICES = (
    "dataset_name", "task_name", "train_file", "validation_file", "test_file", "train_dir", "validation_dir", "test_dir"
)  # fmt: skip


@dataclass
class ExportArguments:
    """Checkpoint to export, format, dtype and output folder."""

    _argument_group_name: ClassVar[str] = "export"

    format: str = field(
        default="onnx",
        metadata={"help": "onnx, openvino, or pt2: a package that AOTInductor compiles for this kind of processor."},
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Dtype of the computation: float32; bfloat16 for openvino and pt2; int8 (weights, and activations "
            "while it runs) for onnx."
        },
    )
    r: str | None = field(
        default=None,
        metadata={"help": "Latents to merge in each layer: an integer, or a comma-separated list, one for each layer."},
    )
    flops_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Instead of --r: largest share of the unmerged model's FLOPs. The best row of the checkpoint's "
            "frontier is taken or, without a frontier, a schedule that needs no data."
        },
    )
    seed: int = field(default=42, metadata={"help": "Seed of random samples."})
    output_dir: str | None = field(default=None, metadata={"help": "Output folder, new or empty."})

    def __post_init__(self) -> None:
        if self.output_dir is None:
            raise BadInput("--output_dir: is missing; use a new or empty folder")
        if self.r is not None:
            self.r = spelled_r(self.r)
            parse_r(self.r)
        if self.flops_ratio is not None and not 0 < self.flops_ratio <= 1:
            raise BadInput(f"--flops_ratio {self.flops_ratio}: must be a number above 0, up to 1")
        if self.r is not None and self.flops_ratio is not None:
            raise BadInput(f"--r {self.r} and --flops_ratio {self.flops_ratio}: use one of them")

    def merge(self, model: modeling.ToMePerceiverPreTrainedModel) -> None:
        """Set the merging of a model.

        Raises:
            BadInput: if the model cannot merge so.
        """
        with naming_arguments():
            if self.r is not None:
                Merging.of(model.config).by(parse_r(self.r)).apply(model.config)
            if self.flops_ratio is not None:
                say(f"merges: {model.merge_to(flops_ratio=self.flops_ratio)}")


@dataclass(frozen=True)
class Subject:
    """A checkpoint to export.

    Attributes:
        model: its model.
        processing_class: its tokenizer or image processor.
        samples: inputs to compare on, by name.
        prepared: its data; `None` if the samples are random.
    """

    model: modeling.ToMePerceiverPreTrainedModel
    processing_class: Any
    samples: Batch
    prepared: PreparedTask | None


@dataclass(frozen=True)
class Parity:
    """Agreement of an exported model with PyTorch in float32, on the same inputs.

    Attributes:
        samples: number of inputs.
        largest_difference: largest difference of a logit, in standard deviations of the logits.
        close: share of samples whose logits all differ by less than `CLOSE`.
        equal_answers: share of equal answers; of a masked language model, at every position that is not padding.
    """

    samples: int
    largest_difference: float
    close: float
    equal_answers: float


def run_export(model_args: ModelArguments, data: SweepDataArguments, arguments: ExportArguments) -> None:
    """Export, compare, score, time, and write the report.

    Raises:
        BadInput: for a checkpoint, data or output folder that cannot be used, before any long work.
        Stopped: if the exported model does not agree with PyTorch; only the report is written.
    """
    check_format(arguments.format, arguments.dtype)
    folder = Path(arguments.output_dir or "")
    with lock_folder(folder):
        if taken := sorted(path.name for path in folder.iterdir() if path.name not in FREE_ENTRIES):
            raise BadInput(f"--output_dir {folder}: holds {taken[0]}; use a new or empty folder")
        subject = load_subject(model_args, data, arguments.seed)
        arguments.merge(subject.model)
        check_exportable(subject.model)
        save_whole(folder, partial(_export_and_check, subject, arguments, folder))
    say(f"saved: {folder}")


def load_subject(model_args: ModelArguments, data: SweepDataArguments, seed: int) -> Subject:
    """Load a checkpoint with samples of the data, or with random samples if no data are given.

    Raises:
        BadInput: for a missing checkpoint or data, or data that do not fit the checkpoint.
    """
    if not any(getattr(data, name) for name in DATA_CHOICES):
        return _load_without_data(model_args, seed)
    training = TrainingArguments(output_dir="unused", seed=seed, use_cpu=True, report_to="none")
    loaded = load(partial(load_sweep_task, data, model_args, seed), model_args, training)
    loaded.check_head(model_args)
    model, prepared = loaded.model.eval(), loaded.prepared
    samples = {name: prepared.batch(SAMPLES)[name] for name in input_names(model)}
    return Subject(model, prepared.processing_class, samples, prepared)


def _load_without_data(model_args: ModelArguments, seed: int) -> Subject:
    """Load a checkpoint, and draw random tokens or pixels."""
    quieten_transformers()
    name = model_args.model_name_or_path
    if name is None:
        raise BadInput("--model_name_or_path: is missing; use a Hub id or a folder with a finetuned checkpoint")
    config = requested_config(model_args)
    architecture = (config.architectures or ["PerceiverModel"])[0].removeprefix("ToMe")
    model_class = getattr(modeling, f"ToMe{architecture}", None)
    if model_class is None:
        raise BadInput(f"--model_name_or_path {name}: architectures = {config.architectures}; use a Perceiver")
    with naming(f"--model_name_or_path {name}", Exception):
        options = model_args.download_options()
        model, info = model_class.from_pretrained(name, config=config, output_loading_info=True, **options)
        if missing := used_weights(info["missing_keys"]):
            raise ValueError(f"its weights lack {missing[0]}; use a finetuned checkpoint")
    generator = np.random.default_rng(seed)
    options["trust_remote_code"] = model_args.trust_remote_code
    if input_names(model) == IMAGE_INPUTS:
        processor_name = model_args.image_processor_name or name
        with naming(f"--image_processor_name {processor_name}", Exception):
            processor = AutoImageProcessor.from_pretrained(processor_name, **options)
            side = config.image_size
            drawn = generator.integers(0, 256, (SAMPLES, side, side, 3), dtype=np.uint8)
            samples = dict(processor([Image.fromarray(image) for image in drawn], return_tensors="pt"))
    else:
        tokenizer_name = model_args.tokenizer_name or name
        with naming(f"--tokenizer_name {tokenizer_name}", Exception):
            processor = AutoTokenizer.from_pretrained(tokenizer_name, **options)
        length = min(RANDOM_LENGTH, config.max_position_embeddings)
        ids = torch.from_numpy(generator.integers(0, config.vocab_size, (SAMPLES, length)))
        lengths = torch.from_numpy(generator.integers(1, length + 1, (SAMPLES, 1)))
        samples = {"input_ids": ids, "attention_mask": (torch.arange(length) < lengths).long()}
    return Subject(model.eval(), processor, {name: samples[name] for name in input_names(model)}, None)


def _export_and_check(subject: Subject, arguments: ExportArguments, folder: Path, place: Path) -> None:
    """Write an export and its report to the folder `place`.

    Raises:
        Stopped: if the exported model does not agree with PyTorch; the report is written to `folder`.
    """
    models = _variants(subject.model)
    exported: dict[str, ExportedModel] = {}
    example = {
        name: value[:2] if len(value) > 1 else value.repeat_interleave(2, 0) for name, value in subject.samples.items()
    }
    for name, model in models.items():
        announce(f"exporting to {arguments.format}, {arguments.dtype}: {name}")
        target = place if name == MERGED else place / name
        export_model(model, example, target, arguments.format, arguments.dtype)
        exported[name] = ExportedModel.from_pretrained(target)
    announce("comparing with PyTorch")
    parity = {name: compare(model, exported[name], subject.samples) for name, model in models.items()}
    report = _report(subject, arguments, parity)
    if failed := [name for name, each in parity.items() if not agrees(name, each, arguments.dtype)]:
        write_json(folder / REPORT_FILE, report)
        raise Stopped(
            f"the exported model does not agree with PyTorch ({', '.join(failed)}: equal answers "
            f"{parity[failed[0]].equal_answers:.1%}); see {folder / REPORT_FILE}; no model was written"
        )
    if subject.prepared is not None:
        announce("scoring")
        scores = _score(subject.prepared, subject.model, exported[MERGED])
        report |= {"scores": {name: asdict(each) for name, each in scores.items()}}
    announce("timing")
    report["times"] = [_time(models, exported, subject.samples, size) for size in TIMED_BATCH_SIZES]
    for name in models.keys() - {MERGED}:
        shutil.rmtree(place / name)
    subject.processing_class.save_pretrained(place)
    write_json(place / REPORT_FILE, report)
    write_text(place / "README.md", render_card(report))


def _variants(model: modeling.ToMePerceiverPreTrainedModel) -> dict[str, modeling.ToMePerceiverPreTrainedModel]:
    """Return the model, the unmerged one, and one whose first half of the latents are exact duplicates."""
    unmerged, repeated = copy.deepcopy(model), copy.deepcopy(model)
    model.unmerged.apply(unmerged.config)
    latents = repeated.base_model.embeddings.latents.data
    latents[: len(latents) // 2] = latents[0].clone()
    return {MERGED: model, UNMERGED: unmerged, REPEATED: repeated}


def _report(subject: Subject, arguments: ExportArguments, parity: dict[str, Parity]) -> dict[str, Any]:
    model = subject.model
    shape = (1, *subject.samples[input_names(model)[0]].shape[1:])
    return {
        "command": shown_command(),
        "environment": describe_environment(),
        "format": arguments.format,
        "dtype": arguments.dtype,
        "inputs": list(input_names(model)),
        "merging": asdict(Merging.of(model.config)),
        "flops_ratio": model.flops_ratio(shape),
        "samples": "random" if subject.prepared is None else "evaluation split",
        "evaluated_on": 0 if subject.prepared is None else len(subject.prepared.evaluation[""]),
        "batches": sorted({tuple(next(iter(batch.values())).shape) for batch in cut_batches(subject.samples)}),
        "parity": {name: asdict(each) for name, each in parity.items()},
    }


def cut_batches(samples: Batch) -> Iterator[Batch]:
    """Yield all samples in batches of every size, texts in turn at their whole and at half of their length."""
    count, start = len(next(iter(samples.values()))), 0
    for half, size in cycle(product((False, True), BATCH_SIZES)):
        if start >= count:
            return
        batch = {name: value[start : start + size] for name, value in samples.items()}
        if half and "input_ids" in batch:
            batch = {name: value[:, : max(1, value.shape[1] // 2)] for name, value in batch.items()}
        yield batch
        start += size


@torch.inference_mode()
def _logits(model: Any, batch: Batch) -> Tensor:
    if isinstance(model, ExportedModel):
        return model(**batch).logits
    return LogitsModule(model)(*(batch[name] for name in input_names(model)))


def compare(model: modeling.ToMePerceiverPreTrainedModel, exported: Any, samples: Batch) -> Parity:
    """Compare an exported model with the model it was made from."""
    batches = [*cut_batches(samples)]
    pairs = [(_logits(model, batch), _logits(exported, batch)) for batch in batches]
    spread = float(torch.cat([ours.flatten() for ours, _ in pairs]).std())
    differences = torch.cat([(ours - theirs).abs().flatten(1).amax(1) / spread for ours, theirs in pairs])
    same = []
    for (ours, theirs), batch in zip(pairs, batches, strict=True):
        if ours.shape[-1] == 1:
            same.append((ours - theirs).abs().flatten() <= EQUAL_NUMBERS * spread)
        elif ours.dim() == 3:  # masked language models also return logits beyond the input's S tokens
            mask = batch["attention_mask"].bool()
            same.append((ours.argmax(-1) == theirs.argmax(-1))[:, : mask.shape[1]][mask])
        else:
            same.append(ours.argmax(-1) == theirs.argmax(-1))
    return Parity(
        samples=len(differences),
        # JSON has no infinity and no NaN, so logits that are not finite get the largest float32.
        largest_difference=float(differences.nan_to_num(nan=torch.finfo(torch.float32).max).max()),
        close=float((differences <= CLOSE).float().mean()),
        equal_answers=float(torch.cat(same).float().mean()),
    )


def agrees(name: str, parity: Parity, dtype: str) -> bool:
    """Return whether an exported model agrees with PyTorch.

    In float32, logits and answers must agree; in other dtypes only answers, and not those of the model with equal
    latents, whose similarities nearly tie.
    """
    if dtype == "float32":
        return min(parity.close, parity.equal_answers) >= LEAST_AGREEMENT[dtype]
    return name == REPEATED or parity.equal_answers >= LEAST_AGREEMENT[dtype]


def _score(prepared: PreparedTask, model: modeling.ToMePerceiverPreTrainedModel, exported: ExportedModel) -> Scores:
    """Return the scores of the exported model on the evaluation split, with their change from PyTorch."""
    found: dict[str, list[Tensor]] = {"exported": [], "torch": [], LABELS: []}
    for examples in DataLoader(prepared.evaluation[""], max(BATCH_SIZES), collate_fn=prepared.collate):
        batch = dict(examples)
        labels = batch.pop(LABELS)
        found[LABELS].append(labels)
        for name, each in (("exported", exported), ("torch", model)):
            logits = _logits(each, batch)
            found[name].append(logits if prepared.reduce_logits is None else prepared.reduce_logits(logits, labels))
    joined = {name: torch.cat(each).numpy() for name, each in found.items()}
    references = prepared.references(joined[LABELS])
    predictions, baseline = prepared.predictions(joined["exported"]), prepared.predictions(joined["torch"])
    return score(prepared.kind, predictions, references, baseline)


def _time(
    models: dict[str, modeling.ToMePerceiverPreTrainedModel],
    exported: dict[str, ExportedModel],
    samples: Batch,
    size: int,
) -> dict[str, Any]:
    """Return the times of the merged and the unmerged model, in PyTorch and exported, at a batch size."""
    batch = {name: value[:size] for name, value in samples.items()}
    variants = {
        "PyTorch, unmerged": models[UNMERGED],
        "PyTorch, merged": models[MERGED],
        "exported, unmerged": exported[UNMERGED],
        "exported, merged": exported[MERGED],
    }
    timings = time_interleaved(partial(_logits, batch=batch), [*variants.values()], models[UNMERGED], ROUNDS)
    rows = {name: asdict(timing) for name, timing in zip(variants, timings, strict=True)}
    return {"batch_size": len(next(iter(batch.values()))), "models": rows}


LOADING_CODE = {
    "onnx": """import onnxruntime
from transformers import {processor}

inputs = {processor}.from_pretrained("FOLDER")({example}, return_tensors="np")
session = onnxruntime.InferenceSession("FOLDER/model.onnx")
logits = session.run(None, {{name: inputs[name] for name in {names}}})[0]""",
    "openvino": """import openvino
from transformers import {processor}

inputs = {processor}.from_pretrained("FOLDER")({example}, return_tensors="np")
model = openvino.Core().compile_model("FOLDER/model.xml", "CPU", {{"INFERENCE_PRECISION_HINT": "{hint}"}})
logits = model({{name: inputs[name] for name in {names}}})[0]""",
    "pt2": """import torch
from transformers import {processor}

inputs = {processor}.from_pretrained("FOLDER")({example}, return_tensors="pt")
model = torch._inductor.aoti_load_package("FOLDER/model.pt2")  # compiled code: load it only from a source you trust
logits = model(*(inputs[name] for name in {names}))""",
}
"""Code of a card that runs an exported model, by format."""


def render_card(report: dict[str, Any]) -> str:
    """Return the README.md of an export: how to run it, and the figures of the report as tables."""
    is_text = "input_ids" in report["inputs"]
    code = LOADING_CODE[report["format"]].format(
        processor="AutoTokenizer" if is_text else "AutoImageProcessor",
        example='["A text."]' if is_text else "image",
        names=report["inputs"],
        hint="bf16" if report["dtype"] == "bfloat16" else "f32",
    )
    parity = [
        (name, each["samples"], f"{each['largest_difference']:.1e}", f"{each['equal_answers']:.1%}")
        for name, each in report["parity"].items()
    ]
    header = ["model", "samples", "largest difference, standard deviations of the logits", "equal answers"]
    times = [
        (name, *(f"{each['models'][name]['speedup']['median']:.2f}" for each in report["times"]))
        for name in report["times"][0]["models"]
    ]
    samples = "random tokens or pixels" if report["samples"] == "random" else "samples of the evaluation split"
    return f"""---
tags: [perceiver, token-merging, {report["format"]}]
---
# Token Merging Perceiver, exported to {report["format"]}

It computes in {report["dtype"]} and has {report["flops_ratio"]:.3f} of the unmerged model's FLOPs. To run it:

```python
{code}
```

## Agreement with PyTorch

On {samples}, at {len(report["batches"])} shapes of a batch; "{REPEATED}": half of the latents are exact duplicates.

{markdown_table(header, parity, "lr")}

{_scores_section(report)}## Speed

Times as fast as the unmerged model in PyTorch (float32), median of {ROUNDS} alternating rounds:

{markdown_table(["model", *(f"batch size {each['batch_size']}" for each in report["times"])], times, "lr")}

{environment_line(report["environment"])}
"""


def _scores_section(report: dict[str, Any]) -> str:
    if "scores" not in report:
        return ""
    rows = [
        (
            metric_name(name),
            with_error(each["value"], each["stderr"], ".4f"),
            with_error(each["change"], each["change_stderr"], "+.4f"),
        )
        for name, each in report["scores"].items()
    ]
    table = markdown_table(["score", "exported", "change from PyTorch, paired by example"], rows, "lr")
    return f"## Scores\n\nOn {report['evaluated_on']:,} examples of the evaluation split:\n\n{table}\n\n"
