"""Which signals ask a process to stop, in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

WORKER = "from moe_train.training.stop import StopRequest; asked = StopRequest().install(); print('ready', flush=True)"
LAUNCH = (
    "from moe_train.launch.signals import caught; within = caught(); asked = within.__enter__(); "
    "print('ready', flush=True)"
)
WAIT = "import os, time; at = time.monotonic() + 60"
LOOP = "while time.monotonic() < at and not ({}): time.sleep(0.01)"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
@pytest.mark.parametrize(("begin", "seen"), [(WORKER, "asked.signal"), (LAUNCH, "asked.first")])
def test_it_is_remembered(begin: str, seen: str, number: signal.Signals) -> None:
    assert told(f"{begin}\n{WAIT}\n{LOOP.format(seen)}\nprint({seen})", number) == (0, str(int(number)))


@pytest.mark.parametrize("begin", [WORKER, LAUNCH])
def test_a_run_under_nohup_outlives_its_terminal(begin: str) -> None:
    """docs/running.md: nohup has SIGHUP ignored."""
    ignored = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    asked = "getattr(asked, 'signal', None) or getattr(asked, 'first', None)"
    done = f"import os\nos.kill(os.getpid(), signal.SIGHUP)\nprint({asked})"
    assert told(f"{ignored}\n{begin}\n{done}", None) == (0, "None")


def told(script: str, number: signal.Signals | None) -> tuple[int, str]:
    """Exit code and last line of a process that gets a signal when it is ready."""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        if number is not None:
            process.send_signal(number)
        # Not communicate: it reads past what the line before has left in the buffer. WAIT bounds the time.
        out = process.stdout.read()
    return process.returncode, out.strip()
