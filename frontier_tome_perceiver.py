# SPDX-License-Identifier: Apache-2.0
"""Frontier of a model: what merging costs against how much it changes the outputs, measured on unlabelled samples.

`calibrate` searches once for the mildest way to merge at each of several shares of the FLOPs. It goes from mild to
strong: the candidates of a share are the best ones of the share before, made stronger in one place. Divergence of the
outputs on a quarter of the samples ranks them, and the same rows of latents serve all candidates that merge alike up to
a layer. The other samples take no part in that. On them each row of the frontier is measured, so that `choose` can
promise how many answers change. No clock takes part but where time is asked for, and each row of samples is computed by
one thread, so that the result does not depend on the machine's load or its number of threads.

Letters: B batch, S inputs, P positions that are compared, N latents, M latents left, L layers, K classes.
"""

# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import accumulate, pairwise, product, zip_longest
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

# As in the module of the layers, which says why.
try:
    from .configuration_tome_perceiver import FRONTIER_SETTINGS, MERGE_METRICS, MOST_ROWS, check_share
    from .cost_tome_perceiver import (
        DEFAULT_SCHEDULE,
        SCHEDULES,
        SKIP_BLOCKS,
        FlopsShare,
        Merging,
        interleaved_seconds,
        latents_left,
        out_of_reach,
        scheduled,
        undisturbed,
        weakest,
        whole_schedule,
    )
    from .layers_tome_perceiver import METRICS, MergePlan, call_layer, latent_bias, layer_matchers
    from .merging_tome_perceiver import check_merge_method
    from .modeling_tome_perceiver import EncodedInputs, decode_encoded, padding_bias
except ImportError:
    if __package__:
        raise
    from configuration_tome_perceiver import FRONTIER_SETTINGS, MERGE_METRICS, MOST_ROWS, check_share
    from cost_tome_perceiver import (
        DEFAULT_SCHEDULE,
        SCHEDULES,
        SKIP_BLOCKS,
        FlopsShare,
        Merging,
        interleaved_seconds,
        latents_left,
        out_of_reach,
        scheduled,
        undisturbed,
        weakest,
        whole_schedule,
    )
    from layers_tome_perceiver import METRICS, MergePlan, call_layer, latent_bias, layer_matchers
    from merging_tome_perceiver import check_merge_method
    from modeling_tome_perceiver import EncodedInputs, decode_encoded, padding_bias

Batch = Mapping[str, Tensor]
"""What a model takes by name, B rows each."""

GROUPS = "groups"
"""In the place of a matching method: fixed groups of latents, read off their mean similarity over the samples."""
SEARCHED = (("leader", "hidden"), ("leader", "key"), ("bipartite", "hidden"), ("bipartite", "key"), (GROUPS, "hidden"))
# Without samples: `leader` on keys lost least of what looks at no data (docs/results/choice, docs/results/language).
UNSEEN_METHOD, UNSEEN_METRIC = "leader", "key"

CONFIDENCE = 0.95
# What a search may spend, in unmerged passes over one sample: this many for each sample, and at most this many FLOPs, a
# few minutes on two cores.
PASSES_PER_SAMPLE, SEARCH_FLOPS = 12, 3e13
# Samples that run together, and positions of each that are compared where each position has an output.
ROWS, POSITIONS = 16, 16
# Candidates whose divergence is at most this many times the least are tied; the one that merges in fewest layers wins.
TIED = 1.1
# Bytes of latents that are kept for candidates that merge alike up to a layer.
KEPT_BYTES = 2**30
# With fewer samples a ranking, or a share of a group, is mostly noise.
FEW_SAMPLES = 32
TIMED_ROUNDS = 15
DAMAGED = "the weights of the model are damaged or training has diverged"


@dataclass(frozen=True)
class FrontierRow:
    """One way to merge, with its cost and what it changes; `None` for what was not measured.

    Attributes:
        merging: its settings.
        flops_ratio: share of the unmerged model's FLOPs, with the matching.
        divergence: mean divergence of the outputs from the unmerged ones (`output_divergence`).
        changed: share of samples whose answer changes.
        changed_bound: upper bound of that share for samples of the same kind, at 95 % confidence.
        who: whose answers change (`_who_pays`).
        speedup: times as fast as unmerged, on this machine.
    """

    merging: Merging
    flops_ratio: float
    divergence: float | None = None
    changed: float | None = None
    changed_bound: float | None = None
    who: dict[str, Any] = field(default_factory=dict)
    speedup: float | None = None

    @property
    def name(self) -> str:
        """What merges, in a few words."""
        merging, r, parts = self.merging, self.merging.r, []
        if merging.latent_groups is not None:
            parts.append(f"{max(merging.latent_groups) + 1} groups of learned latents")
        if merging.merge_groups is not None:
            groups = enumerate(merging.merge_groups, 1)
            left = [f"{max(each) + 1} in layer {layer}" for layer, each in groups if each is not None]
            parts.append(f"fixed groups, {', '.join(left)}")
        elif isinstance(r, int) and r:
            parts.append(f"{merging.merge_method} on {merging.merge_metric}, {r} in each layer")
        elif isinstance(r, list) and any(r):
            removed = [f"{count} in layer {layer}" for layer, count in enumerate(r, 1) if count]
            parts.append(f"{merging.merge_method} on {merging.merge_metric}, {', '.join(removed)}")
        return (
            "; ".join(parts or ["nothing merges"]) + f" ({merging.num_blocks} block{'s' * (merging.num_blocks != 1)})"
        )

    def lines(self) -> list[str]:
        """Return what changes and whose answers change, in at most three lines."""
        if self.changed is None:
            return []
        samples, tenth = self.who["samples"], self.who["worst_tenth"]
        bound = "" if self.changed_bound is None else f", below {self.changed_bound:.2%} at 95 % confidence"
        lines = [f"changed answers: {self.changed:.2%} of {samples}{bound}"]
        if self.who["groups"]:
            # A config that was saved has them by name, which puts "over 9" before "up to 9 tokens".
            groups = sorted(self.who["groups"].items(), key=lambda group: group[0].startswith("over "))
            shares = [f"{name} {share:.1%} of {count}" for name, (share, count) in groups]
            lines.append(f"changed most: {', '.join(shares)}")
        return [*lines, f"the tenth that changes most holds {tenth:.0%} of the divergence"]


