"""What differs between the samples of two runs, in few words.

Both sides are what `TrainingSet.identity` returns, cut by `read_before`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

_SHOWN = 3
_NAMES = {"content": "checksum of sources, options and tokenizer", "reset": "reset_at_documents", "mask": "loss mask"}


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each difference, of many data sets or stages only the first few; empty where the samples are the same.

    What `before` does not mention, because an earlier version wrote it, is taken to be the same.
    """
    lists = ("members", "stages")
    lines = [f"{key}: {before[key]} then, {now[key]} now" for key in _changed(before, now) if key not in lists]
    if "members" not in before:
        return lines
    members = _members(before["members"], now["members"])
    # Without weights shares follow the sizes: when those have changed, the shares say nothing new.
    return lines + (members or _stages(before["stages"], now["stages"], [member["name"] for member in now["members"]]))


def _changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [key for key in now if now[key] != before.get(key, now[key])]


def _members(before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> list[str]:
    old, new = [member["name"] for member in before], [member["name"] for member in now]
    if old != new:
        gone, added = (list((Counter(x) - Counter(y)).elements()) for x, y in ((old, new), (new, old)))
        lines = [f"data sets left out: {_first(gone)}"] if gone else []
        lines += [f"data sets added: {_first(added)}"] if added else []
        return lines or ["the data sets stand in another order"]
    lines = []
    for was, member in zip(before, now, strict=True):
        if changed := _changed(was, member):
            facts = (f"{_NAMES.get(key, key)} {_value(was[key])} then, {_value(member[key])} now" for key in changed)
            lines.append(f"data set {member['name']}: {', '.join(facts)}")
    return _few(lines, "data sets")


def _stages(before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
    if len(before) != len(now):
        return [f"stages: {len(before)} then, {len(now)} now"]
    lines = []
    for number, (was, stage) in enumerate(zip(before, now, strict=True)):
        label = f"stage {number}" if number else "data.train"
        if was["first"] != stage["first"]:
            lines.append(f"{label}: began at sample {was['first']} then, at {stage['first']} now")
        elif was != stage:
            old, new = _shares(was), _shares(stage)
            changed = [member for member in sorted({*old, *new}) if old.get(member) != new.get(member)]
            shares = [f"{names[m]} {old.get(m, 0):.4g} then, {new.get(m, 0):.4g} now" for m in changed[:_SHOWN]]
            more = f" and of {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
            lines.append(f"shares of {label}: {', '.join(shares)}{more}")
    return _few(lines, "stages")


def _shares(stage: dict[str, Any]) -> dict[int, float]:
    total = sum(stage["shares"])
    return {member: share / total for member, share in zip(stage["members"], stage["shares"], strict=True)}


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _few(lines: list[str], what: str) -> list[str]:
    return lines if len(lines) <= _SHOWN else [*lines[:_SHOWN], f"{len(lines) - _SHOWN} more {what} differ"]


def _value(value: Any) -> str:
    return "none" if value is None else f"{value:,}" if type(value) is int else str(value)
