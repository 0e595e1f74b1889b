# SPDX-License-Identifier: Apache-2.0
"""Frontier of a model: the cost of merging against the change of the outputs, measured on unlabelled samples.

The first half defines the result: `Frontier` holds `FrontierRow`s and is saved in `config.merge_frontier`; `choose`
picks a row for a budget. `model.calibrate` and `model.merge_to` call this module.

The second half, from `calibrate` on, searches for the rows. `_Search.run` chooses a schedule for each of several shares
of the FLOPs, from mild to strong. For each share, `_Proposals.for_share` makes candidates, mostly by merging more in
the best candidates of the previous share. `_Evaluator` measures the divergence of their outputs from the unmerged
outputs on a quarter of the samples; all candidates share the work of reading the inputs. The other samples are held
out: the chosen rows are measured on them, so that `choose` can promise how many answers change. The search is
deterministic: it reads the clock only if `seconds` limits it, and one thread computes each batch, so machine load and
the number of threads change nothing.

Letters: B batch, S inputs, P compared positions, N latents, M latents left, L layers, K classes.
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

# layers_tome_perceiver.py explains the two ways to import.
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
        out_of_reach_error,
        round_schedule,
        undisturbed,
        weakest_within,
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
        out_of_reach_error,
        round_schedule,
        undisturbed,
        weakest_within,
    )
    from layers_tome_perceiver import METRICS, MergePlan, call_layer, latent_bias, layer_matchers
    from merging_tome_perceiver import check_merge_method
    from modeling_tome_perceiver import ToMePerceiverModelOutput, call_with_base, padding_bias

Batch = Mapping[str, Tensor]
"""Arguments of a model's `forward` by name, each a tensor with B rows."""

GROUPS = "groups"
"""Name to give in place of a matching method: fixed groups of latents, clustered by mean similarity on the samples."""
# Pairs of a matching method and a similarity metric that a search tries by default.
SEARCHED_METHODS = (
    ("leader", "hidden"),
    ("leader", "key"),
    ("bipartite", "hidden"),
    ("bipartite", "key"),
    (GROUPS, "hidden"),
)
# Defaults for a schedule chosen without samples: `leader` on keys lost the least accuracy in docs/results/choice and
# docs/results/language.
NO_DATA_METHOD, NO_DATA_METRIC = "leader", "key"

# Confidence of the bounds on changed answers.
CONFIDENCE = 0.95
# Limits of a search: unmerged forward passes for each sample, and total FLOPs (a few minutes on two CPU cores).
PASSES_PER_SAMPLE, SEARCH_FLOPS = 12, 3e13
# Most samples in a chunk, and most positions compared in each sample of a masked language model.
CHUNK_SAMPLES, COMPARED_POSITIONS = 16, 16
# Candidates within this factor of the least divergence are tied; the one that merges in fewest layers wins.
TIED_FACTOR = 1.1
# Most bytes of each cache that all candidates share: one of preprocessed inputs, one of latents that have read them.
CACHED_BYTES = 2**30
# With fewer samples, the ranking of candidates, or the share of changed answers in a group, is mostly noise.
FEW_SAMPLES = 32
# Number of rounds in which the rows are timed for a latency budget.
TIMED_ROUNDS = 15
NOT_FINITE_CAUSE = "the weights of the model are damaged or training has diverged"


@dataclass(frozen=True)
class FrontierRow:
    """Merging settings with their cost and their effect on the outputs; `None` marks figures that were not measured.

    Attributes:
        merging: merging settings.
        flops_ratio: share of the unmerged model's FLOPs, with the matching.
        divergence: mean divergence of the outputs from the unmerged outputs (`output_divergence`).
        changed: share of held-out samples whose answer changes.
        changed_bound: upper bound of that share for samples of the same distribution, at 95 % confidence.
        who: which samples change most (`_summarize_changes`).
        speedup: speed-up over the unmerged model on this machine.
    """

    merging: Merging
    flops_ratio: float
    divergence: float | None = None
    changed: float | None = None
    changed_bound: float | None = None
    who: dict[str, Any] = field(default_factory=dict)
    speedup: float | None = None

    def describe(self, num_blocks: int) -> str:
        """Describe in a few words what merges; the blocks are named if they differ from `num_blocks`."""
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
        """Describe in at most three lines how many answers change, and for which samples."""
        if self.changed is None:
            return []
        samples, tenth = self.who["samples"], self.who["worst_tenth"]
        bound = "" if self.changed_bound is None else f", below {self.changed_bound:.2%} at 95 % confidence"
        lines = [f"changed answers: {self.changed:.2%} of {samples}{bound}"]
        if self.who["groups"]:
            # Saving a config sorts its keys and puts "over 9" before "up to 9 tokens"; show short inputs first.
            groups = sorted(self.who["groups"].items(), key=lambda group: group[0].startswith("over "))
            shares = [f"{_printable(name)} {share:.1%} of {count}" for name, (share, count) in groups]
            lines.append(f"changed most: {', '.join(shares)}")
        return [*lines, f"worst tenth of the samples: {tenth:.0%} of the divergence"]


