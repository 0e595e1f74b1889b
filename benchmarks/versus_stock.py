# SPDX-License-Identifier: Apache-2.0
"""How fast a Perceiver that merges its latents is against the stock one of transformers, in one process.

Random weights of the published language shapes (`deepmind/language-perceiver`), the same in both models; speed does
not depend on what weights say. The variants take turns: in each round every variant runs once, the next round starts
with the next variant, and what is reported is the median over rounds of the ratio of times within a round. So neither
a machine that slows down nor a place in the order favours a variant.

    python benchmarks/versus_stock.py
    python benchmarks/versus_stock.py --r 0 4 --batch_size 1 --length 512 --rounds 5 --output_dir out
    python benchmarks/versus_stock.py --device cuda --dtype bfloat16

Letters: V variants (the stock model and one for each r), R rounds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import PerceiverForSequenceClassification

# A script's own folder is on the path, the repository's root, where the modules are, is not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.cost import forward_cost
from modeling_tome_perceiver import ToMePerceiverForSequenceClassification

# `deepmind/language-perceiver`; every other field has its default.
PUBLISHED_LANGUAGE_SHAPES: dict[str, Any] = {"qk_channels": 256, "v_channels": 1280}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What rounding may make of the logits of random weights (of order 1) between two orders of summation.
LOGITS_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-1, "float16": 1e-2}
STOCK = "stock"


@dataclass(frozen=True)
class Variant:
    """What a variant took, over the R rounds.

    Attributes:
        name: `stock` or `r = ...`.
        r: `None` for the stock model.
        latents_left: what the decoder reads.
        gflops: of one forward pass of the batch, the matching included.
        milliseconds: median of a forward pass.
        speedup, speedup_quartiles: median and quartiles of stock time / time within a round.
        speedup_by_flops: stock FLOPs / FLOPs.
        share_of_flops_speedup: speedup / speedup_by_flops.
    """

    name: str
    r: int | None
    latents_left: int
    gflops: float
    milliseconds: float
    speedup: float
    speedup_quartiles: tuple[float, float]
    speedup_by_flops: float
    share_of_flops_speedup: float


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    description, _, epilog = (__doc__ or "").partition("\n\n    python")
    parser = argparse.ArgumentParser(
        description=description,
        epilog="examples:\n    python" + epilog.rpartition("\n\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--r", type=int, nargs="+", default=[0, 2, 8, 16], help="latents merged in each of the 26 layers (%(default)s)"
    )
    parser.add_argument("--batch_size", type=int, default=8, help="texts in a forward pass (%(default)s)")
    parser.add_argument("--length", type=int, default=128, help="bytes in a text, at most 2048 (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and activations (%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (%(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="each runs every variant once (%(default)s)")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before those that count (%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads; by default as many as PyTorch chooses")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs (%(default)s)")
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("docs/results/versus_stock"),
        metavar="FOLDER",
        help="where versus_stock.json and versus_stock.md go (%(default)s)",
    )
    options = parser.parse_args(arguments)
    longest = ToMePerceiverConfig().max_position_embeddings
    for name, least, most in (
        ("batch_size", 1, None),
        ("length", 1, longest),
        ("rounds", 2, None),  # quartiles need two
        ("warmup", 0, None),
        ("threads", 1, None),
    ):
        value = getattr(options, name)
        if value is not None and (value < least or (most is not None and value > most)):
            upper = "" if most is None else f" to {most}"
            parser.error(f"--{name} {value}: allowed is an integer from {least}{upper}")
    for r in options.r:
        try:
            ToMePerceiverConfig(r=r)
        except ValueError as error:
            parser.error(f"--r: {error}")
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {options.device}: {str(error).splitlines()[0]}")
    return options


def build_models(
    seed: int, dtype: torch.dtype, device: str
) -> tuple[PerceiverForSequenceClassification, ToMePerceiverForSequenceClassification]:
    """The stock model with random weights, and ours on the same tensors."""
    torch.manual_seed(seed)
    config = ToMePerceiverConfig(**PUBLISHED_LANGUAGE_SHAPES)
    # Stock knows no other attention, and a config is written to by the model that it builds.
    stock_config = transformers.PerceiverConfig(**PUBLISHED_LANGUAGE_SHAPES)
    stock = PerceiverForSequenceClassification(stock_config).eval().requires_grad_(False).to(device, dtype)
    with torch.device("meta"):
        ours = ToMePerceiverForSequenceClassification(config).eval().requires_grad_(False)
    ours.load_state_dict(stock.state_dict(), assign=True)
    return stock, ours


def check_logits(
    stock: PerceiverForSequenceClassification,
    ours: ToMePerceiverForSequenceClassification,
    inputs: torch.Tensor,
    tolerance: float,
) -> float:
    """The largest difference of logits at r = 0.

    Raises:
        AssertionError: if it is more than rounding, so that the two would not be doing the same work.
    """
    ours.r = 0
    difference = (stock(inputs).logits - ours(inputs).logits).abs().max().item()
    assert difference <= tolerance, f"logits at r = 0 differ from stock's by {difference}, more than {tolerance}"
    return difference


def time_in_turns(
    variants: dict[str, Callable[[], object]], rounds: int, warmup: int, synchronise: Callable[[], object]
) -> dict[str, list[float]]:
    """Seconds of each variant in each round, R for each of the V.

    Args:
        variants: what to time, by name.
        rounds: R.
        warmup: rounds that run first and do not count.
        synchronise: waits until the device has done what it was given.
    """
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with tqdm(total=(warmup + rounds) * len(names), desc="forward passes", unit="pass") as progress:
        for index in range(warmup + rounds):
            first = index % len(names)
            for name in names[first:] + names[:first]:
                synchronise()
                start = time.perf_counter()
                variants[name]()
                synchronise()
                elapsed = time.perf_counter() - start
                if index >= warmup:
                    seconds[name].append(elapsed)
                progress.update()
    return seconds


def summarise(
    name: str, r: int | None, seconds: list[float], stock_seconds: list[float], input_shape: tuple[int, int]
) -> Variant:
    """One variant's rounds as the figures that are reported."""
    config = ToMePerceiverConfig(r=r or 0, **PUBLISHED_LANGUAGE_SHAPES)
    architecture = ToMePerceiverForSequenceClassification.__name__
    flops = forward_cost(config, input_shape, architecture).total_with_matching
    unmerged = ToMePerceiverConfig(**PUBLISHED_LANGUAGE_SHAPES)
    stock_flops = forward_cost(unmerged, input_shape, architecture).total_with_matching
    ratios = [stock / own for stock, own in zip(stock_seconds, seconds, strict=True)]
    lower, speedup, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return Variant(
        name=name,
        r=r,
        latents_left=config.latents_per_layer[-1],
        gflops=flops / 1e9,
        milliseconds=1e3 * statistics.median(seconds),
        speedup=speedup,
        speedup_quartiles=(lower, upper),
        speedup_by_flops=stock_flops / flops,
        share_of_flops_speedup=speedup / (stock_flops / flops),
    )


