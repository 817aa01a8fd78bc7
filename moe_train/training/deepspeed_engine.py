"""DeepSpeed's engine (0.19.8, private API included), made for our model: a quiet import, groups of experts, options."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from moe_train.model.language_model import LanguageModel
from moe_train.model.moe_layer import MoELayer, moe_layers
from moe_train.parallel.device import use_cuda
from moe_train.parallel.groups import Groups
from moe_train.parallel.megatron import without_compiler
from moe_train.parallel.shard import shard_of
from moe_train.training.optimizer import build_optimizer, parameter_groups
from moe_train.training.options import OptimizerOptions, TrainOptions


def build_engine(
    model: LanguageModel,
    groups: Groups,
    train: TrainOptions,
    optimizer: OptimizerOptions,
    accumulation: int,
    passthrough: dict[str, Any],
) -> Any:
    """A DeepSpeedEngine for ZeRO 1, 2 or 3 with experts over EP x expert-DP and divided matrices over TP x DP.

    It knows nothing of tensor parallelism. All ranks are its data-parallel ranks: with sequence parallelism they have
    different tokens, so that gradients of whole tensors are to be summed over all of them. A divided matrix is what it
    calls an expert: another part on each rank of one group, and replicas in another group. So norms, clipping and ZeRO
    are right as they are for experts.

    ``accumulation``: micro-batches of a rank per step. ``passthrough``: the section ``deepspeed`` of the configuration.
    """
    _import_deepspeed()
    _mark_parts(model, groups, train.zero_stage)
    built = build_optimizer(parameter_groups(model, optimizer), optimizer)
    return _build(model, built, _deepspeed_config(train, groups, accumulation, passthrough))


def _import_deepspeed() -> None:
    """DeepSpeed, quiet and without compiling its shared-memory kernel (a minute, and for inference only)."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if use_cuda() else "cpu")
    with without_compiler():
        import deepspeed
        import deepspeed.ops
        import deepspeed.runtime.zero.muon.muon_optimizer  # imported by the engine, whatever the optimizer
        from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__ = {}
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(
            dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False, dist_init_required=False
        )


def _mark_parts(model: nn.Module, groups: Groups, stage: int) -> None:
    """Tells DeepSpeed which group holds the parts of an expert or of a divided matrix, and which one the replicas,
    before the engine exists."""
    from deepspeed.utils import groups as ds_groups

    experts = f"ep_size_{groups.expert_size}"
    # Upstream reads the number and takes the largest for the one of experts.
    divided = "ep_size_0_tensor"
    known = [(experts, groups.expert, groups.expert_data)]
    if groups.tensor_size > 1:
        known.append((divided, groups.tensor, groups.data))
    for name, parts, replicas in known:
        ds_groups._EXPERT_PARALLEL_GROUP[name] = parts
        ds_groups._EXPERT_PARALLEL_GROUP_RANKS[name] = dist.get_process_group_ranks(parts)
        ds_groups._EXPERT_DATA_PARALLEL_GROUP[name] = replicas
        ds_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = dist.get_process_group_ranks(replicas)
    for parameter in model.parameters():
        name = experts
        if shard_of(parameter) is not None:
            name, parameter.allreduce = divided, False  # type: ignore[attr-defined]
        if not getattr(parameter, "allreduce", True):
            parameter.group_name = name  # type: ignore[attr-defined]
            if stage == 3:
                parameter.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
                parameter.ds_zero_partition_group_name = name  # type: ignore[attr-defined]


def _deepspeed_config(
    train: TrainOptions, groups: Groups, accumulation: int, passthrough: dict[str, Any]
) -> dict[str, Any]:
    zero = {
        "stage": train.zero_stage,
        # On CPU and small models there is nothing to overlap; the section `deepspeed:` may switch it on.
        "overlap_comm": False,
        # True would replace torch.nn.functional.linear for the whole process, with other rounding in bfloat16.
        "memory_efficient_linear": False,
        **passthrough.get("zero_optimization", {}),
    }
    if train.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": train.offload_optimizer}
    return {
        **passthrough,
        # As if each rank read other samples: those that share tensors have different tokens.
        "train_batch_size": train.micro_batch_size * accumulation * groups.world_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": train.gradient_clipping,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # torch's AdamW has a vectorised kernel for the CPU: the same bits as without offload, and nothing to compile.
        "zero_force_ds_cpu_optimizer": False,
        # Steps by gradients that are not finite are refused before (gradients.py), without one more pass over them.
        "bf16": {"enabled": train.precision == "bfloat16", "check_grad_overflow": False},
        # Both are needed: gradients are reduced and accumulated in float32.
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 10**9,
    }


def _build(model: LanguageModel, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    from deepspeed.moe.utils import is_moe_param
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION
    from deepspeed.utils import set_z3_leaf_modules

    num_experts = [layer.experts.num_local for layer in moe_layers(model)]
    divided = any(shard_of(parameter) is not None for parameter in model.parameters())

    class ExpertEngine(DeepSpeedEngine):  # type: ignore[misc]
        """Upstream looks for its own MoE classes only; ours are known by their parameters."""

        def _configure_distributed_model(self, module: nn.Module) -> None:
            super()._configure_distributed_model(module)
            self.has_moe_layers = bool(num_experts) or divided
            self.num_experts = num_experts[:1]

        def _do_optimizer_sanity_check(self, basic_optimizer: torch.optim.Optimizer) -> Any:
            # Upstream wraps ZeRO 1 in bfloat16 with float32 gradients into an optimizer of another shape, that knows
            # neither our slices nor float32 sums over ranks. The one of ZeRO 2 does both, for stage 1 too.
            super()._do_optimizer_sanity_check(basic_optimizer)
            return ZERO_OPTIMIZATION

        def _validate_zero3_moe_compatibility(self) -> None:
            for name, parameter in self.module.named_parameters():
                if is_moe_param(parameter):
                    family = getattr(parameter, "ds_zero_placement_family", None)
                    assert family == "autoep_expert", f"{name} is a part that ZeRO-3 would average over all ranks"

    if config["zero_optimization"]["stage"] == 3 and num_experts:
        set_z3_leaf_modules(model, [MoELayer])
    return ExpertEngine(
        args=None,
        model=model,
        optimizer=optimizer,
        model_parameters=None,
        config=config,
        config_class=DeepSpeedConfig(config),
    )
