"""The demonstration that ``make demo`` runs: text to report, each step a command that one can run by hand.

Steps that are finished are skipped, so a second call prints the same table in seconds; --fresh starts a new run folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from moe_train.lab import demo_data
from moe_train.launch.devices import accelerator_count

RUNS = Path("runs")
PROCESSES = 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fresh", action="store_true", help="train again, into a new run folder")
    arguments = parser.parse_args()
    run = choose_run(arguments.fresh)
    if accelerator_count(os.environ) < PROCESSES:
        # Too few for one each; on a machine with a single one both processes compute on the processor.
        os.environ["DS_ACCELERATOR"] = "cpu"
    steps = [
        *demo_data.steps(),
        (
            "training",
            run / FINISHED,
            ["train", "demo", "--processes", str(PROCESSES), "--run-dir", str(run), "--resume", "auto"],
        ),
        ("evaluation", run / "evaluation" / "validation.json", ["evaluate", str(run), "--processes", str(PROCESSES)]),
        ("report", run / "report.html", ["report", str(run)]),
    ]
    for name, result, command in steps:
        if result.exists():
            print(f"demo: {name} is there already: {result}", flush=True)
            continue
        start = time.monotonic()
        print(f"demo: {name}: moe-train {shlex.join(command)}", flush=True)
        # The table that the evaluation prints comes last of all.
        code = call([sys.executable, "-m", "moe_train", *command], quiet=name == "evaluation")
        if code:
            print(f"demo: {name} failed with exit code {code}; `moe-train doctor` may say why", file=sys.stderr)
            return code
        if name == "training":
            (run / FINISHED).write_text("")
        print(f"demo: {name} took {time.monotonic() - start:.0f} s", flush=True)
    show(run)
    return 0


def call(command: list[str], quiet: bool) -> int:
    """Runs a command and waits for it, also after Ctrl-C or SIGTERM, which the training answers by saving."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL if quiet else None)
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue
    finally:
        signal.signal(signal.SIGTERM, before)


FINISHED = ".demo_finished"
"""Marks a run that the demonstration trained to its end; a run without it is gone on with."""


def choose_run(fresh: bool) -> Path:
    """runs/demo, runs/demo-2, ...: the newest, or with ``fresh`` the first that is free."""
    number, newest = 1, RUNS / "demo"
    while (candidate := RUNS / ("demo" if number == 1 else f"demo-{number}")).exists():
        number, newest = number + 1, candidate
    return candidate if fresh else newest


def show(run: Path) -> None:
    from moe_train.evaluation.table import print_table

    print()
    print_table(json.loads((run / "evaluation" / "validation.json").read_text(encoding="utf-8")))
    print(f"\nrun folder: {run}\nreport:     {(run / 'report.html').resolve()}")


if __name__ == "__main__":
    raise SystemExit(main())
