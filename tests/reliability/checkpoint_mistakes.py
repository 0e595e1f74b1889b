# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are not whole, not ours or not for the task: config files, weights, tokenizers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig

from tests.reliability.bad_input import BadInputCase, Make
from tests.reliability.inputs import TRAINING, Command, Inputs

CONFIGS, WEIGHTS, PROCESSORS = "config files", "weights files", "tokenizers and image processors"
WEIGHTS_FILE = "model.safetensors"
# A config for a model from scratch, in which a field is something else, and what the line must say.
FIELDS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "num_latents": ("many", ("num_latents",)),
    "num_latents ": (0, ("num_latents",)),
    "num_latents  ": (-8, ("num_latents",)),
    "num_latents   ": (1.5, ("num_latents",)),
    "d_latents": (None, ("d_latents",)),
    "d_model": ("wide", ("d_model",)),
    "num_blocks": (0, ("num_blocks",)),
    "num_blocks ": ("two", ("num_blocks",)),
    "num_self_attends_per_block": (-1, ("num_self_attends_per_block",)),
    "num_self_attention_heads": (3, ("num_self_attention_heads",)),
    "num_self_attention_heads ": (0, ("num_self_attention_heads",)),
    "num_cross_attention_heads": (5, ("num_cross_attention_heads",)),
    "qk_channels": (7, ("qk_channels",)),
    "max_position_embeddings": (0, ("max_position_embeddings",)),
    "attention_probs_dropout_prob": (2, ("attention_probs_dropout_prob",)),
    "attention_probs_dropout_prob ": ("some", ("attention_probs_dropout_prob",)),
    "initializer_range": ("small", ("initializer_range",)),
    "hidden_act": ("step", ("hidden_act",)),
    "architectures": (["BertModel"], ("BertModel",)),
    "architectures ": ("PerceiverForSequenceClassification", ("architectures",)),
    "architectures  ": ([5], ("architectures",)),
    "model_type": ("bert", ("bert",)),
    "r": ([1, 1], ("r", "4")),
    "r ": ("x", ("r", "x")),
    "r  ": (True, ("r", "True")),
    "r_inflection": ("early", ("r_inflection", "early")),
    "min_latents": (99, ("min_latents", "99")),
    "merge_method": ("glue", ("merge_method", "glue")),
    "merge_metric": (5, ("merge_metric", "5")),
    "merge_groups": ([[0, 0]], ("merge_groups",)),
    "merge_groups ": ("all", ("merge_groups",)),
    "proportional_attention": ("yes", ("proportional_attention", "yes")),
    "id2label": ([1, 2], ("id2label",)),
    "label2id": ({"negative": 0, "positive": 0}, ("label2id",)),
}
WHOLE = {
    "empty.json": b"",
    "list.json": b"[1]",
    "word.json": b'"hello"',
    "null.json": b"null",
    "broken.json": b'{"num_latents": 8',
    "binary.json": b"\x80\x81",
}


def checkpoint_mistakes() -> Iterator[BadInputCase]:
    for name, (value, says) in FIELDS.items():
        make = _from_scratch(name.strip(), value)
        yield BadInputCase(CONFIGS, f"{name.strip()} is {value}", "run_glue.py", make, says)
    for number, (name, data) in enumerate(WHOLE.items()):
        script = ("run_glue.py", "run_image.py", "run_mlm.py")[number % 3]
        yield BadInputCase(CONFIGS, name, script, _whole(script, name, data), ("--config_name", name))
    for name, (script, change, says) in CHECKPOINTS.items():
        yield BadInputCase(CONFIGS, name, script, _checkpoint(script, change), says)
    for name, (change, says) in WEIGHTS_CHANGES.items():
        for script in ("run_glue.py", "eval_sweep.py"):
            yield BadInputCase(WEIGHTS, name, script, _checkpoint(script, change), says)
    make, works = _checkpoint("eval_sweep.py", _not_finite, SEARCH), {"exit_code": 1, "works": True}
    yield BadInputCase(WEIGHTS, "not finite, where outputs are compared", "eval_sweep.py", make, ("finite",), **works)
    for name, (script, change, says) in PROCESSOR_CHANGES.items():
        yield BadInputCase(PROCESSORS, name, script, _checkpoint(script, change), says)


