# SPDX-License-Identifier: Apache-2.0
"""Draw what the merged latents of a Perceiver read: one PNG file, for a few images or texts.

Latents read the input once, then merge. A latent that is left at the end therefore reads what all the latents that it
stands for read; for each input the picture shows where that is, the largest latents first.

Three images of a dataset, 4 latents merged in every layer:

  python examples/draw_merging.py --model_name_or_path outputs/fashion_mnist --r 4 \\
      --dataset_name zalando-datasets/fashion_mnist --num_examples 3 --output_file merging.png

Two sentences of your own, with a model for text:

  python examples/draw_merging.py --model_name_or_path deepmind/language-perceiver --r 8 \\
      --texts "The cat sat on the mat." "Nobody knew why." --output_file merging.png

What a budget chooses: with a dataset it is searched for on --calibration_samples of the split that the examples are
from; for inputs of your own, which are too few for that, the schedule is 'floor', unless --schedule is another one:

  python examples/draw_merging.py --model_name_or_path outputs/fashion_mnist --flops_ratio 0.6 \\
      --dataset_name zalando-datasets/fashion_mnist --num_examples 3 --output_file merging.png

Checkpoints for text classification, masked language modelling and image classification, stock Perceiver or ours.
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

# A script's own folder is on the path, the repository's root, where the modules are, is not.
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
# Where examples come from if --split is not given, as far as the dataset has it.
SPLITS = ("validation", "test", "train")

Encode = Callable[[list[Any]], dict[str, Tensor]]
"""From a few texts or images to a batch."""


@dataclass
class DrawArguments:
    """What to draw and where to. One of --images, --texts and --dataset_name is needed."""

    model_name_or_path: str = field(
        metadata={"help": "Hub id or local folder of a checkpoint for text or images, stock Perceiver or ours."}
    )
    output_file: str = field(metadata={"help": "The picture to write, a PNG file."})
    images: list[str] | None = field(default=None, metadata={"help": "Image files."})
    texts: list[str] | None = field(default=None, metadata={"help": "Texts, each in quotes."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id or local folder, as `datasets.load_dataset` takes it."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    split: str | None = field(
        default=None, metadata={"help": f"Split of the dataset; by default the first there is of {', '.join(SPLITS)}."}
    )
    column_name: str | None = field(
        default=None, metadata={"help": "Column with the images or texts; by default the only one of that type."}
    )
    num_examples: int = field(default=3, metadata={"help": "Draw the first so many of the dataset."})
    max_length: int = field(
        default=128, metadata={"help": "Texts are cut to so many tokens, special ones included, to stay readable."}
    )


def main() -> None:
    arguments, merge_arguments = parse_arguments(__doc__, DrawArguments, MergeArguments)
    output_file = Path(arguments.output_file)
    if output_file.suffix != ".png" or output_file.is_dir():
        raise BadInput(f"--output_file {output_file}: allowed is a file that ends in .png")
    check_inputs(arguments)
    model = load_model(arguments, merge_arguments.config_fields())
    drawn = drawn_images if type(model).__name__ in IMAGE_CLASSES else drawn_texts
    inputs, encode, read = drawn(model, arguments)
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
    """Check that there is exactly one kind of inputs, and some.

    Raises:
        BadInput: naming the argument, its value and what is allowed.
    """
    names = ("images", "texts", "dataset_name")
    given = [name for name in names if getattr(arguments, name) is not None]
    if len(given) != 1:
        described = " and ".join(f"--{name}" for name in given) or "no inputs"
        raise BadInput(f"{described}: allowed is exactly one of --images, --texts and --dataset_name")
    if arguments.num_examples < 1:
        raise BadInput(f"--num_examples {arguments.num_examples}: allowed is an integer of 1 or more")
    if arguments.dataset_name is None:
        for name in ("dataset_config_name", "split", "column_name"):
            if getattr(arguments, name) is not None:
                raise BadInput(f"--{name} {getattr(arguments, name)}: allowed only with --dataset_name")


def load_model(arguments: DrawArguments, merging: dict[str, Any]) -> modeling.ToMePerceiverPreTrainedModel:
    """The checkpoint in evaluation mode, as our class of the name that it was saved with.

    Args:
        arguments: which checkpoint, and which inputs it must take.
        merging: fields of the config, as `MergeArguments.config_fields` gives them.

    Raises:
        BadInput: for a checkpoint that is not there or is not for such inputs, or merging that it cannot do.
    """
    name = arguments.model_name_or_path
    with naming(f"--model_name_or_path {name}", OSError, ValueError):
        config = ToMePerceiverConfig.from_pretrained(name)
    architecture = (config.architectures or ["no architecture"])[0]
    class_name = f"ToMe{architecture.removeprefix('ToMe')}"
    if class_name not in TEXT_CLASSES + IMAGE_CLASSES:
        allowed = ", ".join(known.removeprefix("ToMe") for known in TEXT_CLASSES + IMAGE_CLASSES)
        raise BadInput(f"--model_name_or_path {name}: is of {architecture}; allowed are {allowed}")
    if arguments.images is not None and class_name not in IMAGE_CLASSES:
        raise BadInput(f"--images: {name} is a model for text ({architecture}); allowed are --texts and --dataset_name")
    if arguments.texts is not None and class_name not in TEXT_CLASSES:
        raise BadInput(f"--texts: {name} is a model for images ({architecture}); allowed are --images, --dataset_name")
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
    """With a budget, set what it chooses.

    Args:
        model: whose config it is.
        merging: which budget, if any.
        inputs: texts or images, to search on if there are more than are drawn.
        encode: makes a batch of some.
        count: of those, the first, that are drawn, and that FLOPs are for.

    Raises:
        BadInput: if the budget cannot be kept to, or the inputs are too few to search on.
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
                raise BadInput(f"--{name} {value}: needs --dataset_name, with more examples than are drawn")
        merging = merging.without_samples
    if merging.calibrates:
        sampled = merging.sample_count(model, samples, max(shapes))
        merging.calibrate(model, samples, sampled, max(shapes))
    print(merging.choose(model, samples, max(shapes)), file=sys.stderr)


