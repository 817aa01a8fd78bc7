"""The table that ``moe-train evaluate`` prints."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TextIO

COLUMNS = {
    "gini": "Gini",
    "gini_floor": "floor",
    "min_max": "min-max",
    "cv": "CV",
    "entropy": "entropy",
    "max_violation": "max violation",
    "dead_experts": "dead",
    "drop_rate": "dropped",
    "mean_k": "mean k",
    "router_entropy": "router entropy",
    "router_margin": "margin",
    "domain_nmi": "domain NMI",
}


def print_table(evaluation: Mapping[str, Any], file: TextIO | None = None) -> None:
    """Loss, perplexity, bits per byte and the balance of each layer; plain text when the output is no terminal.

    ``evaluation`` is the JSON object of docs/evaluation.md.
    """
    stream = file or sys.stdout
    if stream.isatty():
        _print_rich(evaluation, stream)
    else:
        print(plain_table(evaluation), file=stream, flush=True)


def plain_table(evaluation: Mapping[str, Any]) -> str:
    """The table as text, without colour or box characters."""
    lines = [f"{name:<24} {value}" for name, value in summary_rows(evaluation)]
    header, *rows = balance_rows(evaluation)
    if not rows:
        return "\n".join(lines)
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines.append("")
    for row in (header, *rows):
        lines.append("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return "\n".join(lines)


def summary_rows(evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and value of what describes the whole evaluation; what is not known is left out."""
    rows: list[tuple[str, str]] = []
    if evaluation.get("data"):
        rows.append(("data", str(evaluation["data"])))
    if evaluation.get("step") is not None:
        rows.append(("step", f"{evaluation['step']:,}"))
    rows.append(("tokens", f"{evaluation['tokens']:,}"))
    rows.append(("loss (nats per token)", number(evaluation["loss"])))
    rows.append(("perplexity", number(evaluation.get("perplexity"))))
    if evaluation.get("documents"):
        documents = evaluation["documents"]
        cut = f"{documents['truncated']:,} cut at {documents['max_length']:,} tokens"
        rows.append(("documents", f"{documents['documents']:,}, {cut}"))
        rows.append((f"mean of batches of {documents['batch_documents']}", number(documents["loss_batch_average"])))
    if evaluation.get("bits_per_byte") is not None:
        rows.append(("bits per byte", number(evaluation["bits_per_byte"])))
    entropy = evaluation.get("unigram_entropy")
    if entropy is not None and evaluation["loss"] is not None:
        sample = evaluation.get("unigram_sample")
        remark = f", estimated from {sample:,} tokens" if sample else ""
        rows.append(("unigram entropy", number(entropy) + remark))
        rows.append(("nats below unigram", number(entropy - evaluation["loss"])))
    return rows


def balance_rows(evaluation: Mapping[str, Any]) -> list[list[str]]:
    """Header, one row per MoE layer, and the mean; only columns that the evaluation has."""
    layers = evaluation.get("layers", [])
    mean = evaluation.get("mean", {})
    columns = [key for key in COLUMNS if any(key in row for row in (*layers, mean))]
    rows = [["layer", *(COLUMNS[key] for key in columns)]]
    for index, layer in enumerate(layers):
        rows.append([str(layer.get("layer", index)), *(_cell(key, layer.get(key)) for key in columns)])
    if mean:
        rows.append(["mean", *(_cell(key, mean.get(key)) for key in columns)])
    return rows


def number(value: float | int | None) -> str:
    """Counts (int) whole, others with four digits after the point; a dash for what does not exist."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4f}" if value == 0 or abs(value) >= 1e-4 else f"{value:.2e}"


def _cell(key: str, value: float | int | None) -> str:
    """Experts are counted, and averages over layers of such counts need one digit."""
    return f"{value:.1f}" if key == "dead_experts" and value is not None else number(value)


def _print_rich(evaluation: Mapping[str, Any], stream: TextIO) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(file=stream)
    summary = Table(show_header=False, box=None, pad_edge=False)
    for name, value in summary_rows(evaluation):
        summary.add_row(escape(name), f"[bold]{escape(value)}[/]")
    console.print(summary)
    header, *rows = balance_rows(evaluation)
    if not rows:
        return
    balance = Table(title="expert load per layer", title_justify="left")
    for column in header:
        balance.add_column(escape(column), justify="right")
    for row in rows:
        balance.add_row(*map(escape, row), style="bold" if row[0] == "mean" else None)
    console.print(balance)
