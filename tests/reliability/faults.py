# SPDX-License-Identifier: Apache-2.0
"""Cases of faults of the machine while a run works: full and refusing disks, signals, clocks, workers, terminals.

The run must end in one line with the documented exit code, or reach its end; what it had written stays whole; and the
same command, once the fault is gone, leaves the same results as a run without one.
"""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from tests.reliability.case import PASSED, Attempt, Finding, said, shown
from tests.reliability.inputs import OUTPUT, Command, Inputs, Scenario
from tests.reliability.kills import SCENARIOS, WRITING
from tests.reliability.left import broken, differences, left
from tests.reliability.running import Kill, Outcome, run_forked
from tests.support.script_run import at_call

# Largest number of bytes of a tmpfs once it has room again.
ROOM = 200_000_000
TRAINING_STEP = "transformers.trainer:Trainer.training_step"
# Functions during which the clock is set.
TIMED = (TRAINING_STEP, "transformers.trainer:Trainer.prediction_step", "transformers.trainer:Trainer.save_state")
WORKERS: Command = ("--dataloader_num_workers", 2)
# Trainings with few checkpoints, whose choice a wrong clock could change.
FEW_CHECKPOINTS = Scenario(
    "one checkpoint is kept", "run_glue.py", "text_training", ("--save_total_limit", 1), SCENARIOS[0].resume
)
WITH_WORKERS = tuple(
    Scenario(f"{name}, worker processes", script, base, WORKERS, SCENARIOS[0].resume)
    for name, script, base in (
        ("one stage", "run_glue.py", "text_training"),
        ("one stage", "run_image.py", "image_training"),
        ("one stage", "run_mlm.py", "mlm_training"),
    )
)


@dataclass(frozen=True)
class Run:
    """A run that a fault meets: its command, its folder, and how long it takes and what it leaves without a fault."""

    script: str
    command: Command
    folder: Path
    seconds: float
    size: int
    chance: random.Random

    def start(self, kill: Kill | None = None, prepare: Callable[[], object] | None = None) -> Outcome:
        return run_forked(self.script, self.command, self.folder, kill, prepare=prepare)


@dataclass(frozen=True)
class Fault:
    """A fault of the machine.

    Attributes:
        name: in the report.
        meet: runs a command while the fault is there, and returns how it ended.
        exit_codes: allowed exit codes; with another one than 0 there must be one error line.
        says: part of that line.
    """

    name: str
    meet: Callable[[Run], Outcome]
    exit_codes: tuple[int, ...]
    says: str = ""


@dataclass(frozen=True)
class FaultCase:
    """A run that meets a fault, and is called again without it."""

    fault: Fault
    scenario: Scenario

    kind = "faults"

    @property
    def row(self) -> str:
        return self.fault.name

    @property
    def id(self) -> str:
        return f"{self.fault.name}: {self.scenario.id}"

    def attempt(self, inputs: Inputs, folder: Path) -> Attempt:
        scenario, command = self.scenario, self.scenario.command(inputs)
        whole, expected = inputs.finished(scenario)
        if expected.exit_code or broken(whole / OUTPUT):
            raise RuntimeError(f"fails without a fault: {expected.stderr[-1500:]}")
        folder.mkdir(parents=True)
        size = sum(path.stat().st_size for path in (whole / OUTPUT).rglob("*") if path.is_file())
        run = Run(scenario.script, command, folder, expected.seconds, size, random.Random(self.id))
        with room_again(folder / OUTPUT):
            outcomes = [self.fault.meet(run)]
            finding = self._judge(outcomes[0], folder)
            if finding == PASSED and outcomes[0].exit_code:
                outcomes.append(run_forked(scenario.script, (*command, *scenario.resume), folder))
                if outcomes[1].fault != PASSED or outcomes[1].exit_code:
                    finding = f"does not go on: {said(outcomes[1])}", outcomes[1].fault[1] or "other"
            if finding == PASSED:
                finding = _compare(folder / OUTPUT, whole / OUTPUT, outcomes, expected)
        detail = " // ".join(f"{outcome.exit_code}: {said(outcome)}" for outcome in outcomes)
        return Attempt(shown(scenario.script, command), finding, detail)

    def _judge(self, outcome: Outcome, folder: Path) -> Finding:
        if outcome.fault != PASSED:
            return outcome.fault
        if outcome.exit_code == -signal.SIGTERM and not outcome.training_steps and not outcome.evaluation_steps:
            return PASSED  # before the script began
        if outcome.exit_code not in self.fault.exit_codes:
            return f"exit code {outcome.exit_code}: {said(outcome)}", "other"
        if outcome.exit_code and (len(outcome.errors) != 1 or self.fault.says not in outcome.errors[0]):
            return f"the lines are {outcome.errors}", "other"
        if outcome.exit_code == 2 and outcome.training_steps + outcome.evaluation_steps:
            return "exit code 2 after work began", "other"
        if half := whole_at_stop(folder / OUTPUT):
            return "left half-written: " + "; ".join(half[:3]), "silently wrong"
        if wrong := wrong_durations(folder / OUTPUT, outcome.seconds):
            return "; ".join(wrong[:3]), "silently wrong"
        if workers := processes_in(folder):
            return f"processes {workers} are left", "other"
        return PASSED


