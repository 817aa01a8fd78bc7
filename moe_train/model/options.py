"""Options of the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class InitOptions:
    """Initial weights: normal(0, std), a function of (seed, global name, global expert index) only."""

    std: float = 0.02
    scaled_residual: bool = True
    """Divide std by sqrt(2 * num_layers) for the matrices that write into the residual stream."""


@dataclass(frozen=True)
class MoEOptions:
    num_experts: int = 8
    expert_hidden_size: int = 128
    """Inner width of one expert."""
    shared_expert_hidden_size: int | None = None
    """Inner width of the shared expert that every token passes; null for none."""
    experts: Literal["grouped", "reference"] = "grouped"
    """grouped: one grouped matrix multiplication; reference: a plain loop over the experts."""


@dataclass(frozen=True)
class ModelOptions:
    family: Literal["qwen3_moe"] = "qwen3_moe"
    num_layers: int = 4
    hidden_size: int = 256
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int | None = None
    """Width of one head; null means hidden_size / num_attention_heads."""
    vocab_size: int = 8192
    """True size of the vocabulary; must hold every id of the tokenizer."""
    vocab_multiple: int = 64
    """The embedding is padded up to a multiple of this; padding rows are masked, not counted and not exported."""
    tie_embeddings: bool = False
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    moe: MoEOptions = field(default_factory=MoEOptions)
    init: InitOptions = field(default_factory=InitOptions)
    loss_chunk_tokens: int | None = None
    """Tokens whose logits exist at one time; null chooses by device and vocabulary."""
