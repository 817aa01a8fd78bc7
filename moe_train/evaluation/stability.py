"""How much routing differs between two checkpoints: the same tokens through both, expert by expert.

Suffixes: T tokens, L MoE layers in order, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_train.data.batches import Batch
from moe_train.evaluation.loss import Forward
from moe_train.routing.interface import Routing


class RoutingStability:
    """Compares the routings that pass a forward function with those of ``other`` on the same batch, before capacity.

    With A and B the experts of a token in the two: ``same_slots`` = 2 sum |A and B| / sum (|A| + |B|), for a fixed
    number of experts per token the share of (token, slot) pairs whose expert is the same; ``jaccard`` = mean over
    tokens of |A and B| / |A or B|, tokens without an expert in both left out; ``same_by_chance``, same_slots of two
    routers that have these loads but choose independently of the token. Experts are compared by number.
    """

    def __init__(self, other: Forward, layers: int, num_experts: int, device: torch.device | str = "cpu") -> None:
        self.other = other
        self.common_L, self.slots_L, self.tokens_L = (
            torch.zeros(layers, dtype=torch.int64, device=device) for _ in range(3)
        )
        self.read = torch.zeros(1, dtype=torch.int64, device=device)
        self.loads_2LE = torch.zeros(2, layers, num_experts, dtype=torch.int64, device=device)
        self.jaccard_L = torch.zeros(layers, dtype=torch.float64, device=device)

    def watch(self, forward: Forward) -> Forward:
        """The same function; each batch goes through ``other`` as well."""

        def watched(batch: Batch) -> tuple[Tensor, list[Routing]]:
            nll_BS, routings = forward(batch)
            self.add(batch, routings, self.other(batch)[1])
            return nll_BS, routings

        return watched

    @torch.no_grad()
    def add(self, batch: Batch, routings: Sequence[Routing], others: Sequence[Routing]) -> None:
        """Adds one batch of this rank."""
        device = self.read.device
        real_T = ~batch.padding_BS.to(device).t().reshape(-1)
        self.read += real_T.sum()
        for layer, (one, two) in enumerate(zip(routings, others, strict=True)):
            a_TE, b_TE = (r.selected_TE.to(device) & real_T[:, None] for r in (one, two))
            self.loads_2LE[0, layer] += a_TE.sum(0)
            self.loads_2LE[1, layer] += b_TE.sum(0)
            common_T, either_T = (a_TE & b_TE).sum(1), (a_TE | b_TE).sum(1)
            self.common_L[layer] += common_T.sum()
            self.slots_L[layer] += a_TE.sum() + b_TE.sum()
            self.tokens_L[layer] += (either_T > 0).sum()
            self.jaccard_L[layer] += (common_T.double() / either_T.clamp(min=1)).sum()

    def to_json(self, layers: Sequence[int], reduce: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """By layer (``layers`` are their numbers) and the mean over them; None where there was nothing to compare.
        Every rank must call it."""
        counts = [self.common_L, self.slots_L, self.tokens_L, self.read, self.loads_2LE]
        flat = reduce(torch.cat([count.reshape(-1) for count in counts])).cpu()
        parts = flat.split([count.numel() for count in counts])
        common_L, slots_L, tokens_L, [read] = (part.tolist() for part in parts[:4])
        jaccard_L = reduce(self.jaccard_L).cpu().tolist()
        chance_L = parts[4].view(self.loads_2LE.shape).double().prod(0).sum(1).tolist()
        rows = [
            {
                "layer": number,
                "same_slots": 2 * common_L[i] / slots_L[i] if slots_L[i] else None,
                "jaccard": jaccard_L[i] / tokens_L[i] if tokens_L[i] else None,
                "same_by_chance": 2 * chance_L[i] / (read * slots_L[i]) if slots_L[i] else None,
            }
            for i, number in enumerate(layers)
        ]
        names = ("same_slots", "jaccard", "same_by_chance")
        columns = {name: [float(v) for row in rows if (v := row[name]) is not None] for name in names}
        return {"layers": rows, "mean": {name: sum(v) / len(v) for name, v in columns.items() if v}}