def whole_at_stop(folder: Path) -> list[str]:
    """Return a line for each broken file, except in checkpoints without a record, which no run resumes from."""
    return [line for line in broken(folder) if not _is_unrecorded(folder, line.partition(":")[0])]


def _is_unrecorded(folder: Path, name: str) -> bool:
    checkpoint = next((path for path in (folder / name).parents if path.name.startswith("checkpoint-")), None)
    return checkpoint is not None and not (checkpoint / "run_record.json").exists()


def processes_in(folder: Path) -> list[int]:
    """Return the processes that work in a folder, waiting a moment for those that are ending."""
    for _ in range(50):
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                found += [int(process.name)] if (process / "cwd").readlink() == folder else []
            except OSError:  # it has ended
                continue
        if not found:
            return []
        time.sleep(0.1)
    return found


def _compare(output_dir: Path, whole: Path, outcomes: list[Outcome], expected: Outcome) -> Finding:
    if wrong := broken(output_dir):
        return "not whole: " + "; ".join(wrong[:3]), "silently wrong"
    if wrong := differences(left(output_dir), left(whole)):
        return "; ".join(wrong[:3]), "silently wrong"
    steps = sum(outcome.training_steps for outcome in outcomes)
    if "is saved; repeat" in said(outcomes[0]) and steps != expected.training_steps:
        return f"{steps} training steps in all, not {expected.training_steps}", "other"
    return PASSED


@contextmanager
def room_again(output_dir: Path) -> Iterator[None]:
    """Unmount what a fault has mounted on an output folder, at the end."""
    try:
        yield
    finally:
        if os.path.ismount(output_dir):
            subprocess.run(["umount", "-l", output_dir], check=True)


@cache
def may_mount() -> bool:
    """Return whether this process may mount a tmpfs."""
    with tempfile.TemporaryDirectory() as folder:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True).returncode == 0
        if mounted:
            subprocess.run(["umount", folder], check=True)
    return mounted


def mount(folder: Path, size: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)


def full_disk(run: Run) -> Outcome:
    """Run on a disk that is too small, then give it room."""
    mount(run.folder / OUTPUT, 4096 + int(run.chance.uniform(0.02, 1.0) * run.size))
    try:
        return run.start()
    finally:
        subprocess.run(["mount", "-o", f"remount,size={ROOM}", run.folder / OUTPUT], check=True)


def full_cache(run: Run) -> Outcome:
    """Run with a cache of data sets on a disk that is too small."""
    cache = run.folder / "cache"
    mount(cache, 4096 * run.chance.randint(1, 40))
    try:
        return replace(run, command=(*run.command, "--cache_dir", cache)).start()
    finally:
        subprocess.run(["umount", "-l", cache], check=True)


def full_temporary_folder(run: Run) -> Outcome:
    temporary = run.folder / "tmp"
    mount(temporary, 4096 * run.chance.randint(1, 12))
    try:
        return run.start(prepare=partial(_use_temporary_folder, temporary))
    finally:
        subprocess.run(["umount", "-l", temporary], check=True)


