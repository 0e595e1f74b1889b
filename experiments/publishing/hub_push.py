# SPDX-License-Identifier: Apache-2.0
"""Pushing what is on disk: the card learns where it goes, then the folder goes there."""

from __future__ import annotations

from pathlib import Path

from experiments.publishing.card import address_card
from experiments.publishing.hub import HubRepository, push_checkpoint


def push_addressed(repository: HubRepository, folder: Path, message: str, revision: str = "main") -> str:
    """Push a checkpoint whose card shows how to load it from the repository; else as `push_checkpoint`."""
    address_card(folder, repository.repo_id)
    return push_checkpoint(repository, folder, message, revision)
