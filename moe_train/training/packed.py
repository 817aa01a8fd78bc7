"""Arguments of a worker as one word of letters and digits, which no shell on the way changes."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence

OPTION = "--packed"


def pack(arguments: Sequence[str]) -> list[str]:
    """What to start a worker with instead."""
    # A whole configuration may be among them, and launchers print command lines.
    return [OPTION, base64.urlsafe_b64encode(zlib.compress(json.dumps(list(arguments)).encode(), 9)).decode()]


def unpack(arguments: Sequence[str]) -> list[str]:
    """The arguments with those that were packed in their place; ValueError where a word is damaged."""
    found: list[str] = []
    words = iter(arguments)
    for word in words:
        found += _words(next(words, "")) if word == OPTION else [word]
    return found


def _words(text: str) -> list[str]:
    try:
        content = zlib.decompress(base64.b64decode(text, altchars=b"-_", validate=True))
        return [str(word) for word in json.loads(content)]
    except (ValueError, zlib.error):
        raise ValueError(f"{OPTION} {text[:20]!r}: damaged on its way") from None
