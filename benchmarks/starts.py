# SPDX-License-Identifier: Apache-2.0
"""From which start does a Perceiver learn what a pretrained encoder says?

The same model, text, seed and steps each time, as `run_mlm.py` makes them; only the weights that it begins with differ.

    python benchmarks/starts.py examples/language/pretrain.yaml --max_steps 200 \\
        --train_file TRAIN.parquet --validation_file VALIDATION.parquet --output_dir outputs/starts

`plain` is as Hugging Face's Perceiver begins, `findable` has positions that can be found, `teacher` has the layers of
its teacher, for which the config must have room. OUTPUT_DIR gets starts.json, starts.md and starts.png.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from matplotlib import pyplot as plt
from torch.utils.data import DataLoader
from transformers import set_seed

# A script's own folder is on the path, the repository's root, where the modules are, is not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.command_line import parse_arguments
from experiments.errors import BadInput, exit_on_bad_input
from experiments.files import write_text
from experiments.measurement import describe_environment, environment_line
from experiments.publishing.picture_style import CONTROL, MARKERS, TRAINED, UNMERGED, add_legend, save_picture
from experiments.publishing.tables import markdown_table, with_error
from experiments.tasks.base import PreparedTask
from experiments.tasks.mlm import TaughtMlmArguments, load_taught_mlm_task
from experiments.tasks.teacher import Teacher
from experiments.training.evaluation import evaluate
from experiments.training.findable import start_findable, token_counts
from experiments.training.from_bert import why_not_from_bert
from experiments.training.identity import noted_arguments, training_fields
from experiments.training.loading import Start, load_model_and_task, start_taught
from experiments.training.model_arguments import ModelArguments
from experiments.training.output_folder import write_json
from experiments.training.progress import announce, quieten_transformers
from experiments.training.stage import task_trainer
from experiments.training.taught import TaughtTrainer, unmasked
from experiments.training.trainer_arguments import TrainerArguments
from modeling_tome_perceiver import ToMePerceiverForMaskedLM

PICTURE = "starts.png"


def start_plain(model: ToMePerceiverForMaskedLM, teacher: Teacher, examples: Dataset) -> None:
    """Leave what was drawn."""


def start_with_positions_to_find(model: ToMePerceiverForMaskedLM, teacher: Teacher, examples: Dataset) -> None:
    """`start_findable`, whether or not there is room for the teacher's layers."""
    start_findable(model, teacher, token_counts(examples, model.config.vocab_size))


def start_with_layers(model: ToMePerceiverForMaskedLM, teacher: Teacher, examples: Dataset) -> None:
    """`start_from_bert`, or a line that says what of the config has no room."""
    obstacle = why_not_from_bert(model.config, teacher.model)
    if obstacle is not None:
        raise BadInput(f"--start teacher: allowed with room for the teacher's layers; {obstacle}")
    start_taught(model, teacher, examples)


STARTS: dict[str, Start] = {
    "plain": start_plain,
    "findable": start_with_positions_to_find,
    "teacher": start_with_layers,
}
COLOURS = {"plain": UNMERGED, "findable": CONTROL(0.75), "teacher": TRAINED(0.75)}


@dataclass
class StartArguments:
    """Which starts."""

    _argument_group_name: ClassVar[str] = "starts"

    start: list[str] = field(
        default_factory=lambda: list(STARTS), metadata={"help": f"One or more of {', '.join(STARTS)}."}
    )

    def __post_init__(self) -> None:
        for name in self.start:
            if name not in STARTS:
                raise BadInput(f"--start {name}: allowed are {', '.join(STARTS)}")


