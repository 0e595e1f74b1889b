# SPDX-License-Identifier: Apache-2.0
"""Tests of text classification tasks: sentences, labels, model inputs, and messages for wrong data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import EvalPrediction, PerceiverTokenizer

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.errors import BadInput
from experiments.tasks.glue import SENTENCE_COLUMNS, GlueDataArguments, GlueTask, load_glue_task
from tests.support.tiny_texts import LABELS, MODEL, write_glue, write_table


def config_for(task: GlueTask) -> ToMePerceiverConfig:
    config = ToMePerceiverConfig(**MODEL)
    return config if not task.labels else with_labels(config, task.labels)


def with_labels(config: ToMePerceiverConfig, names: list[str]) -> ToMePerceiverConfig:
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    return config


def prepared(task: GlueTask):
    return task.prepare(config_for(task), PerceiverTokenizer(), seed=0)


@pytest.mark.parametrize("name", sorted(SENTENCE_COLUMNS))
def test_every_glue_task_loads_as_from_the_hub(tmp_path, name):
    arguments = GlueDataArguments(task_name=name, dataset_name=str(write_glue(tmp_path, name)))
    task = load_glue_task(arguments, predict=True, seed=0)
    assert task.labels == LABELS[name]
    suffixes = ["", "_mm"] if name == "mnli" else [""]
    assert list(task.evaluation) == list(task.prediction) == suffixes
    if name == "mnli":
        assert (len(task.evaluation[""]), len(task.evaluation["_mm"])) == (26, 29)
    sight = prepared(task)
    batch = sight.collate([sight.train[0], sight.train[1]])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["labels"].is_floating_point() == (name == "stsb")
    assert "labels" not in sight.prediction[""].features  # they are kept back


def test_a_pair_is_read_with_a_separator(tmp_path):
    task = load_glue_task(
        GlueDataArguments(task_name="rte", dataset_name=str(write_glue(tmp_path, "rte"))), predict=False, seed=0
    )
    tokenizer = PerceiverTokenizer()
    example = task.train[0]
    expected = tokenizer(example["sentence1"], example["sentence2"])["input_ids"]
    assert prepared(task).train[0]["input_ids"] == expected
    assert expected.count(tokenizer.sep_token_id) == 2


def test_own_files(tmp_path):
    """Labels have any type and are sorted by name; the first two other columns are the pair."""
    columns = {"question": ["a", "b", "c"], "answer": ["d", "e", "f"], "label": ["yes", "no", "yes"]}
    train = write_table(tmp_path / "train.csv", columns)
    validation = write_table(tmp_path / "validation.json", {name: values[1:] for name, values in columns.items()})
    test = write_table(tmp_path / "test.parquet", {name: columns[name] for name in ("question", "answer")})
    arguments = GlueDataArguments(train_file=str(train), validation_file=str(validation), test_file=str(test))
    task = load_glue_task(arguments, predict=True, seed=0)
    assert task.labels == ["no", "yes"]
    assert task.sentence_columns == ("question", "answer")
    sight = prepared(task)
    assert [example["labels"] for example in sight.train] == [1, 0, 1]
    assert [example["labels"] for example in sight.evaluation[""]] == [0, 1]
    assert len(sight.prediction[""]) == 3


def test_own_numbers_are_regression(tmp_path):
    path = str(write_table(tmp_path / "own.csv", {"text": ["a", "b"], "label": [0.5, -1.0]}))
    task = load_glue_task(GlueDataArguments(train_file=path, validation_file=path), predict=False, seed=0)
    assert (task.labels, task.main_metric, task.sentence_columns) == ([], "pearson", ("text",))
    sight = prepared(task)
    assert [example["labels"] for example in sight.evaluation[""]] == [0.5, -1.0]
    logits = np.array([[1.0], [2.0]])
    metrics = sight.metrics(EvalPrediction(predictions=logits, label_ids=np.array([0.5, -1.0])))
    assert metrics["mse"] == pytest.approx((0.25 + 9) / 2)


def test_the_checkpoints_order_of_the_labels_stays(tmp_path):
    task = load_glue_task(
        GlueDataArguments(task_name="sst2", dataset_name=str(write_glue(tmp_path, "sst2"))), predict=False, seed=0
    )
    config = with_labels(config_for(task), ["positive", "negative"])
    sight = task.prepare(config, PerceiverTokenizer(), seed=0)
    assert [1 - example["label"] for example in task.train] == [example["labels"] for example in sight.train]


def test_counts_cut_what_is_read(tmp_path):
    arguments = GlueDataArguments(
        task_name="mnli",
        dataset_name=str(write_glue(tmp_path, "mnli")),
        max_train_samples=5, max_eval_samples=4, max_predict_samples=3,
    )  # fmt: skip
    task = load_glue_task(arguments, predict=True, seed=0)
    assert len(task.train) == 5
    assert [len(split) for split in (*task.evaluation.values(), *task.prediction.values())] == [4, 4, 3, 3]


@pytest.mark.parametrize(
    ("given", "predict", "says"),
    [
        ({}, False, ["--train_file", "--task_name"]),
        ({"train_file": "own.csv"}, False, ["--validation_file"]),
        ({"train_file": "own.csv", "validation_file": "own.csv"}, True, ["--test_file", "--do_predict"]),
        ({"dataset_name": "not/there"}, False, ["--dataset_name not/there"]),
        ({"task_name": "rte", "dataset_name": "."}, False, ["--dataset_name ."]),
    ],
)
def test_missing_data_are_refused(tmp_path, monkeypatch, given, predict, says):
    monkeypatch.chdir(tmp_path)
    for ending in (".csv", ".json"):
        write_table(Path(f"own{ending}"), {"text": ["a"], "label": ["x"]})
    with pytest.raises(BadInput) as error:
        load_glue_task(GlueDataArguments(**given), predict, seed=0)
    assert all(part in str(error.value) for part in says), error.value


def own(tmp_path: Path, train: dict, predict: bool = False, evaluate: bool = True, **others: dict) -> GlueTask:
    paths = {f"{name}_file": str(write_table(tmp_path / f"{name}.jsonl", columns)) for name, columns in others.items()}
    paths["train_file"] = str(write_table(tmp_path / "train.parquet", train))
    return load_glue_task(GlueDataArguments(**paths), predict, seed=0, evaluate=evaluate)


GOOD = {"text": ["aa", "bb", "cc"], "label": ["x", "y", "x"]}


@pytest.mark.parametrize("names", [["equivalent", "not_equivalent"], ["Not-Equivalent", "EQUIVALENT"], ["0", "1"]])
def test_f1_is_about_the_same_class_whatever_the_data_call_it_and_in_whatever_order(tmp_path, names):
    folder = write_glue(tmp_path, "mrpc", labels=names)
    task = load_glue_task(GlueDataArguments(task_name="mrpc", dataset_name=str(folder)), predict=False, seed=0)
    assert [name.lower().replace("-", "_") for name in task.labels] in (LABELS["mrpc"], ["0", "1"])
    sentences = dict(zip(task.train["sentence1"], task.train["label"], strict=True))
    for sentence, label in sentences.items():
        assert task.labels[label] == names[ord(sentence[0]) - ord("a")]


@pytest.mark.parametrize("order", [1, -1])
def test_f1_is_about_the_same_class_whatever_order_a_checkpoint_has(tmp_path, order):
    """Without a training split, the classes are the checkpoint's."""
    folder = write_glue(tmp_path, "mrpc")
    readme = folder / "README.md"
    readme.write_text(readme.read_text().replace("  - split: train\n    path: mrpc/train-*\n", ""))
    arguments = GlueDataArguments(task_name="mrpc", dataset_name=str(folder))
    task = load_glue_task(arguments, predict=False, seed=0, classes=LABELS["mrpc"][::order])
    assert task.labels == LABELS["mrpc"]


