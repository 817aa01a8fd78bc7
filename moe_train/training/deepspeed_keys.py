"""Which keys of DeepSpeed's configuration this project sets itself; the rest passes through ``deepspeed:``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moe_train.config.errors import Problem, nearest

OWNED = {
    "train_batch_size": "use train.global_batch_size",
    "train_micro_batch_size_per_gpu": "use train.micro_batch_size",
    "gradient_accumulation_steps": "it follows from train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "use train.gradient_clipping",
    "gradient_predivide_factor": "losses are normalised by the tokens of the whole step",
    "prescale_gradients": "losses are normalised by the tokens of the whole step",
    "zero_optimization.stage": "use train.zero_stage",
    "zero_optimization.memory_efficient_linear": "it replaces torch's linear for the whole process and rounds twice",
    "zero_optimization.offload_optimizer": "use train.offload_optimizer",
    "zero_optimization.cpu_offload": "use train.offload_optimizer",
    "zero_optimization.cpu_offload_param": "parameters stay on the device; ZeRO 3 shards them (train.zero_stage=3)",
    "zero_optimization.offload_param": "parameters stay on the device; ZeRO 3 shards them (train.zero_stage=3)",
    "zero_allow_untested_optimizer": "use optimizer.name",
    "zero_force_ds_cpu_optimizer": "use optimizer.name and train.offload_optimizer",
    "bf16": "use train.precision=bfloat16",
    "bfloat16": "use train.precision=bfloat16",
    "fp16": "fp16 is not supported; use train.precision=bfloat16",
    "amp": "use train.precision=bfloat16",
    "torch_autocast": "use train.precision=bfloat16",
    "communication_data_type": "gradients are always reduced in float32",
    "data_types": "gradients are always accumulated in float32",
    "seq_parallel_communication_data_type": "gradients are always reduced in float32",
    "optimizer": "use the optimizer section",
    "scheduler": "use the schedule section",
    "steps_per_print": "use logging.every",
    "tensorboard": "use logging.tensorboard",
    "wandb": "use logging.wandb",
    "csv_monitor": "use logging.csv",
    "activation_checkpointing": "use train.recompute",
    "checkpoint": "use the checkpoint section",
    "pipeline": "pipeline parallelism is not supported yet",
    "tensor_parallel": "use parallel.tensor",
    "sequence_parallel_size": "context parallelism is not supported yet",
}

PASSED_ON = {
    "zero_optimization", "comms_logger", "flops_profiler", "wall_clock_breakdown", "memory_breakdown", "dump_state",
    "aio", "compression_training", "data_efficiency", "data_types", "elasticity", "eigenvalue", "hybrid_engine",
    "progressive_layer_drop", "sparse_gradients", "disable_allgather", "compile",
    "use_data_before_expert_parallelism", "dataloader_drop_last", "timers", "nebula", "autotuning",
}  # fmt: skip
"""Sections and keys of DeepSpeed 0.19.8, which ignores all others without a word: a typo of one of these is refused."""


def clashes(section: dict[str, Any]) -> Iterator[Problem]:
    """A problem for each key under ``deepspeed:`` that belongs to this project, with what to use instead, or that
    looks like a typo."""
    known = PASSED_ON | {key.split(".")[0] for key in OWNED}
    for key in section.keys() - known:
        if guess := nearest(str(key), known):
            yield Problem(f"deepspeed.{key}", f"is no key of DeepSpeed's; did you mean {guess}?")
    if not isinstance(section.get("zero_optimization", {}), dict):
        yield Problem("deepspeed.zero_optimization", "must be a section of DeepSpeed's own keys")
        return
    for key, advice in OWNED.items():
        value: Any = section
        for name in key.split("."):
            if not isinstance(value, dict) or name not in value:
                break
            value = value[name]
        else:
            yield Problem(f"deepspeed.{key}", f"is set by this project; {advice}")
