"""The load meter of LPR's published code, for comparison with its tables only: a moving average over micro-batches.

It is no measure of balance in the sense of `statistics.py`: an expert that was used once never falls to zero. After n
silent micro-batches 0.99^n of its load is left, so that a min-max of 1.27e-16 stands for 3642 of them.

Suffixes: E experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

DECAY = 0.99


@torch.no_grad()
def move_average(average_E: Tensor, count_E: Tensor, decay: float = DECAY, steps: int = 1) -> None:
    """One micro-batch, in place: h <- decay^steps h + (1 - decay) c. ``average_E`` starts at zero, float64.

    steps: above 1 where only every so many-th micro-batch is seen here (the others by other ranks). The average is
    linear in the counts: with rank r of R seeing the micro-batches r, r + R, ... the sum over the ranks of
    decay^(R - 1 - r) h_r is the average over all of them in their order.
    """
    average_E.mul_(decay**steps).add_(count_E.to(average_E.dtype), alpha=1 - decay)


def moving_average_statistics(average_E: Tensor) -> dict[str, float]:
    """Statistics of x = h / sum h as the published code defines them: ``gini``; ``min_max`` = min x / max x; ``cv``
    with the unbiased standard deviation (ddof 1); ``utilisation``, the share of experts with h > 0. Zeros without load.

    Source: LPR's published code (arXiv 2506.21328), with each key named after what is computed.
    """
    values = sorted(float(v) for v in average_E.double().tolist())
    experts, total = len(values), math.fsum(values)
    if not values or min(values) < 0 or not math.isfinite(total):
        raise ValueError("a moving average needs finite loads of at least 0, for one expert or more")
    if total == 0:
        return {"gini": 0.0, "min_max": 0.0, "cv": 0.0, "utilisation": 0.0}
    mean = total / experts
    squares = math.fsum((v - mean) ** 2 for v in values)
    return {
        "gini": math.fsum((2 * i - experts - 1) * v for i, v in enumerate(values, start=1)) / (experts * total),
        "min_max": values[0] / values[-1],
        "cv": math.sqrt(squares / (experts - 1)) / mean if experts > 1 else 0.0,
        "utilisation": sum(v > 0 for v in values) / experts,
    }
