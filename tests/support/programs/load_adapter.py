# SPDX-License-Identifier: Apache-2.0
"""Load a PEFT adapter on a checkpoint's own code, run it, and report the logits. TASK.json is given."""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

task = json.loads(Path(sys.argv[1]).read_text())
inputs = torch.load(task["inputs"])


def logits(model, **arguments):
    with torch.no_grad():
        return model.eval()(**inputs, **arguments).logits


base = AutoModelForSequenceClassification.from_pretrained(task["base"], trust_remote_code=True)
adapted = PeftModel.from_pretrained(base, task["adapter"])
auto = AutoModelForSequenceClassification.from_pretrained(task["adapter"], trust_remote_code=True)
report = dict(
    classes=[type(model).__module__ for model in (base, auto)],
    peft=logits(adapted),
    peft_r=logits(adapted, r=1),
    auto=logits(auto),
    merged=logits(adapted.merge_and_unload()),
)
torch.save(report, task["report"])
