"""A preparation from its sources to its published files."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_train.data.files import PARTIAL_SUFFIX, is_abandoned
from moe_train.data.prepare.job import begin, check_free, finished, job_facts
from moe_train.data.prepare.merge import EmptySplit, merge, tokenizer_copy
from moe_train.data.prepare.names import stem_of, work_folder
from moe_train.data.prepare.options import PrepareOptions
from moe_train.data.prepare.pieces import plan
from moe_train.data.prepare.tasks import How, OnProgress, Tasks
from moe_train.data.prepare.work import Context, TokenizerSpec
from moe_train.data.sources import SourceFile, check_columns, text_column
from moe_train.data.tokenizers import Tokenizer
from moe_train.data.tokenizers.gigatoken_engine import GigatokenTokenizer


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
    folder = work_folder(prefix)
    done = finished(prefix, files, job, options)
    if done is not None:
        if folder.exists() and how.task is None:
            # Whoever finished was ended before the last thing to do.
            with _lock(folder, shared=False):
                shutil.rmtree(folder)
        return done if how.task is None else {}
    if not (folder / "job.json").is_file():
        if how.merge_only:
            raise ValueError(f"no task has done anything for {prefix} yet (there is no {folder}); run them first")
        check_free(stems.values())
    tokenizer_copy(stems[options.splits[0]].parent, tokenizer)
    pieces = tuple(plan(files, options.content_columns, how.piece_bytes))
    folder.mkdir(parents=True, exist_ok=True)
    fast = isinstance(tokenizer, GigatokenTokenizer)
    with _lock(folder, shared=how.task is not None):
        left = [path for path in folder.glob(f"*{PARTIAL_SUFFIX}") if how.task is None or is_abandoned(path)]
        tokenizers = stems[options.splits[0]].parent.glob(f"{glob.escape(tokenizer.copy_name)}.*{PARTIAL_SUFFIX}")
        for path in (*left, *filter(is_abandoned, tokenizers)):  # of processes that were killed
            path.unlink(missing_ok=True)
        cut = [[[file, span.start, span.stop] for file, span in piece.spans] for piece in pieces]
        begin(folder, job | {"pieces": cut}, "gigatoken" if fast else "reference", files)
        spec = TokenizerSpec(str(tokenizer.path.resolve()), tokenizer.piece(tokenizer.eod_id), fast)
        context = Context(tuple(files), pieces, spec, options, folder.resolve())
        tasks = Tasks(context, how, progress)
        with _full_disk_explained(folder):
            tasks.do(tokenizer)
            if how.task is not None:
                return {}
            try:
                manifests = merge(context, tasks.limits, job, stems, tokenizer, how.workers)
            except EmptySplit:
                shutil.rmtree(folder)
                raise
        shutil.rmtree(folder)
    return manifests


@contextmanager
def _full_disk_explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            f"{os.strerror(error.errno)}: {folder} and the result beside it need room for all tokens twice; free some "
            "space and run the same command again, it goes on where it was",
        ) from error


@contextmanager
def _lock(folder: Path, shared: bool) -> Iterator[None]:
    """Keeps a second process from doing the same job; tasks of an array share it. ValueError where it is taken."""
    with open(folder / "lock", "w") as stream:
        try:
            fcntl.flock(stream, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is at work in {folder}; wait for it, or end it") from error
        yield
