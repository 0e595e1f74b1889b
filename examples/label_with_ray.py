# SPDX-License-Identifier: Apache-2.0
"""Label a corpus of any size with a text or image classifier on Ray Data, on one machine or a cluster.

  python examples/label_with_ray.py --model_name_or_path outputs/demo/finetuned --data images --output_dir labelled
  python examples/label_with_ray.py --model_name_or_path you/perceiver-mrpc --data pairs --id_column idx \\
      --text_columns sentence1 sentence2 --flops_ratio 0.5 --workers 8 --output_dir labelled

DATA is a folder of images, or a file or folder of parquet, CSV or JSON files with a column of texts or two of pairs.
OUTPUT_DIR/labels gets parquet files with the columns of the data (of images: `path`) and `prediction` and `score`; for
an input that cannot be read these are missing, and `error` says why. After a kill, the same command goes on: it knows
images by their paths, and rows by a column of unique values (--id_column); without one, it starts over. On a cluster,
set RAY_ADDRESS and keep this repository, the data and OUTPUT_DIR on a shared disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pd

# Without this variable, set before the import, Ray reports its usage over the network.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
import ray
import ray.data
from ray.data.checkpoint import CheckpointConfig

# Python adds this script's folder to sys.path, but not the repository root, which holds the modules.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.classifier import Classifier
from experiments.errors import BadInput, exit_on_bad_input, naming, one_line
from experiments.files import check_writable, read_json, write_json
from experiments.training.fingerprints import weights_fingerprint

TEXT_READERS = {"parquet": ray.data.read_parquet, "csv": ray.data.read_csv, "json": ray.data.read_json}
TEXT_READERS["jsonl"] = TEXT_READERS["json"]
IMAGE_ENDINGS = ["png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff"]
IMAGE, PATH = "bytes", "path"
RESULTS = {"prediction": pa.string(), "score": pa.float64(), "error": pa.string()}


class Labeller:
    """A classifier in a process of its own, merged to a budget."""

    def __init__(self, name: str, budget: dict[str, float], columns: list[str], trust_remote_code: bool) -> None:
        self.classifier, self.columns = Classifier(name, trust_remote_code), columns
        if budget:
            with naming(f"--{next(iter(budget))}", ValueError):
                self.classifier.model.merge_to(**budget)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return a batch with the columns `RESULTS`, and without the bytes of images."""
        read, errors = [], []
        for row in zip(*(batch[column].to_pylist() for column in self.columns), strict=True):
            try:
                if self.classifier.takes_images:
                    read.append(self.classifier.read_image(row[0]))
                elif not all(isinstance(text, str) for text in row):
                    raise ValueError("is not a text")
                else:
                    read.append(self.classifier.read_text(row))
                errors.append(None)
            except (ValueError, BadInput) as error:
                errors.append(one_line(error))
        found = iter(self.classifier.classify(read) if read else ())
        rows = [(None, None, error) if error else (*next(found).values(), None) for error in errors]
        kept = [name for name in batch.column_names if name != IMAGE]
        for (name, kind), values in zip(RESULTS.items(), zip(*rows, strict=True), strict=True):
            batch = batch.append_column(name, pa.array(values, kind))
        return batch.select([*kept, *RESULTS])


