# SPDX-License-Identifier: Apache-2.0
"""Load tokenizers and image processors, and report what was said and asked meanwhile. TASK.json is given."""

import builtins
import json
import logging
import sys
from pathlib import Path

import transformers

task = json.loads(Path(sys.argv[1]).read_text())
said = []


class Listening(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())


def ask(question):
    said.append(question)
    return "n"


transformers.logging.add_handler(Listening())
builtins.input = ask
text, image = task["text"], task["image"]
loaded = [
    transformers.AutoTokenizer.from_pretrained(text, trust_remote_code=True),
    transformers.AutoTokenizer.from_pretrained(text, tokenizer_type="perceiver"),
    transformers.PerceiverTokenizer.from_pretrained(text),
    transformers.AutoImageProcessor.from_pretrained(image),
    transformers.AutoImageProcessor.from_pretrained(image, trust_remote_code=True),
    transformers.pipeline("text-classification", model=text, trust_remote_code=True).tokenizer,
    transformers.pipeline("image-classification", model=image, trust_remote_code=True).image_processor,
]
report = dict(said=said, loaded=[type(each).__name__ for each in loaded])
Path(task["report"]).write_text(json.dumps(report))