def _printable(name: str) -> str:
    """Return a name with its control characters escaped: names of classes come from a config that anyone may write."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in name)


@dataclass(frozen=True)
class Frontier:
    """Result of a calibration: rows from mild to strong, and the model and samples that they were measured on.

    Attributes:
        rows: rows, by falling share of the FLOPs.
        num_blocks: number of weight-shared blocks that the unmerged model runs.
        input_shape: shape of the one input that the FLOPs are counted for.
        searched, held_out: numbers of samples that the rows were chosen on and measured on.
        weights: fingerprint of the model's weights (`_weight_fingerprint`).
    """

    rows: list[FrontierRow]
    num_blocks: int
    input_shape: tuple[int, ...]
    searched: int
    held_out: int
    weights: list[float] = field(repr=False)

    @classmethod
    def of(cls, config: Any) -> Frontier | None:
        """Return the frontier saved in a config, or `None`."""
        saved = config.merge_frontier
        if saved is None:
            return None
        names = {each.name for each in fields(FrontierRow)}
        rows = [
            FrontierRow(
                **{name: row[name] for name in names & set(row)} | {"merging": Merging.of(config.merged_as(row))}
            )
            for row in saved["rows"]
        ]
        others = {each.name: saved[each.name] for each in fields(cls)}
        return cls(**others | {"rows": rows, "input_shape": tuple(saved["input_shape"])})

    def was_measured_on(self, model: Any) -> bool:
        """Return whether the weights fit a model's; rounding to half precision is allowed, training is not."""
        pairs = list(zip_longest(self.weights, _weight_fingerprint(model), fillvalue=math.nan))
        return all(abs(a - b) <= 0.01 * max(abs(a), abs(b), 1e-3) for a, b in pairs)

    def to_dict(self) -> dict[str, Any]:
        """Return the frontier as `config.merge_frontier` stores it, in JSON types."""
        frontier = asdict(self) | {"input_shape": list(self.input_shape)}
        for row in frontier["rows"]:
            del row["speedup"]
            settings = row["merging"].items()
            row["merging"] = {
                name: value for name, value in settings if name in FRONTIER_SETTINGS and value is not None
            }
        return frontier

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
    """Row chosen for a budget, and the frontier that it comes from.

    Attributes:
        chosen: the chosen row.
        num_blocks: number of weight-shared blocks that the unmerged model runs.
        frontier: frontier that the row comes from; `None` for a schedule chosen without a search.
    """

    chosen: FrontierRow
    num_blocks: int
    frontier: Frontier | None = None

    def __str__(self) -> str:
        """Describe the chosen row in a few lines."""
        row = self.chosen
        speed = "" if row.speedup is None else f", {row.speedup:.2f} times as fast as unmerged"
        first = f"{row.flops_ratio:.3f} of the FLOPs{speed}: {row.describe(self.num_blocks)}"
        return "\n".join([first, *row.lines()])


