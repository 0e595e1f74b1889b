# SPDX-License-Identifier: Apache-2.0
"""From a budget to what merges: among schedules, methods, metrics and fixed groups, what changes the output least.

Fixed groups may take the place of matching in the layers. Learned latents may also merge in fixed groups before they
read the inputs, with matching after it: the first layer then no longer runs on all of them.

Nothing but a few unlabelled samples is needed. Candidates keep to the budget, each with its matching. A half of the
samples narrows them down, on ever more of its rows (Jamieson & Talwalkar, 2016, "Non-stochastic best arm
identification"), and improves the best by postponing merges; the other half judges what is left. Of those that it
cannot tell apart, the fastest on this machine is taken.

Letters: B batch, N latents, M latents left, L self-attention layers, K classes, S positions.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

# As in the module of the layers, which says why.
try:
    from .budget_tome_perceiver import (  # type: ignore[import-not-found]
        DEFAULT_SCHEDULE,
        SCHEDULES,
        SKIP_BLOCKS,
        CostRatio,
        Family,
        Merging,
        beyond,
        fewer,
        floor_from,
        flops_ratios,
        named_family,
        postponed,
        undisturbed,
        weakest_member,
    )
    from .configuration_tome_perceiver import MERGE_METRICS, ToMePerceiverConfig  # type: ignore[import-not-found]
    from .cost_tome_perceiver import forward_cost, interleaved_seconds  # type: ignore[import-not-found]
    from .groups_tome_perceiver import (  # type: ignore[import-not-found]
        Batch,
        Similarity,
        average_linkage,
        fixed_groups,
        latent_similarities,
        mean_similarity,
    )
    from .layers_tome_perceiver import METRICS  # type: ignore[import-not-found]
except ImportError:
    if __package__:
        raise
    from budget_tome_perceiver import (
        DEFAULT_SCHEDULE,
        SCHEDULES,
        SKIP_BLOCKS,
        CostRatio,
        Family,
        Merging,
        beyond,
        fewer,
        floor_from,
        flops_ratios,
        named_family,
        postponed,
        undisturbed,
        weakest_member,
    )
    from configuration_tome_perceiver import MERGE_METRICS, ToMePerceiverConfig
    from cost_tome_perceiver import forward_cost, interleaved_seconds
    from groups_tome_perceiver import (
        Batch,
        Similarity,
        average_linkage,
        fixed_groups,
        latent_similarities,
        mean_similarity,
    )
    from layers_tome_perceiver import METRICS

SEARCH = "search"
# Methods that are worth a search: `random` and `prune` are controls, `size_penalty` differs from `bipartite` in what is
# already unequal alone, and `energy` was never the best (docs/results/budgets).
SEARCHED_METHODS = ("bipartite", "leader", "k_center", "ward")
# Where there are no samples to search on. A schedule that needs none takes many latents at once, and `bipartite` has to
# merge half of them into the other half then, alike or not: on a text model with latents to spare that lost 42 points,
# and `leader` 0.6 (docs/results/language); on one of images it lost 1.0 and 0.6 (docs/results/choice).
UNSEEN_METHOD, UNSEEN_METRIC = "leader", "key"
GROUPS = "groups"
# What a search spends, about: minutes on two cores at the published shapes, seconds on a small model.
SEARCH_FLOPS = 3e13
# Of the first candidates, how many shapes and how many ways to match are combined; of all those, how many are improved,
# and how many the other half of the samples judges.
COMBINED, IMPROVED, FINALISTS = 4, 2, 5
# Rows that say which shape and which way alone is worth it, and which combination is, at most and where a pass is long;
# more judge at the end.
ROWS_ALONE, ROWS_COMBINED, FEWEST_ROWS = 64, 256, 4
# In how many layers at a time it is tried to postpone merging, and how often.
MOVES, POSTPONED = 12, 12
# From how many layers on a floor is tried.
STARTS = 12
# Shares of the learned latents that are tried as fixed groups before they read the inputs.
AT_START = (0.875, 0.75, 0.625, 0.5, 0.375)
# So many rows are looked at if they are given, whatever it takes; of fewer a choice is little more than chance.
LEAST_ROWS = 32
# Rows that are run at a time, and positions of each that are looked at where each has outputs of its own.
ROWS, POSITIONS = 32, 16
# Rounds of timing, fewer where a pass is long: at least so many, and no more than a share of what a search may spend.
TIMED_ROUNDS, LEAST_ROUNDS, TIMED_SHARE = 25, 5, 0.2
# Rows of a timed pass, of what a search may spend: a second or so.
TIMED_PASSES = 0.003
# Of what a search may spend: fixed groups of one shape by one metric, which run the model anew for each layer that
# merges. Merging once is always tried, and what is asked for alone.
GROUPS_SHARE = 0.1
# A way to match is not looked at further if its pass is slower than this, of the fastest; a candidate is not chosen.
# FLOPs are asked for, and time is meant: `ward` takes one step after another, and few FLOPs.
NOT_SLOW, FAST_ENOUGH = 0.75, 0.85
# What is level with the best moves outputs at most so many times as far.
NEAR = 1.15
# Rounds of bringing the time of a candidate down to a budget.
TIGHTENED = 6


@dataclass(frozen=True)
class Candidate:
    """A way to merge that keeps to a budget.

    Attributes:
        name: its shape over the layers and its way to match: "floor from layer 2, ward hidden".
        merging: what it sets.
        flops_ratio: share of the unmerged model's FLOPs, with the matching.
        divergence: how far it moves the outputs of samples that did not choose it; `None` if that was not measured.
        speedup: times as fast as unmerged, on this machine; `None` if that was not measured.
    """

    name: str
    merging: Merging
    flops_ratio: float
    divergence: float | None = None
    speedup: float | None = None


@dataclass(frozen=True)
class Choice:
    """What a model merges now, and on what grounds.

    Attributes:
        chosen: what was set.
        candidates: the best ones, by divergence.
        samples: rows that were looked at; 0 if there were none.
        tried: how many candidates there were.
        seconds: that it took.
    """

    chosen: Candidate
    candidates: list[Candidate]
    samples: int = 0
    tried: int = 1
    seconds: float = 0.0

    def __str__(self) -> str:
        """The candidates as a Markdown table, the chosen one marked."""
        lines = ["| | candidate | share of the FLOPs | divergence | times as fast |", "|---|---|---|---|---|"]
        for each in self.candidates:
            divergence = "" if each.divergence is None else f"{each.divergence:.3g}"
            speedup = "" if each.speedup is None else f"{each.speedup:.2f}"
            mark = "chosen" if each == self.chosen else ""
            lines.append(f"| {mark} | {each.name} | {each.flops_ratio:.3f} | {divergence} | {speedup} |")
        return "\n".join(lines)


def choose_merging(
    model: Any,
    flops_ratio: float | None = None,
    latency_ratio: float | None = None,
    samples: Batch | Iterable[Batch] | None = None,
    input_shape: Sequence[int] | None = None,
    schedules: Sequence[str] | None = None,
    merge_methods: Sequence[str] | None = None,
    merge_metrics: Sequence[str] | None = None,
    log_file: str | os.PathLike | None = None,
) -> Choice:
    """Choose what merges within a budget, and leave the model as it was; `model.merge_to` sets it.

    Args:
        model: a head with logits, on the device that counts.
        flops_ratio: share of the unmerged model's FLOPs, above 0 to 1; the matching counts.
        latency_ratio: in its place a share of the unmerged model's time for the first batch of samples.
        samples: what the model takes, a batch or several; labels are left out. Without them the schedule is one that
            needs no data, and the way to match `leader` on keys.
        input_shape: of one input, (1, S) or (1, 3, height, width), that FLOPs are for; by default the longest of the
            samples, or what the config has positions or pixels for.
        schedules: allowed shapes over the layers, names of `SCHEDULES` or `SKIP_BLOCKS`; by default the search finds
            its own.
        merge_methods, merge_metrics: allowed ways to match; by default all that are worth it, and fixed groups
            (`"groups"`), which an export can run that has no sort.
        log_file: JSON file of every divergence that was measured, from which a search that was stopped goes on.

    Raises:
        ValueError: in one line, for a share that cannot be kept to, a model or samples that cannot be searched with,
            or names that are not known.
        FloatingPointError: for outputs that are not finite.
    """
    start = time.perf_counter()
    _check_budget(flops_ratio, latency_ratio, samples)
    for argument, names, known in (
        ("schedules", schedules, (*SCHEDULES, SKIP_BLOCKS)),
        ("merge_metrics", merge_metrics, MERGE_METRICS),
    ):
        for name in names or ():
            if name not in known:
                raise ValueError(f"{argument}: {name!r}; allowed are {', '.join(known)}")
    batches = _without_labels(samples)
    if samples is not None and not batches:
        raise ValueError("samples: there are none; allowed is a batch or more of what the model takes")
    shape = tuple(input_shape) if input_shape is not None else _input_shape(model, batches)
    cost = flops_ratios(model.config, shape, type(model).__name__)
    given = (flops_ratio, latency_ratio)
    with_groups = merge_methods is None or GROUPS in merge_methods
    matching = [name for name in merge_methods or () if name != GROUPS]
    only_groups = with_groups and merge_methods is not None and not matching
    if only_groups and not batches:
        raise ValueError(f"merge_methods: {GROUPS!r}; allowed with samples only, whose latents are compared")
    methods, metrics = [model.config.merge_method], [model.config.merge_metric]
    if not batches:
        methods, metrics = [UNSEEN_METHOD], [UNSEEN_METRIC]
    elif not only_groups:
        # Not the config's own first: a model that was merged before is to be merged as if it had not been.
        methods, metrics = [*SEARCHED_METHODS, *methods], [*MERGE_METRICS, *metrics]
    ways = _ways(model.config, matching or methods, merge_metrics or metrics)
    shapes = _shapes(model.config, schedules, bool(batches))
    if latency_ratio is None and len(shapes) == len(ways) == 1 and not only_groups:
        # Nothing to choose from.
        assert flops_ratio is not None
        chosen = _member(shapes[0], ways[0], flops_ratio, cost)
        if chosen is None:
            raise _not_met(shapes, ways, given, cost)
        return Choice(chosen, [chosen], seconds=time.perf_counter() - start)
    with undisturbed(model):
        unmerged = Merging.none(model.config).asked_of(model.config)
        passes = SEARCH_FLOPS / forward_cost(unmerged, shape, type(model).__name__).total_with_matching
        search = Search(model, batches, cost, shapes, ways, passes, log_file, with_groups, not only_groups)
        if schedules is None:
            search.shapes += search.grouped_at_start()
        finalists = search.run(*given)
        if not finalists:
            raise _not_met(shapes, ways, given, cost)
        return replace(search.judged(finalists), seconds=time.perf_counter() - start)


def output_divergence(output: Tensor, before: Tensor, regression: bool) -> Tensor:
    """How far an output is from an earlier one, for each sample; gradients reach both.

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


