"""metrics.jsonl: one JSON object per line, on disk as soon as it is recorded."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from moe_train.data.files import write_atomically
from moe_train.training.callbacks.appended import Appended
from moe_train.training.callbacks.base import Callback, Record, RunInfo, write_error


class JsonlWriter(Callback):
    """Appends each record to ``path``. On resume at step k, records of later steps and a line cut short by a crash are
    removed first, so that no step appears twice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: Appended | None = None

    def on_start(self, run: RunInfo) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.is_file():
                write_atomically(self.path, b"".join(_lines_until(self.path, run.start_step)))
            lines = Appended(self.path)
            lines.append(b"")  # a folder with this file holds a run
        except OSError as error:
            raise write_error(self.path, error) from None
        self._lines = lines

    def on_record(self, record: Record) -> None:
        assert self._lines is not None, "on_start comes first"
        try:
            self._lines.append((json.dumps(jsonable(record), allow_nan=False) + "\n").encode())
        except OSError as error:
            raise write_error(self.path, error) from None


def jsonable(value: Any) -> Any:
    """``value`` with NaN and infinities replaced by None: they are no JSON, and other readers refuse the line."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return value


def _lines_until(path: Path, step: int) -> list[bytes]:
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if line.endswith(b"\n") and isinstance(record, dict) and record.get("step", step + 1) <= step:
            kept.append(line)
    return kept
