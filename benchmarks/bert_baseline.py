# SPDX-License-Identifier: Apache-2.0
"""What a BERT gets on a text task where `run_glue.py` finetunes a Perceiver: the same examples, Trainer and arguments.

Only the model and its tokenizer differ; no merging, and no segments of a pair, which a Perceiver does not have either.

    python benchmarks/bert_baseline.py examples/language/rte.yaml \\
        --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 --output_dir outputs/language/rte_bert

OUTPUT_DIR gets baseline.json.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

# A script's own folder is on the path, the repository's root, where the modules are, is not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, set_seed

from experiments.command_line import parse_arguments
from experiments.errors import BadInput, exit_on_bad_input, naming
from experiments.measurement import describe_environment
from experiments.publishing.tables import with_error
from experiments.tasks.glue import GlueDataArguments, load_glue_task
from experiments.training.evaluation import evaluate
from experiments.training.identity import noted_arguments, training_fields
from experiments.training.model_arguments import ModelArguments
from experiments.training.output_folder import write_json
from experiments.training.progress import quieten_transformers
from experiments.training.stage import task_trainer
from experiments.training.trainer_arguments import TrainerArguments


def main() -> None:
    model_args, data, training = parse_arguments(__doc__, ModelArguments, GlueDataArguments, TrainerArguments)
    name = model_args.model_name_or_path
    if name is None:
        raise BadInput("--model_name_or_path: not given; allowed is a checkpoint of a text encoder")
    quieten_transformers()
    set_seed(training.seed)
    task = load_glue_task(data, False, training.seed, True, **model_args.dataset_options())
    labels = task.labels or ["LABEL_0"]
    with naming(f"--model_name_or_path {name}", Exception):
        tokenizer = AutoTokenizer.from_pretrained(name, **model_args.download_options())
        config = AutoConfig.from_pretrained(
            name,
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
            problem_type="single_label_classification" if task.labels else "regression",
            **model_args.download_options(),
        )
        model = AutoModelForSequenceClassification.from_pretrained(name, config=config, **model_args.download_options())
    prepared = task.prepared(config, tokenizer, training.seed)
    trainer = task_trainer(model, prepared, training, Path(training.output_dir))
    if training.do_train:
        result = trainer.train()
        trainer.log_metrics("train", result.metrics | {"train_samples": len(prepared.train)})
    found = evaluate(trainer, prepared, "eval")
    trainer.log_metrics("eval", found.metrics)
    noted = noted_arguments(model_args, data) | training_fields(training)
    environment = describe_environment()
    figures = {"arguments": noted, "environment": environment, "source": asdict(task.source), "metrics": found.metrics}
    write_json(Path(training.output_dir) / "baseline.json", figures)
    metric = task.main_metric
    value, error = (100 * found.metrics[f"eval_{metric}{ending}"] for ending in ("", "_stderr"))
    parameters = sum(each.numel() for each in model.parameters()) / 1e6
    examples = len(prepared.evaluation[""])
    print(f"{name}, {parameters:.1f} million parameters: {metric} {with_error(value, error)}, {examples} examples")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
