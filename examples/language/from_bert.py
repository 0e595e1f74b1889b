# SPDX-License-Identifier: Apache-2.0
"""Initialise a text Perceiver from a BERT, so that it computes nearly the same hidden states.

  python examples/language/from_bert.py --teacher_name_or_path sentence-transformers/all-MiniLM-L6-v2 \\
      --config_name examples/minilm_perceiver.json --tokenizer_name outputs/language/tokenizer \\
      --train_file TRAIN.parquet --validation_file VALIDATION.parquet --max_seq_length 128 \\
      --output_dir outputs/language/start

Train the checkpoint in --output_dir with run_mlm.py or examples/language/learn_from_teacher.py. Its tokenizer must have
no tokens that the BERT lacks; examples/train_tokenizer.py --teacher_name_or_path makes one with fewer tokens.

All weights of a BERT fit into a Perceiver that has a latent for each position and layers as wide as the BERT's. In the
encoder's cross-attention each latent reads the token of its position, the self-attention layers compute what the BERT's
layers compute, and in the decoder each position reads its latent. Two differences are left to training:

- A BERT normalises the sum of a branch and its residual (post-norm), a Perceiver the input of the branch (pre-norm).
  So scale and shift of each layer norm are fitted, by channel, to the BERT's states on a few training examples, and the
  output of a branch is scaled like the residual.
- A latent whose position has no token reads the first token, so it duplicates the first latent. That only adds to the
  first token's weight in attention, and such latents are the first to merge.

The channels beyond the BERT's width hold a position code: a vector for each position, by which a query of
cross-attention finds its key.

Letters: B batch, S input positions, N latents, P positions, H channels of the BERT, K channels of the position code, C
channels of the latents, V tokens.
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

# Python adds this script's folder to sys.path, but not the repository root, which holds the modules.
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
"""Channels of the position code, as a share of the number of positions: enough for nearly orthogonal codes."""
INPUT_CODE, LATENT_CODE = 0.1, 2.0
"""Length of the position code relative to a token's embedding, and relative to what a latent reads. It is short in
inputs, to keep the statistics of their layer norm, and long in latents, to outlast what the layers add."""
OWN_POSITION_SCORE = 48.0
"""Attention score between a latent and its own position, before softmax."""
FIRST_POSITION_SHARE = 0.5
"""Score of every latent for the first position, as a share of `OWN_POSITION_SCORE`; latents without a token read it."""
MAX_SCALE = 1.5
"""Largest scale of a branch's output, as a multiple of the median over channels. Where a BERT's norm weights are small,
a larger scale would fit better, but these few channels would then dominate the layer norm."""
LEAST_VARIANCE = 1e-8
FIT_EXAMPLES = 64
"""Training examples that the layer norms are fitted to."""
SHOWN_TOKENS = 3


@dataclass
class StartArguments:
    """Which BERT to start from, and where to save the checkpoint."""

    _argument_group_name = "start"

    teacher_name_or_path: str = HfArg(help="Hub id or folder of the BERT.")
    output_dir: str = HfArg(help="New folder for the checkpoint.")
    seed: int = HfArg(default=42, help="Random seed of the position codes and of all weights that are not copied.")


@dataclass(frozen=True)
class Teacher:
    """Pretrained encoder that reads the student's token ids.

    Attributes:
        model: the frozen encoder.
        ids: (V,), the teacher's id of each token of the student.
    """

    model: PreTrainedModel
    ids: Tensor

    @torch.no_grad()
    def states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the last hidden states (B, S, H) for the student's unmasked `input_ids` (B, S)."""
        return self.model(input_ids=self.ids[input_ids], attention_mask=attention_mask).last_hidden_state

    def to(self, device: torch.device) -> Teacher:
        return Teacher(self.model.to(device), self.ids.to(device))


def load_teacher(name: str, tokenizer: Any, length: int, **download: Any) -> Teacher:
    """Load the teacher of a student.

    Args:
        name: folder or Hub id of an encoder.
        tokenizer: tokenizer of the student.
        length: most tokens in an input.
        download: `cache_dir` and `token`.

    Raises:
        BadInput: if it does not exist, is no encoder, lacks a token of the student or reads only shorter inputs.
    """
    argument = f"--teacher_name_or_path {name}"
    with naming(argument, Exception):
        teacher_vocabulary = AutoTokenizer.from_pretrained(name, **download).get_vocab()
        model = AutoModel.from_pretrained(name, dtype=torch.float32, **download)
    config = model.config
    if config.is_encoder_decoder or getattr(config, "is_decoder", False) or not hasattr(config, "hidden_size"):
        raise BadInput(f"{argument}: is a {config.model_type}; use an encoder, such as BERT")
    if length > (positions := getattr(config, "max_position_embeddings", length)):
        raise BadInput(f"--max_seq_length {length}: must be 1 to {positions}, the positions of the teacher")
    student_vocabulary = tokenizer.get_vocab()
    unknown = sorted(set(student_vocabulary) - set(teacher_vocabulary), key=student_vocabulary.__getitem__)
    if unknown:
        more = f" and {len(unknown) - SHOWN_TOKENS} more" if len(unknown) > SHOWN_TOKENS else ""
        raise BadInput(
            f"{argument}: lacks {', '.join(map(repr, unknown[:SHOWN_TOKENS]))}{more} of the student's tokens; use a "
            "--tokenizer_name with no other tokens than the teacher's, see examples/train_tokenizer.py"
        )
    ids = torch.zeros(max(student_vocabulary.values()) + 1, dtype=torch.int64)
    for token, index in student_vocabulary.items():
        ids[index] = teacher_vocabulary[token]
    return Teacher(model.eval().requires_grad_(False), ids)


