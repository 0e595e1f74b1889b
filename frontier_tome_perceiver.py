# SPDX-License-Identifier: Apache-2.0
"""Frontier of a model: what merging costs against how much it changes the outputs, measured on unlabelled samples.

The first half is what a checkpoint needs once it is calibrated: a `Frontier` of `FrontierRow`s, kept in
`config.merge_frontier`, and `choose`, which takes the row for a budget.

The second half, from `calibrate` on, finds the rows. `_Search.run` is where schedules are chosen. It goes through
shares of the FLOPs from mild to strong. For each share `_Proposals.for_share` makes candidates: mostly the best ones of
the share before, made stronger in one place. `_Evaluator` measures how far their outputs diverge from the unmerged ones
on a quarter of the samples, whose inputs are read once for all candidates. The other samples measure the
rows that were chosen, so that `choose` can promise how many answers change. No clock takes part but where time is asked
for, and one thread computes each batch, so the result depends neither on the machine's load nor on its threads.

Letters: B batch, S inputs, P positions that are compared, N latents, M latents left, L layers, K classes.
"""

# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import accumulate, chain, pairwise, product, zip_longest
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

# As in the module of the layers, which says why.
try:
    from .configuration_tome_perceiver import FRONTIER_SETTINGS, MAX_FRONTIER_ROWS, MERGE_METRICS, check_share
    from .cost_tome_perceiver import (
        DEFAULT_SCHEDULE,
        SCHEDULES,
        SKIP_BLOCKS,
        FlopsShare,
        Merging,
        interleaved_seconds,
        latents_left,
        merging_within,
        out_of_reach,
        undisturbed,
        weakest,
        whole_schedule,
    )
    from .layers_tome_perceiver import METRICS, MergePlan, call_layer, latent_bias, layer_matchers
    from .merging_tome_perceiver import check_merge_method
    from .modeling_tome_perceiver import ToMePerceiverModelOutput, call_with_base, padding_bias
except ImportError:
    if __package__:
        raise
    from configuration_tome_perceiver import FRONTIER_SETTINGS, MAX_FRONTIER_ROWS, MERGE_METRICS, check_share
    from cost_tome_perceiver import (
        DEFAULT_SCHEDULE,
        SCHEDULES,
        SKIP_BLOCKS,
        FlopsShare,
        Merging,
        interleaved_seconds,
        latents_left,
        merging_within,
        out_of_reach,
        undisturbed,
        weakest,
        whole_schedule,
    )
    from layers_tome_perceiver import METRICS, MergePlan, call_layer, latent_bias, layer_matchers
    from merging_tome_perceiver import check_merge_method
    from modeling_tome_perceiver import ToMePerceiverModelOutput, call_with_base, padding_bias

Batch = Mapping[str, Tensor]
"""Arguments of a model by name, B rows each."""

GROUPS = "groups"
"""In the place of a matching method: fixed groups of latents, read off their mean similarity over the samples."""
SEARCHED = (("leader", "hidden"), ("leader", "key"), ("bipartite", "hidden"), ("bipartite", "key"), (GROUPS, "hidden"))
# Without samples: `leader` on keys lost least of the methods that look at no data (docs/results/choice,
# docs/results/language).
UNSEEN_METHOD, UNSEEN_METRIC = "leader", "key"

CONFIDENCE = 0.95
# Limits of a search, in unmerged passes over one sample: this many for each sample, and at most this many FLOPs, a few
# minutes on two cores.
PASSES_PER_SAMPLE, SEARCH_FLOPS = 12, 3e13
# Samples that run together, and positions of each that are compared where each position has an output.
ROWS, POSITIONS = 16, 16
# Candidates whose divergence is at most this many times the least are tied; the one that merges in fewest layers wins.
TIED = 1.1
# Bytes of inputs, and of latents that have read them, that are kept for all candidates.
KEPT_BYTES = 2**30
# With fewer samples a ranking, or a share of a group, is mostly noise.
FEW_SAMPLES = 32
TIMED_ROUNDS = 15
DAMAGED = "the weights of the model are damaged or training has diverged"


