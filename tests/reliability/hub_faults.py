# SPDX-License-Identifier: Apache-2.0
"""Cases of a Hub that fails: results stay on disk, one line says so, and `--push_only` pushes them later."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.reliability.case import PASSED, Attempt, Finding, said, shown
from tests.reliability.inputs import OUTPUT, Command, Inputs
from tests.reliability.kills import SEARCHED
from tests.reliability.left import broken
from tests.reliability.running import Outcome, run_forked
from tests.support.loopback_hub import USER, WRITE_TOKEN, LoopbackHub

# Requests of a push in their order; the first two come before any work.
REQUESTS = {
    "the user": "GET /api/whoami-v2",
    "the repository": "POST /api/repos/create",
    "the newest commit": "GET /api/models/.*/revision/main",
    "the card": "POST /api/validate-yaml",
    "the kinds of upload": "POST .*/preupload/main",
    "the places of upload": "POST .*/objects/batch",
    "an upload": "PUT /large/",
    "the commit": "POST .*/commit/main",
}
BEFORE_WORK = ("the user", "the repository")
FAILURES = ("silent", "cut", "429", "503")
# Small values of the limits in `experiments/publishing/hub.py`, in seconds.
ANSWER_SECONDS, RETRY_WAITS = 0.4, (0.05,)


@dataclass(frozen=True)
class HubFaultCase:
    """A run that pushes to a Hub that fails every time one request comes."""

    request: str
    how: str

    kind = "faults"

    @property
    def row(self) -> str:
        return f"the Hub: {'never answers' if self.how == 'silent' else 'drops' if self.how == 'cut' else self.how}"

    @property
    def id(self) -> str:
        return f"{self.row}: {self.request}"

    def attempt(self, inputs: Inputs, folder: Path) -> Attempt:
        folder.mkdir(parents=True)
        hub_arguments: Command = ("--hub_token", WRITE_TOKEN, "--output_dir", OUTPUT)
        command = (*inputs.text_evaluation, *SEARCHED[:2], "--schedule", "floor", "--push_to_hub", *hub_arguments)
        with LoopbackHub() as hub:
            prepare = partial(use_hub, hub.url)
            hub.fail(REQUESTS[self.request], 10_000, self.how)
            first = run_forked("run_glue.py", command, folder, prepare=prepare)
            finding = self._judge(first, folder / OUTPUT)
            if finding == PASSED and self.request not in BEFORE_WORK:
                hub.mend()
                push = (*command, "--push_only")
                again = run_forked("run_glue.py", push, folder, prepare=prepare)
                finding = self._judge_push(again, hub, folder / OUTPUT)
        return Attempt(shown("run_glue.py", command), finding, f"{first.exit_code}: {said(first)}")

    def _judge(self, outcome: Outcome, output_dir: Path) -> Finding:
        early = self.request in BEFORE_WORK
        if outcome.fault != PASSED:
            return outcome.fault
        if outcome.exit_code != (2 if early else 1) or len(outcome.errors) != 1:
            return f"exit code {outcome.exit_code}: {said(outcome)}", "other"
        if WRITE_TOKEN in outcome.stderr + outcome.stdout:
            return "the token is shown", "other"
        if early:
            worked = outcome.evaluation_steps or output_dir.exists()
            return ("work before the line", "other") if worked else PASSED
        wrong = broken(output_dir)
        if wrong or not (output_dir / "README.md").exists():
            return f"not on disk: {wrong}", "silently wrong"
        return PASSED

    def _judge_push(self, outcome: Outcome, hub: LoopbackHub, output_dir: Path) -> Finding:
        if outcome.fault != PASSED or outcome.exit_code:
            return f"--push_only: exit code {outcome.exit_code}: {said(outcome)}", "other"
        pushed = hub.files(f"{USER}/{OUTPUT}")
        same = pushed.get("model.safetensors") == (output_dir / "model.safetensors").read_bytes()
        return PASSED if same and len(hub.commits) == 1 else (f"{len(hub.commits)} commits", "silently wrong")


def use_hub(url: str) -> None:
    """Use a Hub in this process, with short waits."""
    import huggingface_hub.constants as constants
    import huggingface_hub.utils
    import huggingface_hub.utils._http

    from experiments.publishing import hub

    os.environ["NO_PROXY"] = "127.0.0.1"
    constants.ENDPOINT, constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = url, False, True
    hub.HF_HUB_DISABLE_XET = True
    hub.ANSWER_SECONDS, hub.RETRY_WAITS = ANSWER_SECONDS, RETRY_WAITS
    huggingface_hub.utils.close_session()
    sleep = huggingface_hub.utils._http.time.sleep
    huggingface_hub.utils._http.time = _ShortWaits(sleep)


class _ShortWaits:
    """Stands for the module `time`: waits of huggingface_hub between its own retries take a hundredth."""

    def __init__(self, sleep: object) -> None:
        self._sleep = sleep

    def sleep(self, seconds: float) -> None:
        self._sleep(seconds / 100)


def hub_fault_cases() -> Iterator[HubFaultCase]:
    for how in FAILURES:
        for request in REQUESTS:
            yield HubFaultCase(request, how)
