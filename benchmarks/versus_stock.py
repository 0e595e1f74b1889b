# SPDX-License-Identifier: Apache-2.0
"""How fast a Perceiver that merges its latents is against the stock one of transformers, in one process.

Random weights of the published language shapes (`deepmind/language-perceiver`), the same in both models; speed does
not depend on what weights say. The variants take turns: in each round every variant runs once, the next round starts
with the next variant, and what is reported is the median over rounds of the ratio of times within a round. So neither
a machine that slows down nor a place in the order favours a variant.

    python benchmarks/versus_stock.py
    python benchmarks/versus_stock.py --r 0 4 --batch_size 1 --length 512 --rounds 5 --output_dir out
    python benchmarks/versus_stock.py --device cuda --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

# A script's own folder is on the path, the repository's root, where the modules are, is not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.cost import forward_cost
from experiments.measurement import Timing, describe_environment, time_interleaved
from experiments.published_models import DTYPES, PUBLISHED_LANGUAGE_SHAPES, PublishedModel, check_outputs
from modeling_tome_perceiver import ToMePerceiverForSequenceClassification

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
        epilog="examples:\n    python" + epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--r", type=int, nargs="+", default=[0, 2, 8, 16], help="latents merged in each of the 26 layers (%(default)s)"
    )
    parser.add_argument("--batch_size", type=int, default=8, help="texts in a forward pass (%(default)s)")
    parser.add_argument("--length", type=int, default=128, help="bytes in a text, at most 2048 (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and activations (%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (%(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="each runs every variant once (%(default)s)")
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
        ("rounds", 1, None),
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


def summarise(name: str, r: int | None, timing: Timing, input_shape: tuple[int, int]) -> Variant:
    """One variant's rounds as the figures that are reported."""

    def flops(config: ToMePerceiverConfig) -> int:
        return forward_cost(config, input_shape, ToMePerceiverForSequenceClassification.__name__).total_with_matching

    config = ToMePerceiverConfig(r=r or 0, **PUBLISHED_LANGUAGE_SHAPES)
    implied = flops(ToMePerceiverConfig(**PUBLISHED_LANGUAGE_SHAPES)) / flops(config)
    return Variant(
        name=name,
        r=r,
        latents_left=config.latents_per_layer[-1],
        gflops=flops(config) / 1e9,
        milliseconds=timing.latency_ms.median,
        speedup=timing.speedup.median,
        speedup_quartiles=(timing.speedup.lower, timing.speedup.upper),
        speedup_by_flops=implied,
        share_of_flops_speedup=timing.speedup.median / implied,
    )


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
    published = PublishedModel(
        "deepmind/language-perceiver", "PerceiverForSequenceClassification", PUBLISHED_LANGUAGE_SHAPES
    )
    dtype, input_shape = DTYPES[options.dtype], (options.batch_size, options.length)
    stock = published.build_stock(options.seed, dtype, options.device)
    ours = published.build_merging(stock)
    inputs = published.draw_inputs(input_shape, dtype, options.device)
    difference = check_outputs(stock, ours, inputs)

    def run(r: int | None) -> None:
        if r is None:
            stock(inputs)
        else:
            ours.r = r
            ours(inputs)

    # Stock is also a variant of its own: how far its ratio to itself is from 1 shows the noise.
    variant_r = [None, *dict.fromkeys(options.r)]
    timings = time_interleaved(run, variant_r, baseline=None, rounds=options.rounds, desc="rounds")
    variants = [
        summarise(STOCK if r is None else f"r = {r}", r, timing, input_shape)
        for r, timing in zip(variant_r, timings, strict=True)
    ]
    settings: dict[str, object] = {
        "shapes": f"{published.hub_id}, random weights",
        "batch size": options.batch_size,
        "bytes": options.length,
        "dtype": options.dtype,
        "rounds": f"{options.rounds} after one of warm-up",
        "attention": f"stock {stock.config._attn_implementation}, ours {ours.config._attn_implementation}",
        "largest difference of outputs at r = 0, of the largest": f"{difference:.1e}",
    }
    environment = describe_environment()
    table = as_markdown(variants, settings, environment)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    report = {
        "settings": settings,
        "environment": environment,
        "variants": [asdict(variant) for variant in variants],
    }
    (options.output_dir / "versus_stock.json").write_text(json.dumps(report, indent=2) + "\n")
    (options.output_dir / "versus_stock.md").write_text(table)
    print(table, end="")
    print(f"written to {options.output_dir / 'versus_stock.json'} and {options.output_dir / 'versus_stock.md'}")


if __name__ == "__main__":
    main()
