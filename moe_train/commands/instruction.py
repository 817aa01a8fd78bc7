"""moe-train prepare --instruction: the arguments about conversations."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_train.data.instruction import InstructionOptions

_OPTIONS = ("chat_template", "messages_column", "prompt_column", "response_column", "loss_turns")
_FORMAT_OF = {
    "messages_column": "messages",
    "prompt_column": "prompt-response",
    "response_column": "prompt-response",
}
"""Option -> the one format that it is for."""


def register(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("instruction data", "conversations in place of texts, with a mask for the loss")
    group.add_argument(
        "--instruction",
        metavar="FORMAT",
        help="how rows hold conversations: messages, prompt-response, or a published set (metamathqa, "
        "magicoder-evol-instruct, openbookqa, commonsenseqa, medical-o1)",
    )
    group.add_argument("--chat-template", metavar="NAME", help="how conversations are written: qwen3, llama3, plain")
    group.add_argument("--messages-column", metavar="NAME", help="of the format messages (default: messages)")
    group.add_argument("--prompt-column", metavar="NAME", help="of the format prompt-response (default: prompt)")
    group.add_argument("--response-column", metavar="NAME", help="of the format prompt-response (default: response)")
    group.add_argument("--loss-turns", choices=["all", "last"], help="which answers the loss counts (default: all)")


def options(args: argparse.Namespace) -> InstructionOptions | None:
    """What was asked for; None where the sources are plain text.

    Errors: ValueError for a missing template, and for options of another format or without one.
    """
    given = {name: value for name in _OPTIONS if (value := getattr(args, name)) is not None}
    if args.instruction is None:
        if given:
            raise ValueError(f"--{next(iter(given)).replace('_', '-')} is for conversations: --instruction FORMAT")
        return None
    if args.chat_template is None:
        raise ValueError("--instruction needs --chat-template: qwen3, llama3 or plain")
    for name in given:
        if _FORMAT_OF.get(name, args.instruction) != args.instruction:
            raise ValueError(f"--{name.replace('_', '-')} is for --instruction {_FORMAT_OF[name]}")
    from moe_train.data.instruction import InstructionOptions

    return InstructionOptions(args.instruction, **given)