@dataclass(frozen=True)
class FrontierRow:
    """One way to merge, with its cost and how much it changes; `None` for figures that were not measured.

    Attributes:
        merging: its settings.
        flops_ratio: share of the unmerged model's FLOPs, with the matching.
        divergence: mean divergence of the outputs from the unmerged ones (`output_divergence`).
        changed: share of samples whose answer changes.
        changed_bound: upper bound of that share for samples of the same kind, at 95 % confidence.
        who: whose answers change (`_who_changes`).
        speedup: times as fast as unmerged, on this machine.
    """

    merging: Merging
    flops_ratio: float
    divergence: float | None = None
    changed: float | None = None
    changed_bound: float | None = None
    who: dict[str, Any] = field(default_factory=dict)
    speedup: float | None = None

    def describe(self, num_blocks: int) -> str:
        """Say in a few words what merges in a model of `num_blocks` blocks."""
        merging, parts = self.merging, []
        if merging.latent_groups is not None:
            parts.append(f"{max(merging.latent_groups) + 1} groups of learned latents")
        if merging.merge_groups is not None:
            groups = enumerate(merging.merge_groups, 1)
            left = [f"{max(each) + 1} in layer {layer}" for layer, each in groups if each is not None]
            parts.append(f"fixed groups, {', '.join(left)}")
        if isinstance(merging.r, int):
            counts = [f"{merging.r} in each layer"] if merging.r else []
        else:
            counts = [f"{count} in layer {layer}" for layer, count in enumerate(merging.r, 1) if count]
        if counts:
            parts.append(f"{merging.merge_method} on {merging.merge_metric}, {', '.join(counts)}")
        blocks = f" ({merging.num_blocks} block{'s' * (merging.num_blocks != 1)})"
        return "; ".join(parts or ["nothing merges"]) + blocks * (merging.num_blocks != num_blocks)

    def lines(self) -> list[str]:
        """Say how many and whose answers change, in at most three lines."""
        if self.changed is None:
            return []
        samples, tenth = self.who["samples"], self.who["worst_tenth"]
        bound = "" if self.changed_bound is None else f", below {self.changed_bound:.2%} at 95 % confidence"
        lines = [f"changed answers: {self.changed:.2%} of {samples}{bound}"]
        if self.who["groups"]:
            # A saved config has sorted keys, which puts "over 9" before "up to 9 tokens".
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
        searched, held_out: number of samples that chose the rows, and of those that measured them.
        weights: a few of the model's weights, which tell a frontier of other weights.
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
        names = {each.name for each in fields(FrontierRow)}
        rows = [
            FrontierRow(
                **{name: row[name] for name in names & set(row)} | {"merging": Merging.of(config.merged_as(row))}
            )
            for row in kept["rows"]
        ]
        others = {each.name: kept[each.name] for each in fields(cls)}
        return cls(**others | {"rows": rows, "input_shape": tuple(kept["input_shape"])})

    def is_of(self, model: Any) -> bool:
        """Return whether it was measured on a model's weights, up to half precision, which training exceeds."""
        pairs = list(zip_longest(self.weights, _some_weights(model), fillvalue=math.nan))
        return all(abs(a - b) <= 0.01 * max(abs(a), abs(b), 1e-3) for a, b in pairs)

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
            lines.append(f"| {row.flops_ratio:.3f} | {shown} | {row.describe(self.num_blocks)} |")
        return "\n".join([*lines, f"\nChosen on {self.searched} samples, measured on {self.held_out} others."])


@dataclass(frozen=True)
class Choice:
    """What a model merges now, and on what grounds.

    Attributes:
        chosen: the row that was set.
        num_blocks: that the unmerged model runs.
        frontier: that it was chosen from; `None` for a schedule that needs no data.
    """

    chosen: FrontierRow
    num_blocks: int
    frontier: Frontier | None = None

    def __str__(self) -> str:
        """Return the chosen row in a few lines."""
        row = self.chosen
        speed = "" if row.speedup is None else f", {row.speedup:.2f} times as fast as unmerged"
        first = f"{row.flops_ratio:.3f} of the FLOPs{speed}: {row.describe(self.num_blocks)}"
        return "\n".join([first, *row.lines()])


@dataclass(frozen=True)
class SearchOptions:
    """Limits of a search, as `model.calibrate` and `model.merge_to` take them.

    Attributes:
        seconds: ends the search after about this time with the best it has.
        flops_ratios: shares of the FLOPs to have a row for, beside those from 0.9 down to the least in reach.
        schedules: names in `SCHEDULES` or `SKIP_BLOCKS` to choose from, in place of a search.
        merge_methods, merge_metrics: methods (or `"groups"`) and metrics to choose from.
        input_shape: of one input, (1, S) or (1, 3, height, width), that FLOPs are for; by default the longest sample.

    Raises:
        ValueError: in one line, for an unknown name or a number out of its range.
    """

    seconds: float | None = None
    flops_ratios: Sequence[float] | None = None
    schedules: Sequence[str] | None = None
    merge_methods: Sequence[str] | None = None
    merge_metrics: Sequence[str] | None = None
    input_shape: Sequence[int] | None = None

    def __post_init__(self) -> None:
        seconds = 0 if self.seconds is None else self.seconds
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds >= 0:
            raise ValueError(f"seconds={seconds!r}: must be a number of 0 or more")
        for name in ("flops_ratios", "schedules", "merge_methods", "merge_metrics"):
            if isinstance(value := getattr(self, name), (int, float, str)):
                raise ValueError(f"{name}={value!r}: must be a list, [{value!r}]")
        if len(self.flops_ratios or ()) > MAX_FRONTIER_ROWS // 2:
            raise ValueError(
                f"flops_ratios: {len(self.flops_ratios or ())} shares; must be at most {MAX_FRONTIER_ROWS // 2}"
            )
        for ratio in self.flops_ratios or ():
            check_share("flops_ratios", ratio)
        for method in self.merge_methods or ():
            if method != GROUPS:
                check_merge_method(method)
        known_names = {"schedules": (*SCHEDULES, SKIP_BLOCKS), "merge_metrics": MERGE_METRICS}
        for argument, known in known_names.items():
            for name in getattr(self, argument) or ():
                if name not in known:
                    raise ValueError(f"{argument}: {name!r} is unknown; choose from {', '.join(known)}")

    def ways(self, default: Sequence[tuple[str, str]] = SEARCHED) -> list[tuple[str, str]]:
        """Return pairs of a method and a metric to match by, from `default` where nothing was named."""
        if self.merge_methods is None and self.merge_metrics is None:
            return list(default)
        methods, metrics = zip(*default, strict=True)
        return list(product(dict.fromkeys(self.merge_methods or methods), dict.fromkeys(self.merge_metrics or metrics)))