@dataclass(frozen=True)
class _Shape:
    """How merging is spread over the layers: a family for each way to match."""

    name: str
    family: Callable[[Merging], Family]


@dataclass(frozen=True)
class _Way:
    """A way to match."""

    name: str
    base: Merging


class Search:
    """Narrowing candidates down on unlabelled samples.

    Args:
        model: a head with logits, undisturbed.
        batches: samples without labels.
        cost: of a merging, as a share of the unmerged FLOPs.
        shapes, ways: whose combinations are tried.
        passes: how many rows may be run, in unmerged passes; where these are few, it ends with what it has by then,
            and the first steps and the last one are taken all the same.
        log_file: as for `choose_merging`.
        with_groups: whether fixed groups in the layers are tried.
        with_matching: whether matching is.
    """

    def __init__(
        self,
        model: Any,
        batches: Sequence[Batch],
        cost: CostRatio,
        shapes: Sequence[_Shape],
        ways: Sequence[_Way],
        passes: float,
        log_file: str | os.PathLike | None,
        with_groups: bool,
        with_matching: bool,
    ) -> None:
        self.model, self.cost, self.shapes, self.ways, self.passes = model, cost, list(shapes), ways, passes
        self.with_groups, self.with_matching = with_groups, with_matching
        self.timed_batch = {name: value.to(model.device) for name, value in batches[0].items()}
        batches = _first_rows(batches, max(LEAST_ROWS, int(0.2 * passes)))
        rows = sum(_size(batch) for batch in batches)
        # Every other row chooses, the others judge; of a single row both.
        self.halves = [[_every_other(batch, first if rows > 1 else 0) for batch in batches] for first in (0, 1)]
        self.log_file = None if log_file is None else Path(log_file)
        self.divergences: dict[str, list[float]] = {}
        self.regression = model.config.problem_type == "regression"
        self.references = [self._outputs(Merging.none(model.config), half, None) for half in self.halves]
        if not all(output.isfinite().all() for half in self.references for output in half):
            raise FloatingPointError(
                "the outputs of the model are not finite, so there is nothing to keep to; its weights are damaged or "
                "training has diverged"
            )
        _warn_of_poor_samples(rows, self.references[0])
        self.fingerprint = self._fingerprint()
        if self.log_file is not None and self.log_file.exists():
            found = json.loads(self.log_file.read_text())
            if found["searched"] == self.fingerprint:
                self.divergences = found["divergences"]
        # Of each divergence: whose merging, of which half, on how many rows.
        self.asked: set[tuple[str, int, int | None]] = set()
        self.spent = 0.0
        self.bar: tqdm = tqdm(desc="choosing what merges", unit="candidate", disable=None)

    @property
    def rows(self) -> int:
        """How many choose."""
        return sum(_size(batch) for batch in self.halves[0])

    def run(self, flops_ratio: float | None, latency_ratio: float | None) -> list[Candidate]:
        """The best few within the budget; none if none is within it."""
        ratio = latency_ratio if flops_ratio is None else flops_ratio
        assert ratio is not None
        if latency_ratio is None:  # a budget of time is one for the batch that is given
            (self.timed_batch,) = _first_rows([self.timed_batch], max(1, int(TIMED_PASSES * self.passes)))
        first_way, simple = self.ways[0], self._simplest_shape()
        shapes = self._spread(first_way, ratio)
        ways = self._matched(shapes, ratio)
        if ways[0] != first_way:
            # What is best for one way to match need not be for another.
            shapes = self._spread(ways[0], ratio)
        shapes, ways = shapes[:COMBINED], ways[:COMBINED]
        shapes += [] if simple in shapes else [simple]
        ways += [] if first_way in ways else [first_way]
        # Of time, each way to match has a share of the FLOPs of its own.
        shares = {way.name: self._flops_for(simple, way, latency_ratio) if latency_ratio else ratio for way in ways}
        combined = []
        if self.with_matching:
            combined += [_member(shape, way, shares[way.name], self.cost) for shape, way in product(shapes, ways)]
        if self.with_groups:
            combined += [each for shape in shapes for each in self._grouped(shape, shares[first_way.name])]
        ranked = self._ranked(combined, 0.25, most=ROWS_COMBINED)
        improved = [self._improved(each) for each in ranked[:IMPROVED]]
        finalists = _distinct([*improved, *ranked])[:FINALISTS]
        # Where matching takes longer than it saves.
        finalists = _distinct([*finalists, next((each for each in ranked if not _matches(each.merging)), None)])
        if self.with_matching:
            # What needs no search is there to be compared with.
            finalists = _distinct([*finalists, _member(simple, first_way, shares[first_way.name], self.cost)])
        if latency_ratio is not None:
            finalists = _distinct([self._tightened(each, latency_ratio) for each in finalists])
        return finalists

    def judged(self, finalists: list[Candidate]) -> Choice:
        """Of those that the other half of the samples cannot tell from the best, the fastest; none that is slower than
        unmerged, or than the FLOPs of the others let expect, if there is another."""
        rows = {each.name: self._each(each.merging, 1, None) for each in finalists}
        speedups = self._speedups(finalists)
        judged = [
            replace(each, divergence=sum(rows[each.name]) / len(rows[each.name]), speedup=speedup)
            for each, speedup in zip(finalists, speedups, strict=True)
        ]
        judged.sort(key=lambda each: _number(each.divergence))
        fastest = max(_number(each.speedup) for each in judged)
        fast = [each for each in judged if _number(each.speedup) >= FAST_ENOUGH * fastest]
        allowed = [each for each in fast if _number(each.speedup) >= 1] or fast
        best = allowed[0]
        level = [each for each in allowed if _level(rows[each.name], rows[best.name])]
        chosen = max(level, key=lambda each: _number(each.speedup))
        self.bar.close()
        return Choice(
            chosen,
            judged,
            samples=2 * self.rows if self.rows > 1 else 1,
            tried=len({merging for merging, _, _ in self.asked}),
        )

    def _spread(self, way: _Way, ratio: float) -> list[_Shape]:
        """The shapes that keep to the budget with a way to match, the best first; the others after them."""
        members = [_member(shape, way, ratio, self.cost) for shape in self.shapes]
        names = _parts(self._ranked(members, 0.15, most=ROWS_ALONE), 0)
        return sorted(self.shapes, key=lambda shape: names.index(shape.name) if shape.name in names else len(names))

    def _matched(self, shapes: Sequence[_Shape], ratio: float) -> list[_Way]:
        """The ways to match that keep to the budget, the best first, each in the first of the shapes in which it does;
        the first of all ways if none does."""
        members = []
        for way in self.ways:
            there = (_member(shape, way, ratio, self.cost) for shape in shapes)
            members.append(next((member for member in there if member is not None), None))
        ranked = self._ranked(self._not_slow(members), 0.2, most=ROWS_ALONE)
        return [way for name in _parts(ranked, 1) for way in self.ways if way.name == name] or [self.ways[0]]

    def _simplest_shape(self) -> _Shape:
        return next((shape for shape in self.shapes if shape.name == DEFAULT_SCHEDULE), self.shapes[0])

    def _grouped(self, shape: _Shape, ratio: float) -> list[Candidate]:
        """Fixed groups in place of matching, which they save."""
        config = self.model.config
        # As many are left as if matching cost nothing.
        free = weakest_member(shape.family(replace(self.ways[0].base, merge_method="random")), ratio, self.cost)
        # Of fewer runs of shared blocks the groups would be others for each number of them.
        if free is None or free.num_blocks != config.num_blocks:
            return []
        asked = free.asked_of(config)
        left = asked.latents_per_layer
        merges = sum(after < before for before, after in pairwise([asked.latents_at_start, *left]))
        compared = self._compared()
        rows = sum(_size(batch) for batch in compared)
        if self.with_matching and merges > 1 and merges * rows > GROUPS_SHARE * self.passes:
            return []
        found = []
        for metric in ("key", "hidden"):
            with free.applied(config):
                groups = fixed_groups(self.model, compared, left, _similarity(metric))
            merging = self.ways[0].base.by(0, merge_groups=groups, latent_groups=free.latent_groups)
            found.append(Candidate(f"{shape.name}, {GROUPS} by {metric}", merging, self.cost(merging)))
        return found

    def grouped_at_start(self) -> list[_Shape]:
        """Merging to a floor after learned latents merged in fixed groups, with all blocks and with fewer."""
        config = self.model.config
        with Merging.none(config).applied(config):
            similarity = mean_similarity(self.model, self._compared(), 0, _similarity("hidden"))
        shapes = []
        for share in AT_START:
            count = max(config.min_latents, math.ceil(share * config.num_latents))
            groups = average_linkage(similarity, count)
            # A model that needs less than half of its blocks is found by the shapes without groups.
            for num_blocks in range(config.num_blocks, config.num_blocks // 2, -1):
                layers = num_blocks * config.num_self_attends_per_block
                family = partial(_after_groups, groups, partial(floor_from, config, 0, layers, num_blocks))
                shapes.append(_Shape(f"floor of {count} groups{_in_blocks(config, num_blocks)}", family))
        return shapes

    def _compared(self) -> list[Batch]:
        """Samples whose latents are compared for fixed groups."""
        return list(self._chunks(self.halves[0], min(self.rows, max(8, int(self.passes / 40)))))

    def _ranked(self, candidates: Sequence[Candidate | None], share: float, most: int) -> list[Candidate]:
        """By divergence on as many rows as a share of the passes affords, the least first."""
        there = _distinct(candidates)
        count = min(most, self._affordable(share, len(there)))
        return sorted(there, key=lambda each: self._mean(each.merging, count))

    def _affordable(self, share: float, candidates: int) -> int:
        """How many rows a share of the passes affords for each of so many candidates."""
        return min(self.rows, max(FEWEST_ROWS, int(share * self.passes / max(candidates, 1))))

    def _not_slow(self, candidates: Sequence[Candidate | None]) -> list[Candidate]:
        """Without those whose matching takes much longer than that of others."""
        there = _distinct(candidates)
        if len(there) < 2:
            return there
        speedups = self._speedups(there, most=2)
        return [each for each, speedup in zip(there, speedups, strict=True) if speedup >= NOT_SLOW * max(speedups)]

    def _improved(self, best: Candidate) -> Candidate:
        """Postpone merging where that helps most, until it helps nowhere."""
        if best.merging.merge_groups is not None:
            return best
        ratio = best.flops_ratio
        for _ in range(POSTPONED):
            families = _some(list(postponed(self.model.config, best.merging)), MOVES)
            count = min(ROWS_COMBINED, self._affordable(0.1, IMPROVED * max(len(families), 1)))
            if self.spent + ratio * len(families) * count > self.passes:
                return best
            members = [weakest_member(family, ratio, self.cost) for family in families]
            found = min(
                (member for member in members if member is not None),
                key=lambda member: self._mean(member, count),
                default=None,
            )
            if found is None or not self._mean(found, count) < self._mean(best.merging, count):
                return best
            name = best.name if best.name.startswith("improved ") else f"improved {best.name}"
            best = Candidate(name, found, self.cost(found))
        return best

    def _mean(self, merging: Merging, count: int) -> float:
        each = self._each(merging, 0, count)
        return sum(each) / len(each)

    def _each(self, merging: Merging, half: int, rows: int | None) -> list[float]:
        """Divergences of the first rows of a half; of a text's positions, those that are no padding."""
        asked = (merging.key, half, rows)
        if asked not in self.asked:
            # Found in the log or not: a search that goes on takes the same steps.
            self.asked.add(asked)
            self.spent += self.cost(merging) * (self.rows if rows is None else rows)
        key = json.dumps(asked)
        if key not in self.divergences:
            outputs = self._outputs(merging, self.halves[half], rows)
            before = self._outputs_before(half, rows, outputs)
            apart = [
                output_divergence(output.double(), earlier.double(), self.regression)
                for output, earlier in zip(outputs, before, strict=True)
            ]
            # Outputs that are not finite are as far as can be, and JSON has no infinity. A divergence of nothing may be
            # rounded to less.
            worst = torch.finfo(torch.float32).max
            self.divergences[key] = torch.cat(apart).nan_to_num(worst, worst).clamp(0, worst).tolist()
            self._save()
        self.bar.update()
        return self.divergences[key]

    def _outputs(self, merging: Merging, half: Sequence[Batch], rows: int | None) -> list[Tensor]:
        """Logits of the first rows, chunk by chunk, (B, K) or the positions of a text that are no padding."""
        outputs = []
        with merging.applied(self.model.config):
            for batch in self._chunks(half, rows):
                inputs = {name: value.to(self.model.device) for name, value in batch.items()}
                logits = self.model(**inputs).get("logits")
                if not isinstance(logits, Tensor):
                    raise ValueError(
                        f"samples: {type(self.model).__name__} has no logits of one kind, so there is nothing to "
                        "compare; allowed is a head that has, or a budget without samples"
                    )
                outputs.append(logits if logits.dim() == 2 else _positions(logits, inputs.get("attention_mask")))
        return outputs

    def _outputs_before(self, half: int, rows: int | None, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The unmerged outputs of the same rows: those of whole chunks are the first ones of each."""
        before = self.references[half][: len(outputs)]
        return [earlier[: len(output)] for earlier, output in zip(before, outputs, strict=True)]

    def _chunks(self, half: Sequence[Batch], rows: int | None) -> Iterator[Batch]:
        """The first rows, so many at a time; the chunks begin at the same rows for any number of rows."""
        left = math.inf if rows is None else rows
        for batch in half:
            size = _size(batch)
            for start in range(0, size, ROWS):
                if left <= 0:
                    return
                end = min(start + ROWS, size, start + left)
                yield {name: value[start : int(end)] for name, value in batch.items()}
                left -= end - start

    def _flops_for(self, shape: _Shape, way: _Way, latency_ratio: float) -> float:
        """The share of the FLOPs at which this takes so much of the time; 0 if it never does."""
        ratio = latency_ratio
        for _ in range(TIGHTENED):
            member = _member(shape, way, ratio, self.cost)
            if member is None:
                return 0.0
            taken = 1 / self._speedups([member])[0]
            if abs(taken / latency_ratio - 1) < 0.05:
                break
            ratio = min(1.0, ratio * latency_ratio / taken)
        return ratio

    def _tightened(self, candidate: Candidate, latency_ratio: float) -> Candidate | None:
        """The same with fewer latents until its time is within the budget; `None` if it never is."""
        for _ in range(TIGHTENED):
            taken = 1 / self._speedups([candidate])[0]
            if taken <= latency_ratio:
                return candidate
            if candidate.merging.merge_groups is not None:
                return None
            ratio = self.cost(candidate.merging) * 0.98 * latency_ratio / taken
            tighter = weakest_member(fewer(self.model.config, candidate.merging), ratio, self.cost)
            if tighter is None:
                return None
            candidate = replace(candidate, merging=tighter, flops_ratio=self.cost(tighter))
        return None

    def _speedups(self, candidates: Sequence[Candidate], most: int = TIMED_ROUNDS) -> list[float]:
        """Times as fast as unmerged for the first batch of samples, or its first rows if these take a second."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # Several processes would not measure the same, and have to choose the same.
            return [1.0] * len(candidates)

        def run(merging: Merging) -> None:
            with merging.applied(self.model.config):
                self.model(**self.timed_batch)

        variants = [Merging.none(self.model.config), *(each.merging for each in candidates)]
        rows = _size(self.timed_batch)
        affordable = int(TIMED_SHARE * self.passes / (rows * len(variants)))
        seconds = interleaved_seconds(run, variants, min(most, max(LEAST_ROUNDS, affordable)))
        return [median(taken[0] / taken[index] for taken in seconds) for index in range(1, len(variants))]

    def _fingerprint(self) -> str:
        """Of the unmerged outputs: other weights or other samples make it another search."""
        digest = hashlib.sha256()
        for half in self.references:
            for output in half:
                digest.update(output.float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def _save(self) -> None:
        if self.log_file is not None:
            self.log_file.parent.mkdir(parents=True, exist_ok=True)
            partial_file = self.log_file.with_name(f"{self.log_file.name}.partial")
            partial_file.write_text(json.dumps({"searched": self.fingerprint, "divergences": self.divergences}))
            partial_file.replace(self.log_file)


def _shapes(config: ToMePerceiverConfig, names: Sequence[str] | None, searching: bool) -> list[_Shape]:
    """The named ones; or all, and merging to a floor from each layer on, with all blocks and with fewer."""
    if names is None and not searching:
        names = [DEFAULT_SCHEDULE]
    if names is not None:
        return [_Shape(name, partial(named_family, config, name)) for name in names]
    shapes = [_Shape(name, partial(named_family, config, name)) for name in SCHEDULES]
    shapes.sort(key=lambda shape: shape.name != DEFAULT_SCHEDULE)
    for num_blocks in range(config.num_blocks, 0, -1):
        layers = num_blocks * config.num_self_attends_per_block
        # With fewer blocks, from the first layer on is enough to say whether blocks are needed at all.
        for start in _some(range(1, layers), STARTS) if num_blocks == config.num_blocks else [0]:
            name = f"floor{f' from layer {start}' if start else ''}{_in_blocks(config, num_blocks)}"
            shapes.append(_Shape(name, partial(floor_from, config, start, layers, num_blocks)))
    return shapes


def _in_blocks(config: ToMePerceiverConfig, num_blocks: int) -> str:
    return "" if num_blocks == config.num_blocks else f" in {num_blocks} of {config.num_blocks} blocks"


def _after_groups(groups: list[int], family: Callable[[Merging], Family], base: Merging) -> Family:
    """A family whose learned latents merge in fixed groups first."""
    return family(replace(base, latent_groups=groups))


def _similarity(metric: str) -> Similarity:
    return partial(latent_similarities, compared=METRICS[metric])


def _ways(config: ToMePerceiverConfig, methods: Sequence[str], metrics: Sequence[str]) -> list[_Way]:
    """The ways to match, each once, the first ones first."""
    own = Merging.none(config)
    return [
        _Way(f"{method} {metric}", replace(own, merge_method=method, merge_metric=metric))
        for method, metric in product(dict.fromkeys(methods), dict.fromkeys(metrics))
    ]


def _member(shape: _Shape, way: _Way, ratio: float, cost: CostRatio) -> Candidate | None:
    """The weakest of a shape that keeps to a share of the FLOPs; `None` if none does."""
    merging = weakest_member(shape.family(way.base), ratio, cost)
    return None if merging is None else Candidate(f"{shape.name}, {way.name}", merging, cost(merging))


def _not_met(
    shapes: Sequence[_Shape],
    ways: Sequence[_Way],
    given: tuple[float | None, float | None],
    cost: CostRatio,
) -> ValueError:
    if given[0] is None:
        return ValueError(f"latency_ratio = {given[1]}: allowed is a larger share; nothing that was tried is so fast")
    least = min(cost(shape.family(way.base)(1.0)) for shape in shapes for way in ways)
    return beyond(given[0], least, f"schedule {shapes[0].name}" if len(shapes) == 1 else "merging")


def _check_budget(flops_ratio: float | None, latency_ratio: float | None, samples: object) -> None:
    given = {"flops_ratio": flops_ratio, "latency_ratio": latency_ratio}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise ValueError(f"flops_ratio = {flops_ratio}, latency_ratio = {latency_ratio}: allowed is one of them")
    value = given[named[0]]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"{named[0]} = {value!r}: allowed is a number above 0, up to 1")
    if latency_ratio is not None and samples is None:
        raise ValueError(f"latency_ratio = {latency_ratio}: allowed with samples only, whose time is measured")


def _positions(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Of outputs for each position, (B, ..., K), those of a few positions of each row that are no padding, (-, K)."""
    logits = logits.flatten(1, -2)
    there = logits.new_ones(logits.shape[:2], dtype=torch.bool) if mask is None else mask > 0
    logits, number = logits[:, : there.shape[1]], there.cumsum(dim=1) - 1
    steps = (there.sum(dim=1, keepdim=True) / POSITIONS).ceil().clamp(min=1).long()
    return logits[there & (number % steps == 0)]


def _without_labels(samples: Batch | Iterable[Batch] | None) -> list[Batch]:
    if samples is None:
        return []
    given: Iterable[Batch] = [samples] if isinstance(samples, Mapping) else samples
    batches = [{name: value for name, value in batch.items() if name != "labels"} for batch in given]
    for batch in batches:
        for name, value in batch.items():
            if not isinstance(value, Tensor):
                raise ValueError(f"samples: {name} is a {type(value).__name__}; allowed are tensors, B rows each")
    return [batch for batch in batches if batch and _size(batch)]


def _warn_of_poor_samples(rows: int, outputs: Sequence[Tensor]) -> None:
    """Of samples on which candidates can hardly be told apart; outputs are the unmerged ones, each (B, ..., K)."""
    if rows < LEAST_ROWS:
        warnings.warn(
            f"samples: {rows} rows; a choice on fewer than {LEAST_ROWS} is little more than chance", stacklevel=5
        )
    elif all((output == outputs[0][:1]).all() for output in outputs):
        warnings.warn(
            f"samples: the model answers all {rows} rows alike, so they hardly tell what merging changes", stacklevel=5
        )


def _input_shape(model: Any, batches: Sequence[Batch]) -> tuple[int, ...]:
    """Of one input: the longest of the samples, or what the config has room for."""
    config, name = model.config, type(model).__name__
    if batches:
        longest = max((batch[_input_name(model, batch)] for batch in batches), key=lambda inputs: inputs[0].numel())
        return (1, *longest.shape[1:])
    if "Image" in name:
        return (1, 3, config.image_size, config.image_size)
    if "SequenceClassification" in name or "MaskedLM" in name:
        return (1, config.max_position_embeddings)
    raise ValueError(f"input_shape: not given; allowed is the shape of one input of {name}, or samples")


def _input_name(model: Any, batch: Batch) -> str:
    known = ("inputs", "input_ids", "pixel_values")
    name = next((name for name in known if name in batch), None)
    if name is None:
        raise ValueError(f"samples: have {', '.join(sorted(batch))}; allowed is what {type(model).__name__} takes")
    return name


def _first_rows(batches: Sequence[Batch], count: int) -> list[Batch]:
    """The first rows, in batches as they come."""
    kept: list[Batch] = []
    for batch in batches:
        if count > 0:
            kept.append({name: value[:count] for name, value in batch.items()})
            count -= _size(batch)
    return kept


def _size(batch: Batch) -> int:
    """B."""
    return len(next(iter(batch.values())))


def _some(choices: Sequence[Any], most: int) -> list[Any]:
    """At most so many, spread evenly over all of them."""
    return [choices[place * len(choices) // most] for place in range(most)] if len(choices) > most else list(choices)


def _every_other(batch: Batch, first: int) -> Batch:
    size = _size(batch)
    return {name: value[min(first, size - 1) :: 2] for name, value in batch.items()}


def _distinct(candidates: Iterable[Candidate | None]) -> list[Candidate]:
    """Without those that are none, or merge as an earlier one does."""
    found: dict[str, Candidate] = {}
    for each in candidates:
        if each is not None:
            found.setdefault(each.merging.key, each)
    return list(found.values())


def _matches(merging: Merging) -> bool:
    """Whether anything is matched as the model runs."""
    return merging.merge_groups is None and any(merging.r if isinstance(merging.r, list) else [merging.r])


def _parts(ranked: Sequence[Candidate], part: int) -> list[str]:
    """The shapes (0) or the ways (1) of candidates, in their order."""
    return list(dict.fromkeys(each.name.split(", ")[part] for each in ranked))


def _level(one: Sequence[float], best: Sequence[float]) -> bool:
    """Whether paired rows do not tell one from the best: within a standard error of the difference, and near it."""
    mine, least = (torch.tensor(rows, dtype=torch.float64) for rows in (one, best))
    apart = mine - least
    error = apart.std() / math.sqrt(len(apart)) if len(apart) > 1 else torch.zeros(())
    return bool(apart.mean() <= error) and bool(mine.mean() <= NEAR * least.mean())


def _number(value: float | None) -> float:
    assert value is not None
    return value