SEARCH: Command = ("--flops_ratio", 0.9, "--schedule", "search", "--calibration_samples", 4)


def _from_scratch(name: str, value: Any) -> Make:
    def make(inputs: Inputs, folder: Path) -> Command:
        config = json.loads(inputs.text_config.read_text()) | {name: value}
        (folder / "changed.json").write_text(json.dumps(config))
        return ("--config_name", folder / "changed.json", *inputs.text_data, *TRAINING)

    return make


def _whole(script: str, name: str, data: bytes) -> Make:
    def make(inputs: Inputs, folder: Path) -> Command:
        (folder / name).write_bytes(data)
        return (*inputs.usual(script), "--config_name", folder / name)

    return make


def _checkpoint(script: str, change: Callable[[Path], object], added: Command = ()) -> Make:
    """A copy of a good checkpoint, changed, and the shortest command that reads it."""

    def make(inputs: Inputs, folder: Path) -> Command:
        model = {
            "run_glue.py": inputs.text_model, "run_image.py": inputs.image_model, "run_mlm.py": inputs.mlm_model,
            "eval_sweep.py": inputs.text_model,
        }[script]  # fmt: skip
        data = {"run_image.py": inputs.image_data, "run_mlm.py": inputs.mlm_data}.get(script, inputs.text_data)
        stage: Command = ("--do_eval",)
        if script == "eval_sweep.py":
            stage = ("--r", 1, "--timing_rounds", 0)
        shutil.copytree(model, folder / "checkpoint")
        change(folder / "checkpoint")
        return ("--model_name_or_path", folder / "checkpoint", *data, "--use_cpu", *stage, *added)

    return make


def _set(name: str, value: Any, file: str = "config.json") -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))

    return change


