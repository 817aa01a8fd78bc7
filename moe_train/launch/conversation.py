"""The doctor's talk with the process that answers on a host (facts.py)."""

from __future__ import annotations

import json
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any

from moe_train.launch.facts import MARK

ANSWER_SECONDS = 180.0
"""For one answer: torch takes long to load from a network disk."""
OTHER_VERSION = "answers as another version of moe_train does: install the same one on all hosts"
_CLOCK_SAMPLES = 10


class HostError(Exception):
    """A host does not answer, or not with what was asked; the text says why."""


class Conversation:
    """line: the command line that starts the process, here or through ssh.   first_line: what it reads before the first
    question."""

    def __init__(self, line: list[str], environment: Mapping[str, str] | None = None, first_line: str = "") -> None:
        self._errors = tempfile.TemporaryFile("w+", errors="replace")
        self._process = subprocess.Popen(
            line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, errors="replace",
            env=None if environment is None else dict(environment),
        )  # fmt: skip
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        if first_line:
            with suppress(OSError):  # it has ended already; the first question says why
                self._write(first_line)

    def ask(self, do: str, seconds: float = ANSWER_SECONDS, **more: Any) -> Any:
        """Raises HostError where the host does not answer, or says that it could not."""
        try:
            self._write(json.dumps({"do": do, **more}))
        except OSError:
            raise HostError(self._why()) from None
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            raise HostError(f"no answer within {seconds:g} s") from None
        if line is None:
            raise HostError(self._why())
        try:
            reply = json.loads(line)
            value, error = reply.get("value"), reply.get("error")
        except (ValueError, AttributeError):
            raise HostError(OTHER_VERSION) from None
        if error is not None:
            raise HostError(str(error))
        return value

    def clock(self) -> tuple[float, float]:
        """Seconds that the host's clock is ahead of ours, and how wrong that may be."""
        samples = []
        for _ in range(_CLOCK_SAMPLES):
            before = time.time()
            theirs = self.ask("clock")
            after = time.time()
            samples.append(((after - before) / 2, theirs - (before + after) / 2))
        doubt, offset = min(samples)
        return offset, doubt

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._errors):
            try:
                if stream is not None:
                    stream.close()
            except OSError:
                pass  # what was left to write has no reader any more

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            for line in stream:
                if line.startswith(MARK):
                    self._lines.put(line.removeprefix(MARK))
        self._lines.put(None)

    def _why(self) -> str:
        code = self._process.wait(timeout=10)
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return lines[-1].strip() if lines else f"it ended with exit code {code}"
