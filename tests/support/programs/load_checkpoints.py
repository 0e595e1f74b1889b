# SPDX-License-Identifier: Apache-2.0
"""Load checkpoints of every head and pipelines with them, run them, and report what they were. TASK.json is given."""

import json
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image

task = json.loads(Path(sys.argv[1]).read_text())
report = {}


def flat(output):
    logits = output.last_hidden_state if output.get("logits") is None else output.logits
    parts = list(logits.values()) if isinstance(logits, dict) else [logits]
    return torch.cat([part.flatten(1) for part in parts], dim=1).detach()


for head, folder in task["folders"].items():
    inputs = torch.load(f"{task['inputs']}/{head}.pt")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    auto_class = getattr(transformers, task["auto_classes"].get(head, "AutoModel"))
    model, loading = auto_class.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    entry = report[head] = dict(
        config_class=f"{type(config).__module__}.{type(config).__qualname__}",
        model_class=f"{type(model).__module__}.{type(model).__qualname__}",
        files=[sys.modules[type(part).__module__].__file__ for part in (config, model)],
        amiss={name: sorted(map(str, keys)) for name, keys in loading.items() if keys},
        config_r=config.r,
        schedule=config.merge_schedule,
        r=model.r,
        logits=flat(model(**inputs)),
    )
    # AutoModel loads any head too, and saves the same as the Auto class of the head.
    by_auto_model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    entry["auto_model_class"] = type(by_auto_model).__qualname__
    entry["auto_model_logits"] = flat(by_auto_model(**inputs))
    by_auto_model.save_pretrained(f"resaved/{head}")
    entry["auto_map"] = json.loads(Path(f"resaved/{head}/config.json").read_text())["auto_map"]
    entry["auto_model_files"] = sorted(path.stem for path in Path(f"resaved/{head}").glob("*.py"))
    if isinstance(model(**inputs).get("logits"), torch.Tensor):
        # On another model, because `merge_to` changes the merging of the model.
        choice = by_auto_model.merge_to(flops_ratio=0.999, samples=inputs, merge_methods=["bipartite"])
        entry["merged_to"] = dict(share=choice.chosen.flops_ratio, divergence=choice.chosen.divergence)
    if "set_r" in task:
        model.r = task["set_r"]
        entry["logits_set"] = flat(model(**inputs))
        model.save_pretrained(f"{task['resaved']}/{head}")

for name in ("text", "image"):
    pipe = transformers.pipeline(f"{name}-classification", model=task[name], trust_remote_code=True)
    given = task["words"] if name == "text" else Image.open(task["picture"])
    report[name] = dict(
        scores={entry["label"]: entry["score"] for entry in pipe(given, top_k=None if name == "text" else 3)},
        model_class=f"{type(pipe.model).__module__}.{type(pipe.model).__qualname__}",
        r=pipe.model.r,
    )
    if "set_r" in task:
        pipe.model.r = task["set_r"]
        if transformers.__version__.startswith("5.0."):
            pipe.modelcard = None  # A pipeline of transformers 5.0 lacks it, and needs it to save.
        pipe.save_pretrained(f"{task['resaved']}/{name}")

report["outside"] = [name for name in task["modules"] if name in sys.modules]
torch.save(report, task["report"])
