"""Sources of text: files of several kinds, read as rows."""

from moe_train.data.sources.discovery import find_sources
from moe_train.data.sources.reading import (
    check_columns,
    first_texts,
    read_rows,
    sample_texts,
    text_bytes,
    text_column,
)
from moe_train.data.sources.rows import Rows, SourceFile, Span

__all__ = [
    "Rows",
    "SourceFile",
    "Span",
    "check_columns",
    "find_sources",
    "first_texts",
    "read_rows",
    "sample_texts",
    "text_bytes",
    "text_column",
]