def _use_temporary_folder(folder: Path) -> None:
    os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = None


def quota(run: Run) -> Outcome:
    """Run with a limit on the size of each file: a write beyond it fails."""
    limit = int(run.chance.uniform(0.002, 0.3) * run.size)
    return run.start(prepare=partial(_limit_files, limit))


def _limit_files(limit: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def read_only(run: Run) -> Outcome:
    mount(run.folder / OUTPUT, ROOM)
    subprocess.run(["mount", "-o", "remount,ro", run.folder / OUTPUT], check=True)
    try:
        return run.start()
    finally:
        subprocess.run(["mount", "-o", "remount,rw", run.folder / OUTPUT], check=True)


def refused_write(number: int, run: Run) -> Outcome:
    """Let a call of a function that writes fail."""
    function = run.chance.choice([name for name, _ in WRITING if "Trainer.predict" not in name])
    error = OSError(number, os.strerror(number), "out/file")
    return run.start(prepare=partial(at_call, function, run.chance.choice((1, 2, 3, 5)), partial(_raise, error)))


def _raise(error: Exception) -> None:
    raise error


def out_of_memory(run: Run) -> Outcome:
    call = run.chance.randint(1, 8)
    return run.start(prepare=partial(at_call, TRAINING_STEP, call, partial(_raise, MemoryError("array of 9 GB"))))


def killed_worker(run: Run) -> Outcome:
    return run.start(prepare=partial(_in_worker, run.chance.randint(1, 3), _kill_this))


def out_of_memory_in_worker(run: Run) -> Outcome:
    action = partial(_raise, MemoryError("array of 9 GB"))
    return run.start(prepare=partial(_in_worker, run.chance.randint(1, 3), action))


def _in_worker(call: int, action: Callable[[], object]) -> None:
    """Call `action` in each worker process of a DataLoader before it reads one of its batches."""

    def act() -> None:
        from torch.utils.data import get_worker_info

        if get_worker_info() is not None:
            action()

    at_call("torch.utils.data._utils.fetch:_MapDatasetFetcher.fetch", call, act)


def _kill_this() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stopped_by(number: int, run: Run) -> Outcome:
    """Send a signal at a random moment; if the run has ended by then, run again with an earlier one."""
    seconds = run.chance.uniform(0.05, 0.97) * run.seconds
    while (outcome := run.start(Kill(seconds=seconds, number=number))).exit_code == 0 and seconds > 0.1:
        shutil.rmtree(run.folder / OUTPUT)
        seconds *= 0.6
    return outcome


def stopped_in_training(number: int, run: Run) -> Outcome:
    """Send a signal during a training step."""
    return run.start(prepare=partial(at_call, TRAINING_STEP, run.chance.randint(1, 8), partial(_signal, number)))


def stopped_while_saving(number: int, run: Run) -> Outcome:
    function = run.chance.choice([name for name, _ in WRITING])
    return run.start(prepare=partial(at_call, function, run.chance.choice((1, 2, 3)), partial(_signal, number)))


def _signal(number: int) -> None:
    os.kill(os.getpid(), number)


def clock_set(hours: int, run: Run) -> Outcome:
    """Set the clock that programs read during a run; files that were written before get times to match."""
    function, call = run.chance.choice(TIMED), run.chance.randint(1, 6)
    return run.start(prepare=partial(at_call, function, call, partial(_set_clock, 3600 * hours, run.folder / OUTPUT)))


def wrong_durations(folder: Path, most: float) -> list[str]:
    """Return a line for each duration in the result files that is negative or longer than `most` seconds."""
    wrong = []
    for path in folder.rglob("*_results.json"):
        written = json.loads(path.read_text())
        durations = {name: value for name, value in written.items() if name.endswith("_runtime")}
        for name, value in (durations | written.get("seconds", {})).items():
            if not 0 <= value <= most:
                wrong.append(f"{path.name}: {name} is {value}")
    return wrong


def _set_clock(seconds: int, output_dir: Path) -> None:
    now = time.time
    time.time = lambda: now() + seconds
    for path in output_dir.rglob("*"):
        os.utime(path, (now() - seconds, now() - seconds))


def no_output(how: str, run: Run) -> Outcome:
    return run.start(prepare=partial(_redirect, how))


def _redirect(how: str) -> None:
    """Make standard output, or both streams, fail: a full device, a pipe without a reader, or closed."""
    if how == "full":
        target = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, target = os.pipe()
        os.close(reader)
    os.dup2(target, 1)
    if how == "both":
        os.dup2(target, 2)


DISK = "No space left on device"
INTERRUPTS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Each fault, with the scenarios that meet it.
FAULTS_AND_SCENARIOS: tuple[tuple[Fault, tuple[Scenario, ...]], ...] = (
    (Fault("full disk: output folder", full_disk, (0, 1, 2)), SCENARIOS),
    (Fault("full disk: cache", full_cache, (0, 1, 2)), SCENARIOS[::2]),
    (Fault("full disk: temporary folder", full_temporary_folder, (0, 1, 2)), SCENARIOS[::4]),
    (Fault("full disk: a write fails", partial(refused_write, errno.ENOSPC), (0, 1)), SCENARIOS[::3]),
    (Fault("full disk: limit on each file", quota, (0, 1, 2)), SCENARIOS[1::3]),
    (Fault("no access: read-only folder", read_only, (2,), "--output_dir"), SCENARIOS[::3]),
    (Fault("no access: a write is denied", partial(refused_write, errno.EACCES), (0, 1)), SCENARIOS[::2]),
    (Fault("no access: the disk becomes read-only", partial(refused_write, errno.EROFS), (0, 1)), SCENARIOS[1::2]),
    (Fault("no access: the disk fails", partial(refused_write, errno.EIO), (0, 1)), SCENARIOS[2::4]),
    (Fault("memory: out of memory", out_of_memory, (0, 1), "out of memory"), SCENARIOS[:10:2]),
    (Fault("memory: a worker is killed", killed_worker, (0, 1), "worker process"), WITH_WORKERS),
    (Fault("memory: out of memory in a worker", out_of_memory_in_worker, (0, 1), "out of memory"), WITH_WORKERS),
    *(
        (Fault(f"signals: {number.name} at any time", partial(stopped_by, number), (0, 128 + number)), scenarios)
        for number, scenarios in zip(INTERRUPTS, (SCENARIOS, SCENARIOS[::2], SCENARIOS[1::4]), strict=True)
    ),
    (
        Fault("signals: SIGTERM in a training step", partial(stopped_in_training, signal.SIGTERM), (0, 143)),
        (*(each for each in SCENARIOS if "training" in each.base or "retrain" in each.name), FEW_CHECKPOINTS,
         *WITH_WORKERS),
    ),
    (
        Fault("signals: SIGTERM while saving", partial(stopped_while_saving, signal.SIGTERM), (0, 143)),
        (*SCENARIOS[1::2], FEW_CHECKPOINTS),
    ),
    (
        Fault("clock: an hour back", partial(clock_set, -1), (0,)),
        (FEW_CHECKPOINTS, *SCENARIOS[::3]),
    ),
    (Fault("clock: an hour forward", partial(clock_set, 1), (0,)), (FEW_CHECKPOINTS, *SCENARIOS[1::3])),
    (Fault("output: full device", partial(no_output, "full"), (0,)), SCENARIOS[::5]),
    (Fault("output: pipe without a reader", partial(no_output, "pipe"), (0,)), SCENARIOS[1::5]),
    (Fault("output: both streams", partial(no_output, "both"), (0,)), SCENARIOS[2::5]),
)  # fmt: skip


def fault_cases() -> Iterator[FaultCase]:
    """Yield each fault with its scenarios.

    Without the right to mount, faults on small disks are left out; failing writes stand for them.
    """
    for fault, scenarios in FAULTS_AND_SCENARIOS:
        if fault.meet in (full_disk, full_cache, full_temporary_folder, read_only) and not may_mount():
            continue
        for scenario in scenarios:
            yield FaultCase(fault, scenario)
