# SPDX-License-Identifier: Apache-2.0
"""Would it pay to spend more on some inputs than on others, within the same mean share of the FLOPs?

Four ways, each against one setting for all inputs at the same mean share, paired example by example:
route (each input goes to one of two settings, by how alike its latents are before any merge), exit (the decoder looks
at the latents after some blocks, and an input leaves as soon as its answer is sure), cascade (the cheaper setting
answers first, and a dearer one again where it was unsure), and cascade, reading kept (the second answer takes over what
is the same before any merge). The settings are those that a sweep chose, and the thresholds are set on training inputs.

    python benchmarks/adaptive.py --model_name_or_path outputs/fashion_mnist --sweep_dir outputs/sweep \\
        --dataset_name zalando-datasets/fashion_mnist --use_cpu --output_dir outputs/adaptive

OUTPUT_DIR gets adaptive.json with every figure, adaptive.md, and the outputs of each setting, so that what was run is
not run again.

Letters: B inputs, N latents, C channels, K classes, X blocks that run, O options of a policy.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

# A script's own folder is on the path, the repository's root, where the modules are, is not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from budget_tome_perceiver import Merging
from cost_tome_perceiver import forward_cost
from experiments.command_line import parse_arguments
from experiments.errors import BadInput, exit_on_bad_input
from experiments.files import write_text, write_whole
from experiments.measurement import describe_environment
from experiments.publishing.tables import markdown_table, with_error
from experiments.runs.checkpoint_task import SweepDataArguments, load_sweep_task
from experiments.runs.start import Loaded, load
from experiments.tasks.base import LABELS, Batch
from experiments.training.identity import noted_arguments, weights_fingerprint
from experiments.training.model_arguments import ModelArguments
from experiments.training.output_folder import SWEEP_FILE, read_json, write_json
from experiments.training.trainer_arguments import TrainerArguments
from layers_tome_perceiver import METRICS, AttentionOutput, LayerOutput, latent_bias
from modeling_tome_perceiver import ToMePerceiverPreTrainedModel

TRAIN, TEST = "training", "evaluated"
ROUTE, EXIT, CASCADE, KEPT = "route", "exit", "cascade", "cascade, reading kept"
UNMERGED = "unmerged"
# Cosine of latents that a threshold would merge.
CLOSE = 0.9


@dataclass
class AdaptiveArguments:
    """Among which settings."""

    _argument_group_name: ClassVar[str] = "adaptive"

    sweep_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of an eval_sweep.py with --flops_ratio on this checkpoint, whose settings are used."},
    )
    threshold_samples: int = field(default=5000, metadata={"help": "Training inputs that set the thresholds."})

    def __post_init__(self) -> None:
        if self.threshold_samples < 2:
            raise BadInput(f"--threshold_samples {self.threshold_samples}: allowed is an integer of 2 or more")


@dataclass(frozen=True)
class Setting:
    """A way to merge.

    Attributes:
        name, merging: which.
        block_shares: (X,) of the unmerged FLOPs, for an input that is decoded after each block and nowhere before.
        decoder_shares: (X,) what the decoder takes of them there.
        preprocessing, reading: what comes before the first layer takes of them.
    """

    name: str
    merging: Merging
    block_shares: list[float]
    decoder_shares: list[float]
    preprocessing: float
    reading: float

    @property
    def share(self) -> float:
        """For an input that runs to the end."""
        return self.block_shares[-1]

    def exit_shares(self, looks: Sequence[int]) -> np.ndarray:
        """Of an input that leaves after each of these blocks, or at the end, having been decoded at all before."""
        places = [*looks, len(self.block_shares) - 1]
        spent = [sum(self.decoder_shares[before] for before in places[:index]) for index in range(len(places))]
        return np.array([self.block_shares[place] + each for place, each in zip(places, spent, strict=True)])

    def common(self, other: Setting) -> float:
        """What is the same in both before any merge."""
        alike = self.merging.latent_groups == other.merging.latent_groups
        return self.preprocessing + (self.reading if alike else 0.0)


@dataclass(frozen=True)
class Outputs:
    """What a setting says of a split.

    Attributes:
        logits: (X, B, K) after each block.
        labels: (B,).
        scores: by name (B,), how alike latents are before any merge; of the unmerged model only.
    """

    logits: np.ndarray
    labels: np.ndarray
    scores: dict[str, np.ndarray]

    @property
    def right(self) -> np.ndarray:
        """(X, B) whether the answer after each block is right."""
        return self.logits.argmax(-1) == self.labels

    @property
    def doubt(self) -> np.ndarray:
        """(X, B) what the likeliest class lacks to a probability of 1."""
        exponents = np.exp(self.logits - self.logits.max(-1, keepdims=True))
        return 1 - exponents.max(-1) / exponents.sum(-1)


@dataclass(frozen=True)
class Policy:
    """Options that are tried in their order; an input stays with the first one of which there is little doubt.

    Attributes:
        way, name: which.
        costs: (O,) share of the FLOPs of an input that stays with each option, with all that was tried before.
        doubts: by split (O - 1, B); of the last option there is none.
        right: by split (O, B).
    """

    way: str
    name: str
    costs: np.ndarray
    doubts: dict[str, np.ndarray]
    right: dict[str, np.ndarray]

    def options(self, split: str, threshold: float) -> np.ndarray:
        """(B,) which option each input stays with."""
        sure = self.doubts[split] <= threshold
        return np.where(sure.any(axis=0), sure.argmax(axis=0), len(self.costs) - 1)

    def spent(self, split: str, threshold: float) -> float:
        """The mean share of the FLOPs."""
        return float(self.costs[self.options(split, threshold)].mean())

    def threshold(self, budget: float) -> float | None:
        """The lowest at which training inputs keep to a mean share; `None` if nothing lies on both sides of it."""
        if not self.costs.min() < budget < self.costs.max():
            return None
        found = np.unique(self.doubts[TRAIN])
        low, high = -1, len(found) - 1  # below the lowest nothing stays; the mean share falls as the threshold rises
        if self.spent(TRAIN, found[high]) > budget:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.spent(TRAIN, found[middle]) <= budget else (middle, high)
        return float(found[high])

    def answers(self, split: str, threshold: float) -> np.ndarray:
        """(B,) whether each input is answered right."""
        return np.take_along_axis(self.right[split], self.options(split, threshold)[None], axis=0)[0]

    def oracle(self, budget: float) -> float:
        """The accuracy on evaluated inputs if the dearer of two options went to those that only it answers right."""
        cheap, dear = self.right[TEST]
        most = int((budget - self.costs[0]) / (self.costs[1] - self.costs[0]) * cheap.size)
        return float((cheap.sum() + min(most, (dear & ~cheap).sum())) / cheap.size)


def setting_of(name: str, merging: Merging, loaded: Loaded) -> Setting:
    """A setting with its shares of the FLOPs."""
    model, config = loaded.model, merging.asked_of(loaded.model.config)
    cost = partial(forward_cost, input_shape=loaded.input_shape, architecture=type(model).__name__)
    unmerged = cost(model.unmerged.asked_of(config)).total_with_matching
    costs = []
    for blocks in range(1, config.num_blocks + 1):
        layers = blocks * config.num_self_attends_per_block
        groups = merging.merge_groups
        begun = replace(
            merging,
            r=0 if groups is not None else config.merge_schedule[:layers],
            r_inflection=0.0,
            merge_groups=None if groups is None else groups[:layers],
            num_blocks=blocks,
        )
        costs.append(cost(begun.asked_of(config)))
    return Setting(
        name,
        merging,
        block_shares=[each.total_with_matching / unmerged for each in costs],
        decoder_shares=[each.decoder / unmerged for each in costs],
        preprocessing=costs[0].preprocessing / unmerged,
        reading=costs[0].cross_attention / unmerged,
    )


def settings_of(loaded: Loaded, sweep_dir: str | None) -> list[Setting]:
    """The unmerged model and what a sweep of budgets chose, the cheapest first.

    Raises:
        BadInput: for a folder without such a sweep of this checkpoint.
    """
    if sweep_dir is None:
        raise BadInput("--sweep_dir: not given; allowed is the folder of an eval_sweep.py with --flops_ratio")
    path = Path(sweep_dir) / SWEEP_FILE
    if not path.exists():
        raise BadInput(f"--sweep_dir {sweep_dir}: has no {SWEEP_FILE}; allowed is the folder of an eval_sweep.py")
    sweep = read_json(path)
    if sweep["content"].get("weights_to_start_from") != weights_fingerprint(loaded.model):
        raise BadInput(f"--sweep_dir {sweep_dir}: is of other weights; allowed is a sweep of this checkpoint")
    merged = {row["name"]: Merging(**row["fields"]) for row in sweep["rows"] if row["name"].startswith("flops=")}
    if len(merged) < 2:
        raise BadInput(f"--sweep_dir {sweep_dir}: has {len(merged)} budgets; allowed are two or more")
    found = [setting_of(name, each, loaded) for name, each in {UNMERGED: loaded.model.unmerged, **merged}.items()]
    return sorted(found, key=lambda setting: setting.share)


@contextmanager
def hooked(hooks: Sequence[Any]) -> Iterator[None]:
    """Inside, these hooks are there."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def logits_by_block(model: ToMePerceiverPreTrainedModel, batch: Batch) -> Tensor:
    """What the decoder says after each block, (X, B, K); the last is the model's own output."""
    base = model.base_model
    states: list[LayerOutput] = []
    decoded: list[tuple[Any, ...]] = []

    def after_block(module: nn.Module, arguments: object, output: LayerOutput) -> None:
        states.append(LayerOutput(*output))

    def before_decoder(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        decoded.append(arguments)

    with hooked(
        [
            base.encoder.self_attends[-1].register_forward_hook(after_block),
            base.decoder.register_forward_pre_hook(before_decoder),
        ]
    ):
        last = model(**batch).logits
    query = decoded[0][0]
    earlier = [
        base.decoder(query, state.hidden_states, latent_bias(model.config, state.sizes, query.dtype)).logits
        for state in states[:-1]
    ]
    return torch.stack([*earlier, last])


@contextmanager
def noting_latents(model: ToMePerceiverPreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """Inside, the latents of the last pass before any merge, (B, N, C) each: after reading, and what the first layer's
    attention gives to compare."""
    noted: dict[str, Tensor] = {}

    def after_reading(module: nn.Module, arguments: object, output: LayerOutput) -> None:
        noted.clear()
        noted["reading"] = LayerOutput(*output).hidden_states

    def after_attention(module: nn.Module, arguments: object, output: AttentionOutput) -> None:
        # The module runs again in each block.
        noted.setdefault("hidden", METRICS["hidden"](output))
        noted.setdefault("key", METRICS["key"](output))

    encoder = model.base_model.encoder
    with hooked(
        [
            encoder.cross_attention.register_forward_hook(after_reading),
            encoder.self_attends[0].attention.register_forward_hook(after_attention),
        ]
    ):
        yield noted


def similarity_scores(latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How alike the latents of each input are, (B,) by name, the more alike the higher.

    "mean" is of all pairs; "nearest" is the mean over latents of the most similar one before each, which is what
    `leader` merges by; "close" is the share of latents that have one before them within a cosine of `CLOSE`, so many as
    a threshold on the similarity would merge.

    Args:
        latents: by name (B, N, C).
    """
    scores = {}
    for name, each in latents.items():
        unit = F.normalize(each, dim=-1)
        similarity = unit @ unit.transpose(1, 2)
        places = torch.arange(similarity.shape[1], device=similarity.device)
        nearest = similarity.masked_fill(places[:, None] <= places, -torch.inf)[:, 1:].amax(dim=-1)
        scores |= {
            f"mean {name}": similarity[:, places[:, None] > places].mean(dim=1),
            f"nearest {name}": nearest.mean(dim=1),
            # The mean tells apart those that have as many.
            f"close {name}": ((nearest > CLOSE).sum(dim=1) + nearest.mean(dim=1) / 2) / nearest.shape[1],
        }
    return scores


def outputs_of(
    model: ToMePerceiverPreTrainedModel, setting: Setting, batches: Callable[[], list[Batch]], path: Path
) -> Outputs:
    """Run a setting over a split, or read what an earlier run has left.

    Args:
        model: in evaluation mode.
        setting: to merge by.
        batches: of the split, with labels.
        path: of a .npz file to keep it in.
    """
    if not path.exists():
        logits, scores = [], []
        with setting.merging.applied(model.config), noting_latents(model) as latents:
            for batch in tqdm(batches(), desc=f"{path.parent.name} inputs, {setting.name}", disable=None):
                inputs = {name: value.to(model.device) for name, value in batch.items() if name != LABELS}
                logits.append(logits_by_block(model, inputs).cpu())
                scores.append(similarity_scores(latents) if setting.name == UNMERGED else {})
        arrays = {f"score {name}": torch.cat([each[name] for each in scores]).cpu().numpy() for name in scores[0]}
        arrays["logits"] = torch.cat(logits, dim=1).numpy()
        arrays["labels"] = torch.cat([batch[LABELS] for batch in batches()]).numpy()
        path.parent.mkdir(parents=True, exist_ok=True)

        def save(partial_path: Path) -> None:
            with partial_path.open("wb") as file:
                np.savez(file, **arrays)

        write_whole(path, save)
    with np.load(path) as kept:
        scores_kept = {name.removeprefix("score "): kept[name] for name in kept.files if name.startswith("score ")}
        return Outputs(kept["logits"], kept["labels"], scores_kept)


def policies(settings: Sequence[Setting], outputs: Mapping[str, Mapping[str, Outputs]]) -> Iterator[Policy]:
    """Every policy of each way.

    Args:
        settings: the cheapest first.
        outputs: by split and name of the setting.
    """
    splits = (TRAIN, TEST)
    right = {split: {name: each.right for name, each in outputs[split].items()} for split in splits}
    doubt = {split: {name: each.doubt for name, each in outputs[split].items()} for split in splits}
    scores = {split: outputs[split][UNMERGED].scores for split in splits}
    for index, cheap in enumerate(settings):
        last = len(cheap.block_shares) - 1
        for looks in (chosen for size in range(1, last + 1) for chosen in combinations(range(last), size)):
            yield Policy(
                EXIT,
                f"{cheap.name}, after block {' and '.join(str(block + 1) for block in looks)}",
                cheap.exit_shares(looks),
                {split: doubt[split][cheap.name][list(looks)] for split in splits},
                {split: right[split][cheap.name][[*looks, last]] for split in splits},
            )
        for dear in settings[index + 1 :]:
            ends = {split: np.stack([right[split][each.name][-1] for each in (cheap, dear)]) for split in splits}
            for way, saved in ((CASCADE, 0.0), (KEPT, cheap.common(dear))):
                yield Policy(
                    way,
                    f"{cheap.name}, then {dear.name}",
                    np.array([cheap.share, cheap.share + dear.share - saved]),
                    {split: doubt[split][cheap.name][-1:] for split in splits},
                    ends,
                )
            for score in scores[TRAIN]:
                # The more alike latents are, the less is lost by merging them.
                yield Policy(
                    ROUTE,
                    f"{cheap.name} or {dear.name}, by {score}",
                    np.array([cheap.share, dear.share]),
                    {split: -scores[split][score][None] for split in splits},
                    ends,
                )


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Of (B,) differences, with the standard error of their mean."""
    return float(values.mean()), float(values.std() / np.sqrt(values.size))


def best_mix(settings: Sequence[Setting], outputs: Mapping[str, Mapping[str, Outputs]], share: float) -> np.ndarray:
    """(B,) how often each evaluated input is answered right if two settings take turns at random, at a mean share.

    Of all pairs it is the one that is best on training inputs. It needs no score, and makes up for a setting that its
    search did not choose well.
    """

    def mixed(cheap: Setting, dear: Setting, split: str) -> np.ndarray:
        apart = dear.share - cheap.share
        weight = min(1.0, max(0.0, (share - cheap.share) / apart)) if apart else 1.0
        cheaper, dearer = (outputs[split][each.name].right[-1] for each in (cheap, dear))
        return (1 - weight) * cheaper + weight * dearer

    within = [each for each in settings if each.share <= share] or [min(settings, key=lambda each: each.share)]
    beyond = [each for each in settings if each.share > share]
    pairs = [(cheap, dear) for cheap in within for dear in [cheap, *beyond]]
    return mixed(*max(pairs, key=lambda pair: mixed(*pair, TRAIN).mean()), TEST)


def compared(
    policy: Policy, fixed: Setting, settings: Sequence[Setting], outputs: Mapping[str, Mapping[str, Outputs]]
) -> dict[str, Any] | None:
    """A policy beside one setting for all at the same mean share; `None` if it has no threshold that comes to it."""
    threshold = policy.threshold(fixed.share)
    if threshold is None:
        return None
    row: dict[str, Any] = {
        "way": policy.way, "policy": policy.name, "fixed": fixed.name, "budget": fixed.share, "threshold": threshold,
    }  # fmt: skip
    for split in (TRAIN, TEST):
        answers = policy.answers(split, threshold)
        change, error = mean_and_error(answers * 1.0 - outputs[split][fixed.name].right[-1])
        row[split] = {
            "share": policy.spent(split, threshold),
            "accuracy": float(answers.mean()),
            "change": change,
            "change_stderr": error,
        }
    mix = best_mix(settings, outputs, row[TEST]["share"])
    row["over_mix"], row["over_mix_stderr"] = mean_and_error(policy.answers(TEST, threshold) - mix)
    if len(policy.costs) == 2:
        row["oracle_accuracy"] = policy.oracle(fixed.share)
    if policy.way == ROUTE:
        # What chance would give is known without drawing: the mean of both options, by how often each was taken.
        dearer = policy.options(TEST, threshold).mean()
        chance = policy.right[TEST][0] * (1 - dearer) + policy.right[TEST][1] * dearer
        over, over_error = mean_and_error(policy.answers(TEST, threshold) - chance)
        row |= {"random_accuracy": float(chance.mean()), "over_random": over, "over_random_stderr": over_error}
    return row


def best(rows: Sequence[dict[str, Any]], split: str) -> dict[str, Any]:
    """The row with the largest change on a split."""
    return max(rows, key=lambda row: row[split]["change"])


def as_markdown(rows: Sequence[dict[str, Any]], fixed: Mapping[str, float]) -> str:
    """For each budget and way the policy that training inputs choose, and the best in hindsight."""

    def change(row: Mapping[str, Any]) -> str:
        return with_error(100 * row[TEST]["change"], 100 * row[TEST]["change_stderr"], "+.2f")

    def over_mix(row: Mapping[str, Any]) -> str:
        return with_error(100 * row["over_mix"], 100 * row["over_mix_stderr"], "+.2f")

    lines: list[list[object]] = []
    for name, accuracy in fixed.items():
        for way in (ROUTE, EXIT, CASCADE, KEPT):
            found = [row for row in rows if row["fixed"] == name and row["way"] == way]
            if not found:
                continue
            chosen, hindsight = best(found, TRAIN), best(found, TEST)
            random, oracle = (chosen.get(f"{which}_accuracy") for which in ("random", "oracle"))
            lines.append(
                [
                    f"{chosen['budget']:.3f}", f"{100 * accuracy:.2f}", way, chosen["policy"],
                    f"{chosen[TEST]['share']:.3f}", change(chosen), over_mix(chosen),
                    None if random is None else f"{100 * (random - accuracy):+.2f}",
                    None if oracle is None else f"{100 * (oracle - accuracy):+.2f}",
                    len(found), change(hindsight),
                ]
            )  # fmt: skip
    header = [
        "share", "one for all: accuracy x 100", "way", "chosen on training inputs", "its share", "its change",
        "from a mix", "random", "oracle", "tried", "best in hindsight",
    ]  # fmt: skip
    return markdown_table(header, lines)


def main() -> None:
    model_args, data, adaptive, training = parse_arguments(
        __doc__, ModelArguments, SweepDataArguments, AdaptiveArguments, TrainerArguments
    )
    loaded = load(partial(load_sweep_task, data, model_args, training.seed), model_args, training)
    prepared, model = loaded.prepared, loaded.model.eval()
    if not prepared.labels:
        raise BadInput(f"--model_name_or_path {model_args.model_name_or_path}: allowed is a classifier")
    settings = settings_of(loaded, adaptive.sweep_dir)
    available = len(prepared.train)
    chosen = range(0, available, max(1, available // adaptive.threshold_samples))[: adaptive.threshold_samples]
    splits = {TRAIN: Subset(prepared.train, list(chosen)), TEST: next(iter(prepared.evaluation.values()))}
    noted = noted_arguments(model_args, data, adaptive)
    output_dir = Path(training.output_dir)

    @cache
    def batches(split: str) -> list[Batch]:
        loader = DataLoader(splits[split], training.per_device_eval_batch_size, collate_fn=prepared.collate)
        return list(tqdm(loader, desc=f"{split} inputs", disable=None))

    weights, outputs = weights_fingerprint(model), {}
    for split in splits:
        outputs[split] = {}
        for setting in settings:
            decides = json.dumps([weights, setting.merging.key, noted], sort_keys=True)
            path = output_dir / split / f"{hashlib.sha256(decides.encode()).hexdigest()[:16]}.npz"
            outputs[split][setting.name] = outputs_of(model, setting, partial(batches, split), path)
    merged = [setting for setting in settings if setting.name != UNMERGED]
    found = [compared(policy, fixed, settings, outputs) for policy in policies(settings, outputs) for fixed in merged]
    rows = [row for row in found if row is not None]
    accuracies = {each.name: float(outputs[TEST][each.name].right[-1].mean()) for each in settings}
    table = as_markdown(rows, {setting.name: accuracies[setting.name] for setting in reversed(merged)})
    write_json(
        output_dir / "adaptive.json",
        {
            "arguments": noted,
            "environment": describe_environment(),
            "source": asdict(loaded.task.source),
            "evaluated_on": len(outputs[TEST][UNMERGED].labels),
            "settings": [
                asdict(setting)
                | {
                    "share": setting.share,
                    "accuracy": accuracies[setting.name],
                    "exit_accuracies": outputs[TEST][setting.name].right.mean(axis=1).tolist(),
                }
                for setting in settings
            ],
            "rows": rows,
        },
    )
    write_text(output_dir / "adaptive.md", table + "\n")
    print(table)


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
