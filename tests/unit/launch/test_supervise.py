"""How a launch ends: finished, stopped by a signal, a rank that dies, a launcher that is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from moe_train.launch import supervise as supervise_module
from moe_train.launch.ending import NOT_SAVED
from moe_train.launch.run import worker_arguments
from moe_train.launch.supervise import Limits, supervise

HERE = Path(__file__).parent


class Launch:
    """Two fake workers under a fake launcher."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.messages: list[str] = []
        self.name = uuid.uuid4().hex[:12]  # by which what is left of it is found, also beside other tests
        path = os.pathsep.join([str(HERE), str(HERE.parents[2]), os.environ.get("PYTHONPATH", "")])
        self.environment = os.environ | {"PYTHONPATH": path}

    def run(
        self,
        behaviour: str,
        limits: Limits | None = None,
        meanwhile: Callable[[], None] | None = None,
        saves: bool = True,
    ) -> int:
        launcher = str(HERE / "fake_launcher.py")
        self.environment["FAKE_WORKER"] = behaviour
        arguments = worker_arguments(self.folder, None, None, self.name)
        helper = threading.Thread(target=self._when_started, args=(meanwhile,)) if meanwhile else None
        if helper:
            helper.start()
        self.ending = supervise(
            [sys.executable, launcher, "2", "fake_worker", *arguments],
            run_dir=self.folder,
            launch=self.name,
            environment=self.environment,
            local_processes=2,
            limits=limits or Limits(),
            saves=saves,
            say=self.messages.append,
        )
        if helper:
            helper.join()
        return self.ending.code

    def _when_started(self, action: Callable[[], None]) -> None:
        deadline = time.monotonic() + 60
        while len(list(self.folder.glob("started_*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        action()

    @property
    def said(self) -> str:
        return "\n".join(self.messages)

    def nothing_left(self) -> bool:
        """No process of this launch lives on."""
        marker = str(self.folder)
        return not [p for p in psutil.process_iter(["cmdline"]) if marker in " ".join(p.info["cmdline"] or [])]


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    return Launch(tmp_path)


def signal_self(number: int, times: int = 1) -> Callable[[], None]:
    def send() -> None:
        for _ in range(times):
            os.kill(os.getpid(), number)
            time.sleep(0.5)

    return send


def saved(folder: Path) -> int:
    return len(list(folder.glob("saved_*")))


def test_finished(launch: Launch) -> None:
    assert launch.run("finish") == 0
    assert launch.messages == [] and not launch.ending.restart
    assert not (launch.folder / "processes").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_lets_the_workers_save(launch: Launch, number: int, code: int) -> None:
    """The launcher would kill them at once; it must not get the signal."""
    before = signal.getsignal(number)
    assert launch.run("wait", meanwhile=signal_self(number)) == code
    assert saved(launch.folder) == 2
    assert launch.nothing_left()
    assert signal.getsignal(number) is before


def test_a_second_signal_kills(launch: Launch) -> None:
    assert launch.run("stubborn", meanwhile=signal_self(signal.SIGTERM, times=2)) == NOT_SAVED
    assert saved(launch.folder) == 0 and launch.nothing_left()
    assert "--resume auto" in launch.said


def test_workers_that_do_not_stop_are_killed_in_time(launch: Launch) -> None:
    assert launch.run("stubborn", Limits(stop=0.5), meanwhile=signal_self(signal.SIGTERM)) == NOT_SAVED
    assert launch.nothing_left()


def test_a_launcher_without_workers_is_not_waited_for(launch: Launch) -> None:
    """As torchrun's agent, which waits for the other nodes before it starts any."""
    began = time.monotonic()
    timer = threading.Timer(2.0, signal_self(signal.SIGTERM))
    timer.start()
    assert launch.run("no workers", Limits(workers=1.0)) == NOT_SAVED
    timer.join()
    assert time.monotonic() - began < 60 and launch.nothing_left()
    assert "no worker" in launch.said


def test_a_run_that_another_process_stopped_is_not_finished(launch: Launch) -> None:
    """As on the other nodes of a run that was stopped on one."""
    assert launch.run("stopped") == 143
    assert "--resume auto" in launch.said


def test_workers_without_anything_to_save_end_at_once(launch: Launch) -> None:
    assert launch.run("stubborn", meanwhile=signal_self(signal.SIGTERM), saves=False) == 143
    assert saved(launch.folder) == 0 and launch.nothing_left() and launch.messages == []


def test_advice_is_given_only_where_something_was_saved(launch: Launch) -> None:
    assert launch.run("killed", saves=False) == 256 - 9
    assert "died without a word" in launch.said and "--resume" not in launch.said


def test_a_rank_that_is_killed_ends_the_run(launch: Launch) -> None:
    assert launch.run("killed") == 256 - 9
    assert "died without a word" in launch.said and "--resume auto" in launch.said and launch.ending.restart
    assert launch.nothing_left()


def test_a_rank_that_is_killed_ends_the_run_even_if_the_launcher_waits(launch: Launch) -> None:
    launch.environment["FAKE_LAUNCHER"] = "waits"
    assert launch.run("killed", Limits(death=0.5)) != 0
    assert "rank 1 died without a word" in launch.said
    assert launch.nothing_left()


def test_the_code_and_reason_of_a_failed_worker_are_passed_on(launch: Launch) -> None:
    assert launch.run("fails") == 7
    assert "the disk is full" in launch.said and launch.ending.restart
    assert launch.ending.reason == "rank 1 failed with exit code 7: the disk is full"


def test_wrong_input_is_not_tried_again(launch: Launch) -> None:
    assert launch.run("wrong") == 2
    assert not launch.ending.restart


def test_a_killed_launcher_is_no_success(launch: Launch) -> None:
    def kill_launcher() -> None:
        for process in psutil.Process().children():
            if "fake_launcher.py" in " ".join(process.cmdline()):
                process.kill()

    assert launch.run("wait", meanwhile=kill_launcher) != 0
    assert launch.nothing_left()


def test_a_launcher_that_dies_before_its_workers_register(launch: Launch) -> None:
    """They would train with nobody who watches, and hold the lock of the run."""
    launch.environment["FAKE_LAUNCHER"] = "dies"
    assert launch.run("registers late") == 128 + signal.SIGKILL
    assert launch.nothing_left() and launch.ending.restart


def test_workers_that_say_nothing_are_no_success(launch: Launch) -> None:
    assert launch.run("silent") == 1
    assert "only 0 of 2 workers" in launch.said


def test_a_launcher_that_cannot_start(launch: Launch) -> None:
    ending = supervise(
        [sys.executable, "-c", "raise SystemExit(3)"],
        run_dir=launch.folder,
        launch=launch.name,
        environment=launch.environment,
        local_processes=2,
        say=launch.messages.append,
    )
    assert ending.code == 3 and not ending.restart and not ending.began
    assert "the launcher failed with exit code 3" in launch.said


def test_ranks_that_hang_are_killed_and_what_they_did_is_told(launch: Launch) -> None:
    assert launch.run("hangs", Limits(hang=2.5)) != 0
    assert launch.ending.restart and launch.ending.reason == "no rank made progress" and launch.nothing_left()
    assert "no rank has made progress for 2.5 s; killing all. What they were doing:" in launch.said
    for rank in (0, 1):
        assert f"  rank {rank} on " in launch.said
    assert launch.said.count("step 5, train") == 2 and launch.said.count("threading.py") == 2


def test_a_launcher_that_starts_no_worker_is_not_waited_for_for_ever(launch: Launch) -> None:
    """A stuck ssh, or imports from a network disk that is away."""
    assert launch.run("no workers", Limits(hang=0.5, meeting=0.5)) == 1
    assert launch.ending.restart and launch.ending.reason == "no worker has started" and launch.nothing_left()
    assert "no worker has started within 1 s" in launch.said


def test_ranks_that_hang_under_a_launcher_that_starts_them_again(launch: Launch) -> None:
    """As torchrun: only the workers are killed."""
    launch.environment["FAKE_LAUNCHER"] = "starts again"
    assert launch.run("hangs", Limits(hang=2.5, restarts_itself=True)) == 0
    assert launch.said.count("no rank has made progress for 2.5 s; killing all") == 1 and launch.nothing_left()


def test_ranks_that_cannot_write_heartbeats_are_not_killed(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full, or gone."""
    monkeypatch.setattr(supervise_module, "cannot_write", lambda run_dir: "No space left on device")
    assert launch.run("works without heartbeats", Limits(hang=1.0)) == 0
    assert launch.said.count("(No space left on device)") == 1 and saved(launch.folder) == 2


def test_one_rank_that_works_is_enough(launch: Launch) -> None:
    """The others wait for it: it reads much, say, or builds an index."""
    timer = threading.Timer(6.0, lambda: os.kill(os.getpid(), signal.SIGTERM))
    timer.start()
    assert launch.run("one works", Limits(hang=2.5, stop=0.5)) == NOT_SAVED
    assert "progress" not in launch.said


def test_what_ranks_did_when_one_died_is_told(launch: Launch) -> None:
    launch.environment["FAKE_LAUNCHER"] = "waits"
    launch.run("killed", Limits(death=1.0))
    assert "rank 1 is gone. What they were doing:" in launch.said


@pytest.mark.parametrize("seconds", [-1.0, float("nan")])
def test_a_time_that_cannot_be(seconds: float) -> None:
    with pytest.raises(ValueError, match="--hang-timeout"):
        Limits(hang=seconds)


def test_a_rank_that_another_node_has_now_is_no_death(launch: Launch) -> None:
    """torchrun's agents of several nodes may give out ranks anew when they start again."""
    before = {"rank": 5, "pid": 2**22 + 1, "host": socket.gethostname(), "created": 1.0}
    (launch.folder / "processes").mkdir()
    (launch.folder / "processes" / f"{launch.name}.rank_5.json").write_text(json.dumps(before))
    assert launch.run("finish", Limits(restarts_itself=True)) == 0
    assert not (launch.folder / "processes").exists()


def test_a_signal_to_all_processes_does_not_end_the_launcher(launch: Launch) -> None:
    """As Slurm sends it to a step: the workers save, and whoever started them lets them."""

    def to_all() -> None:
        started = psutil.Process().children(recursive=True)
        for process in [psutil.Process(), *(child for child in started if "fake_worker" in child.cmdline())]:
            process.send_signal(signal.SIGUSR1)

    assert launch.run("wait", meanwhile=to_all) == 128 + signal.SIGUSR1
    assert len(list(launch.folder.glob("saved_*"))) == 2
