# SPDX-License-Identifier: Apache-2.0
"""Run one input through a checkpoint unmerged and merged, and compare predictions, time and FLOPs.

Used by app.py. The model class comes from the code in the checkpoint or, for a stock checkpoint, from the repository
around this folder; nothing else of the repository is imported. Merging settings have the type of `model.unmerged`.
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
"""Kinds of checkpoints. Each is part of the model class's name and of the Auto class's name."""

MODEL_MODULE = "modeling_tome_perceiver"
REPOSITORY = Path(__file__).resolve().parents[1]
# Longest text in tokens; a longer one would be unreadable in the picture.
MAX_TOKENS = 96
SHOWN_PREDICTIONS = 3
# Both models take turns in timed rounds: as many as fit in TIMED_SECONDS, within these limits.
TIMED_SECONDS, LEAST_ROUNDS, MOST_ROUNDS = 0.6, 3, 25
# Step of the slider for the share of the computation.
BUDGET_STEP = 0.05


class UnusableInput(Exception):
    """Error for a checkpoint or an input that cannot be used; the message explains why in one line."""


@dataclass(frozen=True)
class Side:
    """Results of one of the two models, unmerged or merged.

    Attributes:
        predictions: likeliest labels with their probabilities; a regression has its value and `None`.
        milliseconds: median time of a forward pass.
        flops_ratio: share of the unmerged model's FLOPs, with the matching.
        latents_left: number of latents after the last layer.
    """

    predictions: list[tuple[str, float | None]]
    milliseconds: float
    flops_ratio: float
    latents_left: int


@dataclass(frozen=True)
class Comparison:
    """Results of one input, unmerged and merged.

    Attributes:
        unmerged, merged: results of each model.
        speedup: speed-up over the unmerged model, the median over rounds.
        rounds: number of timed rounds.
        latents: number of latents of the unmerged model.
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
        UnusableInput: for a checkpoint that is missing, broken, or of another task.

    Attributes:
        kind: `IMAGE`, `TEXT` or `MASKED`.
        saved: merging settings saved in the checkpoint; `None` if it merges nothing.
        rows: rows of `config.merge_frontier`, from mild to strong; empty without a frontier.
    """

    def __init__(self, name: str) -> None:
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=True)
            architecture = (config.architectures or ["no architecture"])[0]
            kinds = [kind for kind in (IMAGE, TEXT, MASKED) if f"PerceiverFor{kind}" in architecture]
            if not kinds:
                raise UnusableInput(f"is a {architecture}; must be a Perceiver for {IMAGE}, {TEXT} or {MASKED}")
            self.kind = kinds[0]
            self.model = _load_model(name, config, architecture, self.kind).eval()
            if not hasattr(self.model, "flops_ratio"):
                raise UnusableInput("contains code of an older version; load it in the repository and save it again")
            if self.kind == IMAGE:
                self.processor = AutoImageProcessor.from_pretrained(name)
            else:
                # Passing the config avoids a second question whether to trust the checkpoint's code.
                self.processor = AutoTokenizer.from_pretrained(name, config=self.model.config, trust_remote_code=True)
        except (UnusableInput, OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UnusableInput(f"--model_name_or_path {name}: {lines[0]}") from error
        self.config, unmerged = self.model.config, self.model.unmerged
        saved = unmerged.of(self.config)
        self.saved = saved if saved.merges(unmerged.asked_of(self.config)) else None
        self.rows: list[dict[str, Any]] = (self.config.merge_frontier or {}).get("rows", [])
        # Runs change the config and are timed, so only one may run at a time.
        self._lock = threading.Lock()

    @property
    def labels(self) -> list[str]:
        """Names of the classes; none for a masked language model."""
        return [] if self.kind == MASKED else [str(label) for label in self.config.id2label.values()]

    def smallest_budget(self, image_or_text: Any) -> float:
        """Return the least share on the slider that merging reaches for an input; 1 if it reaches none."""
        for step in range(1, round(1 / BUDGET_STEP)):
            try:
                self.within(share := round(BUDGET_STEP * step, 2), image_or_text)
                return share
            except UnusableInput:
                continue
        return 1.0

    def within(self, share: float, image_or_text: Any) -> Any:
        """Return merging settings that cost at most a share of the unmerged FLOPs on this input.

        Raises:
            UnusableInput: for a share that merging does not reach.
        """
        if share >= 1:
            return self.model.unmerged
        try:
            shape = _first(self.encoded(image_or_text)).shape
            with self._lock, self.model.merged(flops_ratio=share, input_shape=tuple(shape)) as choice:
                return choice.chosen.merging
        except ValueError as error:
            raise UnusableInput(
                f"Merging cannot bring this input down to {share:.0%} of the computation; choose a larger share."
            ) from error

    def at_row(self, number: int) -> Any:
        """Return the merging settings of a row of the frontier, counted from 1."""
        return self.model.unmerged.of(self.config.merged_as(self._row(number)))

    def describe_row(self, number: int) -> str:
        """Describe in a sentence what a row of the frontier costs and how many answers it changes."""
        row = self._row(number)
        cost = f"{row['flops_ratio']:.0%} of the computation for the longest input"
        changed, most = row.get("changed"), row.get("changed_bound")
        if changed is None:
            return f"{cost}; how many answers change was not measured."
        bound = "" if most is None else f", at most {most:.2%} with 95 % confidence"
        return f"{cost}; of {row['who']['samples']:,} inputs, {changed:.2%} of the answers changed{bound}."

    def _row(self, number: int) -> dict[str, Any]:
        return self.rows[min(max(number, 1), len(self.rows)) - 1]

    def encoded(self, image_or_text: PilImage.Image | str) -> dict[str, torch.Tensor]:
        """Return the arguments of the model for one input, a batch of one.

        Raises:
            UnusableInput: for an empty text, or, in masked language modelling, one without a mask token.
        """
        if self.kind == IMAGE:
            return {"pixel_values": self.processor(load_image(image_or_text), return_tensors="pt")["pixel_values"]}
        if not image_or_text or not image_or_text.strip():
            raise UnusableInput("Type a sentence first.")
        longest = min(MAX_TOKENS, self.config.max_position_embeddings)
        encoded = self.processor(image_or_text, truncation=True, max_length=longest, return_tensors="pt")
        if self.kind == MASKED and self.processor.mask_token_id not in encoded["input_ids"]:
            raise UnusableInput(f"Write {self.processor.mask_token} in place of the word that the model should guess.")
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    @torch.no_grad()
    def compare(self, image_or_text: PilImage.Image | str, merging: Any) -> Comparison:
        """Run one input alternately unmerged and with merging settings.

        Raises:
            UnusableInput: for an input that the model cannot read.
        """
        inputs, variants = self.encoded(image_or_text), [self.model.unmerged, merging]

        def run(variant: Any) -> Any:
            with variant.applied(self.config):
                return self.model(**inputs).logits

        with self._lock:
            try:
                logits = [run(variant) for variant in variants]
            except ValueError as error:
                raise UnusableInput(str(error)) from error
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

    def picture(self, image_or_text: PilImage.Image | str, merging: Any) -> PilImage.Image:
        """Draw the parts of an input that each latent left at the end reads."""
        with self._lock, merging.applied(self.config):
            if self.kind == IMAGE:
                example = image_example(self.model, self.processor, "this image", image_or_text)
            else:
                example = text_example(self.model, self.processor, image_or_text, MAX_TOKENS)
            left = [self.config.num_latents, *self.config.latents_per_layer]
        title = f"{left[0]} latents at the start, {left[-1]} at the end" if left[-1] < left[0] else "No latents merge"
        file = io.BytesIO()
        draw_merging(title, left, [example]).savefig(file, dpi=100, format="png")
        return PilImage.open(file)

    def _predictions(self, logits: torch.Tensor, inputs: dict[str, torch.Tensor]) -> list[tuple[str, float | None]]:
        """Return the likeliest classes, the likeliest tokens for one mask, or the likeliest token for each mask."""
        if self.kind == MASKED:
            mask_logits = logits[: inputs["input_ids"].shape[1]][inputs["input_ids"][0] == self.processor.mask_token_id]
            best = mask_logits.float().softmax(dim=-1).topk(SHOWN_PREDICTIONS if len(mask_logits) == 1 else 1)
            names = [self.processor.decode([token]) for token in best.indices.flatten().tolist()]
            return list(zip(names, best.values.flatten().tolist(), strict=True))
        scores = logits.float()
        if self.config.num_labels == 1:
            return [(f"{scores.item():.3f}", None)]
        is_multi_label = self.config.problem_type == "multi_label_classification"
        best = (scores.sigmoid() if is_multi_label else scores.softmax(dim=-1)).topk(
            min(SHOWN_PREDICTIONS, len(scores))
        )
        names = [str(self.config.id2label[index]) for index in best.indices.tolist()]
        return list(zip(names, best.values.tolist(), strict=True))


def _load_model(name: str, config: Any, architecture: str, kind: str) -> Any:
    """Load a model with the code in its checkpoint, or else with the repository's.

    Raises:
        UnusableInput: for a stock checkpoint if this folder is not in the repository.
    """
    if getattr(config, "auto_map", None):
        return getattr(transformers, f"AutoModelFor{kind}").from_pretrained(name, trust_remote_code=True)
    if not (REPOSITORY / f"{MODEL_MODULE}.py").is_file():
        raise UnusableInput("contains no code that merges; load it in the repository and save it again")
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
