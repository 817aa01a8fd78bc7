"""Write one self-contained HTML file about a run."""

from __future__ import annotations

import argparse
from pathlib import Path


def register(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, for example runs/demo")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write (default: RUN/report.html)")


def run(arguments: argparse.Namespace) -> int:
    from moe_train.evaluation.report import write_report

    print(f"report: {write_report(arguments.run, arguments.output)}")
    return 0
