"""Stands for a worker process without torch, with a worker's arguments; FAKE_WORKER says what it does."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time

from moe_train.training.heartbeat import Heartbeat
from moe_train.training.stop import StopRequest
from moe_train.training.worker import parse
from moe_train.training.worker_status import StatusFile


def wait_for_ever() -> None:
    threading.Event().wait()


def main() -> int:
    behaviour, arguments = os.environ["FAKE_WORKER"], parse(sys.argv[1:])
    rank = int(os.environ["RANK"])
    stop = StopRequest().install()
    folder = arguments.run_dir
    if behaviour == "silent":
        return 0
    if behaviour == "registers late":
        time.sleep(1.0)
    status = StatusFile(folder, arguments.status, rank)
    status.start()
    (folder / f"started_{rank}").write_text(" ".join(sys.argv[1:]) + f" world {os.environ['WORLD_SIZE']}")
    if behaviour in ("finish", "stopped"):
        status.finish(0, stopped=behaviour == "stopped")
        return 0
    while sum((folder / f"started_{r}").exists() for r in range(int(os.environ["WORLD_SIZE"]))) < 2:
        time.sleep(0.02)
    if behaviour == "wrong":
        status.finish(2, "wrong input")
        return 2
    if behaviour in ("hangs", "one works"):
        beat = Heartbeat(status.beat_path, rank)
        beat.start()
        beat.note("train", 5)
        if behaviour == "one works" and rank == 1:
            for step in itertools.count():
                beat.note("train", step)
                time.sleep(0.05)
        wait_for_ever()
    if behaviour == "works without heartbeats":
        beat = Heartbeat(status.beat_path, rank)
        beat._write()
        time.sleep(4.0)
        stop.signal = signal.SIGUSR1
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
