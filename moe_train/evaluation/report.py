"""One self-contained HTML file about a run: numbers, curves, expert load, configuration, environment."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from moe_train.evaluation import html, report_guard, report_routing
from moe_train.evaluation.heatmaps import domain_matrix, load_matrix, load_over_time
from moe_train.evaluation.plots import MEDIUM, WIDE, curves, layer_curves
from moe_train.evaluation.run_files import RunFiles, read_run
from moe_train.evaluation.series import auxiliary_names, balance_by_layer, floor_over_time, load_records, series
from moe_train.evaluation.summary import environment_rows, subtitle, summary_cards
from moe_train.evaluation.table import balance_rows, number


def write_report(run_dir: Path, output: Path | None = None) -> Path:
    """Reads the run folder and writes the report, to <run>/report.html by default; returns where it is.

    Parts that the run does not have yet are left out. ValueError when the folder is no run folder.
    """
    text = render(read_run(run_dir))
    path = output or run_dir / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path


def render(run: RunFiles) -> str:
    """The report as text."""
    parts = [
        html.cards(summary_cards(run)),
        _warnings(run),
        report_guard.bad_numbers(run),
        report_routing.alarms(run),
        _loss(run),
        _optimisation(run),
        _balance_over_time(run),
        _load_over_time(run),
        _evaluations(run),
        _domains(run),
        report_routing.routing(run),
        _configuration(run),
        _environment(run),
    ]
    version = run.environment.get("moe_train", "")
    return html.page(run.name, subtitle(run), [part for part in parts if part], f"moe_train {version}".strip())


def _warnings(run: RunFiles) -> str:
    if not run.warnings:
        return ""
    return html.section("Not everything could be read", *map(html.paragraph, run.warnings), kind="warning")


def _loss(run: RunFiles) -> str:
    train = series(run.train, "loss", "training")
    validation = series(run.validation, "eval/loss", "validation")
    if not train and not validation:
        return html.section("Loss", note="Nothing is recorded yet.")
    entropy = (run.evaluation or {}).get("unigram_entropy")
    level = ("unigram entropy", float(entropy)) if entropy is not None else None
    main = curves("", [train] if train else [], y_label="nats per token", marked=validation, level=level, size=WIDE)
    images = []
    perplexity = series(run.validation, "eval/perplexity", "validation perplexity")
    if perplexity:
        image = curves("Validation perplexity", [], marked=perplexity, log=True)
        images.append(html.svg(image, "validation perplexity over steps"))
    for name in auxiliary_names(run.train):
        line = series(run.train, f"aux/{name}", name)
        images.append(html.svg(curves(f"Auxiliary loss: {name}", [line]), f"auxiliary loss {name} over steps"))
    return html.section(
        "Loss",
        html.svg(main, "training and validation loss over steps"),
        html.figures(images),
        note="Negative log likelihood per token in nats, without auxiliary terms. Auxiliary losses are shown without "
        "their coefficients, as the mean over layers.",
    )


def _optimisation(run: RunFiles) -> str:
    wanted = (
        ("lr", "Learning rate", 1.0),
        ("grad_norm", "Gradient norm before clipping", 1.0),
        ("tokens_per_second", "Throughput (tokens per second)", 1.0),
        ("mfu", "Model FLOPs utilisation (%)", 100.0),
        ("memory_bytes", "Memory of the fullest device (GiB)", 2.0**-30),
    )
    images = []
    for key, title, scale in wanted:
        line = series(run.train, key, title, scale)
        if line:
            images.append(html.svg(curves(title, [line], from_zero=True), f"{title} over steps"))
    return html.section("Optimisation and speed", html.figures(images)) if images else ""


def _balance_over_time(run: RunFiles) -> str:
    titles = {
        "gini": "Gini (0 is even)",
        "min_max": "Min-max (1 is even)",
        "entropy": "Entropy of the load (1 is even)",
        "cv": "CV (0 is even)",
    }
    balance = balance_by_layer(run.train, list(titles))
    if not balance:
        return ""
    images = []
    for key, layers in balance.items():
        floor = floor_over_time(run.train) if key == "gini" else None
        images.append(html.svg(layer_curves(titles[key], layers, floor=floor), f"{titles[key]} over steps"))
    dropped = series(run.train, "balance/drop_rate", "dropped slots", 100.0)
    if any(dropped.values):
        image = curves("Slots dropped by capacity (%)", [dropped], from_zero=True, size=MEDIUM)
        images.append(html.svg(image, "drop rate over steps"))
    chosen = series(run.train, "balance/mean_k", "experts per token")
    if chosen and max(chosen.values) - min(chosen.values) > 0.005 * max(chosen.values):
        images.append(html.svg(curves("Experts per token", [chosen], from_zero=True, size=MEDIUM), "mean k over steps"))
    return html.section(
        "Balance over time",
        html.figures(images, "two"),
        note="From exact counts of the training tokens of each logged interval, before capacity. The dashed line is "
        "the Gini that perfectly even random routing of as many slots would show: nothing is gained below it.",
    )


def _load_over_time(run: RunFiles) -> str:
    records = load_records(run.train)
    if not records:
        return ""
    image, shown = load_over_time(records)
    layers = len(records[-1]["load"])
    note = "White is an even share, orange more, blue less, dark grey an expert that got nothing."
    if len(shown) < layers:
        note += f" {len(shown)} of {layers} layers, evenly chosen."
    return html.section("Expert load in training", html.png(image, "expert load per layer over steps"), note=note)


def _evaluations(run: RunFiles) -> str:
    if not run.evaluations:
        return ""
    rows = [
        [
            name,
            str(evaluation.get("data") or ""),
            number(evaluation.get("step")),
            number(evaluation.get("tokens")),
            number(evaluation.get("loss")),
            number(evaluation.get("perplexity")),
            number(evaluation.get("bits_per_byte")),
            *(number(evaluation["mean"].get(name)) for name in ("gini", "min_max") if evaluation.get("mean")),
        ]
        for name, evaluation in run.evaluations.items()
    ]
    header = ["evaluation", "data", "step", "tokens", "loss", "perplexity", "bits per byte"]
    if any(evaluation.get("mean") for evaluation in run.evaluations.values()):
        header += ["Gini", "min-max"]  # all evaluations of a run have them, or none
    parts = [html.table(header, rows)]
    layers = (run.evaluation or {}).get("layers", [])
    name = next(iter(run.evaluations))
    if layers:
        parts.append(html.paragraph(f"Expert load of {name}, from exact counts over all its tokens:"))
        parts.append(
            html.svg(
                load_matrix([layer["load"] for layer in layers], [layer["layer"] for layer in layers]),
                "expert load per layer",
            )
        )
        layer_header, *layer_rows = balance_rows(run.evaluation or {})
        parts.append(html.table(layer_header, layer_rows, strong_last=True))
    return html.section("Evaluation", *parts)


def _domains(run: RunFiles) -> str:
    domains: dict[str, Any] = (run.evaluation or {}).get("domains") or {}
    if not domains:
        return ""
    total = sum(domain["tokens"] for domain in domains.values())
    rows = [
        [
            name,
            number(domain["tokens"]),
            f"{100 * domain['tokens'] / total:.1f} %" if total else "-",
            number(domain["loss"]),
            number(math.exp(domain["loss"])) if domain["loss"] is not None and domain["loss"] < 700 else "-",
            number(domain.get("bits_per_byte")),
        ]
        for name, domain in domains.items()
    ]
    parts = [html.table(["domain", "tokens", "share", "loss", "perplexity", "bits per byte"], rows)]
    loaded = {name: domain for name, domain in domains.items() if domain["load"] and any(map(any, domain["load"]))}
    if loaded:
        image, _ = domain_matrix(loaded, [layer["layer"] for layer in (run.evaluation or {})["layers"]])
        parts.append(
            html.paragraph(
                "Which experts a domain prefers: an expert's share of the domain's slots relative to its share of all "
                "slots. White is no preference."
            )
        )
        parts.append(html.png(image, "expert load per domain and layer"))
    return html.section("Domains", *parts)


def _configuration(run: RunFiles) -> str:
    if not run.config_text:
        return ""
    return html.section("Configuration", html.collapsed("config.yaml, fully resolved", run.config_text))


def _environment(run: RunFiles) -> str:
    rows = environment_rows(run.environment)
    return html.section("Environment", html.facts(rows)) if rows else ""
