# SPDX-License-Identifier: Apache-2.0
"""Draw where in an image or a text the merged latents of a Perceiver look: one PNG file for a few inputs.

Latents attend to the input once, and merge afterwards. So a latent that is left after the last layer looks where all
latents that merged into it look. The picture shows that for each input, the largest latents first.

Three images of a dataset, 4 latents merged in every layer:

  python examples/draw_merging.py --model_name_or_path outputs/fashion_mnist --r 4 \\
      --dataset_name zalando-datasets/fashion_mnist --num_examples 3 --output_file merging.png

Two sentences of your own, with a model for text:

  python examples/draw_merging.py --model_name_or_path deepmind/language-perceiver --r 8 \\
      --texts "The cat sat on the mat." "Nobody knew why." --output_file merging.png

The merging that a budget chooses. With a dataset, it is searched for on --calibration_samples examples of the same
split. Inputs of your own are too few for a search, so they are merged by --schedule, or by 'floor' without it:

  python examples/draw_merging.py --model_name_or_path outputs/fashion_mnist --flops_ratio 0.6 \\
      --dataset_name zalando-datasets/fashion_mnist --num_examples 3 --output_file merging.png

Works with checkpoints for text classification, masked language modelling and image classification, stock or ours.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets.features import Image, Value
from PIL import Image as PilImage
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.image_utils import load_image

# Python adds this script's folder to sys.path, but not the repository root, which holds the modules.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import modeling_tome_perceiver as modeling
from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.command_line import parse_arguments
from experiments.errors import BadInput, exit_on_bad_input, naming
from experiments.files import write_whole
from experiments.merging.arguments import MergeArguments, Samples, apply_fields
from experiments.tasks.reading import read_dataset
from frontier_tome_perceiver import GROUPS
from space.merging_picture import Example, draw_merging, image_example, shortened, text_example

TEXT_CLASSES = ("ToMePerceiverForSequenceClassification", "ToMePerceiverForMaskedLM")
IMAGE_CLASSES = (
    "ToMePerceiverForImageClassificationLearned",
    "ToMePerceiverForImageClassificationFourier",
    "ToMePerceiverForImageClassificationConvProcessing",
)
# Without --split, examples come from the first of these that the dataset has.
DEFAULT_SPLITS = ("validation", "test", "train")

Encode = Callable[[list[Any]], dict[str, Tensor]]
"""Makes a batch of a few texts or images."""


@dataclass
class DrawArguments:
    """Model, inputs and output file. Give exactly one of --images, --texts and --dataset_name."""

    model_name_or_path: str = field(
        metadata={"help": "Hub id or local folder of a checkpoint for text or images, stock Perceiver or ours."}
    )
    output_file: str = field(metadata={"help": "PNG file to write."})
    images: list[str] | None = field(default=None, metadata={"help": "Image files to draw."})
    texts: list[str] | None = field(default=None, metadata={"help": "Texts to draw, each in quotes."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id or local folder of a dataset to draw examples of."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    split: str | None = field(
        default=None, metadata={"help": f"Split of the dataset (default: the first of {', '.join(DEFAULT_SPLITS)})."}
    )
    column_name: str | None = field(
        default=None, metadata={"help": "Column with the images or texts (default: the only one of that type)."}
    )
    num_examples: int = field(default=3, metadata={"help": "Draw this many examples, the first of the dataset."})
    max_length: int = field(
        default=128,
        metadata={"help": "Cut texts to this many tokens, special ones included, so that they stay readable."},
    )


def main() -> None:
    arguments, merge_arguments = parse_arguments(__doc__, DrawArguments, MergeArguments)
    output_file = Path(arguments.output_file)
    if output_file.suffix != ".png" or output_file.is_dir():
        raise BadInput(f"--output_file {output_file}: must be a file name that ends in .png")
    check_inputs(arguments)
    model = load_model(arguments, merge_arguments.config_fields())
    prepare_inputs = prepare_images if type(model).__name__ in IMAGE_CLASSES else prepare_texts
    inputs, encode, read = prepare_inputs(model, arguments)
    count = len(inputs) if arguments.dataset_name is None else arguments.num_examples
    choose_merging(model, merge_arguments, inputs, encode, count)
    examples = [read(index, given) for index, given in enumerate(inputs[:count])]
    config = model.config
    with naming(f"--output_file {output_file}", OSError):
        output_file.parent.mkdir(parents=True, exist_ok=True)
        title = picture_title(arguments.model_name_or_path, config)
        figure = draw_merging(title, [config.num_latents, *config.latents_per_layer], examples)
        write_whole(output_file, lambda partial: figure.savefig(partial, dpi=110, format="png"))
    print(output_file)


def check_inputs(arguments: DrawArguments) -> None:
    """Check that exactly one kind of inputs is given.

    Raises:
        BadInput: naming the wrong argument, its value and what to use.
    """
    names = ("images", "texts", "dataset_name")
    given = [name for name in names if getattr(arguments, name) is not None]
    if len(given) != 1:
        described = " and ".join(f"--{name}" for name in given) or "no inputs"
        raise BadInput(f"{described}: use exactly one of --images, --texts and --dataset_name")
    if arguments.num_examples < 1:
        raise BadInput(f"--num_examples {arguments.num_examples}: must be 1 or more")
    if arguments.dataset_name is None:
        for name in ("dataset_config_name", "split", "column_name"):
            if getattr(arguments, name) is not None:
                raise BadInput(f"--{name} {getattr(arguments, name)}: needs --dataset_name")


def load_model(arguments: DrawArguments, merging: dict[str, Any]) -> modeling.ToMePerceiverPreTrainedModel:
    """Load a checkpoint in evaluation mode, in the ToMe class of its architecture.

    Args:
        arguments: the checkpoint, and the kind of inputs that it must read.
        merging: merging fields of the config, from `MergeArguments.config_fields`.

    Raises:
        BadInput: if the checkpoint does not exist, reads other inputs, or does not support the merging settings.
    """
    name = arguments.model_name_or_path
    with naming(f"--model_name_or_path {name}", OSError, ValueError):
        config = ToMePerceiverConfig.from_pretrained(name)
    architecture = (config.architectures or ["no architecture"])[0]
    class_name = f"ToMe{architecture.removeprefix('ToMe')}"
    if class_name not in TEXT_CLASSES + IMAGE_CLASSES:
        known_names = ", ".join(known.removeprefix("ToMe") for known in TEXT_CLASSES + IMAGE_CLASSES)
        raise BadInput(f"--model_name_or_path {name}: has architecture {architecture}; choose from {known_names}")
    if arguments.images is not None and class_name not in IMAGE_CLASSES:
        raise BadInput(f"--images: {name} is a model for text ({architecture}); use --texts or --dataset_name")
    if arguments.texts is not None and class_name not in TEXT_CLASSES:
        raise BadInput(f"--texts: {name} is a model for images ({architecture}); use --images or --dataset_name")
    apply_fields(config, merging)
    with naming(f"--model_name_or_path {name}", OSError, RuntimeError):
        return getattr(modeling, class_name).from_pretrained(name, config=config).eval()


def choose_merging(
    model: modeling.ToMePerceiverPreTrainedModel,
    merging: MergeArguments,
    inputs: Sequence[Any],
    encode: Encode,
    count: int,
) -> None:
    """If a budget is given, set the merging that it chooses in the model's config.

    Args:
        model: the model to merge.
        merging: merging arguments, with or without a budget.
        inputs: texts or images; the search uses them if there are more than `count`.
        encode: makes a batch of inputs.
        count: number of inputs that are drawn, the first ones; FLOPs are counted for them.

    Raises:
        BadInput: if the budget is out of reach, or the inputs are too few for a search.
    """
    if not merging.has_budget:
        return
    shapes = [batch_shape(encode([given])) for given in inputs[:count]]

    def take(wanted: int, batch_size: int) -> list[dict[str, Tensor]]:
        chosen = inputs[:wanted]
        return [encode(chosen[start : start + batch_size]) for start in range(0, len(chosen), batch_size)]

    samples = Samples(take, len(inputs), "examples of the dataset", unseen=True)
    if len(inputs) <= count:
        for name in ("merge_method", "max_changed"):
            if (value := getattr(merging, name)) is not None and (name == "max_changed" or value == GROUPS):
                raise BadInput(f"--{name} {value}: needs --dataset_name, with more than --num_examples examples")
        merging = merging.without_samples
    if merging.calibrates:
        sampled = merging.sample_count(model, samples, max(shapes))
        merging.calibrate(model, samples, sampled, max(shapes))
    print(merging.choose(model, samples, max(shapes)), file=sys.stderr)


def batch_shape(batch: dict[str, Tensor]) -> tuple[int, ...]:
    """Return the shape of a batch's inputs, (B, S) or (B, 3, height, width)."""
    return tuple(next(iter(batch.values())).shape)


