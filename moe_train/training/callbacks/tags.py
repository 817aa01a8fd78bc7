"""From a record to the tags that dashboards show: train/*, eval/*, perf/*, alarm/*, balance/*, balance/layer_i/*."""

from __future__ import annotations

from typing import Any

from moe_train.training.callbacks.base import Record

_TRAIN = ("loss", "lr", "grad_norm", "tokens")
_PERFORMANCE = ("tokens_per_second", "step_seconds", "memory_bytes", "mfu")


def scalar_tags(record: Record) -> dict[str, float]:
    """The numbers of a record by tag. Balance in an evaluation record becomes eval/balance/*; of an alarm there is the
    number of layers in which its cause is on, of a checkpoint how long it took, of the
    guard which step had bad numbers."""
    if record["kind"] == "alarm":
        return {f"alarm/{record['cause']}": record["layers_on"]}
    if record["kind"] == "checkpoint":
        return {f"perf/save_{key}": record[key] for key in ("stall_seconds", "seconds") if key in record}
    if record["kind"] == "guard":
        return {f"guard/{record['action']}": record["bad_step"]}
    tags: dict[str, float] = {}
    for key, value in record.items():
        if key == "balance" and isinstance(value, dict):
            tags |= {f"eval/balance/{name}": number for name, number in value.items() if _is_number(number)}
        elif not _is_number(value) or key == "step":
            continue
        elif key in _TRAIN:
            tags[f"train/{key}"] = value
        elif key in _PERFORMANCE:
            tags[f"perf/{key}"] = value
        elif key.startswith("aux/"):
            tags[f"train/{key}"] = value
        else:
            tags[key] = value
    return tags


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
