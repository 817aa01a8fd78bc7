"""Which samples of a run a step read, and which of them a rank."""

from __future__ import annotations

import json
from pathlib import Path

from moe_train.data.batches import rank_slice
from moe_train.training.run_config import RunConfig, check


def samples_of_step(
    config: RunConfig, run_dir: Path, step: int, rank: int | None = None, processes: int | None = None
) -> list[int]:
    """Indices of the samples that optimizer step `step` (from 1, as in the metrics) read; with a rank, its own in the
    order of its micro-batches.

    processes: of the run when it took that step; those of its last start if not given.
    Errors: ValueError where there is no such step or rank.
    """
    size = config.train.global_batch_size
    if not 1 <= step <= config.train.steps:
        raise ValueError(f"{run_dir} has steps 1 to {config.train.steps}, not {step}")
    start = (step - 1) * size
    if rank is None:
        if processes is not None:
            raise ValueError("--processes says how the ranks shared a step: it needs --rank")
        return list(range(start, start + size))
    world_size = processes if processes is not None else _last_processes(run_dir)
    check(config, world_size)
    ranks, micro = config.data_parallel_size(world_size), config.train.micro_batch_size
    if not 0 <= rank < ranks:
        raise ValueError(f"the run has data-parallel ranks 0 to {ranks - 1}, not {rank}")
    firsts = [rank_slice(start, m, rank, ranks, micro) for m in range(config.accumulation_steps(world_size))]
    return [first + row for first in firsts for row in range(micro)]


def _last_processes(run_dir: Path) -> int:
    path = run_dir / "environment.json"
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["processes"])
    except (OSError, ValueError, KeyError):
        raise ValueError(f"{path} does not say how many processes the run had: give --processes") from None