def read_data(arguments: argparse.Namespace, takes_images: bool) -> ray.data.Dataset:
    """Read the corpus lazily.

    Raises:
        BadInput: for data that are missing or of another kind, or columns that do not fit.
    """
    named, path = f"--data {arguments.data}", Path(arguments.data).resolve()
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    endings = {each.suffix.lower().removeprefix(".") for each in files}
    with naming(named, Exception):
        if takes_images:
            if not endings & {*IMAGE_ENDINGS}:
                raise ValueError("must have images")
            return ray.data.read_binary_files(str(path), include_paths=True, file_extensions=IMAGE_ENDINGS)
        if len(endings) != 1 or not endings <= {*TEXT_READERS}:
            raise ValueError(f"must be files of one kind: {', '.join(TEXT_READERS)}")
        (ending,) = endings
        options = {"lines": True} if ending == "jsonl" else {}
        data = TEXT_READERS[ending]([str(each) for each in files], file_extensions=[ending], **options)
        names = data.schema().names
        for name in (*arguments.text_columns, *([arguments.id_column] if arguments.id_column else [])):
            if name not in names:
                raise ValueError(f"has no column {name}; choose from {', '.join(names)}")
        if taken := {*names} & {*RESULTS}:
            raise ValueError(f"has a column {min(taken)} already; rename it")
    return data


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model_name_or_path", required=True, help="Hub id or folder of a classifier")
    parser.add_argument("--trust_remote_code", action="store_true", help="let the tokenizer run the checkpoint's code")
    parser.add_argument("--data", required=True, help="file or folder to label")
    parser.add_argument("--text_columns", nargs="+", default=["text"], help="one column, or two of pairs (text)")
    parser.add_argument("--id_column", help="column of unique values, to go on after a kill")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--flops_ratio", type=float, help="budget, as a share of the unmerged FLOPs")
    budget.add_argument("--max_changed", type=float, help="largest share of changed answers")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=32, help="inputs in a batch (default: %(default)s)")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the results")
    arguments = parser.parse_args()
    for name in ("workers", "batch_size"):
        if (value := getattr(arguments, name)) < 1:
            raise BadInput(f"--{name} {value}: must be 1 or more")
    if len(arguments.text_columns) > 2:
        raise BadInput(f"--text_columns {' '.join(arguments.text_columns)}: must be one or two")
    if Path(arguments.model_name_or_path).is_dir():  # workers run in other folders
        arguments.model_name_or_path = str(Path(arguments.model_name_or_path).resolve())
    arguments.output_dir = arguments.output_dir.resolve()
    return arguments


def claim_folder(output_dir: Path, record: dict[str, Any], can_go_on: bool) -> bool:
    """Return whether a folder holds the finished labels of this command; without ids, remove those of a killed one.

    Raises:
        BadInput: if it holds those of another command.
    """
    check_writable(f"--output_dir {output_dir}", output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if (path := output_dir / "arguments.json").exists():
        before = read_json(path)
        for name, value in record.items():
            if before.get(name) != value:
                raise BadInput(
                    f"--output_dir {output_dir}: holds labels of another command ({name} {before.get(name)}, now "
                    f"{value}); use another folder or remove it"
                )
        if before["finished"]:
            return True
        if not can_go_on:
            shutil.rmtree(output_dir / "labels", ignore_errors=True)
    write_json(path, record | {"finished": False})
    return False


def main() -> None:
    arguments = parsed_arguments()
    budget = {
        name: getattr(arguments, name)
        for name in ("flops_ratio", "max_changed")
        if getattr(arguments, name) is not None
    }
    # One labeller here finds mistakes before the workers start.
    first = Labeller(arguments.model_name_or_path, budget, [], arguments.trust_remote_code)
    takes_images = first.classifier.takes_images
    columns, id_column = ([IMAGE], PATH) if takes_images else (arguments.text_columns, arguments.id_column)
    record = {"data": arguments.data, "columns": columns, "id_column": id_column, "budget": budget}
    record["weights"] = weights_fingerprint(first.classifier.model)
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    # Workers hold a CPU each as long as they live. Reading, writing and the filter of labelled inputs need two more.
    own_cpus = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": max(os.cpu_count() or 1, arguments.workers + 2)}
    ray.init(runtime_env={"env_vars": {"PYTHONPATH": path}}, logging_level="warning", **own_cpus)
    if arguments.workers > (most := int(ray.cluster_resources()["CPU"]) - 2):
        raise BadInput(f"--workers {arguments.workers}: must be at most {most}; the cluster has {most + 2} CPUs")
    if id_column is not None:
        ray.data.DataContext.get_current().checkpoint_config = CheckpointConfig(
            id_column, str(arguments.output_dir / "checkpoint")
        )
    data = read_data(arguments, takes_images)
    labels = arguments.output_dir / "labels"
    if not claim_folder(arguments.output_dir, record, can_go_on=id_column is not None):
        data.map_batches(
            Labeller,
            fn_constructor_args=(arguments.model_name_or_path, budget, columns, arguments.trust_remote_code),
            batch_format="pyarrow", batch_size=arguments.batch_size, concurrency=arguments.workers, num_cpus=1,
        ).write_parquet(str(labels))  # fmt: skip
        write_json(arguments.output_dir / "arguments.json", record | {"finished": True})
    found = pd.dataset(labels)
    unread = found.count_rows(filter=pd.field("error").is_valid())
    print(f"{found.count_rows() - unread:,} inputs labelled, {unread:,} could not be read; labels are in {labels}")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
