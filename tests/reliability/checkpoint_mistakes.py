# SPDX-License-Identifier: Apache-2.0
"""Mistakes in checkpoints: damaged, foreign or wrong for the task, in config files, weights and tokenizers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig

from tests.reliability.bad_input import BadInputCase, Make
from tests.reliability.inputs import KINDS, SCRIPTS, Command, Inputs, cut, edit_json

Change = Callable[[Path], object]
GLUE, IMAGE, MLM, SWEEP = SCRIPTS
CONFIGS, WEIGHTS, PROCESSORS = "config files", "weights files", "tokenizers and image processors"
WEIGHTS_FILE = "model.safetensors"
# Wrong values by config field; the message must name the field.
FIELDS: dict[str, list[Any]] = {
    "num_latents": ["many", 0, -8, 1.5],
    "d_latents": [None],
    "d_model": ["wide"],
    "num_blocks": [0, "two"],
    "num_self_attends_per_block": [-1],
    "num_self_attention_heads": [3, 0],
    "num_cross_attention_heads": [5],
    "qk_channels": [7],
    "max_position_embeddings": [0],
    "attention_probs_dropout_prob": [2, "some"],
    "initializer_range": ["small"],
    "hidden_act": ["step"],
    "architectures": ["PerceiverForSequenceClassification", [5]],
    "merge_groups": [[[0, 0]], "all"],
    "id2label": [[1, 2]],
    "label2id": [{"negative": 0, "positive": 0}],
}
# A config field, a wrong value of it, and what the message must contain.
FIELDS_AND_VALUES: list[tuple[str, Any, tuple[str, ...]]] = [
    ("architectures", ["BertModel"], ("BertModel",)),
    ("model_type", "bert", ("bert",)),
    ("r", [1, 1], ("r", "4")),
    ("r", "x", ("r", "x")),
    ("r", True, ("r", "True")),
    ("r_inflection", "early", ("r_inflection", "early")),
    ("min_latents", 99, ("min_latents", "99")),
    ("merge_method", "glue", ("merge_method", "glue")),
    ("merge_metric", 5, ("merge_metric", "5")),
    ("proportional_attention", "yes", ("proportional_attention", "yes")),
    *((name, value, (name,)) for name, values in FIELDS.items() for value in values),
]
WHOLE = {
    "empty.json": b"",
    "list.json": b"[1]",
    "word.json": b'"hello"',
    "null.json": b"null",
    "broken.json": b'{"num_latents": 8',
    "binary.json": b"\x80\x81",
}


def checkpoint_mistakes() -> Iterator[BadInputCase]:
    for name, value, says in FIELDS_AND_VALUES:
        yield BadInputCase(CONFIGS, f"{name} is {value}", "run_glue.py", _from_scratch(name, value), says)
    for number, (name, data) in enumerate(WHOLE.items()):
        script = tuple(KINDS)[number % 3]
        yield BadInputCase(CONFIGS, name, script, _whole(script, name, data), ("--config_name", name))
    for name, (scripts, change, *says) in CHECKPOINTS.items():
        for script in scripts:
            yield BadInputCase(CONFIGS, name, script, _checkpoint(script, change), tuple(says or FOLDER))
    for name, change in WEIGHTS_CHANGES.items():
        for script in (GLUE, SWEEP):
            yield BadInputCase(WEIGHTS, name, script, _checkpoint(script, change), FOLDER)
    search: Command = ("--flops_ratio", 0.9, "--schedule", "search", "--calibration_samples", 4)
    make, works = _checkpoint(SWEEP, _not_finite, search), {"exit_code": 1, "works": True}
    yield BadInputCase(WEIGHTS, "not finite, where outputs are compared", SWEEP, make, ("finite",), **works)
    for name, (script, change, says) in PROCESSOR_CHANGES.items():
        yield BadInputCase(PROCESSORS, name, script, _checkpoint(script, change), (says,))


def _from_scratch(name: str, value: Any) -> Make:
    def make(inputs: Inputs, folder: Path) -> Command:
        shutil.copyfile(inputs.text_config, folder / "changed.json")
        edit_json(folder / "changed.json", **{name: value})
        return (*inputs.text_training, "--config_name", folder / "changed.json")

    return make


def _whole(script: str, name: str, data: bytes) -> Make:
    def make(inputs: Inputs, folder: Path) -> Command:
        (folder / name).write_bytes(data)
        return (*inputs.usual(script), "--config_name", folder / name)

    return make


def _checkpoint(script: str, change: Change, added: Command = ()) -> Make:
    """Make a changed copy of a good checkpoint, and the shortest command that reads it."""

    def make(inputs: Inputs, folder: Path) -> Command:
        kind = KINDS.get(script, "text")
        model, data = (getattr(inputs, f"{kind}_{what}") for what in ("model", "data"))
        stage: Command = ("--r", 1, "--timing_rounds", 0) if script == SWEEP else ("--do_eval",)
        shutil.copytree(model, folder / "checkpoint")
        change(folder / "checkpoint")
        return ("--model_name_or_path", folder / "checkpoint", *data, "--use_cpu", *stage, *added)

    return make


def _set(name: str, value: Any, file: str = "config.json") -> Change:
    return lambda folder: edit_json(folder / file, **{name: value})


def _write(file: str, data: bytes) -> Change:
    return lambda folder: (folder / file).write_bytes(data)


def _remove(files: str) -> Change:
    return lambda folder: [path.unlink() for path in list(folder.glob(files))]


def _bert(folder: Path) -> None:
    BertConfig().save_pretrained(folder)


# By name: the scripts, the change, and what the message must contain in place of `FOLDER`, if given.
FOLDER = ("--model_name_or_path", "checkpoint")
CHECKPOINTS: dict[str, tuple[Any, ...]] = {
    "an empty folder": ([GLUE, SWEEP], _remove("*")),
    "no config": ([IMAGE], _remove("config.json"), "--model_name_or_path", "config.json"),
    "an empty config": ([MLM], _write("config.json", b"")),
    "a cut config": ([SWEEP], _write("config.json", b'{"model_')),
    "a config that is a list": ([SWEEP], _write("config.json", b"[]")),
    "another model": ([GLUE, SWEEP], _bert, "bert"),
    "of text, for images": ([IMAGE], _set("architectures", ["PerceiverForMaskedLM"]), "PerceiverForMaskedLM"),
    "of optical flow": (
        [GLUE, SWEEP], _set("architectures", ["PerceiverForOpticalFlow"]), "PerceiverForOpticalFlow"
    ),
    "of no class": ([SWEEP], _set("architectures", None), "architectures"),
    "of an empty list of classes": ([SWEEP], _set("architectures", []), "architectures"),
    "a classifier for masked tokens": (
        [MLM], _set("architectures", ["ToMePerceiverForSequenceClassification"]), "architectures"
    ),
    "two labels of one index": ([GLUE, SWEEP], _set("label2id", {"negative": 0, "positive": 0}), "label2id"),
    "id2label against label2id": ([GLUE, SWEEP], _set("id2label", {"0": "positive", "1": "negative"}), "id2label"),
    "r for another number of layers": ([GLUE], _set("r", [1, 1, 1]), "r", "4"),
    "groups for another number of layers": ([SWEEP], _set("merge_groups", [[0]]), "merge_groups"),
    "other widths than the weights": ([GLUE], _set("d_latents", 16)),
    "other latents than the weights": ([SWEEP], _set("num_latents", 6)),
    "other layers than the weights": ([SWEEP], _set("num_self_attends_per_block", 3)),
    "a field of another type": ([IMAGE], _set("num_latents", "many"), "num_latents"),
}  # fmt: skip


def _weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    return lambda folder: save_file(
        change(load_file(folder / WEIGHTS_FILE)), folder / WEIGHTS_FILE, metadata={"format": "pt"}
    )


_not_finite = _weights(lambda weights: {name: torch.full_like(each, float("nan")) for name, each in weights.items()})


def _pickled(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not a pickle")


def _a_folder(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    (folder / WEIGHTS_FILE).mkdir()


WEIGHTS_CHANGES: dict[str, Change] = {
    "not there": _remove(WEIGHTS_FILE),
    "empty": _write(WEIGHTS_FILE, b""),
    "cut": lambda folder: cut(folder / WEIGHTS_FILE),
    "text": _write(WEIGHTS_FILE, b"hello, I am no weights file"),
    "half of them missing": _weights(lambda weights: dict(sorted(weights.items())[: len(weights) // 2])),
    "of something else": _weights(lambda _: {"layer.weight": torch.zeros(2, 2)}),
    "a broken pickle": _pickled,
    "a folder": _a_folder,
}
TOKENIZER, PROCESSOR = "tokenizer_config.json", "preprocessor_config.json"
PROCESSOR_CHANGES: dict[str, tuple[str, Change, str]] = {
    "a tokenizer config that is cut": (GLUE, _write(TOKENIZER, b'{"a'), "tokenizer"),
    "a tokenizer config that is a list": (SWEEP, _write(TOKENIZER, b"[]"), "tokenizer"),
    "an unknown tokenizer class": (MLM, _set("tokenizer_class", "NoTokenizer", TOKENIZER), "tokenizer"),
    "no image processor": (IMAGE, _remove(PROCESSOR), "preprocessor"),
    "an image processor that is cut": (IMAGE, _write(PROCESSOR, b"{"), "preprocessor"),
    "an image processor with a size of text": (IMAGE, _set("size", "large", PROCESSOR), "large"),
}
