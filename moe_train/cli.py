"""``moe-train <command>``: a table from name to module. A command's module is imported only when it is called."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from moe_train import __version__


@dataclass(frozen=True)
class Command:
    summary: str
    example: str


COMMANDS = {
    "train": Command("train a model", "moe-train train demo train.steps=200 --processes 2"),
    "evaluate": Command("loss, perplexity and balance of a run on held-out text", "moe-train evaluate runs/demo"),
    "generate": Command("continue prompts with a trained model", "moe-train generate runs/demo --prompt 'def main('"),
    "report": Command("write a run's report as one HTML file", "moe-train report runs/demo"),
    "compare": Command("one table of several runs, over seeds", "moe-train compare lpr_table_small"),
    "prepare": Command(
        "text to indexed tokens", "moe-train prepare books.parquet --output data/books --tokenizer m.model"
    ),
    "tokenizer": Command(
        "train or inspect a tokenizer", "moe-train tokenizer train data/text --output m.model --vocab-size 8192"
    ),
    "convert": Command("models of Hugging Face's hub to ours, and back", "moe-train convert import HF_DIR models/mine"),
    "inspect": Command("look into prepared data, a checkpoint or a run", "moe-train inspect data/demo/train"),
    "plan": Command(
        "layouts for a number of GPUs: memory, bytes sent, time", "moe-train plan demo --gpus 8 --memory 80"
    ),
    "live": Command("whether a run's workers on this machine are alive", "moe-train live runs/demo --max-age 60"),
    "doctor": Command("what is installed, whether it works, what to do about the rest", "moe-train doctor"),
}

INTERRUPTED, TERMINATED = 130, 143


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0 done, 1 failed, 2 wrong input, 130 interrupted, 143
    terminated."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or bool(os.environ.get("MOE_TRAIN_DEBUG"))
    try:
        return _dispatch([argument for argument in arguments if argument != "--debug"])
    except KeyboardInterrupt as stop:
        if debug:
            raise
        from moe_train.commands.stopping import Terminated

        terminated = isinstance(stop, Terminated)
        print(f"moe-train: {'terminated' if terminated else 'interrupted'}{stop}", file=sys.stderr)
        return TERMINATED if terminated else INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe (head, less) has gone; say nothing more, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        if debug:
            raise
        print(f"moe-train: error: {error}", file=sys.stderr)
        return 2


def _dispatch(arguments: list[str]) -> int:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if name in ("-V", "--version"):
        print(f"moe-train {__version__}")
        return 0
    if name not in COMMANDS:
        raise ValueError(_unknown(name))
    command = COMMANDS[name]
    module = importlib.import_module(f"moe_train.commands.{name}")
    parser = argparse.ArgumentParser(
        prog=f"moe-train {name}",
        description=module.__doc__,
        epilog=f"example:\n  {command.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.register(parser)
    # Overrides may stand between options; argparse allows that only for parsers without sub-commands.
    parse = parser.parse_intermixed_args if getattr(module, "INTERMIXED", False) else parser.parse_args
    return module.run(parse(arguments[1:]))


def help_text() -> str:
    """What ``moe-train --help`` prints."""
    lines = ["usage: moe-train <command> [--debug] ...", "", "Train Mixture-of-Experts language models.", ""]
    for name, command in COMMANDS.items():
        lines += [f"  {name:<10} {command.summary}", f"  {'':<10}   {command.example}"]
    lines += [
        "",
        "moe-train <command> --help says more. --debug shows the traceback of an error. --version prints the version.",
    ]
    return "\n".join(lines)


def _unknown(name: str) -> str:
    from moe_train.config.errors import listing, nearest

    guess = nearest(name, COMMANDS)
    hint = f"did you mean {guess}? " if guess else ""
    return f"unknown command {name!r}; {hint}commands: {listing(COMMANDS)}"


if __name__ == "__main__":
    raise SystemExit(main())
