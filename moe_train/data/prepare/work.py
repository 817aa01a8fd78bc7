"""What a worker does: the documents of a piece, or the checksum of a source. Any process can, given the context."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from moe_train.data.files import write_atomically, xxh3_of
from moe_train.data.prepare.encoding import Documents, read_documents
from moe_train.data.prepare.options import PrepareOptions
from moe_train.data.prepare.part import CHECKSUM, Part, PartFacts, PartWriter
from moe_train.data.prepare.pieces import Piece
from moe_train.data.prepare.problems import note
from moe_train.data.prepare.runs import Runs
from moe_train.data.sources import SourceFile, Span
from moe_train.data.sources.lines import lines_before
from moe_train.data.sources.parquet import row_groups
from moe_train.data.tokenizers import Tokenizer, load_tokenizer

OnBatch = Callable[[int, int, int, int], None]
"""Told documents, tokens and bytes of text of each batch, and bytes of text that were read for it."""


@dataclass(frozen=True)
class TokenizerSpec:
    """How a process gets the tokenizer."""

    path: str
    eod_token: str
    fast: bool
    """Whether gigatoken encodes: it has proved itself equal in the process that began the job."""


@dataclass(frozen=True)
class Context:
    """All that a process must know to do any part of a job."""

    files: tuple[SourceFile, ...]
    pieces: tuple[Piece, ...]
    tokenizer: TokenizerSpec
    options: PrepareOptions
    folder: Path
    """Where parts are collected."""

    def part(self, number: int, cut: bool = False) -> Part:
        return Part(self.folder, number, cut)

    def checksum_path(self, file: int) -> Path:
        return self.folder / checksum_name(file)


def checksum_name(file: int) -> str:
    return f"source-{file:06d}.json"


@dataclass(frozen=True)
class PieceTask:
    """``limit``: only the first so many documents, into the part that is cut.

    tokens: nor more documents than needed to pass so many tokens. A limit of the job stands where neither is given.
    """

    piece: int
    limit: int | None = None
    tokens: int | None = None

    @property
    def cut(self) -> bool:
        return self.limit is not None or self.tokens is not None


@dataclass(frozen=True)
class ChecksumTask:
    file: int


Task = PieceTask | ChecksumTask


def perform(
    context: Context, tokenizer: Tokenizer, task: Task, on_batch: OnBatch | None = None, runs: Runs | None = None
) -> PartFacts | None:
    """Does a task unless it is done already; ``runs`` keeps files open for the next one. Facts of a piece; an error in
    a source is one of them.

    Errors: OSError, as for a full disk.
    """
    if isinstance(task, ChecksumTask):
        try:
            _checksum(context, task.file)
        except ValueError as error:
            return PartFacts(error=str(error))
        return None
    part = context.part(task.piece, cut=task.cut)
    done = None if task.cut else part.facts()
    if done is not None:
        return done
    if runs is not None:
        return _do_piece(context, tokenizer, task, part, on_batch, runs)
    with closing(Runs(context.folder, None)) as own:
        return _do_piece(context, tokenizer, task, part, on_batch, own)


def checksum_of(file: SourceFile) -> str:
    with file.open() as stream:
        return xxh3_of(stream)


def _do_piece(
    context: Context, tokenizer: Tokenizer, task: PieceTask, part: Part, on_batch: OnBatch | None, runs: Runs
) -> PartFacts:
    piece, options = context.pieces[task.piece], context.options
    writer = PartWriter(part, len(options.splits), runs)
    # A piece never gives more than the whole job may have. Its exact share is known only when those before it are done.
    left, room = (task.limit, task.tokens) if task.cut else (options.max_documents, options.max_tokens)
    try:
        for number, span in piece.spans:
            file = context.files[number]
            for found in read_documents(file, span, tokenizer, options, left):
                _check(found, file, span, options, room)
                _count(writer.facts, number, found)
                writer.add(
                    number,
                    found.streams,
                    found.lengths_D,
                    found.splits_D,
                    found.sizes_D,
                    found.rows_D,
                    found.ids_D,
                    found.domains_D,
                )
                room = None if room is None else room - int(found.lengths_D.sum())
                left = None if left is None else left - len(found.lengths_D)
                if on_batch is not None:
                    size = int(found.sizes_D.sum())
                    on_batch(len(found.lengths_D), int(found.lengths_D.sum()), size, found.read_bytes)
                if room is not None and room < 0:
                    break
            if piece.whole:
                writer.facts.checksums[str(number)] = checksum_of(file)
            file.check_unchanged()
            if left == 0 or (room is not None and room < 0):
                break
        return writer.finish()
    except ValueError as error:
        return PartFacts(error=str(error))
    finally:
        writer.close()


def _check(found: Documents, file: SourceFile, span: Span, options: PrepareOptions, room: int | None) -> None:
    """ValueError for the first row that stops the job; with ``room``, before the document that goes beyond so many
    tokens."""
    end = found.end_row(room)
    stops = {
        row: reason
        for row, reason in found.left_out.items()
        if (reason in options.stop_on or (options.on_bad == "stop" and row in found.bad)) and (end is None or row < end)
    }
    if stops:
        row = min(stops)
        hint = "--on-bad skip counts and leaves out such rows" if row in found.bad else "--stop-on asks for this"
        raise ValueError(f"{file.path}, row {_first_row(file, span) + row}: {stops[row]}; {hint}")


def _count(facts: PartFacts, file: int, found: Documents) -> None:
    facts.rows[str(file)] = facts.rows.get(str(file), 0) + found.rows
    for reason, count in found.skipped.items():
        facts.skipped[reason] = facts.skipped.get(reason, 0) + count
    for row, reason in sorted(found.left_out.items()):
        note(facts.problems, {"file": file, "row": row, "rows": 1, "reason": reason})


def _first_row(file: SourceFile, span: Span) -> int:
    if file.kind == "parquet":
        return sum(group.rows for group in row_groups(file, [])[: span.start])
    return lines_before(file, span.start) if span.start else 0


def _checksum(context: Context, number: int) -> None:
    path = context.checksum_path(number)
    if not path.exists():
        checksum = checksum_of(context.files[number])
        context.files[number].check_unchanged()
        write_atomically(path, json.dumps({CHECKSUM: checksum}).encode())


@lru_cache(maxsize=1)
def tokenizer_of(spec: TokenizerSpec) -> Tokenizer:
    """For one worker of several."""
    from moe_train.data.tokenizers.gigatoken_engine import fast_tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # of Hugging Face's engine
    tokenizer = load_tokenizer(spec.path, spec.eod_token)
    tokenizer.threads = 1
    return fast_tokenizer(tokenizer) if spec.fast else tokenizer
