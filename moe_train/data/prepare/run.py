"""A preparation from its sources to its published files."""

from __future__ import annotations

import fcntl
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moe_train.data.prepare.executors import Executor, InProcess, Processes
from moe_train.data.prepare.job import begin, finished, job_facts
from moe_train.data.prepare.limits import Limits
from moe_train.data.prepare.merge import EmptySplit, merge
from moe_train.data.prepare.names import stem_of, work_folder
from moe_train.data.prepare.options import PrepareOptions
from moe_train.data.prepare.pieces import PIECE_BYTES, plan
from moe_train.data.prepare.ray_executor import Ray
from moe_train.data.prepare.work import ChecksumTask, Context, PieceTask, Task, TokenizerSpec, perform
from moe_train.data.sources import SourceFile, check_columns, text_column
from moe_train.data.tokenizers import Tokenizer
from moe_train.data.tokenizers.gigatoken_engine import GigatokenTokenizer


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
    """Files of which all pieces that came before are done, of `total_files`."""
    total_files: int
    documents: int
    tokens: int
    text_bytes: int
    """Of this call."""
    done_bytes: int
    """Text of pieces that an earlier call had done."""
    total_bytes: int
    """About so much text there is in all."""
    seconds: float


OnProgress = Callable[[Progress], None]


def prepare(
    files: Sequence[SourceFile],
    output: str | Path,
    tokenizer: Tokenizer,
    options: PrepareOptions | None = None,
    how: How | None = None,
    progress: OnProgress | None = None,
) -> dict[str, dict[str, Any]]:
    """Tokenizes sources into files whose names begin with ``output`` (`names.py`).

    Does nothing where the same job has finished there, and goes on where it was begun. Returns the manifest of each
    split ("" where there is no split); nothing where this was one task of several.
    Errors: ValueError for unreadable sources, missing columns, an empty result, or an output that belongs to a
    different job (the message says what differs); OSError.
    """
    options, how, prefix = options or PrepareOptions(), how or How(), str(output)
    stems = {split: stem_of(prefix, split) for split in options.splits}
    for file in files:
        if file.kind != "tokens":
            check_columns(file, [*(text_column(file, c) for c in options.content_columns), *options.needed_columns])
    job = job_facts(files, tokenizer, options)
    done = finished(prefix, files, job, options)
    folder = work_folder(prefix)
    if done is not None:
        if folder.exists() and how.task is None:
            # Whoever finished was ended before the last thing to do.
            with _lock(folder, shared=False):
                shutil.rmtree(folder)
        return done if how.task is None else {}
    pieces = tuple(plan(files, options.content_columns, how.piece_bytes))
    folder.mkdir(parents=True, exist_ok=True)
    fast = isinstance(tokenizer, GigatokenTokenizer)
    with _lock(folder, shared=how.task is not None):
        cut = [(piece.file, piece.span.start, piece.span.stop) for piece in pieces]
        begin(folder, job | {"pieces": [list(one) for one in cut]}, "gigatoken" if fast else "reference")
        spec = TokenizerSpec(str(tokenizer.path.resolve()), tokenizer.piece(tokenizer.eod_id), fast)
        context = Context(tuple(files), pieces, spec, options, folder.resolve())
        tasks = _Tasks(context, how, progress)
        tasks.do(tokenizer)
        if how.task is not None:
            return {}
        try:
            manifests = merge(context, tasks.limits, job, stems, tokenizer)
        except EmptySplit:
            shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)
    return manifests


class _Tasks:
    """What is to be done, and what of it is done."""

    def __init__(self, context: Context, how: How, progress: OnProgress | None) -> None:
        self.context, self.how, self._progress = context, how, progress
        self.limits = Limits(context)
        self._begin = time.monotonic()
        self._total = sum(piece.text_bytes for piece in context.pieces)
        self._before = 0

    def do(self, tokenizer: Tokenizer) -> None:
        """ValueError for what is wrong in a source: the first such thing, in source order."""
        for number, piece in enumerate(self.context.pieces):
            facts = self.context.part(number).facts()
            if facts is not None:
                self._before += piece.text_bytes
                self.limits.add(number, facts)
        left = list(self._wanted(self._tasks()))
        count = sum(isinstance(task, PieceTask) for task in left)
        if self.how.merge_only and count:
            raise ValueError(f"{count} of {len(self.context.pieces)} pieces are not done; run all tasks first")
        if left:
            executor = self._executor(tokenizer, len(left))
            for task, facts in executor.run(self._wanted(left)):
                if isinstance(task, PieceTask):
                    assert facts is not None
                    self.limits.add(task.piece, facts)
                    self._report(executor)
        self.limits.check()
        if self.how.task is None:
            self._finish(tokenizer)

    def _finish(self, tokenizer: Tokenizer) -> None:
        """What only the whole job can tell: the piece that a limit cuts, and the sources up to it."""
        for piece in self.context.pieces[: self.limits.end]:
            perform(self.context, tokenizer, ChecksumTask(piece.file))
        if self.limits.cut is not None:
            number, documents = self.limits.cut
            facts = perform(self.context, tokenizer, PieceTask(number, documents))
            assert facts is not None and facts.documents == documents, (facts, documents)

    def _tasks(self) -> Iterator[Task]:
        """What is not done yet, in source order; a file's checksum when all of it has just been read."""
        pieces = self.context.pieces
        mine, of = self.how.task or (1, 1)
        for number, piece in enumerate(pieces):
            if number % of != mine - 1:
                continue
            if self.context.part(number).facts() is None:
                yield PieceTask(number)
            last = number + 1 == len(pieces) or pieces[number + 1].file != piece.file
            if last and not self.context.checksum_path(piece.file).exists():
                yield ChecksumTask(piece.file)

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
        documents, tokens, size = executor.counts()
        seconds = time.monotonic() - self._begin
        files = self.limits.files_done()
        total = len(self.context.files)
        self._progress(Progress(files, total, documents, tokens, size, self._before, self._total, seconds))


@contextmanager
def _lock(folder: Path, shared: bool) -> Iterator[None]:
    """Keeps a second process from doing the same job; tasks of an array share it. ValueError where it is taken."""
    with open(folder / "lock", "w") as stream:
        try:
            fcntl.flock(stream, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is at work in {folder}; wait for it, or end it") from error
        yield
