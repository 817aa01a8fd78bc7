"""Whether the routing of one layer collapses, judged from the exact counts of the last steps.

Suffixes: E experts.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch
from torch import Tensor

from moe_train.routing.statistics import balance_statistics
from moe_train.training.options import AlarmOptions

CAUSES = ("dead_experts", "load_share", "entropy", "z_growth")
Numbers = dict[str, Any]
_LONGEST = 1000
"""Steps after which a window grows no more, however few tokens they have."""


class LayerWatch:
    """Load of the last ``options.window`` steps, or of as many more as it takes for ``options.min_slots`` slots per
    expert at the wanted share: fewer could miss an expert by chance. Until then the load is not judged.

    With at least 100 slots expected, independent even choices give an expert fewer than 40 with probability 1e-11.
    share_E: wanted share of the load of each expert, summing to one.
    """

    def __init__(self, options: AlarmOptions, share_E: Tensor) -> None:
        self.options = options
        self.share_E = share_E.double()
        experts = len(share_E)
        self._loads: deque[Tensor] = deque()
        self._load_E = torch.zeros(experts, dtype=torch.int64)
        self._silent_steps_E = torch.zeros(experts, dtype=torch.int64)
        self._silent_slots_E = torch.zeros(experts, dtype=torch.int64)
        self._z: deque[float] = deque(maxlen=options.z_steps)
        # All logits zero give (ln E)^2. Below that a tenfold rise says nothing: logsumexp may pass through zero.
        self._least_z = max(1.0, math.log(experts) ** 2)

    def add(self, load_E: Tensor, tokens: int, z: float | None) -> dict[str, Numbers]:
        """One step: its slots per expert (int64, before capacity), its tokens and the mean of logsumexp(logits)^2 (None
        where the gate has none). Returns the causes for alarm that are there now, with their numbers."""
        found: dict[str, Numbers] = {}
        self._push(load_E, tokens)
        dead_E = self._dead()
        if self.options.dead_experts and dead_E.any():
            steps = int(self._silent_steps_E[dead_E].min())
            found["dead_experts"] = {"experts": _numbers(dead_E), "steps": steps}
        if self._enough(self._load_E, len(self._loads)):
            found |= self._balance(dead_E if self.options.dead_experts else torch.zeros_like(dead_E))
        if z is not None and math.isfinite(z):
            self._z.append(z)
            lowest = max(min(self._z), self._least_z)
            if self.options.z_growth and z >= self.options.z_growth * lowest:
                found["z_growth"] = {"value": z, "lowest": min(self._z), "steps": len(self._z)}
        return found

    def _push(self, load_E: Tensor, tokens: int) -> None:
        self._loads.append(load_E)
        self._load_E = self._load_E + load_E
        while True:
            without_E, steps = self._load_E - self._loads[0], len(self._loads) - 1
            if not self._enough(without_E, steps) and steps < _LONGEST:
                break
            self._load_E = without_E
            self._loads.popleft()
        silent_E = load_E == 0
        # A layer that gives no slot at all says so by its tokens.
        slots = int(load_E.sum()) or tokens
        self._silent_steps_E = torch.where(silent_E, self._silent_steps_E + (1 if slots else 0), 0)
        self._silent_slots_E = torch.where(silent_E, self._silent_slots_E + slots, 0)

    def _dead(self) -> Tensor:
        """bool [E]: no slot in the last ``window`` steps in a row, in which enough were to be expected."""
        expected_E = self._silent_slots_E * self.share_E
        return (self._silent_steps_E >= self.options.window) & (expected_E >= self.options.min_slots)

    def _enough(self, load_E: Tensor, steps: int) -> bool:
        return steps >= self.options.window and bool(load_E.sum() * self.share_E.min() >= self.options.min_slots)

    def _balance(self, dead_E: Tensor) -> dict[str, Numbers]:
        found: dict[str, Numbers] = {}
        total, steps = int(self._load_E.sum()), len(self._loads)
        relative_E = self._load_E.double() / total / self.share_E
        low_E = (relative_E < self.options.load_share) & ~dead_E
        if low_E.any():
            lowest = float(relative_E[low_E].min())
            found["load_share"] = {"experts": _numbers(low_E), "value": lowest, "steps": steps}
        entropy = balance_statistics(self._load_E, self._load_E, total)["entropy"]
        if entropy < self.options.entropy * self._wanted_entropy():
            found["entropy"] = {"value": entropy, "steps": steps}
        return found

    def _wanted_entropy(self) -> float:
        """1 for equal shares."""
        if len(self.share_E) < 2:
            return 1.0
        return -float(torch.xlogy(self.share_E, self.share_E).sum()) / math.log(len(self.share_E))


def _numbers(mask_E: Tensor) -> list[int]:
    return mask_E.nonzero().flatten().tolist()
