# SPDX-License-Identifier: Apache-2.0
"""Classify a text with revisions of repositories, as model and as pipeline; the last line has the logits."""

import json
import sys

import torch
from transformers import AutoModelForSequenceClassification, pipeline

logits = {}
for repo_id, revision in json.loads(sys.argv[1]):
    options = dict(revision=revision, trust_remote_code=True)
    model = AutoModelForSequenceClassification.from_pretrained(repo_id, **options).eval()
    classify = pipeline("text-classification", repo_id, **options)
    tokens = classify.tokenizer("aaaxx", return_tensors="pt")
    with torch.no_grad():
        logits[revision] = model(**tokens).logits[0].tolist()
    assert classify("aaaxx")[0]["label"] in ("negative", "positive")
print("LOGITS", json.dumps(logits))
