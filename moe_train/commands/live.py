"""Whether a run's workers on this machine are alive, by the age of their heartbeats; for health checks of containers.

Exit code 0 if all are, 1 if one is not or none has started. Workers beat also while they wait for others: ranks that
hang are the business of train --hang-timeout.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def register(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument(
        "--max-age",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="of a heartbeat, one a second (default 60)",
    )


def run(arguments: argparse.Namespace) -> int:
    from moe_train.launch.live import sign_of_life

    if not arguments.max_age > 0:
        raise ValueError(f"--max-age must be a positive number of seconds, got {arguments.max_age:g}")
    try:
        print(sign_of_life(arguments.run, arguments.max_age))
    except ValueError as error:
        print(f"moe-train: {error}", file=sys.stderr)
        return 1
    return 0
