"""Runs arms one after another. A run that is finished is not repeated, and one that was interrupted goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from moe_train.lab.plan import PlannedRun
from moe_train.lab.results import evaluated, evaluation_file, is_finished, is_trained, write_result
from moe_train.launch.ending import NOT_SAVED
from moe_train.launch.environment import worker_environment
from moe_train.launch.plan import LaunchOptions
from moe_train.launch.run import launch_module, launch_run

EVALUATOR = "moe_train.training.evaluate"
STOPPED = {128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)} | {NOT_SAVED}
"""Exit codes of a launch that was asked to stop."""


class Runner(Protocol):
    """What starts processes; a stand-in in tests."""

    @property
    def processes(self) -> int: ...

    def train(self, run: PlannedRun) -> int:
        """Trains a run to its last step, going on where it stopped; returns the exit code."""

    def evaluate(self, run: PlannedRun, output: Path) -> int:
        """Evaluates the run's last checkpoint into ``output``; returns the exit code."""


@dataclass
class Ending:
    finished: int = 0
    failed: list[str] = field(default_factory=list)
    """Names of runs that failed."""
    stopped: int = 0
    """Exit code of the stop that was asked for; 0 where all were tried."""


def execute(
    runs: Sequence[PlannedRun],
    runner: Runner,
    say: Callable[[str], None],
    progress: Callable[[], None] = lambda: None,
) -> Ending:
    """Brings every run to its end. One that fails does not keep the others from running; a stop does.

    progress: called after each run that was finished now.
    """
    ending = Ending()
    for number, run in enumerate(runs, start=1):
        head = f"run {number} of {len(runs)}: {run.name}"
        if is_finished(run):
            say(f"{head}: finished before")
            ending.finished += 1
            continue
        say(f"{head}: {run.folder}")
        try:
            code = _bring_to_end(run, runner)
        except (OSError, ValueError) as error:  # such as a damaged checkpoint of this run
            say(f"{head}: FAILED: {error}; going on with the others")
            ending.failed.append(run.name)
            continue
        if code in STOPPED:
            ending.stopped = code
            return ending
        if code:
            say(f"{head}: FAILED with exit code {code}; going on with the others")
            ending.failed.append(run.name)
            continue
        ending.finished += 1
        progress()
    return ending


def _bring_to_end(run: PlannedRun, runner: Runner) -> int:
    if not is_trained(run) and (code := runner.train(run)):
        return code
    path = evaluation_file(run)
    unfinished = path.with_suffix(".json.unfinished")
    unfinished.unlink(missing_ok=True)
    if code := runner.evaluate(run, unfinished):
        return code
    evaluation = evaluated(run, unfinished)
    os.replace(unfinished, path)
    write_result(run, evaluation, runner.processes)
    return 0


@dataclass(frozen=True)
class LaunchRunner:
    """Starts processes as ``moe-train train`` and ``moe-train evaluate`` do."""

    processes: int = 1
    accelerators: int = 0

    def train(self, run: PlannedRun) -> int:
        options = self._options()
        return launch_run(run.config, run.folder, "auto", options, accelerators=self.accelerators, in_process=False)

    def evaluate(self, run: PlannedRun, output: Path) -> int:
        options = self._options()
        environment = worker_environment(options, os.environ, cpu=not self.accelerators)
        arguments = ["--run-dir", str(run.folder), *run.protocol.arguments(), "--output", str(output)]
        return launch_module(EVALUATOR, arguments, run.folder, options, environment, saves=False).code

    def _options(self) -> LaunchOptions:
        # A launcher would only cost its start: a comparison may consist of many short runs.
        return LaunchOptions(launcher="none" if self.processes == 1 else "deepspeed", processes=self.processes)
