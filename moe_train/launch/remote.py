"""What is done on the other hosts of a launch besides starting it: do they answer, stop workers, leave none behind.

Everything goes through ssh as the user has set it up (~/.ssh/config), never asks for a password, and has a time limit.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

_OPTIONS = (
    "-o",
    "BatchMode=yes",
    "-o",
    "ConnectTimeout=10",
    "-o",
    "ServerAliveInterval=5",
    "-o",
    "ServerAliveCountMax=3",
)
_SECONDS = 30.0
_AT_A_TIME = 64
_PAUSE = 5.0
_SAY_EVERY = 60.0

Say = Callable[[str], None]


def check_pdsh() -> None:
    """ValueError where there is no pdsh, by which DeepSpeed's launcher starts workers."""
    if shutil.which("pdsh") is None:
        raise ValueError("--hostfile needs pdsh on this machine: install the system package pdsh")


def ssh(host: str, words: Sequence[str]) -> list[str]:
    """A command line that runs the words on a host, each as one word, whatever is in it."""
    return ["ssh", *_OPTIONS, host, shlex.join(words)]


def run_on(host: str, words: Sequence[str], seconds: float = _SECONDS) -> subprocess.CompletedProcess[str] | None:
    """The finished command; None where it did not end in time."""
    try:
        return subprocess.run(
            ssh(host, words),
            capture_output=True,
            text=True,
            timeout=seconds,
            stdin=subprocess.DEVNULL,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return None


@dataclass(frozen=True)
class RemoteHosts:
    """The hosts that one launch command starts workers on through ssh."""

    names: tuple[str, ...]

    def check(self) -> None:
        """Raises ValueError that names the hosts which do not answer, with what ssh says."""
        if silent := self.silent():
            lines = "\n".join(f"  {host}: {reason}" for host, reason in silent.items())
            raise ValueError(
                f"these hosts do not answer `ssh HOST true`:\n{lines}\nssh must work without a password and ask nothing"
            )

    def silent(self) -> dict[str, str]:
        """Hosts that do not answer, each with what ssh says."""
        found = self._everywhere(["true"])
        return {host: _reason(result) for host, result in found if result is None or result.returncode}

    def wait(self, seconds: float, say: Say) -> bool:
        """Waits for all of them to answer; whether they did within the time."""
        start = said = time.monotonic()
        first = True
        while silent := self.silent():
            now = time.monotonic()
            if first or now - said > _SAY_EVERY:
                first, said = False, now
                names = ", ".join(f"{host} ({reason})" for host, reason in silent.items())
                say(f"waiting for hosts that do not answer, {seconds - (now - start):.0f} s more: {names}")
            if now - start > seconds:
                return False
            time.sleep(_PAUSE)
        return True

    def tell(self, launch: str, module: str) -> None:
        """Asks the workers of a launch to save and stop."""
        # Theirs alone: what launched them ends them at once when it gets a signal itself.
        self._everywhere(["pkill", "-TERM", "-f", "--", _worker(launch, module)])

    def run(self, launch: str, module: str) -> bool:
        """Whether workers of a launch are there, on any host that answers."""
        found = self._everywhere(["pgrep", "-f", "--", _worker(launch, module)])
        return any(result is not None and result.returncode == 0 for _, result in found)

    def sweep(self, launches: Iterable[str]) -> None:
        """Kills whatever a launch has left on the hosts that answer. ssh does not end what it started when it ends."""
        if launches := list(launches):
            self._everywhere(["pkill", "-KILL", "-f", "--", "|".join(map(_pattern, launches))])

    def _everywhere(self, words: Sequence[str]) -> list[tuple[str, subprocess.CompletedProcess[str] | None]]:
        with ThreadPoolExecutor(max_workers=min(_AT_A_TIME, len(self.names))) as pool:
            return list(zip(self.names, pool.map(lambda host: run_on(host, words), self.names), strict=True))


def _pattern(launch: str) -> str:
    """A pattern that is found in the launch's command lines, and not in that of the shell which looks for it."""
    return f"[{launch[0]}]{re.escape(launch[1:])}"


def _worker(launch: str, module: str) -> str:
    return f" -m {re.escape(module)} .*{_pattern(launch)}"


def _reason(result: subprocess.CompletedProcess[str] | None) -> str:
    if result is None:
        return f"no answer within {_SECONDS:g} s"
    lines = result.stderr.strip().splitlines()
    return lines[-1].strip() if lines else f"exit code {result.returncode}"
