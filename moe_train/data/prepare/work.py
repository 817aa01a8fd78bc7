"""What a worker does: the documents of a piece, or the checksum of a source. Any process can, given the context."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from moe_train.data.files import write_atomically
from moe_train.data.prepare.encoding import Documents, read_documents, streams
from moe_train.data.prepare.options import PrepareOptions
from moe_train.data.prepare.part import Part, PartFacts, PartWriter
from moe_train.data.prepare.pieces import Piece
from moe_train.data.sources import SourceFile
from moe_train.data.sources.lines import lines_before
from moe_train.data.sources.parquet import row_groups
from moe_train.data.tokenizers import Tokenizer, load_tokenizer

_PROBLEMS = 100
"""So many rows that could not be read are named; all are counted."""

OnBatch = Callable[[int, int, int], None]
"""Told documents, tokens and bytes of text of each batch."""


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
        return self.folder / f"source-{file:06d}.json"


@dataclass(frozen=True)
class PieceTask:
    """``limit``: only the first so many documents, into the part that is cut."""

    piece: int
    limit: int | None = None


@dataclass(frozen=True)
class ChecksumTask:
    file: int


Task = PieceTask | ChecksumTask


def perform(context: Context, tokenizer: Tokenizer, task: Task, on_batch: OnBatch | None = None) -> PartFacts | None:
    """Does a task unless it is done already. Facts of a piece; an error in a source is one of them.

    Errors: OSError, as for a full disk.
    """
    if isinstance(task, ChecksumTask):
        _checksum(context, task.file)
        return None
    part = context.part(task.piece, cut=task.limit is not None)
    done = part.facts() if task.limit is None else None
    return done if done is not None else _do_piece(context, tokenizer, task, part, on_batch)


def sha256_of(file: SourceFile) -> str:
    digest = hashlib.sha256()
    with file.open() as stream:
        while content := stream.read(1 << 20):
            digest.update(content)
    return digest.hexdigest()


def _do_piece(
    context: Context, tokenizer: Tokenizer, task: PieceTask, part: Part, on_batch: OnBatch | None
) -> PartFacts:
    piece, options = context.pieces[task.piece], context.options
    file = context.files[piece.file]
    writer = PartWriter(part, len(options.splits), streams(options))
    # A piece never gives more than the whole job may have. Its exact share is known only when those before it are done.
    limit = options.max_documents if task.limit is None else task.limit
    skipped: Counter[str] = Counter()
    total = 0
    try:
        for found in read_documents(file, piece.span, tokenizer, options, limit):
            if found.bad and options.on_bad == "stop":
                row = min(found.bad)
                raise ValueError(
                    f"{file.path}, row {_first_row(file, piece) + row}: {found.bad[row]}; --on-bad skip counts and "
                    "leaves out such rows"
                )
            writer.facts.rows += found.rows
            skipped += found.skipped
            _note(writer.facts, found)
            writer.add(
                found.streams,
                found.lengths_D,
                found.splits_D,
                found.sizes_D,
                found.rows_D,
                found.ids_D,
                found.domains_D,
            )
            total += int(found.lengths_D.sum())
            if on_batch is not None:
                on_batch(len(found.lengths_D), int(found.lengths_D.sum()), int(found.sizes_D.sum()))
            if options.max_tokens is not None and total > options.max_tokens:
                break
        return writer.finish(skipped)
    except ValueError as error:
        return PartFacts(error=str(error))
    finally:
        writer.close()


def _note(facts: PartFacts, found: Documents) -> None:
    for row, reason in sorted(found.bad.items()):
        last = facts.problems[-1] if facts.problems else None
        if last is not None and last["reason"] == reason and last["row"] + last["rows"] == row:
            last["rows"] += 1
        elif len(facts.problems) < _PROBLEMS:
            facts.problems.append({"row": row, "rows": 1, "reason": reason})


def _first_row(file: SourceFile, piece: Piece) -> int:
    if file.kind == "parquet":
        return sum(group.rows for group in row_groups(file, [])[: piece.span.start])
    return lines_before(file, piece.span.start) if piece.span.start else 0


def _checksum(context: Context, number: int) -> None:
    path = context.checksum_path(number)
    if not path.exists():
        write_atomically(path, json.dumps({"sha256": sha256_of(context.files[number])}).encode())


@lru_cache(maxsize=1)
def tokenizer_of(spec: TokenizerSpec) -> Tokenizer:
    from moe_train.data.tokenizers.gigatoken_engine import fast_tokenizer

    tokenizer = load_tokenizer(spec.path, spec.eod_token)
    return fast_tokenizer(tokenizer) if spec.fast else tokenizer
