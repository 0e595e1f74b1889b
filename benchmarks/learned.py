# SPDX-License-Identifier: Apache-2.0
"""Would a few minutes of training make merging better, with what two papers train?

embedding (after DTEM, Lee and Hong, 2024, arXiv:2412.10569): the model is frozen, and a linear map of what the metric
`hidden` compares learns, by soft merging, to match so that the outputs of unlabelled training inputs change little.
Compared with `hidden` and `key` by the same methods at the same schedule. masked (after AdaPerceiver, 2025,
arXiv:2511.18105): latents have an order, and each attends to its own block of them and those before it, so that one
pass trains every number of latents; a budget runs the first ones alone. Compared with `--elastic` after as many FLOPs
of training from the same checkpoint.

    python benchmarks/learned.py --model_name_or_path outputs/fashion_mnist --idea embedding masked \\
        --dataset_name zalando-datasets/fashion_mnist --flops_ratio 0.614 --use_cpu --output_dir outputs/learned

OUTPUT_DIR gets learned.json and learned.md.

Letters: B inputs, S inputs of the encoder, N latents, M latents left, R latents that merge, C channels of a latent, D
channels of the embedding, K classes.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
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

from benchmarks.adaptive import hooked, mean_and_error, noting_latents
from budget_tome_perceiver import (
    DEFAULT_SCHEDULE,
    CostRatio,
    Merging,
    beyond,
    flops_ratios,
    named_family,
    weakest_member,
)
from cost_tome_perceiver import forward_cost
from experiments.command_line import parse_arguments
from experiments.errors import BadInput, exit_on_bad_input
from experiments.files import write_text
from experiments.measurement import describe_environment
from experiments.merging.arguments import naming_arguments
from experiments.publishing.tables import markdown_table, with_error
from experiments.runs.checkpoint_task import SweepDataArguments, load_sweep_task
from experiments.runs.start import Loaded, load
from experiments.tasks.base import LABELS, Batch
from experiments.training.elastic import MergingDraw, distance
from experiments.training.identity import noted_arguments
from experiments.training.model_arguments import ModelArguments
from experiments.training.output_folder import write_json
from experiments.training.trainer_arguments import TrainerArguments
from groups_tome_perceiver import latent_similarities, mean_similarity
from layers_tome_perceiver import METRICS, ToMePerceiverEncoderOutput, call_layer
from merging_tome_perceiver import EVENS, ODDS, log_size_bias, product_flops
from modeling_tome_perceiver import ToMePerceiverPreTrainedModel
from search_tome_perceiver import output_divergence

EMBEDDING, MASKED, ELASTIC = "embedding", "masked", "elastic"
METHODS = ("bipartite", "leader")
# Of soft merging, from the first step to the last.
TEMPERATURES = (0.1, 0.01)
# A soft merge leaves a latent at least this much of its size, whose log attention takes.
LEAST_SIZE = 1e-4
# Inputs that say where the embedding starts, and how alike latents are.
LOOKED_AT = 256
WARM_UP, WEIGHT_DECAY = 0.05, 0.05


@dataclass
class LearningArguments:
    """What is tried."""

    _argument_group_name: ClassVar[str] = "learning"

    idea: list[str] = field(
        default_factory=lambda: [EMBEDDING, MASKED], metadata={"help": f"What to try: {EMBEDDING}, {MASKED}."}
    )
    flops_ratio: list[float] = field(
        default_factory=lambda: [0.7], metadata={"help": "Shares of the unmerged model's FLOPs."}
    )
    learning_samples: int = field(default=10000, metadata={"help": "Training inputs to learn from, again and again."})
    embedding_channels: int = field(default=16, metadata={"help": "Channels of the embedding."})
    embedding_passes: int = field(default=30000, metadata={"help": "Inputs that the embedding learns from."})
    embedding_learning_rate: float = field(default=3e-3, metadata={"help": "Of the embedding."})
    mask_block: int = field(default=4, metadata={"help": "Latents of a block of the mask."})
    training_passes: int = field(
        default=30000, metadata={"help": "FLOPs of training with masks, and of --elastic, in unmerged passes."}
    )

    def __post_init__(self) -> None:
        for idea in self.idea:
            if idea not in (EMBEDDING, MASKED):
                raise BadInput(f"--idea {idea}: allowed are {EMBEDDING}, {MASKED}")
        for name in ("learning_samples", "embedding_channels", "embedding_passes", "mask_block", "training_passes"):
            if getattr(self, name) < 1:
                raise BadInput(f"--{name} {getattr(self, name)}: allowed is an integer of 1 or more")


# Both ideas.


Encode = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""From the learned latents (B, N, C) and the inputs (B, S, C') to latents (B, M, C) and their sizes (B, M)."""


