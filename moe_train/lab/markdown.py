"""The tables as rows of text, and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_train.lab.table import COLUMNS, PUBLISHED, Column

DASH = "-"
DIFFERENCES = ("loss", "gini", "flops_per_token")
EXPLANATION = (
    "Mean over seeds with the 95 % percentile bootstrap interval of the mean. Test loss in nats per token, without "
    "auxiliary terms. Balance statistics from exact counts over the evaluated tokens before capacity, averaged over "
    "the layers (docs/metrics.md). Dropped in training: the share of slots that capacity took away, mean over the "
    "layers and, by tokens, over the whole training; an evaluation has no capacity unless it is given one. Active "
    "parameters and FLOPs (forward and backward) count experts by the measured mean k. tokens/s: training, without the "
    "first interval after each start."
)
PUBLISHED_TITLE = "As the paper on latent prototype routing meters it"
PUBLISHED_NOTE = (
    "To be compared with tables of arXiv 2506.21328 only. Batch average: documents in batches, the mean over the "
    "target tokens of each, averaged. Gini and min-max of its moving average (0.99) over micro-batches, mean over the "
    "layers; that code counts padding. Here both are of the evaluation, there the balance is of the training "
    "(docs/evaluation.md)."
)

BAND_NOTE = "Mean over seeds; the band reaches from the lowest to the highest."
LOADS = "Expert load"
LOAD_NOTE = (
    "Layers by experts, exact counts over the evaluated tokens, relative to an even share: white is even, orange more, "
    "blue less, dark grey nothing. One seed of each arm: experts of different seeds have nothing in common."
)


def main_rows(table: Mapping[str, Any]) -> list[list[str]]:
    """Header and one row for each arm. The evaluation's drops only where there are any: it has its own capacity; the
    training's mean k only where it is another one somewhere."""
    columns = dict(COLUMNS)
    if not any(_mean(arm, "evaluation_drop_rate") for arm in table["arms"]):
        del columns["evaluation_drop_rate"]
    if not any(_differ(_mean(arm, "training_mean_k"), _mean(arm, "mean_k")) for arm in table["arms"]):
        del columns["training_mean_k"]
    rows = [["arm", "seeds", "active parameters", *(column.title for column in columns.values())]]
    for arm in table["arms"]:
        active = f"{arm['active_parameters']:,}" if arm["active_parameters"] else DASH
        cells = [cell(column, arm["metrics"][name]) for name, column in columns.items()]
        rows.append([arm["label"], str(len(arm["seeds"])), active, *cells])
    return rows


def _mean(arm: Mapping[str, Any], name: str) -> float | None:
    return (arm["metrics"][name] or {}).get("mean")


def _differ(a: float | None, b: float | None) -> bool:
    return a is not None and b is not None and abs(a - b) >= 0.0005


def published_rows(table: Mapping[str, Any]) -> list[list[str]]:
    """Header and one row for each arm, of the columns that some arm has; nothing where no arm is a latent prototype
    gate, whose tables these are to be compared with."""
    arms = table["arms"]
    columns = {name: column for name, column in PUBLISHED.items() if any(arm["metrics"][name] for arm in arms)}
    if not columns or not any(arm["gate"] == "lpr" for arm in arms):
        return []
    rows = [["arm", *(column.title for column in columns.values())]]
    return rows + [
        [arm["label"], *(cell(column, arm["metrics"][name]) for name, column in columns.items())] for arm in arms
    ]


def difference_rows(table: Mapping[str, Any]) -> list[list[str]]:
    """Header and one row for each arm but the baseline; nothing else where there is none."""
    rows = [["arm", "pairs", *(f"Δ {COLUMNS[name].title}" for name in DIFFERENCES)]]
    for arm in table["arms"]:
        found = arm["difference_to_baseline"]
        if found and found["loss"]:
            cells = [cell(COLUMNS[name], found[name], signed=True) for name in DIFFERENCES]
            rows.append([arm["label"], str(len(found["loss"]["values"])), *cells])
    return rows


def cell(column: Column, value: Mapping[str, Any] | None, signed: bool = False) -> str:
    """``3.6830 (3.6712, 3.6921)``; a dash for the interval of one seed, and for what is not known at all; no interval
    where all seeds have the same value."""
    if value is None:
        return DASH
    mean = _number(column, value["mean"], signed)
    if value["low"] is None:
        return f"{mean} ({DASH})"
    ends = [_number(column, value[end], signed) for end in ("low", "high")]
    return mean if ends == [mean, mean] else f"{mean} ({ends[0]}, {ends[1]})"


def _number(column: Column, value: float, signed: bool) -> str:
    value *= column.scale
    sign = "+" if signed else ""
    if value and abs(value) < 0.5 * 10.0**-column.digits:
        return f"{value:{sign}.1e}"  # A min-max of 1e-6 is something else than none at all.
    return f"{value:{sign},.{column.digits}f}"


def baseline_label(table: Mapping[str, Any]) -> str:
    return next(str(arm["label"]) for arm in table["arms"] if arm["name"] == table["baseline"])


def markdown(table: Mapping[str, Any], figures: Sequence[tuple[str, str]] = ()) -> str:
    """``figures``: title and path of each image, relative to the file."""
    lines = [f"# {table['title']}", ""]
    lines += [f"{made_with(table)}", "", f"```\n{table['command']}\n```", ""]
    lines += [*_table(main_rows(table)), "", EXPLANATION, ""]
    lines += [f"- {note}" for note in table["notes"]]
    rows = difference_rows(table)
    if len(rows) > 1:
        lines += ["", f"Difference to {baseline_label(table)}, seed by seed:", "", *_table(rows)]
    if rows := published_rows(table):
        lines += ["", f"{PUBLISHED_TITLE}:", "", *_table(rows), "", PUBLISHED_NOTE]
    for title, path in figures:
        lines += ["", f"{title}. {LOAD_NOTE if title == LOADS else BAND_NOTE}", "", f"![{title}]({path})"]
    return "\n".join(lines).rstrip() + "\n"


def made_with(table: Mapping[str, Any]) -> str:
    """Date, commit and machine in one line."""
    whole = table["finished_runs"] == table["planned_runs"]
    runs = f"{table['finished_runs']} runs" if whole else f"{table['finished_runs']} of {table['planned_runs']} runs"
    parts = [runs, table.get("date"), _commits(table), table.get("device")]
    if table.get("python"):
        parts.append(f"Python {table['python']}")
    return ", ".join(str(part) for part in parts if part)


def _commits(table: Mapping[str, Any]) -> str:
    """That of the runs, and that of the table where it is another one."""
    of_runs, of_table = [_short(commit) for commit in table["run_commits"]], table.get("commit")
    if not of_table or of_runs in ([], [_short(of_table)]):
        return f"commit {_short(of_table)}" if of_table else ""
    return f"commit {' and '.join(of_runs)} (this table: {_short(of_table)})"


def _short(commit: str) -> str:
    name, plus, changes = commit.partition("+")
    return name[:12] + plus + changes


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    header, *body = rows
    lines = [_line(header), "|" + "|".join(["---", *("---:" for _ in header[1:])]) + "|"]
    return lines + [_line(row) for row in body]


def _line(row: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in row) + " |"