def prepare_images(
    model: modeling.ToMePerceiverPreTrainedModel, arguments: DrawArguments
) -> tuple[Sequence[Any], Encode, Callable[[int, Any], Example]]:
    """Return the images to draw, a function that makes a batch, and one that makes the `Example` of one input.

    Raises:
        BadInput: if an image is missing. The two functions raise it for images of a size that the model cannot read.
    """
    name = arguments.model_name_or_path
    with naming(f"image processor of --model_name_or_path {name}", OSError, ValueError):
        processor = AutoImageProcessor.from_pretrained(name)
    files = arguments.images
    images = load_examples(arguments, Image) if files is None else [read_image(path) for path in files]

    def encode(some_images: list[Any]) -> dict[str, Tensor]:
        with naming(f"images as the image processor of {name} makes them", ValueError):
            return dict(processor([load_image(image) for image in some_images], return_tensors="pt"))

    def read(index: int, image: Any) -> Example:
        called = f"image {index}" if files is None else Path(files[index]).name
        with naming(f"{called} as the image processor of {name} makes it", ValueError):
            return image_example(model, processor, called, image)

    return images, encode, read


def read_image(path: str) -> PilImage.Image:
    """Read an image file as transformers pipelines do.

    Raises:
        BadInput: if the file is missing or is not an image.
    """
    with naming(f"--images {path}", OSError), PilImage.open(path) as image:
        return load_image(image)


