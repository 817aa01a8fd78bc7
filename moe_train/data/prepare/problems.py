"""Which rows were left out for what they hold: the first ones by name, runs of neighbours as one."""

from __future__ import annotations

from typing import Any

_OF_A_REASON = 50
"""So many of one reason are named; all are counted."""


def note(problems: list[dict[str, Any]], problem: dict[str, Any]) -> None:
    """problem: file, row, rows, reason; they come in source order."""
    same = [one for one in problems[-1:] if (one["file"], one["reason"]) == (problem["file"], problem["reason"])]
    if same and same[0]["row"] + same[0]["rows"] == problem["row"]:
        same[0]["rows"] += problem["rows"]
    elif sum(one["reason"] == problem["reason"] for one in problems) < _OF_A_REASON:
        problems.append(dict(problem))
