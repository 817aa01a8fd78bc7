"""Token ids as they are given to a model: plain lists of what lists, arrays and tensors hold, and whether they are ids
that the model knows."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any


def plain(given: Any) -> Any:
    """Tensors and arrays as lists; everything else as it is."""
    return given.tolist() if hasattr(given, "tolist") else given


def id_lists(given: Any, noun: str = "prompt") -> list[list[int]]:
    """The ids of each sequence, from sequences of ids or from one flat sequence.

    ``noun``: what a sequence is called in errors. ValueError where one is no sequence, or an element no integer.
    """
    given = plain(given)
    if isinstance(given, (str, bytes)) or not hasattr(given, "__iter__"):
        raise ValueError(f"{noun}s are {given!r}; give token ids: a list of integers for each {noun}")
    sequences = [plain(sequence) for sequence in given]
    if sequences and all(_is_integer(token) for token in sequences):
        sequences = [sequences]
    return [_ids(sequence, f"{noun} {number}") for number, sequence in enumerate(sequences)]


def _ids(sequence: Any, name: str) -> list[int]:
    if isinstance(sequence, (str, bytes)) or not hasattr(sequence, "__iter__"):
        raise ValueError(f"{name} is {sequence!r}; give a list of token ids")
    tokens = [plain(token) for token in sequence]
    for token in tokens:
        if not _is_integer(token):
            raise ValueError(f"{name} holds {token!r}; token ids are integers")
    return [operator.index(token) for token in tokens]


def _is_integer(value: Any) -> bool:
    return hasattr(value, "__index__")


def check_ids(sequences: Sequence[Sequence[int]], vocab_size: int, noun: str = "prompt") -> None:
    """ValueError for a sequence without ids, or with one outside of [0, vocab_size)."""
    for number, sequence in enumerate(sequences):
        if not len(sequence):
            raise ValueError(f"{noun} {number} has no token to begin with; give at least one id")
        wrong = [token for token in (min(sequence), max(sequence)) if not 0 <= token < vocab_size]
        if wrong:
            raise ValueError(
                f"{noun} {number} holds an id outside of the model's vocabulary of {vocab_size} ({wrong[0]}; ids are "
                f"0 to {vocab_size - 1})"
            )
