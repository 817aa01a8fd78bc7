"""One line per interval, and a progress bar when the output is a terminal."""

from __future__ import annotations

import math
import sys
from typing import Any, TextIO

from moe_train.training.callbacks.base import Callback, Record, RunInfo, Status


class Console(Callback):
    """Plain lines in a log; on a terminal the same lines above a progress bar."""

    def __init__(self, stream: TextIO | None = None, goes_on: bool = False) -> None:
        self.stream = stream or sys.stdout
        self.goes_on = goes_on
        """Where nothing can be printed, as into a log on a full disk: metrics.jsonl has it."""
        self._run: RunInfo | None = None
        self._progress: Any = None
        self._task: Any = None

    def on_start(self, run: RunInfo) -> None:
        self._run = run
        if self.stream.isatty():
            self._start_bar(run)
        if run.start_step:
            self._print(f"resuming {run.name} after step {run.start_step} of {run.total_steps}")

    def on_record(self, record: Record) -> None:
        assert self._run is not None, "on_start comes first"
        self._print(console_line(record, self._run))
        if self._progress is not None and record["kind"] == "train":
            self._progress.update(self._task, completed=record["step"], loss=f"loss {record['loss']:.4f}")

    def on_end(self, status: Status) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._run is not None:
            self._print(f"run {self._run.name} {status}")

    def _start_bar(self, run: RunInfo) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}", markup=False),
            TimeElapsedColumn(),
            console=RichConsole(file=self.stream),
        )
        self._task = self._progress.add_task(run.name, total=run.total_steps, completed=run.start_step, loss="")
        self._progress.start()

    def _print(self, line: str) -> None:
        try:
            if self._progress is not None:
                self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
            else:
                print(line, file=self.stream, flush=True)
        except OSError:
            if not self.goes_on:
                raise


def console_line(record: Record, run: RunInfo) -> str:
    """The line for one record. ETA = remaining steps times the seconds per step of this interval."""
    if record["kind"] == "alarm":
        fields = ["ALARM" if record["state"] == "began" else "alarm", record["line"]]
    elif record["kind"] == "checkpoint":
        fields = _checkpoint_fields(record)
    elif record["kind"] == "guard":
        fields = [
            f"BAD NUMBERS, {record['action'].replace('_', ' ')}",
            f"step {record['bad_step']}: {record['message']}",
        ]
    else:
        fields = _train_fields(record, run) if record["kind"] == "train" else _eval_fields(record)
    width = len(str(run.total_steps))
    return " | ".join([f"step {record['step']:>{width}}/{run.total_steps}", *fields])


def _train_fields(record: Record, run: RunInfo) -> list[str]:
    fields = [
        f"tokens {short_number(record['tokens'])}",
        f"{record['tokens_per_second']:,.0f} tokens/s",
        f"{record['step_seconds'] * 1000:,.0f} ms/step",
    ]
    if "mfu" in record:
        fields.append(f"MFU {record['mfu'] * 100:.1f}%")
    fields += [f"lr {record['lr']:.2e}", f"loss {record['loss']:.4f}"]
    fields += [f"{key.removeprefix('aux/')} {record[key]:.4g}" for key in record if key.startswith("aux/")]
    fields.append(f"grad norm {record['grad_norm']:.3f}")
    if "balance/gini" in record:
        fields.append(f"gini {record['balance/gini']:.3f}")
    fields.append(f"memory {record['memory_bytes'] / 2**30:.2f} GiB")
    fields.append(f"ETA {duration((run.total_steps - record['step']) * record['step_seconds'])}")
    return fields


def _eval_fields(record: Record) -> list[str]:
    names = {"eval/loss": "validation loss", "eval/perplexity": "perplexity", "eval/bits_per_byte": "bits/byte"}
    fields = [f"{name} {record[key]:.4f}" for key, name in names.items() if record.get(key) is not None]
    balance = record.get("balance", {})
    return fields + [f"{key} {balance[key]:.3f}" for key in ("gini", "min_max") if balance.get(key) is not None]


def _checkpoint_fields(record: Record) -> list[str]:
    if "error" in record:
        return ["WARNING", record["error"]]
    waited = f"training waited {record['stall_seconds']:.2f} s"
    return [f"checkpoint {record['name']}", f"{waited}, in place after {record['seconds']:.2f} s"]


def short_number(value: float) -> str:
    """Three digits and a unit: 950, 1.23K, 4.5M, 1.2B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}" if abs(value) < 999.5 * size else f"{value / size:.0f}{unit}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """h:mm:ss, with days in front when there are any."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hours}:{minutes:02d}:{rest:02d}"
