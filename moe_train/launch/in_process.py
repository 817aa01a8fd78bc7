"""This process itself as a worker: alone, or as a task of a Slurm step."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path

from moe_train.launch.ending import NOT_SAVED
from moe_train.training.worker_status import forget


def run_alone(arguments: list[str], environment: Mapping[str, str], run_dir: Path, launch: str) -> int:
    """A worker without others; returns the exit code of the run."""
    return _run(arguments, run_dir, launch, {**environment, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})


def run_task(arguments: list[str], environment: Mapping[str, str], run_dir: Path, launch: str) -> int:
    """A worker among the tasks of a step, whose place ``environment`` tells already; returns this task's exit code.

    After a stop that was asked for only rank 0 says so by its code, and the others end with 0: srun kills the rest of a
    step when a task ends with another code, and passes the highest on.
    """
    code = _run(arguments, run_dir, launch, environment)
    return 0 if code > 128 and code != NOT_SAVED and environment["RANK"] != "0" else code


def _run(arguments: list[str], run_dir: Path, launch: str, environment: Mapping[str, str]) -> int:
    """Its heartbeats are for health checks and for people; nobody waits for its last words, so no file is left."""
    from moe_train.training.stop import StopRequest
    from moe_train.training.worker import main

    os.environ.update(environment)
    for name in [name for name in os.environ if name.startswith("TORCHELASTIC_")]:
        del os.environ[name]  # of an agent further up, which this worker is none of
    stop = StopRequest()
    try:
        code = main([*arguments, "--status", launch], stop=stop)
    finally:
        forget(run_dir, launch, int(environment["RANK"]))
    if code > 128:  # interrupted by a second Ctrl-C
        return NOT_SAVED
    if code or not stop.obeyed:
        return code
    # Without a signal of its own it stopped because another process was told to.
    return 128 + (stop.signal or signal.SIGTERM)