def describe_misfit(config: ToMePerceiverConfig, teacher: PreTrainedModel) -> str | None:
    """Describe the first field of a config that does not fit a BERT's layers; return `None` if all fit."""
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
    """Copy a BERT's weights into a model, so that the decoder's first H channels are nearly its last hidden states.

    Args:
        model: an initialised model with a config for which `describe_misfit` returns `None`.
        teacher: the BERT.
        examples: lists of `input_ids` and `attention_mask`, to fit layer norms to.
        counts: (V,), occurrences of each token in the training examples; the bias of the token logits becomes their log
            frequency.
    """
    bert, encoder = teacher.model, model.perceiver.encoder
    decoder, inputs = model.perceiver.decoder, model.perceiver.input_preprocessor
    width = bert.config.hidden_size
    code = _draw_code(model.config.max_position_embeddings)
    # Each token counts once more, so that no token has the frequency 0.
    model.embedding_decoder.bias.copy_(((counts.double() + 1) / (counts.sum() + len(counts))).log())
    ids, mask = (
        pad_sequence([torch.as_tensor(row) for row in examples[name]], batch_first=True)
        for name in ("input_ids", "attention_mask")
    )

    _copy_embeddings(inputs, teacher, code)
    embedded = inputs(ids)[0]
    states = bert.embeddings(teacher.ids[ids])
    _fit_layer_norm(encoder.cross_attention.attention.self.layernorm2, embedded, states, mask)
    _write_code(model.perceiver.embeddings.latents, width, LATENT_CODE * states.norm(dim=-1).mean() * code)
    _pass_values_through(encoder.cross_attention, width)
    _match_positions(
        encoder.cross_attention, model.perceiver.embeddings.latents, embedded, code, width, first=FIRST_POSITION_SHARE
    )
    latents = encoder.cross_attention(
        model.perceiver.embeddings(len(ids)), inputs=embedded, bias=padding_bias(mask, embedded)
    ).hidden_states

    for ours, theirs in zip(encoder.self_attends, bert.encoder.layer, strict=True):
        copied = ours.attention.self
        scale = _fit_layer_norm(copied.layernorm1, latents, states, mask)
        heads = copied.num_heads
        for name in ("query", "key", "value"):
            _copy_linear(getattr(copied, name), getattr(theirs.attention.self, name), heads_out=heads)
        _copy_linear(ours.attention.output.dense, theirs.attention.output.dense, heads_in=heads, scale=scale)
        latents = ours.attention(latents, None, None, False).hidden_states
        states = theirs.attention(states, padding_bias(mask, states))[0]
        scale = _fit_layer_norm(ours.layernorm, latents, states, mask)
        _copy_linear(ours.mlp.dense1, theirs.intermediate.dense)
        _copy_linear(ours.mlp.dense2, theirs.output.dense, scale=scale)
        latents = latents + ours.feed_forward_chunk(latents)
        states = theirs.output(theirs.intermediate(states), states)

    reads = decoder.decoding_cross_attention
    _fit_layer_norm(reads.attention.self.layernorm2, latents, states, mask)
    queries = decoder.output_position_encodings.position_embeddings
    _write_code(queries, width, code)
    _pass_values_through(reads, width)
    _match_positions(reads, queries, latents, code, width)


def _draw_code(positions: int) -> Tensor:
    """Draw position codes (P, K) of length 1, nearly orthogonal."""
    directions = torch.linalg.qr(torch.randn(positions, positions))[0]
    return F.normalize(directions[:, : round(CODE_SHARE * positions)], dim=1)