def batch_shape(batch: dict[str, Tensor]) -> tuple[int, ...]:
    """Of the tensor that is read: (B, S) or (B, 3, height, width)."""
    return tuple(next(iter(batch.values())).shape)


def drawn_images(
    model: modeling.ToMePerceiverPreTrainedModel, arguments: DrawArguments
) -> tuple[Sequence[Any], Encode, Callable[[int, Any], Example]]:
    """The images that the arguments mean, what makes a batch of some, and what has the model read one.

    Raises:
        BadInput: for images that are not there; the last two, for those of a size that the model cannot read.
    """
    name = arguments.model_name_or_path
    with naming(f"image processor of --model_name_or_path {name}", OSError, ValueError):
        processor = AutoImageProcessor.from_pretrained(name)
    files = arguments.images
    images = load_examples(arguments, Image) if files is None else [read_image(path) for path in files]

    def encode(few: list[Any]) -> dict[str, Tensor]:
        with naming(f"images as the image processor of {name} makes them", ValueError):
            return dict(processor([load_image(image) for image in few], return_tensors="pt"))

    def read(index: int, image: Any) -> Example:
        called = f"image {index}" if files is None else Path(files[index]).name
        with naming(f"{called} as the image processor of {name} makes it", ValueError):
            return image_example(model, processor, called, image)

    return images, encode, read


def read_image(path: str) -> PilImage.Image:
    """Return an image file as a pipeline reads it.

    Raises:
        BadInput: for a file that is not there or no image.
    """
    with naming(f"--images {path}", OSError), PilImage.open(path) as image:
        return load_image(image)


def drawn_texts(
    model: modeling.ToMePerceiverPreTrainedModel, arguments: DrawArguments
) -> tuple[Sequence[str], Encode, Callable[[int, str], Example]]:
    """The texts that the arguments mean, what makes a batch of some, and what has the model read one.

    Raises:
        BadInput: for a tokenizer or texts that are not there.
    """
    name, length = arguments.model_name_or_path, arguments.max_length
    if length < 3:
        raise BadInput(f"--max_length {length}: allowed is an integer of 3 or more")
    # With the config at hand: what looks for it itself asks whether to run the code that our checkpoints carry.
    with naming(f"tokenizer of --model_name_or_path {name}", OSError, ValueError, KeyError):
        tokenizer = AutoTokenizer.from_pretrained(name, config=model.config, trust_remote_code=False)
    texts = load_examples(arguments, Value) if arguments.texts is None else arguments.texts
    if not all(texts[: arguments.num_examples if arguments.texts is None else None]):
        raise BadInput("a text is empty; allowed are texts of one character or more")

    def encode(few: list[str]) -> dict[str, Tensor]:
        longest = min(length, model.config.max_position_embeddings)
        return dict(tokenizer(few, truncation=True, max_length=longest, padding=True, return_tensors="pt"))

    return texts, encode, lambda index, text: text_example(model, tokenizer, text, length)


def load_examples(arguments: DrawArguments, kind: type) -> Sequence[Any]:
    """The images (`kind` is `Image`) or texts (`Value`) of the dataset, each read when it is asked for.

    Raises:
        BadInput: for a dataset, split or column that is not there, or an empty split.
    """
    name, config_name = arguments.dataset_name, arguments.dataset_config_name
    there = read_dataset(f"--dataset_name {name}", name, config_name, overwrite_cache=False)
    split = arguments.split or next((split for split in SPLITS if split in there), None)
    if split not in there:
        raise BadInput(f"--split {split}: allowed are the splits of {name}, {', '.join(map(str, there))}")
    dataset = there[split]
    fitting = [
        column
        for column, feature in dataset.features.items()
        if isinstance(feature, kind) and (kind is Image or feature.dtype in ("string", "large_string"))
    ]
    column = arguments.column_name or (fitting[0] if len(fitting) == 1 else None)
    if column not in fitting:
        what = "images" if kind is Image else "texts"
        raise BadInput(f"--column_name {column}: allowed are the columns of {name} with {what}, here {fitting}")
    if len(dataset) == 0:
        raise BadInput(f"--split {split}: has no examples")
    return dataset[column]


def picture_title(name: str, config: ToMePerceiverConfig) -> str:
    """The model, how it merges and how many latents are left."""
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