@dataclass(frozen=True)
class SearchOptions:
    """Options of a search: the keyword arguments of `model.calibrate` and `model.merge_to`.

    Attributes:
        seconds: time limit; the search ends after about this time with the best candidates so far.
        flops_ratios: shares of the FLOPs to search in addition to those from 0.9 down to the least in reach.
        schedules: names in `SCHEDULES`, or `SKIP_BLOCKS`; only these are tried, in place of a free search.
        merge_methods, merge_metrics: matching methods (or `"groups"`) and similarity metrics to try.
        input_shape: shape of the one input that FLOPs are counted for, (1, S) or (1, 3, height, width); by default that
            of the longest sample.

    Raises:
        ValueError: for an unknown name or a number out of range.
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
                raise ValueError(f"{name}={value!r}: must be a list; use [{value!r}]")
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

    def matchings(self, default: Sequence[tuple[str, str]] = SEARCHED_METHODS) -> list[tuple[str, str]]:
        """Return pairs of a matching method and a similarity metric; lists not given come from `default`."""
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
    """Choose merging settings for one budget, without applying them.

    `model.merge_to` also applies them; its docstring describes the budgets, the samples and the errors.

    Args:
        model: model with a head that returns logits.
        options: fields of `SearchOptions`.
    """
    budgets = {"flops_ratio": flops_ratio, "latency_ratio": latency_ratio, "max_changed": max_changed}
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"{len(given)} budgets given; use one of flops_ratio, latency_ratio and max_changed")
    ((budget, limit),) = given.items()
    check_share(budget, limit)
    batches = [] if samples is None else _check_samples(samples)
    options = {name: value for name, value in options.items() if value is not None}
    # The frontier in the config fits only if no options were given.
    frontier, num_blocks = None if options else Frontier.of(model.config), model.unmerged.num_blocks
    if frontier is None and (not batches or "schedules" in options and budget != "max_changed"):
        return Choice(_choose_schedule(model, budget, limit, batches, options), num_blocks)
    if frontier is None:
        if budget == "flops_ratio":
            options["flops_ratios"] = [*options.get("flops_ratios", ()), limit]
        frontier = calibrate(model, batches, **options)
    elif budget != "max_changed" and not frontier.was_measured_on(model):
        warnings.warn("the frontier was measured on other weights; call model.calibrate(samples) again", stacklevel=3)
    if budget == "flops_ratio":
        # Choose the same row as a call with `model(..., flops_ratio=...)`.
        row = model.config.frontier_row(limit)
        return Choice(frontier.rows[model.config.merge_frontier["rows"].index(row)], num_blocks, frontier)
    if budget == "max_changed":
        return Choice(_choose_promised(model, frontier, limit), num_blocks, frontier)
    return Choice(_choose_fast_enough(model, frontier.rows, limit, batches), num_blocks, frontier)


def _choose_schedule(
    model: Any, budget: str, limit: float, batches: Sequence[Batch], given: dict[str, Any]
) -> FrontierRow:
    """Choose a schedule for a FLOPs or latency budget, without a search."""
    if unused := set(given) - {"schedules", "input_shape", "merge_methods", "merge_metrics"}:
        raise ValueError(f"{min(unused)}: needs samples to calibrate on; give samples, and no schedules")
    if budget == "max_changed" or (budget == "latency_ratio" and not batches):
        raise ValueError(f"{budget}: needs samples; give samples or call model.calibrate(samples) first")
    options = SearchOptions(**given)
    share = _flops_share(model, batches, options.input_shape)
    method, metric = options.matchings([(NO_DATA_METHOD, NO_DATA_METRIC)])[0]
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
    return _choose_fast_enough(model, rows, limit, batches)


def _choose_promised(model: Any, frontier: Frontier, max_changed: float) -> FrontierRow:
    """Return the cheapest row that changes at most a share `max_changed` of the answers, at 95 % confidence.

    Rows are tested from mild to strong, and the first failure ends the tests. With this fixed order, no correction for
    multiple tests is needed (fixed-sequence testing: Angelopoulos et al., 2021, "Learn then Test", arXiv:2110.01052).

    Raises:
        ValueError: if there are too few held-out samples, if the frontier was measured on other weights, or if it has
            no shares of changed answers.
    """
    if not frontier.was_measured_on(model):
        raise ValueError("max_changed: the frontier was measured on other weights; call model.calibrate(samples) again")
    needed = held_out_to_promise(max_changed)
    if frontier.held_out < needed:
        raise ValueError(
            f"max_changed={max_changed}: {frontier.held_out} held-out samples are too few for 95 % confidence; "
            f"calibrate on {math.ceil(needed * 4 / 3) + CHUNK_SAMPLES} samples or more, with enough seconds"
        )
    if frontier.rows and all(row.changed_bound is None for row in frontier.rows):
        raise ValueError(
            f"max_changed={max_changed}: the frontier has no shares of changed answers, as it was measured on training "
            "samples; call model.calibrate(samples) with others"
        )
    passed = None
    for row in frontier.rows:
        if row.changed_bound is None or row.changed_bound > max_changed:
            break
        passed = row
    if passed is not None:
        return passed
    warnings.warn(
        f"max_changed={max_changed}: even the mildest row of the frontier may change more answers, so nothing merges",
        stacklevel=4,
    )
    who = {"samples": frontier.held_out, "groups": {}, "worst_tenth": 0.0}
    return FrontierRow(model.unmerged, 1.0, 0.0, 0.0, 0.0, who)


def _choose_fast_enough(
    model: Any, rows: Sequence[FrontierRow], latency_ratio: float, batches: Sequence[Batch]
) -> FrontierRow:
    """Time the rows and return the one with the least divergence within a share of the unmerged model's time.

    Raises:
        ValueError: if no row is fast enough, or there is no batch to time.
    """
    if not batches:
        raise ValueError(f"latency_ratio={latency_ratio}: needs samples to time; give samples")
    device = _running_device(model)
    inputs = {name: value.to(device) for name, value in batches[0].items()}

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
            f"latency_ratio={latency_ratio} is out of reach: the fastest settings take "
            f"{1 / max(speedups):.2f} of the unmerged model's time on this machine"
        )
    return min(within, key=lambda row: (row.divergence or 0.0, -row.flops_ratio))


def held_out_to_promise(max_changed: float) -> int:
    """Return the least number of held-out samples to promise `max_changed`; it is enough if no answer changes."""
    return math.ceil(math.log(1 - CONFIDENCE) / math.log1p(-max_changed)) if max_changed < 1 else 1


def binomial_bound(changed: int, samples: int) -> float:
    """Return the exact upper bound of the share that changes, at 95 % confidence (Clopper & Pearson, 1934)."""
    if changed >= samples:
        return 1.0
    log_counts = [
        math.lgamma(samples + 1) - math.lgamma(k + 1) - math.lgamma(samples - k + 1) for k in range(changed + 1)
    ]

    def at_most_changed(share: float) -> float:
        return sum(
            math.exp(log_count + k * math.log(share) + (samples - k) * math.log1p(-share))
            for k, log_count in enumerate(log_counts)
        )

    low, high = changed / samples, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if at_most_changed(middle) > 1 - CONFIDENCE else (low, middle)
    return high


def calibrate(model: Any, samples: Batch | Iterable[Batch], **options: Any) -> Frontier:
    """Search for the frontier of a model, measure it, and save it in `config.merge_frontier`.

    Args:
        model: model with a head that returns logits, on the device that will run it.
        samples: one batch or several, each a dict of arguments of the model. `labels` are optional and only select the
            positions to compare.
        options: fields of `SearchOptions`.

    Raises:
        ValueError: for unusable samples or options, or a share of the FLOPs that is out of reach.
        FloatingPointError: for outputs that are not finite.
    """
    search_options, started = SearchOptions(**options), time.monotonic()
    seconds = math.inf if search_options.seconds is None else search_options.seconds
    batches = _check_samples(samples)
    share = _flops_share(model, batches, search_options.input_shape)
    with undisturbed(model), model.unmerged.applied(model.config), _one_thread_per_chunk(model) as threads:
        chunks = [_Chunk(model, batch) for batch in _split_batches(batches, share.unmerged_flops)]
        given = sum(chunk.num_samples for chunk in chunks)
        held_out = [chunk for place, chunk in enumerate(chunks) if place % 4]
        evaluator = _Evaluator(model, chunks[::4], share, threads)
        if given < FEW_SAMPLES:
            problem = f"{given} samples; with fewer than {FEW_SAMPLES} the ranking is mostly noise"
            warnings.warn(f"samples: {problem}", stacklevel=4)
        elif evaluator.outputs_are_equal:
            problem = "the model's outputs are alike for all of them, so they cannot show what merging changes"
            warnings.warn(f"samples: {problem}; use more varied samples", stacklevel=4)
        proposals = _Proposals(evaluator, search_options.matchings(), search_options.schedules)
        passes = min(PASSES_PER_SAMPLE * given, SEARCH_FLOPS / share.unmerged_flops)
        chosen = _Search(evaluator, proposals, started + 0.6 * seconds).run(search_options.flops_ratios or (), passes)
        rows = _measure(evaluator, chosen, held_out, started + seconds)
    measured, weights = rows[0].who.get("samples", 0), _weight_fingerprint(model)
    if evaluator.num_samples + measured < given:
        problem = f"time was up after {measured} of {given - evaluator.num_samples} held-out samples were measured"
        warnings.warn(f"seconds={search_options.seconds}: {problem}", stacklevel=3)
    frontier = Frontier(rows, model.unmerged.num_blocks, share.input_shape, evaluator.num_samples, measured, weights)
    model.config.merge_frontier = frontier.to_dict()
    model.config.check_merging()
    return frontier


@dataclass(frozen=True)
class _Candidate:
    """Candidate of the search: a schedule, a matching method and a similarity metric.

    Attributes:
        latents: number of latents that read the inputs.
        start: group of each of the N learned latents, merged before they read the inputs; `None` if they do not merge.
        left: latents left after each layer that runs.
        method, metric: as in the config; with `GROUPS` as the method, the groups come from the metric.
    """

    latents: int
    start: tuple[int, ...] | None
    left: tuple[int, ...]
    method: str
    metric: str

    @property
    def removed(self) -> list[int]:
        """Latents to remove in each layer."""
        return [before - after for before, after in pairwise([self.latents, *self.left])]

    def share(self, flops_share: FlopsShare) -> float:
        """Return the candidate's share of the unmerged FLOPs."""
        method = None if self.method == GROUPS else self.method
        return flops_share.for_latents([self.latents, *self.left], method, self.metric)

    def with_latents_left(self, left: Sequence[float], min_latents: int) -> _Candidate:
        """Return a copy with about these numbers of latents left after the layers."""
        removed = round_schedule(self.latents, left, min_latents)
        return replace(self, left=tuple(self.latents - total for total in accumulate(removed)))


