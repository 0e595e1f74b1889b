# SPDX-License-Identifier: Apache-2.0
"""Load a checkpoint by its own code, run it, merge it, and report every network, process and file event. TASK.json."""

import json
import os
import sys
from pathlib import Path

task = json.loads(Path(sys.argv[1]).read_text())
sys.dont_write_bytecode = True
# Imported first: what these libraries do when they are imported is theirs.
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers.models.perceiver import modeling_perceiver  # noqa: E402, F401

found = {"network": [], "processes": [], "writes": []}
STARTS = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.spawn", "os.startfile")
# Events with the path that changes as their first argument, and as their second.
CHANGES = ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.chown", "os.utime")
MOVES = ("os.rename", "os.link", "os.symlink")


def watch(event, arguments):
    if event.startswith(("socket.", "urllib.", "http.", "ssl.", "ftplib.", "smtplib.")):
        found["network"].append(event)
    elif event.startswith(STARTS):
        found["processes"].append(event)
    elif event in CHANGES + MOVES:
        found["writes"].append(str(arguments[event in MOVES]))
    elif event == "open" and isinstance(arguments[0], str | bytes):
        path, _, flags = arguments
        if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            found["writes"].append(os.fsdecode(path))


sys.addaudithook(watch)
model = transformers.AutoModelForSequenceClassification.from_pretrained(task["folder"], trust_remote_code=True).eval()
samples = [{"input_ids": torch.randint(0, 262, (40, 9))}]
with torch.no_grad():
    before = model(**samples[0]).logits
    model(**samples[0], r=2)
model.merge_to(flops_ratio=0.9)
model.merge_to(flops_ratio=0.9, samples=samples)
with model.merged(flops_ratio=0.95):
    model(**samples[0])
found |= {"code": type(model).__module__, "changed": bool((model(**samples[0]).logits != before).any())}
report = json.dumps(found)
Path(task["report"]).write_text(report)