def _copy_embeddings(inputs: nn.Module, teacher: Teacher, code: Tensor) -> None:
    """Copy the embeddings of tokens and positions, and write the position code into the channels behind them.

    The mean of each embedding is subtracted, because the layer norm that follows averages over more channels here.
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
    """Write position codes (P, K) into vectors (P or more, C), behind the first `width` channels; others become 0."""
    vectors.zero_()
    vectors[: len(code), width : width + code.shape[1]] = code


def _pass_values_through(layer: nn.Module, width: int) -> None:
    """Make a cross-attention layer return the value that it attends to, unchanged, in the first `width` channels."""
    for dense in (layer.attention.self.value, layer.attention.output.dense, layer.mlp.dense2):
        nn.init.zeros_(dense.weight)
        nn.init.zeros_(dense.bias)
    nn.init.eye_(layer.attention.self.value.weight)
    nn.init.eye_(layer.attention.output.dense.weight[:width])


def _match_positions(
    layer: nn.Module, queries: Tensor, keys: Tensor, code: Tensor, width: int, first: float = 0.0
) -> None:
    """Make query i of a cross-attention layer attend to key i, by their position codes.

    Each head compares as many channels of the code as fit into it, chosen at random.

    Args:
        queries, keys: (number, C) and (B, number, C), before their layer norms.
        first: score of every query for key 0, as a share of `OWN_POSITION_SCORE`.
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
    factor = OWN_POSITION_SCORE * math.sqrt(size) * channels / used
    for head in range(attention.num_heads):
        rows = torch.arange(head * size, head * size + used)
        chosen = torch.randperm(channels)[:used]
        attention.query.weight[rows, width + chosen] = factor / lengths[0]
        attention.query.bias[rows] = first * factor * code[0, chosen]
        attention.key.weight[rows, width + chosen] = 1 / lengths[1]


def _fit_layer_norm(norm: nn.LayerNorm, latents: Tensor, states: Tensor, mask: Tensor) -> Tensor:
    """Fit scale and shift of a layer norm to map latents (B, N, C) to states (B, S, H) where `mask` (B, S) is 1.

    Returns:
        (H,), regression slope of the latents over the states, by channel.
    """
    held = mask.bool()
    states = states[held]
    latents = latents[:, : held.shape[1]][held]
    width = states.shape[1]
    normed = F.layer_norm(latents, norm.normalized_shape, eps=norm.eps)[:, :width]
    slope = _regression_slope(normed, states)
    norm.weight.fill_(1.0)
    norm.bias.zero_()
    norm.weight[:width] = slope
    norm.bias[:width] = states.mean(dim=0) - slope * normed.mean(dim=0)
    scale = _regression_slope(states, latents[:, :width])
    return scale.clamp(max=MAX_SCALE * scale.median())


def _regression_slope(over: Tensor, values: Tensor) -> Tensor:
    """Return (H,), the regression slope of `values` (number, H) over `over` by channel; 0 where `over` is constant."""
    varied = over - over.mean(dim=0)
    return (varied * (values - values.mean(dim=0))).mean(dim=0) / varied.square().mean(dim=0).clamp(min=LEAST_VARIANCE)


def _copy_linear(
    ours: nn.Linear, theirs: nn.Linear, heads_in: int = 1, heads_out: int = 1, scale: Tensor | None = None
) -> None:
    """Copy a linear layer into a wider one, or into one with wider heads.

    With `scale`, for the second linear layer of a branch, all other weights become 0, so that they add nothing until
    they are trained. Without it, the weights of all other output channels stay as initialised.
    """
    rows = _head_channels(theirs.out_features, ours.out_features, heads_out)
    columns = _head_channels(theirs.in_features, ours.in_features, heads_in)
    if scale is None:
        scale = torch.ones(theirs.out_features)
        ours.weight[rows] = 0.0
    else:
        nn.init.zeros_(ours.weight)
    nn.init.zeros_(ours.bias)
    ours.weight[rows[:, None], columns] = scale[:, None] * theirs.weight
    ours.bias[rows] = scale * theirs.bias


def _head_channels(count: int, room: int, heads: int) -> Tensor:
    """Return (count,), the indices of the first channels of each head in a layer of `room` channels."""
    return (torch.arange(heads)[:, None] * (room // heads) + torch.arange(count // heads)).flatten()


def count_tokens(examples: Dataset, tokens: int) -> Tensor:
    """Return (V,), how often each token occurs in the `input_ids` of examples."""
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
    if (misfit := describe_misfit(model.config, teacher.model)) is not None:
        raise BadInput(f"--config_name {model_args.config_name}: {misfit}")
    examples = prepared.train.examples
    with undisturbed(model):  # fit without dropout
        fit_examples = examples.shuffle(seed=0)[:FIT_EXAMPLES]
        start_from_bert(model, teacher, fit_examples, count_tokens(examples, model.config.vocab_size))
    save_whole(folder, model.save_pretrained)
    save_whole(folder, tokenizer.save_pretrained)
    print(f"saved: {folder}")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