def describe_environment(options: argparse.Namespace) -> dict[str, str | int]:
    """What the figures depend on besides the code."""
    environment: dict[str, str | int] = {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if torch.device(options.device).type == "cuda":
        environment["gpu"] = torch.cuda.get_device_name(options.device)
    return environment


def cpu_name() -> str:
    """The processor's name, for which Linux has a file and other systems have Python's answer."""
    processors = Path("/proc/cpuinfo")
    lines = processors.read_text().splitlines() if processors.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def as_markdown(variants: list[Variant], settings: dict[str, object], environment: dict[str, str | int]) -> str:
    """The table and what it was measured with."""
    lines = [
        "| | latents left | GFLOPs | median ms | times stock | quartiles | FLOPs imply | share |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for variant in variants:
        lower, upper = variant.speedup_quartiles
        lines.append(
            f"| {variant.name} | {variant.latents_left} | {variant.gflops:.1f} | {variant.milliseconds:.1f} "
            f"| {variant.speedup:.2f} | {lower:.2f} to {upper:.2f} | {variant.speedup_by_flops:.2f} "
            f"| {variant.share_of_flops_speedup:.0%} |"
        )
    lines += ["", *(f"- {name}: {value}" for name, value in {**settings, **environment}.items())]
    return "\n".join(lines) + "\n"


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    stock, ours = build_models(options.seed, DTYPES[options.dtype], options.device)
    input_shape = (options.batch_size, options.length)
    inputs = torch.randint(stock.config.vocab_size, input_shape, device=options.device)
    difference = check_logits(stock, ours, inputs, LOGITS_TOLERANCE[options.dtype])

    def run_ours(r: int) -> None:
        ours.r = r
        ours(inputs)

    settings_of_r = {f"r = {r}": r for r in dict.fromkeys(options.r)}
    passes: dict[str, Callable[[], object]] = {STOCK: lambda: stock(inputs)}
    passes |= {name: partial(run_ours, r) for name, r in settings_of_r.items()}
    on_gpu = torch.device(options.device).type == "cuda"
    seconds = time_in_turns(
        passes, options.rounds, options.warmup, lambda: torch.cuda.synchronize(options.device) if on_gpu else None
    )

    variants = [summarise(name, settings_of_r.get(name), seconds[name], seconds[STOCK], input_shape) for name in passes]
    settings: dict[str, object] = {
        "shapes": "deepmind/language-perceiver, random weights",
        "batch size": options.batch_size,
        "bytes": options.length,
        "dtype": options.dtype,
        "rounds": f"{options.rounds} after {options.warmup} of warm-up",
        "attention": f"stock {stock.config._attn_implementation}, ours {ours.config._attn_implementation}",
        "largest difference of logits at r = 0": f"{difference:.1e}",
    }
    environment = describe_environment(options)
    table = as_markdown(variants, settings, environment)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    report = {
        "settings": settings,
        "environment": environment,
        "variants": [asdict(variant) for variant in variants],
        "seconds_by_round": seconds,
    }
    (options.output_dir / "versus_stock.json").write_text(json.dumps(report, indent=2) + "\n")
    (options.output_dir / "versus_stock.md").write_text(table)
    print(table, end="")
    print(f"written to {options.output_dir / 'versus_stock.json'} and {options.output_dir / 'versus_stock.md'}")


if __name__ == "__main__":
    main()
