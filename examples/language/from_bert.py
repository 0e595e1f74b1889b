# SPDX-License-Identifier: Apache-2.0
"""Write a text Perceiver that starts with the weights of a BERT and computes nearly what it computes.

  python examples/language/from_bert.py --teacher_name_or_path sentence-transformers/all-MiniLM-L6-v2 \\
      --config_name examples/minilm_perceiver.json --tokenizer_name outputs/language/tokenizer \\
      --train_file TRAIN.parquet --validation_file VALIDATION.parquet --max_seq_length 128 \\
      --output_dir outputs/language/start

run_mlm.py or examples/language/learn_from_teacher.py then train the checkpoint in --output_dir. The tokenizer has the
BERT's tokens or some of them; examples/train_tokenizer.py --teacher_name_or_path makes a smaller one.

A Perceiver with a latent for each position and layers as wide as a BERT's has room for all of its weights. Each latent
reads the token of its position, the self-attention layers do what the BERT's layers do, and each position reads its
latent back. Training has to make up for two differences:

- A BERT normalises the sum of a branch and its residual (post-norm), a Perceiver the input of the branch (pre-norm).
  So scale and shift of each layer norm are fitted to the BERT's states on some training examples, by channel, and the
  output of a branch is scaled like the residual.
- A latent whose position has no token reads the first token. It is a duplicate of the first latent: harmless but for
  its weight in attention, and the first to be merged.

Channels beyond the BERT's width hold a code of each position, by which attention finds it.

Letters: B batch, S input positions, N latents, P positions, H channels of the BERT, K of the code, C of latents, V
tokens.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, TrainingArguments, set_seed
from transformers.hf_argparser import HfArg

# A script's own folder is on the path, the repository's root, where the modules are, is not.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configuration_tome_perceiver import ToMePerceiverConfig
from cost_tome_perceiver import undisturbed
from experiments.command_line import parse_arguments
from experiments.errors import BadInput, exit_on_bad_input, naming
from experiments.files import check_writable, save_whole
from experiments.tasks.mlm import MlmDataArguments, load_mlm_task
from experiments.training.loading import load_model_and_task
from experiments.training.model_arguments import ModelArguments
from modeling_tome_perceiver import ToMePerceiverForMaskedLM, padding_bias

CODE_SHARE = 0.75
"""Channels of the code as a share of the positions: enough for nearly orthogonal codes."""
INPUT_CODE, LATENT_CODE = 0.1, 2.0
"""Length of the code, relative to a token's embedding and to what a latent reads. Inputs keep the statistics of their
layer norm; latents are found again although layers add to them."""
SHARPNESS = 48.0
"""Score of a position for its own latent, before softmax."""
FIRST = 0.5
"""Share of that score which the first position has for every latent: what latents without a token read."""
STEEPEST = 1.5
"""The scale of a branch's output is at most this multiple of the median over its channels. A BERT's smallest norm
weights ask for more in a few channels, which would then dominate the layer norm."""
LEAST_VARIANCE = 1e-8
FITTED_ON = 64
"""Training examples that layer norms are fitted on."""
SHOWN_TOKENS = 3


@dataclass
class StartArguments:
    """Which BERT, and where the checkpoint goes."""

    _argument_group_name = "start"

    teacher_name_or_path: str = HfArg(help="Hub id or folder of the BERT.")
    output_dir: str = HfArg(help="Folder for the checkpoint, not there yet.")
    seed: int = HfArg(default=42, help="Seed of the codes and of the weights that the BERT does not fill.")


@dataclass(frozen=True)
class Teacher:
    """A pretrained encoder that reads the student's tokens.

    Attributes:
        model: the encoder, not trained.
        ids: (V,) the teacher's id of each token of the student.
    """

    model: PreTrainedModel
    ids: Tensor

    @torch.no_grad()
    def states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the last hidden states (B, S, H) of the student's `input_ids` (B, S), of which none is masked."""
        return self.model(input_ids=self.ids[input_ids], attention_mask=attention_mask).last_hidden_state

    def to(self, device: torch.device) -> Teacher:
        return Teacher(self.model.to(device), self.ids.to(device))


