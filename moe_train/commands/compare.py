"""Train the arms of an experiment over its seeds, one after another, and put them into one table.

EXPERIMENT is a YAML file (docs/compare.md) or the name of a shipped comparison. Everything is checked before the first
run starts. Ctrl-C saves and ends; the same command goes on where it stopped and repeats nothing that is finished.
Results: table.md, table.json and report.html in the folder of the comparison, a run folder for each arm and seed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from pathlib import Path

from moe_train.commands.evaluate import positive
from moe_train.commands.stopping import Terminated, can_be_stopped

INTERMIXED = True
"""Overrides may stand between options."""
_EXAMPLE = """examples:
  moe-train compare lpr_table_small --dry-run     arms, parameters, FLOPs, tokens
  moe-train compare lpr_table_small               runs them; makes the demonstration's data where they are missing
  moe-train compare lpr_table_small --seeds 1,2,3
  moe-train compare gates_small --only lpr --only dense_twin --steps 1000 --out runs/compare/gates_1000
  moe-train compare my_table.yaml data.train=data/mine/train data.validation=data/mine/validation --processes 8"""
_ADVICE = "; what is saved stays, and the same command goes on"


def register(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EXAMPLE
    parser.add_argument("experiment", metavar="EXPERIMENT", help="path of a YAML file, or name of a shipped comparison")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="for every arm, such as optimizer.lr=1e-3")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/compare/<name>")
    parser.add_argument("--only", action="append", default=[], metavar="ARM", help="only this arm; can be repeated")
    parser.add_argument("--seeds", type=_seeds, default=[], metavar="1,2,3", help="in place of the experiment's seeds")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive, metavar="N", help="N steps in place of the experiment's budget")
    length.add_argument("--tokens", type=positive, metavar="N", help="N tokens in place of the experiment's budget")
    parser.add_argument(
        "--processes",
        type=positive,
        metavar="N",
        help="worker processes (default: one per accelerator; without any, what the layout needs)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print arms, parameters, FLOPs, steps and tokens; start nothing"
    )


def run(arguments: argparse.Namespace) -> int:
    from moe_train.lab.compare import Request, compare, prepare
    from moe_train.lab.overview import overview
    from moe_train.lab.runner import LaunchRunner
    from moe_train.launch.devices import accelerator_count

    accelerators = accelerator_count(os.environ)
    wanted = Request(
        experiment=arguments.experiment,
        overrides=arguments.overrides,
        out=arguments.out,
        only=arguments.only,
        seeds=arguments.seeds,
        steps=arguments.steps,
        tokens=arguments.tokens,
        processes=arguments.processes,
    )
    comparison = prepare(wanted, accelerators)
    if arguments.dry_run:
        print(overview(comparison.title, comparison.experiment, comparison.chosen))
        return 0
    runner = LaunchRunner(comparison.processes, accelerators)
    with can_be_stopped(_ADVICE):
        code = compare(comparison, runner, command_line(), say)
        if code == 128 + signal.SIGINT:
            raise KeyboardInterrupt
        if code == 128 + signal.SIGTERM:
            raise Terminated
    return code


def command_line() -> str:
    """This command as it would be typed, with the values of what looks like a credential hidden."""
    from moe_train.training.environment import without_secrets

    return shlex.join(["moe-train", *without_secrets(sys.argv[1:])])


def say(text: str) -> None:
    print(f"moe-train: {text}", file=sys.stderr, flush=True)


def _seeds(text: str) -> list[int]:
    if not all(part.isascii() and part.isdigit() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of seeds such as 1,2,3")
    return [int(part) for part in text.split(",")]