@dataclass(frozen=True)
class Frontier:
    """Rows from mild to strong, and what they were measured on; `config.merge_frontier` holds the same.

    Attributes:
        rows: by falling share of the FLOPs.
        num_blocks: that the unmerged model runs.
        input_shape: of one input, that FLOPs are for.
        searched, held_out: samples that chose the rows, and samples that measured them.
        weights: a few of the model's weights, by which a frontier of other weights is known.
    """

    rows: list[FrontierRow]
    num_blocks: int
    input_shape: tuple[int, ...]
    searched: int
    held_out: int
    weights: list[float] = field(repr=False)

    @classmethod
    def of(cls, config: Any) -> Frontier | None:
        """Return the frontier that a config holds, `None` if it holds none."""
        kept = config.merge_frontier
        if kept is None:
            return None
        figures = [each.name for each in fields(FrontierRow) if each.name != "merging"]
        rows = []
        for row in kept["rows"]:
            given = {name: row[name] for name in figures if name in row}
            rows.append(FrontierRow(Merging.of(config.merged_as(row)), **given))
        others = {each.name: kept[each.name] for each in fields(cls)}
        return cls(**others | {"rows": rows, "input_shape": tuple(kept["input_shape"])})

    def is_of(self, model: Any) -> bool:
        """Return whether it was measured on the weights of a model, but for rounding to half precision."""
        return _same_weights(self.weights, _some_weights(model))

    def kept(self) -> dict[str, Any]:
        """Return the frontier as `config.merge_frontier` holds it, of JSON's types."""
        kept = asdict(self) | {"input_shape": list(self.input_shape)}
        for row in kept["rows"]:
            del row["speedup"]
            settings = row["merging"].items()
            row["merging"] = {name: each for name, each in settings if name in FRONTIER_SETTINGS and each is not None}
        return kept

    def __str__(self) -> str:
        """Return the rows as a Markdown table."""
        lines = [
            "| share of FLOPs | changed answers | at most (95 %) | divergence | what merges |",
            "|---|---|---|---|---|",
        ]
        for row in self.rows:
            figures = ((row.changed, ".2%"), (row.changed_bound, ".2%"), (row.divergence, ".3g"))
            shown = " | ".join("" if value is None else format(value, form) for value, form in figures)
            lines.append(f"| {row.flops_ratio:.3f} | {shown} | {row.name} |")
        return "\n".join([*lines, f"\nChosen on {self.searched} samples, measured on {self.held_out} others."])


@dataclass(frozen=True)
class Choice:
    """What a model merges now, and on what grounds.

    Attributes:
        chosen: the row that was set.
        frontier: that it was chosen from; `None` for a schedule that needs no data.
    """

    chosen: FrontierRow
    frontier: Frontier | None = None

    def __str__(self) -> str:
        """Return the chosen row in a few lines."""
        row = self.chosen
        speed = "" if row.speedup is None else f", {row.speedup:.2f} times as fast as unmerged"
        return "\n".join([f"{row.flops_ratio:.3f} of the FLOPs{speed}: {row.name}", *row.lines()])


def choose(
    model: Any,
    flops_ratio: float | None = None,
    latency_ratio: float | None = None,
    max_changed: float | None = None,
    samples: Batch | Iterable[Batch] | None = None,
    schedules: Sequence[str] | None = None,
    **options: Any,
) -> Choice:
    """Choose what merges within one budget; `model.merge_to` sets it, and describes budgets, samples and errors.

    Args:
        model: a head with logits.
        schedules: names of `SCHEDULES` or `SKIP_BLOCKS` to choose from, in place of a search.
        options: of `calibrate`.
    """
    budgets = {"flops_ratio": flops_ratio, "latency_ratio": latency_ratio, "max_changed": max_changed}
    given = [(name, value) for name, value in budgets.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"use one of flops_ratio, latency_ratio and max_changed, not {len(given)}")
    check_share(*given[0])
    batches = [] if samples is None else _batches(samples)
    # A frontier that is there is used; one that is asked for in another way is measured anew.
    frontier = Frontier.of(model.config) if schedules is None and not options else None
    if frontier is None and (not batches or schedules is not None and max_changed is None):
        if unused := set(options) - {"input_shape", "merge_methods", "merge_metrics"}:
            raise ValueError(f"{min(unused)}: needs samples to calibrate on, and no schedules")
        if flops_ratio is not None:
            rows = _schedule_rows(model, [flops_ratio], batches, schedules, **options)
            return Choice(max(rows, key=lambda row: row.flops_ratio))
        if max_changed is not None or not batches:
            raise ValueError(f"{given[0][0]}: needs samples, or model.calibrate(samples) before")
        rows = _schedule_rows(model, [step / 40 for step in range(40, 0, -1)], batches, schedules, **options)
        return Choice(_fast_enough(model, rows, latency_ratio, batches))
    if frontier is None:
        if flops_ratio is not None:
            options["flops_ratios"] = [*options.get("flops_ratios", ()), flops_ratio]
        frontier = calibrate(model, batches, schedules=schedules, **options)
    elif max_changed is None and not frontier.is_of(model):
        warnings.warn("the frontier was measured on other weights; call model.calibrate(samples) again", stacklevel=3)
    if flops_ratio is not None:
        # The figures of a row are what `model(..., flops_ratio=...)` chooses by.
        row = model.config.frontier_row(flops_ratio)
        return Choice(frontier.rows[model.config.merge_frontier["rows"].index(row)], frontier)
    if max_changed is not None:
        return Choice(_promised(model, frontier, max_changed), frontier)
    return Choice(_fast_enough(model, frontier.rows, latency_ratio, batches), frontier)


def _schedule_rows(
    model: Any,
    ratios: Sequence[float],
    batches: Sequence[Batch],
    schedules: Sequence[str] | None,
    input_shape: Sequence[int] | None = None,
    merge_methods: Sequence[str] | None = None,
    merge_metrics: Sequence[str] | None = None,
) -> list[FrontierRow]:
    """Meet shares of the FLOPs by schedules that need no data; a ValueError if none of them reaches any share."""
    ways = _checked_ways(schedules, merge_methods or [UNSEEN_METHOD], merge_metrics or [UNSEEN_METRIC])
    share = _flops_share(model, batches, input_shape)
    base = replace(model.unmerged, merge_method=ways[0][0], merge_metric=ways[0][1])
    rows, errors = [], []
    for ratio, name in product(ratios, schedules or [DEFAULT_SCHEDULE]):
        try:
            merging = scheduled(share.config, name, ratio, share, base)
            rows.append(FrontierRow(merging, share(merging)))
        except ValueError as error:
            errors.append(error)
    if not rows:
        raise errors[0]
    return rows


def _promised(model: Any, frontier: Frontier, max_changed: float) -> FrontierRow:
    """Return the cheapest row that changes at most a share of the answers, at 95 % confidence.

    The rows are tested from the mildest on, and the first that fails ends the tests, so that their number needs no
    correction (fixed-sequence testing: Angelopoulos et al., 2021, "Learn then Test", arXiv:2110.01052).

    Raises:
        ValueError: if the samples are too few for any promise, or the frontier is of other weights.
    """
    if not frontier.is_of(model):
        raise ValueError("max_changed: the frontier was measured on other weights; call model.calibrate(samples) again")
    needed = held_out_to_promise(max_changed)
    if frontier.held_out < needed:
        raise ValueError(
            f"max_changed={max_changed}: {frontier.held_out} held-out samples cannot promise it at 95 % confidence; "
            f"calibrate on {math.ceil(needed * 4 / 3) + ROWS} samples or more"
        )
    passed = None
    for row in frontier.rows:
        if row.changed_bound is None or row.changed_bound > max_changed:
            break
        passed = row
    if passed is not None:
        return passed
    warnings.warn(
        f"max_changed={max_changed}: even the mildest row of the frontier may change more, so nothing merges",
        stacklevel=4,
    )
    who = {"samples": frontier.held_out, "groups": {}, "worst_tenth": 0.0}
    return FrontierRow(model.unmerged, 1.0, 0.0, 0.0, 0.0, who)