def test_a_task_of_other_classes_is_refused(tmp_path):
    folder = write_glue(tmp_path, "mrpc", labels=["no", "yes"])
    with pytest.raises(BadInput, match="'no', 'yes'.*'not_equivalent' and 'equivalent'"):
        load_glue_task(GlueDataArguments(task_name="mrpc", dataset_name=str(folder)), predict=False, seed=0)


def test_without_a_validation_file_a_labelled_test_file_is_evaluated(tmp_path):
    task = own(tmp_path, GOOD, test=GOOD, predict=True)
    assert len(task.evaluation[""]) == len(task.prediction[""]) == 3
    assert task.source.split == "test"


def test_where_nothing_is_evaluated_there_need_not_be_anything(tmp_path):
    task = own(tmp_path, GOOD, test={"text": ["aa"]}, predict=True, evaluate=False)
    assert not task.evaluation and len(task.prediction[""]) == 1
    assert prepared(task).batch(4)["input_ids"].shape[0] == 1
    assert not own(tmp_path, GOOD, evaluate=False).evaluation
    with pytest.raises(BadInput, match="nothing to evaluate on"):
        own(tmp_path, GOOD, test={"text": ["aa"]}, predict=True)


@pytest.mark.parametrize(
    ("train", "validation", "says"),
    [
        (GOOD | {"label": ["x", None, "y"]}, GOOD, "split 'train': column 'label' has no value.* 1 of 3"),
        (GOOD, GOOD | {"label": ["x", "y", None]}, "split 'validation': column 'label' has no value.* example 2"),
        ({"text": ["a"], "kind": ["x"]}, GOOD, "has no column 'label', only 'kind', 'text'"),
        (GOOD, {"text": ["a"]}, "validation.jsonl: split 'validation' has no column 'label'"),
        ({"id": ["a1", "b2", "c3"], "label": GOOD["label"]}, GOOD, "no column with sentences.*--sentence1_column"),
        (GOOD | {"text": ["a", None, "b"]}, GOOD, "split 'train': column 'text' has no value"),
        (GOOD, GOOD | {"text": ["a", "b", None]}, "split 'validation': column 'text' has no value"),
        (GOOD, GOOD | {"text": [["a"], ["b"], ["c"]]}, "split 'validation': column 'text' holds Json"),
        (GOOD, GOOD | {"label": [True, False, True]}, "labels 'false', 'true'; they must be among 'x', 'y'"),
    ],
)
def test_what_is_missing_or_of_another_kind_is_refused(tmp_path, train, validation, says):
    with pytest.raises(BadInput, match=says) as error:
        own(tmp_path, train, validation=validation)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("overwrite_cache", [False, True])
