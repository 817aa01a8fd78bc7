"""What every kind of instruction data is read as."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moe_train.data.sources.rows import INVALID_UTF8

Role = Literal["system", "user", "assistant"]


class Unusable(Exception):
    """A row that cannot become a conversation; the message is one of a few fixed reasons, so that it can be counted."""


@dataclass(frozen=True)
class Message:
    role: Role
    content: str
    reasoning: str = ""
    """What an assistant thought before its answer, where the data hold it apart from the answer."""


def conversation(messages: Sequence[Any]) -> list[Message]:
    """Checked messages, from objects with `role`, `content` and perhaps `reasoning_content`.

    Left out are system messages without content, and what follows the last answer, since no answer depends on it.
    Errors: Unusable.
    """
    found = []
    for entry in messages:
        if not isinstance(entry, Mapping):
            raise Unusable("a message is no object with role and content")
        role = entry.get("role")
        if role not in ("system", "user", "assistant"):
            raise Unusable("unknown role")
        message = Message(role, _text(entry.get("content")), _text(entry.get("reasoning_content")))
        if message.content.strip():
            found.append(message)
        elif role != "system":
            raise Unusable("no answer" if role == "assistant" else "no question")
    if not found:
        raise Unusable("no messages")
    while found and found[-1].role != "assistant":
        found.pop()
    if not found:
        raise Unusable("no answer")
    return found


def _text(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Unusable("no text")
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        raise Unusable(INVALID_UTF8) from None
    return value
