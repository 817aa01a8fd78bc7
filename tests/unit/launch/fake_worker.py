"""Stands for a worker process without torch: python -m fake_worker BEHAVIOUR RUN_DIR LAUNCH."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from moe_train.training.stop import StopRequest
from moe_train.training.worker_status import StatusFile


def main() -> int:
    behaviour, run_dir, launch = [argument for argument in sys.argv[1:] if not argument.startswith("--local")]
    rank = int(os.environ["RANK"])
    stop = StopRequest().install()
    folder = Path(run_dir)
    if behaviour == "silent":
        return 0
    status = StatusFile(folder, launch, rank)
    status.start()
    (folder / f"started_{rank}").write_text(" ".join(sys.argv[1:]) + f" world {os.environ['WORLD_SIZE']}")
    if behaviour == "finish":
        status.finish(0)
        return 0
    while sum((folder / f"started_{r}").exists() for r in range(int(os.environ["WORLD_SIZE"]))) < 2:
        time.sleep(0.02)
    if behaviour == "killed" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "fails" and rank == 1:
        status.finish(7, "the disk is full")
        return 7
    while behaviour == "stubborn" or not stop.requested:
        time.sleep(0.02)
    time.sleep(0.5)  # saving
    (folder / f"saved_{rank}").write_text("")
    status.finish(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
