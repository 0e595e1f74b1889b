# SPDX-License-Identifier: Apache-2.0
"""A checkpoint, and one input run through it unmerged and merged: predictions, time, cost, and what merged.

The model's class is all that is needed: a checkpoint carries it, and the repository around this folder has it for a
stock checkpoint. Merging settings are objects as `model.unmerged` is one.
"""

from __future__ import annotations

import importlib
import io
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from merging_picture import draw_merging, image_example, text_example
from PIL import Image as PilImage
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
from transformers.image_utils import load_image

IMAGE, TEXT, MASKED = "ImageClassification", "SequenceClassification", "MaskedLM"
"""Kinds of checkpoints, by the part of a class name that they share with the Auto class that loads them."""

MODEL_MODULE = "modeling_tome_perceiver"
REPOSITORY = Path(__file__).resolve().parents[1]
# Tokens of a text; more would not be readable in the picture.
MAX_LENGTH = 96
SHOWN_PREDICTIONS = 3
# Rounds in which unmerged and merged take turns: as many as fit in these seconds.
TIMED_SECONDS, LEAST_ROUNDS, MOST_ROUNDS = 0.6, 3, 25
# Step of the slider of shares.
BUDGET_STEP = 0.05


class NotFitting(Exception):
    """A checkpoint or an input cannot be used; the message says in one line what is wrong and why."""


