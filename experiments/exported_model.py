# SPDX-License-Identifier: Apache-2.0
"""Export a model to ONNX, OpenVINO or a compiled PyTorch package, and run the exported file like a model.

Used by `experiments.runs.export` and `benchmarks/runtimes.py`; imports the model files only.

Letters: B batch size, S length of a text, N length of the axis that is sorted or searched.
"""

from __future__ import annotations

import copy
import importlib
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PerceiverConfig, PreTrainedModel
from transformers.models.perceiver.modeling_perceiver import PerceiverClassifierOutput

from configuration_tome_perceiver import MERGING_FIELDS
from experiments.errors import BadInput
from merging_tome_perceiver import EXPERIMENT_ONLY_METHODS
from modeling_tome_perceiver import ToMePerceiverPreTrainedModel

MODEL_FILES = {"onnx": "model.onnx", "openvino": "model.xml", "pt2": "model.pt2"}
"""Name of the exported file, by format."""
DTYPES = {"onnx": ("float32", "int8"), "openvino": ("float32", "bfloat16"), "pt2": ("float32", "bfloat16")}
"""Dtypes that each format can compute in."""
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino"), "pt2": ()}
"""Packages that each format needs beside torch."""

TEXT_INPUTS = ("input_ids", "attention_mask")
IMAGE_INPUTS = ("pixel_values",)
# Entry of the saved config that says what was exported.
EXPORTED = "exported"

Runtime = Callable[[dict[str, Tensor]], Tensor]
"""Runs an exported file: maps its inputs by name to the logits."""


def check_format(format: str, dtype: str) -> None:
    """Check that this machine can export and run a format in a dtype.

    Raises:
        BadInput: if not; the message names what to choose or to install.
    """
    if format not in DTYPES:
        raise BadInput(f"--format {format}: choose from {', '.join(DTYPES)}")
    if dtype not in DTYPES[format]:
        raise BadInput(
            f"--dtype {dtype}: is not available for --format {format}; choose from {', '.join(DTYPES[format])}"
        )
    _import_packages(format)
    if format == "pt2" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise BadInput("--format pt2: needs a C++ compiler; install g++, or use --format onnx")


def _import_packages(format: str) -> None:
    for package in PACKAGES[format]:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise BadInput(
                f"--format {format}: the package {package} is missing; use pip install -r requirements-export.txt"
            ) from error


def input_names(model: ToMePerceiverPreTrainedModel) -> tuple[str, ...]:
    """Return the names of an exported model's inputs, in order, as tokenizers and image processors name them.

    Raises:
        BadInput: for a head that cannot be exported.
    """
    name = type(model).__name__
    if name.endswith(("ForSequenceClassification", "ForMaskedLM")):
        return TEXT_INPUTS
    if "ForImageClassification" in name:
        return IMAGE_INPUTS
    raise BadInput(f"{name} cannot be exported; use a text classifier, an image classifier or a masked language model")


def check_exportable(model: ToMePerceiverPreTrainedModel) -> None:
    """Check that a model has a head and a matching method that can be exported.

    Raises:
        BadInput: if not.
    """
    input_names(model)
    config = model.config
    if config.merge_method in EXPERIMENT_ONLY_METHODS and any(config.merge_schedule):
        raise BadInput(f"merge_method={config.merge_method!r}: is for experiments only; use another method")


class LogitsModule(nn.Module):
    """A model whose `forward` takes its inputs by position and returns its logits, as exporters need it.

    Args:
        model: a model whose head `input_names` accepts.
    """

    def __init__(self, model: ToMePerceiverPreTrainedModel) -> None:
        super().__init__()
        self.model, self.names = model, input_names(model)

    def forward(self, *inputs: Tensor) -> Tensor:
        named = dict(zip(self.names, inputs, strict=True))
        # The heads take token ids and pixels alike as `inputs`.
        first = named.pop(self.names[0])
        return self.model(inputs=first, **named, return_dict=True).logits

    def dynamic_shapes(self) -> tuple[Any, ...]:
        """Return the dimensions of the inputs that stay open: the batch size, and the length of a text."""
        batch = torch.export.Dim("batch")
        if self.names == IMAGE_INPUTS:
            return (({0: batch},),)
        length = torch.export.Dim("length", max=self.model.config.max_position_embeddings)
        return (({0: batch, 1: length}, {0: batch, 1: length}),)


