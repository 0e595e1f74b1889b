# SPDX-License-Identifier: Apache-2.0
"""When do fixed groups hold? How much the similarities of latents change from input to input, layer by layer.

Fixed groups (calibrate.py) are as good as the mean similarity of a few samples speaks for every input. On a checkpoint
of one's own, whatever calibrate.py takes, this measures in each layer of the unmerged model:

- one input: rank correlation of its similarities with their mean over other inputs, and agreement (adjusted Rand index:
  1 the same, 0 as by chance) of the groups it would choose for itself with those of the mean;
- how many samples a mean takes: rank correlation of the means of two disjoint sets of so many samples, and agreement of
  the groups from one with those from the other;
- spread: how far pairs of latents lie apart in their mean similarity, and how far one pair moves from input to input.

    python benchmarks/similarity_stability.py --model_name_or_path outputs/fashion_mnist \\
        --dataset_name zalando-datasets/fashion_mnist --use_cpu --output_dir outputs/stability
    python benchmarks/similarity_stability.py --model_name_or_path outputs/sst2/finetuned --task_name sst2 \\
        --similarity key hidden --sample_counts 8 64 --num_groups 16 --output_dir outputs/stability

OUTPUT_DIR gets similarity_stability.json and similarity_stability.png.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar

import matplotlib
import numpy as np
import torch
from scipy.spatial.distance import squareform
from scipy.stats import spearmanr
from sklearn.metrics import adjusted_rand_score
from tqdm import tqdm

matplotlib.use("Agg")  # there may be no screen
from matplotlib import pyplot as plt

# A script's own folder is on the path, the repository's root, where the modules are, is not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from functools import partial

from budget_tome_perceiver import Merging
from experiments.command_line import parse_arguments
from experiments.errors import BadInput, exit_on_bad_input
from experiments.files import write_whole
from experiments.measurement import Quartiles, describe_environment
from experiments.merging.similarity import SIMILARITIES
from experiments.publishing.tables import markdown_table
from experiments.runs.checkpoint_task import SweepDataArguments, load_sweep_task
from experiments.runs.start import load
from experiments.tasks.base import Batch
from experiments.training.identity import noted_arguments
from experiments.training.model_arguments import ModelArguments
from experiments.training.output_folder import write_json
from experiments.training.trainer_arguments import TrainerArguments
from groups_tome_perceiver import average_linkage
from modeling_tome_perceiver import ToMePerceiverPreTrainedModel

RESULTS_FILE, PICTURE_FILE = "similarity_stability.json", "similarity_stability.png"
DEFAULT_SHARES = (2, 4, 8)


@dataclass
class StabilityArguments:
    """What is compared, and on how many samples."""

    _argument_group_name: ClassVar[str] = "stability"

    similarity: list[str] = field(
        default_factory=lambda: ["key", "hidden"],
        metadata={"help": f"What of the latents is compared: some of {', '.join(sorted(SIMILARITIES))}."},
    )
    sample_counts: list[int] = field(
        default_factory=lambda: [4, 16, 64, 256, 1024],
        metadata={"help": "Training samples behind a mean; twice the largest are looked at, without labels."},
    )
    num_groups: list[int] | None = field(
        default=None, metadata={"help": "Numbers of groups; by default a half, a quarter and an eighth of the latents."}
    )
    num_inputs: int = field(
        default=128, metadata={"help": "Single inputs that are compared with the mean over other ones."}
    )

    def __post_init__(self) -> None:
        for name in self.similarity:
            if name not in SIMILARITIES:
                raise BadInput(f"--similarity {name}: allowed are {', '.join(sorted(SIMILARITIES))}")
        self.sample_counts = sorted(set(self.sample_counts))
        if not self.sample_counts or self.sample_counts[0] < 1:
            raise BadInput(f"--sample_counts {_spelled(self.sample_counts)}: allowed are integers of 1 or more")
        if not 1 <= self.num_inputs <= self.sample_counts[-1]:
            raise BadInput(
                f"--num_inputs {self.num_inputs}: allowed are 1 to {self.sample_counts[-1]}, the largest of "
                "--sample_counts"
            )

    def check_samples(self, available: int) -> None:
        """Check that there are two disjoint sets of samples.

        Raises:
            BadInput: if there are not.
        """
        if 2 * self.sample_counts[-1] > available:
            raise BadInput(
                f"--sample_counts {_spelled(self.sample_counts)}: allowed are at most {available // 2}, half of the "
                f"{available} training samples"
            )

    def groups(self, latents: int) -> list[int]:
        """The numbers of groups.

        Raises:
            BadInput: for one that the latents cannot be put into.
        """
        default = [max(1, latents // share) for share in DEFAULT_SHARES]
        wanted = default if self.num_groups is None else self.num_groups
        if not wanted or not all(1 <= number < latents for number in wanted):
            raise BadInput(f"--num_groups {_spelled(wanted)}: allowed are 1 to {latents - 1}, one or more")
        return sorted(set(wanted), reverse=True)


def _spelled(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))


@dataclass(frozen=True)
class Summary:
    """Mean and quartiles over single inputs."""

    mean: float
    lower: float
    median: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        quartiles = Quartiles.of(np.array(values))
        return cls(float(np.mean(values)), quartiles.lower, quartiles.median, quartiles.upper)


@dataclass(frozen=True)
class Agreement:
    """How far two means of `samples` disjoint samples agree.

    Attributes:
        samples: behind each mean.
        rank_correlation: Spearman's, over the pairs of latents.
        adjusted_rand: of the groups that come of them, by number of groups.
    """

    samples: int
    rank_correlation: float
    adjusted_rand: dict[int, float]


@dataclass(frozen=True, kw_only=True)
class LayerStability:
    """One similarity in one layer.

    Attributes:
        similarity: a key of `SIMILARITIES`.
        layer: counted from 0 as they run.
        rank_correlation: Spearman's, of one input's similarities with their mean over other inputs.
        adjusted_rand: of one input's own groups with those of the mean, by number of groups.
        means: by how many samples are behind them.
        mean_similarity: over pairs and inputs.
        spread_of_pairs: standard deviation of the mean similarity over pairs.
        spread_of_inputs: standard deviation of a pair's similarity over inputs, the root mean square over pairs.
    """

    similarity: str
    layer: int
    rank_correlation: Summary
    adjusted_rand: dict[int, Summary]
    means: list[Agreement]
    mean_similarity: float
    spread_of_pairs: float
    spread_of_inputs: float


def sample_similarities(
    model: ToMePerceiverPreTrainedModel, batches: Iterable[Batch], similarity: str
) -> Iterator[np.ndarray]:
    """For each sample how alike each two latents are in each layer, (L, N (N - 1) / 2).

    Args:
        model: in evaluation mode, merging nothing.
        batches: what it takes.
        similarity: a key of `SIMILARITIES`.
    """
    layers = range(model.config.num_self_attention_layers)
    first, second = np.triu_indices(model.config.num_latents, k=1)
    for batch in batches:
        on_device = {name: value.to(model.device) for name, value in batch.items()}
        every = [each[:, first, second].cpu().numpy() for each in SIMILARITIES[similarity](model, on_device, layers)]
        yield from np.stack(every, axis=1)


def running_means(samples: Iterable[np.ndarray], counts: Sequence[int]) -> dict[int, np.ndarray]:
    """The mean of the first so many samples, for each of some counts."""
    means, total = {}, np.zeros(())
    for seen, sample in enumerate(samples, start=1):
        total = total + sample
        if seen in counts:
            means[seen] = total / seen
    return means


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's, over pairs of latents."""
    return float(spearmanr(one, other).statistic)


