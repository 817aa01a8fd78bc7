"""Series over the steps of a run, taken from its records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from moe_train.routing.statistics import balance_statistics, gini_floor

Item = TypeVar("Item")
MAX_POINTS = 600


@dataclass(frozen=True)
class Series:
    label: str
    steps: list[int]
    values: list[float]

    def __bool__(self) -> bool:
        return bool(self.steps)


def series(records: Sequence[dict[str, Any]], key: str, label: str = "", scale: float = 1.0) -> Series:
    """The numbers under ``key``; records without one (or with null, which stands for NaN) are left out."""
    points = [(record["step"], record[key] * scale) for record in records if isinstance(record.get(key), (int, float))]
    points = thin(points, MAX_POINTS)
    return Series(label or key, [step for step, _ in points], [float(value) for _, value in points])


def thin(items: Sequence[Item], most: int) -> list[Item]:
    """At most ``most`` items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    if most == 1:
        return [items[-1]]
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def auxiliary_names(records: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the auxiliary losses, in order of appearance."""
    names = dict.fromkeys(key.removeprefix("aux/") for record in records for key in record if key.startswith("aux/"))
    return list(names)


def load_records(records: Sequence[dict[str, Any]], most: int = 240) -> list[dict[str, Any]]:
    """Records that hold expert loads of the same layers and shape as the last one's, thinned."""
    found = [record for record in records if record.get("load")]
    if not found:
        return []
    shape = _shape(found[-1])
    return thin([record for record in found if _shape(record) == shape], most)


def balance_by_layer(records: Sequence[dict[str, Any]], statistics: Sequence[str]) -> dict[str, list[Series]]:
    """For each of ``statistics`` (those that depend on the load only: gini, min_max, ...) one series per MoE layer:
    what was recorded, or computed from the recorded loads. Empty without loads."""
    records = load_records(records)
    if not records:
        return {}
    steps = [record["step"] for record in records]
    numbers = layer_numbers(records[-1])
    values = [[_layer_values(record, i, statistics) for record in records] for i in range(len(numbers))]
    return {
        name: [
            Series(f"layer {number}", steps, [row[name] for row in rows])
            for number, rows in zip(numbers, values, strict=True)
        ]
        for name in statistics
    }


def layer_numbers(record: Mapping[str, Any]) -> list[int]:
    """Numbers of the layers that ``load`` is of. Records of earlier versions, whose layers all had experts, have no
    ``layers``."""
    return record.get("layers") or list(range(len(record["load"])))


def floor_over_time(records: Sequence[dict[str, Any]]) -> Series:
    """Gini floor of the slots behind each record (the mean over layers)."""
    records = load_records(records)
    floors = [
        sum(float(gini_floor(sum(load), len(load))) for load in record["load"]) / len(record["load"])
        for record in records
    ]
    return Series("finite-sample floor", [record["step"] for record in records], floors)


def _layer_values(record: dict[str, Any], layer: int, statistics: Sequence[str]) -> dict[str, float]:
    number = layer_numbers(record)[layer]
    found = {name: record.get(f"balance/layer_{number}/{name}") for name in statistics}
    if None in found.values():
        load_E = record["load"][layer]
        found = {**balance_statistics(load_E, load_E, max(1, sum(load_E))), **{k: v for k, v in found.items() if v}}
    return {name: float(found[name] or 0.0) for name in statistics}


def _shape(record: Mapping[str, Any]) -> tuple[list[int], int]:
    return layer_numbers(record), len(record["load"][0])