def export_model(
    model: ToMePerceiverPreTrainedModel,
    example: Mapping[str, Tensor],
    folder: str | Path,
    format: str = "onnx",
    dtype: str = "float32",
) -> Path:
    """Write a model with its merging to a file that another runtime runs, and its config beside it.

    Args:
        model: text classifier, image classifier or masked language model, in float32 on the CPU.
        example: two or more inputs, as the tokenizer or image processor returns them; a text of two or more tokens.
        folder: folder to write to; created if needed.
        format: "onnx"; "openvino"; or "pt2", a package that AOTInductor compiles for this kind of processor.
        dtype: dtype of the computation, one of `DTYPES[format]`.

    Returns:
        The path of the exported file.

    Raises:
        BadInput: for an unknown format, a dtype that it lacks, a missing package or compiler, or a model that cannot be
            exported.
    """
    check_format(format, dtype)
    check_exportable(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / MODEL_FILES[format]
    module = LogitsModule(model.eval())
    inputs = tuple(example[name] for name in module.names)
    if format == "pt2":
        compile_package(module, inputs, file, dtype)
    else:
        whole = folder / "float32.onnx"
        export_onnx(module, inputs, whole)
        CONVERTERS[format, dtype](whole, file)
        for path in folder.glob(f"{whole.name}*"):
            path.unlink()
    _save_config(model.config, folder, {"format": format, "dtype": dtype, "inputs": list(module.names)})
    return file


def _save_config(config: PerceiverConfig, folder: Path, exported: dict[str, Any]) -> None:
    """Save a config of the stock model, so that tokenizers and pipelines load without code of the checkpoint."""
    left_out = {*MERGING_FIELDS, "merge_frontier", "auto_map", "model_type", "transformers_version"}
    fields = {name: value for name, value in config.to_dict().items() if name not in left_out}
    saved = PerceiverConfig.from_dict(fields)
    setattr(saved, EXPORTED, exported)
    saved.save_pretrained(folder)


@torch.no_grad()
def export_onnx(module: LogitsModule, inputs: tuple[Tensor, ...], file: Path) -> None:
    """Write an ONNX file in float32 whose batch size, and length of a text, are open.

    Args:
        module: the model.
        inputs: two or more example inputs, in the order of `module.names`.
        file: path to write to.
    """
    with _quiet():
        program = torch.onnx.export(
            module,
            inputs,
            dynamo=True,
            dynamic_shapes=module.dynamic_shapes(),
            input_names=list(module.names),
            output_names=["logits"],
            custom_translation_table=order_keeping_operators(),
            verbose=False,
        )
    program.save(file)


def order_keeping_operators() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return ONNX translations of the operators that matching decides by, which give ties to the lower position.

    ONNX promises that order for `TopK` and `ArgMax`, but not every runtime keeps it, and `aten.sort.stable` has no
    translation in torch.onnx 2.13. All of them work along the last axis.
    """
    from onnxscript import opset18

    def last(values: Any) -> Any:
        """Return N, of shape (1)."""
        return opset18.Shape(values, start=-1)

    def positions(values: Any) -> Any:
        """Return 0 to N - 1, of shape (N)."""
        zero, one = opset18.Constant(value_int=0), opset18.Constant(value_int=1)
        return opset18.Range(zero, opset18.Squeeze(last(values)), one)

    def first_of(values: Any, best: Any, keepdim: bool) -> Any:
        """Return the lowest position at which `values` (..., N) are equal to `best` (..., 1)."""
        candidates = opset18.Where(opset18.Equal(values, best), positions(values), last(values) - 1)
        return opset18.ReduceMin(candidates, opset18.Constant(value_ints=[-1]), keepdims=int(keepdim))

    def argmax(self, dim=None, keepdim: bool = False):
        best = opset18.ReduceMax(self, opset18.Constant(value_ints=[-1]), keepdims=1)
        return first_of(self, best, keepdim)

    def argmin(self, dim=None, keepdim: bool = False):
        best = opset18.ReduceMin(self, opset18.Constant(value_ints=[-1]), keepdims=1)
        return first_of(self, best, keepdim)

    def max_dim(self, dim: int, keepdim: bool = False):
        best = opset18.ReduceMax(self, opset18.Constant(value_ints=[-1]), keepdims=1)
        axes = opset18.Constant(value_ints=[-1])
        return (best if keepdim else opset18.Squeeze(best, axes)), first_of(self, best, keepdim)

    def sort_stable(self, stable: bool = True, dim: int = -1, descending: bool = False):
        # The rank of a value is the number of values that come before it: unique, so that no sort can reorder it.
        axes = opset18.Constant(value_ints=[-1])
        own, other = opset18.Unsqueeze(self, axes), opset18.Unsqueeze(self, opset18.Constant(value_ints=[-2]))
        place = positions(self)
        lower = opset18.Less(opset18.Unsqueeze(place, opset18.Constant(value_ints=[0])), opset18.Unsqueeze(place, axes))
        before = opset18.Greater(other, own) if descending else opset18.Less(other, own)
        before = opset18.Or(before, opset18.And(opset18.Equal(other, own), lower))
        rank = opset18.ReduceSum(opset18.Cast(before, to=6), axes, keepdims=0)  # 6: int32
        _, order = opset18.TopK(rank, last(self), axis=-1, largest=0, sorted=1)
        return opset18.GatherElements(self, order, axis=-1), order

    return {
        torch.ops.aten.argmax.default: argmax,
        torch.ops.aten.argmin.default: argmin,
        torch.ops.aten.max.dim: max_dim,
        torch.ops.aten.sort.stable: sort_stable,
    }


@torch.no_grad()
def compile_package(module: LogitsModule, inputs: tuple[Tensor, ...], file: Path, dtype: str) -> None:
    """Compile a model with AOTInductor to a package for this kind of processor.

    Args:
        module, inputs, file: as for `export_onnx`.
        dtype: "float32" or "bfloat16", the dtype of weights and activations.
    """
    from torch._inductor import aoti_compile_and_package

    floats = getattr(torch, dtype)
    module = copy.deepcopy(module).to(floats)
    inputs = tuple(each.to(floats) if each.is_floating_point() else each for each in inputs)
    with _quiet():
        program = torch.export.export(module, inputs, dynamic_shapes=module.dynamic_shapes(), strict=False)
        aoti_compile_and_package(program, package_path=str(file))


def keep_onnx(source: Path, file: Path) -> None:
    """Rename an ONNX file, with the file of its weights if these are larger than an ONNX file may be."""
    for path in source.parent.glob(f"{source.name}*"):
        path.rename(file.with_name(path.name.replace(source.name, file.name)))


def quantize(source: Path, file: Path) -> None:
    """Write an ONNX file with weights in int8, and activations quantized while it runs.

    Only products with weights are quantized, so matching compares latents in float32.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(source, file, weight_type=QuantType.QInt8, per_channel=True)


def convert_to_openvino(source: Path, file: Path) -> None:
    """Write an ONNX file as an OpenVINO file, with weights in float32."""
    import openvino

    openvino.save_model(openvino.convert_model(source), file, compress_to_fp16=False)


CONVERTERS: dict[tuple[str, str], Callable[[Path, Path], None]] = {
    ("onnx", "float32"): keep_onnx,
    ("onnx", "int8"): quantize,
    ("openvino", "float32"): convert_to_openvino,
    # The runtime converts the weights when it loads them.
    ("openvino", "bfloat16"): convert_to_openvino,
}
"""Functions from an ONNX file in float32 to the exported file, by format and dtype."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide warnings and log lines of exporters, which do not concern users."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


class ExportedModel(PreTrainedModel):
    """An exported model that is called, and put into a `pipeline`, like the model that it was made from.

    It has no parameters; `forward` runs the exported file on the CPU.
    """

    config_class = PerceiverConfig

    def __init__(self, config: PerceiverConfig, runtime: Runtime, names: tuple[str, ...]):
        super().__init__(config)
        self._runtime, self.input_names = runtime, names

    @classmethod
    def from_pretrained(cls, folder: str | Path, *args: Any, **kwargs: Any) -> ExportedModel:
        """Load the folder of an export.

        Raises:
            BadInput: if the folder holds no exported model, or a package of its runtime is missing.
        """
        folder = Path(folder)
        config = PerceiverConfig.from_pretrained(folder) if (folder / "config.json").is_file() else None
        exported = getattr(config, EXPORTED, None)
        kinds = [(format, dtype) for format, dtypes in DTYPES.items() for dtype in dtypes]
        if not isinstance(exported, dict) or (exported.get("format"), exported.get("dtype")) not in kinds:
            raise BadInput(f"{folder}: holds no exported model; use export.py to make one")
        _import_packages(exported["format"])
        runtime = load_runtime(folder / MODEL_FILES[exported["format"]], exported["format"], exported["dtype"])
        return cls(config, runtime, tuple(exported["inputs"]))

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def forward(self, **inputs: Any) -> PerceiverClassifierOutput:
        """Return the logits, in float32.

        Args:
            inputs: `input_ids` (B, S) and `attention_mask` (B, S), by default all 1; or `pixel_values` (B, 3, height,
                width).
        """
        if "attention_mask" in self.input_names and inputs.get("attention_mask") is None:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        return PerceiverClassifierOutput(logits=self._runtime({name: inputs[name] for name in self.input_names}))


def load_runtime(file: Path, format: str, dtype: str) -> Runtime:
    """Load an exported file, to run on as many threads as torch uses."""
    return {"onnx": _load_onnx, "openvino": _load_openvino, "pt2": _load_package}[format](file, dtype)


def _load_onnx(file: Path, dtype: str) -> Runtime:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(inputs: dict[str, Tensor]) -> Tensor:
        return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])

    return run


def _load_openvino(file: Path, dtype: str) -> Runtime:
    import openvino

    # Without the hint, OpenVINO computes in bfloat16 on every processor that has it.
    options = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(file, "CPU", options)

    def run(inputs: dict[str, Tensor]) -> Tensor:
        # The runtime reuses the memory of its outputs.
        return torch.from_numpy(compiled({name: value.numpy() for name, value in inputs.items()})[0].copy())

    return run


def _load_package(file: Path, dtype: str) -> Runtime:
    from torch._inductor import aoti_load_package

    package, floats = aoti_load_package(str(file)), getattr(torch, dtype)

    def run(inputs: dict[str, Tensor]) -> Tensor:
        return package(*(each.to(floats) if each.is_floating_point() else each for each in inputs.values())).float()

    return run
