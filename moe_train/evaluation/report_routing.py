"""The parts of the report about routing in detail, from the JSON object of an evaluation and the records of alarms."""

from __future__ import annotations

from typing import Any

from moe_train.evaluation import html
from moe_train.evaluation.heatmaps import pair_matrices
from moe_train.evaluation.plots import k_histogram
from moe_train.evaluation.run_files import RunFiles
from moe_train.evaluation.table import number

MAX_ALARMS = 100


def alarms(run: RunFiles) -> str:
    """What the collapse alarm said; nothing where it was quiet."""
    if not run.alarms:
        return ""
    begun = sum(record.get("state") == "began" for record in run.alarms)
    rows = [(f"step {record['step']:,}", str(record.get("message", ""))) for record in run.alarms[-MAX_ALARMS:]]
    advice: dict[str, list[str]] = {}
    for record in run.alarms:
        if record.get("advice") and record.get("cause") not in (causes := advice.setdefault(record["advice"], [])):
            causes.append(str(record.get("cause")))
    note = f"{begun} alarms" + (f", the last {MAX_ALARMS} records" if len(run.alarms) > MAX_ALARMS else "") + "."
    return html.section(
        "Collapse alarm",
        html.facts(rows),
        *(html.paragraph(f"Against {' and '.join(causes)} try {text}.") for text, causes in advice.items()),
        note=note,
        kind="warning",
    )


def routing(run: RunFiles) -> str:
    """Experts per token, pairs of experts, the meter of LPR's code, and the comparison with another checkpoint."""
    evaluation = run.evaluation or {}
    layers: list[dict[str, Any]] = evaluation.get("layers") or []
    numbers = [layer["layer"] for layer in layers]
    parts: list[str] = []
    histograms = [layer.get("k_histogram") or [] for layer in layers]
    if any(sum(count > 0 for count in counts) > 1 for counts in histograms):
        parts.append(html.paragraph("Experts per token, before capacity:"))
        parts.append(html.svg(k_histogram(histograms, numbers), "experts per token"))
    pairs = [layer.get("coactivation") for layer in layers]
    if layers and all(pairs) and any(len(counts) > 2 for counts in histograms):
        parts.append(
            html.paragraph(
                "Which experts are chosen together: pairs of a token relative to what the loads alone let expect. "
                "White is no preference, dark grey a pair that never occurs."
            )
        )
        parts.append(html.png(pair_matrices([p for p in pairs if p], numbers), "experts chosen together"))
    parts += _stability(evaluation)
    parts += _moving_average(layers)
    return html.section("Routing in detail", *parts) if parts else ""


def _stability(evaluation: dict[str, Any]) -> list[str]:
    stability = evaluation.get("stability")
    if not stability:
        return []
    names = ("same_slots", "same_by_chance", "jaccard")
    rows = [[str(row["layer"]), *(number(row.get(name)) for name in names)] for row in stability["layers"]]
    rows.append(["mean", *(number(stability["mean"].get(name)) for name in names)])
    where = f"step {number(stability.get('step'))} ({stability.get('checkpoint')})"
    return [
        html.paragraph(f"The same tokens through this checkpoint and that of {where}:"),
        html.table(["layer", "slots with the same expert", "by chance", "Jaccard"], rows, strong_last=True),
    ]


def _moving_average(layers: list[dict[str, Any]]) -> list[str]:
    rows = []
    for layer in layers:
        meter = layer.get("moving_average_of_lpr") or {}
        for which in ("masked", "unmasked"):
            if found := meter.get(which):
                values = [number(found.get(name)) for name in ("gini", "min_max", "cv", "utilisation")]
                rows.append([str(layer["layer"]), "without padding" if which == "masked" else "with padding", *values])
    if not rows:
        return []
    return [
        html.paragraph(
            "The meter of LPR's published code, for comparison with its tables only: a moving average over micro-"
            "batches (0.99), not exact counts. Its min-max of an expert that is silent falls by 1 % per micro-batch."
        ),
        html.table(["layer", "", "Gini", "min-max", "CV (ddof 1)", "utilisation"], rows),
    ]
