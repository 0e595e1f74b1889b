# SPDX-License-Identifier: Apache-2.0
"""Does it matter that attention knows the sizes of merged latents, among the latents and in the decoder?

Proportional attention (Bolya et al., 2023, section 3) adds the log of a merged latent's size to its scores. Here it is
left out of the self-attention layers, of the decoder, and of both, on one checkpoint at shares of its FLOPs, without
retraining; the change is from sizes in both places, paired example by example.

    python benchmarks/size_ablation.py --model_name_or_path outputs/fashion_mnist \\
        --dataset_name zalando-datasets/fashion_mnist --flops_ratio 0.765 0.614 --use_cpu --output_dir outputs/sizes

OUTPUT_DIR gets size_ablation.json and size_ablation.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

# A script's own folder is on the path, the repository's root, where the modules are, is not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from functools import partial

from budget_tome_perceiver import DEFAULT_SCHEDULE, SCHEDULES, flops_ratios, scheduled
from experiments.command_line import parse_arguments
from experiments.errors import BadInput, exit_on_bad_input
from experiments.files import write_text
from experiments.measurement import describe_environment
from experiments.merging.arguments import naming_arguments
from experiments.publishing.tables import markdown_table, with_error
from experiments.runs.checkpoint_task import SweepDataArguments, load_sweep_task
from experiments.runs.start import load
from experiments.training.evaluation import changes, evaluate
from experiments.training.identity import noted_arguments
from experiments.training.model_arguments import ModelArguments
from experiments.training.output_folder import write_json
from experiments.training.stage import task_trainer
from experiments.training.trainer_arguments import TrainerArguments
from layers_tome_perceiver import ToMePerceiverLayer
from modeling_tome_perceiver import ToMePerceiverPreTrainedModel

SELF_ATTENTION, DECODER = "self-attention", "decoder"
PLACES: dict[str, tuple[str, ...]] = {
    "in both": (),
    "not in the decoder": (DECODER,),
    "not in self-attention": (SELF_ATTENTION,),
    "in neither": (SELF_ATTENTION, DECODER),
}
"""Where the sizes are left out, the first one being what the others are compared with."""
# Of `ToMePerceiverLayer.forward`.
BIAS_ARGUMENT = 4


@dataclass
class AblationArguments:
    """At which budgets."""

    _argument_group_name: ClassVar[str] = "ablation"

    flops_ratio: list[float] = field(
        default_factory=lambda: [0.7], metadata={"help": "Shares of the unmerged model's FLOPs."}
    )
    schedule: str = field(
        default=DEFAULT_SCHEDULE, metadata={"help": f"Over the layers: {', '.join(sorted(SCHEDULES))}."}
    )

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise BadInput(f"--schedule {self.schedule}: allowed are {', '.join(sorted(SCHEDULES))}")


@contextmanager
def without_sizes(model: ToMePerceiverPreTrainedModel, places: tuple[str, ...]) -> Iterator[None]:
    """Inside, attention in these places does not know the sizes of the latents."""

    def drop(layer: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*arguments[:BIAS_ARGUMENT], None, *arguments[BIAS_ARGUMENT + 1 :])

    base = model.base_model
    layers = {
        SELF_ATTENTION: list(base.encoder.self_attends),
        DECODER: [module for module in base.decoder.modules() if isinstance(module, ToMePerceiverLayer)],
    }
    hooks = [layer.register_forward_pre_hook(drop) for place in places for layer in layers[place]]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def as_markdown(rows: Sequence[Mapping[str, Any]], metric: str) -> str:
    """A table with a line for each budget and place, and what the metric changes by from sizes in both places."""

    def cells(row: Mapping[str, Any]) -> list[object]:
        change, error = (100 * row[f"{metric}_change{end}"] for end in ("", "_stderr"))
        shown = None if row["sizes"] == "in both" else with_error(change, error, "+.2f")
        return [row["flops_ratio"], row["sizes"], f"{100 * row[metric]:.2f}", shown]

    return markdown_table(["FLOPs", "sizes", f"{metric} x 100", "change"], map(cells, rows))


def main() -> None:
    model_args, data, ablation, training = parse_arguments(
        __doc__, ModelArguments, SweepDataArguments, AblationArguments, TrainerArguments
    )
    loaded = load(partial(load_sweep_task, data, model_args, training.seed), model_args, training)
    task, prepared, model = loaded.task, loaded.prepared, loaded.model
    cost_ratio = flops_ratios(model.config, loaded.input_shape, type(model).__name__)
    with naming_arguments():
        members = {
            ratio: scheduled(model.config, ablation.schedule, ratio, cost_ratio) for ratio in ablation.flops_ratio
        }
    output_dir = Path(training.output_dir)
    trainer = task_trainer(model, prepared, training, output_dir)
    rows: list[dict[str, Any]] = []
    for ratio, member in members.items():
        replace(member, proportional_attention=True).apply(model.config)
        evaluations = {}
        for name, places in PLACES.items():
            with without_sizes(model, places):
                evaluations[name] = evaluate(trainer, prepared, "merged")
            before = next(iter(evaluations.values())).predictions
            change = changes(prepared.kind, evaluations[name], before)
            score = evaluations[name].metrics[f"merged_{task.main_metric}"]
            rows.append({"flops_ratio": ratio, "sizes": name, "r": member.r, task.main_metric: score} | change)
    table = as_markdown(rows, task.main_metric)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(
        output_dir / "size_ablation.json",
        {
            "arguments": noted_arguments(model_args, data, ablation),
            "environment": describe_environment(),
            "source": asdict(task.source),
            "evaluated_on": len(prepared.evaluation[""]),
            "rows": rows,
        },
    )
    write_text(output_dir / "size_ablation.md", table + "\n")
    print(table)


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
