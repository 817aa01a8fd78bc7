"""Timing of several arms, one step each in turn, and what a table needs of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of each step of one arm, in the order in which they were taken."""

    wall: list[float]
    cpu: list[float]
    """Processor time of this process, all threads."""
    losses: list[float]


def alternate(arms: dict[str, Any], batches: Sequence[Any], warmup: int, device: torch.device) -> dict[str, Timing]:
    """Each batch is one round: every arm takes one step on it, each round beginning with another arm."""
    names = list(arms)
    timings = {name: Timing([], [], []) for name in names}
    for index, batch in enumerate(batches):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            _synchronize(device)
            wall, cpu = time.perf_counter(), time.process_time()
            loss = arms[name].step(batch)
            _synchronize(device)
            if index >= warmup:
                timings[name].wall.append(time.perf_counter() - wall)
                timings[name].cpu.append(time.process_time() - cpu)
                timings[name].losses.append(loss)
    return timings


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and minimum."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return {"median": median(values), "quartile_1": low, "quartile_3": high, "min": min(values)}


def speed_ratio(arm: Timing, baseline: Timing) -> dict[str, dict[str, float]]:
    """Speed relative to the baseline, round by round (above 1: the arm is faster)."""
    return {
        clock: spread([b / a for a, b in zip(getattr(arm, clock), getattr(baseline, clock), strict=True)])
        for clock in ("wall", "cpu")
    }


def matmul_flops(device: torch.device, dtype: torch.dtype, repeats: int = 10) -> float:
    """FLOP/s of a large square multiplication, the best of ``repeats``: the ceiling in practice."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        _synchronize(device)
        start = time.perf_counter()
        a @ b
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def memory_now(device: torch.device) -> int:
    """Bytes in use: allocated on the accelerator, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    import psutil

    return int(psutil.Process().memory_info().rss)


def memory_peak(device: torch.device) -> int:
    """The largest that ``memory_now`` has been in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        # Not getrusage: its peak is handed down from the process that started this one.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        import resource

        # Kilobytes on Linux, bytes on macOS.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