def choose(
    model: Any,
    flops_ratio: float | None = None,
    latency_ratio: float | None = None,
    max_changed: float | None = None,
    samples: Batch | Iterable[Batch] | None = None,
    **options: Any,
) -> Choice:
    """Choose what merges within one budget; `model.merge_to` sets it, and describes budgets, samples and errors.

    Args:
        model: a head with logits.
        options: of `SearchOptions`.
    """
    budgets = {"flops_ratio": flops_ratio, "latency_ratio": latency_ratio, "max_changed": max_changed}
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"use one of flops_ratio, latency_ratio and max_changed, not {len(given)}")
    ((budget, limit),) = given.items()
    check_share(budget, limit)
    batches = [] if samples is None else _batches(samples)
    options = {name: value for name, value in options.items() if value is not None}
    # The frontier in the config is used; options ask for another one.
    frontier, num_blocks = None if options else Frontier.of(model.config), model.unmerged.num_blocks
    if frontier is None and (not batches or "schedules" in options and budget != "max_changed"):
        return Choice(_choose_schedule(model, budget, limit, batches, options), num_blocks)
    if frontier is None:
        if budget == "flops_ratio":
            options["flops_ratios"] = [*options.get("flops_ratios", ()), limit]
        frontier = calibrate(model, batches, **options)
    elif budget != "max_changed" and not frontier.is_of(model):
        warnings.warn("the frontier was measured on other weights; call model.calibrate(samples) again", stacklevel=3)
    if budget == "flops_ratio":
        # The row that `model(..., flops_ratio=...)` takes.
        row = model.config.frontier_row(limit)
        return Choice(frontier.rows[model.config.merge_frontier["rows"].index(row)], num_blocks, frontier)
    if budget == "max_changed":
        return Choice(_promised(model, frontier, limit), num_blocks, frontier)
    return Choice(_fast_enough(model, frontier.rows, limit, batches), num_blocks, frontier)


def _choose_schedule(
    model: Any, budget: str, limit: float, batches: Sequence[Batch], given: dict[str, Any]
) -> FrontierRow:
    """Meet a budget of cost by a schedule, without a search."""
    if unused := set(given) - {"schedules", "input_shape", "merge_methods", "merge_metrics"}:
        raise ValueError(f"{min(unused)}: needs samples to calibrate on, and no schedules")
    if budget == "max_changed" or (budget == "latency_ratio" and not batches):
        raise ValueError(f"{budget}: needs samples, or model.calibrate(samples) before")
    options = SearchOptions(**given)
    share = _flops_share(model, batches, options.input_shape)
    method, metric = options.ways([(UNSEEN_METHOD, UNSEEN_METRIC)])[0]
    base = replace(model.unmerged, merge_method=method, merge_metric=metric)
    rows, errors = [], []
    ratios = [limit] if budget == "flops_ratio" else [step / 40 for step in range(40, 0, -1)]
    for ratio, name in product(ratios, options.schedules or [DEFAULT_SCHEDULE]):
        try:
            merging = merging_within(share.config, name, ratio, share, base)
            rows.append(FrontierRow(merging, share(merging)))
        except ValueError as error:
            errors.append(error)
    if not rows:
        raise errors[0]
    if budget == "flops_ratio":
        return max(rows, key=lambda row: row.flops_ratio)
    return _fast_enough(model, rows, limit, batches)


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
            f"calibrate on {math.ceil(needed * 4 / 3) + ROWS} samples or more, with seconds enough to measure them"
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
    model: Any, rows: Sequence[FrontierRow], latency_ratio: float, batches: Sequence[Batch]
) -> FrontierRow:
    """Return the row that changes least of those that take at most a share of the unmerged model's time.

    Raises:
        ValueError: if no row is as fast, or there is no batch to time.
    """
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


def held_out_to_promise(max_changed: float) -> int:
    """Return the least number of held-out samples that can promise a share of changed answers, if none changes."""
    return math.ceil(math.log(1 - CONFIDENCE) / math.log1p(-max_changed)) if max_changed < 1 else 1


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


