"""Capacity, token by token: each expert has so many places in a sequence.

Suffixes: B sequences, S tokens per sequence, N = B * S tokens (n = b * S + s), E experts.
"""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import torch
from torch import Tensor

from tests.reference.gates import Decision
from tests.reference.geometry import Router


def places(factor: float, minimum: int, tokens: int, slots: int, experts: int) -> int:
    """Of each expert, for a sequence whose tokens ask for ``slots``."""
    return min(tokens, max(minimum, math.ceil(Fraction(str(factor)) * slots / experts)))


def drop(router: Router, decision: Decision, padding_BS: Tensor) -> Decision:
    """The decision with ``kept_NE``. Tokens of a sequence come one after the other, in their order or by falling
    probability, and take a place while there is one."""
    assert router.capacity is not None
    sequences, length = padding_BS.shape
    kept_NE = torch.zeros_like(decision.selected_NE)
    experts = kept_NE.shape[1]
    margin = decision.margin
    k = router.options.get("max_k") if router.gate == "dynamic_k" else router.options.get("top_k", 2)
    for b in range(sequences):
        tokens = [b * length + s for s in range(length) if not padding_BS[b, s]]
        slots = sum(int(decision.selected_NE[n].sum()) for n in tokens) if k is None else len(tokens) * k
        limit = places(router.capacity, router.minimum, len(tokens), slots, experts)
        for e in range(experts):
            queue = [n for n in tokens if decision.selected_NE[n, e]]
            if router.drop == "probability":
                chances = [float(decision.probs_NE[n, e].detach()) for n in queue]
                order = sorted(range(len(queue)), key=lambda i: (-chances[i], i))
                if 0 < limit < len(queue):
                    margin = min(margin, chances[order[limit - 1]] - chances[order[limit]])
                queue = [queue[i] for i in order]
            kept_NE[queue[:limit], e] = True
    return dataclasses.replace(decision, kept_NE=kept_NE, margin=margin)
