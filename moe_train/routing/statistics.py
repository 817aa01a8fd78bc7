"""Balance of the load of one layer, from exact counts. Formulas hold for any number of experts E.

With c the slots per expert (before capacity, padding excluded), C = sum c and f = c / C:
gini            sum_i (2i - E - 1) c_(i) / (E C), c sorted ascending, i from 1: 0 even, 1 - 1/E all on one
min_max         min c / max c
cv              standard deviation / mean, over the E experts as a whole population (ddof 0)
entropy         -sum f ln f / ln E: 1 even, 0 all on one
variance        variance of E f, which is 1 for every expert at perfect balance (ddof 0): the square of cv
max_violation   E max f - 1
dead_experts    experts with c = 0
drop_rate       1 - (sum kept) / C
mean_k          C / tokens
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SPREAD = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "max": 1.0}


@torch.no_grad()
def k_histogram(selected_TE: Tensor, padding_T: Tensor) -> Tensor:
    """int64 [E + 1]: how many tokens have 0, 1, ... E experts, padding excluded. T tokens."""
    number_N = torch.arange(selected_TE.shape[1] + 1, device=selected_TE.device)
    return ((selected_TE.sum(dim=1, keepdim=True) == number_N) & ~padding_T[:, None]).sum(dim=0)


def balance_statistics(
    load_E: Tensor | Sequence[int], kept_E: Tensor | Sequence[int], tokens: int | Tensor
) -> dict[str, float]:
    """Statistics of one layer from int64 counts [E]: slots before and after capacity, and non-padding tokens.

    With no slot at all every expert is idle: gini, cv, variance, max_violation, drop_rate and mean_k are 0, min_max and
    entropy 0 too (nothing is spread), and dead_experts is E. Never NaN. Reads the counts from their device.
    """
    load, kept = _integers(load_E), _integers(kept_E)
    experts, total = len(load), sum(load)
    if experts == 0 or len(kept) != experts:
        raise ValueError(f"load has {experts} experts and kept {len(kept)}; both need the same number, at least 1")
    if min(load) < 0 or any(k > c or k < 0 for k, c in zip(kept, load, strict=True)):
        raise ValueError("counts must be at least 0 and no expert may keep more than its load")
    tokens = int(tokens)
    if total == 0:
        names = ("gini", "min_max", "cv", "variance", "entropy", "max_violation", "drop_rate", "mean_k")
        return {**dict.fromkeys(names, 0.0), "dead_experts": float(experts)}
    if tokens <= 0:
        raise ValueError(f"{total} slots are taken by {tokens} tokens")
    # Sums of integers are exact in Python; each figure is rounded once, by its division.
    gini = sum((2 * i - experts - 1) * c for i, c in enumerate(sorted(load), start=1)) / (experts * total)
    squares = sum((c * experts - total) ** 2 for c in load)
    entropy = sum(-(c / total) * math.log(c / total) for c in load if c > 0)
    return {
        "gini": gini,
        "min_max": min(load) / max(load),
        "cv": math.sqrt(squares / experts) / total,
        "variance": squares / (experts * total * total),
        "entropy": entropy / math.log(experts) if experts > 1 else 1.0,
        "max_violation": (max(load) * experts - total) / total,
        "dead_experts": float(sum(c == 0 for c in load)),
        "drop_rate": (total - sum(kept)) / total,
        "mean_k": total / tokens,
    }


def gini_floor(slots: int, num_experts: int) -> float:
    """Gini that perfectly even but independent random choices of ``slots`` slots show: sqrt((E - 1) / (pi * slots)).

    The counts are binomial; for many slots per expert the Gini of normal counts is std / (mean * sqrt(pi)). At most
    1 - 1/E, the value of one slot, where the approximation breaks down; 0 without slots.
    """
    if slots <= 0:
        return 0.0
    return min(math.sqrt((num_experts - 1) / (math.pi * slots)), 1 - 1 / num_experts)


def spread(values: Sequence[float]) -> dict[str, float]:
    """min, p25, median, p75 and max of a statistic over layers; quantiles by linear interpolation (Hyndman & Fan 1996,
    type 7). ValueError without values."""
    if not values:
        raise ValueError("there is no layer to summarise: give at least one value")
    ordered = sorted(values)

    def quantile(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return {name: quantile(share) for name, share in SPREAD.items()}


def _integers(counts: Any) -> list[int]:
    values = torch.as_tensor(counts)
    if values.is_floating_point() or values.dim() != 1:
        raise ValueError(f"counts must be integers [E], not {values.dtype} {list(values.shape)}")
    return [int(v) for v in values.tolist()]