def _write(file: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes(data)


def _remove(file: str) -> Callable[[Path], object]:
    return lambda folder: (folder / file).unlink()


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def _bert(folder: Path) -> None:
    BertConfig().save_pretrained(folder)


def _twins(folder: Path) -> None:
    _set("label2id", {"negative": 0, "positive": 0})(folder)


def _contradiction(folder: Path) -> None:
    _set("id2label", {"0": "positive", "1": "negative"})(folder)


CHECKPOINTS: dict[str, tuple[str, Callable[[Path], object], tuple[str, ...]]] = {
    "an empty folder": ("run_glue.py", _empty, ("--model_name_or_path", "checkpoint")),
    "an empty folder to sweep": ("eval_sweep.py", _empty, ("--model_name_or_path", "checkpoint")),
    "no config": ("run_image.py", _remove("config.json"), ("--model_name_or_path", "config.json")),
    "an empty config": ("run_mlm.py", _write("config.json", b""), ("--model_name_or_path", "checkpoint")),
    "a cut config": ("eval_sweep.py", _write("config.json", b'{"model_'), ("--model_name_or_path", "checkpoint")),
    "a config that is a list": ("eval_sweep.py", _write("config.json", b"[]"), ("--model_name_or_path", "checkpoint")),
    "another model": ("run_glue.py", _bert, ("bert",)),
    "another model to sweep": ("eval_sweep.py", _bert, ("bert",)),
    "of text, for images": ("run_image.py", _set("architectures", ["PerceiverForMaskedLM"]), ("PerceiverForMaskedLM",)),
    "of optical flow": (
        "run_glue.py", _set("architectures", ["PerceiverForOpticalFlow"]), ("PerceiverForOpticalFlow",)
    ),
    "of optical flow, swept": (
        "eval_sweep.py", _set("architectures", ["PerceiverForOpticalFlow"]), ("PerceiverForOpticalFlow",)
    ),
    "of no class, swept": ("eval_sweep.py", _set("architectures", None), ("architectures",)),
    "of an empty list of classes, swept": ("eval_sweep.py", _set("architectures", []), ("architectures",)),
    "a classifier for masked tokens": (
        "run_mlm.py", _set("architectures", ["ToMePerceiverForSequenceClassification"]), ("architectures",)
    ),
    "two labels of one index": ("run_glue.py", _twins, ("label2id",)),
    "two labels of one index, swept": ("eval_sweep.py", _twins, ("label2id",)),
    "id2label against label2id": ("run_glue.py", _contradiction, ("id2label",)),
    "id2label against label2id, swept": ("eval_sweep.py", _contradiction, ("id2label",)),
    "r for another number of layers": ("run_glue.py", _set("r", [1, 1, 1]), ("r", "4")),
    "groups for another number of layers": ("eval_sweep.py", _set("merge_groups", [[0]]), ("merge_groups",)),
    "other widths than the weights": ("run_glue.py", _set("d_latents", 16), ("--model_name_or_path", "checkpoint")),
    "other latents than the weights": ("eval_sweep.py", _set("num_latents", 6), ("--model_name_or_path", "checkpoint")),
    "other layers than the weights": (
        "eval_sweep.py", _set("num_self_attends_per_block", 3), ("--model_name_or_path", "checkpoint")
    ),
    "a field of another type": ("run_image.py", _set("num_latents", "many"), ("num_latents",)),
}  # fmt: skip


def _cut_weights(folder: Path) -> None:
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _without_tensors(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS_FILE)
    kept = dict(list(sorted(weights.items()))[: len(weights) // 2])
    save_file(kept, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def _foreign(folder: Path) -> None:
    save_file({"layer.weight": torch.zeros(2, 2)}, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def _not_finite(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS_FILE)
    spoilt = {name: torch.full_like(tensor, float("nan")) for name, tensor in weights.items()}
    save_file(spoilt, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def _pickled(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not a pickle")


def _a_folder(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    (folder / WEIGHTS_FILE).mkdir()


WEIGHTS_CHANGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "not there": (_remove(WEIGHTS_FILE), ("--model_name_or_path", "checkpoint")),
    "empty": (_write(WEIGHTS_FILE, b""), ("--model_name_or_path", "checkpoint")),
    "cut": (_cut_weights, ("--model_name_or_path", "checkpoint")),
    "text": (_write(WEIGHTS_FILE, b"hello, I am no weights file"), ("--model_name_or_path", "checkpoint")),
    "half of them missing": (_without_tensors, ("--model_name_or_path", "checkpoint")),
    "of something else": (_foreign, ("--model_name_or_path", "checkpoint")),
    "a broken pickle": (_pickled, ("--model_name_or_path", "checkpoint")),
    "a folder": (_a_folder, ("--model_name_or_path", "checkpoint")),
}


def _remove_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


def _no_mask(folder: Path) -> None:
    _set("mask_token", None, "tokenizer_config.json")(folder)


PROCESSOR_CHANGES: dict[str, tuple[str, Callable[[Path], object], tuple[str, ...]]] = {
    "a tokenizer config that is cut": ("run_glue.py", _write("tokenizer_config.json", b'{"a'), ("tokenizer",)),
    "a tokenizer config that is a list": ("eval_sweep.py", _write("tokenizer_config.json", b"[]"), ("tokenizer",)),
    "an unknown tokenizer class": (
        "run_mlm.py", _set("tokenizer_class", "NoTokenizer", "tokenizer_config.json"), ("tokenizer",)
    ),
    "no image processor": ("run_image.py", _remove("preprocessor_config.json"), ("preprocessor",)),
    "an image processor that is cut": ("run_image.py", _write("preprocessor_config.json", b"{"), ("preprocessor",)),
    "an image processor with a size of text": (
        "run_image.py", _set("size", "large", "preprocessor_config.json"), ("large",)
    ),
}  # fmt: skip