@contextmanager
def encoding_by(model: ToMePerceiverPreTrainedModel, encode: Encode) -> Iterator[None]:
    """Inside, the model encodes so; it preprocesses and decodes as ever."""
    encoder = model.base_model.encoder

    def forward(hidden_states: Tensor, inputs: Tensor, **options: Any) -> ToMePerceiverEncoderOutput:
        latents, sizes = encode(hidden_states, inputs)
        return ToMePerceiverEncoderOutput(last_hidden_state=latents, latent_sizes=sizes)

    encoder.forward = forward
    try:
        yield
    finally:
        del encoder.forward  # the class's own shows again


def unlabelled(batch: Batch) -> Batch:
    """Without the labels."""
    return {name: value for name, value in batch.items() if name != LABELS}


def shuffled(batches: Sequence[Batch], batch_size: int, seed: int) -> Iterator[Batch]:
    """Batches for ever, in another order in every epoch."""
    random = np.random.default_rng(seed)
    together = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    rows = len(together[LABELS])
    while True:
        order = torch.from_numpy(random.permutation(rows))
        for chosen in order.split(batch_size):
            yield {name: value[chosen] for name, value in together.items()}


@torch.no_grad()
def answers_of(model: ToMePerceiverPreTrainedModel, batches: Sequence[Batch], desc: str) -> Tensor:
    """(B, K) logits of the model as it is set."""
    model.eval()
    return torch.cat([model(**unlabelled(batch)).logits for batch in tqdm(batches, desc=desc, disable=None)])


def right_answers(model: ToMePerceiverPreTrainedModel, batches: Sequence[Batch], desc: str) -> np.ndarray:
    """(B,) whether each input is answered right, of the model as it is set."""
    return right_of(answers_of(model, batches, desc), batches)


def right_of(logits: Tensor, batches: Sequence[Batch]) -> np.ndarray:
    """(B,) whether each answer is right."""
    return (logits.argmax(-1) == torch.cat([batch[LABELS] for batch in batches])).numpy()


def floor_within(model: ToMePerceiverPreTrainedModel, base: Merging, flops_ratio: float, cost: CostRatio) -> Merging:
    """The weakest floor within a share of the FLOPs.

    Raises:
        ValueError: in one line, if there is none.
    """
    family = named_family(model.config, DEFAULT_SCHEDULE, base)
    found = weakest_member(family, flops_ratio, cost)
    if found is None:
        raise beyond(flops_ratio, cost(family(1.0)), f"schedule {DEFAULT_SCHEDULE}")
    return found


