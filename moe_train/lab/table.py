"""The results of a comparison as one JSON object, from which Markdown and HTML are written."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_train.lab.bootstrap import Interval, interval, paired, worth
from moe_train.lab.experiment import Experiment
from moe_train.lab.plan import PlannedRun
from moe_train.lab.results import current_result, is_finished

Result = dict[str, Any]


@dataclass(frozen=True)
class Column:
    title: str
    digits: int
    scale: float = 1.0


COLUMNS = {
    "loss": Column("test loss", 4),
    "perplexity": Column("perplexity", 2),
    "gini": Column("Gini", 4),
    "min_max": Column("min-max", 4),
    "mean_k": Column("mean k", 3),
    "training_mean_k": Column("mean k in training", 3),
    "drop_rate": Column("dropped in training %", 2, 100.0),
    "evaluation_drop_rate": Column("dropped in evaluation %", 2, 100.0),
    "flops_per_token": Column("MFLOP/token", 2, 1e-6),
    "tokens_per_second": Column("tokens/s", 0),
}
PUBLISHED = {
    "loss_batch_average": Column("test loss, batch average", 4),
    "meter_gini_unmasked": Column("Gini, with padding", 4),
    "meter_min_max_unmasked": Column("min-max, with padding", 4),
    "meter_gini_masked": Column("Gini, without padding", 4),
    "meter_min_max_masked": Column("min-max, without padding", 4),
}
"""The meters of the published code of latent prototype routing."""
METRICS = (*COLUMNS, *PUBLISHED, "perplexity_batch_average", "gini_floor")


def read_results(runs: Sequence[PlannedRun]) -> list[Result]:
    """Those of the runs that are finished, in the order of ``runs``."""
    return [current_result(run) for run in runs if is_finished(run)]


def build_table(
    experiment: Experiment,
    results: Sequence[Result],
    *,
    planned: int,
    facts: Mapping[str, Any],
    curves: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The object of table.json (docs/compare.md).

    planned: runs of the whole comparison.   facts: what the tables say about themselves: title, date, command, ...
    curves: name of what was recorded -> arm -> points.
    """
    by_arm = {arm: [result for result in results if result["arm"] == arm] for arm in experiment.arms}
    baseline = experiment.compared_with
    return {
        **facts,
        "planned_runs": planned,
        "finished_runs": len(results),
        "run_commits": _commits(results),
        "seeds": sorted({result["seed"] for result in results}),
        "baseline": baseline,
        "arms": [
            {
                "name": arm,
                "label": experiment.label(arm),
                "changes": experiment.arms[arm],
                "gate": found[0]["gate"] if found else None,
                "seeds": [result["seed"] for result in found],
                "alarms": {str(result["seed"]): result.get("alarms") or {} for result in found},
                "alarms_on_at_end": {str(result["seed"]): result.get("alarms_on_at_end") for result in found},
                "steps": found[0]["step"] if found else None,
                "parameters": found[0]["parameters"] if found else None,
                "active_parameters": _mean(_all(found, "active_parameters")),
                "trained_tokens": _json(interval(_all(found, "trained_tokens"))),
                "metrics": {name: _json(interval(list(_metric(found, name).values()))) for name in METRICS},
                "difference_to_baseline": {
                    name: _json(paired(_metric(found, name), _metric(by_arm[baseline], name))) for name in METRICS
                }
                if arm != baseline
                else None,
                "layers": found[0]["layers"] if found else [],
                "load": {str(result["seed"]): result["load"] for result in found},
            }
            for arm, found in by_arm.items()
        ],
        "curves": dict(curves or {}),
        "notes": _notes(by_arm, results),
    }