def _fast_enough(
    model: Any, rows: Sequence[FrontierRow], latency_ratio: float | None, batches: Sequence[Batch]
) -> FrontierRow:
    """Return the row that changes least of those that take at most a share of the unmerged model's time.

    Raises:
        ValueError: if no row is as fast, or there is no batch to time.
    """
    assert latency_ratio is not None
    if not batches:
        raise ValueError(f"latency_ratio={latency_ratio}: needs samples, whose time is measured")
    inputs = {name: value.to(model.device) for name, value in batches[0].items()}

    def run(merging: Merging) -> None:
        with merging.applied(model.config):
            model(**inputs)

    rows = [FrontierRow(model.unmerged, 1.0, 0.0), *rows]
    with undisturbed(model):
        seconds = interleaved_seconds(run, [row.merging for row in rows], TIMED_ROUNDS)
    speedups = [median(taken[0] / taken[place] for taken in seconds) for place in range(len(rows))]
    timed = [replace(row, speedup=speedup) for row, speedup in zip(rows, speedups, strict=True)]
    within = [row for row, speedup in zip(timed, speedups, strict=True) if 1 / speedup <= latency_ratio]
    if not within:
        raise ValueError(
            f"latency_ratio={latency_ratio} is out of reach: the fastest that was timed takes "
            f"{1 / max(speedups):.2f} of the unmerged model's time here"
        )
    return min(within, key=lambda row: (row.divergence or 0.0, -row.flops_ratio))


def calibrate(
    model: Any,
    samples: Batch | Iterable[Batch],
    seconds: float | None = None,
    flops_ratios: Sequence[float] | None = None,
    schedules: Sequence[str] | None = None,
    merge_methods: Sequence[str] | None = None,
    merge_metrics: Sequence[str] | None = None,
    input_shape: Sequence[int] | None = None,
    log_file: str | os.PathLike | None = None,
) -> Frontier:
    """Search for the frontier of a model, measure it, and keep it in `config.merge_frontier`.

    Args:
        model: a head with logits, on the device that counts.
        samples: what the model takes, a batch or several. Of `labels` only the places that are asked for have effect.
        seconds: ends the search after about this time with the best it has.
        flops_ratios: shares of the FLOPs to have a row for, beside those from 0.9 down to the least in reach.
        schedules: names of `SCHEDULES` or `SKIP_BLOCKS` to hold the search to.
        merge_methods, merge_metrics: methods (or `"groups"`) and metrics to hold it to.
        input_shape: of one input, (1, S) or (1, 3, height, width), that FLOPs are for; by default the longest sample.
        log_file: JSON file of the measured divergences, from which a search that was stopped goes on.

    Raises:
        ValueError: in one line, for samples or names that cannot be searched with, or shares out of reach.
        FloatingPointError: for outputs that are not finite.
    """
    if seconds is not None and (isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds >= 0):
        raise ValueError(f"seconds={seconds!r}: must be a number of 0 or more")
    started, seconds = time.monotonic(), math.inf if seconds is None else seconds
    ways = _checked_ways(schedules, merge_methods, merge_metrics)
    if isinstance(flops_ratios, (int, float, str)):
        raise ValueError(f"flops_ratios={flops_ratios!r}: must be a list, [{flops_ratios!r}]")
    if len(flops_ratios or ()) > MOST_ROWS // 2:
        raise ValueError(f"flops_ratios: {len(flops_ratios or ())} shares; must be at most {MOST_ROWS // 2}")
    for ratio in flops_ratios or ():
        check_share("flops_ratios", ratio)
    batches = _batches(samples)
    share = _flops_share(model, batches, input_shape)
    with undisturbed(model), model.unmerged.applied(model.config), _one_thread_a_chunk(model) as threads:
        chunks = [_Chunk(model, batch) for batch in _pieces(batches, share.unmerged_flops)]
        held_out = [chunk for place, chunk in enumerate(chunks) if place % 4]
        runner = _Runner(model, chunks[::4], share, threads)
        rows_given = sum(chunk.rows for chunk in chunks)
        if rows_given < FEW_SAMPLES:
            said = f"{rows_given} rows; with fewer than {FEW_SAMPLES} the ranking is mostly noise"
            warnings.warn(f"samples: {said}", stacklevel=4)
        elif runner.all_alike:
            said = "the model answers all of them alike, so they hardly tell what merging changes"
            warnings.warn(f"samples: {said}", stacklevel=4)
        space = _Space(runner, ways, schedules)
        passes = min(PASSES_PER_SAMPLE * rows_given, SEARCH_FLOPS / share.unmerged_flops)
        found = _Search(runner, space, log_file, started + 0.6 * seconds).run(flops_ratios or (), passes)
        rows = _measured(runner, found, held_out, started + seconds)
    measured, weights = rows[0].who.get("samples", 0), _some_weights(model)
    frontier = Frontier(rows, model.unmerged.num_blocks, share.input_shape, runner.rows, measured, weights)
    model.config.merge_frontier = frontier.kept()
    model.config.check_merging()
    return frontier


@dataclass(frozen=True)
class _Candidate:
    """Numbers of latents over the layers, and a way to match.

    Attributes:
        latents: how many read the inputs.
        start: their groups of the N learned latents; `None` for none.
        left: latents left after each layer that runs.
        method, metric: as in the config, or `GROUPS` and the metric that groups are read off.
    """

    latents: int
    start: tuple[int, ...] | None
    left: tuple[int, ...]
    method: str
    metric: str

    @property
    def key(self) -> str:
        return json.dumps([self.start, self.left, self.method, self.metric])

    @property
    def removed(self) -> list[int]:
        """Latents that merge into others in each layer."""
        return [before - after for before, after in pairwise([self.latents, *self.left])]


Offspring = _Candidate | None
"""A candidate within a share, or `None` where there is none."""


