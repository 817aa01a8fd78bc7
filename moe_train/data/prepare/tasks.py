"""The tasks of a job: what is to be done, who does it, how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from moe_train.data.prepare.executors import Executor, InProcess, Processes
from moe_train.data.prepare.limits import Limits
from moe_train.data.prepare.part import PartFacts
from moe_train.data.prepare.pieces import PIECE_BYTES
from moe_train.data.prepare.ray_executor import Ray
from moe_train.data.prepare.runs import remove_unused
from moe_train.data.prepare.work import ChecksumTask, Context, PieceTask, Task, perform
from moe_train.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class How:
    """How the work is done; the result does not depend on it."""

    workers: int = 1
    executor: Literal["local", "ray"] = "local"
    task: tuple[int, int] | None = None
    """(i, n): only the i-th of n parts of the work, i from 1; nothing is merged."""
    merge_only: bool = False
    """All tasks are done: only put the parts together."""
    piece_bytes: int = PIECE_BYTES

    def __post_init__(self) -> None:
        """ValueError for values that make no sense."""
        if self.workers < 1:
            raise ValueError(f"at least one worker must do the work, not {self.workers}")
        if self.task is not None and not 1 <= self.task[0] <= self.task[1]:
            raise ValueError(f"task {self.task[0]} of {self.task[1]}: tasks are numbered from 1")
        if self.task is not None and self.merge_only:
            raise ValueError("a task does a part of the work, a merge puts all parts together: choose one of them")


@dataclass(frozen=True)
class Progress:
    files: int
    """Files that are done, of `total_files` that this process has a part in."""
    total_files: int
    documents: int
    tokens: int
    text_bytes: int
    """Of this call."""
    read_bytes: int
    """Text that was read in this call, used or not."""
    done_bytes: int
    """Text of all that is done, also by earlier calls; of `total_bytes`, both by the files' own account."""
    total_bytes: int
    seconds: float


OnProgress = Callable[[Progress], None]


class Tasks:
    """Does what is not done yet. `limits` says afterwards where the job ends."""

    def __init__(self, context: Context, how: How, progress: OnProgress | None) -> None:
        self.context, self.how, self._progress = context, how, progress
        self.limits = Limits(context)
        self._begin = time.monotonic()
        mine, of = how.task or (1, 1)
        self._mine = [number for number in range(len(context.pieces)) if number % of == mine - 1]
        self._left = {number: context.pieces[number] for number in self._mine}

    def do(self, tokenizer: Tokenizer) -> None:
        """ValueError for what is wrong in a source: the first such thing, in source order."""
        used: set[str] = set()
        for number in range(len(self.context.pieces)):
            if self.how.task is None or number in self._left:  # other tasks look after their own
                self.context.part(number).discard_if_torn()
            facts = self.context.part(number).facts()
            if facts is not None:
                self._note(number, facts)
                used.update(segment.file for some in facts.segments.values() for segment in some)
        if self.how.task is None:
            remove_unused(self.context.folder, used)
        left = list(self._wanted(self._tasks()))
        missing = sum(isinstance(task, PieceTask) for task in left)
        if self.how.merge_only and missing:
            raise ValueError(f"{missing} of {len(self.context.pieces)} pieces are not done; run all tasks first")
        if left:
            executor = self._executor(tokenizer, len(left))
            for task, facts in executor.run(self._wanted(left)):
                if isinstance(task, PieceTask):
                    assert facts is not None
                    self._note(task.piece, facts)
                    self._report(executor)
                elif facts is not None and facts.error is not None:
                    raise ValueError(facts.error)
        retry = self.limits.retry()
        if retry is not None:
            facts = perform(self.context, tokenizer, retry)
            assert facts is not None
            self.limits.add_retried(facts)
        self.limits.check()
        if self.how.task is None:
            self._finish(tokenizer)

    def _note(self, number: int, facts: PartFacts) -> None:
        self._left.pop(number, None)
        self.limits.add(number, facts)

    def _finish(self, tokenizer: Tokenizer) -> None:
        """What only the whole job can tell: the piece that a limit cuts, and the sources up to it."""
        cut = self.limits.cut
        if cut is not None:
            facts = perform(self.context, tokenizer, PieceTask(*cut))
            assert facts is not None
            if facts.error is not None:
                raise ValueError(facts.error)
            assert facts.documents == cut[1], (facts, cut)
        for piece in self.context.pieces[: self.limits.end]:
            if not piece.whole:
                facts = perform(self.context, tokenizer, ChecksumTask(piece.files[0]))
                if facts is not None and facts.error is not None:
                    raise ValueError(facts.error)

    def _tasks(self) -> Iterator[Task]:
        """What is not done yet, in source order; the checksum of a file in several pieces behind the last of them."""
        pieces = self.context.pieces
        for number in self._mine:
            piece = pieces[number]
            if number in self._left:
                yield PieceTask(number)
            last = number + 1 == len(pieces) or pieces[number + 1].files != piece.files
            if last and not piece.whole and not self.context.checksum_path(piece.files[0]).exists():
                yield ChecksumTask(piece.files[0])

    def _wanted(self, tasks: Iterable[Task]) -> Iterator[Task]:
        """Nothing behind a piece that cannot be done, or behind the limit."""
        for task in tasks:
            if not self.limits.error and not self.limits.is_behind(task):
                yield task

    def _executor(self, tokenizer: Tokenizer, tasks: int) -> Executor:
        executor: Executor
        if self.how.executor == "ray":
            executor = Ray(self.context, self.how.workers, lambda: self._report(executor))
        elif self.how.workers > 1:
            executor = Processes(self.context, min(self.how.workers, tasks), lambda: self._report(executor))
        else:
            executor = InProcess(self.context, tokenizer, lambda: self._report(executor))
        return executor

    def _report(self, executor: Executor) -> None:
        if self._progress is None:
            return
        pieces, counts = self.context.pieces, executor.counts()
        files = {file for number in self._mine for file in pieces[number].files}
        left = {file for piece in self._left.values() for file in piece.files}
        total = sum(pieces[number].text_bytes for number in self._mine)
        done = total - sum(piece.text_bytes for piece in self._left.values())
        self._progress(
            Progress(
                files=len(files - left),
                total_files=len(files),
                documents=counts.documents,
                tokens=counts.tokens,
                text_bytes=counts.text_bytes,
                read_bytes=counts.read_bytes,
                done_bytes=done,
                total_bytes=total,
                seconds=time.monotonic() - self._begin,
            )
        )
