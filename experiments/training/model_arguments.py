# SPDX-License-Identifier: Apache-2.0
"""Arguments that choose the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from datasets.config import HF_DATASETS_CACHE
from transformers.hf_argparser import HfArg

from experiments.files import check_writable


@dataclass
class ModelArguments:
    """The model: a checkpoint, or a small one from scratch."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str | None = HfArg(
        default=None, help="Hub id or local folder of a checkpoint, stock Perceiver or ours. Without it: from scratch."
    )
    config_name: str | None = HfArg(
        default=None, help="For a model from scratch: a JSON file with its config, or a checkpoint to take it from."
    )
    config_overrides: str | None = HfArg(
        default=None, help="Changes to the config of a model from scratch: num_latents=64,d_latents=128,..."
    )
    tokenizer_name: str | None = HfArg(default=None, help="Tokenizer, if it is not that of --model_name_or_path.")
    image_processor_name: str | None = HfArg(
        default=None, help="Image processor, if it is not that of --model_name_or_path."
    )
    cache_dir: str | None = HfArg(default=None, help="Folder for downloads from the Hub.")
    model_revision: str = HfArg(default="main", help="Branch, tag or commit of the checkpoint.")
    token: str | None = HfArg(
        default=None, help="Token for gated or private repositories; by default the one of `hf auth login`."
    )
    trust_remote_code: bool = HfArg(
        default=False,
        help="Run a tokenizer's or image processor's own code. The model's is always this repository's.",
    )
    code_revision: str | None = HfArg(
        default=None, help="Branch, tag or commit of that code, if it is in a repository of its own."
    )
    ignore_mismatched_sizes: bool = HfArg(
        default=False, help="Start a head of another size anew, for a checkpoint finetuned on other labels."
    )

    def __post_init__(self) -> None:
        if self.cache_dir is not None:
            check_writable(f"--cache_dir {self.cache_dir}", Path(self.cache_dir))
        else:
            check_writable(f"HF_DATASETS_CACHE={HF_DATASETS_CACHE}", Path(HF_DATASETS_CACHE))

    def download_options(self) -> dict[str, Any]:
        """Return the keywords of every `from_pretrained`."""
        return {"cache_dir": self.cache_dir, "revision": self.model_revision, "token": self.token}

    def dataset_options(self) -> dict[str, Any]:
        """Return the keywords of `datasets.load_dataset`."""
        return {"cache_dir": self.cache_dir, "token": self.token}
