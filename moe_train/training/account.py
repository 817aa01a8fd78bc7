"""Parameters, FLOPs and memory of a configuration by arithmetic: pure functions of RunConfig, nothing is allocated.

Conventions, wherever these figures are shown:
- Parameters count the true vocabulary; the rows that pad the embedding are given apart.
- FLOPs are those of the model, forward + backward = 3 x forward, a multiply-add is two; recomputation is not counted.
  Causal attention counts half of the square (S/2 keys per token). Look-ups, norms and element-wise work are left out.
- "Active" counts the experts that one token passes: k, or the mean k that the gate aims at, or its bound on k where the
  data decide. In a family without experts everything is active.
- Multi-token prediction is counted apart: parameters, total and active, are those of the model that is evaluated and
  published. FLOPs contain it, its pass of the shared head included, for all S positions, as training computes it.
Formulas: Hoffmann et al. 2022 (appendix F) with grouped keys and values, SwiGLU experts and half of the square; latent
attention as computed in training, with keys and values of all heads made from the latent (DeepSeek-V2, section 2.1).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, fields
from typing import Any

from moe_train.model.families import family_of
from moe_train.training.layer_account import (
    attention_matrices,
    attention_norms,
    dense_layers,
    expert_layers,
    score_width,
    swiglu,
)
from moe_train.training.run_config import RunConfig


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters by kind."""

    embedding: int
    head: int
    """0 where the head shares the embedding's weight."""
    attention: int
    norms: int
    gates: int
    dense_layers: int
    """Feed-forward parts of the layers without experts."""
    shared_experts: int
    experts: int
    multi_token_projection: int
    """Of embedding and hidden state onto one hidden state."""
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
    dense_layers: float
    shared_experts: float
    experts: float
    head: float
    multi_token: float
    """The layer of multi-token prediction, with its projection and its pass of the head."""

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
    products: int
    """Multiply-adds of one token in its matrix products, whether or not their matrices are trained."""
    experts_per_token: int
    """k, or its upper bound where k varies."""
    mean_k: float | None
    """k, or the mean that the gate aims at; None where the data decide."""

    @property
    def counted_k(self) -> float:
        """Experts per token that figures count with."""
        return self.experts_per_token if self.mean_k is None else self.mean_k


@dataclass(frozen=True)
class _GateKey:
    """What a gate is built from; options, which have no hash, count as they are written."""

    gate: str
    written: str
    hidden: int
    experts: int
    options: Any = field(compare=False)


def gate_facts(config: RunConfig) -> GateFacts:
    """Facts about one layer's gate, whatever gate is configured; zeros in a family without experts."""
    if not family_of(config.model).experts:
        return GateFacts(parameters=0, products=0, experts_per_token=0, mean_k=0.0)
    router, model = config.router, config.model
    options = router.options
    return _facts_of(_GateKey(router.gate, repr(options), model.hidden_size, model.moe.num_experts, options))


@functools.lru_cache(maxsize=64)
def _facts_of(key: _GateKey) -> GateFacts:
    import torch

    from moe_train.routing import build_gate

    experts = key.experts
    with torch.device("meta"):
        gate = build_gate(key.gate, key.options, key.hidden, experts)
    bound = min(gate.max_k or experts, experts)
    return GateFacts(
        parameters=sum(p.numel() for p in gate.parameters()),
        products=gate.products_per_token(),
        experts_per_token=bound,
        mean_k=gate.mean_k,
    )


def parameters(config: RunConfig) -> Parameters:
    """Parameters of the whole model by kind, without multi-token prediction."""
    model, moe = config.model, config.model.moe
    hidden, layers, with_experts = model.hidden_size, model.num_layers, expert_layers(model)
    padding = math.ceil(model.vocab_size / model.vocab_multiple) * model.vocab_multiple - model.vocab_size
    matrices = 1 if model.tie_embeddings else 2
    return Parameters(
        embedding=model.vocab_size * hidden,
        head=0 if model.tie_embeddings else model.vocab_size * hidden,
        attention=layers * attention_matrices(model),
        # Two of the hidden state and those inside attention per layer, and the last one.
        norms=layers * (2 * hidden + attention_norms(model)) + hidden,
        gates=with_experts * gate_facts(config).parameters,
        dense_layers=dense_layers(model) * swiglu(hidden, model.ffn_hidden_size),
        shared_experts=with_experts * swiglu(hidden, moe.shared_expert_hidden_size),
        experts=with_experts * moe.num_experts * swiglu(hidden, moe.expert_hidden_size),
        multi_token_projection=0,
        vocab_padding=matrices * padding * hidden,
    )


def multi_token_parameters(config: RunConfig) -> Parameters:
    """Those of multi-token prediction, which shares embedding and head; zeros without it."""
    model, moe, layers = config.model, config.model.moe, config.model.multi_token.layers
    hidden = model.hidden_size
    return Parameters(
        embedding=0,
        head=0,
        attention=layers * attention_matrices(model),
        # As in any layer, and one of the embedding, one of the hidden state, and a last one.
        norms=layers * (2 * hidden + attention_norms(model) + 3 * hidden),
        gates=layers * gate_facts(config).parameters,
        dense_layers=0,
        shared_experts=layers * swiglu(hidden, moe.shared_expert_hidden_size),
        experts=layers * moe.num_experts * swiglu(hidden, moe.expert_hidden_size),
        multi_token_projection=layers * 2 * hidden * hidden,
        vocab_padding=0,
    )


def active_parameters(config: RunConfig, mean_k: float | None = None) -> int:
    """Parameters that one token passes: everything but the experts that it does not choose, without multi-token
    prediction.

    mean_k: experts per token where that was measured; None takes what the configuration says.
    """
    model, counted = config.model, parameters(config)
    expert = swiglu(model.hidden_size, model.moe.expert_hidden_size)
    chosen = gate_facts(config).counted_k if mean_k is None else mean_k
    return counted.total - counted.experts + round(expert_layers(model) * chosen * expert)


def flops_per_token(config: RunConfig) -> Flops:
    """Model FLOPs of one token at the configured sequence length, averaged over the positions of a sequence."""
    model = config.model
    counted, more, gate = parameters(config), multi_token_parameters(config), gate_facts(config)
    # S / 2 keys.
    scores = 2 * score_width(model) * config.data.sequence_length / 2
    experts = gate.counted_k * swiglu(model.hidden_size, model.moe.expert_hidden_size)
    head = 2 * model.vocab_size * model.hidden_size
    matrices = more.attention + more.multi_token_projection + gate.products + more.shared_experts + experts
    return Flops(
        attention_projections=2 * counted.attention,
        attention_scores=model.num_layers * scores,
        gates=2 * expert_layers(model) * gate.products,
        dense_layers=2 * counted.dense_layers,
        shared_experts=2 * counted.shared_experts,
        experts=2 * expert_layers(model) * experts,
        head=head,
        multi_token=model.multi_token.layers * (2 * matrices + scores + head),
    )


def flops_per_slot(config: RunConfig) -> float:
    """Forward and backward FLOPs of one routed expert for one token."""
    return 3 * 2 * swiglu(config.model.hidden_size, config.model.moe.expert_hidden_size)


def flops_without_experts(config: RunConfig) -> float:
    """Forward and backward FLOPs of one token in everything but the routed experts."""
    model = config.model
    layers = expert_layers(model) + model.multi_token.layers
    return flops_per_token(config).total - layers * gate_facts(config).counted_k * flops_per_slot(config)