class _Chunk:
    """A few samples, with what the encoder made of them.

    Attributes:
        inputs: what `forward` takes, without labels.
        positions: (B, P) that are compared where each position has an output; `None` where each sample has one.
        tokens: (B,) tokens that are no padding; `None` without a mask.
        preprocessed: as `EncodedInputs` has it; `None` until it is needed.
        latents: states that candidates share, by what decides them (`_Runner.prefix`).
        before: unmerged outputs, (B, P or 1, K), once they are known.
    """

    def __init__(self, model: Any, batch: Batch) -> None:
        self.inputs = {name: value.to(model.device) for name, value in batch.items()}
        labels, mask = self.inputs.pop("labels", None), self.inputs.get("attention_mask")
        taken = self.inputs[_input_name(model, self.inputs)]
        self.rows = len(taken)
        self.tokens = None if mask is None or mask.dim() != 2 else mask.sum(dim=1)
        self.positions = None
        if _is_masked_lm(model):
            asked = torch.ones(taken.shape, dtype=torch.bool, device=taken.device) if mask is None else mask > 0
            # A model of S positions answers them all, also where the text is shorter.
            labelled = asked if labels is None else labels[:, : taken.shape[1]] != -100
            if labelled.shape == asked.shape and labelled.any(dim=1).all():
                asked = labelled
            # At most `POSITIONS`, spread evenly over those that are asked for in each row.
            order = torch.sort((~asked).int(), dim=1, stable=True).indices
            number, count = asked.sum(dim=1, keepdim=True).clamp(min=1), min(POSITIONS, asked.shape[1])
            self.positions = order.gather(1, torch.arange(count, device=asked.device) * number // count)
        self.before: Tensor | None = None
        self.forget()

    def forget(self) -> None:
        """Let go of what can be computed again."""
        self.preprocessed: tuple[Tensor, Any, Any] | None = None
        self.latents: dict[tuple, tuple[Tensor, Tensor | None]] = {}


class _Runner:
    """Run candidates on samples, and compute what several of them have in common once.

    Args:
        model: a head with logits, in evaluation mode, merging nothing.
        chunks: samples that choose.
        flops_share: of the model.
        threads: chunks that run at a time.
    """

    def __init__(self, model: Any, chunks: list[_Chunk], flops_share: FlopsShare, threads: int) -> None:
        self.model, self.config, self.encoder = model, model.config, model.base_model.encoder
        self.chunks, self.flops_share, self.pool = chunks, flops_share, ThreadPoolExecutor(threads)
        self.rows = sum(chunk.rows for chunk in chunks)
        numbers = self.config.problem_type == "regression" or self.config.num_labels == 1
        self.regression = not _is_masked_lm(model) and (numbers or "OpticalFlow" in type(model).__name__)
        latents, layers = self.config.num_latents, self.config.num_self_attention_layers
        self.unmerged = _Candidate(latents, None, (latents,) * layers, "leader", "key")
        self.groups: dict[tuple, list[int]] = {}
        self.kept_bytes = 0
        for chunk, outputs in zip(
            chunks, self.map(lambda chunk: self.outputs(chunk, self.unmerged), chunks), strict=True
        ):
            chunk.before = outputs
        before = torch.cat([chunk.before.flatten(0, 1) for chunk in chunks if chunk.before is not None]).double()
        if not before.isfinite().all():
            raise FloatingPointError(f"the outputs of the model are not finite: {DAMAGED}")
        self.all_alike = len(before) > 1 and bool((before == before[:1]).all())
        self.deviation = float(before.std(dim=0).mean()) if len(before) > 1 else 0.0

    def map(self, function: Callable, values: Iterable[Any]) -> list[Any]:
        """Call a function with each value, in threads, without gradients."""
        return list(self.pool.map(torch.no_grad()(function), values))

    def share(self, candidate: _Candidate) -> float:
        """Return a candidate's share of the FLOPs."""
        method = None if candidate.method == GROUPS else candidate.method
        return self.flops_share.of([candidate.latents, *candidate.left], method, candidate.metric)

    def plan(self, candidate: _Candidate) -> MergePlan:
        """Return what a candidate merges, with the groups read off the samples if it has any."""
        start, schedule = None if candidate.start is None else list(candidate.start), candidate.removed
        if candidate.method != GROUPS:
            return MergePlan(schedule, None, start, candidate.method, candidate.metric)
        groups = [self._groups(candidate, layer) if r else None for layer, r in enumerate(schedule)]
        return MergePlan(schedule, groups, start, UNSEEN_METHOD, UNSEEN_METRIC)

    def merging(self, candidate: _Candidate) -> Merging:
        """Return a candidate as settings of the config."""
        plan, base = self.plan(candidate), self.model.unmerged
        blocks = len(candidate.left) // self.config.num_self_attends_per_block
        common = {"num_blocks": blocks, "latent_groups": plan.latent_groups}
        if any(plan.merge_groups or ()):
            return base.by(0, merge_groups=plan.merge_groups, **common)
        return base.by(plan.schedule, merge_method=plan.merge_method, merge_metric=plan.merge_metric, **common)

    def _groups(self, candidate: _Candidate, layer: int) -> list[int]:
        key = (*self.prefix(candidate, layer), candidate.left[layer])
        if key not in self.groups:
            alike = self.similarity(replace(candidate, left=candidate.left[:layer]), candidate.metric)
            self.groups[key] = average_linkage(alike, candidate.left[layer])
        return self.groups[key]

    def similarity(self, candidate: _Candidate, metric: str) -> Tensor:
        """Return (N, N) mean cosine similarities, in float64, of the latents that leave a candidate's last layer."""
        layer, plan = len(candidate.left), self.plan(candidate)
        module = self._module(layer)

        def similarities(chunk: _Chunk) -> Tensor:
            latents, sizes = self._encode(chunk, candidate, plan)
            bias = latent_bias(self.config, sizes, latents.dtype)
            compared = METRICS[metric](module.attention(latents, None, bias, False))
            # As in matching: half precision is too coarse to compare in.
            compared = F.normalize(compared.to(torch.promote_types(compared.dtype, torch.float32)), dim=-1)
            return (compared @ compared.transpose(1, 2)).sum(dim=0).to("cpu", torch.float64)

        total = torch.stack(self.map(similarities, self.chunks)).sum(dim=0)
        if not total.isfinite().all():
            raise FloatingPointError(f"the similarities of the latents of layer {layer} are not finite: {DAMAGED}")
        return total / self.rows

    def _module(self, layer: int) -> Any:
        return self.encoder.self_attends[layer % len(self.encoder.self_attends)]

    def prefix(self, candidate: _Candidate, layer: int) -> tuple:
        """Return what decides the latents that reach a layer."""
        left = candidate.left[:layer]
        if all(count == candidate.latents for count in left):
            return (candidate.start, layer)
        # A method may take the depth of a layer into account.
        layers = 0 if candidate.method == GROUPS else len(candidate.left)
        return (candidate.start, left, layers, candidate.method, candidate.metric)

    def _encode(self, chunk: _Chunk, candidate: _Candidate, plan: MergePlan) -> tuple[Tensor, Tensor | None]:
        """Return the latents that leave the last layer, and their sizes, from the last state that is kept."""
        layers = len(candidate.left)
        prefixes = [self.prefix(candidate, layer) for layer in range(layers + 1)]
        kept = chunk.latents  # Another thread may replace it meanwhile (`_keep`).
        done = next((layer for layer in range(layers, -1, -1) if prefixes[layer] in kept), None)
        if done is not None:
            latents, sizes = kept[prefixes[done]]
        else:
            inputs, mask = self._preprocess(chunk)[0], chunk.inputs.get("attention_mask")
            bias = None if mask is None else padding_bias(mask, inputs)
            learned = self.model.base_model.embeddings(batch_size=chunk.rows)
            read = self.encoder.read(learned, inputs, bias, plan)
            done, latents, sizes = 0, read.hidden_states, read.sizes
            self._keep(chunk, prefixes[0], latents, sizes)
        matchers = layer_matchers(plan, latents.device)
        for index in range(done, layers):
            bias, module = latent_bias(self.config, sizes, latents.dtype), self._module(index)
            layer = call_layer(module, latents, sizes, matchers[index], None, bias, False)
            latents, sizes = layer.hidden_states, layer.sizes
            self._keep(chunk, prefixes[index + 1], latents, sizes)
        return latents, sizes

    def _preprocess(self, chunk: _Chunk) -> tuple[Tensor, Any, Any]:
        preprocessed = chunk.preprocessed
        if preprocessed is None:
            preprocessed = self.model.base_model.preprocess(chunk.inputs[_input_name(self.model, chunk.inputs)])
            # Pixels take more memory than latents: they are kept if all of them fit.
            if preprocessed[0].nbytes * len(self.chunks) < KEPT_BYTES:
                chunk.preprocessed = preprocessed
        return preprocessed

    def _keep(self, chunk: _Chunk, prefix: tuple, latents: Tensor, sizes: Tensor | None) -> None:
        self.kept_bytes += latents.nbytes
        if self.kept_bytes > KEPT_BYTES:
            self.kept_bytes = 0
            for each in [*self.chunks, chunk]:
                each.latents = {}
        chunk.latents[prefix] = latents, sizes

    def outputs(self, chunk: _Chunk, candidate: _Candidate) -> Tensor:
        """Return a candidate's outputs, (B, P or 1, K)."""
        latents, sizes = self._encode(chunk, candidate, self.plan(candidate))
        encoded = EncodedInputs(self._preprocess(chunk), latents, sizes, chunk.positions)
        logits = decode_encoded(self.model, encoded, chunk.inputs).get("logits")
        if not isinstance(logits, Tensor):
            name = type(self.model).__name__
            raise ValueError(f"samples: {name} has no single tensor of logits to compare; use a budget without samples")
        return logits[:, None] if logits.dim() == 2 else logits.flatten(1, -2)

    def compared(self, chunk: _Chunk, candidate: _Candidate) -> Compared:
        """Compare a candidate's outputs with the unmerged ones."""
        before, after = chunk.before, self.outputs(chunk, candidate)
        assert before is not None
        divergence = output_divergence(after.flatten(0, 1).double(), before.flatten(0, 1).double(), self.regression)
        # JSON has no infinity, so outputs that are not finite get the largest float32. Rounding may go below 0.
        largest = torch.finfo(torch.float32).max
        divergence = divergence.nan_to_num(largest, largest).clamp(0, largest).view(chunk.rows, -1).mean(dim=1)
        # One position of each sample answers for it, since positions of one sample are not independent.
        rows = range(chunk.rows)
        place = [row % before.shape[1] for row in rows]
        one_before, one_after = before[rows, place].double(), after[rows, place].double()
        if self.regression:
            changed = ~((one_after - one_before).abs().amax(dim=-1) <= 0.1 * self.deviation)
        else:
            changed = one_after.argmax(dim=-1) != one_before.argmax(dim=-1)
        changed |= ~one_after.isfinite().all(dim=-1)
        return Compared(divergence.cpu(), changed.double().cpu(), one_before.argmax(dim=-1).cpu())


class Compared(NamedTuple):
    """What merging changes of some samples, (B,) each.

    Attributes:
        divergence: `output_divergence`, the mean over the positions.
        changed: 1 where the answer is another, else 0.
        answers: class of the unmerged answer.
    """

    divergence: Tensor
    changed: Tensor
    answers: Tensor


def _measured(
    runner: _Runner, candidates: Sequence[_Candidate], held_out: Sequence[_Chunk], deadline: float
) -> list[FrontierRow]:
    """Measure candidates on samples that took no part in the search."""
    rows = [FrontierRow(runner.merging(candidate), runner.share(candidate)) for candidate in candidates]
    for chunk in runner.chunks:
        chunk.forget()

    def compare(chunk: _Chunk) -> list[Compared] | None:
        if time.monotonic() > deadline:
            return None
        chunk.before = runner.outputs(chunk, runner.unmerged)
        compared = [runner.compared(chunk, candidate) for candidate in candidates]
        chunk.forget()
        bar.update(chunk.rows)
        return compared

    with tqdm(total=sum(chunk.rows for chunk in held_out), desc="measuring", unit="sample", disable=None) as bar:
        found = runner.map(compare, held_out)
    done = [(chunk, compared) for chunk, compared in zip(held_out, found, strict=True) if compared is not None]
    chunks = [chunk for chunk, _ in done]
    for place, row in enumerate(rows if done else ()):
        parts = zip(*(compared[place] for _, compared in done), strict=True)
        each = Compared(*(torch.cat(part) for part in parts))
        count, samples, divergence = int(each.changed.sum()), len(each.changed), float(f"{each.divergence.mean():.4g}")
        measured = (divergence, count / samples, binomial_bound(count, samples), _who_pays(runner, chunks, each))
        rows[place] = FrontierRow(row.merging, row.flops_ratio, *measured)
    return rows


def _who_pays(runner: _Runner, chunks: Sequence[_Chunk], each: Compared) -> dict[str, Any]:
    """Return whose answers change.

    Returns:
        `samples`; `groups`, for the class that changes most and for short and long inputs the share that changes and
        the number of samples; `worst_tenth`, the share of all divergence that lies in a tenth of the samples.
    """

    def figures(chosen: Tensor) -> list[float]:
        return [float(each.changed[chosen].mean()), int(chosen.sum())]

    groups: dict[str, list[float]] = {}
    if each.answers.max() > 0 and not runner.regression and chunks[0].positions is None:
        classes = {answer: figures(each.answers == answer) for answer in each.answers.unique().tolist()}
        large = [answer for answer, (_, count) in classes.items() if count >= FEW_SAMPLES]
        if large:
            worst = max(large, key=lambda answer: classes[answer][0])
            groups[f"class {runner.config.id2label[worst]}"] = classes[worst]
    if all(chunk.tokens is not None for chunk in chunks):
        tokens = torch.cat([chunk.tokens for chunk in chunks if chunk.tokens is not None]).cpu()
        middle = int(tokens.median())
        short = tokens <= middle
        if min(short.sum(), (~short).sum()) >= FEW_SAMPLES:
            groups |= {f"up to {middle} tokens": figures(short), f"over {middle}": figures(~short)}
    total, most = each.divergence.sum(), each.divergence.topk(max(1, len(each.divergence) // 10)).values
    tenth = float(most.sum() / total) if total > 0 else 0.0
    return {"samples": len(each.changed), "groups": groups, "worst_tenth": tenth}


class _Space:
    """Candidates within a share of the FLOPs.

    Args:
        runner: of the candidates.
        ways: pairs of a method and a metric to match by.
        schedules: names of the schedules to hold to; `None` for any numbers of latents.
    """

    def __init__(self, runner: _Runner, ways: Sequence[tuple[str, str]], schedules: Sequence[str] | None) -> None:
        self.config, self.share, self.ways, self.schedules = runner.config, runner.share, ways, schedules
        self.unmerged = [replace(runner.unmerged, method=method, metric=metric) for method, metric in ways]
        # Groups of the learned latents, from many to few, after which nothing merges.
        self.grouped: list[_Candidate] = []
        latents, layers = self.config.num_latents, self.config.num_self_attention_layers
        if schedules is None:
            alike = runner.similarity(replace(self.unmerged[0], left=()), "hidden")
            counts = [max(self.config.min_latents, math.ceil(eighths * latents / 8)) for eighths in range(7, 2, -1)]
            for count in dict.fromkeys(count for count in counts if count < latents):
                start = tuple(average_linkage(alike, count))
                self.grouped.append(_Candidate(count, start, (count,) * layers, *ways[0]))

    def least(self) -> float:
        """Return the least share in reach."""
        if self.schedules is not None:
            ends = product(self.unmerged, (latents_left(self.config, name, 1.0) for name in self.schedules))
        else:
            ends = product([self.unmerged[0], *self.grouped], [[1.0] * self.config.num_self_attention_layers])
        return min(self.share(self._made(candidate, left)) for candidate, left in ends)

    def _made(self, candidate: _Candidate, left: Sequence[float]) -> _Candidate:
        """Return the candidate with about these numbers of latents left after its layers."""
        removed = whole_schedule(candidate.latents, left, self.config.min_latents)
        return replace(candidate, left=tuple(candidate.latents - total for total in accumulate(removed)))

    def _fitted(self, candidate: _Candidate, target: float, left: Callable[[float], Sequence[float]]) -> Offspring:
        """Return the weakest candidate within the share: as `candidate`, with latents by a strength in [0, 1]."""
        return weakest(lambda strength: self._made(candidate, left(strength)), target, self.share)

    def offspring(self, parents: Sequence[_Candidate], target: float) -> Iterator[Offspring]:
        """Candidates for a share, from the best of the share before; the likeliest come first."""
        if self.schedules is not None:
            yield from self._scheduled(self.schedules, self.unmerged, target)
            return
        others = [self._stronger(parent, target) for parent in parents[1:3]]
        for row in zip_longest(self._stronger(parents[0], target), self._seeds(target), *others):
            yield from row

    def _scheduled(self, names: Iterable[str], candidates: Sequence[_Candidate], target: float) -> Iterator[Offspring]:
        for name, candidate in product(names, candidates):
            yield self._fitted(candidate, target, partial(latents_left, self.config, name))

    def _seeds(self, target: float) -> Iterator[Offspring]:
        """Schedules that owe nothing to the shares before: floors, in fewer blocks and after groups, and others."""
        per_block, all_blocks = self.config.num_self_attends_per_block, self.config.num_blocks
        for blocks in range(all_blocks, 0, -1):
            for each in [self.unmerged[0], *self.grouped] if blocks >= all_blocks - 1 else self.unmerged[:1]:
                yield self._capped(replace(each, left=each.left[: blocks * per_block]), target, 0, flat=True)
        yield from self._scheduled(["constant", "geometric"], self.unmerged[:2], target)

    def _stronger(self, parent: _Candidate, target: float) -> Iterator[Offspring]:
        """A parent made stronger in one place: all layers, the number of blocks, the start, the way, one layer on."""
        yield self.scaled(parent, target)
        per_block = self.config.num_self_attends_per_block
        if len(parent.left) > per_block:
            yield self.scaled(replace(parent, left=parent.left[:-per_block]), target)
        for each in [each for each in self.grouped if each.latents < parent.latents][:2]:
            left = tuple(min(count, each.latents) for count in parent.left)
            yield self.scaled(replace(parent, latents=each.latents, start=each.start, left=left), target)
        for method, metric in self.ways:
            if (method, metric) != (parent.method, parent.metric):
                yield self.scaled(replace(parent, method=method, metric=metric), target)
        for layer in _spread(range(len(parent.left)), 12):
            yield self._capped(parent, target, layer, flat=False)
            if layer and any(parent.removed[layer:]):
                yield self._capped(parent, target, layer, flat=True)

    def scaled(self, parent: _Candidate, target: float) -> Offspring:
        """The parent with fewer latents in all layers, or with more."""

        def left(strength: float) -> list[float]:
            if strength <= 0.5:
                return [parent.latents ** (1 - 2 * strength) * count ** (2 * strength) for count in parent.left]
            return [count ** (2 - 2 * strength) for count in parent.left]

        return self._fitted(parent, target, left)

    def _capped(self, parent: _Candidate, target: float, layer: int, flat: bool) -> Offspring:
        """The parent with a cap on the latents left from a layer on; if `flat`, each of these layers is at the cap."""
        reaching = parent.left[layer - 1] if layer else parent.latents

        def left(strength: float) -> list[float]:
            cap = reaching ** (1 - strength)
            return [*parent.left[:layer], *(cap if flat else min(each, cap) for each in parent.left[layer:])]

        return self._fitted(parent, target, left)

    def neighbours(self, best: _Candidate, target: float) -> Iterator[Offspring]:
        """Candidates of the same share in which some layer keeps a quarter more latents, and all after it fewer."""
        for layer in _spread(range(len(best.left) - 1), 12):
            reaching = best.left[layer - 1] if layer else best.latents
            kept = min(reaching, math.ceil(1.25 * best.left[layer]))
            if kept > best.left[layer]:
                postponed = replace(best, left=(*best.left[:layer], kept, *best.left[layer + 1 :]))
                for flat in (False, True):
                    yield self._capped(postponed, target, layer + 1, flat)


def _targets(least: float) -> list[float]:
    """Return eight shares or more, from 0.9 down to the least in reach: 0.1 apart, or closer if these are fewer."""
    for steps in (10, 20):
        above = [step / steps for step in range(steps - steps // 10, 0, -1) if step / steps > least + 0.01]
        if len(above) >= 7:
            return [*above, least]
    return [least + (0.9 - least) * step / 7 for step in range(7, -1, -1)] if least < 0.9 else [least]


class _Search:
    """Go down the shares of the FLOPs, from the best candidates of one to those of the next.

    Args:
        runner, space: of the candidates.
        log_file: as for `calibrate`.
        deadline: on the clock of `time.monotonic`; after it nothing more is measured.
    """

    def __init__(self, runner: _Runner, space: _Space, log_file: str | os.PathLike | None, deadline: float) -> None:
        self.runner, self.space, self.deadline = runner, space, deadline
        before = [chunk.before.float().cpu().numpy().tobytes() for chunk in runner.chunks if chunk.before is not None]
        # Unmerged outputs do not tell whether sizes weight attention.
        before.append(str(runner.config.proportional_attention).encode())
        self.fingerprint = hashlib.sha256(b"".join(before)).hexdigest()
        self.log_file = None if log_file is None else Path(log_file)
        # Sums of the divergences of a candidate's chunks.
        self.divergences: dict[str, float] = {}
        if self.log_file is not None and self.log_file.exists():
            found = json.loads(self.log_file.read_text())
            self.divergences = found["divergences"] if found.get("searched") == self.fingerprint else {}

    def run(self, wanted: Sequence[float], passes: float) -> list[_Candidate]:
        """Return the best candidate of each share, by falling share.

        Args:
            wanted: shares beside those of `_targets`.
            passes: unmerged passes over one sample that the search may spend.

        Raises:
            ValueError: for a share that nothing reaches.
        """
        space, least = self.space, self.space.least()
        if wanted and min(wanted) < least:
            what = "merging" if space.schedules is None else f"schedule {space.schedules[0]}"
            raise out_of_reach(min(wanted), least, what)
        targets = sorted({*_targets(least), *wanted}, reverse=True)
        parents, found = space.unmerged, []
        for target in tqdm(targets, desc="calibrating", unit="share", disable=None):
            children = _distinct(space.offspring(parents, target))
            is_over = time.monotonic() > self.deadline
            parents = children[:1] if is_over else self._best(children, target, passes / len(targets))
            self._save()
            found.append(parents[0])
        # What is found at a strong share may be the better way at milder ones too.
        for place in range(len(found) - 2, -1, -1) if space.schedules is None else ():
            weaker = space.scaled(found[place + 1], targets[place])
            if weaker is not None and time.monotonic() <= self.deadline:
                found[place] = self._finest([found[place], weaker])[0]
        self._save()
        return _distinct(found)

    def _best(self, children: Sequence[_Candidate], target: float, passes: float) -> list[_Candidate]:
        """Return the best few candidates within a share, the best first.

        Each round halves the candidates and doubles the samples (Jamieson & Talwalkar, 2016, "Non-stochastic best arm
        identification"); the neighbours of the best one join the second.
        """
        most = len(self.runner.chunks)
        rounds = [2**power for power in range(most.bit_length()) if 2**power < most]
        count = int(passes / (target * self.runner.chunks[0].rows * (len(rounds) + 2)))
        alive = children[: max(6, count)]
        for number, chunks in enumerate(rounds):
            if number == 1 and self.space.schedules is None:
                neighbours = _distinct(self.space.neighbours(alive[0], target))
                alive = _distinct([*alive, *neighbours[: max(3, count // 2)]])
            alive = list(self._ranked(alive, chunks))[: max(3, count >> (number + 1))]
        return self._finest(alive)[:3]

    def _finest(self, candidates: Sequence[_Candidate]) -> list[_Candidate]:
        """Rank candidates on all samples of the search. The tied one that merges in fewest layers comes first, since
        each matching takes time that FLOPs do not show."""
        ranked = self._ranked(candidates, len(self.runner.chunks))
        tied = [each for each, divergence in ranked.items() if divergence <= TIED * min(ranked.values())]
        chosen = min(tied, key=lambda each: sum(map(bool, each.removed)))
        return [chosen, *(each for each in ranked if each != chosen)]

    def _ranked(self, candidates: Sequence[_Candidate], chunks: int) -> dict[_Candidate, float]:
        """Return the candidates with their mean divergences on the first chunks, the best first."""
        runner, sums = self.runner, self.divergences
        pairs = {f"{each.key} {number}": (each, number) for each in candidates for number in range(chunks)}
        missing = [key for key in pairs if key not in sums]
        for key in missing:
            runner.plan(pairs[key][0])  # Groups are read off all samples at once, so before the threads begin.

        def summed(key: str) -> float:
            candidate, number = pairs[key]
            return float(runner.compared(runner.chunks[number], candidate).divergence.sum())

        sums.update(zip(missing, runner.map(summed, missing), strict=True))
        rows = sum(chunk.rows for chunk in runner.chunks[:chunks])
        totals = {each: sum(sums[f"{each.key} {number}"] for number in range(chunks)) for each in candidates}
        # Rounded, so that what different processors add up differently decides nothing.
        means = [(each, float(f"{total / rows:.4g}")) for each, total in totals.items()]
        return dict(sorted(means, key=lambda pair: pair[1]))

    def _save(self) -> None:
        if self.log_file is not None:
            self.log_file.parent.mkdir(parents=True, exist_ok=True)
            partial_file = self.log_file.with_name(f"{self.log_file.name}.partial")
            partial_file.write_text(json.dumps({"searched": self.fingerprint, "divergences": self.divergences}))
            partial_file.replace(self.log_file)


def check_reach(model: Any, flops_ratio: float, input_shape: Sequence[int]) -> None:
    """Check, before there are weights to measure, that a search can reach a share of the FLOPs.

    Raises:
        ValueError: in one line with the least share, if it cannot.
    """
    share = _flops_share(model, [], input_shape)
    config, least = share.config, 1.0
    for latents in (config.num_latents, max(config.min_latents, math.ceil(3 * config.num_latents / 8))):
        removed = whole_schedule(latents, [1.0] * config.num_self_attention_layers, config.min_latents)
        left = [latents - total for total in accumulate(removed)]
        ways = [way for way in SEARCHED if way[0] != GROUPS]
        least = min(least, *(share.of([latents, *left], method, metric) for method, metric in ways))
    if flops_ratio < least:
        raise out_of_reach(flops_ratio, least, "merging")


def output_divergence(output: Tensor, before: Tensor, regression: bool) -> Tensor:
    """Return how far an output is from an earlier one, for each sample; gradients reach both.

    Args:
        output, before: logits (B, K).
        regression: they are numbers and not classes.

    Returns:
        (B,) Kullback-Leibler divergence from the earlier classes in nats, or squared differences.
    """
    output, before = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in (output, before))
    if regression:
        return (output - before).square().sum(dim=-1)
    now, earlier = (F.log_softmax(each, dim=-1) for each in (output, before))
    return F.kl_div(now, earlier, reduction="none", log_target=True).sum(dim=-1)


def average_linkage(similarity: Tensor, num_groups: int) -> list[int]:
    """Cluster by average linkage: the two clusters whose members are most similar on average merge first.

    Args:
        similarity: (N, N).
        num_groups: M, from 1 to N. So many come out, whatever is tied.

    Returns:
        The group of each of the N latents, numbered in the order of their first latent.

    Source: Sokal & Michener (1958), with the update of Lance & Williams (1967).
    """
    latents = len(similarity)
    alike = ((similarity + similarity.T) / 2).to(torch.float64)
    alike.fill_diagonal_(-math.inf)
    members = {latent: [latent] for latent in range(latents)}
    for _ in range(latents - num_groups):
        one, other = sorted(divmod(int(alike.argmax()), latents))
        sizes = len(members[one]), len(members[other])
        joined = (sizes[0] * alike[one] + sizes[1] * alike[other]) / sum(sizes)
        joined[one] = -math.inf
        alike[one], alike[:, one] = joined, joined
        alike[other], alike[:, other] = -math.inf, -math.inf
        members[one] += members.pop(other)
    groups = [0] * latents
    for number, cluster in enumerate(sorted(members.values(), key=min)):
        for latent in cluster:
            groups[latent] = number
    return groups


def binomial_bound(changed: int, samples: int) -> float:
    """Return the upper bound of the share that changes at 95 % confidence, exact (Clopper & Pearson, 1934)."""
    if changed >= samples:
        return 1.0
    ways = [math.lgamma(samples + 1) - math.lgamma(k + 1) - math.lgamma(samples - k + 1) for k in range(changed + 1)]

    def at_most_changed(share: float) -> float:
        return sum(
            math.exp(way + k * math.log(share) + (samples - k) * math.log1p(-share)) for k, way in enumerate(ways)
        )

    low, high = changed / samples, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if at_most_changed(middle) > 1 - CONFIDENCE else (low, middle)
    return high


def held_out_to_promise(max_changed: float) -> int:
    """Return the least number of held-out samples that can promise a share of changed answers, if none changes."""
    return math.ceil(math.log(1 - CONFIDENCE) / math.log1p(-max_changed)) if max_changed < 1 else 1


@contextmanager
def _one_thread_a_chunk(model: Any) -> Iterator[int]:
    """Compute each operation by one thread inside the block, and yield how many chunks may run at a time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads if model.device.type == "cpu" else 1
    finally:
        torch.set_num_threads(threads)


def _batches(samples: Batch | Iterable[Batch] | None) -> list[Batch]:
    """Return samples as a list of batches, or raise a ValueError for none and for anything but batches of tensors."""
    given: Iterable[Any] = [samples] if isinstance(samples, Mapping) else () if samples is None else samples
    batches = []
    for batch in given:
        if not isinstance(batch, Mapping):
            raise ValueError(f"samples: a {type(batch).__name__}; must be dicts of tensors, as the model takes them")
        for name, value in batch.items():
            if not isinstance(value, Tensor):
                raise ValueError(f"samples: {name} is a {type(value).__name__}; must be a tensor of B rows")
        if batch and _rows(batch):
            batches.append(batch)
    if not batches:
        raise ValueError("samples: none given; must be a batch or more of what the model takes")
    return batches


def _rows(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _pieces(batches: Sequence[Batch], unmerged_flops: float) -> list[Batch]:
    """Cut batches into nearly equal pieces of at most `ROWS` rows, fewer if samples are few or a pass is expensive."""
    total = sum(_rows(batch) for batch in batches)
    most = max(1, min(ROWS, total // 16, int(SEARCH_FLOPS / unmerged_flops / 60)))
    pieces: list[Batch] = []
    for batch in batches:
        count = -(-_rows(batch) // most)
        edges = [place * _rows(batch) // count for place in range(count + 1)]
        pieces += [{name: each[start:end] for name, each in batch.items()} for start, end in pairwise(edges)]
    return pieces


def _checked_ways(
    schedules: Sequence[str] | None, methods: Sequence[str] | None, metrics: Sequence[str] | None
) -> list[tuple[str, str]]:
    """Return pairs of a method and a metric to match by.

    Raises:
        ValueError: in one line, for an unknown name.
    """
    for argument, names, known in (
        ("schedules", schedules, (*SCHEDULES, SKIP_BLOCKS)),
        ("merge_metrics", metrics, MERGE_METRICS),
        ("merge_methods", methods, None),
    ):
        if isinstance(names, str):
            raise ValueError(f"{argument}={names!r}: must be a list, [{names!r}]")
        for name in names or ():
            if known is None and name != GROUPS:
                check_merge_method(name)
            elif known is not None and name not in known:
                raise ValueError(f"{argument}: {name!r} is unknown; choose from {', '.join(known)}")
    if methods is None and metrics is None:
        return list(SEARCHED)
    every_method, every_metric = zip(*SEARCHED, strict=True)
    return list(product(dict.fromkeys(methods or every_method), dict.fromkeys(metrics or every_metric)))


def _flops_share(model: Any, batches: Sequence[Batch], input_shape: Sequence[int] | None) -> FlopsShare:
    """Return the share of the FLOPs for inputs as given, as the longest sample, or as the config has room for.

    Raises:
        ValueError: if none of them tells the shape of an input.
    """
    config, name = model.config, type(model).__name__
    if input_shape is not None:
        shape = tuple(input_shape)
    elif batches:
        longest = max((batch[_input_name(model, batch)] for batch in batches), key=lambda inputs: inputs[0].numel())
        shape = (1, *longest.shape[1:])
    elif "Image" in name:
        shape = (1, 3, config.image_size, config.image_size)
    elif "SequenceClassification" in name or _is_masked_lm(model):
        shape = (1, config.max_position_embeddings)
    else:
        raise ValueError(f"input_shape: must be given for {name}: the shape of one input, or samples")
    return FlopsShare(model.unmerged.asked_of(config), shape, name)


def _is_masked_lm(model: Any) -> bool:
    return "MaskedLM" in type(model).__name__


def _input_name(model: Any, batch: Batch) -> str:
    known = ("inputs", "input_ids", "pixel_values")
    name = next((name for name in known if name in batch), None)
    if name is None:
        raise ValueError(f"samples: have {', '.join(sorted(batch))}; must have what {type(model).__name__} takes")
    return name


def _some_weights(model: Any) -> list[float]:
    """Return one weight of each of at most 64 parameters."""
    parameters = _spread(list(model.parameters()), 64)
    return [float(f"{parameter.flatten()[parameter.numel() // 2]:.4g}") for parameter in parameters]


def _same_weights(one: Sequence[float], other: Sequence[float]) -> bool:
    """Return whether weights are the same but for rounding to half precision, which training exceeds."""
    apart = [abs(a - b) > 0.01 * max(abs(a), abs(b), 1e-3) for a, b in zip(one, other, strict=False)]
    return len(one) == len(other) and not any(apart)


def _spread(values: Sequence[Any], most: int) -> list[Any]:
    """Return at most this many values, spread evenly over all of them."""
    return [values[place * len(values) // most] for place in range(most)] if len(values) > most else list(values)


def _distinct(candidates: Iterable[_Candidate | None]) -> list[_Candidate]:
    return list(dict.fromkeys(each for each in candidates if each is not None))
