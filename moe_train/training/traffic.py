"""Bytes that one rank sends in an optimizer step, by arithmetic, for each collective of training.

``payload`` is what the collective works on: the whole tensor of an all-reduce, a reduce-scatter (before it) and an
all-gather (after it), the rows of an all-to-all. ``sent`` is what leaves the rank by the usual ring algorithms among n
ranks: (n - 1) / n of the payload, twice for an all-reduce (Patarasuk and Yuan 2009). Experts are taken to be balanced,
and no token to be padding. Left out is what is small: counters of the step's tokens, statistics of gates, norms.

What DeepSpeed 0.19.8 does, as tests/distributed/test_traffic.py counts it:
- ZeRO 1 reduces gradients once per step and ZeRO 2 in each micro-batch, both by an all-reduce in float32; after the
  step the parameters are gathered in their own type.
- ZeRO 3 reduces by a reduce-scatter in float32 in each micro-batch. Parameters are gathered for the forward pass, and
  again for the backward pass (for layers also before recomputation) unless they are used again within
  ``stage3_max_reuse_distance`` elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from moe_train.model.families import family_of
from moe_train.training.layer_account import dense_layers, expert_layers
from moe_train.training.memory import FLOAT32, rows_per_token, weight_bytes
from moe_train.training.partition import Kind, parts, units
from moe_train.training.run_config import RunConfig

INT64 = 8
MAX_REUSE_DISTANCE = 10**9
"""DeepSpeed's default of stage3_max_reuse_distance, in elements."""
Operation = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
Group = Literal["data", "expert", "expert_data", "tensor"]
_GROUP_OF: dict[Kind, Group] = {"whole": "data", "divided": "data", "experts": "expert_data"}


@dataclass(frozen=True)
class Traffic:
    """All collectives of one purpose in a step."""

    name: str
    operation: Operation
    group: Group
    ranks: int
    payload: float
    """Bytes."""

    @property
    def sent(self) -> float:
        """Bytes that leave this rank."""
        times = 2 if self.operation == "all_reduce" else 1
        return times * self.payload * (self.ranks - 1) / self.ranks


def traffic(config: RunConfig, world_size: int) -> list[Traffic]:
    """Of one rank and one step; collectives of a single rank are left out."""
    found = [*_experts(config, world_size), *_zero(config, world_size), *_tensor(config, world_size)]
    return [item for item in found if item.ranks > 1 and item.payload]


def zero_keys(config: RunConfig) -> dict[str, Any]:
    """DeepSpeed's own keys of ZeRO that the configuration passes on."""
    section = config.deepspeed.get("zero_optimization", {})
    return section if isinstance(section, dict) else {}


def _experts(config: RunConfig, world_size: int) -> list[Traffic]:
    ranks, model = config.parallel.expert, config.model
    layers = expert_layers(model) + model.multi_token.layers
    passes = config.accumulation_steps(world_size) * layers
    forward, backward = (2, 1) if config.train.recompute else (1, 1)
    tokens = config.train.micro_batch_size * config.data.sequence_length / config.parallel.tensor
    rows = tokens * rows_per_token(config, worst=False)
    # To the experts and back; the combine weights of the rows, in float32, one way.
    tensors = rows * model.hidden_size * weight_bytes(config)
    both = forward + backward
    counts = 0 if config.router.capacity.pad else forward * INT64 * model.moe.num_experts * ranks
    return [
        Traffic("expert rows", "all_to_all", "expert", ranks, passes * both * 2 * tensors),
        Traffic("expert weights", "all_to_all", "expert", ranks, passes * both * rows * FLOAT32),
        Traffic("expert counts", "all_gather", "expert", ranks, passes * counts),
    ]


def _zero(config: RunConfig, world_size: int) -> list[Traffic]:
    stage, accumulation = config.train.zero_stage, config.accumulation_steps(world_size)
    found: list[Traffic] = []
    for part in parts(config, world_size):
        group, ranks = _GROUP_OF[part.kind], part.replicas
        names = (f"gradients ({part.kind})", f"parameters ({part.kind})")
        times = 1 if stage == 1 else accumulation
        operation: Operation = "all_reduce" if stage < 3 else "reduce_scatter"
        found.append(Traffic(names[0], operation, group, ranks, times * FLOAT32 * part.elements))
        gathered: float = (
            part.elements if stage < 3 else accumulation * gathered_elements(config, world_size, part.kind)
        )
        found.append(Traffic(names[1], "all_gather", group, ranks, weight_bytes(config) * gathered))
    return found


def gathered_elements(config: RunConfig, world_size: int, kind: Kind) -> int:
    """Elements of one kind that ZeRO 3 gathers in a micro-batch.

    DeepSpeed keeps what is used again within the reuse distance, counted in elements of the parameters used in
    between; here by whole layers, which is exact where all or none are kept. Tensors below
    ``stage3_param_persistence_threshold``, which stay on every rank and are gathered once per step, are not told apart.
    """
    distance = int(float(zero_keys(config).get("stage3_max_reuse_distance", MAX_REUSE_DISTANCE)))
    # What is used between a unit's forward and its backward pass.
    between, total = 0, 0
    for layer, unit in reversed(units(config, world_size)):
        own, mine = sum(p.elements for p in unit), sum(p.elements for p in unit if p.kind == kind)
        again = config.train.recompute and layer
        total += mine * (1 + (between >= distance) + (again and 2 * own >= distance))
        between += own * (3 if again else 2)
    return total


def _tensor(config: RunConfig, world_size: int) -> list[Traffic]:
    """Sequence parallelism (Korthikanti et al. 2022): what enters a divided matrix is gathered over the positions, what
    leaves it is summed and scattered; the backward pass does the opposite."""
    model, ranks = config.model, config.parallel.tensor
    layers, experts = model.num_layers + model.multi_token.layers, expert_layers(model) + model.multi_token.layers
    shared = family_of(model).experts and model.moe.shared_expert_hidden_size is not None
    forward = 2 if config.train.recompute else 1
    # Attention and feed-forward part or gate gather; attention, feed-forward part and shared expert scatter.
    gathers, scatters = layers + dense_layers(model) + experts, layers + dense_layers(model) + shared * experts
    # For the gradients of its weight, attention's projection gathers its input again.
    gathered = forward * gathers + scatters + layers
    scattered = forward * scatters + gathers
    tokens = config.train.micro_batch_size * config.data.sequence_length
    size = config.accumulation_steps(world_size) * tokens * model.hidden_size * weight_bytes(config)
    return [
        Traffic("sequence parallelism", "all_gather", "tensor", ranks, gathered * size),
        Traffic("sequence parallelism", "reduce_scatter", "tensor", ranks, scattered * size),
    ]
