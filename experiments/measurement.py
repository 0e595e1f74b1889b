# SPDX-License-Identifier: Apache-2.0
"""How fast a model is, and on what machine that was measured.

Letters: B batch.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import transformers
from torch import nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from cost_tome_perceiver import interleaved_seconds

Item = TypeVar("Item")


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of repeated measurements."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: np.ndarray) -> Quartiles:
        lower, median, upper = np.percentile(values, [25, 50, 75])
        return cls(median=float(median), lower=float(lower), upper=float(upper))


@dataclass(frozen=True)
class Timing:
    """Times of one variant.

    Attributes:
        latency_ms: milliseconds of one call.
        speedup: baseline's time / this variant's time in the same round, so that what slows the machine for a while
            slows both.
    """

    latency_ms: Quartiles
    speedup: Quartiles


def time_interleaved(
    run: Callable[[Item], object], variants: Sequence[Item], baseline: Item, rounds: int, desc: str = "timing"
) -> list[Timing]:
    """Time variants in alternating rounds within this process.

    Every variant runs once in every round, each round starting with another one. A first round is not counted.

    Args:
        run: called with a variant; its time is what is measured.
        variants: what to compare.
        baseline: what the speed-ups are against, timed in every round too.
        rounds: counted rounds, at least 1.
        desc: what the progress bar says.

    Returns:
        A timing for each variant, in their order.
    """
    with tqdm(total=rounds + 1, desc=desc) as bar:
        counted = np.array(interleaved_seconds(run, [baseline, *variants], rounds, bar))
    return [
        Timing(
            latency_ms=Quartiles.of(counted[:, index] * 1e3), speedup=Quartiles.of(counted[:, 0] / counted[:, index])
        )
        for index in range(1, counted.shape[1])
    ]


def peak_memory_mb(run: Callable[[], object], model: nn.Module) -> float:
    """Most memory that tensors hold at once while `run` runs, the model's own among them, in MB (1e6 bytes).

    On a GPU it is what its allocator counts. On a CPU it is what PyTorch's profiler sees allocated: the memory of the
    process would not do, since it keeps what was freed.

    Args:
        run: a forward pass of the model.
        model: whose parameters and buffers count.
    """
    if torch.cuda.is_available() and next(model.parameters()).is_cuda:
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 1e6
    # The profiler announces itself in lines of its own, unless told not to before it first runs.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with tempfile.TemporaryDirectory() as folder:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    live = np.cumsum([event["args"]["Bytes"] for event in events]) if events else np.zeros(1)
    own = sum(tensor.numel() * tensor.element_size() for tensor in chain(model.parameters(), model.buffers()))
    return float(max(live.max(), 0) + own) / 1e6


def describe_environment() -> dict[str, str | int]:
    """Date, machine, versions and commit, to stand beside every figure."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": _processor_name(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
    }


def environment_line(environment: Mapping[str, str | int]) -> str:
    """An environment in one line."""
    return ", ".join(f"{name} {value}" for name, value in environment.items())


def _commit() -> str:
    """Of this code, with a + where files have changed since; "unknown" where it is no repository."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--exclude", "*"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    ) if shutil.which("git") else None  # fmt: skip
    return described.stdout.strip() or "unknown" if described is not None else "unknown"


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
