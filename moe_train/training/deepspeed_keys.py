"""Which keys of DeepSpeed's configuration this project sets itself; the rest passes through ``deepspeed:``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moe_train.config.errors import Problem

OWNED = {
    "train_batch_size": "use train.global_batch_size",
    "train_micro_batch_size_per_gpu": "use train.micro_batch_size",
    "gradient_accumulation_steps": "it follows from train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "use train.gradient_clipping",
    "gradient_predivide_factor": "losses are normalised by the tokens of the whole step",
    "prescale_gradients": "losses are normalised by the tokens of the whole step",
    "zero_optimization.stage": "use train.zero_stage",
    "zero_optimization.memory_efficient_linear": "it replaces torch's linear for the whole process and rounds twice",
    "zero_allow_untested_optimizer": "use optimizer.name",
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
    "tensor_parallel": "tensor parallelism is not supported yet",
    "sequence_parallel_size": "context parallelism is not supported yet",
}


def clashes(section: dict[str, Any]) -> Iterator[Problem]:
    """A problem for each key under ``deepspeed:`` that belongs to this project, with what to use instead."""
    for key, advice in OWNED.items():
        value: Any = section
        for name in key.split("."):
            if not isinstance(value, dict) or name not in value:
                break
            value = value[name]
        else:
            yield Problem(f"deepspeed.{key}", f"is set by this project; {advice}")
