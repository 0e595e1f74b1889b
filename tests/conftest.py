# SPDX-License-Identifier: Apache-2.0
"""Settings for every test: no network, one thread, no progress bars, seeded, and hypothesis without deadlines."""

import os
import shutil
import tempfile
from dataclasses import replace

os.environ["HF_HUB_OFFLINE"] = "1"
# What `datasets` remembers of folders of the same name must not come from another run.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="datasets-")
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import pytest
import torch
import transformers
from hypothesis import settings

from benchmarks.published_models import PUBLISHED_MODELS
from tests.support.tiny_models import SIZES

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
settings.register_profile("tome", deadline=None, max_examples=60)
settings.load_profile("tome")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def cache_removed_at_the_end():
    yield
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@pytest.fixture
def tiny_published(monkeypatch):
    """Tiny models in place of the published ones."""
    fields = SIZES | {"max_position_embeddings": 128}
    fewer_layers = {"num_blocks": 1, "num_self_attends_per_block": 2}
    for name, model in PUBLISHED_MODELS.items():
        monkeypatch.setitem(PUBLISHED_MODELS, name, replace(model, fields=fields, fewer_layers=fewer_layers))
