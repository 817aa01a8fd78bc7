"""<run>/rewinds.json: the rewinds of a run, and the steps whose data is left out because of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_train.data.files import write_atomically

REWINDS = "rewinds.json"


@dataclass(frozen=True, order=True)
class Rewind:
    """Steps count from 1, as in the metrics."""

    bad_step: int
    """The step that was refused."""
    to_step: int
    """Step of the checkpoint that the run went back to."""
    first: int
    """Steps first to bad_step are left out: counted, but neither read nor taken."""
    cause: str


def merged(*lists: Iterable[Rewind]) -> list[Rewind]:
    """Each rewind once, in order."""
    return sorted({rewind for rewinds in lists for rewind in rewinds})


def left_out(rewinds: Sequence[Rewind], step: int) -> bool:
    """Whether the data of a step (from 1) is left out."""
    return any(rewind.first <= step <= rewind.bad_step for rewind in rewinds)


def to_plain(rewinds: Sequence[Rewind]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(rewind) for rewind in rewinds]


def from_plain(entries: Iterable[dict[str, Any]]) -> list[Rewind]:
    return [Rewind(**entry) for entry in entries]


def write_rewinds(run_dir: Path, rewinds: Sequence[Rewind]) -> None:
    write_atomically(run_dir / REWINDS, (json.dumps({"rewinds": to_plain(rewinds)}, indent=1) + "\n").encode())


def read_rewinds(run_dir: Path) -> list[Rewind]:
    """Empty where there were none. ValueError where the file is damaged."""
    path = run_dir / REWINDS
    if not path.is_file():
        return []
    try:
        return from_plain(json.loads(path.read_text(encoding="utf-8"))["rewinds"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}): copy it again. Without it the run would read the data that it has left out"
        ) from None