def test_data_that_changed_are_read_again(tmp_path, overwrite_cache):
    """`datasets` alone would use its cache for a folder of that name."""
    options = dict(predict=False, seed=0, cache_dir=str(tmp_path / "cache"))
    for count in (18, 9):
        folder = str(write_glue(tmp_path / "glue", "sst2", validation=count))
        arguments = GlueDataArguments(task_name="sst2", dataset_name=folder, overwrite_cache=overwrite_cache)
        task = load_glue_task(arguments, **options)
        assert len(task.evaluation[""]) == len(prepared(task).evaluation[""]) == count


def columns_of(tmp_path: Path, table: dict[str, list], **given: object) -> tuple[str, ...]:
    path = str(write_table(tmp_path / "own.csv", table))
    arguments = GlueDataArguments(train_file=path, validation_file=path, **given)
    return load_glue_task(arguments, predict=False, seed=0).sentence_columns


WORDS, LABEL = ["good", "bad", "so so"], {"label": ["x", "y", "x"]}


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ({"id": ["a1", "a2", "a3"], "text": WORDS}, ("text",)),
        ({"text": WORDS, "annotator": ["Ann", "Bob", "Ann"]}, ("text",)),
        ({"annotator": ["Ann", "Bob", "Ann"], "Content": WORDS}, ("Content",)),
        ({"sentence": WORDS, "label_text": ["x", "y", "x"]}, ("sentence",)),
        ({"Sentence 1": WORDS, "Sentence 2": WORDS, "note": WORDS}, ("Sentence 1", "Sentence 2")),
        ({"premise": WORDS, "hypothesis": WORDS}, ("premise", "hypothesis")),
        ({"userId": ["u1", "u2", "u3"], "date": ["2024-01-01"] * 3, "words": WORDS}, ("words",)),
        ({"Unnamed: 0": [0, 1, 2], "score": [1.5, 2, 3], "words": WORDS, "spam": [True, False, True]}, ("words",)),
        ({"text": ["1.50", "2", "03"], "note": WORDS}, ("text",)),
        ({"text": [True, False, True]}, ("text",)),
    ],
)
def test_columns_of_sentences_go_by_their_names(tmp_path, others, expected):
    assert columns_of(tmp_path, others | LABEL) == expected
    assert columns_of(tmp_path, LABEL | others) == expected


