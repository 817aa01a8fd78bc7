"""Writes the tables of a comparison into its folder: table.json, table.md, report.html, figures/*.svg."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_train.data.files import write_atomically
from moe_train.evaluation.run_files import read_run
from moe_train.lab.experiment import Experiment
from moe_train.lab.markdown import markdown
from moe_train.lab.page import Records, curve_figures, page
from moe_train.lab.plan import PlannedRun
from moe_train.lab.results import is_finished
from moe_train.lab.table import build_table, read_results

JSON, MARKDOWN, PAGE, FIGURES = "table.json", "table.md", "report.html", "figures"


def write_tables(
    experiment: Experiment, runs: Sequence[PlannedRun], out: Path, facts: Mapping[str, Any], *, figures: bool = True
) -> dict[str, Any]:
    """Of the runs that are finished; returns the JSON object. ``figures``: also the page and the curves, which take
    seconds."""
    table = build_table(experiment, read_results(runs), planned=len(runs), facts=facts)
    out.mkdir(parents=True, exist_ok=True)
    curves = curve_figures(table, training_records(runs)) if figures else {}
    paths = {title: f"{FIGURES}/{_file_name(title)}.svg" for title in curves}
    if figures:
        (out / FIGURES).mkdir(exist_ok=True)
        for title, image in curves.items():
            write_atomically(out / paths[title], image)
        write_atomically(out / PAGE, page(table, curves).encode())
    write_atomically(out / JSON, (json.dumps(table, indent=1, ensure_ascii=False) + "\n").encode())
    write_atomically(out / MARKDOWN, markdown(table, list(paths.items())).encode())
    return table


def training_records(runs: Sequence[PlannedRun]) -> Records:
    """Of the finished runs of each arm."""
    found: dict[str, list[list[dict[str, Any]]]] = {run.arm: [] for run in runs}
    for run in runs:
        if is_finished(run):
            found[run.arm].append(read_run(run.folder).train)
    return found


def _file_name(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_")