def load_teacher(name: str, tokenizer: Any, length: int, **download: Any) -> Teacher:
    """Load an encoder for a student.

    Args:
        name: a folder or a Hub id.
        tokenizer: of the student.
        length: the most tokens of an input.
        download: `cache_dir` and `token`.

    Raises:
        BadInput: if it is not there, is no encoder, lacks a token of the student or reads shorter inputs.
    """
    argument = f"--teacher_name_or_path {name}"
    with naming(argument, Exception):
        known = AutoTokenizer.from_pretrained(name, **download).get_vocab()
        model = AutoModel.from_pretrained(name, dtype=torch.float32, **download)
    config = model.config
    if config.is_encoder_decoder or getattr(config, "is_decoder", False) or not hasattr(config, "hidden_size"):
        raise BadInput(f"{argument}: is a {config.model_type}; use an encoder, such as BERT")
    if length > (positions := getattr(config, "max_position_embeddings", length)):
        raise BadInput(f"--max_seq_length {length}: must be 1 to {positions}, which the teacher reads")
    own = tokenizer.get_vocab()
    unknown = sorted(set(own) - set(known), key=own.__getitem__)
    if unknown:
        more = f" and {len(unknown) - SHOWN_TOKENS} more" if len(unknown) > SHOWN_TOKENS else ""
        raise BadInput(
            f"{argument}: lacks {', '.join(map(repr, unknown[:SHOWN_TOKENS]))}{more} of the student's tokens; use a "
            "--tokenizer_name with the teacher's own tokens or fewer of them, see examples/train_tokenizer.py"
        )
    ids = torch.zeros(max(own.values()) + 1, dtype=torch.int64)
    for token, index in own.items():
        ids[index] = known[token]
    return Teacher(model.eval().requires_grad_(False), ids)


def misfit(config: ToMePerceiverConfig, teacher: PreTrainedModel) -> str | None:
    """Say which field of a config leaves no room for a BERT's layers; `None` if they fit."""
    bert = teacher.config
    if bert.model_type != "bert" or getattr(bert, "position_embedding_type", "absolute") != "absolute":
        return f"the teacher is a {bert.model_type}; use a BERT"
    width, positions = bert.hidden_size, config.max_position_embeddings
    code = round(CODE_SHARE * positions)
    exactly = {
        "num_blocks": 1,
        "num_self_attends_per_block": bert.num_hidden_layers,
        "num_self_attention_heads": bert.num_attention_heads,
        "hidden_act": bert.hidden_act,
        "qk_channels": width,
        "d_model": config.d_latents,
        "use_query_residual": True,
    }
    at_least = {
        "num_latents": positions,
        "d_latents": width + code,
        "self_attention_widening_factor": math.ceil(bert.intermediate_size / config.d_latents),
    }
    for name, value in exactly.items():
        if getattr(config, name) != value:
            return f"{name} {getattr(config, name)}: must be {value}"
    for name, value in at_least.items():
        if getattr(config, name) < value:
            return f"{name} {getattr(config, name)}: must be {value} or more"
    if config.num_cross_attention_heads * code > width:
        return f"num_cross_attention_heads {config.num_cross_attention_heads}: must be 1 to {max(1, width // code)}"
    return None


@torch.no_grad()
def start_from_bert(
    model: ToMePerceiverForMaskedLM, teacher: Teacher, examples: Mapping[str, Any], counts: Tensor
) -> None:
    """Give a model its teacher's weights.

    Args:
        model: initialised, with a config for which `misfit` is `None`.
        teacher: whose last hidden states the decoder's first H channels are to be.
        examples: lists of `input_ids` and `attention_mask`, to fit layer norms on.
        counts: (V,), number of times each token is in the training examples; the bias of the tokens' logits becomes
            their log frequency.
    """
    bert, encoder = teacher.model, model.perceiver.encoder
    decoder, inputs = model.perceiver.decoder, model.perceiver.input_preprocessor
    width = bert.config.hidden_size
    code = _draw_code(model.config.max_position_embeddings)
    # Each token counts once more, so that none is impossible.
    model.embedding_decoder.bias.copy_(((counts.double() + 1) / (counts.sum() + len(counts))).log())
    ids, mask = (
        pad_sequence([torch.as_tensor(row) for row in examples[name]], batch_first=True)
        for name in ("input_ids", "attention_mask")
    )

    _copy_embeddings(inputs, teacher, code)
    embedded = inputs(ids)[0]
    states = bert.embeddings(teacher.ids[ids])
    _fit(encoder.cross_attention.attention.self.layernorm2, embedded, states, mask)
    _write_code(model.perceiver.embeddings.latents, width, LATENT_CODE * states.norm(dim=-1).mean() * code)
    _pass_on(encoder.cross_attention, width)
    _find(encoder.cross_attention, model.perceiver.embeddings.latents, embedded, code, width, first=FIRST)
    latents = encoder.cross_attention(
        model.perceiver.embeddings(len(ids)), inputs=embedded, bias=padding_bias(mask, embedded)
    ).hidden_states

    for ours, theirs in zip(encoder.self_attends, bert.encoder.layer, strict=True):
        copied = ours.attention.self
        scale = _fit(copied.layernorm1, latents, states, mask)
        heads = copied.num_heads
        for name in ("query", "key", "value"):
            _copy(getattr(copied, name), getattr(theirs.attention.self, name), heads_out=heads)
        _copy(ours.attention.output.dense, theirs.attention.output.dense, heads_in=heads, scale=scale)
        latents = ours.attention(latents, None, None, False).hidden_states
        states = theirs.attention(states, padding_bias(mask, states))[0]
        scale = _fit(ours.layernorm, latents, states, mask)
        _copy(ours.mlp.dense1, theirs.intermediate.dense)
        _copy(ours.mlp.dense2, theirs.output.dense, scale=scale)
        latents = latents + ours.feed_forward_chunk(latents)
        states = theirs.output(theirs.intermediate(states), states)

    reads = decoder.decoding_cross_attention
    _fit(reads.attention.self.layernorm2, latents, states, mask)
    queries = decoder.output_position_encodings.position_embeddings
    _write_code(queries, width, code)
    _pass_on(reads, width)
    _find(reads, queries, latents, code, width)