class _Search:
    """Search for the best candidate at each of several shares of the FLOPs, from mild to strong.

    Args:
        evaluator: measures candidates.
        proposals: makes candidates.
        deadline: time by `time.monotonic` after which the search measures nothing more.
    """

    def __init__(self, evaluator: _Evaluator, proposals: _Proposals, deadline: float) -> None:
        self.evaluator, self.proposals, self.deadline = evaluator, proposals, deadline

    def run(self, wanted: Sequence[float], passes: float) -> list[_Candidate]:
        """Return the best candidate for each share, by falling share.

        Args:
            wanted: shares to add to those of `_target_shares`.
            passes: budget of the search, in unmerged forward passes of one sample.

        Raises:
            ValueError: for a share that no candidate reaches.
        """
        proposals, least = self.proposals, self.proposals.least
        if wanted and min(wanted) < least:
            subject = "merging" if proposals.schedules is None else f"schedule {proposals.schedules[0]}"
            raise out_of_reach_error(min(wanted), least, subject)
        targets = sorted({*_target_shares(least), *wanted}, reverse=True)
        parents, chosen = proposals.unmerged, []
        for target in tqdm(targets, desc="calibrating", unit="share", disable=None):
            candidates = _distinct(proposals.for_share(target, parents))
            parents = candidates[:1] if self._is_over else self._find_best(candidates, target, passes / len(targets))
            chosen.append(parents[0])
        # Scaled to merge less in all layers, the candidate of a stronger share may also be the best for a milder one.
        for place in range(len(chosen) - 2, -1, -1) if proposals.schedules is None else ():
            milder = proposals.scale(chosen[place + 1], targets[place])
            if milder is not None and not self._is_over:
                chosen[place] = self._rank_on_all_samples([chosen[place], milder])[0]
        return _distinct(chosen)

    @property
    def _is_over(self) -> bool:
        return time.monotonic() > self.deadline

    def _find_best(self, candidates: Sequence[_Candidate], target: float, passes: float) -> list[_Candidate]:
        """Return up to three of the candidates for a share, the best first.

        Successive halving: each round keeps half of the candidates and doubles the samples (Jamieson & Talwalkar, 2016,
        "Non-stochastic best arm identification"). The neighbours of the first round's best join the second round.
        """
        chunks = self.evaluator.chunks
        rounds = [2**power for power in range(len(chunks).bit_length()) if 2**power < len(chunks)]
        count = int(passes / (target * chunks[0].num_samples * (len(rounds) + 2)))
        alive = candidates[: max(6, count)]
        for number, round_chunks in enumerate(rounds):
            if number == 1 and self.proposals.schedules is None:
                neighbours = _distinct(self.proposals.neighbours(alive[0], target))
                alive = _distinct([*alive, *neighbours[: max(3, count // 2)]])
            alive = list(self.evaluator.rank(alive, round_chunks))[: max(3, count >> (number + 1))]
        return self._rank_on_all_samples(alive)[:3]

    def _rank_on_all_samples(self, candidates: Sequence[_Candidate]) -> list[_Candidate]:
        """Rank candidates by divergence on all samples of the search.

        Of those tied with the best, the one that merges in fewest layers comes first, because each matching takes time
        that the FLOPs do not show.
        """
        ranked = self.evaluator.rank(candidates, len(self.evaluator.chunks))
        tied = [each for each, divergence in ranked.items() if divergence <= TIED_FACTOR * min(ranked.values())]
        first = min(tied, key=lambda each: sum(map(bool, each.removed)))
        return [first, *(each for each in ranked if each != first)]


def _target_shares(least: float) -> list[float]:
    """Return shares from 0.9 down to the least in reach: 0.1 apart, or closer to make at least eight."""
    for steps in (10, 20):
        above = [step / steps for step in range(steps - steps // 10, 0, -1) if step / steps > least + 0.01]
        if len(above) >= 7:
            return [*above, least]
    return [least + (0.9 - least) * step / 7 for step in range(7, -1, -1)] if least < 0.9 else [least]


class _Proposals:
    """Makes candidates within a share of the FLOPs. Its methods return `None` for a candidate that cannot reach it.

    Args:
        evaluator: measures the similarities by which learned latents are grouped.
        matchings: pairs of a matching method and a similarity metric.
        schedules: names of the only schedules to try; `None` to search freely.
    """

    def __init__(
        self, evaluator: _Evaluator, matchings: Sequence[tuple[str, str]], schedules: Sequence[str] | None
    ) -> None:
        self.config, self.flops_share = evaluator.config, evaluator.flops_share
        self.matchings, self.schedules = matchings, schedules
        self.unmerged = [replace(evaluator.unmerged, method=method, metric=metric) for method, metric in matchings]
        # Candidates that merge only the learned latents, before these read the inputs; from many groups to few.
        self.grouped: list[_Candidate] = []
        if schedules is None:
            alike = evaluator.similarity(replace(self.unmerged[0], left=()), "hidden")
            for count in _start_counts(self.config):
                start, left = tuple(average_linkage(alike, count)), (count,) * self.config.num_self_attention_layers
                self.grouped.append(_Candidate(count, start, left, *matchings[0]))
        self.least = _least_share(self.flops_share, matchings, schedules)

    def for_share(self, target: float, parents: Sequence[_Candidate]) -> Iterator[_Candidate | None]:
        """Make the candidates for a share from the best ones of the previous share; the most promising come first."""
        if self.schedules is not None:
            for name, candidate in product(self.schedules, self.unmerged):
                yield self._fit(candidate, target, partial(latents_left, self.config, name))
            return
        others = [self._make_stronger(parent, target) for parent in parents[1:3]]
        yield from chain.from_iterable(
            zip_longest(self._make_stronger(parents[0], target), self._make_seeds(target), *others)
        )

    def _fit(self, candidate: _Candidate, target: float, left: Callable[[float], Sequence[float]]) -> _Candidate | None:
        """Set the latents after the layers to `left(strength)`, with the least strength that meets the share."""

        def make(strength: float) -> _Candidate:
            return candidate.with_latents_left(left(strength), self.config.min_latents)

        return weakest_within(make, target, lambda each: each.share(self.flops_share))

    def _make_seeds(self, target: float) -> Iterator[_Candidate | None]:
        """Make candidates from scratch: equal latents in all layers; fewer blocks; grouped learned latents."""
        per_block, all_blocks = self.config.num_self_attends_per_block, self.config.num_blocks
        for blocks in range(all_blocks, 0, -1):
            for each in [self.unmerged[0], *self.grouped] if blocks >= all_blocks - 1 else self.unmerged[:1]:
                yield self._cap(replace(each, left=each.left[: blocks * per_block]), target, 0, flat=True)

    def _make_stronger(self, parent: _Candidate, target: float) -> Iterator[_Candidate | None]:
        """Vary a parent: fewer latents in all layers; one block fewer; fewer latents at the start; another matching."""
        yield self.scale(parent, target)
        per_block = self.config.num_self_attends_per_block
        if len(parent.left) > per_block:
            yield self.scale(replace(parent, left=parent.left[:-per_block]), target)
        for each in [each for each in self.grouped if each.latents < parent.latents][:2]:
            left = tuple(min(count, each.latents) for count in parent.left)
            yield self.scale(replace(parent, latents=each.latents, start=each.start, left=left), target)
        for method, metric in self.matchings:
            if (method, metric) != (parent.method, parent.metric):
                yield self.scale(replace(parent, method=method, metric=metric), target)

    def scale(self, parent: _Candidate, target: float) -> _Candidate | None:
        """Return the parent with fewer or more latents in all layers, so that it meets the share."""

        def left(strength: float) -> list[float]:
            if strength <= 0.5:
                return [parent.latents ** (1 - 2 * strength) * count ** (2 * strength) for count in parent.left]
            return [count ** (2 - 2 * strength) for count in parent.left]

        return self._fit(parent, target, left)

    def _cap(self, parent: _Candidate, target: float, layer: int, flat: bool) -> _Candidate | None:
        """Cap the parent's latents from a layer on, so that it meets the share; if `flat`, set them all to the cap."""
        reaching = parent.left[layer - 1] if layer else parent.latents

        def left(strength: float) -> list[float]:
            cap = reaching ** (1 - strength)
            return [*parent.left[:layer], *(cap if flat else min(each, cap) for each in parent.left[layer:])]

        return self._fit(parent, target, left)

    def neighbours(self, best: _Candidate, target: float) -> Iterator[_Candidate | None]:
        """Make candidates of the same share: one layer keeps a quarter more latents, and all layers after it fewer."""
        for layer in _evenly_spaced(range(len(best.left) - 1), 12):
            reaching = best.left[layer - 1] if layer else best.latents
            kept = min(reaching, math.ceil(1.25 * best.left[layer]))
            if kept > best.left[layer]:
                postponed = replace(best, left=(*best.left[:layer], kept, *best.left[layer + 1 :]))
                for flat in (False, True):
                    yield self._cap(postponed, target, layer + 1, flat)


def _start_counts(config: Any) -> list[int]:
    """Return the numbers of groups of learned latents to try, from 7/8 of N down to 3/8."""
    latents = config.num_latents
    counts = [max(config.min_latents, math.ceil(eighths * latents / 8)) for eighths in range(7, 2, -1)]
    return [count for count in dict.fromkeys(counts) if count < latents]


def _least_share(
    flops_share: FlopsShare, matchings: Sequence[tuple[str, str]], schedules: Sequence[str] | None = None
) -> float:
    """Return the least share of the FLOPs that a search can reach."""
    config, layers = flops_share.config, flops_share.config.num_self_attention_layers
    if schedules is None:
        latents = min([config.num_latents, *_start_counts(config)])
        strongest = [(_Candidate(latents, None, (), *matchings[0]), [1.0] * layers)]
    else:
        unmerged = [_Candidate(config.num_latents, None, (), *matching) for matching in matchings]
        strongest = list(product(unmerged, (latents_left(config, name, 1.0) for name in schedules)))
    return min(each.with_latents_left(left, config.min_latents).share(flops_share) for each, left in strongest)


def check_reach(model: Any, flops_ratio: float, input_shape: Sequence[int]) -> None:
    """Check that a search can reach a share of the FLOPs; needs no samples and no trained weights.

    Raises:
        ValueError: if it cannot; the message has the least share that it can reach.
    """
    least = _least_share(_flops_share(model, [], input_shape), SEARCHED_METHODS)
    if flops_ratio < least:
        raise out_of_reach_error(flops_ratio, least, "merging")


class _Chunk:
    """Small batch of samples, with cached results that all candidates share.

    Attributes:
        inputs: arguments of `forward`, without labels.
        positions: (B, P) compared positions of a masked language model; `None` for other heads.
        tokens: (B,) number of tokens without padding; `None` without a mask.
        unmerged_outputs: (B, P, K), set before candidates are compared.
        preprocessed: cached result of the base model's `preprocess`.
        read_latents: cached latents that have read the inputs, and their sizes, by groups of the learned latents.
    """

    unmerged_outputs: Tensor

    def __init__(self, model: Any, batch: Batch) -> None:
        device = _running_device(model)
        self.inputs = {name: value.to(device) for name, value in batch.items()}
        labels, mask = self.inputs.pop("labels", None), self.inputs.get("attention_mask")
        taken = self.inputs[_input_name(model, self.inputs)]
        self.num_samples = len(taken)
        self.tokens = None if mask is None or mask.dim() != 2 else mask.sum(dim=1)
        self.positions = _compared_positions(taken, mask, labels) if _is_masked_lm(model) else None
        self.drop_cache()

    def drop_cache(self) -> None:
        """Free the cached results, which can be computed again."""
        self.preprocessed: tuple[Tensor, Any, Any] | None = None
        self.read_latents: dict[tuple[int, ...], tuple[Tensor, Tensor | None]] = {}


def _compared_positions(inputs: Tensor, mask: Tensor | None, labels: Tensor | None) -> Tensor:
    """Return (B, P) positions, evenly spaced among the labelled ones if each text has some, else among all tokens."""
    eligible = torch.ones(inputs.shape, dtype=torch.bool, device=inputs.device) if mask is None else mask > 0
    # Labels cover all positions of the model, even if the text is shorter.
    labelled = eligible if labels is None else labels[:, : inputs.shape[1]] != -100
    if labelled.shape == eligible.shape and labelled.any(dim=1).all():
        eligible = labelled
    order = torch.sort((~eligible).int(), dim=1, stable=True).indices
    number, count = eligible.sum(dim=1, keepdim=True).clamp(min=1), min(COMPARED_POSITIONS, eligible.shape[1])
    return order.gather(1, torch.arange(count, device=eligible.device) * number // count)


class Compared(NamedTuple):
    """Effect of merging on samples; each field has shape (B,).

    Attributes:
        divergence: mean `output_divergence` over the compared positions.
        changed: 1 if the answer changes, else 0.
        answers: class that the unmerged model answers.
    """

    divergence: Tensor
    changed: Tensor
    answers: Tensor


class _Evaluator:
    """Runs candidates on samples and compares their outputs with the unmerged outputs.

    Args:
        model: model with a head that returns logits, unmerged and in evaluation mode.
        chunks: samples of the search, without the held-out samples.
        flops_share: counts FLOPs of the model.
        threads: number of chunks to run at the same time.
    """

    def __init__(self, model: Any, chunks: list[_Chunk], flops_share: FlopsShare, threads: int) -> None:
        self.model, self.config, self.encoder = model, model.config, model.base_model.encoder
        self.chunks, self.flops_share, self.pool = chunks, flops_share, ThreadPoolExecutor(threads)
        self.num_samples = sum(chunk.num_samples for chunk in chunks)
        numbers = self.config.problem_type == "regression" or self.config.num_labels == 1
        self.regression = not _is_masked_lm(model) and (numbers or "OpticalFlow" in type(model).__name__)
        latents, layers = self.config.num_latents, self.config.num_self_attention_layers
        self.unmerged = _Candidate(latents, None, (latents,) * layers, "leader", "key")
        self.groups: dict[tuple, list[int]] = {}
        # Sum of the divergences of a chunk's samples, by candidate and index of the chunk.
        self.sums: dict[tuple[_Candidate, int], float] = {}
        self.map(self.run_unmerged, chunks)
        before = torch.cat([chunk.unmerged_outputs.flatten(0, 1) for chunk in chunks]).double()
        if not before.isfinite().all():
            raise FloatingPointError(f"the outputs of the model are not finite: {NOT_FINITE_CAUSE}")
        self.outputs_are_equal = len(before) > 1 and bool((before == before[:1]).all())
        self.deviation = float(before.std(dim=0).mean()) if len(before) > 1 else 0.0

    def map(self, function: Callable, values: Iterable[Any]) -> list[Any]:
        """Call a function with each value, in parallel threads and without gradients."""
        return list(self.pool.map(torch.no_grad()(function), values))

    def run_unmerged(self, chunk: _Chunk) -> None:
        chunk.unmerged_outputs = self._outputs(chunk, self.unmerged)

    def compare(self, chunk: _Chunk, candidate: _Candidate) -> Compared:
        """Compare a candidate's outputs with the unmerged ones."""
        before, after = chunk.unmerged_outputs.double(), self._outputs(chunk, candidate).double()
        divergence = output_divergence(after.flatten(0, 1), before.flatten(0, 1), self.regression)
        # JSON has no infinity, so non-finite outputs get the largest float32. Rounding errors below 0 become 0.
        largest = torch.finfo(torch.float32).max
        divergence = divergence.nan_to_num(largest, largest).clamp(0, largest).view(chunk.num_samples, -1).mean(dim=1)
        # Positions of one sample are not independent, so only one decides whether its answer changes.
        position = [row % before.shape[1] for row in range(chunk.num_samples)]
        one_before, one_after = (outputs[range(chunk.num_samples), position] for outputs in (before, after))
        if self.regression:
            changed = ~((after - before).abs().amax(dim=-1).mean(dim=1) <= 0.1 * self.deviation)
        else:
            changed = (one_after.argmax(dim=-1) != one_before.argmax(dim=-1)) | ~one_after.isfinite().all(dim=-1)
        return Compared(divergence.cpu(), changed.double().cpu(), one_before.argmax(dim=-1).cpu())

    def rank(self, candidates: Sequence[_Candidate], chunks: int) -> dict[_Candidate, float]:
        """Return the mean divergence of each candidate on the first `chunks` chunks, the least first."""
        missing = [pair for pair in product(candidates, range(chunks)) if pair not in self.sums]
        for candidate, _ in missing:
            self.plan(candidate)  # Fixed groups need all samples, so compute them before the threads start.

        def divergence(pair: tuple[_Candidate, int]) -> float:
            candidate, number = pair
            return float(self.compare(self.chunks[number], candidate).divergence.sum())

        self.sums.update(zip(missing, self.map(divergence, missing), strict=True))
        num_samples = sum(chunk.num_samples for chunk in self.chunks[:chunks])
        totals = {each: sum(self.sums[each, number] for number in range(chunks)) for each in candidates}
        # Processors sum in different orders; rounding keeps that from changing the ranking.
        means = [(each, float(f"{total / num_samples:.4g}")) for each, total in totals.items()]
        return dict(sorted(means, key=lambda pair: pair[1]))

    def plan(self, candidate: _Candidate) -> MergePlan:
        """Return the candidate's merge plan; fixed groups come from similarities on the samples."""
        start, schedule = None if candidate.start is None else list(candidate.start), candidate.removed
        if candidate.method != GROUPS:
            return MergePlan(schedule, None, start, candidate.method, candidate.metric)
        groups = [self._groups(candidate, layer) if r else None for layer, r in enumerate(schedule)]
        return MergePlan(schedule, groups, start, NO_DATA_METHOD, NO_DATA_METRIC)

    def merging(self, candidate: _Candidate) -> Merging:
        """Return a candidate's merging settings."""
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
        """Return (N, N) mean cosine similarities, in float64, of the latents after a candidate's last layer."""
        layer, plan = len(candidate.left), self.plan(candidate)
        module = self._module(layer)

        def similarities(chunk: _Chunk) -> Tensor:
            latents, sizes = self._encode(chunk, plan)
            bias = latent_bias(self.config, sizes, latents.dtype)
            compared = METRICS[metric](module.attention(latents, None, bias, False))
            # Half precision is too coarse to compare similarities, as in the matching.
            compared = F.normalize(compared.to(torch.promote_types(compared.dtype, torch.float32)), dim=-1)
            return (compared @ compared.transpose(1, 2)).sum(dim=0).to("cpu", torch.float64)

        total = torch.stack(self.map(similarities, self.chunks)).sum(dim=0)
        if not total.isfinite().all():
            raise FloatingPointError(
                f"the similarities of the latents in layer {layer} are not finite: {NOT_FINITE_CAUSE}"
            )
        return total / self.num_samples

    def _module(self, layer: int) -> Any:
        return self.encoder.self_attends[layer % len(self.encoder.self_attends)]

    def _encode(self, chunk: _Chunk, plan: MergePlan) -> tuple[Tensor, Tensor | None]:
        """Return the latents after the last layer, and their sizes."""
        latents, sizes = self._read(chunk, plan)
        for index, match_latents in enumerate(layer_matchers(plan, latents.device)):
            bias = latent_bias(self.config, sizes, latents.dtype)
            layer = call_layer(self._module(index), latents, sizes, match_latents, None, bias, False)
            latents, sizes = layer.hidden_states, layer.sizes
        return latents, sizes

    def _read(self, chunk: _Chunk, plan: MergePlan) -> tuple[Tensor, Tensor | None]:
        """Return the latents that have read the inputs, and their sizes; cached by groups of the learned latents."""
        start = tuple(plan.latent_groups or ())
        if start in chunk.read_latents:
            return chunk.read_latents[start]
        inputs, mask = self._preprocess(chunk)[0], chunk.inputs.get("attention_mask")
        bias = None if mask is None else padding_bias(mask, inputs)
        learned = self.model.base_model.embeddings(batch_size=chunk.num_samples)
        layer = self.encoder.read(learned, inputs, bias, plan)
        if layer.hidden_states.nbytes * (len(chunk.read_latents) + 1) * len(self.chunks) < CACHED_BYTES:
            chunk.read_latents[start] = layer.hidden_states, layer.sizes
        return layer.hidden_states, layer.sizes

    def _preprocess(self, chunk: _Chunk) -> tuple[Tensor, Any, Any]:
        preprocessed = chunk.preprocessed
        if preprocessed is None:
            preprocessed = self.model.base_model.preprocess(chunk.inputs[_input_name(self.model, chunk.inputs)])
            # Preprocessed pixels can take more memory than latents, so they have a limit of their own.
            if preprocessed[0].nbytes * len(self.chunks) < CACHED_BYTES:
                chunk.preprocessed = preprocessed
        return preprocessed

    def _outputs(self, chunk: _Chunk, candidate: _Candidate) -> Tensor:
        """Return a candidate's outputs, (B, P, K) or (B, 1, K)."""
        latents, sizes = self._encode(chunk, self.plan(candidate))
        preprocessed = self._preprocess(chunk)

        def base(subsampled_output_points: dict[str, Tensor] | None = None, **_: Any) -> ToMePerceiverModelOutput:
            decode = self.model.base_model.decode
            logits, _attentions = decode(preprocessed, latents, sizes, subsampled_output_points, chunk.positions)
            return ToMePerceiverModelOutput(logits=logits, last_hidden_state=latents)

        logits = call_with_base(self.model, base, chunk.inputs).get("logits")
        if not isinstance(logits, Tensor):
            name = type(self.model).__name__
            raise ValueError(
                f"samples: {name} does not return one tensor of logits to compare; use flops_ratio without samples"
            )
        return logits[:, None] if logits.dim() == 2 else logits.flatten(1, -2)


def _measure(
    evaluator: _Evaluator, candidates: Sequence[_Candidate], held_out: Sequence[_Chunk], deadline: float
) -> list[FrontierRow]:
    """Measure candidates on the held-out samples, until the deadline, and return their rows."""
    rows = [FrontierRow(evaluator.merging(each), each.share(evaluator.flops_share)) for each in candidates]
    for chunk in evaluator.chunks:
        chunk.drop_cache()

    def compare(chunk: _Chunk) -> list[Compared] | None:
        if time.monotonic() > deadline:
            return None
        evaluator.run_unmerged(chunk)
        compared = [evaluator.compare(chunk, candidate) for candidate in candidates]
        chunk.drop_cache()
        bar.update(chunk.num_samples)
        return compared

    with tqdm(total=sum(chunk.num_samples for chunk in held_out), desc="measuring", unit="sample", disable=None) as bar:
        found = evaluator.map(compare, held_out)
    done = [(chunk, compared) for chunk, compared in zip(held_out, found, strict=True) if compared is not None]
    chunks = [chunk for chunk, _ in done]
    for place, row in enumerate(rows if done else ()):
        parts = zip(*(of_chunk[place] for _, of_chunk in done), strict=True)
        compared = Compared(*(torch.cat(part) for part in parts))
        count, samples = int(compared.changed.sum()), len(compared.changed)
        rows[place] = replace(
            row,
            divergence=float(f"{compared.divergence.mean():.4g}"),
            changed=count / samples,
            changed_bound=binomial_bound(count, samples),
            who=_summarize_changes(evaluator, chunks, compared),
        )
    return rows


def _summarize_changes(evaluator: _Evaluator, chunks: Sequence[_Chunk], compared: Compared) -> dict[str, Any]:
    """Summarise which samples change.

    Returns:
        `samples`: number of samples. `groups`: share of changed answers and number of samples, for the class that
        changes most and for short and long inputs. `worst_tenth`: share of the divergence in the tenth of the samples
        that diverges most.
    """

    def figures(chosen: Tensor) -> list[float]:
        return [float(compared.changed[chosen].mean()), int(chosen.sum())]

    groups: dict[str, list[float]] = {}
    if compared.answers.max() > 0 and not evaluator.regression and chunks[0].positions is None:
        classes = {answer: figures(compared.answers == answer) for answer in compared.answers.unique().tolist()}
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
    divergence = compared.divergence
    total, most = divergence.sum(), divergence.topk(max(1, len(divergence) // 10)).values
    tenth = float(most.sum() / total) if total > 0 else 0.0
    return {"samples": len(compared.changed), "groups": groups, "worst_tenth": tenth}


def output_divergence(output: Tensor, before: Tensor, regression: bool) -> Tensor:
    """Return the divergence of outputs from reference outputs, for each sample; gradients flow to both.

    Args:
        output, before: logits (B, K); `before` is the reference.
        regression: whether outputs are numbers instead of class logits.

    Returns:
        (B,) Kullback-Leibler divergence KL(before || output) in nats, or sum of squared differences.
    """
    output, before = (logits.to(torch.promote_types(logits.dtype, torch.float32)) for logits in (output, before))
    if regression:
        return (output - before).square().sum(dim=-1)
    log_output, log_before = (F.log_softmax(logits, dim=-1) for logits in (output, before))
    return F.kl_div(log_output, log_before, reduction="none", log_target=True).sum(dim=-1)


def average_linkage(similarity: Tensor, num_groups: int) -> list[int]:
    """Cluster latents by average linkage: repeatedly merge the two clusters with the highest mean similarity.

    Args:
        similarity: (N, N) similarities of the latents.
        num_groups: M, from 1 to N; exactly M groups result, also with ties.

    Returns:
        Group of each of the N latents; groups are numbered in the order of their first latents.

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


def _running_device(model: Any) -> torch.device:
    """Return the device that the model runs on; `model.device` is the meta device if its weights are offloaded."""
    with torch.no_grad():
        return model.base_model.embeddings(batch_size=1).device


@contextmanager
def _one_thread_per_chunk(model: Any) -> Iterator[int]:
    """Compute each operation in one thread inside the block, and yield the number of chunks to run in parallel.

    That is one chunk on a GPU, and if weights are offloaded: threads would load and drop each other's weights.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads if all(parameter.device.type == "cpu" for parameter in model.parameters()) else 1
    finally:
        torch.set_num_threads(threads)


def _check_samples(samples: Batch | Iterable[Batch] | None) -> list[Batch]:
    """Return samples as a list of batches; raise ValueError for no samples or anything but dicts of tensors."""
    given: Iterable[Any] = [samples] if isinstance(samples, Mapping) else () if samples is None else samples
    batches = []
    for batch in given:
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"samples: a {type(batch).__name__}; must be a dict of tensors, the arguments of the model"
            )
        for name, value in batch.items():
            if not isinstance(value, Tensor):
                raise ValueError(f"samples: {name} is a {type(value).__name__}; must be a tensor with B rows")
        if batch and _num_samples(batch):
            batches.append(batch)
    if not batches:
        raise ValueError("samples: none given; must be at least one batch, a dict of the arguments of the model")
    return batches


def _num_samples(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _split_batches(batches: Sequence[Batch], unmerged_flops: float) -> list[Batch]:
    """Split batches into nearly equal parts of at most `CHUNK_SAMPLES`; smaller for few samples or costly passes."""
    total = sum(_num_samples(batch) for batch in batches)
    most = max(1, min(CHUNK_SAMPLES, total // 16, int(SEARCH_FLOPS / unmerged_flops / 60)))
    pieces: list[Batch] = []
    for batch in batches:
        count = -(-_num_samples(batch) // most)
        edges = [place * _num_samples(batch) // count for place in range(count + 1)]
        pieces += [{name: each[start:end] for name, each in batch.items()} for start, end in pairwise(edges)]
    return pieces


def _flops_share(model: Any, batches: Sequence[Batch], input_shape: Sequence[int] | None) -> FlopsShare:
    """Return the model's `FlopsShare` for the given shape, else the longest sample's, else the largest in the config.

    Raises:
        ValueError: if the shape is unknown: no shape, no samples, and none in the config.
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
        raise ValueError(f"input_shape: is missing; give the shape of one input of {name}, or samples")
    return FlopsShare(model.unmerged.asked_of(config), shape, name)


def _is_masked_lm(model: Any) -> bool:
    return "MaskedLM" in type(model).__name__


def _input_name(model: Any, batch: Batch) -> str:
    known = ("inputs", "input_ids", "pixel_values")
    name = next((name for name in known if name in batch), None)
    if name is None:
        raise ValueError(f"samples: have {', '.join(sorted(batch))}; must have one of {', '.join(known)}")
    return name


def _weight_fingerprint(model: Any) -> list[float]:
    """Return one weight from each of at most 64 parameters, to recognise a model's weights later."""
    names = _evenly_spaced([name for name, _ in model.named_parameters()], 64)
    return [float(f"{_middle_weight(model, name):.4g}") for name in names]


def _middle_weight(model: Any, name: str) -> float:
    """Return the middle one of a parameter's weights, in memory order."""
    parameter = model.get_parameter(name)
    if not parameter.is_meta:
        return float(parameter.detach().flatten()[parameter.numel() // 2])
    # Offloaded: accelerate's hook loads the weights of a module before it runs, and drops them after that.
    module = model.get_submodule(name.rpartition(".")[0])
    module._hf_hook.pre_forward(module)
    weight = _middle_weight(model, name)
    module._hf_hook.post_forward(module, None)
    return weight


def _evenly_spaced(values: Sequence[Any], most: int) -> list[Any]:
    """Return at most `most` of the values, evenly spaced."""
    return [values[place * len(values) // most] for place in range(most)] if len(values) > most else list(values)


def _distinct(candidates: Iterable[_Candidate | None]) -> list[_Candidate]:
    return list(dict.fromkeys(each for each in candidates if each is not None))
