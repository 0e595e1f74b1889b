# SPDX-License-Identifier: Apache-2.0
"""Measure the latency and peak memory of models, and describe the machine and software used."""

from __future__ import annotations

import errno
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
    """Latency and speed-up of one variant.

    Attributes:
        latency_ms: milliseconds of one call.
        speedup: baseline's time / this variant's time in the same round, so that a temporary slowdown of the machine
            affects both.
    """

    latency_ms: Quartiles
    speedup: Quartiles


def time_interleaved(
    run: Callable[[Item], object], variants: Sequence[Item], baseline: Item, rounds: int, desc: str = "timing"
) -> list[Timing]:
    """Time variants in alternating rounds within this process.

    Every variant runs once in each round, and each round begins with another variant. A warm-up round is not counted.

    Args:
        run: function to time, called with a variant.
        variants: variants to compare.
        baseline: variant that speed-ups are relative to, also timed in each round.
        rounds: counted rounds, at least 1.
        desc: text of the progress bar.

    Returns:
        A timing for each variant, in their order, without the baseline.
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
    """Return the peak memory of all tensors during `run`, including the model's, in MB (1e6 bytes).

    On a GPU, PyTorch's allocator counts it; on a CPU, its profiler. The memory of the process is no measure on a CPU,
    because the process keeps memory that tensors have freed.

    Args:
        run: forward pass of the model.
        model: model whose parameters and buffers are included.
    """
    if torch.cuda.is_available() and next(model.parameters()).is_cuda:
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 1e6
    # Without this, set before its first use, the profiler prints lines of its own.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with tempfile.TemporaryDirectory() as folder:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        try:
            events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
        except (FileNotFoundError, json.JSONDecodeError) as error:
            # The profiler does not say so if it cannot write, or not all.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(trace)) from error
    events.sort(key=lambda event: event["ts"])
    live = np.cumsum([event["args"]["Bytes"] for event in events]) if events else np.zeros(1)
    own = sum(tensor.numel() * tensor.element_size() for tensor in chain(model.parameters(), model.buffers()))
    return float(max(live.max(), 0) + own) / 1e6


def describe_environment() -> dict[str, str | int]:
    """Return the date, machine, versions and commit that are reported with every measurement."""
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
    """Return an environment in one line."""
    return ", ".join(f"{name} {value}" for name, value in environment.items())


def _commit() -> str:
    """Return the commit of this code, with a + if files have changed since; "unknown" outside a Git repository."""
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
