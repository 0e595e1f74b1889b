# SPDX-License-Identifier: Apache-2.0
"""From a command line, or a single JSON or YAML file, to dataclasses of arguments."""

from __future__ import annotations

import logging
import shlex
import sys
from argparse import RawDescriptionHelpFormatter
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from experiments.bad_input import naming

logger = logging.getLogger(__name__)

SECRETS = ("--token", "--hub_token", "--hub-token")
# As `torch.cpu.get_capabilities` calls what multiplies bfloat16 on x86 and on Arm; without any it is emulated.
BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


class TrainerArguments(TrainingArguments):
    """`TrainingArguments`.

    Modifications:
    - `--help` lists them last, under a heading of their own
    - a warning if bfloat16 would be emulated
    """

    _argument_group_name = "training and evaluation, as transformers' Trainer takes them"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.bf16 or self.bf16_full_eval) and self.device.type == "cpu":
            capabilities = torch.cpu.get_capabilities()
            if not any(capabilities.get(name) for name in BFLOAT16_INSTRUCTIONS):
                logger.warning("--bf16: this processor has no instructions for it; float32 is many times faster here")


def parse_arguments(description: str, *dataclass_types: type) -> tuple[Any, ...]:
    """Parse the command line as the official example scripts do.

    Args:
        description: what `--help` begins with.
        dataclass_types: whose fields are the arguments.

    Returns:
        An instance of each. `SCRIPT.py FILE.json` or `FILE.yaml` reads the arguments from that file.

    Raises:
        BadInput: for a file that is not there or values that the dataclasses refuse. What argparse refuses exits with
            code 2 by itself.
    """
    parser = HfArgumentParser(
        dataclass_types,
        # A list of them all would be pages long and come before the description.
        usage="%(prog)s [arguments] | FILE.yaml | FILE.json",
        description=description,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    with naming("arguments", OSError, ValueError, yaml.YAMLError):
        if len(sys.argv) == 2 and sys.argv[1].endswith((".yaml", ".yml")):
            return parser.parse_yaml_file(sys.argv[1])
        if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
            return parser.parse_json_file(sys.argv[1])
        return parser.parse_args_into_dataclasses()


def shown_command() -> str:
    """The command line that is running, to be written down: without the tokens in it."""
    words = ["python", *sys.argv]
    for index, word in enumerate(words):
        option, equals, _ = word.partition("=")
        if option in SECRETS:
            if equals:
                words[index] = f"{option}=..."
            elif index + 1 < len(words):
                words[index + 1] = "..."
    return shlex.join(words)
