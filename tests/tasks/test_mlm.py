# SPDX-License-Identifier: Apache-2.0
"""Tests of masked language modelling tasks: sentences, masked tokens, model inputs and labels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from torch.nn import functional as F
from transformers import PerceiverTokenizer, PreTrainedTokenizerFast

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.errors import BadInput
from experiments.runs.checkpoint_task import SweepDataArguments, load_sweep_task
from experiments.tasks.mlm import IGNORE_INDEX, MlmDataArguments, MlmTask, load_mlm_task
from experiments.training.model_arguments import ModelArguments
from modeling_tome_perceiver import ToMePerceiverForMaskedLM
from tests.support.tiny_models import stock_model
from tests.support.tiny_texts import MODEL, POSITIONS, write_sentences, write_table

TOKENIZER = PerceiverTokenizer()
CONFIG = ToMePerceiverConfig(**MODEL | {"architectures": ["PerceiverForMaskedLM"]})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(write_sentences(tmp_path_factory.mktemp("data"), "one", "two"))


def loaded(folder: str, **given: object) -> MlmTask:
    arguments = MlmDataArguments(dataset_name=folder, dataset_config_name="one,two", **given)
    return load_mlm_task(arguments, predict=False, seed=0)


def files(tmp_path, **splits: list[str]) -> MlmTask:
    paths = {f"{name}_file": str(write_table(tmp_path / f"{name}.csv", {"text": t})) for name, t in splits.items()}
    return load_mlm_task(MlmDataArguments(**paths), predict=False, seed=0)


def prepared(task: MlmTask, seed: int = 0):
    return task.prepare(CONFIG, TOKENIZER, seed)


def test_configurations_are_one_pool_and_what_is_evaluated_is_not_trained_on(folder):
    """The training splits also hold the validation sentences, and text that is no sentence."""
    task = loaded(folder)
    train, evaluation = set(task.train["sentence"]), set(task.evaluation[""]["sentence"])
    assert len(evaluation) == len(task.evaluation[""]) == 38 and len(train) == len(task.train) == 111 - 38
    assert not train & evaluation
    assert {sentence[0] for sentence in train | evaluation} == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        (("premise", "hypothesis"), []),
        (("Sentence 1", "sentence_2"), []),
        (("content", "review"), []),
        (("first", "second"), ["first", "second"]),
    ],
)
def test_every_column_of_text_is_read(tmp_path, columns, named):
    """Columns are chosen by name or by argument; ids, indices, labels and notes are not read."""
    first, second = columns
    others = {name: ["some words", "x"] for name in ("id", "Unnamed: 0", "label", "label_text", "annotator", "note")}
    path = str(write_table(tmp_path / "own.csv", others | {first: ["aa", "bb"], second: ["cc", " "]}))
    given = {"train_file": path, "text_column": named, "validation_split_percentage": 40}
    task = load_mlm_task(MlmDataArguments(**given), predict=False, seed=0)
    assert f"sentences from '{first}', '{second}'" in task.summary[0] and "annotator" in task.summary[0]
    assert sorted([*task.train["sentence"], *task.evaluation[""]["sentence"]]) == ["aa", "bb", "cc"]
    assert len(task.evaluation[""]) == 1


def test_a_column_of_the_name_text_is_read_alone(tmp_path):
    path = str(write_table(tmp_path / "own.csv", {"review": ["news", "novel"], "text": ["aa", "bb"]}))
    task = load_mlm_task(MlmDataArguments(train_file=path, validation_split_percentage=50), predict=False, seed=0)
    assert sorted([*task.train["sentence"], *task.evaluation[""]["sentence"]]) == ["aa", "bb"]


LINES = "The cat sat, and then it left.\nA dog came, and it stayed.\n"


@pytest.mark.parametrize(
    ("name", "text", "given", "says"),
    [
        ("a.csv", LINES, {}, ["--train_file", "('The cat sat', 'and then", ".txt file"]),
        ("a.csv", "id,label,caption\na,b,c d\n", {}, ["('id', 'label', 'caption')", "--text_column"]),
        ("a.csv", "id,text\na,b\n", {"text_column": ["body"]}, ["--text_column body: ", "'id', 'text'"]),
    ],
)
def test_a_file_without_a_column_that_means_text_is_refused(tmp_path, name, text, given, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(BadInput) as error:
        load_mlm_task(MlmDataArguments(train_file=str(tmp_path / name), **given), predict=False, seed=0)
    assert all(part in str(error.value) for part in says) and "\n" not in str(error.value), error.value


def test_lines_of_a_text_file_are_sentences(tmp_path):
    (tmp_path / "train[1].TXT").write_text("one\nnull\n")
    (tmp_path / "validation.json").write_text('{"text": "two"}\n')
    paths = {"train_file": str(tmp_path / "train[1].TXT"), "validation_file": str(tmp_path / "validation.json")}
    task = load_mlm_task(MlmDataArguments(**paths), predict=False, seed=0)
    assert sorted(task.train["sentence"]) == ["null", "one"] and task.evaluation[""]["sentence"] == ["two"]


def test_case_and_punctuation_make_no_other_sentence(tmp_path):
    task = files(tmp_path, train=["So it is.", "so it is", "it is not", "!"], validation=["It is, not!", "yes"])
    assert sorted(sentence.lower().strip(".") for sentence in task.train["sentence"]) == ["!", "so it is"]
    assert len(task.evaluation[""]) == 2


def test_counts_cut_what_is_read_and_keep_what_is_compared(folder):
    few, all_of_them = loaded(folder, max_train_samples=5, max_eval_samples=4), loaded(folder)
    assert len(few.train) == 5
    assert few.evaluation[""]["sentence"] == all_of_them.evaluation[""]["sentence"][:4]
    masked = [
        [example["input_ids"].tolist() for example in prepared(task).evaluation[""]] for task in (few, all_of_them)
    ]
    assert 0 < len(masked[0]) <= 4 and masked[0] == masked[1][: len(masked[0])]


def test_training_masks_anew_and_evaluation_always_alike(folder):
    task = loaded(folder)
    one, other = prepared(task, seed=0), prepared(task, seed=1)
    reads = []
    for epoch in (0, 1, 0):
        one.train.epoch.fill_(epoch)
        reads.append([one.train[index]["labels"].tolist() for index in range(20)])
    assert reads[0] != reads[1] and reads[0] == reads[2]
    assert reads[0] != [other.train[index]["labels"].tolist() for index in range(20)]
    assert len(one.evaluation[""]) == len(other.evaluation[""])
    for example, again in zip(one.evaluation[""], other.evaluation[""], strict=True):
        assert all(example[name].equal(again[name]) for name in ("input_ids", "labels"))
        assert (example["labels"] != IGNORE_INDEX).any()


def test_labels_are_the_masked_tokens_and_never_special_tokens(folder):
    task = loaded(folder, mlm_probability=0.4)
    asked = total = 0
    sight = prepared(task)
    for index, sentence in enumerate(task.train["sentence"]):
        example, tokens = sight.train[index], torch.tensor(TOKENIZER(sentence)["input_ids"])
        where = example["labels"] != IGNORE_INDEX
        assert example["labels"][where].equal(tokens[where])
        assert example["input_ids"][~where].equal(tokens[~where])
        assert not where[0] and not where[-1]  # [CLS] and [SEP]
        asked, total = asked + int(where.sum()), total + len(sentence)
    assert asked / total == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize("pad", [False, True])
def test_labels_are_for_every_position_that_is_decoded(folder, pad):
    """The loss is over the masked tokens, whatever the length of the inputs."""
    sight = prepared(loaded(folder, pad_to_max_length=pad))
    examples = sight.evaluation[""][:3]
    lengths = [int(example["attention_mask"].sum()) for example in examples]
    batch = sight.collate(examples)
    assert len(set(lengths)) > 1
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, POSITIONS if pad else max(lengths))
    assert batch["labels"].shape == (3, POSITIONS)
    model = ToMePerceiverForMaskedLM(CONFIG).eval()
    output = model(**batch)
    chosen = [
        (output.logits[row, place], example["labels"][place])
        for row, example in enumerate(examples)
        for place in torch.nonzero(example["labels"] != IGNORE_INDEX)[:, 0]
    ]
    expected = torch.stack([F.cross_entropy(logits, label) for logits, label in chosen]).mean()
    torch.testing.assert_close(output.loss, expected)


def test_a_model_from_scratch_decodes_no_more_positions_than_are_read(folder):
    for length, positions in ((20, 20), (None, POSITIONS)):
        config = ToMePerceiverConfig(**MODEL)
        loaded(folder, max_seq_length=length).fit_config(config, TOKENIZER)
        assert (config.max_position_embeddings, config.vocab_size) == (positions, len(TOKENIZER))


def test_a_dataset_and_files_beside_it_are_one_pool(folder, tmp_path):
    own = {
        role: str(write_table(tmp_path / f"{role}.csv", {"text": [f"own {role}"]})) for role in ("train", "validation")
    }
    task = loaded(folder, **{f"{role}_file": path for role, path in own.items()})
    assert "own train" in task.train["sentence"] and "own validation" in task.evaluation[""]["sentence"]
    assert len(task.train) == 111 - 38 + 1 and task.source.dataset == Path(folder).name


def joined(tmp_path, length: int = 10, **given: object) -> MlmTask:
    columns = {
        "train": {"premise": ["ab", "cde", None, "ab", "f"], "hypothesis": ["xy", " ", "z", "xy", "held"]},
        "validation": {"premise": ["held", "out"], "hypothesis": ["ghijk", "lmno"]},
    }
    paths = {f"{role}_file": str(write_table(tmp_path / f"{role}.parquet", columns[role])) for role in columns}
    arguments = MlmDataArguments(**paths, line_by_line=False, max_seq_length=length, **given)
    return load_mlm_task(arguments, predict=False, seed=0)


def test_lines_are_joined_with_special_tokens_around_each_and_cut(tmp_path):
    """Sentences of a row stay together, rows keep their order, and duplicates are dropped; a row of which
    a sentence is evaluated is not trained on. What does not fill an input is dropped."""
    tokens = joined(tmp_path, length=7).tokenize(CONFIG, TOKENIZER)
    sentences = ["ab", "xy", "cde", "z"]
    ids = [token for sentence in sentences for token in TOKENIZER(sentence)["input_ids"]]
    assert tokens.train["input_ids"] == [ids[:7], ids[7:14]] and len(ids) == 16
    assert set(tokens.train.column_names) == {"input_ids", "attention_mask"}
    assert [sum(mask) for mask in tokens.train["attention_mask"]] == [7, 7]


def test_samples_are_inputs_of_joined_lines(tmp_path):
    sight = prepared(joined(tmp_path, length=7, max_train_samples=1, max_eval_samples=2, mlm_probability=1.0))
    assert (len(sight.train), len(sight.evaluation[""])) == (1, 2)
    example = sight.train[0]
    special = [TOKENIZER.cls_token_id, TOKENIZER.sep_token_id]
    assert not set(example["labels"].tolist()) & set(special)  # in the middle of an input too


def test_joined_lines_that_fill_no_input(tmp_path):
    with pytest.raises(BadInput, match="train.parquet.*'train'.*--max_seq_length"):
        prepared(joined(tmp_path, length=20))


@pytest.mark.parametrize("line_by_line", [True, False])
def test_tokens_are_cached_on_disk_by_all_that_changes_them(folder, line_by_line):
    """Also if one split is cached and the next is not: using a fast tokenizer changes its state."""

    def files(tokenizer, **given: object) -> list[str]:
        task = loaded(folder, line_by_line=line_by_line, **{"max_seq_length": 9} | given)
        tokens = task.tokenize(CONFIG, tokenizer)
        return [each["filename"] for split in (tokens.evaluation[""], tokens.train) for each in split.cache_files]

    fast, other = (fast_tokenizer(letters) for letters in ("abc", "cba"))
    first = files(fast)
    written = [Path(file).stat().st_mtime_ns for file in first]
    fast(["a"], truncation=True, max_length=3, padding="max_length")
    assert files(fast) == first == files(fast_tokenizer("abc"))
    assert [Path(file).stat().st_mtime_ns for file in first] == written
    for changed in (files(other), files(fast, max_seq_length=8), files(TOKENIZER)):
        assert set(changed).isdisjoint(first)


def fast_tokenizer(letters: str) -> PreTrainedTokenizerFast:
    tokens = ["[PAD]", "[UNK]", "[MASK]", *letters]
    tokenizer = Tokenizer(models.WordPiece({token: index for index, token in enumerate(tokens)}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]"
    )


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"mlm_probability": 0.0}, ["--mlm_probability 0.0", "above 0"]),
        ({"mask_replace_prob": -0.1}, ["--mask_replace_prob -0.1", "0 or more"]),
        ({"mask_replace_prob": 0.8, "random_replace_prob": 0.3}, ["--mask_replace_prob 0.8", "at most 1"]),
        ({"validation_split_percentage": 100}, ["--validation_split_percentage 100", "1 to 99"]),
        ({"max_seq_length": 0}, ["--max_seq_length 0"]),
    ],
)
def test_wrong_arguments_are_refused(given, says):
    with pytest.raises(BadInput) as error:
        MlmDataArguments(**given)
    assert all(part in str(error.value) for part in says), error.value


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, ["--train_file", "--dataset_name"]),
        ({"dataset_name": "not/there"}, ["--dataset_name not/there"]),
        ({"dataset_config_name": "one,three"}, ["--dataset_name", "three"]),
        ({"predict": True}, ["--do_predict", "--do_eval"]),
    ],
)
def test_missing_data_are_refused(folder, given, says):
    predict = given.pop("predict", False)
    data = {"dataset_name": folder} if "dataset_config_name" in given or predict else {}
    with pytest.raises(BadInput) as error:
        load_mlm_task(MlmDataArguments(**data | given), predict=predict, seed=0)
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in says), error.value


def test_a_file_to_predict_is_refused_and_not_ignored(tmp_path):
    (tmp_path / "test.txt").write_text("one\n")
    with pytest.raises(BadInput, match=r"^--test_file .*test.txt: is for classification.* --validation_file$"):
        load_mlm_task(MlmDataArguments(test_file=str(tmp_path / "test.txt")), predict=False, seed=0)


@pytest.mark.parametrize(
    ("splits", "says"),
    [
        ({"train": ["a"], "validation": ["A."]}, ["train.csv", "'train'", "duplicates of evaluated ones"]),
        ({"train": ["a", "b"], "validation": [" "]}, ["no sentences for 'validation'"]),
        ({"train": ["a", "b"]}, ["train.csv", "'validation'"]),  # 5% of two
    ],
)
def test_files_without_sentences(tmp_path, splits, says):
    with pytest.raises(BadInput) as error:
        files(tmp_path, **splits)
    assert all(part in str(error.value) for part in says), error.value


def test_models_and_tokenizers_that_do_not_fit(folder):
    task = loaded(folder)
    classifier = ToMePerceiverConfig(architectures=["ToMePerceiverForSequenceClassification"])
    with pytest.raises(BadInput, match="ToMePerceiverForSequenceClassification.*PerceiverForMaskedLM"):
        task.model_class_name(classifier)
    maskless = PerceiverTokenizer()
    maskless.mask_token = None
    with pytest.raises(BadInput, match="mask token"):
        task.prepare(CONFIG, maskless, seed=0)
    with pytest.raises(BadInput, match=f"--max_seq_length {POSITIONS + 1}"):
        prepared(loaded(folder, max_seq_length=POSITIONS + 1))
    with pytest.raises(BadInput, match="--mlm_probability 1e-09"):
        prepared(loaded(folder, mlm_probability=1e-9))


def test_a_sweep_takes_the_data_that_the_checkpoint_is_for(folder, tmp_path):
    stock_model("ForMaskedLM").save_pretrained(tmp_path)
    model = ModelArguments(model_name_or_path=str(tmp_path))
    data = SweepDataArguments(dataset_name=folder, dataset_config_name="one,two")
    task = load_sweep_task(data, model, seed=0)
    assert isinstance(task, MlmTask) and len(task.train) == 111 - 38
    with pytest.raises(BadInput, match="--task_name mrpc.*PerceiverForMaskedLM.*finds masked tokens"):
        load_sweep_task(SweepDataArguments(task_name="mrpc"), model, seed=0)
    data.max_predict_samples = 3
    with pytest.raises(BadInput, match="^--max_predict_samples 3: is for classification"):
        load_sweep_task(data, model, seed=0)
