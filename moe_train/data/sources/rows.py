"""What every kind of source is read as."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Kind = Literal["parquet", "jsonl", "lines", "document"]
ROWS_PER_BATCH = 512
INVALID_UTF8 = "invalid UTF-8"


@dataclass(frozen=True)
class SourceFile:
    name: str
    """Path below the folder that all sources have in common, with forward slashes: what provenance records."""
    path: Path
    kind: Kind = "parquet"

    @property
    def size(self) -> int:
        return self.path.stat().st_size


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a file: rows of parquet, lines of JSONL or text, or the one document of a text file."""

    first_row: int
    """Number of the first one in its file, from 0."""
    values: dict[str, list[Any]]
    """Column -> a value per row; None where there is none."""
    bad: dict[int, str] = field(default_factory=dict)
    """Place in this batch -> why the row cannot be read; its values are None."""
