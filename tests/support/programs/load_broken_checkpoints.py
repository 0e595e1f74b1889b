# SPDX-License-Identifier: Apache-2.0
"""Load checkpoints whose code is damaged, and report how each fails. TASK.json is given."""

import json
import sys
import traceback
from pathlib import Path

import transformers

task = json.loads(Path(sys.argv[1]).read_text())
report = {}
for name, folder in task["folders"].items():
    try:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
        report[name] = dict(loaded=type(model).__module__)
    except BaseException as error:
        report[name] = dict(error=type(error).__name__, message=str(error), trace=traceback.format_exc())
Path(task["report"]).write_text(json.dumps(report))
