# SPDX-License-Identifier: Apache-2.0
"""Searching for the schedule that changes the model's output least within a budget, on a few unlabelled samples.

Candidates are the named schedules, merging to a floor from each layer on, and the same with fewer runs of the
weight-shared blocks. From the best of them a greedy search puts off what costs most: in one layer after another a few
more latents stay, and fewer later on, so that the budget is kept.

Letters: B batch, L self-attention layers, K classes, S positions.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.errors import Stopped
from experiments.files import write_text
from experiments.merging.schedules import (
    SCHEDULES,
    CostRatio,
    Family,
    Fields,
    apply_merging,
    family_of,
    named_family,
    unmerged_fields,
    weakest_member,
)
from experiments.tasks.base import Batch
from modeling_tome_perceiver import ToMePerceiverPreTrainedModel

SEARCH = "search"
# How many of the first candidates the greedy search improves.
STARTS = 3
# How many more of its latents a layer keeps in a greedy step.
STEP = 1.25


@dataclass
class ScheduleSearch:
    """What a search looks at, and what it has found out so far.

    Attributes:
        model: a head with its merge method; afterwards it is as it was.
        batches: calibration samples, without labels.
        log: JSON file of every candidate's divergence, written after each; a search that is begun again with the same
            model and samples takes them from there. `None`: none is written.
    """

    model: ToMePerceiverPreTrainedModel
    batches: Sequence[Batch]
    log: Path | None = None
    _divergences: dict[str, float] = field(default_factory=dict, init=False)

    def best(self, ratio: float, cost_ratio: CostRatio) -> Fields | None:
        """The schedule within the budget that changes the output least; `None` if none is within it.

        Args:
            ratio: share of the unmerged model's cost.
            cost_ratio: what that is.
        """
        self._take_over_log()
        starts = _without_repeats(
            weakest_member(family, ratio, cost_ratio) for family in starting_families(self.model.config)
        )
        if not starts:
            return None
        with tqdm(desc=f"searching a schedule for {ratio:g}", unit="candidate") as bar:
            most_promising = sorted(starts, key=lambda fields: self._seen(fields, bar))[:STARTS]
            ends = [self._improved(start, ratio, cost_ratio, bar) for start in most_promising]
        return min(ends, key=self.divergence)

    def _improved(self, best: Fields, ratio: float, cost_ratio: CostRatio, bar: tqdm) -> Fields:
        """Postpone merging where that helps most, until it helps nowhere."""
        while True:
            families = postponed(self.model.config, best)
            moves = _without_repeats(weakest_member(family, ratio, cost_ratio) for family in families)
            candidate = min([best, *moves], key=lambda fields: self._seen(fields, bar))
            if not self.divergence(candidate) < self.divergence(best):
                return best
            best = candidate

    def _seen(self, fields: Fields, bar: tqdm) -> float:
        divergence = self.divergence(fields)
        bar.update()
        bar.set_postfix_str(f"least divergence {min(self._divergences.values()):.4g}")
        return divergence

    def divergence(self, fields: Fields) -> float:
        """How far the output is from that of the unmerged model, as the mean over samples: `output_divergence`."""
        name = self._name(fields)
        if name not in self._divergences:
            pairs = zip(self._outputs(fields), self._reference, strict=True)
            regression = self.model.config.problem_type == "regression"
            each = [output_divergence(output, before, regression) for output, before in pairs]
            divergence = float(torch.cat(each).mean())
            # Outputs that are not finite are as far as can be, and JSON has no infinity.
            self._divergences[name] = divergence if math.isfinite(divergence) else sys.float_info.max
            if self.log is not None:
                self.log.parent.mkdir(parents=True, exist_ok=True)
                found = {"searched": self._fingerprint, "divergences": self._divergences}
                write_text(self.log, json.dumps(found, indent=1) + "\n")
        return self._divergences[name]

    @cached_property
    def _reference(self) -> list[Tensor]:
        outputs = self._outputs(unmerged_fields(self.model.config))
        if not all(output.isfinite().all() for output in outputs):
            raise Stopped(
                f"--schedule {SEARCH}: the outputs of the model are not finite, so there is nothing to keep to; its "
                "weights are damaged or training has diverged"
            )
        return outputs

    @cached_property
    def _fingerprint(self) -> str:
        """Of the unmerged outputs: other weights or other samples make it another search."""
        digest = hashlib.sha256()
        for output in self._reference:
            digest.update(output.float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def _name(self, fields: Fields) -> str:
        config = self.model.config
        method = [config.merge_method, config.merge_metric, config.proportional_attention]
        return json.dumps([*method, fields["num_blocks"], fields["r"]])

    def _outputs(self, fields: Fields) -> list[Tensor]:
        """Logits of every batch; where positions have logits of their own, those of padding are left out."""
        outputs = []
        with undisturbed(self.model), torch.inference_mode():
            apply_merging(self.model.config, fields)
            for batch in self.batches:
                inputs = {name: value.to(self.model.device) for name, value in batch.items()}
                logits = self.model(**inputs).logits
                mask = inputs.get("attention_mask")
                outputs.append(logits if logits.dim() == 2 or mask is None else logits[:, : mask.shape[1]][mask > 0])
        return outputs

    def _take_over_log(self) -> None:
        if self.log is not None and self.log.exists() and not self._divergences:
            found = json.loads(self.log.read_text())
            if found["searched"] == self._fingerprint:
                self._divergences = found["divergences"]


@contextmanager
def undisturbed(model: ToMePerceiverPreTrainedModel) -> Iterator[None]:
    """Evaluation mode; after it, merging and mode are as they were, module by module."""
    before = {name: getattr(model.config, name) for name in unmerged_fields(model.config)}
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        apply_merging(model.config, before)
        for module, mode in modes:
            module.training = mode


def output_divergence(output: Tensor, before: Tensor, regression: bool) -> Tensor:
    """How far an output is from an earlier one, for each sample.

    Args:
        output, before: logits (B, K).
        regression: they are numbers and not classes.

    Returns:
        (B,) Kullback-Leibler divergence from the earlier classes in nats, or squared differences.
    """
    if regression:
        return (output.double() - before.double()).square().sum(dim=-1)
    now, earlier = (F.log_softmax(each.double(), dim=-1) for each in (output, before))
    return F.kl_div(now, earlier, reduction="none", log_target=True).sum(dim=-1)


def starting_families(config: ToMePerceiverConfig) -> Iterator[Family]:
    """The named schedules, and merging to a floor from each layer on, with all blocks and with fewer."""
    for name in SCHEDULES:
        yield named_family(config, name)
    for num_blocks in range(config.num_blocks, 0, -1):
        layers = num_blocks * config.num_self_attends_per_block
        # With fewer blocks, from the first layer on is enough to say whether blocks are needed at all.
        for start in range(layers) if num_blocks == config.num_blocks else [0]:
            yield family_of(config, _floor_from(config.num_latents, layers, start), num_blocks)


def _floor_from(latents: int, layers: int, start: int) -> Callable[[float], list[float]]:
    return lambda strength: [latents] * start + [latents ** (1 - strength)] * (layers - start)


def postponed(config: ToMePerceiverConfig, fields: Fields) -> Iterator[Family]:
    """For each layer the schedules in which more latents stay there, and fewer, down to a floor, in those after it.

    Args:
        config: of the model.
        fields: of the schedule to start from.
    """
    left = [config.num_latents - sum(fields["r"][: end + 1]) for end in range(len(fields["r"]))]
    for layer, here in enumerate(left):
        reaching = left[layer - 1] if layer else config.num_latents
        kept = min(reaching, math.ceil(here * STEP))
        if kept > here:
            yield family_of(config, _capped_after(left, layer, kept), fields["num_blocks"])


def _capped_after(left: list[int], layer: int, kept: int) -> Callable[[float], list[float]]:
    def left_after(strength: float) -> list[float]:
        cap = kept ** (1 - strength)
        return [*left[:layer], kept, *(min(each, cap) for each in left[layer + 1 :])]

    return left_after


def _without_repeats(candidates: Iterable[Fields | None]) -> list[Fields]:
    kept: dict[str, Fields] = {}
    for fields in candidates:
        if fields is not None:
            kept.setdefault(json.dumps(fields, sort_keys=True), fields)
    return list(kept.values())
