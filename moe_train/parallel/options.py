"""Options of the process layout."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ParallelOptions:
    """Layout (TP, EP, DP): data parallelism is what is left of the number of processes."""

    expert: int = 1
    """Ranks over which the experts of one layer are spread (EP)."""
    tensor: int = 1
    """Ranks that share the matrices of attention and of layers without experts (TP); they divide the positions of each
    sequence among them (sequence parallelism). Experts stay whole."""
    pipeline: int = 1
    context: int = 1
    timeout_seconds: float = 600.0
    """Time after which a collective that does not finish ends the run; every group carries it."""
