"""A comparison as one self-contained HTML file, and the figures that the Markdown shows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moe_train.evaluation import html
from moe_train.evaluation.heatmaps import load_matrices, load_matrix
from moe_train.evaluation.run_files import Record
from moe_train.lab.curves import Band, band_curves, bands
from moe_train.lab.markdown import (
    BAND_NOTE,
    EXPLANATION,
    LOAD_NOTE,
    LOADS,
    PUBLISHED_NOTE,
    PUBLISHED_TITLE,
    baseline_label,
    difference_rows,
    made_with,
    main_rows,
    published_rows,
)

Records = Mapping[str, Sequence[Sequence[Record]]]
"""Arm -> the training records of each of its seeds."""
Curves = Mapping[str, Mapping[str, Band]]
"""Key of the records -> arm -> its curve."""
CURVES = {
    "loss": ("Training loss against tokens", "nats per token", False),
    "balance/gini": ("Gini of expert load against tokens", "Gini, mean over layers (0 is even)", True),
}


def curve_bands(labels: Mapping[str, str], records: Records) -> Curves:
    """Of every curve that there is something to show of."""
    found = {key: bands(labels, records, key) for key in CURVES}
    return {key: lines for key, lines in found.items() if lines}


def curve_figures(curves: Curves) -> dict[str, bytes]:
    """Title -> SVG."""
    found = {}
    for key, lines in curves.items():
        title, y_label, from_zero = CURVES[key]
        found[title] = band_curves(list(lines.values()), y_label, from_zero=from_zero)
    return found


def load_figures(table: Mapping[str, Any]) -> dict[str, bytes]:
    """Title -> SVG of one figure with the expert load of all arms; nothing where none has experts."""
    loads = [(f"{arm['label']}, seed {seed}", load_LE, arm["layers"]) for arm, seed, load_LE in _loads(table)]
    return {LOADS: load_matrices(loads)} if loads else {}


def page(table: Mapping[str, Any], curves: Mapping[str, bytes]) -> str:
    """The whole document. ``curves``: those of `curve_figures`."""
    header, *rows = main_rows(table)
    published = published_rows(table)
    parts = [
        html.section("Results", _table(header, rows), *map(html.paragraph, table["notes"]), note=EXPLANATION),
        _differences(table),
        html.section(PUBLISHED_TITLE, _table(published[0], published[1:]), note=PUBLISHED_NOTE) if published else "",
        *(html.section(title, html.svg(image, title), note=BAND_NOTE) for title, image in curves.items()),
        _load_section(table),
        html.section(
            "How it was made",
            html.facts([("command", table["command"]), ("runs", made_with(table))]),
            html.collapsed("What each arm changes", _changes(table)),
        ),
    ]
    return html.page(table["title"], made_with(table), [part for part in parts if part], table.get("version") or "")


def _differences(table: Mapping[str, Any]) -> str:
    header, *rows = difference_rows(table)
    if not rows:
        return ""
    note = "Seed by seed, so that what the seeds have in common drops out; the interval is over the pairs."
    return html.section(f"Difference to {baseline_label(table)}", _table(header, rows), note=note)


def _loads(table: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], str, list[list[int]]]]:
    """Each arm with experts, its first seed and the load of that."""
    for arm in table["arms"]:
        if arm["load"] and arm["layers"]:
            seed, load_LE = next(iter(arm["load"].items()))
            yield arm, seed, load_LE


def _load_section(table: Mapping[str, Any]) -> str:
    parts = []
    for arm, seed, load_LE in _loads(table):
        parts.append(html.paragraph(f"{arm['label']}, seed {seed}"))
        parts.append(html.svg(load_matrix(load_LE, arm["layers"]), f"expert load per layer of {arm['label']}"))
    return html.section(LOADS, *parts, note=LOAD_NOTE) if parts else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Where a cell has not room enough it breaks before an interval, not inside of it, and not before a dash."""
    space = "\N{NO-BREAK SPACE}"
    kept = [[text.replace(", ", f",{space}").replace(" (-)", f"{space}(-)") for text in row[1:]] for row in rows]
    return html.table(header, [[row[0], *cells] for row, cells in zip(rows, kept, strict=True)])


def _changes(table: Mapping[str, Any]) -> str:
    return json.dumps({arm["name"]: arm["changes"] for arm in table["arms"]}, indent=2, ensure_ascii=False)
