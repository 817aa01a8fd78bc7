"""The results as tables on the console."""

from __future__ import annotations

from typing import Any

from arms import BASELINE
from rich.console import Console
from rich.table import Table


def print_comparison(balance: str, result: dict[str, Any]) -> None:
    """One row per arm."""
    table = Table(title=f"training step, balance {balance}")
    table.add_column("arm")
    headings = ("ms/step", "quartiles", "CPU ms", "tokens/s", "MFU", "of matmul", f"speed / {BASELINE}", "peak MB")
    for heading in headings:
        table.add_column(heading, justify="right")
    for name, row in result["arms"].items():
        seconds, ratio = row["seconds"], row.get(f"speed_against_{BASELINE}")
        against = "-"
        if ratio:
            r = ratio["wall"]
            against = f"{r['median']:.2f} ({r['quartile_1']:.2f}-{r['quartile_3']:.2f})"
        table.add_row(
            name,
            f"{1e3 * seconds['median']:.1f}",
            f"{1e3 * seconds['quartile_1']:.1f}-{1e3 * seconds['quartile_3']:.1f}",
            f"{1e3 * row['cpu_seconds']['median']:.1f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['mfu']:.1%}" if row["mfu"] is not None else "-",
            f"{row['share_of_matmul']:.1%}",
            against,
            f"{row['memory']['peak'] / 2**20:,.0f}" if "memory" in row else "-",
        )
    _console().print(table)


def print_breakdown(balance: str, result: dict[str, Any]) -> None:
    """Milliseconds and share per part."""
    table = Table(title=f"parts of the step, balance {balance}")
    table.add_column("part")
    for arm in result:
        table.add_column(f"{arm}: ms", justify="right")
        table.add_column("share", justify="right")
    for part in next(iter(result.values()), {}):
        cells = (f"{1e3 * row[part]['seconds']:.1f} {row[part]['share']:.1%}".split() for row in result.values())
        table.add_row(part, *(cell for pair in cells for cell in pair))
    _console().print(table)


def _console() -> Console:
    console = Console()
    # A file or a pipe gets whole lines.
    return console if console.is_terminal else Console(width=140)
