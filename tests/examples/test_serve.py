# SPDX-License-Identifier: Apache-2.0
"""Tests of examples/serve.py in a process of its own: answers, budgets, limits, overload and shutdown."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import signal
import threading
import time
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from PIL import Image
from transformers import PerceiverImageProcessorPil, PerceiverTokenizer

from examples.batching import Batcher, Budget, Settings, Waiting
from examples.classifier import Classifier
from tests.support.script_run import run_script, start_script
from tests.support.tiny_models import tiny_model

SCRIPT = "examples/serve.py"
TEXTS = ["a", "Some longer words.", ("first", "second")]


@pytest.fixture(scope="module")
def text_checkpoint(tmp_path_factory):
    """A text classifier with a frontier."""
    folder = tmp_path_factory.mktemp("text")
    model = tiny_model("ForSequenceClassification", torch.float32, max_position_embeddings=40)
    generator = torch.Generator().manual_seed(0)
    model.calibrate([{"input_ids": torch.randint(6, 262, (8, 20), generator=generator)} for _ in range(10)])
    model.save_pretrained(folder)
    PerceiverTokenizer(model_max_length=40).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def image_checkpoint(tmp_path_factory):
    """An image classifier without a frontier."""
    folder = tmp_path_factory.mktemp("image")
    tiny_model("ForImageClassificationConvProcessing", torch.float32, image_size=16).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    PerceiverImageProcessorPil(do_center_crop=False, size=size).save_pretrained(folder)
    return folder


class Server:
    """A running server; `ask` returns the status and the JSON of an answer."""

    def __init__(self, process, port, output):
        self.process, self.port, self.output = process, port, output

    def ask(self, method="POST", path="/predict", body=None, **fields):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, json.dumps(fields) if body is None else body)
            response = connection.getresponse()
            text = response.read().decode()
            if response.status == 503:
                assert response.headers["Retry-After"] == "1"
            is_json = response.headers.get_content_type() == "application/json"
            return response.status, json.loads(text) if is_json else text
        finally:
            connection.close()


@contextmanager
def running(tmp_path, checkpoint, *arguments, before=None):
    streams = tmp_path / f"streams-{len(list(tmp_path.iterdir()))}"
    streams.mkdir()
    process = start_script(
        SCRIPT, ("--model_name_or_path", checkpoint, "--port", 0, *arguments), tmp_path, streams, before
    )
    output = streams / "stdout"
    try:
        while process.is_alive() and not (output.exists() and "listening on" in output.read_text()):
            time.sleep(0.05)
        assert process.is_alive(), (streams / "stderr").read_text()
        yield Server(process, int(output.read_text().split()[-1].rpartition(":")[2]), output)
    finally:
        process.terminate()
        process.join(60)
        process.kill()


def slow_batches(seconds=0.25):
    """Make every batch take longer."""
    classify = Classifier.classify

    def slow(self, batch):
        time.sleep(seconds)
        return classify(self, batch)

    Classifier.classify = slow


@pytest.fixture(scope="module")
def server(tmp_path_factory, text_checkpoint):
    limits = ("--max_inputs", 4, "--max_request_bytes", 2000, "--max_characters", 100)
    with running(tmp_path_factory.mktemp("server"), text_checkpoint, *limits) as started:
        yield started


def test_answers_are_those_of_the_model_at_the_budget(server, text_checkpoint):
    classifier = Classifier(str(text_checkpoint))
    for ratio in (None, 0.9, 0.5):
        budget = {} if ratio is None else {"flops_ratio": ratio}
        status, answer = server.ask(inputs=TEXTS, **budget)
        assert status == 200 and not answer["degraded"] and answer["asked"]["flops_ratio"] == ratio
        for text, found in zip(TEXTS, answer["predictions"], strict=True):
            inputs = classifier.collate([classifier.read_text(text)])
            with torch.inference_mode():
                scores = classifier.model(**inputs, **budget).logits[0].softmax(dim=-1)
            assert found["label"] == classifier.config.id2label[int(scores.argmax())]
            assert found["score"] == pytest.approx(float(scores.max()), abs=1e-5)
            assert found["flops_ratio"] <= (ratio or 1)


def test_the_pages_describe_the_server(server):
    status, described = server.ask("GET", "/")
    assert status == 200 and described["latents"] == 12 and described["flops_ratio"] == 1
    ratios = [row["flops_ratio"] for row in described["frontier"]]
    assert ratios == sorted(ratios, reverse=True) and len(ratios) > 2
    assert server.ask("GET", "/health") == (200, {"status": "ok"})
    server.ask(inputs=["a"])
    _, metrics = server.ask("GET", "/metrics")
    for name in ("requests_total", "request_seconds_count", "batch_size_count", "waiting_inputs", "flops_ratio_count"):
        assert f"tome_{name}" in metrics


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"inputs": [""]}, 422, "inputs.0: is empty"),
        ({"inputs": ["a", " "]}, 422, "inputs.1: is empty"),
        ({"inputs": ["x" * 60]}, 422, "62 tokens; must have at most 40"),
        ({"inputs": ["x" * 101]}, 422, "101 characters; must have at most 100"),
        ({"inputs": ["a"] * 5}, 422, "inputs: 5 given; must be at most 4"),
        ({"inputs": []}, 422, "inputs: "),
        ({"inputs": "a"}, 422, "inputs: "),
        ({"inputs": [["a", "b", "c"]]}, 422, "inputs.0"),
        ({"inputs": ["a"], "flops_ratio": 0.001}, 422, "flops_ratio=0.001 is out of reach"),
        ({"inputs": ["a"], "flops_ratio": "0.5"}, 422, "flops_ratio: "),
        ({"inputs": ["a"], "flops_ratio": 1.5}, 422, "flops_ratio: "),
        ({"inputs": ["a"], "max_changed": 0.001}, 422, "max_changed=0.001: "),
        ({"inputs": ["a"], "flops_ratio": 0.5, "max_changed": 0.5}, 422, "use one of flops_ratio and max_changed"),
        ({"inputs": ["a"], "budget": 0.5}, 422, "budget: "),
        ({}, 422, "inputs: "),
        ("{", 422, "JSON"),
        ({"inputs": ["a"], "padding": "x" * 3000}, 413, "more than 2,000 bytes"),
    ],
)
def test_a_bad_request_gets_one_line(server, body, status, words):
    found, answer = server.ask(body=body if isinstance(body, str) else json.dumps(body))
    assert found == status and words in answer["detail"] and "\n" not in answer["detail"]
    assert server.ask(inputs=["a"])[0] == 200


def test_images_are_read_from_base64_and_a_schedule_meets_budgets(tmp_path, image_checkpoint):
    file = io.BytesIO()
    Image.new("L", (30, 20), 128).save(file, "PNG")
    image = base64.b64encode(file.getvalue()).decode()
    with running(tmp_path, image_checkpoint, "--max_pixels", 700) as server:
        assert "frontier: none" in server.output.read_text()
        status, answer = server.ask(inputs=[image, image], flops_ratio=0.9)
        assert status == 200 and answer["predictions"][0] == answer["predictions"][1]
        assert answer["predictions"][0]["flops_ratio"] <= 0.9
        assert server.ask(inputs=[image])[1]["predictions"][0]["flops_ratio"] == 1
        assert server.ask(inputs=[image], max_changed=0.1)[0] == 422
        large = io.BytesIO()
        Image.new("L", (30, 30)).save(large, "PNG")
        for given, words in (
            ("not base64", "must be an image file in base64"),
            (["a", "b"], "must be an image file in base64"),
            (base64.b64encode(b"text").decode(), "is not an image"),
            (image[: len(image) // 8 * 4], "inputs.0: "),
            (base64.b64encode(large.getvalue()).decode(), "900 pixels; must have at most 700"),
        ):
            status, answer = server.ask(inputs=[given])
            assert status == 422 and words in answer["detail"] and "\n" not in answer["detail"]


def test_under_load_requests_fall_back_or_are_refused_and_every_accepted_one_is_answered(tmp_path, text_checkpoint):
    limits = ("--max_batch_size", 2, "--fall_back_inputs", 3, "--max_requests", 10)
    with running(tmp_path, text_checkpoint, *limits, before=slow_batches) as server:
        answers = ask_at_once(server, 16, lambda index: {"may_fall_back": False} if index % 4 == 0 else {})
        assert {status for status, _ in answers.values()} == {200, 503}
        assert sum(status == 200 for status, _ in answers.values()) == 10
        answered = {index: answer for index, (status, answer) in answers.items() if status == 200}
        for index, answer in answered.items():
            (prediction,) = answer["predictions"]
            assert answer["degraded"] == prediction["degraded"] == (prediction["flops_ratio"] < 1)
            assert index % 4 or not answer["degraded"]
        assert any(answer["degraded"] for answer in answered.values())
        assert server.ask(inputs=["a"])[1]["degraded"] is False


def ask_at_once(server, number, fields=lambda index: {}):
    """Send requests from threads of their own, and return the answers by index."""
    answers = {}

    def ask(index):
        answers[index] = server.ask(inputs=["a"], **fields(index))

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def test_a_refusal_says_when_to_retry_and_a_slow_answer_is_given_up(tmp_path, text_checkpoint):
    with running(tmp_path, text_checkpoint, "--max_requests", 1, "--timeout", 0.1, before=slow_batches) as server:
        answers = ask_at_once(server, 4)
        assert sorted(status for status, _ in answers.values()) == [503, 503, 503, 504]
        assert "no answer within 0.1 seconds" in str(answers.values())
        assert server.ask("GET", "/health") == (200, {"status": "ok"})


def test_sigterm_answers_the_accepted_requests_first(tmp_path, text_checkpoint):
    with running(tmp_path, text_checkpoint, "--max_batch_size", 1, before=partial(slow_batches, 1.0)) as server:
        answers = {}
        threads = [
            threading.Thread(target=lambda index=index: answers.update({index: server.ask(inputs=["a"])}))
            for index in range(4)
        ]
        for thread in threads:
            thread.start()
        while "tome_requests_in_work 4.0" not in server.ask("GET", "/metrics")[1]:
            assert not answers, "a request was answered before the last one arrived"
        os.kill(server.process.pid, signal.SIGTERM)
        for thread in threads:
            thread.join()
        server.process.join(30)
        assert [status for status, _ in answers.values()] == [200] * 4
        assert server.process.exitcode == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--model_name_or_path: is missing"),
        (("--model_name_or_path", "nowhere"), "--model_name_or_path nowhere: "),
        (("--model_name_or_path", "TEXT", "--port", 70000), "--port 70000: "),
        (("--model_name_or_path", "TEXT", "--max_inputs", 0), "--max_inputs 0: must be above 0"),
        (("--model_name_or_path", "TEXT", "--device", "nothing"), "--device nothing: "),
    ],
)
def test_a_mistake_of_the_arguments_ends_in_one_line(arguments, words, text_checkpoint):
    ended = run_script(SCRIPT, *(text_checkpoint if each == "TEXT" else each for each in arguments))
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert ended.returncode == 2 and len(errors) == 1 and words in errors[0]


def test_equal_settings_are_one_object_and_cheaper_ones_follow_the_frontier(text_checkpoint):
    settings = Settings(Classifier(str(text_checkpoint)))
    assert settings.choose(Budget(flops_ratio=0.9)) in settings.rows
    assert settings.choose(Budget(flops_ratio=0.9)) is settings.choose(Budget(flops_ratio=0.9))
    for setting in [settings.saved, *settings.rows]:
        assert settings.cheaper(setting, 0) is setting
        ratios = [settings.cheaper(setting, steps).flops_ratio for steps in range(100)]
        assert ratios == sorted(ratios, reverse=True) and ratios[-1] == settings.rows[-1].flops_ratio
    assert settings.cheaper(settings.saved, 2) is settings.rows[1]


def test_a_failed_batch_fails_its_requests_only(tmp_path, text_checkpoint):
    with running(tmp_path, text_checkpoint, before=fail_on_second_batch) as server:
        status = [server.ask(inputs=["a"])[0] for _ in range(3)]
    assert status == [500, 200, 200]


def fail_on_second_batch():
    """Fail the first batch after the one that tries the checkpoint at the start."""
    classify, calls = Classifier.classify, []

    def failing(self, batch):
        calls.append(batch)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return classify(self, batch)

    Classifier.classify = failing


def test_the_input_that_waits_longest_goes_first_with_others_of_its_settings(text_checkpoint):
    batcher = Batcher(Classifier(str(text_checkpoint)), max_batch_size=2, max_wait=0, fall_back_inputs=0)
    rows = batcher.settings.rows

    class Answer:
        def done(self):
            return False

    batcher.waiting = [Waiting({}, rows[place], True, Answer()) for place in (1, 0, 1, 1)]
    setting, batch = batcher._next_batch()
    assert setting is rows[1] and batch == [batcher.waiting[0], batcher.waiting[2]]
