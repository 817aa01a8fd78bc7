from __future__ import annotations

import io
from dataclasses import replace
from types import SimpleNamespace

import pytest

from moe_train.commands import prepare_progress
from moe_train.commands.prepare_progress import eta, rates, reporter
from moe_train.data.prepare import Progress

NOW = Progress(
    files=3, total_files=7, documents=2000, tokens=500_000, text_bytes=2_000_000, read_bytes=2_000_000,
    done_bytes=3_000_000, total_bytes=8_000_000, seconds=4.0,
)  # fmt: skip


def test_lines_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0, 11.0, 11.0, 12.0])
    monkeypatch.setattr(prepare_progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    stream = io.StringIO()
    with reporter(stream) as report:
        for _ in range(3):
            report(NOW)
    assert stream.getvalue() == ("2,000 documents  3/7 files  500 documents/s  0.5 MB/s  0.12M tokens/s  ETA 0:00:10\n")


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    with reporter(stream) as report:
        report(NOW)
    assert "38%" in stream.getvalue() and rates(NOW) in stream.getvalue()


def test_time_left() -> None:
    assert eta(NOW) == "0:00:10"
    assert eta(replace(NOW, seconds=4000.0, total_bytes=80_000_000)) == "42:46:40"
    assert eta(replace(NOW, read_bytes=0)) == "?"
    # Files may hold more text than they seem to.
    assert eta(replace(NOW, read_bytes=9_000_000)) == "0:00:00"
    # Most of what was read may not be used.
    assert eta(replace(NOW, text_bytes=10)) == "0:00:10"
