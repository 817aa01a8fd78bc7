"""Options of routing: which gate, and the balancing pieces that combine with any gate."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from moe_train.routing.schedule import Ramp

Scope = Literal["micro_batch", "sequence", "global_batch"]
Pool = Literal["sequence", "micro_batch"]


@dataclass(frozen=True)
class SwitchLossOptions:
    """E * sum_e f_e P_e, exactly 1 at perfect balance for every k (Fedus et al. 2021, eq. 4, f normalised by k)."""

    coefficient: float | Ramp = 0.0
    scope: Scope = "sequence"


@dataclass(frozen=True)
class ImportanceLossOptions:
    """CV^2 of the experts' importance, 0 at perfect balance (Shazeer et al. 2017, eq. 6 and 7)."""

    coefficient: float | Ramp = 0.0
    scope: Scope = "sequence"
    of: Literal["probabilities", "weights"] = "probabilities"
    """What is summed over tokens: the probabilities of all experts, or the combine weights of the chosen ones."""


@dataclass(frozen=True)
class BiasOptions:
    """Selection bias without a loss, moved once per optimizer step (Wang et al. 2024)."""

    rate: float = 0.0
    """Step size; 0 switches the bias off."""
    rule: Literal["sign", "proportional"] = "sign"
    target_load: list[float] | None = None
    """Wanted share of the load for each expert, in any unit (divided by their sum); null means equal shares."""


@dataclass(frozen=True)
class BalancingOptions:
    switch_loss: SwitchLossOptions = field(default_factory=SwitchLossOptions)
    z_loss: float | Ramp = 0.0
    """Coefficient of mean(logsumexp(logits)^2)."""
    bias: BiasOptions = field(default_factory=BiasOptions)
    importance_loss: ImportanceLossOptions = field(default_factory=ImportanceLossOptions)
    exact: bool = False
    """For losses of scope global_batch, the gate's own too: a pass without gradient over all micro-batches of a step
    comes first, so that each sees the sums of the whole step. Costs about one more forward pass; none without
    accumulation, where a micro-batch sees them anyway."""


@dataclass(frozen=True)
class CapacityOptions:
    """At most C = max(minimum, ceil(factor * tokens * k / E)) tokens of a pool for each expert; what comes above is
    dropped (Lepikhin et al. 2020; Fedus et al. 2021, eq. 3)."""

    factor: float | None = None
    """In training; null: nothing is dropped."""
    evaluation_factor: float | None = None
    """In evaluation; null: nothing is dropped there."""
    drop: Literal["position", "probability"] = "position"
    """Who keeps a place: earlier tokens, or those with the larger probability, which later tokens can have."""
    pool: Pool = "sequence"
    """Tokens that compete for the places. sequence is equal under every layout, micro_batch at fixed contents."""
    minimum: int = 1
    pad: bool = False
    """In training every expert computes exactly its capacity, filled up with rows that add nothing: fixed shapes."""


@dataclass(frozen=True)
class RouterOptions:
    gate: str = "softmax_topk"
    """Name of a registered gate."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of that gate, validated by the dataclass that it registered."""
    balancing: BalancingOptions = field(default_factory=BalancingOptions)
    capacity: CapacityOptions = field(default_factory=CapacityOptions)
    forced_balance: bool = False
    """Replace the selection by a round-robin one (for benchmarks); gate arithmetic still runs."""
