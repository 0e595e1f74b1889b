# SPDX-License-Identifier: Apache-2.0
"""Tests of eval_sweep.py, run on tiny checkpoints: what it writes, how it resumes, messages for bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import PerceiverImageProcessorPil, PerceiverTokenizer

import frontier_tome_perceiver
from configuration_tome_perceiver import ToMePerceiverConfig
from cost_tome_perceiver import Merging
from experiments.merging.arguments import MergeArguments
from modeling_tome_perceiver import ToMePerceiverForImageClassificationConvProcessing
from tests.support.script_run import bad_input_line, call_script, run_script
from tests.support.tiny_images import LABELS, MODEL, write_images
from tests.support.tiny_models import stock_model
from tests.support.tiny_texts import POSITIONS, write_glue

R = ("0", "1", "2,0,1,0")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[object, ...]:
    """Write a checkpoint that merges, and images; return the arguments."""
    folder = tmp_path_factory.mktemp("inputs")
    config = ToMePerceiverConfig(**MODEL | {"model_type": "tome_perceiver", "num_labels": len(LABELS), "r": 3})
    ToMePerceiverForImageClassificationConvProcessing(config).save_pretrained(folder / "model")
    PerceiverImageProcessorPil(do_center_crop=False, size={"height": 16, "width": 16}).save_pretrained(folder / "model")
    images = write_images(folder / "images", {"train": 24, "test": 20})
    return (
        "--model_name_or_path", folder / "model", "--dataset_name", images, "--use_cpu",
        "--timing_rounds", 2, "--timing_batch_size", 2, "--save_strategy", "no",
    )  # fmt: skip


@pytest.fixture(scope="module")
def sweep(inputs, tmp_path_factory) -> Path:
    """Run a sweep with retraining in its own process."""
    output_dir = tmp_path_factory.mktemp("outputs") / "sweep"
    result = run_script("eval_sweep.py", *inputs, "--r", *R, "--retrain_epochs", 1, "--output_dir", output_dir)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "| r=2,0,1,0 |" in result.stdout
    return output_dir


def read(output_dir: Path) -> dict:
    return json.loads((output_dir / "sweep_results.json").read_text())


def test_every_cell_is_measured(sweep):
    results = read(sweep)
    assert [row["name"] for row in results["rows"]] == ["r=0", "r=1", "r=2,0,1,0"]
    assert [row["r"] for row in results["rows"]] == [[0] * 4, [1] * 4, [2, 0, 1, 0]]
    assert [row["latents_left"] for row in results["rows"]] == [8, 4, 5]
    assert results["evaluated_on"] == 20
    for row in results["rows"]:
        for stage in ("merged", "retrained"):
            # There are 20 images, so an accuracy is a multiple of a twentieth.
            assert row[stage]["accuracy"] * 20 == pytest.approx(round(row[stage]["accuracy"] * 20))
            assert 0 <= row[stage]["accuracy_stderr"] < 0.12
        assert row["throughput"] > 0 and row["latency_ms"]["median"] > 0 and row["peak_memory_mb"] > 0
        assert row["speedup"]["lower"] <= row["speedup"]["median"] <= row["speedup"]["upper"]


def test_the_file_says_what_made_it(sweep):
    """It holds the arguments without tokens, the environment, and the time of each stage."""
    results = read(sweep)
    assert results["arguments"]["retrain_epochs"] == 1 and "token" not in results["arguments"]
    assert results["environment"]["torch"] and results["environment"]["date"]
    assert set(results["seconds"]) == {
        "resolving budgets", "evaluating merged", "timing", "loading", "retraining", "evaluating retrained"
    }  # fmt: skip
    assert results["source"]["split"] == "test"


def test_the_folder_is_the_unmerged_checkpoint_with_the_report_as_its_card(inputs, sweep):
    model = ToMePerceiverForImageClassificationConvProcessing.from_pretrained(sweep)
    start = ToMePerceiverForImageClassificationConvProcessing.from_pretrained(inputs[1])
    assert (model.r, start.r) == (0, 3)
    assert model.base_model.embeddings.latents.equal(start.base_model.embeddings.latents)
    card = ModelCard.load(sweep / "README.md")
    assert "| r=2,0,1,0 |" in card.text and card.data.pipeline_tag == "image-classification"
    assert len(card.data.eval_results) == 2 * len(R)


def test_text_with_two_evaluation_splits(tmp_path):
    """A row has the figures of both evaluation splits of MNLI; stock text checkpoints work like ours."""
    stock = stock_model("ForSequenceClassification", max_position_embeddings=POSITIONS, dtype=torch.float32)
    stock.save_pretrained(tmp_path / "stock")
    PerceiverTokenizer().save_pretrained(tmp_path / "stock")
    call_script(
        "eval_sweep.py", "--model_name_or_path", tmp_path / "stock", "--task_name", "mnli", "--dataset_name",
        write_glue(tmp_path / "glue", "mnli"), "--r", "0", "1", "--use_cpu", "--timing_rounds", 0,
        "--output_dir", tmp_path / "sweep",
    )  # fmt: skip
    for row in read(tmp_path / "sweep")["rows"]:
        names = {"accuracy", "accuracy_stderr", "accuracy_mm", "accuracy_mm_stderr"}
        changes = {f"accuracy{half}_change{end}" for half in ("", "_mm") for end in ("", "_stderr")}
        assert set(row["merged"]) == (names if row["name"] == "r=0" else names | changes)
        assert "retrained" not in row and "speedup" not in row
    assert "**Accuracy mm**" in (tmp_path / "sweep" / "sweep_report.md").read_text()


def test_retrained_checkpoints_are_kept_and_merge(sweep):
    model = ToMePerceiverForImageClassificationConvProcessing.from_pretrained(sweep / "retrained" / "r2_0_1_0")
    assert model.r == [2, 0, 1, 0]
    card = (sweep / "retrained" / "r2_0_1_0" / "README.md").read_text()
    for said in ("`num_train_epochs`: 1", "training samples: 24", "merge_method: bipartite", "'r=2,0,1,0'"):
        assert said in card


def test_the_same_command_continues(inputs, sweep, tmp_path):
    """Cells in the file stay as they are, missing ones are measured."""
    output_dir = tmp_path / "sweep"
    shutil.copytree(sweep, output_dir)
    results = read(output_dir)
    accuracy = results["rows"][0]["merged"]["accuracy"]
    results["rows"][0]["merged"] = {"accuracy": 0.123, "accuracy_stderr": 0.01}
    lost = results["rows"][1].pop("merged")
    (output_dir / "sweep_results.json").write_text(json.dumps(results))
    call_script("eval_sweep.py", *inputs, "--r", *R, "--retrain_epochs", 1, "--output_dir", output_dir)
    assert read(output_dir)["rows"][0]["merged"]["accuracy"] == 0.123
    measured = read(output_dir)["rows"][1]["merged"]
    assert measured == pytest.approx(lost)
    assert measured["accuracy_change"] == pytest.approx(measured["accuracy"] - accuracy)


def test_a_sweep_of_a_version_with_other_rows_is_refused_and_kept(inputs, sweep, tmp_path, capsys):
    output_dir = tmp_path / "sweep"
    shutil.copytree(sweep, output_dir)
    results = read(output_dir)
    del results["rows"][1]["fields"]["latent_groups"]
    (output_dir / "sweep_results.json").write_text(json.dumps(results))
    with pytest.raises(SystemExit) as exit:
        call_script("eval_sweep.py", *inputs, "--r", *R, "--retrain_epochs", 1, "--output_dir", output_dir)
    assert exit.value.code == 2 and "latent_groups" in capsys.readouterr().err
    assert read(output_dir) == results


def test_a_sweep_is_not_asked_to_begin_anew_in_its_folder(inputs, tmp_path, capsys):
    given = (*inputs, "--r", 1, "--resume_from_checkpoint", "false", "--output_dir", tmp_path / "out")
    line = bad_input_line(capsys, "eval_sweep.py", *given)
    assert line.startswith("error: --resume_from_checkpoint false: ") and "--output_dir" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["weights", "config", "label", "label_smoothing_factor", "min_latents"])
def test_what_an_earlier_sweep_measured_is_of_the_same_weights_data_and_arguments(
    sweep, inputs, tmp_path, capsys, change
):
    """Paths are equal, but one number in a file or one argument differs."""
    model, images, output_dir = (tmp_path / name for name in ("model", "images", "sweep"))
    shutil.copytree(inputs[1], model)
    shutil.copytree(inputs[3], images)
    shutil.copytree(sweep, output_dir)
    given = ("--model_name_or_path", model, "--dataset_name", images, *inputs[4:], "--r", *R, "--retrain_epochs", 1)
    given = (*given, "--output_dir", output_dir, "--cache_dir", tmp_path / "cache")
    before = (output_dir / "sweep_results.json").read_bytes()
    call_script("eval_sweep.py", *given)  # the same content at another place is the same sweep
    assert json.loads((output_dir / "sweep_results.json").read_bytes())["rows"] == json.loads(before)["rows"]
    if change == "weights":
        tensors = load_file(model / "model.safetensors")
        next(tensor for tensor in tensors.values() if tensor.is_floating_point()).view(-1)[0] += 1e-6
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    elif change == "config":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"attention_probs_dropout_prob": 0.1}))
    elif change == "label":
        write_images(images, {"train": 24, "test": 20}, first_label=2)
    else:
        given = (*given, f"--{change}", {"label_smoothing_factor": 0.1, "min_latents": 2}[change])
    line = bad_input_line(capsys, "eval_sweep.py", *given)
    says = {"weights": "weights to start from", "label": "content of its evaluation"}.get(change, change)
    assert "holds another run" in line and says in line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--r", "1", "--min_latents", "99"), ("min_latents", "99", "8")),
        (("--flops_ratio", "0.01"), ("flops_ratio", "0.01 is out of reach", "merging reaches")),
        # Refused before the search for the other row, which would write a log.
        (("--flops_ratio", "0.99", "0.01", "--schedule", "search", "floor"), ("flops_ratio", "0.01", "floor")),
        (("--flops_ratio", "0.1", "--schedule", "skip_blocks"), ("flops_ratio", "0.1", "skip_blocks")),
        # The only split beside training is the test split, which is evaluated on.
        (("--max_changed", "0.5", "0.2"), ("--max_changed 0.5", "a test split (--test_file, --test_dir)")),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(inputs, tmp_path, capsys, arguments, says):
    line = bad_input_line(capsys, "eval_sweep.py", *inputs, *arguments, "--output_dir", tmp_path / "out")
    assert all(part in line for part in says), line
    assert not (tmp_path / "out").exists()


def test_text_arguments_for_an_image_checkpoint_are_named(inputs, tmp_path, capsys):
    given = (*inputs, "--r", "1", "--task_name", "mrpc", "--output_dir", tmp_path / "out")
    line = bad_input_line(capsys, "eval_sweep.py", *given)
    assert "--task_name mrpc" in line and "classifies images" in line


def test_controls_searches_and_ablations_are_rows(inputs, tmp_path):
    """Rows: fewer runs of the shared blocks, a searched schedule, each with every metric and attention."""
    given = (
        *inputs, "--r", "0", "--flops_ratio", 0.99, "--schedule", "skip_blocks", "search", "--calibration_samples", 4,
        "--merge_metric", "key", "hidden", "--proportional_attention", "true", "false", "--timing_rounds", 0,
        "--output_dir", tmp_path / "sweep",
    )  # fmt: skip
    call_script("eval_sweep.py", *given)
    rows = {row["name"]: row for row in read(tmp_path / "sweep")["rows"]}
    assert list(rows) == [
        "r=0",
        *(
            f"{name} {metric} {attention}"
            for metric in ("key", "hidden")
            for attention in ("proportional", "plain")
            for name in ("flops=0.99 skip_blocks", "flops=0.99 search")
        ),
    ]
    skipping = rows["flops=0.99 skip_blocks hidden plain"]
    assert skipping["num_blocks"] == 1 and sum(skipping["r"]) == 0 and skipping["flops_ratio"] <= 0.99
    assert (skipping["merge_metric"], skipping["proportional_attention"]) == ("hidden", False)
    assert "accuracy_change" in skipping["merged"]
    assert all(row["flops_ratio"] <= 0.99 for name, row in rows.items() if "search" in name)
    # When resumed, nothing is searched for again, and the rows stay the same.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MergeArguments, "calibrate", None)
        call_script("eval_sweep.py", *given)
    model = ToMePerceiverForImageClassificationConvProcessing.from_pretrained(tmp_path / "sweep")
    # No frontier is saved, because each was measured with another metric or attention than the checkpoint's.
    assert model.config.num_blocks == 2 and model.r == 0 and model.config.merge_frontier is None


def test_fixed_groups_are_rows_beside_matching(inputs, tmp_path):
    call_script(
        "eval_sweep.py", *inputs, "--r", "0", "--flops_ratio", 0.99, "--merge_method", "bipartite", "groups",
        "--calibration_samples", 4, "--timing_rounds", 0, "--output_dir", tmp_path / "sweep",
    )  # fmt: skip
    rows = {row["name"]: row for row in read(tmp_path / "sweep")["rows"]}
    matched, grouped = "flops=0.99 search bipartite", "flops=0.99 search groups"
    assert list(rows) == ["r=0", matched, grouped]
    fields = rows[grouped]["fields"]
    # Fixed groups in a layer, or of the learned latents.
    assert rows[matched]["fields"]["merge_groups"] is None and (fields["merge_groups"] or fields["latent_groups"])
    assert rows[grouped]["merge_method"] == "groups" and rows[grouped]["latents_left"] < 8
    assert all(rows[name]["flops_ratio"] <= 0.99 for name in (matched, grouped))


def test_learned_latents_that_merge_before_the_layers_are_compared_with_none(inputs, tmp_path, monkeypatch):
    """Such a row merges nothing in the layers, but it is not the baseline."""

    def choose(arguments, model, *rest):
        if arguments.has_budget:
            groups = [0, 0, *range(1, model.config.num_latents - 1)]
            Merging.of(model.config).by(0, latent_groups=groups).apply(model.config)

    monkeypatch.setattr(MergeArguments, "calibrate", lambda *rest: None)
    monkeypatch.setattr(MergeArguments, "choose", choose)
    call_script(
        "eval_sweep.py", *inputs, "--r", 1, "--flops_ratio", 0.99, "--merge_metric", "key", "hidden",
        "--timing_rounds", 0, "--output_dir", tmp_path / "sweep",
    )  # fmt: skip
    unmerged, *rows = read(tmp_path / "sweep")["rows"]
    assert "accuracy_change" not in unmerged["merged"] and [row["r"][0] for row in rows] == [1, 0, 1, 0]
    before = unmerged["merged"]["accuracy"]
    for row in rows:
        assert row["merged"]["accuracy_change"] == pytest.approx(row["merged"]["accuracy"] - before), row["name"]
    predicted = tmp_path / "sweep" / "predictions"
    assert (predicted / "unmerged.npy").read_bytes() == (predicted / "merged_r0.npy").read_bytes()


def test_a_share_of_the_time_is_a_row(inputs, tmp_path, monkeypatch):
    """With a fake clock, by which each stronger row takes a tenth less."""

    def seconds(run, variants, rounds, bar=None):
        return [[0.9**index for index in range(len(variants))]] * rounds

    monkeypatch.setattr(frontier_tome_perceiver, "interleaved_seconds", seconds)
    call_script(
        "eval_sweep.py", *inputs, "--latency_ratio", 0.95, "--timing_rounds", 0, "--output_dir", tmp_path / "sweep",
    )  # fmt: skip
    unmerged, row = read(tmp_path / "sweep")["rows"]
    assert (unmerged["name"], row["name"]) == ("r=0", "latency=0.95 search") and row["flops_ratio"] < 1


@pytest.fixture(scope="module")
def along(inputs, tmp_path_factory) -> tuple[Path, tuple[object, ...]]:
    """Run a sweep that measures the frontier of a checkpoint on unlabelled images; return its folder and inputs."""
    folder = tmp_path_factory.mktemp("along")
    images = write_images(folder / "images", {"train": 24, "validation": 20, "test": 64})
    given = (*inputs[:3], images, *inputs[4:6], 0, *inputs[7:])
    call_script(
        "eval_sweep.py", *given, "--r", 1, "--max_changed", 0.9, "--flops_ratio", 0.98, 0.99, "--frontier",
        "--output_dir", folder / "sweep",
    )  # fmt: skip
    return folder / "sweep", given


def test_all_budgets_come_from_one_frontier(along):
    """Budgets of quality and of cost, and every row of the frontier, are measured on labelled images in one table."""
    folder, _ = along
    rows = {row["name"]: row for row in read(folder)["rows"]}
    shares = [float(name.removeprefix("frontier=")) for name in rows if name.startswith("frontier=")]
    assert list(rows)[:5] == ["r=0", "r=1", "flops=0.98 search", "flops=0.99 search", "changed=0.9 search"]
    assert len(shares) >= 2 and shares == sorted(shares, reverse=True)
    config = json.loads((folder / "config.json").read_text())
    frontier = config["merge_frontier"]
    assert config["r"] == 0 and frontier == read(folder)["frontier"]
    measured = {round(row["flops_ratio"], 3): row for row in frontier["rows"]}
    assert set(shares) <= set(measured) and all("accuracy" in row["merged"] for row in rows.values())
    # The rows were chosen on a quarter of the 64 images of the test split.
    assert (frontier["searched"], frontier["held_out"]) == (16, 48)
    within = [row for row in frontier["rows"] if row["flops_ratio"] <= 0.98]
    best = min(within, key=lambda row: (row["divergence"], -row["flops_ratio"]))
    assert rows["flops=0.98 search"]["flops_ratio"] == pytest.approx(best["flops_ratio"])
    card = (folder / "README.md").read_text()
    assert "## How to choose another budget" in card and "frontier.png" in card and f"| {shares[-1]:.3f} |" in card
    assert (folder / "frontier.png").exists() and "rows of the frontier" not in card


def test_a_checkpoint_is_swept_along_the_frontier_that_it_carries(along, tmp_path, monkeypatch):
    """The frontier is not measured again; with another frontier it is another sweep."""
    folder, given = along
    monkeypatch.setattr(MergeArguments, "calibrate", None)
    shutil.copytree(folder, tmp_path / "model")
    given = (given[0], tmp_path / "model", *given[2:], "--frontier", "--output_dir", tmp_path / "sweep")
    call_script("eval_sweep.py", *given)
    names = [row["name"] for row in read(folder)["rows"] if row["series"] == "frontier"]
    assert [row["name"] for row in read(tmp_path / "sweep")["rows"]] == ["r=0", *names]
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    del config["merge_frontier"]["rows"][0]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        call_script("eval_sweep.py", *given)


def test_a_sweep_ends_with_its_best_row_and_saves_it(inputs, tmp_path, capsys):
    """The sentence has the measured figures; the checkpoint merges as that row does, and loads by the code of its card.
    A schedule that looks at no samples merges as `merge_to` does without them, whatever way the config has."""
    given = (*inputs, "--flops_ratio", 0.99, "--schedule", "floor", "--output_dir", tmp_path / "sweep")
    call_script("eval_sweep.py", *given)
    *_, result, checkpoint, picture = capsys.readouterr().out.splitlines()
    before, row = read(tmp_path / "sweep")["rows"]
    assert (before["merge_method"], row["merge_method"], row["merge_metric"]) == ("bipartite", "leader", "key")
    accuracies = [f"{100 * each['merged']['accuracy']:.1f}" for each in (before, row)]
    assert f"{row['speedup']['median']:.2f} times as fast" in result and " -> ".join(accuracies) in result
    assert ("slower than unmerged" in result) == (row["speedup"]["median"] < 1)
    assert checkpoint.endswith(str(tmp_path / "sweep" / "merged"))
    assert picture.endswith(str(tmp_path / "sweep" / "sweep.png"))
    merged, unmerged = (
        ToMePerceiverForImageClassificationConvProcessing.from_pretrained(folder)
        for folder in (tmp_path / "sweep" / "merged", tmp_path / "sweep")
    )
    assert merged.config.merge_schedule == row["r"] and unmerged.r == 0
    card = ModelCard.load(tmp_path / "sweep" / "merged" / "README.md")
    assert "row 'flops=0.99 floor' of the sweep" in card.text and len(card.data.eval_results) == 2
    PerceiverImageProcessorPil.from_pretrained(tmp_path / "sweep" / "merged")
