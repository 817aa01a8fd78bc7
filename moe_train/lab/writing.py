"""Writes the tables of a comparison into its folder: table.json, table.md, report.html, figures/*.svg."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_train.data.files import write_atomically
from moe_train.evaluation.run_files import read_run
from moe_train.lab.curves import points
from moe_train.lab.experiment import Experiment
from moe_train.lab.markdown import markdown
from moe_train.lab.page import Records, curve_bands, curve_figures, load_figures, page
from moe_train.lab.plan import PlannedRun
from moe_train.lab.results import is_finished
from moe_train.lab.table import build_table, read_results

JSON, MARKDOWN, PAGE, FIGURES = "table.json", "table.md", "report.html", "figures"


def write_tables(
    experiment: Experiment, runs: Sequence[PlannedRun], out: Path, facts: Mapping[str, Any], *, figures: bool = True
) -> dict[str, Any]:
    """Of the runs that are finished; returns the JSON object. ``figures``: also the page and the curves, which take
    seconds."""
    results = read_results(runs)
    curves = curve_bands({run.arm: experiment.label(run.arm) for run in runs}, training_records(runs))
    points_of = {key: {arm: points(line) for arm, line in lines.items()} for key, lines in curves.items()}
    table = build_table(experiment, results, planned=len(runs), facts=facts, curves=points_of)
    out.mkdir(parents=True, exist_ok=True)
    images: dict[str, bytes] = {}
    if figures:
        drawn = curve_figures(curves)
        write_atomically(out / PAGE, page(table, drawn).encode())
        images = drawn | load_figures(table)
        (out / FIGURES).mkdir(exist_ok=True)
    paths = {title: f"{FIGURES}/{_file_name(title)}.svg" for title in images}
    for title, image in images.items():
        write_atomically(out / paths[title], image)
    write_atomically(out / JSON, (_json(table) + "\n").encode())
    write_atomically(out / MARKDOWN, markdown(table, list(paths.items())).encode())
    return table


def training_records(runs: Sequence[PlannedRun]) -> Records:
    """Of the finished runs of each arm."""
    found: dict[str, list[list[dict[str, Any]]]] = {run.arm: [] for run in runs}
    for run in runs:
        if is_finished(run):
            found[run.arm].append(read_run(run.folder).train)
    return found


def _json(table: Mapping[str, Any]) -> str:
    """Indented, but rows of numbers on one line each. No text has a line break in JSON."""
    text = json.dumps(table, indent=1, ensure_ascii=False)
    return re.sub(
        r"\[\n[-+\d.eE,\s]+\]", lambda row: re.sub(r"\s+", " ", row[0]).replace("[ ", "[").replace(" ]", "]"), text
    )


def _file_name(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_")
