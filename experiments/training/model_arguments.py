# SPDX-License-Identifier: Apache-2.0
"""Command line arguments that choose the model and the source of its downloads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from datasets.config import HF_DATASETS_CACHE
from transformers.hf_argparser import HfArg

from experiments.files import check_writable


@dataclass
class ModelArguments:
    """Model to use: a checkpoint, or a new model from scratch."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str | None = HfArg(
        default=None,
        help="Hub id or local folder of a checkpoint: a stock Perceiver or a ToMe Perceiver. Default: a model from "
        "scratch.",
    )
    config_name: str | None = HfArg(
        default=None, help="For a model from scratch: JSON file with its config, or a checkpoint whose config to use."
    )
    config_overrides: str | None = HfArg(
        default=None, help="For a model from scratch: changes to its config, as num_latents=64,d_latents=128."
    )
    tokenizer_name: str | None = HfArg(default=None, help="Tokenizer (default: that of --model_name_or_path).")
    image_processor_name: str | None = HfArg(
        default=None, help="Image processor (default: that of --model_name_or_path)."
    )
    cache_dir: str | None = HfArg(default=None, help="Folder for downloads from the Hub.")
    model_revision: str = HfArg(default="main", help="Branch, tag or commit of the checkpoint.")
    token: str | None = HfArg(
        default=None, help="Token for gated or private repositories (default: that of `hf auth login`)."
    )
    trust_remote_code: bool = HfArg(
        default=False,
        help="Allow tokenizers and image processors to run code from their repository. The model never does.",
    )
    code_revision: str | None = HfArg(
        default=None, help="Branch, tag or commit of that code, if it is in another repository."
    )
    ignore_mismatched_sizes: bool = HfArg(
        default=False, help="Replace the head of a checkpoint that was finetuned on other labels by a new one."
    )

    def __post_init__(self) -> None:
        if self.cache_dir is not None:
            check_writable(f"--cache_dir {self.cache_dir}", Path(self.cache_dir))
        else:
            check_writable(f"HF_DATASETS_CACHE={HF_DATASETS_CACHE}", Path(HF_DATASETS_CACHE))

    def download_options(self) -> dict[str, Any]:
        """Return the keyword arguments for every `from_pretrained`."""
        return {"cache_dir": self.cache_dir, "revision": self.model_revision, "token": self.token}

    def dataset_options(self) -> dict[str, Any]:
        """Return the keyword arguments for `datasets.load_dataset`."""
        return {"cache_dir": self.cache_dir, "token": self.token}
