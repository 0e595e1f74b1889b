# SPDX-License-Identifier: Apache-2.0
"""Merging settings by budget, and batches of inputs that run with the same settings. Used by serve.py."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import prometheus_client

from cost_tome_perceiver import Merging
from examples.classifier import Classifier, Inputs, Prediction
from frontier_tome_perceiver import Frontier, choose

# Most budgets whose merging settings are kept; clients may send any number of different ones.
MAX_KEPT_BUDGETS = 1000

BATCH_SIZE = prometheus_client.Histogram("tome_batch_size", "Inputs in a batch.", buckets=[1, 2, 4, 8, 16, 32, 64])
WAITING = prometheus_client.Gauge("tome_waiting_inputs", "Inputs that wait for a batch.")
DEGRADED = prometheus_client.Counter("tome_degraded_inputs", "Inputs that fell back to cheaper merging settings.")
FLOPS_RATIO = prometheus_client.Histogram(
    "tome_flops_ratio", "Share of the unmerged FLOPs used for an input.", buckets=[step / 10 for step in range(1, 11)]
)


class Budget(NamedTuple):
    """Budget of a request, as for `model.merge_to`; without either, the settings that the checkpoint was saved with."""

    flops_ratio: float | None = None
    max_changed: float | None = None


@dataclass(frozen=True, eq=False)
class Setting:
    """Merging settings, and their share of the unmerged model's FLOPs."""

    flops_ratio: float
    merging: Merging


class Settings:
    """Merging settings of a checkpoint by budget; equal settings are one object.

    Attributes:
        saved: settings that the checkpoint was saved with.
        frontier: frontier of the checkpoint; `None` without one.
        rows: settings of the frontier's rows, from mild to strong.
    """

    def __init__(self, classifier: Classifier) -> None:
        self._model = model = classifier.model
        self._by_merging: dict[str, Setting] = {}
        self.frontier = frontier = Frontier.of(model.config)
        self.rows = [self._setting(row.flops_ratio, row.merging) for row in (frontier.rows if frontier else [])]
        shape = frontier.input_shape if frontier else classifier.input_shape
        self.saved = self._setting(model.flops_ratio(shape), Merging.of(model.config))
        self.known = {Budget(): self.saved}

    def _setting(self, flops_ratio: float, merging: Merging) -> Setting:
        return self._by_merging.setdefault(merging.key, Setting(flops_ratio, merging))

    def choose(self, budget: Budget) -> Setting:
        """Choose the best settings within a budget, in the thread of the model, whose config this reads.

        Raises:
            ValueError: if the budget cannot be met.
        """
        row = choose(self._model, **budget._asdict()).chosen
        setting = self._setting(row.flops_ratio, row.merging)
        if len(self.known) < MAX_KEPT_BUDGETS:
            self.known[budget] = setting
        return setting

    def cheaper(self, setting: Setting, steps: int) -> Setting:
        """Return the settings this many rows further along the frontier, or those of its last row."""
        rows = [row for row in self.rows if row.flops_ratio < setting.flops_ratio]
        return rows[min(steps, len(rows)) - 1] if rows and steps else setting


@dataclass(eq=False)
class Waiting:
    """An input that waits for a batch."""

    inputs: Inputs
    setting: Setting
    may_fall_back: bool
    answer: asyncio.Future[Prediction]
    arrived: float = field(default_factory=time.monotonic)


class Batcher:
    """Inputs that wait, and the thread that runs the model on them in batches of equal merging settings.

    Args:
        classifier: the model; only this class's thread uses it.
        max_batch_size: most inputs in a batch.
        max_wait: longest wait of an input for its batch to fill, in seconds.
        fall_back_inputs: fall back by one row of the frontier for each time this many inputs wait; 0 for never.
    """

    def __init__(self, classifier: Classifier, max_batch_size: int, max_wait: float, fall_back_inputs: int) -> None:
        self.classifier, self.settings = classifier, Settings(classifier)
        self.max_batch_size, self.max_wait, self.fall_back_inputs = max_batch_size, max_wait, fall_back_inputs
        self.waiting: list[Waiting] = []
        WAITING.set_function(lambda: len(self.waiting))
        self._arrived = asyncio.Event()
        self._model_thread = ThreadPoolExecutor(1, "model")

    async def choose(self, budget: Budget) -> Setting:
        """Return the best settings within a budget; raises as `Settings.choose`."""
        known = self.settings.known.get(budget)
        if known is not None:
            return known
        return await asyncio.get_running_loop().run_in_executor(self._model_thread, self.settings.choose, budget)

    async def classify(self, inputs: Sequence[Inputs], setting: Setting, may_fall_back: bool) -> list[Prediction]:
        """Wait for the predictions of all inputs; if the call is cancelled, those that still wait are dropped."""
        loop = asyncio.get_running_loop()
        added = [Waiting(each, setting, may_fall_back, loop.create_future()) for each in inputs]
        self.waiting += added
        self._arrived.set()
        return await asyncio.gather(*(each.answer for each in added))

    async def run(self) -> None:
        """Run batches for ever, the input that waits longest first."""
        loop = asyncio.get_running_loop()
        while True:
            self._arrived.clear()
            setting, batch = self._next_batch()
            if not batch:
                await self._arrived.wait()
                continue
            left = batch[0].arrived + self.max_wait - time.monotonic()
            if len(batch) < self.max_batch_size and left > 0:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._arrived.wait(), left)
                continue
            self.waiting = [each for each in self.waiting if each not in batch]
            try:
                predictions = await loop.run_in_executor(self._model_thread, self._classify_batch, batch, setting)
            except Exception as error:  # the requests of this batch fail; the server goes on
                for each in batch:
                    if not each.answer.done():
                        each.answer.set_exception(error)
                continue
            for each, prediction in zip(batch, predictions, strict=True):
                if not each.answer.done():
                    each.answer.set_result(prediction)

    def _next_batch(self) -> tuple[Setting, list[Waiting]]:
        """Return the input that waits longest, with others that would run with the same merging settings now."""
        self.waiting = [each for each in self.waiting if not each.answer.done()]
        steps = len(self.waiting) // self.fall_back_inputs if self.fall_back_inputs else 0
        # Many inputs wait with few different settings.
        used = {setting: self.settings.cheaper(setting, steps) for setting in {each.setting for each in self.waiting}}
        settings = [used[each.setting] if each.may_fall_back else each.setting for each in self.waiting]
        first = settings[0] if settings else self.settings.saved
        same = [each for each, setting in zip(self.waiting, settings, strict=True) if setting is first]
        return first, same[: self.max_batch_size]

    def _classify_batch(self, batch: list[Waiting], setting: Setting) -> list[Prediction]:
        with setting.merging.applied(self.classifier.config):
            predictions = self.classifier.classify([each.inputs for each in batch])
        BATCH_SIZE.observe(len(batch))
        for each, prediction in zip(batch, predictions, strict=True):
            degraded = setting is not each.setting
            DEGRADED.inc(degraded)
            FLOPS_RATIO.observe(setting.flops_ratio)
            prediction |= {"flops_ratio": setting.flops_ratio, "degraded": degraded}
        return predictions
