"""What the reference model is, in plain data. Nothing in this folder imports the package under test."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Geometry:
    """A Qwen3-MoE-like decoder: every layer is attention and then experts."""

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


@dataclass(frozen=True)
class Router:
    """One gate and what balances it. A coefficient of 0 switches a piece off."""

    gate: str
    options: dict[str, Any] = field(default_factory=dict)
    switch: float = 0.0
    switch_scope: str = "sequence"
    z: float = 0.0
    bias_rate: float = 0.0
    bias_rule: str = "sign"
    bias_target: list[float] | None = None
    """Shares of the load, in any unit; None for equal ones."""
