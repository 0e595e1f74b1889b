# SPDX-License-Identifier: Apache-2.0
"""Load revisions of a model from the Hub, and what cannot be loaded from there, and report both. TASK.json is given."""

import json
import sys
from pathlib import Path

import datasets
import torch
import transformers

task = json.loads(Path(sys.argv[1]).read_text())
report = {"logits": {}, "classes": {}, "files": {}, "errors": {}}
inputs = torch.load(task["inputs"])
for revision in task["revisions"]:
    model, loading = transformers.AutoModelForSequenceClassification.from_pretrained(
        task["id"], revision=revision, trust_remote_code=True, output_loading_info=True
    )
    assert not any(loading.values()), loading
    report["logits"][revision] = model.double()(**inputs).logits.detach()
    report["classes"][revision] = f"{type(model).__module__}.{type(model).__qualname__}"
    report["files"][revision] = sys.modules[type(model).__module__].__file__


def error(load, *arguments):
    try:
        load(*arguments)
    except Exception as error:
        return [kind.__name__ for kind in type(error).__mro__], str(error)


for name in task["models"]:
    report["errors"][name] = error(transformers.AutoConfig.from_pretrained, name)
for name in task["datasets"]:
    report["errors"][name] = error(datasets.load_dataset, name)
torch.save(report, task["report"])