@pytest.mark.parametrize(
    "others",
    [
        {"words": WORDS, "annotator": ["Ann", "Bob", "Ann"]},
        {"text": WORDS, "review": WORDS},
        {"sentence1": WORDS, "sentence2": WORDS, "text": WORDS},
        {"id": ["a1", "a2", "a3"]},
        {"number": [1, 2, 3]},
    ],
)
def test_columns_that_are_not_certain_are_asked_for(tmp_path, others):
    with pytest.raises(BadInput, match=r"own\.csv: .*--sentence1_column"):
        columns_of(tmp_path, others | LABEL)
    first, *rest = others
    given = {"sentence1_column": first} | ({"sentence2_column": rest[0]} if rest else {})
    assert columns_of(tmp_path, others | LABEL, **given) == (first, *rest[:1])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"sentence1_column": "nowhere"}, "--sentence1_column nowhere: .*choose from 'label', 'text'"),
        ({"sentence1_column": "text", "sentence2_column": "label"}, "--sentence2_column label"),
        ({"sentence2_column": "text"}, "--sentence2_column text: .*--sentence1_column"),
        ({"sentence1_column": "text", "sentence2_column": "text"}, "--sentence2_column text"),
    ],
)
def test_wrong_column_names_are_refused(tmp_path, given, says):
    with pytest.raises(BadInput, match=f"^{says}"):
        columns_of(tmp_path, {"text": WORDS} | LABEL, **given)


def test_wrong_arguments_are_refused():
    with pytest.raises(BadInput, match="--task_name glue: .*mrpc"):
        GlueDataArguments(task_name="glue")
    with pytest.raises(BadInput, match="^--sentence1_column x: .*--task_name rte"):
        GlueDataArguments(task_name="rte", sentence1_column="x")


def test_numbers_of_a_table_are_text_where_its_name_says_so(tmp_path):
    task = own(tmp_path, {"text": [1, 2, 3]} | LABEL, validation={"text": [4, 5, 6]} | LABEL)
    assert (task.train["text"], task.evaluation[""]["text"]) == (["1", "2", "3"], ["4", "5", "6"])


def test_a_folder_and_its_files_give_the_same(tmp_path):
    """With an index column, words that pandas reads as missing, and classes that are numbers as text."""
    lines = [f"{index},{word},{index % 12:02}" for index, word in enumerate(["None", "NA", "null", "a"] * 6)]
    for name in ("train", "validation"):
        (tmp_path / f"{name}.csv").write_text("\n".join([",text,Label", *lines]) + "\n")
    files = {f"{name}_file": str(tmp_path / f"{name}.csv") for name in ("train", "validation")}
    of_files = load_glue_task(GlueDataArguments(**files), predict=False, seed=0)
    of_folder = load_glue_task(GlueDataArguments(dataset_name=str(tmp_path)), predict=False, seed=0)
    assert of_files.labels == of_folder.labels == [f"{index:02}" for index in range(12)]
    assert of_files.train[:] == of_folder.train[:]
    assert of_files.train["text"][:3] == ["None", "NA", "null"]


def test_what_was_read_is_said_in_a_few_lines(tmp_path):
    path = str(write_table(tmp_path / "own.csv", {"text": WORDS, "annotator": WORDS} | LABEL))
    task = load_glue_task(GlueDataArguments(train_file=path, validation_file=path), predict=False, seed=0)
    assert task.summary == [
        f"--train_file {path}: sentence in column 'text', class in column 'label'; not used: 'annotator'",
        "train: 3 examples, validation: 3 examples",
        "2 classes, in train: 'x' 2, 'y' 1",
    ]
    assert task.first_input(prepared(task)) == "first input, 6 tokens: '[CLS]good[SEP]', 'x'"


