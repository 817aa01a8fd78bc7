"""Which documents are kept, and on which side. A document's own values decide, never its neighbours or its place.

Suffixes: N rows that were read, D documents.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_train.data.prepare.options import SPLITS, PrepareOptions
from moe_train.data.sources import Rows
from moe_train.data.split import split_positions

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Choice:
    keep_N: Mask
    skipped: Counter[str]
    """Rows that do not become documents, by the first reason that holds."""
    left_out: dict[int, str]
    """Row -> reason, of those that are left out for what their text is; filters and sampling are only counted."""


def choose(rows: Rows, texts_N: Any, bad: dict[int, str], options: PrepareOptions) -> Choice:
    """Which rows become documents.

    texts_N: arrow large_string array; null at bad rows.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    keep_N = np.ones(rows.count, bool)
    skipped: Counter[str] = Counter(bad.values())
    left_out = dict(bad)
    keep_N[list(bad)] = False

    def leave_out(reason: str, out_N: Mask, named: bool = False) -> None:
        places = np.flatnonzero(keep_N & out_N)
        if named:
            left_out.update(dict.fromkeys(places.tolist(), reason))
        if len(places):
            skipped[reason] += len(places)
        keep_N[places] = False

    leave_out("null", _bools(texts_N.is_null()), named=True)
    sizes_N = pc.fill_null(pc.binary_length(texts_N), 0).to_numpy(zero_copy_only=False)
    leave_out("empty", sizes_N == 0, named=True)
    if options.min_chars or options.max_chars is not None:
        longest = np.inf if options.max_chars is None else options.max_chars
        chars_N = sizes_N
        # A character has one to four bytes, so that counting them is seldom needed.
        if ((sizes_N < 4 * options.min_chars) | (sizes_N > longest)).any():
            chars_N = pc.fill_null(pc.utf8_length(texts_N), 0).to_numpy(zero_copy_only=False)
        leave_out("too short", chars_N < options.min_chars, named=True)
        if options.max_chars is not None:
            leave_out("too long", chars_N > options.max_chars, named=True)
    if options.min_language_score is not None:
        leave_out("language score", ~(rows.numbers("language_score") >= options.min_language_score))
    if options.dumps:
        leave_out("dump", ~_bools(pc.is_in(rows.labels("dump"), pa.array(options.dumps, pa.large_string()))))
    if options.url_include or options.url_exclude:
        urls_N = pc.fill_null(rows.labels("url"), "")
        if options.url_include:
            leave_out("url", ~_bools(pc.match_substring_regex(urls_N, options.url_include)))
        if options.url_exclude:
            leave_out("url", _bools(pc.match_substring_regex(urls_N, options.url_exclude)))
    if options.sample < 1:
        places = np.flatnonzero(keep_N)
        names = _names(rows, texts_N, places, [options.id_column])
        out_N = np.zeros(rows.count, bool)
        out_N[places] = split_positions(names, options.sample_seed, "sample:") >= options.sample
        leave_out("not sampled", out_N)
    return Choice(keep_N, skipped, left_out)


def sides(rows: Rows, texts_N: Any, places_D: npt.NDArray[Any], options: PrepareOptions) -> npt.NDArray[np.int8]:
    """[D] the split of each kept row, as its place in `options.splits`.

    Errors: ValueError for a side that is not known, where a column names it.
    """
    if len(options.splits) == 1:
        return np.zeros(len(places_D), np.int8)
    if options.split_from:
        values = rows.labels(options.split_from).take(_indices(places_D)).to_pylist()
        unknown = sorted({str(value) for value in values if value not in SPLITS})
        if unknown:
            raise ValueError(f"column {options.split_from} names sides {', '.join(SPLITS)}; found {', '.join(unknown)}")
        return np.array([SPLITS.index(value) for value in values], np.int8)
    names = _names(rows, texts_N, places_D, [options.split_column, options.id_column])
    positions_D = split_positions(names, options.split_seed)
    # The fractions lie one after the other from 0; what is behind them is for training.
    shares = {"validation": options.validation_fraction, "test": options.test_fraction}
    found_D = np.zeros(len(names), np.int8)
    begin = 0.0
    for split, share in shares.items():
        if share:
            found_D[(begin <= positions_D) & (positions_D < begin + share)] = options.splits.index(split)
        begin += share
    return found_D


def _names(rows: Rows, texts_N: Any, places_D: npt.NDArray[Any], columns: list[str]) -> list[bytes]:
    """What stands for each document, as UTF-8: the first of the columns that has a value that is not empty, else the
    text."""
    import pyarrow as pa
    import pyarrow.compute as pc

    indices = _indices(places_D)
    whole = len(places_D) == rows.count
    names: list[bytes] = []
    missing: list[int] = []
    for column in columns:
        labels = rows.labels(column)
        labels_D = labels if whole else labels.take(indices)
        if not names:
            names = pc.fill_null(labels_D, "").cast(pa.large_binary()).to_pylist()
        else:
            for place in missing:
                names[place] = (labels_D[place].as_py() or "").encode()
        missing = [] if all(names) else [place for place, name in enumerate(names) if not name]
        if not missing:
            return names
    for place, text in zip(missing, texts_N.take(indices.take(_indices(np.array(missing)))), strict=True):
        names[place] = text.as_py().encode()
    return names


def _indices(places: npt.NDArray[Any]) -> Any:
    import pyarrow as pa

    return pa.array(places, pa.int64())


def _bools(column: Any) -> Mask:
    found: Mask = column.to_numpy(zero_copy_only=False)
    return found
