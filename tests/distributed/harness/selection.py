"""Which cases of a test run always, and which with the slow ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def every_second(*values: Iterable[Any]) -> list[Any]:
    """All combinations, every second one marked slow, as on a chess board: what is left has each value of each."""
    chosen = []
    for numbered in itertools.product(*(enumerate(v) for v in values)):
        dark = sum(index for index, _ in numbered) % 2
        parts = (value if isinstance(value, tuple) else (value,) for _, value in numbered)
        case = tuple(itertools.chain.from_iterable(parts))
        chosen.append(pytest.param(*case, marks=pytest.mark.slow if dark else []))
    return chosen
