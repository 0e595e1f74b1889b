# SPDX-License-Identifier: Apache-2.0
"""Is it latents that no token needs which merge for nothing, and would a model with fewer latents do as well?

For a text model that has a latent for each position, as one does that starts by `examples/minilm_perceiver.json`. The
first of two tables has a constant r: how many latents of positions that hold a token still stand apart from one another
at the end, and how many of the others do. The second one has no merging: all but the first few latents are cut off.
Scores change from the whole, unmerged model, paired example by example.

    python benchmarks/unused_latents.py --model_name_or_path outputs/language/stsb --task_name stsb --use_cpu \\
        --r 13 21 30 --first 96 64 48 32 --output_dir outputs/unused_latents

OUTPUT_DIR gets unused_latents.json and unused_latents.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

# A script's own folder is on the path, the repository's root, where the modules are, is not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from budget_tome_perceiver import Merging
from cost_tome_perceiver import forward_cost
from experiments.command_line import parse_arguments
from experiments.errors import BadInput, exit_on_bad_input
from experiments.files import write_text
from experiments.measurement import describe_environment, environment_line
from experiments.merging.arguments import apply_fields
from experiments.publishing.tables import markdown_table, with_error
from experiments.runs.checkpoint_task import SweepDataArguments, load_sweep_task
from experiments.runs.start import Loaded, load
from experiments.training.evaluation import changes, evaluate
from experiments.training.identity import noted_arguments
from experiments.training.model_arguments import ModelArguments
from experiments.training.output_folder import write_json
from experiments.training.stage import task_trainer
from experiments.training.trainer_arguments import TrainerArguments
from modeling_tome_perceiver import ToMePerceiverPreTrainedModel


@dataclass
class UnusedArguments:
    """Which rows."""

    _argument_group_name: ClassVar[str] = "unused latents"

    r: list[int] = field(default_factory=list, metadata={"help": "Latents merged in each layer, one or more."})
    first: list[int] = field(default_factory=list, metadata={"help": "Latents that are left without merging."})

    def __post_init__(self) -> None:
        if not self.r and not self.first:
            raise BadInput("--r, --first: none is given; allowed is one of them or both")
        for name in ("r", "first"):
            for value in getattr(self, name):
                if value < 1:
                    raise BadInput(f"--{name} {value}: allowed are integers of 1 or more")


@contextmanager
def first_latents(model: ToMePerceiverPreTrainedModel, count: int) -> Iterator[None]:
    """Inside, the model has its first learned latents only."""
    embeddings, config = model.base_model.embeddings, model.config
    latents, config.num_latents = embeddings.latents, count
    embeddings.latents = nn.Parameter(latents.detach()[:count], requires_grad=False)
    try:
        yield
    finally:
        embeddings.latents, config.num_latents = latents, len(latents)


def stand_apart(latent_sources: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """How many latents of positions with a token, and of those without, do not share one with another of their kind.

    Args:
        latent_sources: (B, M, N) of 0 and 1, which latents each one left stands for.
        tokens: (B,) of the N positions, the first ones.

    Returns:
        (B,) the latents left that stand for at least one with a token, and (B,) those that stand for others alone.
    """
    there = torch.arange(latent_sources.shape[2], device=latent_sources.device) < tokens[:, None]
    with_token = (latent_sources * there[:, None]).amax(dim=2) > 0
    stands = latent_sources.amax(dim=2) > 0
    return with_token.sum(dim=1), (stands & ~with_token).sum(dim=1)


@torch.inference_mode()
def counted(loaded: Loaded, batch_size: int) -> dict[str, float]:
    """Means over the evaluated inputs: tokens, and what stands apart of the latents with one and without."""
    model = loaded.model.eval()
    loader = DataLoader(loaded.prepared.evaluation[""], batch_size, collate_fn=loaded.prepared.collate)
    found: list[Tensor] = []
    for batch in tqdm(loader, desc=f"r = {model.r}", disable=None):
        mask = batch["attention_mask"].to(model.device)
        outputs = model.base_model(
            batch["input_ids"].to(model.device), attention_mask=mask, output_latent_sources=True, return_dict=True
        )
        tokens = mask.sum(dim=1)
        found.append(torch.stack([tokens, *stand_apart(outputs.latent_sources, tokens)]))
    tokens, with_token, without = torch.cat(found, dim=1).double().mean(dim=1).tolist()
    return {"tokens": tokens, "apart_with_token": with_token, "apart_without": without}


def as_markdown(rows: Sequence[Mapping[str, Any]], metric: str, latents: int) -> str:
    """The two tables."""

    def score(row: Mapping[str, Any]) -> list[object]:
        change, error = (100 * row[f"{metric}_change{ending}"] for ending in ("", "_stderr"))
        return [row["name"], f"{row['flops_ratio']:.3f}", f"{100 * row[metric]:.2f}", with_error(change, error, "+.2f")]

    def cells(row: Mapping[str, Any]) -> list[object]:
        of_others = f"{row['apart_without']:.1f} of {latents - row['tokens']:.1f}"
        return [*score(row), f"{row['apart_with_token']:.1f} of {row['tokens']:.1f}", of_others]

    columns = ["", "share of the FLOPs", f"{metric} x 100", "change"]
    merged, cut = ([row for row in rows if ("tokens" in row) == merges] for merges in (True, False))
    tables = []
    if merged:
        tables.append(markdown_table([*columns, "apart, with a token", "without"], map(cells, merged)))
    if cut:
        tables.append(markdown_table(columns, map(score, cut)))
    return "\n\n".join(tables)


def main() -> None:
    model_args, data, unused, training = parse_arguments(
        __doc__, ModelArguments, SweepDataArguments, UnusedArguments, TrainerArguments
    )
    loaded = load(partial(load_sweep_task, data, model_args, training.seed), model_args, training)
    task, prepared, model = loaded.task, loaded.prepared, loaded.model
    config, architecture = model.config, type(model).__name__
    if task.input_name != "input_ids" or config.num_latents < config.max_position_embeddings:
        raise BadInput(
            f"--model_name_or_path {model_args.model_name_or_path}: allowed is a text model with a latent for each "
            f"position; it has {config.num_latents} latents"
        )
    for count in unused.first:
        if count > config.num_latents:
            raise BadInput(f"--first {count}: allowed are 1 to {config.num_latents}, the latents of the model")
    apply_fields(config, {"r": 0})
    trainer = task_trainer(model, prepared, training, Path(training.output_dir))

    def flops() -> int:
        return forward_cost(config, loaded.input_shape, architecture).total_with_matching

    def evaluated(name: str) -> dict[str, Any]:
        evaluation = evaluate(trainer, prepared, "eval")
        score = evaluation.metrics[f"eval_{task.main_metric}"]
        change = changes(prepared.kind, evaluation, unmerged.predictions)
        return {"name": name, "flops_ratio": flops() / whole, task.main_metric: score} | change

    whole, unmerged = flops(), evaluate(trainer, prepared, "eval")
    rows = []
    for r in unused.r:
        with Merging.of(config).by(r).applied(config):
            rows.append(evaluated(f"r = {r}") | counted(loaded, training.per_device_eval_batch_size))
    for count in unused.first:
        with first_latents(model, count):
            rows.append(evaluated(f"first {count} latents"))
    environment = describe_environment()
    figures = {
        "arguments": noted_arguments(model_args, data, unused),
        "environment": environment,
        "source": asdict(task.source),
        "evaluated_on": len(prepared.evaluation[""]),
        task.main_metric: unmerged.metrics[f"eval_{task.main_metric}"],
        "rows": rows,
    }
    text = f"{as_markdown(rows, task.main_metric, config.num_latents)}\n\n{environment_line(environment)}\n"
    write_json(Path(training.output_dir) / "unused_latents.json", figures)
    write_text(Path(training.output_dir) / "unused_latents.md", text)
    print(text, end="")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
