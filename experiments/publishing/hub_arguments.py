# SPDX-License-Identifier: Apache-2.0
"""The arguments that say whether and where to push, beside those that `TrainingArguments` has."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from huggingface_hub.constants import HF_HUB_DISABLE_XET, HF_XET_CACHE
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from experiments.errors import BadInput
from experiments.files import check_writable
from experiments.publishing.hub import HubRepository, open_repository

BRANCH = r"(?!.*\.\.)\w[\w./-]*(?<![./])"


@dataclass
class HubArguments:
    """Pushing. What is pushed is on disk first, and goes in one commit for each checkpoint when all is done."""

    _argument_group_name: ClassVar[str] = "pushing to the Hub"

    push_only: bool = field(
        default=False,
        metadata={"help": "Push what an earlier run left in --output_dir, and do nothing else."},
    )


def check_push(training: TrainingArguments, token: str | None) -> HubRepository | None:
    """With `--push_to_hub`, make sure before any work that pushing is going to work.

    Args:
        training: `push_to_hub`, `hub_model_id`, `hub_token`, `hub_private_repo`.
        token: of `--token`, if there is no `--hub_token`.

    Raises:
        BadInput: if it is not.
    """
    return open_to_push(training, token) if training.push_to_hub else None


def open_to_push(training: TrainingArguments, token: str | None) -> HubRepository:
    """The repository that `--hub_model_id` names, by default after `--output_dir`.

    Raises:
        BadInput: if it cannot be written to, or `--hub_revision` is no name of a branch.
    """
    if training.hub_strategy not in (HubStrategy.EVERY_SAVE, HubStrategy.END):
        raise BadInput(
            f"--hub_strategy {training.hub_strategy.value}: allowed is 'end'; checkpoints to resume from stay on disk"
        )
    revision = training.hub_revision
    if revision is not None and not re.fullmatch(BRANCH, revision):
        raise BadInput(
            f"--hub_revision {revision}: allowed is the name of a branch: letters, digits, '.', '_', '-', '/'"
        )
    if not HF_HUB_DISABLE_XET:
        # What is pushed is cut into pieces there.
        check_writable(f"HF_XET_CACHE={HF_XET_CACHE}", Path(HF_XET_CACHE))
    output_dir = Path(training.output_dir)
    return open_repository(training.hub_model_id, output_dir, training.hub_token or token, training.hub_private_repo)
