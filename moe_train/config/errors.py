"""The one error that a bad configuration ends in."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: the dotted path of the key and what to do about it."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class ConfigError(ValueError):
    """Every problem of a configuration at once, one per line."""

    def __init__(self, problems: Iterable[Problem], source: str = "configuration") -> None:
        self.problems = tuple(problems)
        self.source = source
        assert self.problems, "a ConfigError needs at least one problem"
        count = len(self.problems)
        head = f"{source}: {count} problem{'s' if count > 1 else ''}"
        super().__init__("\n".join([head, *(f"  {problem}" for problem in self.problems)]))


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that ``name`` is most likely a typo of, or None."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return found[0] if found else None


def listing(names: Iterable[str]) -> str:
    """Names in one line for a message; says so when there are none."""
    return ", ".join(sorted(names)) or "(none)"
