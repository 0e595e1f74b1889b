# SPDX-License-Identifier: Apache-2.0
"""Load a finetuned text or image classifier, read its inputs, and answer batches of them.

Used by serve.py and label_with_ray.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer

import modeling_tome_perceiver as modeling
from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.errors import BadInput, naming
from experiments.tasks.image_files import open_image, read_image
from experiments.training.loading import used_weights

Inputs = dict[str, Tensor]
"""Arguments of the model for one input, without a batch dimension."""
Prediction = dict[str, Any]
"""`label`, the likeliest class, and `score`, its probability; of a regression, the score is the number."""

TEXT_ARCHITECTURE, IMAGE_ARCHITECTURE = "ForSequenceClassification", "ForImageClassification"


class Classifier:
    """A model with its tokenizer or image processor.

    Args:
        name: Hub id or folder of the checkpoint. The model runs this repository's code, not the checkpoint's.
        trust_remote_code: whether the tokenizer or image processor may run code from the checkpoint.
        device: device of the model.
        max_pixels: largest number of pixels of an image.

    Attributes:
        takes_images: whether inputs are images; otherwise texts or pairs of texts.
        input_shape: shape of the longest text, (1, S), or of an image after preprocessing, (1, 3, height, width).

    Raises:
        BadInput: for a checkpoint that is missing, incomplete or no classifier.
    """

    def __init__(
        self, name: str, trust_remote_code: bool = False, device: str = "cpu", max_pixels: int = 50_000_000
    ) -> None:
        self.name, self.device, self.max_pixels = name, device, max_pixels
        with naming(f"--model_name_or_path {name}", Exception):
            config = ToMePerceiverConfig.from_pretrained(name)
            config.check_labels()
            self.model = _load_model(name, config)
            self.takes_images = IMAGE_ARCHITECTURE in type(self.model).__name__
            processors = AutoImageProcessor if self.takes_images else AutoTokenizer
            # Without `config`, AutoTokenizer asks whether to trust the code of the model.
            self.processor = processors.from_pretrained(
                name, config=self.model.config, trust_remote_code=trust_remote_code
            )
        with naming(f"--device {device}", RuntimeError, AssertionError):
            self.model.to(device)
        self.config = self.model.config
        self.input_shape: tuple[int, ...] = (1, self.config.max_position_embeddings)
        if self.takes_images:
            blank = Image.new("RGB", (self.config.image_size, self.config.image_size))
            self.input_shape = (1, *self._preprocess(blank).shape)
        # Fail at the start, not at the first request, if the processor does not fit the model.
        with naming(f"--model_name_or_path {name}", ValueError, RuntimeError, IndexError):
            self.classify([{"pixel_values": self._preprocess(blank)} if self.takes_images else self.read_text("a")])

    def read_text(self, text: str | Sequence[str]) -> Inputs:
        """Tokenize a text or a pair of texts.

        Raises:
            ValueError: for an empty text, or one with more tokens than the model has positions.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if not all(each.strip() for each in texts):
            raise ValueError("is empty; must have text")
        tokens = self.processor(*texts, return_attention_mask=True, verbose=False)
        if (length := len(tokens["input_ids"])) > (longest := self.config.max_position_embeddings):
            raise ValueError(f"has {length} tokens; must have at most {longest}")
        return {name: torch.tensor(tokens[name]) for name in ("input_ids", "attention_mask")}

    def read_image(self, data: bytes) -> Inputs:
        """Decode and preprocess an image file.

        Raises:
            BadInput: for data that are not an image, or an image that is transparent or has more than 8 bits a channel.
            ValueError: for too many pixels, or another shape than `input_shape` after preprocessing.
        """
        stored = {"bytes": data, "path": None}
        with open_image(stored, "file") as image:
            # The header alone tells the size, so a huge image is never decoded.
            if (pixels := math.prod(image.size)) > self.max_pixels:
                raise BadInput(f"image has {pixels:,} pixels; must have at most {self.max_pixels:,}")
        pixel_values = self._preprocess(read_image(stored, "file"))
        if pixel_values.shape != self.input_shape[1:]:
            raise ValueError(f"image has shape {tuple(pixel_values.shape)}; must have {self.input_shape[1:]}")
        return {"pixel_values": pixel_values}

    def _preprocess(self, image: Image.Image) -> Tensor:
        return self.processor(image, return_tensors="pt")["pixel_values"][0]

    def collate(self, batch: Sequence[Inputs]) -> Inputs:
        """Return the arguments of the model for a batch; texts are padded to the longest."""
        if self.takes_images:
            return {"pixel_values": torch.stack([each["pixel_values"] for each in batch])}
        return dict(self.processor.pad(list(batch), return_tensors="pt"))

    @torch.inference_mode()
    def classify(self, batch: Sequence[Inputs]) -> list[Prediction]:
        """Answer a batch under the merging settings of the config.

        Raises:
            FloatingPointError: if outputs are not finite.
        """
        inputs = {name: value.to(self.device) for name, value in self.collate(batch).items()}
        logits = self.model(**inputs).logits.float().cpu()
        if not logits.isfinite().all():
            raise FloatingPointError("the outputs are not finite; the weights of the model are damaged")
        if self.config.problem_type == "multi_label_classification":
            scores = logits.sigmoid()
        else:
            scores = logits if self.config.num_labels == 1 else logits.softmax(dim=-1)
        best = scores.max(dim=-1)
        return [
            {"label": self.config.id2label[index], "score": score}
            for index, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]


def _load_model(name: str, config: ToMePerceiverConfig) -> Any:
    """Load the weights into the merging class of the checkpoint's architecture.

    Raises:
        ValueError: for another architecture than a text or image classifier, or for missing weights.
    """
    architecture = (config.architectures or ["unknown"])[0].removeprefix("ToMe")
    model_class = getattr(modeling, f"ToMe{architecture}", None)
    if model_class is None or not (TEXT_ARCHITECTURE in architecture or IMAGE_ARCHITECTURE in architecture):
        raise ValueError(f"its architecture is {architecture}; must be a Perceiver for text or image classification")
    model, loaded = model_class.from_pretrained(name, config=config, output_loading_info=True)
    if missing := used_weights(loaded["missing_keys"]):
        raise ValueError(f"its weights lack {missing[0]}; use a finetuned checkpoint with complete weights")
    return model.eval()