@dataclass(frozen=True)
class Side:
    """Results of the unmerged or of the merged model.

    Attributes:
        predictions: the likeliest, with their probabilities; `None` for a probability where the model gives a number.
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
    """Results of one input, unmerged and merged.

    Attributes:
        unmerged, merged: the two sides.
        speedup: times as fast as unmerged, the median over rounds.
        rounds: number of rounds that were timed.
        latents: of the unmerged model.
    """

    unmerged: Side
    merged: Side
    speedup: float
    rounds: int
    latents: int


class Checkpoint:
    """A model with its image processor or tokenizer.

    Args:
        name: Hub id or local folder.

    Raises:
        NotFitting: for a checkpoint that is missing, broken, or for other inputs.

    Attributes:
        kind: `IMAGE`, `TEXT` or `MASKED`.
        saved: merging settings that it was saved with; `None` if it merges nothing.
        rows: of its frontier, from mild to strong, as `config.merge_frontier` has them; none without a frontier.
    """

    def __init__(self, name: str) -> None:
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=True)
            architecture = (config.architectures or ["no architecture"])[0]
            kinds = [kind for kind in (IMAGE, TEXT, MASKED) if f"PerceiverFor{kind}" in architecture]
            if not kinds:
                raise NotFitting(f"is a {architecture}; must be a Perceiver for {IMAGE}, {TEXT} or {MASKED}")
            self.kind = kinds[0]
            self.model = _load_model(name, config, architecture, self.kind).eval()
            if not hasattr(self.model, "flops_ratio"):
                raise NotFitting("carries code of an older version; load it in the repository, and save it from there")
            if self.kind == IMAGE:
                self.processor = AutoImageProcessor.from_pretrained(name)
            else:
                # With the config at hand, nobody is asked about the checkpoint's code a second time.
                self.processor = AutoTokenizer.from_pretrained(name, config=self.model.config, trust_remote_code=True)
        except (NotFitting, OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise NotFitting(f"--model_name_or_path {name}: {lines[0]}") from error
        self.config, unmerged = self.model.config, self.model.unmerged
        saved = unmerged.of(self.config)
        self.saved = saved if saved.merges(unmerged.asked_of(self.config)) else None
        self.rows: list[dict[str, Any]] = (self.config.merge_frontier or {}).get("rows", [])
        # The config says what merges, and timing must not be disturbed, so one input runs at a time.
        self._lock = threading.Lock()

    @property
    def labels(self) -> list[str]:
        """Names of the classes; none for a masked language model."""
        return [] if self.kind == MASKED else [str(label) for label in self.config.id2label.values()]

    def smallest_budget(self, given: Any) -> float:
        """Return the least share on the slider that is in reach for an input; 1 if there is none."""
        for step in range(1, round(1 / BUDGET_STEP)):
            try:
                self.within(share := round(BUDGET_STEP * step, 2), given)
                return share
            except NotFitting:
                continue
        return 1.0

    def within(self, share: float, given: Any) -> Any:
        """Return merging settings with which a pass on this input costs at most a share of the unmerged FLOPs.

        Raises:
            NotFitting: for a share that merging alone does not reach.
        """
        if share >= 1:
            return self.model.unmerged
        try:
            shape = _first(self.encoded(given)).shape
            with self._lock, self.model.merged(flops_ratio=share, input_shape=tuple(shape)) as choice:
                return choice.chosen.merging
        except ValueError as error:
            raise NotFitting(
                f"Merging cannot bring this input down to {share:.0%} of the computation; a larger share can."
            ) from error

    def at_row(self, number: int) -> Any:
        """Return the merging settings of a row of the frontier, counted from 1."""
        return self.model.unmerged.of(self.config.merged_as(self._row(number)))

    def row_line(self, number: int) -> str:
        """Say in a sentence what a row of the frontier costs and how many answers it changes."""
        row = self._row(number)
        cost = f"{row['flops_ratio']:.0%} of the computation for the longest input"
        changed, most = row.get("changed"), row.get("changed_bound")
        if changed is None:
            return f"{cost}; how many answers change was not measured."
        bound = "" if most is None else f", at most {most:.2%} with 95 % confidence"
        return f"{cost}; of {row['who']['samples']:,} inputs, {changed:.2%} of the answers changed{bound}."

    def _row(self, number: int) -> dict[str, Any]:
        return self.rows[min(max(number, 1), len(self.rows)) - 1]

    def encoded(self, given: PilImage.Image | str) -> dict[str, torch.Tensor]:
        """Return the arguments of the model for one input, a batch of one.

        Raises:
            NotFitting: for an empty text, or one without a gap for a model that fills gaps.
        """
        if self.kind == IMAGE:
            return {"pixel_values": self.processor(load_image(given), return_tensors="pt")["pixel_values"]}
        if not given or not given.strip():
            raise NotFitting("Type a sentence first.")
        longest = min(MAX_LENGTH, self.config.max_position_embeddings)
        encoded = self.processor(given, truncation=True, max_length=longest, return_tensors="pt")
        if self.kind == MASKED and self.processor.mask_token_id not in encoded["input_ids"]:
            raise NotFitting(f"Write {self.processor.mask_token} in place of a word, for the model to guess it.")
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    @torch.no_grad()
    def compare(self, given: PilImage.Image | str, merging: Any) -> Comparison:
        """Run one input unmerged and with merging settings, in turns.

        Raises:
            NotFitting: for an input that the model cannot read.
        """
        inputs, variants = self.encoded(given), [self.model.unmerged, merging]

        def run(variant: Any) -> Any:
            with variant.applied(self.config):
                return self.model(**inputs).logits

        with self._lock:
            try:
                logits = [run(variant) for variant in variants]
            except ValueError as error:
                raise NotFitting(str(error)) from error
            fitting = int(TIMED_SECONDS / sum(_seconds(run, variant) for variant in variants))
            rounds = min(max(fitting, LEAST_ROUNDS), MOST_ROUNDS)
            seconds = [[_seconds(run, variant) for variant in variants] for _ in range(rounds)]
            sides = [
                Side(
                    self._predictions(scores[0], inputs),
                    1000 * median(taken),
                    self.model.flops_ratio(tuple(_first(inputs).shape), merging=variant),
                    variant.asked_of(self.config).latents_per_layer[-1],
                )
                for variant, scores, taken in zip(variants, logits, zip(*seconds, strict=True), strict=True)
            ]
        return Comparison(*sides, median(a / b for a, b in seconds), rounds, self.config.num_latents)

    def picture(self, given: PilImage.Image | str, merging: Any) -> PilImage.Image:
        """Draw what the latents left read of an input."""
        with self._lock, merging.applied(self.config):
            if self.kind == IMAGE:
                example = image_example(self.model, self.processor, "this image", given)
            else:
                example = text_example(self.model, self.processor, given, MAX_LENGTH)
            left = [self.config.num_latents, *self.config.latents_per_layer]
        title = f"{left[0]} latents at first, {left[-1]} at the end" if left[-1] < left[0] else "No latents merge"
        file = io.BytesIO()
        draw_merging(title, left, [example]).savefig(file, dpi=100, format="png")
        return PilImage.open(file)

    def _predictions(self, logits: torch.Tensor, inputs: dict[str, torch.Tensor]) -> list[tuple[str, float | None]]:
        """Return the likeliest classes; the likeliest tokens for one gap, or the likeliest for each of several."""
        if self.kind == MASKED:
            gaps = logits[: inputs["input_ids"].shape[1]][inputs["input_ids"][0] == self.processor.mask_token_id]
            best = gaps.float().softmax(dim=-1).topk(SHOWN_PREDICTIONS if len(gaps) == 1 else 1)
            names = [self.processor.decode([token]) for token in best.indices.flatten().tolist()]
            return list(zip(names, best.values.flatten().tolist(), strict=True))
        scores = logits.float()
        if self.config.num_labels == 1:
            return [(f"{scores.item():.3f}", None)]
        several = self.config.problem_type == "multi_label_classification"
        best = (scores.sigmoid() if several else scores.softmax(dim=-1)).topk(min(SHOWN_PREDICTIONS, len(scores)))
        names = [str(self.config.id2label[index]) for index in best.indices.tolist()]
        return list(zip(names, best.values.tolist(), strict=True))


def _load_model(name: str, config: Any, architecture: str, kind: str) -> Any:
    """Load a model by the code that its checkpoint carries, otherwise by the repository's.

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


def _first(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return next(iter(inputs.values()))


def _seconds(run: Callable[[Any], Any], variant: Any) -> float:
    start = time.perf_counter()
    run(variant)
    return time.perf_counter() - start
