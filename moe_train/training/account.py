"""Parameters, FLOPs and memory of a configuration by arithmetic: pure functions of RunConfig, nothing is allocated.

Conventions, wherever these figures are shown:
- Parameters count the true vocabulary; the rows that pad the embedding are given apart.
- FLOPs are those of the model, forward + backward = 3 x forward, a multiply-add is two; recomputation is not counted.
  Causal attention counts half of the square (S/2 keys per token). Look-ups, norms and element-wise work are left out.
- "Active" counts the experts that one token passes: k, or the gate's bound on k where k varies.
Formulas: Hoffmann et al. 2022 (appendix F) with grouped keys and values, SwiGLU experts and half of the square.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from moe_train.model.options import ModelOptions
from moe_train.training.run_config import RunConfig


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters by kind, over the whole model."""

    embedding: int
    head: int
    """0 where the head shares the embedding's weight."""
    attention: int
    norms: int
    gates: int
    shared_experts: int
    experts: int
    vocab_padding: int
    """Rows of embedding and head beyond the true vocabulary, not in ``total``."""

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self)) - self.vocab_padding

    @property
    def dense(self) -> int:
        """Everything that is allocated on every expert-parallel rank alike, padding included."""
        return self.total - self.experts + self.vocab_padding


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs of one token by kind."""

    attention_projections: float
    attention_scores: float
    gates: float
    shared_experts: float
    experts: float
    head: float

    @property
    def forward(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))

    @property
    def total(self) -> float:
        """Forward and backward."""
        return 3 * self.forward


@dataclass(frozen=True)
class GateFacts:
    """What a gate of one layer amounts to; found by building it on torch's meta device."""

    parameters: int
    matrices: int
    """Elements of its matrices, each used once per token."""
    experts_per_token: int
    """k, or its upper bound where k varies."""


def gate_facts(config: RunConfig) -> GateFacts:
    """Facts about one layer's gate, whatever gate is configured."""
    import torch

    from moe_train.routing import build_gate

    experts = config.model.moe.num_experts
    with torch.device("meta"):
        gate = build_gate(config.router.gate, config.router.options, config.model.hidden_size, experts)
    shapes = [tuple(p.shape) for p in gate.parameters()]
    return GateFacts(
        parameters=sum(math.prod(shape) for shape in shapes),
        matrices=sum(math.prod(shape) for shape in shapes if len(shape) > 1),
        experts_per_token=min(gate.max_k or experts, experts),
    )


def parameters(config: RunConfig) -> Parameters:
    """Parameters of the whole model by kind."""
    model, moe = config.model, config.model.moe
    hidden, layers, head_dim = model.hidden_size, model.num_layers, head_width(model)
    query, key_value = model.num_attention_heads * head_dim, model.num_key_value_heads * head_dim
    padding = math.ceil(model.vocab_size / model.vocab_multiple) * model.vocab_multiple - model.vocab_size
    matrices = 1 if model.tie_embeddings else 2
    return Parameters(
        embedding=model.vocab_size * hidden,
        head=0 if model.tie_embeddings else model.vocab_size * hidden,
        # Query, output; key, value.
        attention=layers * (2 * hidden * query + 2 * hidden * key_value),
        # Two norms of the hidden state and those of query and key per layer, and the last one.
        norms=layers * (2 * hidden + 2 * head_dim) + hidden,
        gates=layers * gate_facts(config).parameters,
        shared_experts=layers * 3 * hidden * (moe.shared_expert_hidden_size or 0),
        experts=layers * moe.num_experts * 3 * hidden * moe.expert_hidden_size,
        vocab_padding=matrices * padding * hidden,
    )


def active_parameters(config: RunConfig) -> int:
    """Parameters that one token passes: everything but the experts that it does not choose."""
    counted = parameters(config)
    chosen = counted.experts // config.model.moe.num_experts * gate_facts(config).experts_per_token
    return counted.total - counted.experts + chosen


def flops_per_token(config: RunConfig) -> Flops:
    """Model FLOPs of one token at the configured sequence length, averaged over the positions of a sequence."""
    model, moe = config.model, config.model.moe
    counted, gate, layers = parameters(config), gate_facts(config), config.model.num_layers
    width = model.num_attention_heads * head_width(model)
    return Flops(
        attention_projections=2 * counted.attention,
        # Scores and weighted sum: 2 * width each per key, S / 2 keys.
        attention_scores=layers * 2 * 2 * width * config.data.sequence_length / 2,
        gates=2 * layers * gate.matrices,
        shared_experts=2 * counted.shared_experts,
        experts=2 * layers * gate.experts_per_token * 3 * model.hidden_size * moe.expert_hidden_size,
        head=2 * model.vocab_size * model.hidden_size,
    )


def head_width(model: ModelOptions) -> int:
    """Width of one attention head."""
    return model.head_dim or model.hidden_size // model.num_attention_heads
