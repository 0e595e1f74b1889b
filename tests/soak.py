# SPDX-License-Identifier: Apache-2.0
"""Run one model in several threads for a long time, each with its own budget, and check answers and memory.

Each thread calls a shared model again and again with its own merging settings (`model(**inputs, r=...)` or
`model(**inputs, flops_ratio=...)`) on inputs of changing lengths, and compares every answer bit by bit with that of a
single thread. Meanwhile another thread loads, calibrates, merges, runs and drops models of its own. The memory of the
process is sampled, and a line is fitted to it after a warm-up of a fifth of the time.

    python -m tests.soak                     # an hour, as `make soak`
    python -m tests.soak --minutes 5

OUTPUT_DIR/soak.json gets the figures. The exit code is 1 if an answer differed, if the config of the shared model
changed, or if memory grew by more than --max_growth_mb over the measured time.
"""

from __future__ import annotations

import argparse
import gc
import shlex
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import transformers
from torch import Tensor

from experiments.errors import BadInput, Stopped, exit_on_bad_input
from experiments.files import check_writable, write_json
from experiments.measurement import describe_environment
from modeling_tome_perceiver import ToMePerceiverForSequenceClassification
from tests.support.tiny_models import spread_weights, tiny_config

SIZES = {"num_latents": 32, "d_latents": 64, "qk_channels": 64, "v_channels": 64, "max_position_embeddings": 64}
# Merging arguments of a call, one set for each thread; the first leaves merging to the config.
CALLS: tuple[dict[str, Any], ...] = (
    {}, {"r": 0}, {"r": 2}, {"r": [8, 0, 4, 0, 2, 0]}, {"flops_ratio": 0.9}, {"flops_ratio": 0.6},
)  # fmt: skip
LENGTHS = (3, 17, 40, 64)
BATCH_SIZE = 4
CALIBRATION_SAMPLES = 64
WARM_UP_SHARE = 0.2
# Memory is sampled this many times in all, so that a short run has enough samples for a line too.
MEMORY_SAMPLES = 600

Inputs = dict[str, Tensor]


@dataclass
class Report:
    """Figures of a run.

    Attributes:
        calls: number of calls by merging arguments.
        different: number of answers that differ from a single thread's, by merging arguments.
        largest_difference: largest absolute difference of a logit.
        cycles: number of models that were loaded, calibrated, merged, run and dropped.
        different_cycles: number of these whose answers or frontier differ from the first one's.
        memory_mb: resident memory at the end of the warm-up and at the end, in MB (1e6 bytes).
        growth_mb, growth_error_mb: growth of the fitted line over the measured time, and its standard error.
    """

    minutes: float = 0.0
    calls: Counter[str] = field(default_factory=Counter)
    different: Counter[str] = field(default_factory=Counter)
    largest_difference: float = 0.0
    cycles: int = 0
    different_cycles: int = 0
    config_changed: bool = False
    memory_mb: tuple[float, float] = (0.0, 0.0)
    growth_mb: float = 0.0
    growth_error_mb: float = 0.0
    failures: list[str] = field(default_factory=list)


