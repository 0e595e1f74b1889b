# SPDX-License-Identifier: Apache-2.0
"""Load examples/serve.py with 1 to 64 clients: unmerged, at a budget, and falling back along the frontier.

The server runs in a process of its own, on 127.0.0.1, with an unmerged copy of a checkpoint that has a frontier; it is
calibrated first if it has none. Each client sends a request, waits for the answer, and sends the next one. In each
round every number of clients asks for a few seconds without merging, for the same time within a budget, and for the
same time with permission to fall back under load, each in another order. A refused client (status 503) waits as long as
the answer says. Requests are inputs of a dataset, in turns; the answers of the unmerged model to each are asked first,
with one client.

    python benchmarks/serving.py --small                                       # a minute, random weights
    python benchmarks/serving.py --model_name_or_path outputs/demo/finetuned --dataset_name outputs/demo/digits
    python benchmarks/serving.py --model_name_or_path you/perceiver-mrpc --dataset_name nyu-mll/glue \\
        --dataset_config_name mrpc --flops_ratio 0.5 --output_dir out

OUTPUT_DIR gets serving.json and serving.md.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import aiohttp
import numpy as np
import torch
from datasets import Image, Value
from tqdm import tqdm
from transformers import PerceiverTokenizer

# Python adds this script's folder to sys.path, but not the repository root, which holds the modules.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.speed_rows import write_results
from configuration_tome_perceiver import ToMePerceiverConfig
from examples.classifier import Classifier
from experiments.command_line import parse_arguments
from experiments.errors import BadInput, Stopped, exit_on_bad_input, naming
from experiments.files import check_writable
from experiments.publishing.tables import markdown_table
from experiments.tasks.base import Splits, spread_evenly
from experiments.tasks.reading import read_dataset
from modeling_tome_perceiver import ToMePerceiverForSequenceClassification

UNMERGED, FALL_BACK = "unmerged", "fall back"
PERCENTILES = (50, 99)
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SMALL_MODEL = EXAMPLES / "small_text_perceiver.json"
# Lengths of the random texts for the small model, in bytes.
SMALL_LENGTHS = (20, 100)
CALIBRATION_BATCH = 16
# Longest time to wait for the server to start or end, in seconds.
START_SECONDS, END_SECONDS = 120, 60


@dataclass
class ServingArguments:
    """Arguments of this benchmark."""

    _argument_group_name: ClassVar[str] = "benchmark"

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a classifier; by default a small one with random weights."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset for requests and calibration: a Hub id or a local folder."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    small: bool = field(default=False, metadata={"help": "1 and 8 clients, 2 rounds of 2 seconds."})
    flops_ratio: float = field(default=0.5, metadata={"help": "Budget, as a share of the unmerged FLOPs."})
    clients: list[int] | None = field(
        default=None, metadata={"help": "Numbers of clients, one or more (default: 1 4 16 64)."}
    )
    rounds: int | None = field(default=None, metadata={"help": "Number of rounds (default: 3)."})
    seconds: float | None = field(
        default=None, metadata={"help": "Seconds of each number of clients in each round (default: 8)."}
    )
    max_batch_size: int = field(default=16, metadata={"help": "Argument of the server."})
    fall_back_inputs: int = field(default=8, metadata={"help": "Argument of the server."})
    max_requests: int = field(default=48, metadata={"help": "Argument of the server."})
    calibration_samples: int = field(default=512, metadata={"help": "Samples to calibrate on, without a frontier."})
    distinct_requests: int = field(default=256, metadata={"help": "Number of different inputs that clients send."})
    output_dir: str = field(default="outputs/serving", metadata={"help": "Output folder."})

    def __post_init__(self) -> None:
        self.clients = self.clients or ([1, 8] if self.small else [1, 4, 16, 64])
        self.rounds = (2 if self.small else 3) if self.rounds is None else self.rounds
        self.seconds = (2.0 if self.small else 8.0) if self.seconds is None else self.seconds
        if (self.model_name_or_path is None) != (self.dataset_name is None):
            raise BadInput("--model_name_or_path, --dataset_name: give both or neither")
        positive = ("rounds", "seconds", "max_batch_size", "max_requests", "calibration_samples", "distinct_requests")
        for name, value in [
            *((name, getattr(self, name)) for name in positive),
            *(("clients", n) for n in self.clients),
        ]:
            if value <= 0:
                raise BadInput(f"--{name} {value}: must be above 0")
        if not 0 < self.flops_ratio <= 1:
            raise BadInput(f"--flops_ratio {self.flops_ratio}: must be above 0 and at most 1")

    def described(self) -> dict[str, Any]:
        """Return the settings that the report lists beside the figures."""
        return {
            "checkpoint": Path(self.model_name_or_path or "small text classifier, random weights").name,
            "each cell": f"{self.rounds} rounds of {self.seconds:g} s",
            "server": f"--max_batch_size {self.max_batch_size} --fall_back_inputs {self.fall_back_inputs} "
            f"--max_requests {self.max_requests}",
        }

    def variants(self) -> dict[str, dict[str, Any]]:
        """Return the fields of the requests of each variant."""
        return {
            UNMERGED: {"may_fall_back": False},
            f"flops_ratio {self.flops_ratio:g}": {"flops_ratio": self.flops_ratio, "may_fall_back": False},
            FALL_BACK: {"may_fall_back": True},
        }


@dataclass
class Tally:
    """Requests of one variant with one number of clients in one round.

    Attributes:
        seconds: time from request to answer of each answered request.
        refused: number of answers with status 503.
        degraded: number of answers that fell back.
        equal: number of answers with the label of the unmerged model.
        failed: number of requests that were accepted and got no answer, or an error.
        flops_ratio: sum of the shares of the FLOPs of all answers.
        elapsed: seconds from the first request to the last answer.
    """

    seconds: list[float] = field(default_factory=list)
    refused: int = 0
    degraded: int = 0
    equal: int = 0
    failed: int = 0
    flops_ratio: float = 0.0
    elapsed: float = 0.0

    def per_second(self) -> float:
        return len(self.seconds) / self.elapsed


@dataclass(frozen=True)
class Row:
    """Figures of one variant with one number of clients, over all rounds; shares are of the answered requests."""

    clients: int
    variant: str
    milliseconds: list[float]  # 50th and 99th percentile
    requests_per_second: float
    times_unmerged: float  # requests per second over those of unmerged in the same round, median
    refused: float  # share of all requests
    degraded: float
    equal: float
    flops_ratio: float
    failed: int


def read_inputs(arguments: ServingArguments, classifier: Classifier) -> list[Any]:
    """Return inputs of the dataset's test split, or else its validation split: texts, pairs of texts or image files."""
    argument = f"--dataset_name {arguments.dataset_name}"
    read = read_dataset(argument, arguments.dataset_name, arguments.dataset_config_name, overwrite_cache=False)
    split = Splits(argument, read).take("test" if "test" in read else "validation")
    split = split.select(spread_evenly(len(split), arguments.calibration_samples + arguments.distinct_requests))
    if classifier.takes_images:
        column = next((name for name, feature in split.features.items() if isinstance(feature, Image)), None)
        if column is None:
            raise BadInput(f"{argument}: has no column of images")
        stored = split.cast_column(column, Image(decode=False))[column]
        return [each["bytes"] or Path(each["path"]).read_bytes() for each in stored]
    columns = [name for name, feature in split.features.items() if feature == Value("string")]
    if not 1 <= len(columns) <= 2:
        raise BadInput(f"{argument}: has {len(columns)} columns of text; must have one or two")
    rows = zip(*(split[name] for name in columns), strict=True)
    return [row[0] if len(row) == 1 else row for row in rows]