def calibrate(model: Any, samples: Batch | Iterable[Batch], **options: Any) -> Frontier:
    """Search for the frontier of a model, measure it, and keep it in `config.merge_frontier`.

    Args:
        model: a head with logits, on the device that counts.
        samples: arguments of the model, a batch or several. `labels` only mark the positions that are compared.
        options: of `SearchOptions`.

    Raises:
        ValueError: in one line, for samples or options that cannot be searched with, or shares out of reach.
        FloatingPointError: for outputs that are not finite.
    """
    asked, started = SearchOptions(**options), time.monotonic()
    seconds = math.inf if asked.seconds is None else asked.seconds
    batches = _batches(samples)
    share = _flops_share(model, batches, asked.input_shape)
    with undisturbed(model), model.unmerged.applied(model.config), _one_thread_a_chunk(model) as threads:
        chunks = [_Chunk(model, batch) for batch in _pieces(batches, share.unmerged_flops)]
        given = sum(chunk.rows for chunk in chunks)
        held_out = [chunk for place, chunk in enumerate(chunks) if place % 4]
        evaluator = _Evaluator(model, chunks[::4], share, threads)
        if given < FEW_SAMPLES:
            said = f"{given} rows; with fewer than {FEW_SAMPLES} the ranking is mostly noise"
            warnings.warn(f"samples: {said}", stacklevel=4)
        elif evaluator.all_alike:
            said = "the model answers all of them alike, so they hardly tell what merging changes"
            warnings.warn(f"samples: {said}", stacklevel=4)
        proposals = _Proposals(evaluator, asked.ways(), asked.schedules)
        passes = min(PASSES_PER_SAMPLE * given, SEARCH_FLOPS / share.unmerged_flops)
        chosen = _Search(evaluator, proposals, started + 0.6 * seconds).run(asked.flops_ratios or (), passes)
        rows = _measured(evaluator, chosen, held_out, started + seconds)
    measured, weights = rows[0].who.get("samples", 0), _some_weights(model)
    if evaluator.rows + measured < given:
        said = f"ended the measurement after {measured} of {given - evaluator.rows} held-out samples"
        warnings.warn(f"seconds={asked.seconds} {said}", stacklevel=3)
    frontier = Frontier(rows, model.unmerged.num_blocks, share.input_shape, evaluator.rows, measured, weights)
    model.config.merge_frontier = frontier.kept()
    model.config.check_merging()
    return frontier


@dataclass(frozen=True)
class _Candidate:
    """Numbers of latents over the layers, and a way to match.

    Attributes:
        latents: number of latents that read the inputs.
        start: groups of the N learned latents that make these; `None` for none.
        left: latents left after each layer that runs.
        method, metric: as in the config, or `GROUPS` and the metric that groups are read off.
    """

    latents: int
    start: tuple[int, ...] | None
    left: tuple[int, ...]
    method: str
    metric: str

    @property
    def removed(self) -> list[int]:
        """Latents that merge into others in each layer."""
        return [before - after for before, after in pairwise([self.latents, *self.left])]

    def share(self, flops_share: FlopsShare) -> float:
        """Return its share of the FLOPs."""
        method = None if self.method == GROUPS else self.method
        return flops_share.of([self.latents, *self.left], method, self.metric)

    def merging_about(self, left: Sequence[float], min_latents: int) -> _Candidate:
        """Return the candidate with about these numbers of latents left after its layers."""
        removed = whole_schedule(self.latents, left, min_latents)
        return replace(self, left=tuple(self.latents - total for total in accumulate(removed)))