def grouped(similarity: np.ndarray, num_groups: int) -> list[int]:
    """The group of each latent, from a similarity for each pair."""
    return average_linkage(torch.from_numpy(squareform(similarity)), num_groups)


def measure(
    samples: Iterator[np.ndarray], similarity: str, counts: Sequence[int], num_groups: Sequence[int], num_inputs: int
) -> list[LayerStability]:
    """All layers of one similarity.

    Args:
        samples: twice as many as the largest of `counts`, as `sample_similarities` gives them.
        similarity: their name.
        counts: of samples behind a mean, rising.
        num_groups: to be found.
        num_inputs: single inputs; they are of the second set, and the mean that they are compared with of the first.
    """
    first = running_means(islice(samples, counts[-1]), counts)
    inputs = list(islice(samples, num_inputs))
    second = running_means(chain(inputs, samples), counts)
    rows = []
    for layer, mean in enumerate(first[counts[-1]]):
        own = [sample[layer] for sample in inputs]
        groups = {number: grouped(mean, number) for number in num_groups}
        rows.append(
            LayerStability(
                similarity=similarity,
                layer=layer,
                rank_correlation=Summary.of([rank_correlation(each, mean) for each in own]),
                adjusted_rand={
                    number: Summary.of([adjusted_rand_score(groups[number], grouped(each, number)) for each in own])
                    for number in num_groups
                },
                means=[
                    Agreement(
                        count,
                        rank_correlation(first[count][layer], second[count][layer]),
                        {
                            number: adjusted_rand_score(
                                *(grouped(means[count][layer], number) for means in (first, second))
                            )
                            for number in num_groups
                        },
                    )
                    for count in counts
                ],
                mean_similarity=float(mean.mean()),
                spread_of_pairs=float(mean.std()),
                spread_of_inputs=float(np.sqrt(np.mean((np.stack(own) - mean) ** 2))),
            )
        )
    return rows


