# SPDX-License-Identifier: Apache-2.0
"""Report of a finished run: the lines printed last, and the card of the saved checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import inference_mode

from cost_tome_perceiver import Merging, undisturbed
from experiments.measurement import Quartiles, time_interleaved
from experiments.publishing.card import Card, MergingSummary, metric_name
from experiments.publishing.tables import with_error
from experiments.runs.finetune_stages import Run
from experiments.runs.start import RunArguments
from experiments.tasks.base import Batch
from experiments.training.fingerprints import config_fingerprint
from experiments.training.output_folder import save_metrics
from experiments.training.run_record import CONFIG, CONTINUED, RunRecord, training_fields, update_record
from frontier_tome_perceiver import Frontier

# Fields of the chosen frontier row that are saved in the result files.
SAVED_FIGURES = ("flops_ratio", "divergence", "changed", "changed_bound", "who")
# Batch size and number of rounds of the timing at the end of a run.
TIMED_INPUTS, TIMING_ROUNDS = 8, 5


def leaves_checkpoint(args: RunArguments) -> bool:
    """Return whether a run saves a checkpoint: a trained one, or one merged to a budget."""
    return args.training.do_train or args.merge_args.has_budget


def report(run: Run, is_first: bool) -> list[str]:
    """Write the card of a saved checkpoint, and return the lines to print: scores, cost, merging, output folder.

    Args:
        run: a run that has finished its stages.
        is_first: whether this process writes. Every process runs the model, since each may hold a part of it.
    """
    speedup = batch_size = None
    if run.results and run.merges:
        batch = run.prepared.batch(TIMED_INPUTS)
        speedup, batch_size = _time(run, batch), len(next(iter(batch.values())))
    if leaves_checkpoint(run.args) and is_first:
        _write_card(run, speedup, batch_size)
    if speedup is None:
        return []
    lines = []
    for row in run.results:
        score = row.scores[run.task.main_metric]
        name = metric_name(run.task.main_metric)
        line = f"{row.name}: {name} {with_error(score.value, score.stderr, scale=100)}"
        if score.compared:
            change = with_error(score.change, score.change_stderr, "+.2f", scale=100)
            line += f", change, paired by example, {change}"
        lines.append(line)
    slower = "" if speedup.median >= 1 else "; slower than unmerged on this machine"
    cost = (
        f"cost: {run.model.flops_ratio(run.loaded.input_shape):.3f} of the FLOPs, {speedup.median:.2f} times as "
        f"fast as unmerged ({speedup.lower:.2f} to {speedup.upper:.2f}, batch {batch_size}){slower}"
    )
    return [*lines, cost, f"merges: {_describe_merging(run)}", *_change_lines(run), f"saved: {run.output_dir}"]


def _time(run: Run, batch: Batch) -> Quartiles:
    """Time a batch merged and unmerged, in alternating rounds, and return the speed-up."""
    inputs = {name: value.to(run.model.device) for name, value in batch.items()}

    def forward(merging: Merging) -> None:
        with merging.applied(run.model.config), inference_mode():
            run.model(**inputs)

    merged, unmerged = Merging.of(run.model.config), run.model.unmerged
    with undisturbed(run.model):
        (timing,) = time_interleaved(forward, [merged], unmerged, TIMING_ROUNDS, desc="timing")
    return timing.speedup


def _describe_merging(run: Run) -> str:
    config = run.model.config
    removed, start = sum(config.merge_schedule), config.latents_at_start
    layers = f"{removed} of {start} latents in layers, r = {config.merge_schedule}" if removed else "none in layers"
    if run.choice is not None:
        return f"{run.chosen}; {layers}"
    if config.latent_groups is not None:
        layers = f"learned latents in {start} fixed groups, then {layers}"
    method = "fixed groups" if config.merge_groups else f"{config.merge_method} {config.merge_metric}"
    return f"{layers}, {method}"


def _change_lines(run: Run) -> list[str]:
    """Return lines on how the chosen merging changes answers, measured with the weights that it was chosen for."""
    if run.choice is None:
        return []
    are_saved_weights = run.saves_untrained or run.chooses_after_training
    when = "" if are_saved_weights else "before retraining, " if run.retrains else "before training, "
    return [f"{when}{line}" for line in run.choice.lines()]


def _write_card(run: Run, speedup: Quartiles | None, batch_size: int | None) -> None:
    """Write the card of the saved checkpoint, and record its config, so that a later evaluation recognises it."""
    update_record(run.output_dir, {CONFIG: config_fingerprint(run.model.config)})
    budget = run.merge_args.budget_line
    if run.choice is not None:
        searched = "" if run.choice.divergence is None else f", calibrated on {run.samples}"
        budget = "; ".join([f"{budget}{searched}: {run.chosen}", *_change_lines(run)])
        figures = {f"merging_{name}": value for name, value in asdict(run.choice).items() if name in SAVED_FIGURES}
        save_metrics(run.output_dir, "merging", figures)
    Card(
        **run.loaded.card_fields(run.args),
        merging=MergingSummary(
            run.model.config,
            run.loaded.input_shape,
            budget,
            unmerged=run.model.unmerged.asked_of(run.model.config),
            speedup=speedup,
            batch_size=batch_size or 0,
        ),
        frontier=Frontier.of(run.model.config),
        results=run.results,
        trainings=_training_arguments(run),
        trained_on=len(run.prepared.train),
    ).write(run.output_dir)


def _training_arguments(run: Run) -> dict[str, dict[str, Any]]:
    """Return the arguments of each training, by its heading in the card."""
    if not run.training.do_train:
        return {}
    trainings = {"Finetuning" if run.retrains else "Training": training_fields(run.training)}
    if run.retrains:
        trainings["Retraining"] = training_fields(run.retraining.training_arguments(run.training))
    earlier_values = RunRecord.read(run.output_dir).notes.get(CONTINUED, {})
    trainings[list(trainings)[-1]] |= {
        "elastic": run.retraining.elastic or None,
        "distillation_weight": run.retraining.distillation_weight if run.retraining.elastic else None,
        **{f"{name}, before training was extended": value for name, value in earlier_values.items()},
    }
    return trainings
