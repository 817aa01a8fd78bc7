"""Chat templates: how a conversation is written as text and special tokens, and which of it the loss counts.

Counted is what the model has to produce: each answer and the token that ends it. Not counted is all that stands in its
prompt: other turns, headers, and the line break behind the end of a turn.

Sources of the formats: the chat templates published with Qwen3 and with Llama 3 Instruct (tokenizer_config.json).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from moe_train.data.instruction.conversation import Message

END_OF_DOCUMENT = "end of document"
"""Name of the tokenizer's own end-of-document token, whatever its spelling."""


class Piece(NamedTuple):
    """Text, or a special token of the tokenizer, or a `mark`: special where the tokenizer has it so, else text."""

    text: str
    kind: Literal["text", "special", "mark"] = "text"
    counted: bool = False


@dataclass(frozen=True)
class ChatTemplate:
    special: tuple[str, ...]
    """Special tokens that the tokenizer must have."""
    end_of_turn: str
    render: Callable[[Sequence[Message], Sequence[bool]], Iterator[Piece]]
    """(messages, whether the loss counts each) -> pieces."""


def _qwen3(messages: Sequence[Message], counted: Sequence[bool]) -> Iterator[Piece]:
    """An answer to the last question carries a block for thoughts, which is empty where there are none.

    An empty block is not counted: without thinking, it is the end of the prompt when the model is used.
    """
    last = len(messages) - 1
    last_question = max((i for i, message in enumerate(messages) if message.role == "user"), default=last)
    for index, (message, counts) in enumerate(zip(messages, counted, strict=True)):
        yield Piece("<|im_start|>", "special")
        if message.role == "assistant":
            reasoning, content = _reasoning(message)
            yield Piece("assistant\n")
            if index > last_question and (index == last or reasoning):
                thinks = counts and bool(reasoning)
                yield Piece("<think>", "mark", thinks)
                yield Piece("\n" + reasoning.strip("\n") + "\n", counted=thinks)
                yield Piece("</think>", "mark", thinks)
                yield Piece("\n\n", counted=thinks)
                content = content.lstrip("\n")
            yield Piece(content, counted=counts)
        else:
            yield Piece(f"{message.role}\n{message.content}")
        yield Piece("<|im_end|>", "special", counts)
        yield Piece("\n")


def _reasoning(message: Message) -> tuple[str, str]:
    """(thoughts, answer): thoughts may also stand inside the content, before `</think>`."""
    if message.reasoning or "</think>" not in message.content:
        return message.reasoning, message.content
    thoughts, *_, answer = message.content.split("</think>")
    return thoughts.rstrip("\n").split("<think>")[-1].lstrip("\n"), answer.lstrip("\n")


def _llama3(messages: Sequence[Message], counted: Sequence[bool]) -> Iterator[Piece]:
    """Llama 3's; 3.1 and later put a date in front that changes by the day, which is left out here."""
    yield Piece("<|begin_of_text|>", "special")
    for message, counts in zip(messages, counted, strict=True):
        yield Piece("<|start_header_id|>", "special")
        yield Piece(message.role)
        yield Piece("<|end_header_id|>", "special")
        yield Piece("\n\n")
        yield Piece(message.content.strip(), counted=counts)
        yield Piece("<|eot_id|>", "special", counts)


def _plain(messages: Sequence[Message], counted: Sequence[bool]) -> Iterator[Piece]:
    """For tokenizers without tokens for turns: headers are text, and the end-of-document token ends an answer."""
    for message, counts in zip(messages, counted, strict=True):
        yield Piece(f"{message.role.capitalize()}:\n")
        yield Piece(message.content, counted=counts)
        if message.role == "assistant":
            yield Piece(END_OF_DOCUMENT, "special", counts)
        else:
            yield Piece("\n\n")


TEMPLATES = {
    "qwen3": ChatTemplate(("<|im_start|>", "<|im_end|>"), "<|im_end|>", _qwen3),
    "llama3": ChatTemplate(
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>", _llama3
    ),
    "plain": ChatTemplate((), END_OF_DOCUMENT, _plain),
}