class _Search:
    """Choose a schedule for each of several shares of the FLOPs, from mild to strong.

    Args:
        evaluator, proposals: measure and make candidates.
        deadline: on the clock of `time.monotonic`; after it nothing more is measured.
    """

    def __init__(self, evaluator: _Evaluator, proposals: _Proposals, deadline: float) -> None:
        self.evaluator, self.proposals, self.deadline = evaluator, proposals, deadline

    def run(self, wanted: Sequence[float], passes: float) -> list[_Candidate]:
        """Return the best candidate of each share, by falling share.

        Args:
            wanted: shares beside those of `_targets`.
            passes: unmerged passes over one sample that the search may spend.

        Raises:
            ValueError: for a share that nothing reaches.
        """
        proposals, least = self.proposals, self.proposals.least
        if wanted and min(wanted) < least:
            what = "merging" if proposals.schedules is None else f"schedule {proposals.schedules[0]}"
            raise out_of_reach(min(wanted), least, what)
        targets = sorted({*_targets(least), *wanted}, reverse=True)
        parents, chosen = proposals.unmerged, []
        for target in tqdm(targets, desc="calibrating", unit="share", disable=None):
            candidates = _distinct(proposals.for_share(target, parents))
            parents = candidates[:1] if self._is_over else self._best(candidates, target, passes / len(targets))
            chosen.append(parents[0])
        # The best candidate of a strong share may be better at milder ones too, when it merges less in all layers.
        for place in range(len(chosen) - 2, -1, -1) if proposals.schedules is None else ():
            weaker = proposals.scaled(chosen[place + 1], targets[place])
            if weaker is not None and not self._is_over:
                chosen[place] = self._finest([chosen[place], weaker])[0]
        return _distinct(chosen)

    @property
    def _is_over(self) -> bool:
        return time.monotonic() > self.deadline

    def _best(self, candidates: Sequence[_Candidate], target: float, passes: float) -> list[_Candidate]:
        """Return the best few candidates within a share, the best first.

        Each round halves the candidates and doubles the samples (Jamieson & Talwalkar, 2016, "Non-stochastic best arm
        identification"); the neighbours of the best one join the second.
        """
        chunks = self.evaluator.chunks
        rounds = [2**power for power in range(len(chunks).bit_length()) if 2**power < len(chunks)]
        count = int(passes / (target * chunks[0].rows * (len(rounds) + 2)))
        alive = candidates[: max(6, count)]
        for number, round_chunks in enumerate(rounds):
            if number == 1 and self.proposals.schedules is None:
                neighbours = _distinct(self.proposals.neighbours(alive[0], target))
                alive = _distinct([*alive, *neighbours[: max(3, count // 2)]])
            alive = list(self.evaluator.rank(alive, round_chunks))[: max(3, count >> (number + 1))]
        return self._finest(alive)[:3]

    def _finest(self, candidates: Sequence[_Candidate]) -> list[_Candidate]:
        """Rank candidates on all samples of the search.

        Of those tied with the best, the one that merges in fewest layers comes first: each matching takes time that
        FLOPs do not show.
        """
        ranked = self.evaluator.rank(candidates, len(self.evaluator.chunks))
        tied = [each for each, divergence in ranked.items() if divergence <= TIED * min(ranked.values())]
        first = min(tied, key=lambda each: sum(map(bool, each.removed)))
        return [first, *(each for each in ranked if each != first)]


def _targets(least: float) -> list[float]:
    """Return eight shares or more, from 0.9 down to the least in reach: 0.1 apart, or closer if these are fewer."""
    for steps in (10, 20):
        above = [step / steps for step in range(steps - steps // 10, 0, -1) if step / steps > least + 0.01]
        if len(above) >= 7:
            return [*above, least]
    return [least + (0.9 - least) * step / 7 for step in range(7, -1, -1)] if least < 0.9 else [least]


class _Proposals:
    """Make candidates within a share of the FLOPs; `None` where there is none.

    Args:
        evaluator: of the candidates.
        ways: pairs of a method and a metric to match by.
        schedules: names of the schedules to hold to; `None` for any numbers of latents.
    """

    def __init__(self, evaluator: _Evaluator, ways: Sequence[tuple[str, str]], schedules: Sequence[str] | None) -> None:
        self.config, self.flops_share = evaluator.config, evaluator.flops_share
        self.ways, self.schedules = ways, schedules
        self.unmerged = [replace(evaluator.unmerged, method=method, metric=metric) for method, metric in ways]
        # Groups of the learned latents, from many to few, after which nothing merges.
        self.grouped: list[_Candidate] = []
        if schedules is None:
            alike = evaluator.similarity(replace(self.unmerged[0], left=()), "hidden")
            for count in _start_counts(self.config):
                start, left = tuple(average_linkage(alike, count)), (count,) * self.config.num_self_attention_layers
                self.grouped.append(_Candidate(count, start, left, *ways[0]))
        self.least = _least_share(self.flops_share, ways, schedules)

    def for_share(self, target: float, parents: Sequence[_Candidate]) -> Iterator[_Candidate | None]:
        """Make the candidates of a share from the best ones of the share before; the likeliest come first."""
        if self.schedules is not None:
            for name, candidate in product(self.schedules, self.unmerged):
                yield self._fitted(candidate, target, partial(latents_left, self.config, name))
            return
        others = [self._stronger(parent, target) for parent in parents[1:3]]
        yield from chain.from_iterable(zip_longest(self._stronger(parents[0], target), self._seeds(target), *others))

    def _fitted(
        self, candidate: _Candidate, target: float, left: Callable[[float], Sequence[float]]
    ) -> _Candidate | None:
        """Return `candidate` with the latents left by the least strength in [0, 1] that is within the share."""

        def at(strength: float) -> _Candidate:
            return candidate.merging_about(left(strength), self.config.min_latents)

        return weakest(at, target, lambda each: each.share(self.flops_share))

    def _seeds(self, target: float) -> Iterator[_Candidate | None]:
        """Make candidates from scratch: one number of latents for all layers, in fewer blocks and after groups."""
        per_block, all_blocks = self.config.num_self_attends_per_block, self.config.num_blocks
        for blocks in range(all_blocks, 0, -1):
            for each in [self.unmerged[0], *self.grouped] if blocks >= all_blocks - 1 else self.unmerged[:1]:
                yield self._capped(replace(each, left=each.left[: blocks * per_block]), target, 0, flat=True)

    def _stronger(self, parent: _Candidate, target: float) -> Iterator[_Candidate | None]:
        """Make a parent stronger: in all layers, with a block less, with fewer latents at the start, by another way."""
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

    def scaled(self, parent: _Candidate, target: float) -> _Candidate | None:
        """Return the parent with fewer latents in all layers, or with more."""

        def left(strength: float) -> list[float]:
            if strength <= 0.5:
                return [parent.latents ** (1 - 2 * strength) * count ** (2 * strength) for count in parent.left]
            return [count ** (2 - 2 * strength) for count in parent.left]

        return self._fitted(parent, target, left)

    def _capped(self, parent: _Candidate, target: float, layer: int, flat: bool) -> _Candidate | None:
        """Return the parent with a cap on the latents left from a layer on; if `flat`, these layers are at the cap."""
        reaching = parent.left[layer - 1] if layer else parent.latents

        def left(strength: float) -> list[float]:
            cap = reaching ** (1 - strength)
            return [*parent.left[:layer], *(cap if flat else min(each, cap) for each in parent.left[layer:])]

        return self._fitted(parent, target, left)

    def neighbours(self, best: _Candidate, target: float) -> Iterator[_Candidate | None]:
        """Make candidates of the same share: some layer keeps a quarter more latents, and all after it fewer."""
        for layer in _spread(range(len(best.left) - 1), 12):
            reaching = best.left[layer - 1] if layer else best.latents
            kept = min(reaching, math.ceil(1.25 * best.left[layer]))
            if kept > best.left[layer]:
                postponed = replace(best, left=(*best.left[:layer], kept, *best.left[layer + 1 :]))
                for flat in (False, True):
                    yield self._capped(postponed, target, layer + 1, flat)


def _start_counts(config: Any) -> list[int]:
    """Return the numbers of groups of the learned latents that a search tries: 7/8 of them down to 3/8."""
    latents = config.num_latents
    counts = [max(config.min_latents, math.ceil(eighths * latents / 8)) for eighths in range(7, 2, -1)]
    return [count for count in dict.fromkeys(counts) if count < latents]


def _least_share(
    flops_share: FlopsShare, ways: Sequence[tuple[str, str]], schedules: Sequence[str] | None = None
) -> float:
    """Return the least share of the FLOPs that a search reaches."""
    config, layers = flops_share.config, flops_share.config.num_self_attention_layers
    if schedules is None:
        latents = min([config.num_latents, *_start_counts(config)])
        ends = [(_Candidate(latents, None, (), *ways[0]), [1.0] * layers)]
    else:
        unmerged = [_Candidate(config.num_latents, None, (), *way) for way in ways]
        ends = list(product(unmerged, (latents_left(config, name, 1.0) for name in schedules)))
    return min(each.merging_about(left, config.min_latents).share(flops_share) for each, left in ends)


def check_reach(model: Any, flops_ratio: float, input_shape: Sequence[int]) -> None:
    """Check, before there are weights to measure, that a search can reach a share of the FLOPs.

    Raises:
        ValueError: in one line with the least share, if it cannot.
    """
    least = _least_share(_flops_share(model, [], input_shape), SEARCHED)
    if flops_ratio < least:
        raise out_of_reach(flops_ratio, least, "merging")


class _Chunk:
    """A few samples that run together.

    Attributes:
        inputs: arguments of `forward`, without labels.
        positions: (B, P) positions that are compared where each has an output; `None` where each sample has one.
        tokens: (B,) tokens that are no padding; `None` without a mask.
        before: unmerged outputs, (B, P, K), set before candidates are compared.
        preprocessed: as the base model's `preprocess` returns it; `None` until it is needed.
        read: latents that have read the inputs, and their sizes, by the groups that they start in.
    """

    before: Tensor

    def __init__(self, model: Any, batch: Batch) -> None:
        self.inputs = {name: value.to(model.device) for name, value in batch.items()}
        labels, mask = self.inputs.pop("labels", None), self.inputs.get("attention_mask")
        taken = self.inputs[_input_name(model, self.inputs)]
        self.rows = len(taken)
        self.tokens = None if mask is None or mask.dim() != 2 else mask.sum(dim=1)
        self.positions = _compared_positions(taken, mask, labels) if _is_masked_lm(model) else None
        self.forget()

    def forget(self) -> None:
        """Drop everything that can be computed again."""
        self.preprocessed: tuple[Tensor, Any, Any] | None = None
        self.read: dict[tuple[int, ...], tuple[Tensor, Tensor | None]] = {}


def _compared_positions(inputs: Tensor, mask: Tensor | None, labels: Tensor | None) -> Tensor:
    """Return (B, P) positions of a text, at most `POSITIONS`, spread evenly over those with a label, or a token."""
    asked = torch.ones(inputs.shape, dtype=torch.bool, device=inputs.device) if mask is None else mask > 0
    # A model of S positions answers them all, also where the text is shorter.
    labelled = asked if labels is None else labels[:, : inputs.shape[1]] != -100
    if labelled.shape == asked.shape and labelled.any(dim=1).all():
        asked = labelled
    order = torch.sort((~asked).int(), dim=1, stable=True).indices
    number, count = asked.sum(dim=1, keepdim=True).clamp(min=1), min(POSITIONS, asked.shape[1])
    return order.gather(1, torch.arange(count, device=asked.device) * number // count)


class Compared(NamedTuple):
    """Effect of merging on some samples, (B,) each.

    Attributes:
        divergence: `output_divergence`, the mean over the positions.
        changed: 1 where the answer is another, else 0.
        answers: class of the unmerged answer.
    """

    divergence: Tensor
    changed: Tensor
    answers: Tensor


class _Evaluator:
    """Run candidates on samples, which read the inputs only once.

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
        # Divergences by candidate and chunk, summed over its samples.
        self.sums: dict[tuple[_Candidate, int], float] = {}
        self.map(self.run_unmerged, chunks)
        before = torch.cat([chunk.before.flatten(0, 1) for chunk in chunks]).double()
        if not before.isfinite().all():
            raise FloatingPointError(f"the outputs of the model are not finite: {DAMAGED}")
        self.all_alike = len(before) > 1 and bool((before == before[:1]).all())
        self.deviation = float(before.std(dim=0).mean()) if len(before) > 1 else 0.0

    def map(self, function: Callable, values: Iterable[Any]) -> list[Any]:
        """Call a function with each value, in threads, without gradients."""
        return list(self.pool.map(torch.no_grad()(function), values))

    def run_unmerged(self, chunk: _Chunk) -> None:
        chunk.before = self._outputs(chunk, self.unmerged)

    def compare(self, chunk: _Chunk, candidate: _Candidate) -> Compared:
        """Compare a candidate's outputs with the unmerged ones."""
        before, after = chunk.before.double(), self._outputs(chunk, candidate).double()
        divergence = output_divergence(after.flatten(0, 1), before.flatten(0, 1), self.regression)
        # JSON has no infinity, so outputs that are not finite get the largest float32. Rounding may go below 0.
        largest = torch.finfo(torch.float32).max
        divergence = divergence.nan_to_num(largest, largest).clamp(0, largest).view(chunk.rows, -1).mean(dim=1)
        # One position of each sample answers for it, since positions of one sample are not independent.
        place = [row % before.shape[1] for row in range(chunk.rows)]
        one_before, one_after = (each[range(chunk.rows), place] for each in (before, after))
        if self.regression:
            changed = ~((after - before).abs().amax(dim=-1).mean(dim=1) <= 0.1 * self.deviation)
        else:
            changed = (one_after.argmax(dim=-1) != one_before.argmax(dim=-1)) | ~one_after.isfinite().all(dim=-1)
        return Compared(divergence.cpu(), changed.double().cpu(), one_before.argmax(dim=-1).cpu())

    def rank(self, candidates: Sequence[_Candidate], chunks: int) -> dict[_Candidate, float]:
        """Return the candidates with their mean divergences on the first chunks, the best first."""
        missing = [pair for pair in product(candidates, range(chunks)) if pair not in self.sums]
        for candidate, _ in missing:
            self.plan(candidate)  # Groups are read off all samples at once, so before the threads begin.

        def divergence(pair: tuple[_Candidate, int]) -> float:
            candidate, number = pair
            return float(self.compare(self.chunks[number], candidate).divergence.sum())

        self.sums.update(zip(missing, self.map(divergence, missing), strict=True))
        rows = sum(chunk.rows for chunk in self.chunks[:chunks])
        totals = {each: sum(self.sums[each, number] for number in range(chunks)) for each in candidates}
        # Rounded, so that different orders of summation on other processors decide nothing.
        means = [(each, float(f"{total / rows:.4g}")) for each, total in totals.items()]
        return dict(sorted(means, key=lambda pair: pair[1]))

    def plan(self, candidate: _Candidate) -> MergePlan:
        """Return the candidate's merge plan, with groups read off the samples if it has any."""
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
        key = candidate.start, candidate.left[: layer + 1], candidate.metric
        if key not in self.groups:
            alike = self.similarity(replace(candidate, left=candidate.left[:layer]), candidate.metric)
            self.groups[key] = average_linkage(alike, candidate.left[layer])
        return self.groups[key]

    def similarity(self, candidate: _Candidate, metric: str) -> Tensor:
        """Return (N, N) mean cosine similarities, in float64, of the latents that leave a candidate's last layer."""
        layer, plan = len(candidate.left), self.plan(candidate)
        module = self._module(layer)

        def similarities(chunk: _Chunk) -> Tensor:
            latents, sizes = self._encode(chunk, plan)
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

    def _encode(self, chunk: _Chunk, plan: MergePlan) -> tuple[Tensor, Tensor | None]:
        """Return the latents that leave the last layer, and their sizes."""
        latents, sizes = self._read(chunk, plan)
        for index, match_latents in enumerate(layer_matchers(plan, latents.device)):
            bias = latent_bias(self.config, sizes, latents.dtype)
            layer = call_layer(self._module(index), latents, sizes, match_latents, None, bias, False)
            latents, sizes = layer.hidden_states, layer.sizes
        return latents, sizes

    def _read(self, chunk: _Chunk, plan: MergePlan) -> tuple[Tensor, Tensor | None]:
        """Return the latents that have read the inputs, and their sizes, computed once for each way to start."""
        start = tuple(plan.latent_groups or ())
        if start in chunk.read:
            return chunk.read[start]
        inputs, mask = self._preprocess(chunk)[0], chunk.inputs.get("attention_mask")
        bias = None if mask is None else padding_bias(mask, inputs)
        learned = self.model.base_model.embeddings(batch_size=chunk.rows)
        layer = self.encoder.read(learned, inputs, bias, plan)
        if layer.hidden_states.nbytes * (len(chunk.read) + 1) * len(self.chunks) < KEPT_BYTES:
            chunk.read[start] = layer.hidden_states, layer.sizes
        return layer.hidden_states, layer.sizes

    def _preprocess(self, chunk: _Chunk) -> tuple[Tensor, Any, Any]:
        preprocessed = chunk.preprocessed
        if preprocessed is None:
            preprocessed = self.model.base_model.preprocess(chunk.inputs[_input_name(self.model, chunk.inputs)])
            # Pixels take more memory than latents.
            if preprocessed[0].nbytes * len(self.chunks) < KEPT_BYTES:
                chunk.preprocessed = preprocessed
        return preprocessed

    def _outputs(self, chunk: _Chunk, candidate: _Candidate) -> Tensor:
        """Return a candidate's outputs, (B, P or 1, K)."""
        latents, sizes = self._encode(chunk, self.plan(candidate))
        preprocessed = self._preprocess(chunk)

        def base(subsampled_output_points: dict[str, Tensor] | None = None, **_: Any) -> ToMePerceiverModelOutput:
            decode = self.model.base_model.decode
            logits, _attentions = decode(preprocessed, latents, sizes, subsampled_output_points, chunk.positions)
            return ToMePerceiverModelOutput(logits=logits, last_hidden_state=latents)

        logits = call_with_base(self.model, base, chunk.inputs).get("logits")
        if not isinstance(logits, Tensor):
            name = type(self.model).__name__
            raise ValueError(f"samples: {name} has no single tensor of logits to compare; use a budget without samples")
        return logits[:, None] if logits.dim() == 2 else logits.flatten(1, -2)


def _measured(
    evaluator: _Evaluator, candidates: Sequence[_Candidate], held_out: Sequence[_Chunk], deadline: float
) -> list[FrontierRow]:
    """Measure candidates on samples that took no part in the search."""
    rows = [FrontierRow(evaluator.merging(each), each.share(evaluator.flops_share)) for each in candidates]
    for chunk in evaluator.chunks:
        chunk.forget()

    def compare(chunk: _Chunk) -> list[Compared] | None:
        if time.monotonic() > deadline:
            return None
        evaluator.run_unmerged(chunk)
        compared = [evaluator.compare(chunk, candidate) for candidate in candidates]
        chunk.forget()
        bar.update(chunk.rows)
        return compared

    with tqdm(total=sum(chunk.rows for chunk in held_out), desc="measuring", unit="sample", disable=None) as bar:
        found = evaluator.map(compare, held_out)
    done = [(chunk, compared) for chunk, compared in zip(held_out, found, strict=True) if compared is not None]
    chunks = [chunk for chunk, _ in done]
    for place, row in enumerate(rows if done else ()):
        parts = zip(*(compared[place] for _, compared in done), strict=True)
        each = Compared(*(torch.cat(part) for part in parts))
        count, samples = int(each.changed.sum()), len(each.changed)
        rows[place] = replace(
            row,
            divergence=float(f"{each.divergence.mean():.4g}"),
            changed=count / samples,
            changed_bound=binomial_bound(count, samples),
            who=_who_changes(evaluator, chunks, each),
        )
    return rows


def _who_changes(evaluator: _Evaluator, chunks: Sequence[_Chunk], each: Compared) -> dict[str, Any]:
    """Return whose answers change.

    Returns:
        `samples`; `groups`, for the class that changes most and for short and long inputs the share that changes and
        the number of samples; `worst_tenth`, the share of all divergence that lies in a tenth of the samples.
    """

    def figures(chosen: Tensor) -> list[float]:
        return [float(each.changed[chosen].mean()), int(chosen.sum())]

    groups: dict[str, list[float]] = {}
    if each.answers.max() > 0 and not evaluator.regression and chunks[0].positions is None:
        classes = {answer: figures(each.answers == answer) for answer in each.answers.unique().tolist()}
        large = [answer for answer, (_, count) in classes.items() if count >= FEW_SAMPLES]
        if large:
            worst = max(large, key=lambda answer: classes[answer][0])
            groups[f"class {evaluator.config.id2label[worst]}"] = classes[worst]
    lengths = [chunk.tokens for chunk in chunks if chunk.tokens is not None]
    if len(lengths) == len(chunks):
        tokens = torch.cat(lengths).cpu()
        middle = int(tokens.median())
        short = tokens <= middle
        if min(short.sum(), (~short).sum()) >= FEW_SAMPLES:
            groups |= {f"up to {middle} tokens": figures(short), f"over {middle}": figures(~short)}
    total, most = each.divergence.sum(), each.divergence.topk(max(1, len(each.divergence) // 10)).values
    tenth = float(most.sum() / total) if total > 0 else 0.0
    return {"samples": len(each.changed), "groups": groups, "worst_tenth": tenth}


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
        num_groups: M, from 1 to N, also with ties.

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
        raise ValueError("samples: none given; must be a batch or more of arguments of the model")
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


def _spread(values: Sequence[Any], most: int) -> list[Any]:
    """Return at most this many values, spread evenly over all of them."""
    return [values[place * len(values) // most] for place in range(most)] if len(values) > most else list(values)


def _distinct(candidates: Iterable[_Candidate | None]) -> list[_Candidate]:
    return list(dict.fromkeys(each for each in candidates if each is not None))
