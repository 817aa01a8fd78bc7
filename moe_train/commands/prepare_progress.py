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
            completed = min(now.done_bytes + now.text_bytes, now.total_bytes)
            bar.update(task, description=rates(now), completed=completed, total=now.total_bytes)

        yield show


def rates(now: Progress) -> str:
    seconds = max(now.seconds, 1e-9)
    return (
        f"{now.files}/{now.total_files} files  {now.documents / seconds:,.0f} documents/s  "
        f"{now.text_bytes / 1e6 / seconds:.1f} MB/s  {now.tokens / 1e6 / seconds:.2f}M tokens/s"
    )


def eta(now: Progress) -> str:
    """Time that the rest will take at the rate so far."""
    left = now.total_bytes - now.done_bytes - now.text_bytes
    if now.text_bytes == 0 or left < 0:
        return "?"
    seconds = round(left * now.seconds / now.text_bytes)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


class _Lines:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._next = time.monotonic() + _LINE_SECONDS

    def __call__(self, now: Progress) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _LINE_SECONDS
            print(f"{now.documents:,} documents  {rates(now)}  ETA {eta(now)}", file=self._stream, flush=True)
