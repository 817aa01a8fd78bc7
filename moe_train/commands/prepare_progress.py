"""How far a preparation is: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from moe_train.data.prepare import Progress

_LINE_SECONDS = 10.0


@contextmanager
def reporter(stream: TextIO | None = None) -> Iterator[Callable[[Progress], None]]:
    """What to call with each `Progress`; writes to standard error."""
    from rich.console import Console

    stream = stream or sys.stderr
    console = Console(file=stream)
    if not console.is_terminal:
        yield _Lines(stream)
        return
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(bar_width=10), TaskProgressColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Bar(*columns, console=console) as bar:
        task = bar.add_task("", total=None)

        def show(now: Progress) -> None:
            bar.update(task, description=rates(now), completed=progressed(now), total=now.total_bytes)

        yield show


def rates(now: Progress) -> str:
    seconds = max(now.seconds, 1e-9)
    return (
        f"{now.files}/{now.total_files} files  {now.documents / seconds:,.0f} documents/s  "
        f"{now.text_bytes / 1e6 / seconds:.1f} MB/s  {now.tokens / 1e6 / seconds:.2f}M tokens/s"
    )


def progressed(now: Progress) -> int:
    """Bytes of `total_bytes`, those of pieces that are under way included."""
    return min(max(now.done_bytes, now.read_bytes), now.total_bytes)


def eta(now: Progress) -> str:
    """Time that the rest will take at the rate so far."""
    if not now.read_bytes:
        return "?"
    seconds = round((now.total_bytes - progressed(now)) * now.seconds / now.read_bytes)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


class _Lines:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._next = time.monotonic() + _LINE_SECONDS

    def __call__(self, now: Progress) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _LINE_SECONDS
            print(f"{now.documents:,} documents  {rates(now)}  ETA {eta(now)}", file=self._stream, flush=True)