@pytest.mark.parametrize(("given", "expected"), [(True, []), (False, ["1.0", "2.0", "3.0"])])
def test_whether_labels_are_numbers_can_be_said(tmp_path, given, expected):
    path = str(write_table(tmp_path / "own.jsonl", {"text": WORDS, "label": [1.0, 2.0, 3.0]}))
    arguments = GlueDataArguments(train_file=path, validation_file=path, do_regression=given)
    assert load_glue_task(arguments, predict=False, seed=0).labels == expected


def test_what_was_read_of_numbers(tmp_path):
    task = own(tmp_path, {"text": WORDS, "label": [0.5, 1, -2]}, validation={"text": WORDS, "label": [0.5, 1, -2]})
    assert task.summary[-1] == "labels are numbers (regression), in train from -2 to 1"
    assert task.first_input(prepared(task)) == "first input, 6 tokens: '[CLS]good[SEP]', 0.5"


@pytest.mark.parametrize("labels", [["?"] * 3, [0, 0, 0], [-1, -1, -1], ["x", None, "z"], [[1], [2], [3]]])
def test_labels_of_what_is_only_predicted_do_not_matter(tmp_path, labels):
    task = own(tmp_path, GOOD, validation=GOOD, test={"text": WORDS, "label": labels}, predict=True)
    assert task.prediction[""].column_names == ["text"]


@pytest.mark.parametrize("content", ["so good\nso bad\n", "1;so good\n2;so bad\n"])
def test_a_first_line_that_may_be_an_example_is_not_taken_for_a_header(tmp_path, content):
    path = tmp_path / "test.csv"
    path.write_text(content)

    def load(**named: str) -> GlueTask:
        arguments = GlueDataArguments(test_file=str(path), **named)
        return load_glue_task(arguments, True, seed=0, evaluate=False, classes=["bad", "good"])

    with pytest.raises(BadInput, match="its first line may be an example, .*'so good'; put a line with the names"):
        load()
    assert len(load(sentence1_column="so good").prediction[""]) == 1


def test_a_message_names_the_file_that_is_wrong(tmp_path):
    with pytest.raises(BadInput, match=r"^--validation_file .*validation.jsonl: split 'validation' has the labels 'z'"):
        own(tmp_path, GOOD, validation=GOOD | {"label": ["x", "y", "z"]})


@pytest.mark.parametrize(("classes", "kind"), [(["bad", "good"], "classification"), ([], "regression")])
def test_a_checkpoint_predicts_a_file_alone(tmp_path, classes, kind):
    path = str(write_table(tmp_path / "test.csv", {"id": [1, 2, 3], "text": WORDS, "label": [9, 9, 9]}))
    task = load_glue_task(GlueDataArguments(test_file=path), True, seed=0, evaluate=False, classes=classes)
    sight = prepared(task)
    assert (sight.labels, sight.kind, len(sight.train), len(sight.prediction[""])) == (classes, kind, 0, 3)
    columns = "sentence in column 'text'; not used: 'id'"
    assert task.summary == [f"--test_file {path}: {columns}", "test (to predict): 3 examples"]


def test_a_checkpoint_evaluates_a_file_alone(tmp_path):
    path = str(write_table(tmp_path / "validation.csv", {"text": WORDS, "label": [1, 10, 2]}))
    arguments = GlueDataArguments(validation_file=path)
    names = [f"LABEL_{index}" for index in range(12)]
    task = load_glue_task(arguments, False, seed=0, classes=names)
    assert task.evaluation[""]["label"] == [1, 10, 2]
    with pytest.raises(BadInput, match="has the labels '10', '2'"):
        load_glue_task(arguments, False, seed=0, classes=["0", "1"])


def test_a_folder_that_is_called_as_glue_is_on_the_hub_is_not_read_instead(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_glue(tmp_path / "nyu-mll" / "glue", "rte")
    with pytest.raises(BadInput, match="--task_name rte: .*--dataset_name ./nyu-mll/glue"):
        load_glue_task(GlueDataArguments(task_name="rte"), predict=False, seed=0)
    task = load_glue_task(GlueDataArguments(task_name="rte", dataset_name="./nyu-mll/glue"), predict=False, seed=0)
    assert task.summary[0].startswith("--dataset_name ./nyu-mll/glue (a local folder): ")
