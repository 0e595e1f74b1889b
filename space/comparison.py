# SPDX-License-Identifier: Apache-2.0
"""A checkpoint, and one input run through it unmerged and merged: predictions, time, cost, and what merged.

Nothing of the repository is needed beside what the checkpoint carries. A stock checkpoint carries no code: with the
repository around this folder, its classes load it.

Letters: N latents, S positions of the input, K classes or tokens.
"""

from __future__ import annotations

import importlib
import io
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch
import transformers
from merging_picture import Example, draw_merging, image_example, text_example
from PIL import Image as PilImage
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
from transformers.image_utils import load_image

IMAGE, TEXT, MASKED = "ImageClassification", "SequenceClassification", "MaskedLM"
"""Kinds of checkpoints: what is in the name of their class, and of the Auto class that loads them."""

MODEL_MODULE = "modeling_tome_perceiver"
REPOSITORY = Path(__file__).resolve().parents[1]
# A text is cut to so many tokens, so that the picture stays readable.
MAX_LENGTH = 96
SHOWN_PREDICTIONS = 3
# Rounds in which unmerged and merged take turns: as many as fit these seconds.
TIMED_SECONDS, LEAST_ROUNDS, MOST_ROUNDS = 0.6, 3, 25
# Budgets are offered in such steps.
BUDGET_STEP = 0.05


class NotFitting(Exception):
    """What was given cannot be used; the message says in one line what and why."""


@dataclass(frozen=True)
class Side:
    """One of the two that are compared.

    Attributes:
        predictions: the likeliest, with their probabilities; `None` for a probability where a model for several labels
            or for a number gives a score.
        milliseconds: median time of a pass.
        flops_ratio: share of the unmerged model's FLOPs, with the matching.
        latents_left: after the last layer.
    """

    predictions: list[tuple[str, float | None]]
    milliseconds: float
    flops_ratio: float
    latents_left: int


@dataclass(frozen=True)
class Comparison:
    """One input, unmerged and merged.

    Attributes:
        unmerged, merged: the two sides.
        speedup: times as fast as unmerged, the median over rounds.
        rounds: that were timed.
        latents: N.
    """

    unmerged: Side
    merged: Side
    speedup: float
    rounds: int
    latents: int