def _alarms(results: Sequence[Result]) -> str:
    """Cause by cause: in how many layers it began, and was on at the end if that is known, in runs of which seeds."""
    began: dict[str, dict[int, int]] = {}
    on: dict[str, list[int | None]] = {}
    for result in results:
        for cause, count in (result.get("alarms") or {}).items():
            began.setdefault(cause, {})[result["seed"]] = count
            on.setdefault(cause, []).append((result.get("alarms_on_at_end") or {}).get(cause))
    parts = []
    for cause, by_seed in began.items():
        known = [count for count in on[cause] if count is not None]
        end = f", on at the end in {_range(known)}" if len(known) == len(by_seed) else ""
        layers = f"{_range(by_seed.values())} layer{'s' * (max(by_seed.values()) > 1)}"
        seeds = ", ".join(map(str, by_seed))
        parts.append(f"{cause} began in {layers}{end} (seed{'s' * (len(by_seed) > 1)} {seeds})")
    return "; ".join(parts)


def _range(counts: Collection[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low} to {high}" if low < high else str(low or "none")


def _commits(results: Sequence[Result]) -> list[str]:
    """Those that the runs were made at."""
    found = {(result.get("environment") or {}).get("commit") for result in results}
    return sorted(str(commit) for commit in found if commit)


def _metric(results: Sequence[Result], name: str) -> dict[int, float]:
    """By seed; without what does not exist or is not finite."""
    found = {result["seed"]: result["metrics"].get(name) for result in results}
    return {seed: float(value) for seed, value in found.items() if value is not None and math.isfinite(value)}


def _is_number(value: object, name: str) -> bool:
    """Whether it can stand in the table; a model without experts has no Gini."""
    return (value is None and name != "loss") or (isinstance(value, int | float) and math.isfinite(value))


def _all(results: Sequence[Result], key: str) -> list[float]:
    return [float(result[key]) for result in results if result.get(key) is not None]


def _mean(values: Sequence[float]) -> int | None:
    return round(sum(values) / len(values)) if values else None


def _json(value: Interval | None) -> dict[str, object] | None:
    return None if value is None else value.to_json()


def _notes(by_arm: Mapping[str, Sequence[Result]], results: Sequence[Result]) -> list[str]:
    """What a reader of the table must know."""
    notes = [worth(seeds) for seeds in sorted({len(found) for found in by_arm.values() if found})]
    if len({tuple(sorted(result["seed"] for result in found)) for found in by_arm.values() if found}) > 1:
        notes.append(
            "Attention: not all arms are finished with the same seeds, so that their means are of different samples: "
            "look at the differences, which are taken seed by seed."
        )
    if missing := [arm for arm, found in by_arm.items() if not found]:
        notes.append(f"Without a finished run: {', '.join(missing)}.")
    for arm, found in by_arm.items():
        for result in found:
            broken = [name for name in ("loss", "gini") if not _is_number(result["metrics"].get(name), name)]
            if broken:
                notes.append(f"Attention: {', '.join(broken)} of {arm}, seed {result['seed']}, is no number: left out.")
        if rung := _alarms(found):
            notes.append(f"Collapse alarm in {arm}: {rung}.")
    if floors := _all([result["metrics"] for result in results], "gini_floor"):
        low, high = f"{min(floors):.4f}", f"{max(floors):.4f}"
        notes.append(
            f"Even random routing of as many slots would show a Gini of {low if low == high else f'{low} to {high}'}."
        )
    for key, what in (
        ("evaluated_tokens", "different numbers of tokens were evaluated"),
        ("unigram_entropy", "the evaluated data are not the same"),
        ("processes", "runs used different numbers of processes, so their tokens/s do not compare"),
    ):
        if len(values := sorted({str(result.get(key)) for result in results})) > 1:
            notes.append(f"Attention: {what} ({', '.join(values)}).")
    for key in ("commit", "device", "python"):
        values = sorted({str((result.get("environment") or {}).get(key)) for result in results})
        if len(values) > 1:
            notes.append(f"Attention: runs differ in {key}: {', '.join(values)}.")
    return [note for note in notes if note]
