"""The part of the report about steps with bad numbers, from the records of kind "guard"."""

from __future__ import annotations

from collections import Counter

from moe_train.evaluation import html
from moe_train.evaluation.run_files import RunFiles

MAX_ROWS = 100


def bad_numbers(run: RunFiles) -> str:
    """What the guard did; nothing where there was nothing to do."""
    if not run.guard:
        return ""
    counts = Counter(str(record.get("action", "")).replace("_", " ") for record in run.guard)
    note = ", ".join(f"{count} x {action}" for action, count in sorted(counts.items()))
    note += f"; the last {MAX_ROWS} are shown." if len(run.guard) > MAX_ROWS else "."
    rows = [
        (f"step {record.get('bad_step', record['step']):,}", f"{record.get('action')}: {record.get('message', '')}")
        for record in run.guard[-MAX_ROWS:]
    ]
    return html.section("Bad numbers", html.facts(rows), note=note, kind="warning")
