"""Memory of one rank by arithmetic: what ZeRO leaves of parameters, gradients and optimizer, and an estimate of
activations. DeepSpeed's buffers (training/buffers.py), fragmentation and the libraries themselves come on top."""

from __future__ import annotations

from dataclasses import dataclass, fields

from moe_train.model.families import family_of
from moe_train.routing.capacity import slots_per_expert
from moe_train.training.account import gate_facts
from moe_train.training.layer_account import attention_activations, dense_layers, expert_layers
from moe_train.training.partition import parts
from moe_train.training.run_config import RunConfig

FLOAT32 = 4


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    parameters: int
    gradients: int
    optimizer: int
    """Moments, and the float32 masters that the optimizer steps."""
    activations: int
    """An estimate for one micro-batch with balanced experts: what autograd keeps for the backward pass, and the logits
    of one chunk."""
    further_worst_case: int
    """What activations need more, not in ``total``, where all tokens of the expert-parallel group choose experts of one
    rank, as far as a capacity lets them. 0 without expert parallelism: there each slot has its row anyway."""

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self) if f.name != "further_worst_case")


@dataclass(frozen=True)
class HostMemory:
    """Bytes of host memory of one rank, besides what ``Memory`` counts: on a processor they come on top of it."""

    optimizer: int
    """An offloaded one: masters, moments, the gradients that it reads; under ZeRO 1 and 2 the new parameters on their
    way back, under ZeRO 3 gradients of earlier micro-batches."""
    save_copy: int
    """What background saves write from: masters and moments, wherever they lie. It is there from the first save on. A
    bound where they lie on a GPU: torch makes pinned memory in powers of two."""

    @property
    def total(self) -> int:
        return self.optimizer + self.save_copy


def memory_per_rank(config: RunConfig, world_size: int, device: str = "cpu") -> Memory:
    """Bytes per rank, on its device; ``host_memory_per_rank`` is what it takes of the host's."""
    stage, offload = config.train.zero_stage, config.train.offload_optimizer == "cpu"
    held = parts(config, world_size)
    whole, shard = sum(part.elements for part in held), sum(part.shard for part in held)
    # Accumulated in float32 whatever the precision. Offload leaves the shards of ZeRO 3 in host memory.
    gradients = {1: whole, 2: shard, 3: 0 if offload else shard}[stage]
    activations, at_worst = (_activations(config, weight_bytes(config), device, worst=worst) for worst in (False, True))
    return Memory(
        parameters=int(weight_bytes(config) * (shard if stage == 3 else whole)),
        gradients=int(FLOAT32 * gradients),
        optimizer=0 if offload else int(_optimizer_bytes(config) * shard),
        activations=activations,
        further_worst_case=at_worst - activations,
    )


def host_memory_per_rank(config: RunConfig, world_size: int, device: str = "cpu") -> HostMemory:
    """Bytes per rank that trains on ``device``."""
    shard = sum(part.shard for part in parts(config, world_size))
    way = weight_bytes(config) if config.train.zero_stage < 3 else FLOAT32
    offload, copied = config.train.offload_optimizer == "cpu", config.checkpoint.asynchronous
    rounding = 2 if device == "cuda" and not offload else 1
    return HostMemory(
        optimizer=int((_optimizer_bytes(config) + FLOAT32 + way) * shard) if offload else 0,
        save_copy=int(rounding * _optimizer_bytes(config) * shard) if copied else 0,
    )


def weight_bytes(config: RunConfig) -> int:
    """Of one parameter as the model computes with it."""
    return FLOAT32 if config.train.precision == "float32" else 2


def _optimizer_bytes(config: RunConfig) -> int:
    """Master and moments of one parameter."""
    return FLOAT32 + (2 * FLOAT32 if config.optimizer.name == "adamw" else 0)


def rows_per_token(config: RunConfig, *, worst: bool) -> float:
    """Rows that the experts of one rank compute for each token of its own micro-batch, with balanced experts or at
    worst."""
    ep, experts, capacity = config.parallel.expert, config.model.moe.num_experts, config.router.capacity
    k = gate_facts(config).experts_per_token
    rows = float(ep * min(k, experts // ep) if worst else k)
    if capacity.factor is None:
        return rows
    pools, tokens = config.train.micro_batch_size, config.data.sequence_length
    if capacity.pool == "micro_batch":
        pools, tokens = 1, pools * tokens
    # From each rank of the group to each of its experts; all together as many as all experts have places.
    places = slots_per_expert(capacity, capacity.factor, tokens, k, experts) * experts / tokens
    if capacity.pad:
        return places
    # On one rank a slot that was dropped keeps its row.
    return min(rows, places) if ep > 1 else rows


def _activations(config: RunConfig, item: int, device: str, *, worst: bool) -> int:
    model = config.model
    # Those of this rank: with tensor parallelism its positions, or its heads of all positions.
    tokens = config.train.micro_batch_size * config.data.sequence_length // config.parallel.tensor
    hidden = model.hidden_size
    # What comes into the norm and out of it, twice.
    attention = item * (4 * hidden + attention_activations(model))
    dense, experts = attention + item * _feed_forward(model.ffn_hidden_size), attention + _experts(config, item, worst)
    with_experts = expert_layers(model) + model.multi_token.layers
    if config.train.recompute:
        # Inputs of all layers, and the largest layer.
        largest = max(dense if dense_layers(model) else 0, experts if with_experts else 0)
        layers = tokens * (largest + (dense_layers(model) + with_experts) * item * hidden)
    else:
        layers = tokens * (dense_layers(model) * dense + with_experts * experts)
    # Each pass of the head keeps what its norm saw, and from the forward pass on the gradients of its input and its
    # weight. Multi-token prediction adds one, with two norms and what they give side by side before it.
    passes = 1 + model.multi_token.layers
    head = passes * (2 * tokens * hidden * item + model.vocab_size * hidden * FLOAT32)
    return int(layers + head + logits_bytes(config, device) + model.multi_token.layers * tokens * item * 4 * hidden)


def logits_bytes(config: RunConfig, device: str) -> int:
    """Of the logits that exist at one time, in float32; they are among the activations."""
    from moe_train.model.head import default_chunk_tokens

    model = config.model
    tokens = config.train.micro_batch_size * config.data.sequence_length // config.parallel.tensor
    chunk = min(tokens, model.loss_chunk_tokens or default_chunk_tokens(model.vocab_size, device))
    return chunk * model.vocab_size * FLOAT32


def _feed_forward(width: int | None) -> int:
    """Elements per token of SwiGLU: gate and up projection, silu of the gate, and the product."""
    return 4 * (width or 0)


def _experts(config: RunConfig, item: int, worst: bool) -> float:
    """Bytes per token of one layer's gate and experts."""
    model, moe = config.model, config.model.moe
    if not family_of(model).experts:
        return 0
    # The row of a routed expert and its SwiGLU, whose product exists before and after the combine weight.
    row = model.hidden_size + _feed_forward(moe.expert_hidden_size) + moe.expert_hidden_size
    elements = rows_per_token(config, worst=worst) * row + _feed_forward(moe.shared_expert_hidden_size)
    # Three float32 rows of the gate, which reads its input in float32; it sees all positions of tensor parallelism.
    tensor = config.parallel.tensor
    copied = 0 if item == FLOAT32 else model.hidden_size
    gathered = model.hidden_size * item * (tensor > 1)
    return item * elements + tensor * (FLOAT32 * (3 * moe.num_experts + copied) + gathered)
