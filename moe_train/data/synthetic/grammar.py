"""Sentence patterns: text with slots in braces, filled from what a document has fixed or else from word lists."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from moe_train.data.synthetic.draw import Draw

Words = Mapping[str, Sequence[str]]
_SLOT = re.compile(r"\{(\w+)\}")
_ARTICLE = re.compile(r"\b([Aa])\(n\) (?=([A-Za-z]))")


class Writer:
    """Fills patterns for one document.

    ``facts`` stay the same through the document (names, amounts); any other slot is drawn anew from the list of its
    name in ``words``, whose entries may have slots themselves. ``a(n)`` becomes "a" or "an" by the letter that follows.
    """

    def __init__(self, words: Words, draw: Draw) -> None:
        self.words, self.draw = words, draw
        self.facts: dict[str, str] = {}

    def fill(self, pattern: str) -> str:
        filled = _SLOT.sub(self._value, pattern)
        return _ARTICLE.sub(lambda found: found[1] + ("n " if found[2] in "aeiouAEIOU" else " "), filled)

    def sentence(self, pattern: str) -> str:
        """Filled, with a capital letter in front."""
        text = self.fill(pattern)
        return text[:1].upper() + text[1:]

    def paragraph(self, patterns: Sequence[str], count: int) -> str:
        """``count`` different patterns in random order."""
        return " ".join(self.sentence(pattern) for pattern in self.draw.some(patterns, count))

    def fix(self, **patterns: str) -> None:
        """Fixes facts for the rest of the document; a later one may use those before it."""
        for name, pattern in patterns.items():
            self.facts[name] = self.fill(pattern)

    def fix_different(self, word: str, *names: str) -> None:
        """Fixes one fact per name, all different entries of the list ``word``."""
        for name, entry in zip(names, self.draw.some(self.words[word], len(names)), strict=True):
            self.facts[name] = self.fill(entry)

    def _value(self, found: re.Match[str]) -> str:
        name = found[1]
        if name in self.facts:
            return self.facts[name]
        return self.fill(self.draw.pick(self.words[name]))


def tenths(value: int) -> str:
    """A whole number of tenths with one digit behind the point: 1234 -> "123.4"."""
    sign, value = ("-" if value < 0 else ""), abs(value)
    return f"{sign}{value // 10}.{value % 10}"