def prepare_texts(
    model: modeling.ToMePerceiverPreTrainedModel, arguments: DrawArguments
) -> tuple[Sequence[str], Encode, Callable[[int, str], Example]]:
    """Return the texts to draw, a function that makes a batch, and one that makes the `Example` of one input.

    Raises:
        BadInput: if the tokenizer or a text is missing.
    """
    name, length = arguments.model_name_or_path, arguments.max_length
    if length < 3:
        raise BadInput(f"--max_length {length}: must be 3 or more")
    # With `config`, AutoTokenizer does not ask whether to run the code in the checkpoint.
    with naming(f"tokenizer of --model_name_or_path {name}", OSError, ValueError, KeyError):
        tokenizer = AutoTokenizer.from_pretrained(name, config=model.config, trust_remote_code=False)
    texts = load_examples(arguments, Value) if arguments.texts is None else arguments.texts
    if not all(texts[: arguments.num_examples if arguments.texts is None else None]):
        raise BadInput("a text is empty; use texts of one character or more")

    def encode(some_texts: list[str]) -> dict[str, Tensor]:
        longest = min(length, model.config.max_position_embeddings)
        return dict(tokenizer(some_texts, truncation=True, max_length=longest, padding=True, return_tensors="pt"))

    return texts, encode, lambda index, text: text_example(model, tokenizer, text, length)


def load_examples(arguments: DrawArguments, kind: type) -> Sequence[Any]:
    """Return a lazily read column of the dataset: images if `kind` is `Image`, texts if it is `Value`.

    Raises:
        BadInput: if the dataset, split or column does not exist, or the split is empty.
    """
    name, config_name = arguments.dataset_name, arguments.dataset_config_name
    splits = read_dataset(f"--dataset_name {name}", name, config_name, overwrite_cache=False)
    split = arguments.split or next((split for split in DEFAULT_SPLITS if split in splits), None)
    if split not in splits:
        raise BadInput(f"--split {split}: is no split of {name}; choose from {', '.join(map(str, splits))}")
    dataset = splits[split]
    fitting = [
        column
        for column, feature in dataset.features.items()
        if isinstance(feature, kind) and (kind is Image or feature.dtype in ("string", "large_string"))
    ]
    column = arguments.column_name or (fitting[0] if len(fitting) == 1 else None)
    if column not in fitting:
        what = "images" if kind is Image else "texts"
        raise BadInput(f"--column_name {column}: must be one of the columns of {name} with {what}: {fitting}")
    if len(dataset) == 0:
        raise BadInput(f"--split {split}: has no examples")
    return dataset[column]


def picture_title(name: str, config: ToMePerceiverConfig) -> str:
    """Return the title: the model, its merging and the number of latents left."""
    if config.merge_groups is not None:
        merging = "fixed groups"
    elif isinstance(config.r, int):
        merging = f"r = {config.r}"
    else:
        merging = f"r = {shortened(str(list(config.r)))}"
    if config.merge_groups is None and config.merge_method != "bipartite":
        merging += f" ({config.merge_method})"
    if config.latent_groups is not None:
        merging = f"{config.latents_at_start} groups, then {merging}"
    model = Path(name).resolve().name if Path(name).is_dir() else name
    return f"{model}, {merging}: {config.latents_per_layer[-1]} of {config.num_latents} latents left"


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