def _draw_code(positions: int) -> Tensor:
    """Draw codes (P, K) of length 1, nearly orthogonal."""
    directions = torch.linalg.qr(torch.randn(positions, positions))[0]
    return F.normalize(directions[:, : round(CODE_SHARE * positions)], dim=1)


def _copy_embeddings(inputs: nn.Module, teacher: Teacher, code: Tensor) -> None:
    """Copy embeddings of tokens and positions, and write the code of each position behind its embedding.

    The mean of each is taken off, as the following layer norm would, whose mean is over more channels here.
    """
    theirs = teacher.model.embeddings
    tokens = theirs.word_embeddings.weight[teacher.ids]
    places = theirs.position_embeddings.weight[: len(code)] + theirs.token_type_embeddings.weight[0]
    width = tokens.shape[1]
    for ours, values in ((inputs.embeddings.weight, tokens), (inputs.position_embeddings.weight, places)):
        ours.zero_()
        ours[:, :width] = values - values.mean(dim=1, keepdim=True)
    inputs.position_embeddings.weight[:, width : width + code.shape[1]] = INPUT_CODE * tokens.norm(dim=1).mean() * code


def _write_code(vectors: Tensor, width: int, code: Tensor) -> None:
    """Set vectors (P or more, C) to their code (P, K), in the channels behind the first `width`."""
    vectors.zero_()
    vectors[: len(code), width : width + code.shape[1]] = code


def _pass_on(layer: nn.Module, width: int) -> None:
    """Make a cross-attention layer return what it reads, in the first `width` channels."""
    for dense in (layer.attention.self.value, layer.attention.output.dense, layer.mlp.dense2):
        nn.init.zeros_(dense.weight)
        nn.init.zeros_(dense.bias)
    nn.init.eye_(layer.attention.self.value.weight)
    nn.init.eye_(layer.attention.output.dense.weight[:width])


def _find(layer: nn.Module, queries: Tensor, keys: Tensor, code: Tensor, width: int, first: float = 0.0) -> None:
    """Make query i of a cross-attention layer read key i, by the channels of the code that fit into a head, drawn for
    each head.

    Args:
        queries, keys: (number, C) and (B, number, C), before their layer norms.
        first: the score of key 0 for every query, as a share.
    """
    attention, channels = layer.attention.self, code.shape[1]
    asked, held = attention.layernorm1(queries), attention.layernorm2(keys)
    count = min(len(code), held.shape[1])
    lengths = [
        (vectors[..., :count, width : width + channels] * code[:count]).sum(dim=-1).mean() for vectors in (asked, held)
    ]
    for dense in (attention.query, attention.key):
        nn.init.zeros_(dense.weight)
        nn.init.zeros_(dense.bias)
    size = attention.qk_channels_per_head
    used = min(size, channels)
    factor = SHARPNESS * math.sqrt(size) * channels / used
    for head in range(attention.num_heads):
        rows = torch.arange(head * size, head * size + used)
        chosen = torch.randperm(channels)[:used]
        attention.query.weight[rows, width + chosen] = factor / lengths[0]
        attention.query.bias[rows] = first * factor * code[0, chosen]
        attention.key.weight[rows, width + chosen] = 1 / lengths[1]


