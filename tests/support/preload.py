# SPDX-License-Identifier: Apache-2.0
"""Import everything that scripts import, also inside functions, into the process that `script_run` forks from."""

import importlib
import pkgutil

import torch

import experiments

for _name in (
    "datasets.packaged_modules.csv.csv", "datasets.packaged_modules.imagefolder.imagefolder",
    "datasets.packaged_modules.parquet.parquet", "accelerate", "matplotlib.pyplot", "pandas", "PIL.Image",
    "scipy.cluster.hierarchy", "sklearn.metrics", "tests.support.script_run", "torch.profiler",
    "transformers.trainer",
    *(module.name for module in pkgutil.walk_packages(experiments.__path__, "experiments.")),
):  # fmt: skip
    importlib.import_module(_name)

torch.set_num_threads(1)