class Checkpoint:
    """A model with what makes its inputs.

    Args:
        name: Hub id or local folder.

    Raises:
        NotFitting: for a checkpoint that is not there, not whole, or for other inputs.

    Attributes:
        kind: `IMAGE`, `TEXT` or `MASKED`.
        saved: the merging that it was saved with; `None` if it merges nothing.
        rows: of its frontier, from mild to strong; none if it has no frontier.
    """

    def __init__(self, name: str) -> None:
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=True)
            architecture = (config.architectures or ["no architecture"])[0]
            kinds = [kind for kind in (IMAGE, TEXT, MASKED) if f"PerceiverFor{kind}" in architecture]
            if not kinds:
                raise NotFitting(f"is of {architecture}; allowed are Perceivers for {IMAGE}, {TEXT} and {MASKED}")
            self.kind = kinds[0]
            self.model = _load_model(name, config, architecture, self.kind).eval()
            if self.kind == IMAGE:
                self.processor = AutoImageProcessor.from_pretrained(name)
            else:
                # With the config at hand, so that nobody is asked about the checkpoint's code a second time.
                self.processor = AutoTokenizer.from_pretrained(name, config=self.model.config, trust_remote_code=True)
            self._cost = _module_beside(self.model, "cost")
            self.rows: list[Any] = []
            if self.model.config.merge_frontier is not None:
                self.rows = _module_beside(self.model, "frontier").Frontier.of(self.model.config).rows
        except (NotFitting, OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise NotFitting(f"--model_name_or_path {name}: {lines[0]}") from error
        saved = self._cost.Merging.of(self.model.config)
        self.saved = saved if saved.merges(self.model.unmerged.asked_of(self.model.config)) else None
        # The config says what merges, so one input runs at a time; what is timed wants to be alone, too.
        self._lock = threading.Lock()

    @property
    def labels(self) -> list[str]:
        """Names of the classes; none for a masked language model."""
        return [] if self.kind == MASKED else [str(label) for label in self.model.config.id2label.values()]

    def smallest_budget(self, given: Any) -> float:
        """The least of the budgets offered that an input can be kept to; 1 if there is none."""
        steps = [round(BUDGET_STEP * step, 2) for step in range(1, round(1 / BUDGET_STEP))]
        for share in steps:
            try:
                self.within(share, given)
                return share
            except NotFitting:
                continue
        return 1.0

    def within(self, share: float, given: Any) -> Any:
        """What merges, a `Merging`, so that a pass on this input costs at most a share of the unmerged FLOPs.

        Raises:
            NotFitting: for a share that merging alone cannot come down to.
        """
        with self._lock, self._cost.Merging.of(self.model.config).applied(self.model.config):
            if share >= 1:
                return self.model.unmerged
            try:
                inputs = self.encoded(given)
                return self.model.merge_to(flops_ratio=share, input_shape=_shape(inputs)).chosen.merging
            except ValueError as error:
                raise NotFitting(
                    f"Merging cannot bring this input down to {share:.0%} of the computation; a larger share can."
                ) from error

    def row(self, number: int) -> Any:
        """A row of the frontier, counted from 1."""
        return self.rows[min(max(number, 1), len(self.rows)) - 1]

    def row_line(self, number: int) -> str:
        """What a row of the frontier costs and how many answers it changes, in a sentence."""
        row = self.row(number)
        cost = f"{row.flops_ratio:.0%} of the computation for the longest input"
        if row.changed is None:
            return f"{cost}; how many answers change was not measured."
        bound = "" if row.changed_bound is None else f", at most {row.changed_bound:.2%} with 95 % confidence"
        return f"{cost}; of {row.who['samples']:,} inputs, {row.changed:.2%} of the answers changed{bound}."

    def by(self, r: int) -> Any:
        """What merges, a `Merging`, if r latents do in each layer."""
        return self.model.unmerged.by(r)

    def encoded(self, given: PilImage.Image | str) -> dict[str, torch.Tensor]:
        """What the model takes, a batch of one.

        Raises:
            NotFitting: for an empty text, or one without a gap for a model that fills gaps.
        """
        if self.kind == IMAGE:
            return {"pixel_values": self.processor(load_image(given), return_tensors="pt")["pixel_values"]}
        if not given or not given.strip():
            raise NotFitting("Type a sentence first.")
        longest = min(MAX_LENGTH, self.model.config.max_position_embeddings)
        encoded = self.processor(given, truncation=True, max_length=longest, return_tensors="pt")
        if self.kind == MASKED and self.processor.mask_token_id not in encoded["input_ids"]:
            raise NotFitting(f"Write {self.processor.mask_token} in place of a word, for the model to guess it.")
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    @torch.no_grad()
    def compare(self, given: PilImage.Image | str, merging: Any) -> Comparison:
        """Run one input unmerged and merged, in turns.

        Args:
            given: an image or a text.
            merging: a `Merging`.

        Raises:
            NotFitting: for an input that the model cannot read.
        """
        inputs = self.encoded(given)
        config = self.model.config

        def run(variant: Any) -> Any:
            with variant.applied(config):
                return self.model(**inputs).logits

        with self._lock:
            variants = [self.model.unmerged, merging]
            try:
                logits = [run(variant) for variant in variants]
            except ValueError as error:
                raise NotFitting(str(error)) from error
            first = sum(self._cost.interleaved_seconds(run, variants, 1)[0])
            rounds = int(min(max(TIMED_SECONDS / first, LEAST_ROUNDS), MOST_ROUNDS))
            seconds = self._cost.interleaved_seconds(run, variants, rounds)
            unmerged = self.model.unmerged.asked_of(config)
            share = self._cost.FlopsShare(unmerged, _shape(inputs), type(self.model).__name__)
            sides = [
                Side(
                    self._predictions(logits[index], inputs),
                    1000 * median(taken[index] for taken in seconds),
                    share(variant),
                    variant.asked_of(config).latents_per_layer[-1],
                )
                for index, variant in enumerate(variants)
            ]
        return Comparison(sides[0], sides[1], median(a / b for a, b in seconds), rounds, config.num_latents)

    def picture(self, given: PilImage.Image | str, merging: Any) -> PilImage.Image:
        """What the latents left read of an input."""
        config = self.model.config
        with self._lock, merging.applied(config):
            example: Example = (
                image_example(self.model, self.processor, "this image", given)
                if self.kind == IMAGE
                else text_example(self.model, self.processor, given, MAX_LENGTH)
            )
            left = [config.num_latents, *config.latents_per_layer]
        title = f"{left[0]} latents at first, {left[-1]} at the end" if left[-1] < left[0] else "No latents merge"
        file = io.BytesIO()
        draw_merging(title, left, [example]).savefig(file, dpi=100, format="png")
        return PilImage.open(file)

    def _predictions(self, logits: torch.Tensor, inputs: dict[str, torch.Tensor]) -> list[tuple[str, float | None]]:
        """Of one row: the likeliest classes; the likeliest tokens for one gap, or the likeliest for each of several."""
        if self.kind == MASKED:
            gaps = logits[0][: inputs["input_ids"].shape[1]][inputs["input_ids"][0] == self.processor.mask_token_id]
            probabilities, tokens = gaps.float().softmax(dim=-1).topk(SHOWN_PREDICTIONS)
            if len(gaps) > 1:
                probabilities, tokens = probabilities[:, 0], tokens[:, 0]
            names = [self.processor.decode([token]) for token in tokens.flatten().tolist()]
            return list(zip(names, probabilities.flatten().tolist(), strict=True))
        config, scores = self.model.config, logits[0].float()
        if config.num_labels == 1:
            return [(f"{scores.item():.3f}", None)]
        several = config.problem_type == "multi_label_classification"
        probabilities = scores.sigmoid() if several else scores.softmax(dim=-1)
        best = probabilities.topk(min(SHOWN_PREDICTIONS, len(scores)))
        names = [str(config.id2label[index]) for index in best.indices.tolist()]
        return list(zip(names, best.values.tolist(), strict=True))


def _load_model(name: str, config: Any, architecture: str, kind: str) -> Any:
    """By the code that the checkpoint carries, otherwise by the repository's.

    Raises:
        NotFitting: for a stock checkpoint without the repository around this folder.
    """
    if getattr(config, "auto_map", None):
        return getattr(transformers, f"AutoModelFor{kind}").from_pretrained(name, trust_remote_code=True)
    if not (REPOSITORY / f"{MODEL_MODULE}.py").is_file():
        raise NotFitting("carries no code that merges; load it in the repository, and save it from there")
    if str(REPOSITORY) not in sys.path:
        sys.path.append(str(REPOSITORY))
    classes = importlib.import_module(MODEL_MODULE)
    return getattr(classes, f"ToMe{architecture.removeprefix('ToMe')}").from_pretrained(name)


def _module_beside(model: Any, part: str) -> ModuleType:
    """`PART_tome_perceiver` of the same copy of the code as the model's class.

    Raises:
        ImportError: for a checkpoint of before there was such a module.
    """
    package = type(model).__module__.removesuffix(MODEL_MODULE)
    return importlib.import_module(f"{package}{part}_tome_perceiver")


def _shape(inputs: dict[str, torch.Tensor]) -> Sequence[int]:
    """Of the one input, as the cost of a pass takes it."""
    return tuple(next(iter(inputs.values())).shape)
