"""What a run does with DeepSpeed's engine (0.19.8, private API included): gradients and optimizer state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_train.checkpoint.slices import OwnedSlice
from moe_train.model.language_model import LanguageModel
from moe_train.parallel.groups import Groups
from moe_train.parallel.shard import shard_of
from moe_train.training import one_rank
from moe_train.training.deepspeed_engine import build_engine
from moe_train.training.gradients import Gradients
from moe_train.training.options import OptimizerOptions, TrainOptions

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine:
    """A DeepSpeed engine around the language model, for ZeRO 1, 2 and 3 with experts over EP x expert-DP and divided
    matrices over TP x DP.

    ``loss_factor`` is what one micro-batch's contribution to the mean of the whole step must be multiplied with
    before ``backward``: the engine divides by the accumulation and averages over all ranks.
    """

    def __init__(
        self,
        model: LanguageModel,
        groups: Groups,
        train: TrainOptions,
        optimizer: OptimizerOptions,
        passthrough: dict[str, Any] | None = None,
    ) -> None:
        self.groups = groups
        self.train = train
        self.accumulation = train.global_batch_size // (train.micro_batch_size * groups.data_size)
        self.loss_factor = float(self.accumulation * groups.world_size)
        self.names = {id(p): n for n, p in model.named_parameters()}
        self.deepspeed = build_engine(model, groups, train, optimizer, self.accumulation, passthrough or {})
        self.module: LanguageModel = self.deepspeed.module
        if one_rank.applies(self.zero, groups.world_size, train.zero_stage):
            one_rank.skip_reduction(self.zero)
        self.gradients = Gradients(self.zero, train.zero_stage)
        self._norms: list[Tensor] = []
        """Gradient norms: of the last step that was taken, and of the one under way."""

    @property
    def zero(self) -> Any:
        """DeepSpeed's ZeRO optimizer."""
        return self.deepspeed.optimizer

    def __call__(self, *args: Any) -> Any:
        return self.deepspeed(*args)

    def backward(self, loss: Tensor) -> None:
        self.deepspeed.backward(loss)

    def next_micro_batch(self) -> None:
        """After each micro-batch of a step but the last."""
        self.deepspeed.step()

    def measure_gradients(self) -> Tensor:
        """After the last micro-batch's backward pass: the global norm over all parameters before clipping, a scalar on
        the device. Infinite or negative, on every rank, where some gradient is not finite. Collective."""
        self._norms = [*self._norms[:1], self.gradients.norm()]
        return self._norms[-1]

    def step(self) -> None:
        """The optimizer moves. After ``measure_gradients``, which found them finite."""
        self.deepspeed.step()
        if not self.deepspeed.was_step_applied():
            raise RuntimeError("DeepSpeed did not move the optimizer, though the norm of the gradients was finite")
        self._norms = self._norms[-1:]

    def discard_step(self) -> None:
        """In the place of ``step``: the gradients are thrown away, and nothing moves."""
        with self.gradients.refused():
            self.deepspeed.step()
        assert not self.deepspeed.was_step_applied(), "DeepSpeed moved the optimizer by gradients that were refused"
        self._norms = self._norms[:-1]

    def not_finite(self) -> list[str]:
        """Names of the parameters of whose gradient this rank holds a part that is not finite, in the model's order."""
        found = {id(parameter) for parameter in self.gradients.not_finite()}
        return [name for key, name in self.names.items() if key in found]

    def set_lr(self, lr: float) -> None:
        for group in self.zero.param_groups:
            group["lr"] = lr * group.get("lr_factor", 1.0)

    def gradient_norm(self) -> float:
        """Global norm over all parameters, before clipping, of the last step that was taken."""
        return float(self._norms[0]) if self._norms else 0.0

    def set_training(self, mode: bool) -> None:
        """Training or evaluation mode."""
        self.deepspeed.train(mode)

    @contextlib.contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """Inside, every parameter of this rank's module is whole (ZeRO-3 gathers them)."""
        if self.train.zero_stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.module.parameters())):
            yield

    def close(self) -> None:
        self.deepspeed.destroy()

    # --- state, for the checkpoint room -------------------------------------------------------------------------

    def optimizer_steps(self) -> int:
        """Steps that the optimizer's own bias correction has seen."""
        for state in self.zero.optimizer.state.values():
            if "step" in state:
                return int(state["step"])
        return 0

    def owned_slices(self, *, create_moments: bool = False) -> list[OwnedSlice]:
        """What this rank owns: float32 masters and optimizer moments, as flat slices of named global tensors.

        The tensors are views: writing into them (loading) changes the optimizer. ``create_moments`` makes the
        moments that a fresh optimizer does not have yet.
        """
        slices: list[OwnedSlice] = []
        for parameter, master, start, state in self._fragments(create_moments):
            name, shard = self.names[id(parameter)], shard_of(parameter)
            shape, first = self._global_shape(parameter) if shard is None else (shard.shape, 0)
            start += first * (_numel(shape) // shape[0]) if shape else 0
            parts = {"model": master} | {key: state[key] for key in _MOMENTS if key in state}
            slices += [OwnedSlice(f"{kind}.{name}", shape, start, part, shard) for kind, part in parts.items()]
        return slices

    def refresh_parameters(self, optimizer_steps: int) -> None:
        """After masters and moments were loaded: sets the optimizer's step and copies the masters into the module."""
        for state in self.zero.optimizer.state.values():
            if "step" in state:
                state["step"].fill_(float(optimizer_steps))
        if self.train.zero_stage < 3:
            self.zero.update_lp_params()
            return
        for master, flat, params in zip(
            self.zero.fp32_partitioned_groups_flat,
            self.zero.fp16_partitioned_groups_flat,
            self.zero.fp16_partitioned_groups,
            strict=True,
        ):
            if master.numel():
                flat.data.copy_(master.data)
            for param, part in zip(params, self.zero.unflatten(flat, params), strict=True):
                param.data = part.data
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

    def _fragments(self, create: bool) -> Iterator[tuple[nn.Parameter, Tensor, int, dict[str, Tensor]]]:
        """(parameter, this rank's part of its master, where it starts in the flat local parameter, its moments)."""
        zero, state_of = self.zero, self.zero.optimizer.state
        if self.train.zero_stage == 3:
            for parameter in self.module.parameters():
                group, start_in_flat, length = zero.grad_position[zero.get_param_id(parameter)]
                flat = zero.fp32_partitioned_groups_flat[group]
                start = dist.get_rank(parameter.ds_process_group) * parameter.ds_tensor.ds_numel
                # The last partition is padded.
                length = max(0, min(length, parameter.ds_numel - start))
                moments = self._moments(state_of, flat, create)
                if length:
                    part = slice(start_in_flat, start_in_flat + length)
                    yield parameter, flat.data[part], start, {k: v[part] for k, v in moments.items()}
            return
        for index, flat in enumerate(zero.single_partition_of_fp32_groups):
            moments = self._moments(state_of, flat, create)
            for parameter in zero.bit16_groups[index]:
                mapping = parameter._hp_mapping
                if mapping is None:
                    continue
                where = mapping.hp_fragment_address
                part = slice(where.start, where.start + where.numel)
                start = mapping.lp_fragment_address.start
                yield parameter, flat.data[part], start, {k: v[part] for k, v in moments.items()}

    def _moments(self, state_of: Any, flat: Tensor, create: bool) -> dict[str, Tensor]:
        if create and isinstance(self.zero.optimizer, torch.optim.AdamW) and not state_of[flat]:
            step = torch.zeros((), dtype=torch.float32, device=flat.device)
            state_of[flat] = {"step": step, **{key: torch.zeros_like(flat.data) for key in _MOMENTS}}
        return {key: state_of[flat][key] for key in _MOMENTS if flat in state_of and key in state_of[flat]}

    def _global_shape(self, parameter: nn.Parameter) -> tuple[tuple[int, ...], int]:
        """Shape of the named global tensor and this rank's first index along its first dimension."""
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if getattr(parameter, "allreduce", True):
            return shape, 0
        return (shape[0] * self.groups.expert_size, *shape[1:]), shape[0] * self.groups.expert_rank


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
