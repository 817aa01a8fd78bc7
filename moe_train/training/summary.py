"""A configuration's size and layout in a few lines, for --dry-run and the start of a run."""

from __future__ import annotations

from pathlib import Path

from moe_train.model.families import family_of, head_width
from moe_train.model.options import ModelOptions
from moe_train.training.account import (
    active_parameters,
    flops_per_token,
    gate_facts,
    multi_token_parameters,
    parameters,
)
from moe_train.training.buffers import buffers_per_rank
from moe_train.training.layer_account import dense_layers, expert_layers
from moe_train.training.memory import Memory, host_memory_per_rank, memory_per_rank
from moe_train.training.run_config import RunConfig

_KINDS = (
    "embedding",
    "head",
    "attention",
    "dense_layers",
    "gates",
    "experts",
    "shared_experts",
    "norms",
)


def summary(config: RunConfig, world_size: int, run_dir: Path, device: str) -> str:
    """Model, parameters, FLOPs, memory per rank, layout and length, as aligned lines."""
    counted, flops, memory = parameters(config), flops_per_token(config), memory_per_rank(config, world_size, device)
    train, tokens = config.train, config.train.global_batch_size * config.data.sequence_length
    rows = [
        ("model", f"{config.model.family}: {_layers(config.model)}"),
        ("", _attention(config.model)),
        ("parameters", _parameters(config)),
        ("", ", ".join(f"{kind.replace('_', ' ')} {count:,}" for kind in _KINDS if (count := getattr(counted, kind)))),
        *_multi_token(config),
        ("", f"and {counted.vocab_padding:,} that pad the vocabulary, not counted"),
        ("FLOPs per token", f"{flops.total / 1e6:,.1f} million, forward and backward (3 x forward)"),
        ("", f"active parameters{_only(config.model)}, causal attention counted half, recomputation not counted"),
        ("memory per rank", f"{_bytes(memory.total)}: parameters {_bytes(memory.parameters)}, gradients "
                            f"{_bytes(memory.gradients)}, optimizer {_bytes(memory.optimizer)}, activations about "
                            f"{_bytes(memory.activations)}"),
        *_worst_case(config, memory),
        *_host(config, world_size, device),
        ("", f"ZeRO stage {train.zero_stage}, {train.precision}; DeepSpeed's buffers, at most "
             f"{_bytes(buffers_per_rank(config, world_size).total)}, and libraries come on top"),
        ("layout", f"{world_size} process{'es' if world_size > 1 else ''} on {device}: {_layout(config, world_size)}"),
        ("step", f"{train.global_batch_size} sequences of {config.data.sequence_length} tokens = {tokens:,} tokens: "
                 f"micro-batch {train.micro_batch_size}, accumulation {config.accumulation_steps(world_size)}"),
        ("run", f"{train.steps:,} steps, {train.steps * tokens:,} tokens, "
                f"{flops.total * train.steps * tokens:.3g} FLOPs, into {run_dir}"),
    ]  # fmt: skip
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _layers(model: ModelOptions) -> str:
    moe, dense, with_experts = model.moe, dense_layers(model), expert_layers(model)
    kinds = []
    if dense:
        kinds.append(f"{dense if with_experts else 'all'} dense of width {model.ffn_hidden_size:,}")
    if with_experts:
        shared = f" and a shared one of {moe.shared_expert_hidden_size:,}" if moe.shared_expert_hidden_size else ""
        number = with_experts if dense else "all"
        kinds.append(f"{number} with {moe.num_experts} experts of width {moe.expert_hidden_size:,}{shared}")
    return f"{model.num_layers} layers of hidden size {model.hidden_size:,}: {', '.join(kinds)}"


def _attention(model: ModelOptions) -> str:
    heads, latent = model.num_attention_heads, model.latent_attention
    if latent is None:
        return f"attention of {heads} heads of {head_width(model)}, {model.num_key_value_heads} of keys and values"
    ranks = f"keys and values through {latent.key_value_rank}"
    if latent.query_rank is not None:
        ranks = f"queries through {latent.query_rank}, {ranks}"
    width = f"{latent.nope_head_dim} + {latent.rope_head_dim}"
    return f"latent attention of {heads} heads of {width}, values of {latent.value_head_dim}; {ranks}"


def _parameters(config: RunConfig) -> str:
    total, active = parameters(config).total, active_parameters(config)
    if not family_of(config.model).experts:
        return f"{total:,} in total, all of them active"
    gate, experts = gate_facts(config), config.model.moe.num_experts
    chosen = f"{gate.counted_k:g} of {experts} experts per token"
    if gate.mean_k is None:
        chosen = f"at most {chosen}"
    elif gate.mean_k < gate.experts_per_token:
        chosen += f" on average, at most {gate.experts_per_token}"
    return f"{total:,} in total, {active:,} active ({chosen})"


def _worst_case(config: RunConfig, memory: Memory) -> list[tuple[str, str]]:
    if not memory.further_worst_case:
        return []
    bound = "a capacity (router.capacity.factor) bounds this"
    if config.router.capacity.factor is not None:
        bound = f"no more, as router.capacity.factor is {config.router.capacity.factor:g}"
    return [("", f"at worst {_bytes(memory.further_worst_case)} more, where all tokens choose the experts of one rank; "
                 f"{bound}")]  # fmt: skip


def _host(config: RunConfig, world_size: int, device: str) -> list[tuple[str, str]]:
    host = host_memory_per_rank(config, world_size, device)
    kinds = {
        "the offloaded optimizer": host.optimizer,
        "the copy that is saved in the background (checkpoint.asynchronous)": host.save_copy,
    }
    return [("", f"and {_bytes(size)} of host memory for {name}") for name, size in kinds.items() if size]


def _multi_token(config: RunConfig) -> list[tuple[str, str]]:
    if not config.model.multi_token.layers:
        return []
    return [("", f"and {multi_token_parameters(config).total:,} of the layer of multi-token prediction, not counted")]


def _only(model: ModelOptions) -> str:
    return " and multi-token prediction" if model.multi_token.layers else " only"


def _layout(config: RunConfig, world_size: int) -> str:
    ep, dp, tp = config.parallel.expert, config.data_parallel_size(world_size), config.parallel.tensor
    if not family_of(config.model).experts:
        return f"DP {dp}, TP {tp}"
    experts, replicas = config.model.moe.num_experts // ep, max(1, world_size // ep)
    return f"EP {ep} ({experts} experts each), DP {dp}, expert DP {replicas}, TP {tp}"


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
