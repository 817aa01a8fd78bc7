"""What the reference model is, in plain data. Nothing in this folder imports the package under test."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Scaling:
    """Of rotary frequencies. kind: linear, llama3 or yarn."""

    kind: str
    factor: float
    original_length: int = 4096
    low: float = 1.0
    high: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None


@dataclass(frozen=True)
class Latent:
    """Widths of multi-head latent attention."""

    query_rank: int | None
    rank: int
    nope: int
    rope: int
    value: int
    interleaved: bool


@dataclass(frozen=True)
class Geometry:
    """A pre-norm decoder with RMSNorm, SwiGLU and rotary positions."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    """True size; rows of the head beyond it take no part."""
    experts: int
    shared: bool = False
    tied: bool = False
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    query_key_norm: str = "head"
    """head, all or none."""
    clip: float | None = None
    scaling: Scaling | None = None
    latent: Latent | None = None
    moe_layers: tuple[int, ...] | None = None
    """Layers with experts; None for all. That of multi-token prediction always has them."""
    multi_token: float | None = None
    """Coefficient of its loss; None for none."""

    def has_experts(self, layer: int) -> bool:
        return self.moe_layers is None or layer in self.moe_layers

    @property
    def gates(self) -> int:
        """Number of layers with experts, that of multi-token prediction included."""
        return sum(self.has_experts(layer) for layer in range(self.layers)) + (self.multi_token is not None)


@dataclass(frozen=True)
class Router:
    """One gate and what balances it. A loss with a coefficient of None is left out."""

    gate: str
    options: dict[str, Any] = field(default_factory=dict)
    switch: float | None = None
    switch_scope: str = "sequence"
    z: float | None = None
    bias_rate: float = 0.0
    bias_rule: str = "sign"
    bias_target: list[float] | None = None
    """Shares of the load, in any unit; None for equal ones."""
    importance: float | None = None
    importance_scope: str = "sequence"
    importance_of: str = "probabilities"
    capacity: float | None = None
    """Factor, per sequence; None where nothing is dropped."""
    drop: str = "position"
    minimum: int = 1