def measured(name: str, share: float, right: np.ndarray, against: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A row: accuracy, and the change from each of several others, paired."""
    row: dict[str, Any] = {"name": name, "flops_ratio": share, "accuracy": float(right.mean()), "changes": {}}
    for other, answers in against.items():
        change, error = mean_and_error(right * 1.0 - answers)
        row["changes"][other] = {"change": change, "change_stderr": error}
    return row


# The embedding.


def soft_merge(
    latents: Tensor, sizes: Tensor, alive: Tensor, embedding: Tensor, r: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge R latents softly: each even one gives to the odd ones by similarity, all of itself if it is among the R.

    None leaves, so that gradients know what it would be worth to stay: what gives all of itself keeps next to no size.
    As the temperature falls, it becomes bipartite matching.

    Args:
        latents: (B, N, C).
        sizes: (B, N).
        alive: (B, M) positions of those that match; the others have merged before.
        embedding: (B, N, D) compared by cosine similarity.
        r: R, from 1 to M // 2.
        temperature: of both choices, who gives and to whom.

    Returns:
        Latents, sizes, and the positions (B, M - R) of those that match next.
    """

    def at(values: Tensor, positions: Tensor) -> Tensor:
        return values.gather(1, positions[:, :, None].expand(-1, -1, values.shape[2]))

    compared = F.normalize(at(embedding, alive), dim=-1)
    similarity = compared[:, EVENS] @ compared[:, ODDS].transpose(1, 2)
    best = similarity.amax(dim=-1)
    order = torch.sort(best.detach(), dim=1, descending=True, stable=True)
    # Between the last that merges and the first that stays.
    next_one = order.values[:, r : r + 1] if r < best.shape[1] else torch.full_like(order.values[:, :1], -2.0)
    limit = (order.values[:, r - 1 : r] + next_one) / 2
    given = torch.sigmoid((best - limit) / temperature)
    evens, odds = alive[:, EVENS], alive[:, ODDS]
    size_even, size_odd = sizes.gather(1, evens), sizes.gather(1, odds)
    moved = (size_even * given)[:, :, None] * (similarity / temperature).softmax(dim=-1)
    total = size_odd + moved.sum(dim=1)
    taken = moved.transpose(1, 2) @ at(latents, evens)
    merged = (size_odd[:, :, None] * at(latents, odds) + taken) / total[:, :, None]
    latents = latents.scatter(1, odds[:, :, None].expand_as(merged), merged)
    sizes = sizes.scatter(1, odds, total).scatter(1, evens, size_even * (1 - given).clamp(min=LEAST_SIZE))
    return latents, sizes, torch.cat([evens.gather(1, order.indices[:, r:]), odds], dim=1)


def soft_encoding(
    model: ToMePerceiverPreTrainedModel, projection: Tensor, schedule: Sequence[int], temperature: float
) -> Encode:
    """Encoding that merges softly by an embedding (C, D) of the hidden states."""
    encoder = model.base_model.encoder

    def encode(hidden_states: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        latents = call_layer(encoder.cross_attention, hidden_states, None, None, inputs).hidden_states
        sizes = latents.new_ones(latents.shape[:2])
        alive = torch.arange(latents.shape[1], device=latents.device).expand(len(latents), -1)
        for index, r in enumerate(schedule):
            layer = encoder.self_attends[index % len(encoder.self_attends)]
            latents = layer.attention(latents, None, log_size_bias(sizes, latents.dtype), False).hidden_states
            if r:
                latents, sizes, alive = soft_merge(latents, sizes, alive, latents @ projection, r, temperature)
            latents = latents + layer.feed_forward_chunk(latents)
        return latents, sizes

    return encode


@contextmanager
def matching_by(projection: Tensor) -> Iterator[None]:
    """Inside, the metric `hidden` is its image under a linear map (C, D)."""
    before = METRICS["hidden"]
    METRICS["hidden"] = lambda attention: before(attention) @ projection
    try:
        yield
    finally:
        METRICS["hidden"] = before


@torch.no_grad()
def first_directions(model: ToMePerceiverPreTrainedModel, batches: Sequence[Batch], channels: int) -> Tensor:
    """(C, D) the directions in which latents of the first layer are longest, where learning starts."""
    states: list[Tensor] = []
    with noting_latents(model) as latents:
        for batch in batches:
            model(**unlabelled(batch))
            states.append(F.normalize(latents["hidden"], dim=-1).flatten(0, 1))
    directions = torch.linalg.svd(torch.cat(states), full_matrices=False)[2]
    return directions[:channels].T.contiguous()


def learned_embedding(
    model: ToMePerceiverPreTrainedModel,
    batches: Iterator[Batch],
    start: Tensor,
    schedules: Sequence[Sequence[int]],
    passes: int,
    learning_rate: float,
) -> Tensor:
    """A linear map (C, D) by which soft merging changes the outputs little; the model stays as it is.

    Args:
        model: in evaluation mode, merging nothing.
        batches: to learn from.
        start: (C, D).
        schedules: r of each layer; every step takes the next of them.
        passes: inputs that are looked at.
        learning_rate: at first; it falls to 0 as a cosine.
    """
    projection = nn.Parameter(start.clone())
    optimizer = torch.optim.Adam([projection], lr=learning_rate)
    seen, step = 0, 0
    with tqdm(total=passes, desc="learning the embedding", unit="input", disable=None) as bar:
        while seen < passes:
            batch = unlabelled(next(batches))
            done = seen / passes
            temperature = TEMPERATURES[0] * (TEMPERATURES[1] / TEMPERATURES[0]) ** done
            optimizer.param_groups[0]["lr"] = learning_rate * (1 + math.cos(math.pi * done)) / 2
            with torch.no_grad():
                before = model(**batch).logits
            with encoding_by(model, soft_encoding(model, projection, schedules[step % len(schedules)], temperature)):
                loss = output_divergence(model(**batch).logits, before, regression=False).mean()
            (projection.grad,) = torch.autograd.grad(loss, [projection])
            optimizer.step()
            rows = len(before)
            seen, step = seen + rows, step + 1
            bar.set_postfix(divergence=f"{loss.item():.4f}", refresh=False)
            bar.update(rows)
    return projection.detach()


def embedding_rows(
    loaded: Loaded, learning: LearningArguments, train: Sequence[Batch], test: Sequence[Batch], batch_size: int
) -> list[dict[str, Any]]:
    """`key`, `hidden`, the embedding as it starts and as it is learned, at each budget and by each method."""
    model = loaded.model.eval().requires_grad_(False)
    cost = flops_ratios(model.config, loaded.input_shape, type(model).__name__)
    none = Merging.none(model.config)
    members = {
        (ratio, method): floor_within(
            model, replace(none, merge_method=method, merge_metric="hidden"), ratio, cost
        )
        for ratio in learning.flops_ratio
        for method in METHODS
    }  # fmt: skip
    with none.applied(model.config):
        start = first_directions(
            model, train[: math.ceil(LOOKED_AT / len(train[0][LABELS]))], learning.embedding_channels
        )
        schedules = [member.asked_of(model.config).merge_schedule for (_, _), member in members.items()]
        embedding = learned_embedding(
            model, shuffled(train, batch_size, 0), start, schedules, learning.embedding_passes,
            learning.embedding_learning_rate,
        )  # fmt: skip
        unmerged = answers_of(model, test, "unmerged")
    rows = []
    for (ratio, method), member in members.items():
        logits: dict[str, Tensor] = {}
        for name, metric, projection in (
            ("hidden", "hidden", None),
            ("key", "key", None),
            ("start", "hidden", start),
            ("learned", "hidden", embedding),
        ):
            desc = f"{ratio} {method}, {name}"
            with replace(member, merge_metric=metric).applied(model.config):
                if projection is None:
                    logits[name] = answers_of(model, test, desc)
                else:
                    with matching_by(projection):
                        logits[name] = answers_of(model, test, desc)
            against = {other: right_of(answers, test) for other, answers in {"unmerged": unmerged, **logits}.items()}
            right = against.pop(name)
            apart, hidden_apart = (
                output_divergence(each, unmerged, regression=False).double().numpy()
                for each in (logits[name], logits["hidden"])
            )
            divergence, error = mean_and_error(apart - hidden_apart)
            moved = {
                "divergence": float(apart.mean()),
                "divergence_from_hidden": divergence,
                "divergence_from_hidden_stderr": error,
            }
            share = cost(replace(member, merge_metric=metric))
            if projection is not None:
                share += _projection_ratio(loaded, member, projection)
            rows.append({"idea": EMBEDDING, "r": member.r} | moved | measured(desc, share, right, against))
    return rows


def _projection_ratio(loaded: Loaded, member: Merging, projection: Tensor) -> float:
    """What an embedding costs beyond `hidden`, as a share of the unmerged FLOPs: fewer channels are compared, and all
    latents are projected wherever some merge."""
    model = loaded.model
    config = member.asked_of(model.config)
    unmerged = forward_cost(model.unmerged.asked_of(config), loaded.input_shape, type(model).__name__)
    matching = sum(forward_cost(config, loaded.input_shape, type(model).__name__).matching)
    reaching = [config.latents_at_start, *config.latents_per_layer]
    projected = sum(
        product_flops(before, *projection.shape)
        for before, r in zip(reaching, config.merge_schedule, strict=False)
        if r
    )
    fewer = matching * (1 - projection.shape[1] / projection.shape[0])
    return (projected - fewer) / unmerged.total_with_matching


# Masks.


def farthest_first(similarity: Tensor) -> list[int]:
    """An order of N latents in which each is the least similar to all before it, from (N, N)."""
    order = [0]
    nearest = similarity[0].clone()
    for _ in range(len(similarity) - 1):
        nearest[order] = math.inf
        order.append(int(nearest.argmin()))
        nearest = nearest.maximum(similarity[order[-1]])
    return order


def block_mask(latents: int, block: int) -> Tensor:
    """(1, 1, N, N) what is added to the scores so that a latent sees its own block and those before it."""
    blocks = torch.arange(latents) // block
    return torch.zeros(latents, latents).masked_fill(blocks[:, None] < blocks, -math.inf)[None, None]


def masked_encoding(model: ToMePerceiverPreTrainedModel, block: int, kept: int | None = None) -> Encode:
    """Encoding with a block mask, of the first `kept` latents alone: they are what they are among all of them."""
    encoder = model.base_model.encoder

    def encode(hidden_states: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        latents = call_layer(encoder.cross_attention, hidden_states[:, :kept], None, None, inputs).hidden_states
        mask = block_mask(latents.shape[1], block).to(latents.device)
        for index in range(model.config.num_self_attention_layers):
            layer = encoder.self_attends[index % len(encoder.self_attends)]
            latents = call_layer(layer, latents, None, None, None, mask).hidden_states
        return latents, None

    return encode


def prefix_logits(model: ToMePerceiverPreTrainedModel, batch: Batch, block: int) -> list[Tensor]:
    """From one masked pass what the decoder says of each prefix, (B, K) each; the last is of all latents."""
    decoded: list[tuple[Any, ...]] = []
    decoder = model.base_model.decoder

    def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        decoded.append(arguments)

    with encoding_by(model, masked_encoding(model, block)), hooked([decoder.register_forward_pre_hook(note)]):
        whole = model(**batch).logits
    query, latents = decoded[0][:2]
    counts = range(block, latents.shape[1], block)
    return [*(decoder(query, latents[:, :count]).logits for count in counts), whole]


StepLoss = Callable[[ToMePerceiverPreTrainedModel, Batch, int], tuple[Tensor, float]]
"""From a model, a batch and the number of the step to its loss and to what it costs, in unmerged passes an input."""


def masked_loss(loaded: Loaded, block: int) -> StepLoss:
    """The task on all latents, and what they say taught to every prefix."""
    model = loaded.model
    cost = forward_cost(model.unmerged.asked_of(model.config), loaded.input_shape, type(model).__name__)
    latents = model.config.num_latents
    decoders = sum(count / latents for count in range(block, latents, block)) * cost.decoder / cost.total

    def loss(model: ToMePerceiverPreTrainedModel, batch: Batch, step: int) -> tuple[Tensor, float]:
        *prefixes, whole = prefix_logits(model, unlabelled(batch), block)
        labels = batch[LABELS]
        taught = torch.stack([distance(each, whole.detach(), labels, regression=False) for each in prefixes]).mean()
        return F.cross_entropy(whole, labels) + taught, 1 + decoders

    return loss


def elastic_loss(loaded: Loaded, base: Merging, seed: int) -> StepLoss:
    """The task unmerged, and what that says taught to a merging drawn anew, as `ElasticTrainer`; `base` says how."""
    config = loaded.model.config
    draw, none = MergingDraw(config, seed), Merging.none(config)
    cost = flops_ratios(config, loaded.input_shape, type(loaded.model).__name__)

    def loss(model: ToMePerceiverPreTrainedModel, batch: Batch, step: int) -> tuple[Tensor, float]:
        with none.applied(model.config):
            whole = model(**unlabelled(batch)).logits
        merging = base.by(draw.at(step)[1])
        with merging.applied(model.config):
            merged = model(**unlabelled(batch)).logits
        labels = batch[LABELS]
        taught = distance(merged, whole.detach(), labels, regression=False)
        return F.cross_entropy(whole, labels) + taught, 1 + cost(merging)

    return loss


def trained(
    model: ToMePerceiverPreTrainedModel,
    batches: Iterator[Batch],
    step_loss: StepLoss,
    passes: int,
    learning_rate: float,
    desc: str,
) -> int:
    """Train until so many unmerged passes are spent.

    Returns:
        How many inputs were looked at.
    """
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=WEIGHT_DECAY)
    spent, step, seen = 0.0, 0, 0
    with tqdm(total=passes, desc=desc, unit="pass", disable=None) as bar:
        while spent < passes:
            batch, done = next(batches), spent / passes
            rate = min(1.0, done / WARM_UP) * (1 + math.cos(math.pi * done)) / 2
            optimizer.param_groups[0]["lr"] = learning_rate * rate
            loss, cost = step_loss(model, batch, step)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rows = len(batch[LABELS])
            spent, step, seen = spent + rows * cost, step + 1, seen + rows
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update(rows * cost)
    model.eval()
    return seen


def prefix_ratio(loaded: Loaded, kept: int) -> float:
    """The share of the unmerged FLOPs that the first latents alone take."""
    config, name = loaded.model.unmerged.asked_of(loaded.model.config), type(loaded.model).__name__
    fewer = copy.copy(config)
    fewer.num_latents = kept
    costs = [forward_cost(each, loaded.input_shape, name).total_with_matching for each in (fewer, config)]
    return costs[0] / costs[1]


def masked_rows(
    loaded: Loaded,
    learning: LearningArguments,
    train: Sequence[Batch],
    test: Sequence[Batch],
    training: TrainerArguments,
) -> list[dict[str, Any]]:
    """The checkpoint as it is, trained with masks, and trained as with `--elastic`, unmerged and at each budget."""
    model, block = loaded.model.eval(), learning.mask_block
    cost = flops_ratios(model.config, loaded.input_shape, type(model).__name__)
    none = Merging.none(model.config)
    base = replace(none, merge_method="leader", merge_metric="hidden")
    floors = {ratio: floor_within(model, base, ratio, cost) for ratio in learning.flops_ratio}
    counts = [*range(block, model.config.num_latents, block), model.config.num_latents]
    prefixes = {}
    for ratio in learning.flops_ratio:
        within = [count for count in counts if prefix_ratio(loaded, count) <= ratio]
        if not within:
            raise BadInput(f"--flops_ratio {ratio}: allowed is at least {prefix_ratio(loaded, counts[0]):.3f}")
        prefixes[ratio] = within[-1]
    merges = {1.0: none, **floors}
    before = {}
    for ratio, merging in merges.items():
        with merging.applied(model.config):
            before[ratio] = right_answers(model, test, f"as it is, {ratio}")
    rows = [
        {"idea": MASKED, "way": "as it is"} | measured("unmerged", 1.0, before[1.0], {"unmerged": before[1.0]}),
        *(
            {"idea": MASKED, "way": "as it is"}
            | measured(f"floor {ratio}", cost(floors[ratio]), before[ratio], {"unmerged": before[1.0]})
            for ratio in floors
        ),
    ]
    elastic = copy.deepcopy(model)
    batch_size = training.per_device_train_batch_size
    seen = trained(
        elastic, shuffled(train, batch_size, training.seed), elastic_loss(loaded, base, training.seed),
        learning.training_passes, training.learning_rate, f"training, {ELASTIC}",
    )  # fmt: skip
    answers = {}
    for ratio, merging in merges.items():
        with merging.applied(elastic.config):
            answers[ratio] = right_answers(elastic, test, f"{ELASTIC}, {ratio}")
        row = measured(
            f"floor {ratio}" if ratio < 1 else "unmerged", cost(merging), answers[ratio], {"unmerged": before[1.0]}
        )
        rows.append({"idea": MASKED, "way": ELASTIC, "inputs_seen": seen} | row)
    masked = copy.deepcopy(model)
    with none.applied(masked.config), torch.no_grad():
        looked_at = [unlabelled(batch) for batch in train[: math.ceil(LOOKED_AT / len(train[0][LABELS]))]]
        similarity = mean_similarity(masked, looked_at, 0, partial(latent_similarities, compared=METRICS["hidden"]))
        latents = masked.base_model.embeddings.latents
        latents.copy_(latents[farthest_first(similarity)].clone())
    seen = trained(
        masked, shuffled(train, batch_size, training.seed), masked_loss(loaded, block),
        learning.training_passes, training.learning_rate, f"training, {MASKED}",
    )  # fmt: skip
    for ratio, kept in {1.0: model.config.num_latents, **prefixes}.items():
        with encoding_by(masked, masked_encoding(masked, block, kept)):
            right = right_answers(masked, test, f"{MASKED}, {kept} latents")
        against = {"unmerged": before[1.0], ELASTIC: answers[ratio]}
        row = measured(f"first {kept} latents", prefix_ratio(loaded, kept), right, against)
        rows.append({"idea": MASKED, "way": MASKED, "inputs_seen": seen} | row)
    return rows


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each thing measured, with its changes."""
    others = list(dict.fromkeys(other for row in rows for other in row["changes"]))

    def cells(row: Mapping[str, Any]) -> list[object]:
        changes = [row["changes"].get(other) for other in others]
        return [
            row["idea"] if row["idea"] == EMBEDDING else row["way"],
            row["name"],
            f"{row['flops_ratio']:.3f}",
            f"{100 * row['accuracy']:.2f}",
            f"{row['divergence']:.4f}" if "divergence" in row else None,
            *(
                None if each is None else with_error(100 * each["change"], 100 * each["change_stderr"], "+.2f")
                for each in changes
            ),
        ]

    header = ["trained", "", "share of the FLOPs", "accuracy x 100", "divergence"]
    return markdown_table([*header, *(f"change from {other}" for other in others)], map(cells, rows))


def main() -> None:
    model_args, data, learning, training = parse_arguments(
        __doc__, ModelArguments, SweepDataArguments, LearningArguments, TrainerArguments
    )
    loaded = load(partial(load_sweep_task, data, model_args, training.seed), model_args, training)
    prepared = loaded.prepared
    if not prepared.labels:
        raise BadInput(f"--model_name_or_path {model_args.model_name_or_path}: allowed is a classifier")
    available = len(prepared.train)
    chosen = range(0, available, max(1, available // learning.learning_samples))[: learning.learning_samples]
    splits = {"training": Subset(prepared.train, list(chosen)), "evaluated": next(iter(prepared.evaluation.values()))}
    train, test = (
        list(
            tqdm(
                DataLoader(split, training.per_device_eval_batch_size, collate_fn=prepared.collate),
                desc=f"{name} inputs",
                disable=None,
            )
        )
        for name, split in splits.items()
    )
    rows = []
    with naming_arguments():
        if EMBEDDING in learning.idea:
            rows += embedding_rows(loaded, learning, train, test, training.per_device_train_batch_size)
        if MASKED in learning.idea:
            rows += masked_rows(loaded, learning, train, test, training)
    table = as_markdown(rows)
    output_dir = Path(training.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(
        output_dir / "learned.json",
        {
            "arguments": noted_arguments(model_args, data, learning)
            | {
                name: getattr(training, name)
                for name in ("per_device_train_batch_size", "learning_rate", "seed")
            },
            "environment": describe_environment(),
            "source": asdict(loaded.task.source),
            "evaluated_on": sum(len(batch[LABELS]) for batch in test),
            "rows": rows,
        },
    )  # fmt: skip
    write_text(output_dir / "learned.md", table + "\n")
    print(table)


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
