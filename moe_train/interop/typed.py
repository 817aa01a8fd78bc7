"""Checks of single values of a config.json. All raise ValueError that names key and value."""

from __future__ import annotations

from typing import Any

_LARGEST = 1e300
"""Of a number; neither infinite nor not a number."""


def whole(key: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        kind = "a positive whole number" if least == 1 else f"a whole number from {least} on"
        raise ValueError(f"config.json: {key} is {value!r}; {kind} is needed")
    return value


def number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -_LARGEST < value < _LARGEST:
        raise ValueError(f"config.json: {key} is {value!r}; a number is needed")
    return float(value)


def sequence(key: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"config.json: {key} is {value!r}; a list is needed")
    return value


def mapping(key: str, value: Any) -> dict[str, Any]:
    """None counts as empty."""
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"config.json: {key} is {value!r}; an object is needed")
    return value or {}
