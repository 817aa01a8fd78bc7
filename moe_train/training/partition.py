"""Which parameters each rank holds, and over how many ranks ZeRO shards them: arithmetic, nothing is allocated.

Three kinds. ``whole``: the same on every rank (embedding, head, norms, gates). ``divided``: matrices that tensor
parallelism divides (attention, feed-forward parts, shared experts). ``experts``: spread over the expert-parallel ranks.
The replicas of a divided matrix are on the data-parallel ranks, those of an expert on every EP-th rank; whole tensors
are replicated on all.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from moe_train.training.account import Parameters, multi_token_parameters, parameters
from moe_train.training.run_config import RunConfig

Kind = Literal["whole", "divided", "experts"]


@dataclass(frozen=True)
class Part:
    """Parameters of one kind on one rank."""

    kind: Kind
    elements: int
    """Before ZeRO."""
    replicas: int
    """Ranks that hold the same, over which ZeRO shards them."""

    @property
    def shard(self) -> float:
        """Elements that are left of it where ZeRO shards them."""
        return self.elements / self.replicas


def parts(config: RunConfig, world_size: int) -> tuple[Part, ...]:
    """What each of ``world_size`` ranks holds, padding of the vocabulary and multi-token prediction included. Kinds
    without a parameter are left out."""
    return parts_of([parameters(config), multi_token_parameters(config)], config, world_size)


def parts_of(counted: list[Parameters], config: RunConfig, world_size: int) -> tuple[Part, ...]:
    """The same of parameters that were counted, of one layer for example."""
    tensor, expert = config.parallel.tensor, config.parallel.expert
    divided = sum(p.attention + p.dense_layers + p.shared_experts for p in counted)
    experts = sum(p.experts for p in counted)
    every = sum(p.total + p.vocab_padding for p in counted)
    found = (
        Part("whole", every - divided - experts, world_size),
        Part("divided", divided // tensor, world_size // tensor),
        Part("experts", experts // expert, max(1, world_size // expert)),
    )
    return tuple(part for part in found if part.elements)


def units(config: RunConfig, world_size: int) -> list[tuple[bool, tuple[Part, ...]]]:
    """The model in the order of the forward pass: embedding, each layer, head; and whether it is a layer, which
    recomputation runs again. Together they are the whole model."""
    found = _units(config)
    # Most layers are alike.
    held = {counted: parts_of([counted], config, world_size) for counted in {counted for _, counted in found}}
    return [(layer, held[counted]) for layer, counted in found]


def _units(config: RunConfig) -> list[tuple[bool, Parameters]]:
    model, counted = config.model, parameters(config)
    hidden, padding = model.hidden_size, counted.vocab_padding
    matrices = 1 if model.tie_embeddings else 2
    nothing = {field.name: 0 for field in fields(Parameters)}
    with_experts = set(_expert_layers(config))
    layers = []
    for number in range(model.num_layers):
        expert = number in with_experts
        own = {
            "attention": counted.attention // model.num_layers,
            "norms": (counted.norms - hidden) // model.num_layers,
            "gates": counted.gates // len(with_experts) if expert else 0,
            "shared_experts": counted.shared_experts // len(with_experts) if expert else 0,
            "experts": counted.experts // len(with_experts) if expert else 0,
            "dense_layers": 0 if expert else counted.dense_layers // (model.num_layers - len(with_experts)),
        }
        layers.append((True, Parameters(**{**nothing, **own})))
    further = [(True, multi_token_parameters(config))] * model.multi_token.layers
    embedding = Parameters(**{**nothing, "embedding": counted.embedding, "vocab_padding": padding // matrices})
    head = Parameters(
        **{**nothing, "head": counted.head, "norms": hidden, "vocab_padding": padding - padding // matrices}
    )
    return [(False, embedding), *layers, *further, (False, head)]


def _expert_layers(config: RunConfig) -> list[int]:
    from moe_train.model.families import evaluated_moe_layers

    return evaluated_moe_layers(config.model)
