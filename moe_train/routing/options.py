"""Options of routing: which gate, and the balancing pieces that combine with any gate."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Scope = Literal["micro_batch", "sequence", "global_batch"]


@dataclass(frozen=True)
class SwitchLossOptions:
    """E * sum_e f_e P_e, exactly 1 at perfect balance for every k (Fedus et al. 2021, eq. 4, f normalised by k)."""

    coefficient: float = 0.0
    scope: Scope = "sequence"


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
    z_loss: float = 0.0
    """Coefficient of mean(logsumexp(logits)^2)."""
    bias: BiasOptions = field(default_factory=BiasOptions)


@dataclass(frozen=True)
class RouterOptions:
    gate: str = "softmax_topk"
    """Name of a registered gate."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of that gate, validated by the dataclass that it registered."""
    balancing: BalancingOptions = field(default_factory=BalancingOptions)
    forced_balance: bool = False
    """Replace the selection by a round-robin one (for benchmarks); gate arithmetic still runs."""
