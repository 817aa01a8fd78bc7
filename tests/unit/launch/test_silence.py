"""Workers of other machines that write no heartbeats any more."""

from __future__ import annotations

import os
import socket

import psutil

from moe_train.launch.silence import Silence
from moe_train.training.heartbeat import Beat
from moe_train.training.worker_status import WorkerStatus


def status(rank: int, host: str = "far", exit_code: int | None = None) -> WorkerStatus:
    local = host == socket.gethostname()
    pid = os.getpid() if local else 100 + rank
    return WorkerStatus(rank, pid, host, psutil.Process().create_time() if local else 0.0, exit_code)


def beat(of: WorkerStatus, time: float) -> Beat:
    return Beat(of.rank, of.host, of.pid, time, 0, "train", 0.0, "", 0, False, "")


def test_a_worker_that_falls_silent() -> None:
    here, far, silent = status(0, socket.gethostname()), status(1), status(2)
    watch = Silence(10.0)
    for now in range(30):
        # Its clock is a day behind, which says nothing.
        beats = [beat(here, now), beat(far, now - 86400.0), beat(silent, min(now, 5))]
        found = watch.look([here, far, silent], beats, float(now))
        assert found == ([2] if now > 15 else []), now


def test_workers_of_this_machine_and_those_that_have_ended_are_not_judged() -> None:
    here, far, done = status(0, socket.gethostname()), status(1), status(2, exit_code=0)
    watch = Silence(10.0)
    for now in range(30):
        assert watch.look([here, far, done], [beat(here, 0.0), beat(far, now), beat(done, 0.0)], float(now)) == []


def test_a_disk_that_hangs_says_nothing() -> None:
    workers = [status(rank) for rank in range(3)]
    watch = Silence(10.0)
    for now in range(60):
        time = float(now if now < 5 or now > 40 else 5)
        assert watch.look(workers, [beat(worker, time) for worker in workers], float(now)) == []


def test_a_worker_that_has_not_written_yet() -> None:
    workers = [status(0), status(1)]
    watch = Silence(10.0)
    for now in range(60):
        assert watch.look(workers, [beat(workers[0], float(now))], float(now)) == []
