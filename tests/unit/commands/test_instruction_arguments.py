from __future__ import annotations

import argparse

import pytest

from moe_train.commands import instruction
from moe_train.data.instruction import InstructionOptions
from moe_train.data.instruction.formats import FORMATS
from moe_train.data.instruction.templates import TEMPLATES


def parse(*arguments: str) -> InstructionOptions | None:
    parser = argparse.ArgumentParser()
    instruction.register(parser)
    return instruction.options(parser.parse_args(arguments))


def test_options() -> None:
    assert parse() is None
    assert parse("--instruction", "messages", "--chat-template", "qwen3") == InstructionOptions("messages", "qwen3")
    names = ("--prompt-column", "q", "--response-column", "a", "--loss-turns", "last")
    assert parse("--instruction", "prompt-response", "--chat-template", "plain", *names) == InstructionOptions(
        "prompt-response", "plain", prompt_column="q", response_column="a", loss_turns="last"
    )


def test_options_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="--instruction needs --chat-template"):
        parse("--instruction", "messages")
    with pytest.raises(ValueError, match="--loss-turns is for conversations"):
        parse("--loss-turns", "all")
    with pytest.raises(ValueError, match="--prompt-column is for --instruction prompt-response"):
        parse("--instruction", "messages", "--chat-template", "plain", "--prompt-column", "q")


def test_help_names_all_formats_and_templates() -> None:
    parser = argparse.ArgumentParser()
    instruction.register(parser)
    text = " ".join(parser.format_help().split()).replace("- ", "-")
    assert all(name in text for name in (*FORMATS, *TEMPLATES))