def random_texts(batches: int, length: int, seed: int) -> list[Inputs]:
    """Draw batches of token ids (BATCH_SIZE, length)."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 262, (BATCH_SIZE, length), generator=generator)} for _ in range(batches)]


def calibrated_model() -> ToMePerceiverForSequenceClassification:
    """Build a text classifier with random weights and a frontier; its own config merges by r = 4."""
    model = spread_weights(ToMePerceiverForSequenceClassification(tiny_config(**SIZES))).eval()
    model.calibrate(random_texts(CALIBRATION_SAMPLES // BATCH_SIZE, 40, seed=1))
    model.r = 4
    return model


def answer(model: Any, inputs: Inputs, call: dict[str, Any]) -> Tensor:
    with torch.inference_mode():
        return model(**inputs, **call).logits


def repeat_calls(
    model: Any,
    call: dict[str, Any],
    inputs: list[Inputs],
    expected: list[Tensor],
    report: Report,
    stop: threading.Event,
) -> None:
    """Call the model with one set of merging arguments until the end, and count the answers that differ."""
    name = str(call)
    while not stop.is_set():
        for each, logits in zip(inputs, expected, strict=True):
            found = answer(model, each, call)
            report.calls[name] += 1
            if not torch.equal(found, logits):
                report.different[name] += 1
                report.largest_difference = max(report.largest_difference, float((found - logits).abs().max()))


def repeat_cycles(folder: str, inputs: list[Inputs], report: Report, stop: threading.Event) -> None:
    """Load, calibrate, merge, run and drop models until the end, and count those that differ from the first."""
    samples, first = random_texts(4, 17, seed=2), None
    while not stop.is_set():
        model = ToMePerceiverForSequenceClassification.from_pretrained(folder)
        model.merge_to(flops_ratio=0.6)
        saved = answer(model, inputs[0], {})
        model.calibrate(samples, merge_methods=["bipartite"], merge_metrics=["key"])
        model.merge_to(flops_ratio=0.5)
        found = saved, answer(model, inputs[0], {}), model.config.merge_frontier
        first = first or found
        report.cycles += 1
        report.different_cycles += not (
            torch.equal(found[0], first[0]) and torch.equal(found[1], first[1]) and found[2] == first[2]
        )
        del model, found
        gc.collect()


def watched(work: Callable[..., None], failures: list[str], stop: threading.Event, *arguments: Any) -> threading.Thread:
    """Return a thread for `work`; an exception in it is recorded and ends the run."""

    def run() -> None:
        try:
            work(*arguments, stop)
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}")
            stop.set()

    return threading.Thread(target=run, name=work.__name__)


def sample_memory(seconds: float, stop: threading.Event) -> np.ndarray:
    """Return (S, 2): seconds since the start, and resident memory in MB."""
    process, start, samples = psutil.Process(), time.monotonic(), []
    while (passed := time.monotonic() - start) < seconds and not stop.wait(seconds / MEMORY_SAMPLES):
        samples.append((passed, process.memory_info().rss / 1e6))
    return np.array(samples)


def fit_growth(samples: np.ndarray) -> tuple[float, float]:
    """Return the growth in MB of a least-squares line over the time of the samples (S, 2), and its standard error."""
    (slope, _), covariance = np.polyfit(samples[:, 0], samples[:, 1], 1, cov=True)
    seconds = samples[-1, 0] - samples[0, 0]
    return float(slope * seconds), float(covariance[0, 0] ** 0.5 * seconds)


def soak(minutes: float) -> Report:
    """Run all threads for some minutes and return the report."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    model, report, stop = calibrated_model(), Report(minutes), threading.Event()
    inputs = [text for length in LENGTHS for text in random_texts(1, length, seed=length)]
    expected = {str(call): [answer(model, each, call) for each in inputs] for call in CALLS}
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        model.save_pretrained(folder)
        before = model.config.to_dict()
        threads = [
            watched(repeat_calls, report.failures, stop, model, call, inputs, expected[str(call)], report)
            for call in CALLS
        ] + [watched(repeat_cycles, report.failures, stop, folder, inputs, report)]
        for thread in threads:
            thread.start()
        try:
            memory = sample_memory(minutes * 60, stop)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    report.config_changed = model.config.to_dict() != before
    steady = memory[int(len(memory) * WARM_UP_SHARE) :]
    if len(steady) > 3:
        report.memory_mb = float(steady[0, 1]), float(steady[-1, 1])
        report.growth_mb, report.growth_error_mb = fit_growth(steady)
    return report


def find_fault(report: Report, max_growth_mb: float) -> str | None:
    """Return the first promise that a run broke, in one line, or `None`."""
    if report.failures:
        return report.failures[0]
    if report.different:
        name, count = report.different.most_common(1)[0]
        return f"{count} of {report.calls[name]} answers with {name} differ from a single thread's"
    if report.different_cycles or not report.cycles:
        return f"{report.different_cycles} of {report.cycles} loaded models differ from the first"
    if report.config_changed:
        return "the config of the shared model changed"
    if report.growth_mb > max_growth_mb:
        return f"memory grew by {report.growth_mb:.1f} MB; must be at most {max_growth_mb:g} MB (--max_growth_mb)"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="length of the run (default: %(default)g)")
    parser.add_argument(
        "--max_growth_mb",
        type=float,
        default=20.0,
        help="largest growth of memory after warm-up (default: %(default)g)",
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/soak"), help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    for name in ("minutes", "max_growth_mb"):
        if not 0 < (value := getattr(arguments, name)) < float("inf"):
            raise BadInput(f"--{name} {value}: must be a finite number above 0")
    check_writable(f"--output_dir {arguments.output_dir}", arguments.output_dir)
    # The commit is the one that runs, even if files change in the meantime.
    environment = describe_environment()
    report = soak(arguments.minutes)
    command = shlex.join(["python", "-m", "tests.soak", *sys.argv[1:]])
    figures = {"command": command, "environment": environment, **vars(report)}
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(arguments.output_dir / "soak.json", figures)
    print(
        f"{arguments.minutes:g} minutes: {report.calls.total():,} calls in {len(CALLS)} threads, "
        f"{report.different.total()} different; {report.cycles:,} models loaded, {report.different_cycles} different; "
        f"memory {report.memory_mb[0]:.0f} to {report.memory_mb[1]:.0f} MB, fitted growth {report.growth_mb:.2f} MB "
        f"(standard error {report.growth_error_mb:.2f})"
    )
    if (fault := find_fault(report, arguments.max_growth_mb)) is not None:
        raise Stopped(fault)


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
