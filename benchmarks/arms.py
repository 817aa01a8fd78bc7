"""The arms: what does one training step (forward, backward, clipping, AdamW) of the same model."""

from __future__ import annotations

import gc
import logging
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from geometry import LEARNING_RATE, Geometry, run_config
from peer import build_peer, set_samples
from torch import Tensor, nn

from moe_train.data.batches import Batch

CLIP = 1.0
ARMS = {
    "engine": "moe_train's training step: DeepSpeed engine (ZeRO 1, one process), exact statistics",
    "model": "moe_train's model in a plain loop with torch's AdamW: what is left when the engine is taken away",
    "hf_grouped": "transformers Qwen3MoeForCausalLM, experts_implementation grouped_mm",
    "hf_eager": "transformers Qwen3MoeForCausalLM, experts_implementation eager",
}
BASELINE = "hf_grouped"


@dataclass(frozen=True)
class Setting:
    """What all arms of one comparison share."""

    geometry: Geometry
    forced_balance: bool
    device: torch.device
    precision: str
    """float32 or bfloat16."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32


def build_ours(setting: Setting) -> nn.Module:
    """Our model, float32 on the CPU, always with the same weights."""
    from moe_train.model.language_model import build_language_model

    # It warns about every layer of an unknown type, ours among them.
    logging.getLogger("megatron").setLevel(logging.ERROR)
    config = run_config(setting.geometry, forced_balance=setting.forced_balance, precision=setting.precision)
    return build_language_model(config.model, config.router, sequence_length=setting.geometry.sequence, seed=1)


def build_arm(name: str, setting: Setting, groups: Any) -> Any:
    """An arm ready for its first step."""
    ours = build_ours(setting)
    if name == "engine":
        return EngineArm(ours, setting, groups)
    if name == "model":
        return ModelArm(ours, setting)
    experts = {"hf_grouped": "grouped_mm", "hf_eager": "eager"}[name]
    weights = {key: value for key, value in ours.state_dict().items() if value is not None}
    peer = build_peer(setting.geometry, weights, experts, forced_balance=setting.forced_balance)
    return PeerArm(peer, setting)


def reference_losses(names: list[str], setting: Setting, batch: Batch) -> dict[str, float]:
    """Loss of each kind of model on one batch in float32, before any is trained or cast."""
    losses: dict[str, float] = {}
    exact = Setting(setting.geometry, setting.forced_balance, setting.device, "float32")
    for name in names:
        arm = build_arm("model" if name == "engine" else name, exact, None)
        with torch.no_grad():
            losses[name] = float(arm.loss(batch))
        del arm
        gc.collect()
    return losses


def check_equal(losses: dict[str, float], tolerance: float = 1e-5) -> None:
    """Raises SystemExit where two arms do not compute the same loss."""
    finite = all(math.isfinite(loss) for loss in losses.values())
    largest, smallest = max(losses.values()), min(losses.values())
    if not finite or largest - smallest > tolerance * abs(largest):
        raise SystemExit(f"the arms do not compute the same loss, nothing was timed: {losses}")


class EngineArm:
    """What ``moe-train train`` runs per step."""

    def __init__(self, model: nn.Module, setting: Setting, groups: Any) -> None:
        from moe_train.training.engine import Engine

        config = run_config(setting.geometry, forced_balance=setting.forced_balance, precision=setting.precision)
        # Each process has a batch of its own.
        train = replace(config.train, global_batch_size=config.train.global_batch_size * groups.data_size)
        self.engine = Engine(model, groups, train, config.optimizer, {})  # type: ignore[arg-type]
        self.module: nn.Module = self.engine.module
        self.steps = 0

    def step(self, batch: Batch) -> float:
        from moe_train.training.step import train_step

        result = train_step(self.engine, [batch], lr=LEARNING_RATE, seed=0, step=self.steps)
        self.steps += 1
        return result.loss_sum / result.loss_count

    def optimizer_owner(self) -> tuple[Any, str]:
        """Object and name of the method that is the optimizer's part of the step."""
        return self.engine, "step"

    def close(self) -> None:
        self.engine.close()


class _PlainLoop:
    """Forward, backward, clipping, fused AdamW."""

    def __init__(self, model: nn.Module, setting: Setting) -> None:
        self.device = setting.device
        self.module = model.to(setting.device, setting.dtype)
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )

    def loss(self, batch: Batch) -> Tensor:
        raise NotImplementedError

    def step(self, batch: Batch) -> float:
        loss = self.loss(batch)
        loss.backward()
        self.update()
        return float(loss.detach())

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def optimizer_owner(self) -> tuple[Any, str]:
        return self, "update"

    def close(self) -> None:
        pass


class ModelArm(_PlainLoop):
    """Our model without DeepSpeed."""

    def loss(self, batch: Batch) -> Tensor:
        from moe_train.model.micro_batch import MicroBatch, as_root, use
        from moe_train.training.step import token_batch

        micro_batch = MicroBatch(tokens=token_batch(batch, self.device))
        with use(micro_batch):
            nll_sum, _ = self.module(
                batch.ids_BS.to(self.device), batch.labels_BS.to(self.device), batch.target_BS.to(self.device)
            )
        return as_root(nll_sum / batch.target_BS.sum(), micro_batch)


class PeerArm(_PlainLoop):
    """transformers' model with transformers' own loss."""

    def loss(self, batch: Batch) -> Tensor:
        set_samples(self.module, batch.sample_B)
        labels = batch.labels_BS.to(self.device)
        # Our labels are shifted already.
        return self.module(input_ids=batch.ids_BS.to(self.device), labels=labels, shift_labels=labels).loss
