"""Tokens to text, one by one, up to a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Vocabulary:
    """What generation knows about the tokenizer; by default nothing, and then there is no text."""

    bytes_V: Sequence[bytes] = ()
    """Bytes of text that each id stands for; an id beyond them has none."""
    end_ids: frozenset[int] = field(default_factory=frozenset)
    """Ids that end a sequence."""


class TextStream:
    """The text of one sequence's tokens in pieces that together are the text of all.

    A token may end inside a character: its bytes wait for the rest, and become U+FFFD only where none comes. What may
    be the beginning of a stop string waits as well.
    """

    def __init__(self, vocabulary: Vocabulary, stop: Sequence[str] = ()) -> None:
        self._bytes_V, self._stop = vocabulary.bytes_V, tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._waiting = ""
        self.stopped = False
        """Whether a stop string has come; nothing is to be added any more."""

    def add(self, token: int) -> str:
        """The text that is certain now."""
        assert not self.stopped
        content = self._bytes_V[token] if token < len(self._bytes_V) else b""
        return self._certain(self._decoder.decode(content))

    def end(self) -> str:
        """The rest, when no token comes any more."""
        if self.stopped:
            return ""
        text = self._certain(self._decoder.decode(b"", final=True))
        rest, self._waiting = self._waiting, ""
        return text + rest

    def _certain(self, new: str) -> str:
        text = self._waiting + new
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self._waiting = True, ""
            return text[: min(places)]
        kept = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._waiting = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text with which the stop string begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