def as_markdown(rows: list[LayerStability], num_groups: int) -> str:
    """A line for each similarity and layer, with agreements for one number of groups."""
    counts = [mean.samples for mean in rows[0].means]
    columns = ["", "layer", "one input: rank correlation (quartiles)", "its groups", "mean similarity"]
    columns += ["spread of pairs", "of inputs", *(f"{count} samples" for count in counts)]

    def cells(row: LayerStability) -> list[object]:
        one = row.rank_correlation
        return [
            row.similarity,
            row.layer,
            f"{one.mean:.2f} ({one.lower:.2f} to {one.upper:.2f})",
            f"{row.adjusted_rand[num_groups].mean:.2f}",
            f"{row.mean_similarity:.2f}",
            f"{row.spread_of_pairs:.2f}",
            f"{row.spread_of_inputs:.2f}",
            *(f"{mean.adjusted_rand[num_groups]:.2f}" for mean in row.means),
        ]

    return markdown_table(columns, map(cells, rows)) + "\n"


def draw(rows: list[LayerStability], num_groups: int, title: str, path: Path) -> None:
    """Draw a row of four panels for each similarity."""
    names = list(dict.fromkeys(row.similarity for row in rows))
    figure, panels = plt.subplots(
        len(names), 4, figsize=(17, 3.6 * len(names)), squeeze=False, constrained_layout=True, sharex="col"
    )
    for name, (one_input, spread, agreement, correlation) in zip(names, panels, strict=True):
        of_name = [row for row in rows if row.similarity == name]
        layers = [row.layer for row in of_name]
        for label, color, summaries in (
            ("rank correlation", "tab:blue", [row.rank_correlation for row in of_name]),
            (f"groups, {num_groups}", "tab:orange", [row.adjusted_rand[num_groups] for row in of_name]),
        ):
            one_input.plot(layers, [each.mean for each in summaries], "o-", color=color, label=label)
            quartiles = [each.lower for each in summaries], [each.upper for each in summaries]
            one_input.fill_between(layers, *quartiles, color=color, alpha=0.2)
        one_input.set(ylabel=name, title="one input against the mean", xlabel="layer", ylim=(None, 1.02))
        spread.plot(layers, [row.spread_of_pairs for row in of_name], "o-", label="of pairs")
        spread.plot(layers, [row.spread_of_inputs for row in of_name], "s--", label="of one pair over inputs")
        spread.set(title="spread of similarity", xlabel="layer", ylim=(0, None))
        for row in of_name:
            counts = [mean.samples for mean in row.means]
            style: dict[str, Any] = dict(
                marker="o", color=plt.cm.viridis(row.layer / max(len(layers), 1)), label=f"layer {row.layer}"
            )
            agreement.plot(counts, [mean.adjusted_rand[num_groups] for mean in row.means], **style)
            correlation.plot(counts, [mean.rank_correlation for mean in row.means], **style)
        agreement.set(title=f"{num_groups} groups of two means: adjusted Rand index", ylim=(None, 1.02))
        correlation.set(title="two means: rank correlation", ylim=(None, 1.02))
        for axes in (agreement, correlation):
            axes.set(xscale="log", xlabel="samples behind each mean")
            axes.set_xticks(counts, counts)
            axes.minorticks_off()
        for axes in (one_input, spread):
            axes.legend(fontsize=8)
        if len(layers) <= 12:
            agreement.legend(fontsize=7, ncols=2)
        for axes in (one_input, spread, agreement, correlation):
            axes.grid(alpha=0.3)
    figure.suptitle(title)
    write_whole(path, lambda partial: figure.savefig(partial, dpi=90, format="png"))
    plt.close(figure)


@torch.inference_mode()
def main() -> None:
    model_args, data, stability, training = parse_arguments(
        __doc__, ModelArguments, SweepDataArguments, StabilityArguments, TrainerArguments
    )
    # The task draws so many training samples, and tokenizes no others.
    data.max_train_samples = min(2 * stability.sample_counts[-1], data.max_train_samples or sys.maxsize)
    loaded = load(partial(load_sweep_task, data, model_args, training.seed), model_args, training)
    task, prepared, model = loaded.task, loaded.prepared, loaded.model
    stability.check_samples(len(task.train))
    Merging.none(model.config).apply(model.config)
    num_groups = stability.groups(model.config.num_latents)
    model.to(training.device).eval()

    batches = prepared.unlabelled(prepared.train, training.per_device_eval_batch_size)
    rows = []
    for name in stability.similarity:
        samples = sample_similarities(model, tqdm(batches, desc=name, unit="batch"), name)
        rows += measure(samples, name, stability.sample_counts, num_groups, stability.num_inputs)

    output_dir = Path(training.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    shown = num_groups[len(num_groups) // 2]
    report = {
        "arguments": noted_arguments(model_args, data, stability) | {"seed": training.seed},
        "environment": describe_environment(),
        "source": asdict(task.source),
        "latents": model.config.num_latents,
        "num_groups": num_groups,
        "layers": [asdict(row) for row in rows],
    }
    write_json(output_dir / RESULTS_FILE, report)
    draw(rows, shown, f"{task.source.name}: {model.config.num_latents} latents", output_dir / PICTURE_FILE)
    print(as_markdown(rows, shown), end="")
    print(f"its groups, samples: adjusted Rand index at {shown} of {model.config.num_latents} latents left")
    print(f"written to {output_dir / RESULTS_FILE} and {output_dir / PICTURE_FILE}")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