def _fit(norm: nn.LayerNorm, latents: Tensor, states: Tensor, mask: Tensor) -> Tensor:
    """Fit scale and shift of a layer norm so that it maps latents (B, N, C) to states (B, S, H) where `mask` (B, S) is.

    Returns:
        (H,), the slope of the latents themselves over the states.
    """
    held = mask.bool()
    states = states[held]
    latents = latents[:, : held.shape[1]][held]
    width = states.shape[1]
    normed = F.layer_norm(latents, norm.normalized_shape, eps=norm.eps)[:, :width]
    slope = _slope(normed, states)
    norm.weight.fill_(1.0)
    norm.bias.zero_()
    norm.weight[:width] = slope
    norm.bias[:width] = states.mean(dim=0) - slope * normed.mean(dim=0)
    scale = _slope(states, latents[:, :width])
    return scale.clamp(max=STEEPEST * scale.median())


def _slope(over: Tensor, values: Tensor) -> Tensor:
    """Return (H,), the regression slope of values (number, H) over others by channel; 0 over constants."""
    varied = over - over.mean(dim=0)
    return (varied * (values - values.mean(dim=0))).mean(dim=0) / varied.square().mean(dim=0).clamp(min=LEAST_VARIANCE)


def _copy(
    ours: nn.Linear, theirs: nn.Linear, heads_in: int = 1, heads_out: int = 1, scale: Tensor | None = None
) -> None:
    """Copy a product to one with more channels, or more channels of each head.

    The other weights stay as initialised in the first product of a branch. In the second one, which has a scale, they
    are 0, so they add nothing until they are trained.
    """
    rows = _channels(theirs.out_features, ours.out_features, heads_out)
    columns = _channels(theirs.in_features, ours.in_features, heads_in)
    if scale is None:
        scale = torch.ones(theirs.out_features)
        ours.weight[rows] = 0.0
    else:
        nn.init.zeros_(ours.weight)
    nn.init.zeros_(ours.bias)
    ours.weight[rows[:, None], columns] = scale[:, None] * theirs.weight
    ours.bias[rows] = scale * theirs.bias


def _channels(count: int, room: int, heads: int) -> Tensor:
    """Return (count,), the first channels of each head."""
    return (torch.arange(heads)[:, None] * (room // heads) + torch.arange(count // heads)).flatten()


def count_tokens(examples: Dataset, tokens: int) -> Tensor:
    """Count (V,), how many times each token is in the `input_ids` of examples."""
    counts = torch.zeros(tokens, dtype=torch.int64)
    for batch in examples.with_format("arrow").iter(1000):
        ids = pc.list_flatten(batch.column("input_ids")).to_numpy()
        counts += torch.from_numpy(np.bincount(ids, minlength=tokens))
    return counts


def main() -> None:
    model_args, data, start = parse_arguments(__doc__, ModelArguments, MlmDataArguments, StartArguments)
    folder = Path(start.output_dir)
    check_writable(f"--output_dir {folder}", folder)
    if (folder / "config.json").exists():
        raise BadInput(f"--output_dir {folder}: holds a checkpoint; use another folder")
    if model_args.model_name_or_path is not None:
        raise BadInput("--model_name_or_path: the weights come from the BERT; use --config_name for the config")
    set_seed(start.seed)
    task = load_mlm_task(data, predict=False, seed=start.seed, **model_args.dataset_options())
    training = TrainingArguments(output_dir=str(folder), seed=start.seed, use_cpu=True)
    model, prepared = load_model_and_task(model_args, {}, task, training)
    tokenizer, positions = prepared.processing_class, model.config.max_position_embeddings
    teacher = load_teacher(start.teacher_name_or_path, tokenizer, positions, **model_args.dataset_options())
    if (obstacle := misfit(model.config, teacher.model)) is not None:
        raise BadInput(f"--config_name {model_args.config_name}: {obstacle}")
    examples = prepared.train.examples
    with undisturbed(model):  # dropout is no part of the fit
        fitted_on = examples.shuffle(seed=0)[:FITTED_ON]
        start_from_bert(model, teacher, fitted_on, count_tokens(examples, model.config.vocab_size))
    save_whole(folder, model.save_pretrained)
    save_whole(folder, tokenizer.save_pretrained)
    print(f"saved: {folder}")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
