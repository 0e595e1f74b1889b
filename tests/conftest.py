# SPDX-License-Identifier: Apache-2.0
"""Fixtures and settings of all tests: no network, one thread, no progress bars, fixed seeds, no deadlines."""

import os
import shutil
import tempfile
from dataclasses import replace

from tests.support.script_run import isolated_environment

# Each run gets new caches, because `datasets` caches a folder by its name.
os.environ |= isolated_environment(tempfile.mkdtemp(prefix="home-"))

import pytest
import torch
import transformers
from hypothesis import settings

from benchmarks.published_models import PUBLISHED_MODELS
from tests.support.tiny_models import SIZES

# Folders, files and tests that `make test-fast` skips: they compile, start processes or train whole runs.
SLOW = (
    "benchmarks/",
    "examples/",
    "fuzzing/test_arguments.py",
    "documents/",
    "reliability/",
    "runs/",
    "space/test_app.py",
    "model/test_device_map.py",
    "model/test_modeling_execution.py",
    "model/test_remote_code.py",
    "publishing/test_hub",
    "training/test_distributed.py",
    "training/test_loading.py",
    "training/test_output_folder.py",
    "training/test_peft.py",
    "training/test_progress.py",
    "training/test_resume.py",
    "model/test_call_r.py::test_compiled_layers_and_a_compiled_model_accept_r",
    "model/test_modeling_tome_perceiver.py::test_gradient_accumulation_gives_the_loss_and_gradient_norm_of_one_batch",
    "test_soak.py",
    "test_security.py",
    "test_errors.py::test_a_fault_of_the_program_keeps_its_traceback_and_is_called_one",
    "training/test_elastic.py::test_a_sweep_trains_once_for_all_rows",
    "training/test_trainer_arguments.py::test_arguments_of_many_kinds_work_together",
)

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
settings.register_profile("tome", deadline=None, max_examples=60)
settings.load_profile("tome")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark slow tests before `-m` selects."""
    for item in items:
        if item.nodeid.removeprefix("tests/").startswith(SLOW):
            item.add_marker(pytest.mark.slow)


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
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture
def tiny_published(monkeypatch):
    """Replace the published models of the benchmarks by tiny ones."""
    fields = SIZES | {"max_position_embeddings": 128}
    fewer_layers = {"num_blocks": 1, "num_self_attends_per_block": 2}
    for name, model in PUBLISHED_MODELS.items():
        monkeypatch.setitem(PUBLISHED_MODELS, name, replace(model, fields=fields, fewer_layers=fewer_layers))
