"""A configuration's size and layout in a few lines, for --dry-run and the start of a run."""

from __future__ import annotations

from pathlib import Path

from moe_train.training.account import active_parameters, flops_per_token, gate_facts, parameters
from moe_train.training.memory import memory_per_rank
from moe_train.training.run_config import RunConfig


def summary(config: RunConfig, world_size: int, run_dir: Path, device: str) -> str:
    """Parameters, FLOPs, memory per rank, layout and length, as aligned lines."""
    counted, flops, memory = parameters(config), flops_per_token(config), memory_per_rank(config, world_size, device)
    train, ep, dp = config.train, config.parallel.expert, config.data_parallel_size(world_size)
    experts, chosen = config.model.moe.num_experts, gate_facts(config).experts_per_token
    tokens = train.global_batch_size * config.data.sequence_length
    rows = [
        ("parameters", f"{counted.total:,} in total, {active_parameters(config):,} active (at most {chosen} of "
                       f"{experts} experts per token)"),
        ("", ", ".join(f"{name} {getattr(counted, field):,}" for name, field in (
            ("embedding", "embedding"), ("head", "head"), ("attention", "attention"), ("gates", "gates"),
            ("experts", "experts"), ("shared experts", "shared_experts"), ("norms", "norms")))),
        ("", f"and {counted.vocab_padding:,} that pad the vocabulary, not counted"),
        ("FLOPs per token", f"{flops.total / 1e6:,.1f} million, forward and backward (3 x forward)"),
        ("", "active parameters only, causal attention counted half, recomputation not counted"),
        ("memory per rank", f"{_bytes(memory.total)}: parameters {_bytes(memory.parameters)}, gradients "
                            f"{_bytes(memory.gradients)}, optimizer {_bytes(memory.optimizer)}, activations about "
                            f"{_bytes(memory.activations)}"),
        ("", f"ZeRO stage {train.zero_stage}, {train.precision}; libraries and buffers come on top"),
        ("layout", f"{world_size} process{'es' if world_size > 1 else ''} on {device}: EP {ep} "
                   f"({experts // ep} experts each), DP {dp}, expert DP {max(1, dp // ep)}, TP 1"),
        ("step", f"{train.global_batch_size} sequences of {config.data.sequence_length} tokens = {tokens:,} tokens: "
                 f"micro-batch {train.micro_batch_size}, accumulation {config.accumulation_steps(world_size)}"),
        ("run", f"{train.steps:,} steps, {train.steps * tokens:,} tokens, "
                f"{flops.total * train.steps * tokens:.3g} FLOPs, into {run_dir}"),
    ]  # fmt: skip
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