@torch.no_grad()
def distance(trainer: TaughtTrainer, prepared: PreparedTask) -> float:
    """Mean squared error of the teacher's states, standardised, as read off those of the student, over the positions of
    the evaluated inputs that are no padding; 1 is what their mean has."""
    model, held = trainer.model.eval(), []
    handle = model.embedding_decoder.register_forward_pre_hook(lambda module, given: held.append(given[0]))
    total, positions = 0.0, 0
    loader = DataLoader(prepared.evaluation[""], trainer.args.per_device_eval_batch_size, collate_fn=prepared.collate)
    try:
        for batch in loader:
            batch = {name: value.to(trainer.args.device) for name, value in batch.items()}
            mask = batch["attention_mask"].bool()
            model(batch["input_ids"], attention_mask=batch["attention_mask"])
            states = held.pop()[:, : mask.shape[1]][mask]
            teachers = trainer.teacher.states(unmasked(batch), batch["attention_mask"])[mask]
            total += float(trainer.teacher_map.distance(states, teachers)) * len(states)
            positions += len(states)
    finally:
        handle.remove()
    return total / positions


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A row for each start."""

    def cells(row: Mapping[str, Any]) -> list[object]:
        first, last = row["losses"][0], row["losses"][-1]
        return [
            row["start"],
            *(f"{loss:.3f} (step {step})" for step, loss in (first, last)),
            f"{row['distance']:.3f}",
            f"{row['masked_loss']:.3f}",
            with_error(100 * row["accuracy"], 100 * row["accuracy_stderr"]),
        ]

    columns = ["start", "loss at first", "at last", "distance to the teacher", "loss of masked tokens", "found, %"]
    return markdown_table(columns, map(cells, rows))


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The losses of training over the steps."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for row, mark in zip(rows, MARKERS, strict=False):
        steps, losses = zip(*row["losses"], strict=True)
        axes.plot(steps, losses, color=COLOURS[row["start"]], marker=mark, markersize=4, label=f"{row['start']} start")
    axes.set_xlabel("training steps")
    axes.set_ylabel("loss: states of the teacher and masked tokens")
    axes.grid(alpha=0.3)
    add_legend(figure, [axes], columns=len(rows))
    save_picture(figure, path)


def redraw(folder: Path) -> Path:
    """Draw the picture anew from the `starts.json` in a folder, and return where it is."""
    draw(json.loads((folder / "starts.json").read_text())["rows"], folder / PICTURE)
    return folder / PICTURE


def main() -> None:
    model_args, data, starts, training = parse_arguments(
        __doc__, ModelArguments, TaughtMlmArguments, StartArguments, TrainerArguments
    )
    if model_args.model_name_or_path is not None:
        raise BadInput("--model_name_or_path: allowed is --config_name; each model begins from scratch")
    if data.teacher_name_or_path is None:
        raise BadInput("--teacher_name_or_path: not given; allowed is an encoder to learn from")
    quieten_transformers()
    output_dir, rows = Path(training.output_dir), []
    task = load_taught_mlm_task(data, False, training.seed, True, **model_args.dataset_options())
    # All of them before any is trained: a start for which there is no room is to show at once.
    loaded = {}
    for name in starts.start:
        set_seed(training.seed)
        loaded[name] = load_model_and_task(model_args, {}, task, training, STARTS[name])
    for name, (model, prepared) in loaded.items():
        announce(f"{name} start")
        set_seed(training.seed)
        trainer = task_trainer(model, prepared, training, output_dir / name)
        trainer.train()
        metrics = evaluate(trainer, prepared, "eval").metrics
        rows.append(
            {
                "start": name,
                "losses": [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry],
                "distance": distance(trainer, prepared),
                "masked_loss": metrics["eval_loss"],
                "accuracy": metrics["eval_accuracy"],
                "accuracy_stderr": metrics["eval_accuracy_stderr"],
            }
        )
    environment = describe_environment()
    figures = {
        "arguments": noted_arguments(model_args, data, starts) | training_fields(training),
        "environment": environment,
        "source": asdict(task.source),
        "evaluated_on": len(prepared.evaluation[""]),
        "rows": rows,
    }
    text = f"{as_markdown(rows)}\n\n![Losses over the training steps]({PICTURE})\n\n{environment_line(environment)}\n"
    write_json(output_dir / "starts.json", figures)
    write_text(output_dir / "starts.md", text)
    draw(rows, output_dir / PICTURE)
    print(text, end="")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