def random_texts(number: int) -> list[str]:
    generator = np.random.default_rng(0)
    lengths = generator.integers(*SMALL_LENGTHS, size=number)
    return ["".join(generator.choice(list("abcdefgh "), length)) + "." for length in lengths]


def write_small_model(folder: Path) -> None:
    """Write a small text classifier with random weights."""
    torch.manual_seed(0)
    fields = json.loads(SMALL_MODEL.read_text())
    ToMePerceiverForSequenceClassification(ToMePerceiverConfig(**fields)).save_pretrained(folder)
    PerceiverTokenizer(model_max_length=fields["max_position_embeddings"]).save_pretrained(folder)


def prepare(arguments: ServingArguments, folder: Path) -> list[Any]:
    """Write the unmerged checkpoint with its frontier into a folder, and return the inputs of the requests."""
    if arguments.model_name_or_path is None:
        write_small_model(folder)
    classifier = Classifier(arguments.model_name_or_path or str(folder))
    model, number = classifier.model, arguments.calibration_samples
    if arguments.dataset_name is None:
        inputs = random_texts(number + arguments.distinct_requests)
    else:
        inputs = read_inputs(arguments, classifier)
    read = classifier.read_image if classifier.takes_images else classifier.read_text
    with naming(f"--dataset_name {arguments.dataset_name}", ValueError):
        if model.config.merge_frontier is None:
            samples = [read(each) for each in inputs[: len(inputs) * number // (number + arguments.distinct_requests)]]
            batches = [samples[at : at + CALIBRATION_BATCH] for at in range(0, len(samples), CALIBRATION_BATCH)]
            model.calibrate([classifier.collate(batch) for batch in batches], flops_ratios=[arguments.flops_ratio])
    model.unmerged.apply(model.config)
    model.save_pretrained(folder)
    classifier.processor.save_pretrained(folder)
    return inputs[-arguments.distinct_requests :]


@contextmanager
def running_server(arguments: ServingArguments, checkpoint: Path) -> Iterator[str]:
    """Start the server on a free port, yield its address, and end it with SIGTERM.

    Raises:
        Stopped: if it does not start.
    """
    options = {name: getattr(arguments, name) for name in ("max_batch_size", "fall_back_inputs", "max_requests")}
    command = [sys.executable, str(EXAMPLES / "serve.py"), "--model_name_or_path", str(checkpoint), "--port=0"]
    command += [f"--{name}={value}" for name, value in options.items()]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        assert server.stdout is not None
        for line in server.stdout:
            if line.startswith("listening on "):
                yield line.split()[-1]
                break
        else:
            raise Stopped("examples/serve.py did not start; its error is above")
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()


async def run_client(
    session: aiohttp.ClientSession,
    requests: Iterator[tuple[int, bytes]],
    labels: list[str],
    until: float,
    tally: Tally,
) -> None:
    """Send requests one after another until a time."""
    while (start := time.perf_counter()) < until:
        index, body = next(requests)
        try:
            async with session.post("/predict", data=body) as response:
                answer = await response.json()
        except (aiohttp.ClientError, TimeoutError):
            tally.failed += 1
            continue
        if response.status == 503:
            tally.refused += 1
            await asyncio.sleep(min(float(response.headers["Retry-After"]), max(0.0, until - time.perf_counter())))
        elif response.status != 200:
            tally.failed += 1
        else:
            tally.seconds.append(time.perf_counter() - start)
            tally.degraded += answer["degraded"]
            tally.flops_ratio += answer["predictions"][0]["flops_ratio"]
            tally.equal += answer["predictions"][0]["label"] == labels[index]


async def load_server(
    arguments: ServingArguments, address: str, inputs: list[Any]
) -> dict[tuple[int, str], list[Tally]]:
    """Run all rounds and return the tallies of each number of clients and variant, by round."""
    shown = [base64.b64encode(each).decode() if isinstance(each, bytes) else each for each in inputs]
    variants = arguments.variants()
    bodies = {
        name: [json.dumps({"inputs": [each], **fields}).encode() for each in shown] for name, fields in variants.items()
    }
    tallies: dict[tuple[int, str], list[Tally]] = {(n, name): [] for n in arguments.clients for name in variants}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(address, connector=connector) as session:
        labels = []
        for body in tqdm(bodies[UNMERGED], desc="unmerged answers", disable=None):
            async with session.post("/predict", data=body) as response:
                response.raise_for_status()
                labels.append((await response.json())["predictions"][0]["label"])
        for number in tqdm(range(arguments.rounds), desc="rounds", disable=None):
            cells = list(tallies)
            for cell in cells[number % len(cells) :] + cells[: number % len(cells)]:
                clients, name = cell
                requests = ((index % len(inputs), bodies[name][index % len(inputs)]) for index in count())
                tallies[cell].append(tally := Tally())
                start = time.perf_counter()
                until = start + arguments.seconds
                await asyncio.gather(*(run_client(session, requests, labels, until, tally) for _ in range(clients)))
                tally.elapsed = time.perf_counter() - start
    return tallies


def summarize(tallies: dict[tuple[int, str], list[Tally]]) -> list[Row]:
    """Return the figures of each number of clients and variant."""
    rows = []
    for (clients, name), rounds in tallies.items():
        taken = np.array([each for tally in rounds for each in tally.seconds])
        refused, answered = sum(tally.refused for tally in rounds), max(1, len(taken))
        ratios = [
            own.per_second() / max(1e-9, unmerged.per_second())
            for own, unmerged in zip(rounds, tallies[clients, UNMERGED], strict=True)
        ]
        rows.append(
            Row(
                clients,
                name,
                list(1e3 * np.percentile(taken, PERCENTILES)) if len(taken) else [0.0, 0.0],
                len(taken) / sum(tally.elapsed for tally in rounds),
                float(np.median(ratios)),
                refused / max(1, refused + len(taken)),
                sum(tally.degraded for tally in rounds) / answered,
                sum(tally.equal for tally in rounds) / answered,
                sum(tally.flops_ratio for tally in rounds) / answered,
                sum(tally.failed for tally in rounds),
            )
        )
    return rows


def as_markdown(rows: list[Row]) -> str:
    header = ["clients", "requests", "p50, ms", "p99, ms", "requests/s", "times unmerged", "FLOPs used"]
    header += ["refused", "degraded", "equal answers", "failed"]
    cells = [
        (
            row.clients,
            row.variant,
            *(f"{each:.1f}" for each in row.milliseconds),
            f"{row.requests_per_second:.1f}",
            f"{row.times_unmerged:.2f}",
            f"{row.flops_ratio:.2f}",
            *(f"{share:.1%}" for share in (row.refused, row.degraded, row.equal)),
            row.failed,
        )
        for row in rows
    ]
    return markdown_table(header, cells, "rlr") + "\n"


def main() -> None:
    (arguments,) = parse_arguments(__doc__ or "", ServingArguments)
    check_writable(f"--output_dir {arguments.output_dir}", Path(arguments.output_dir))
    with tempfile.TemporaryDirectory(prefix="serving-") as folder:
        inputs = prepare(arguments, Path(folder))
        with running_server(arguments, Path(folder)) as address:
            tallies = asyncio.run(load_server(arguments, address, inputs))
    rows = summarize(tallies)
    figures = {"percentiles": PERCENTILES, "rows": [asdict(row) for row in rows]}
    print(write_results(arguments, "serving", figures, [as_markdown(rows)]))


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
