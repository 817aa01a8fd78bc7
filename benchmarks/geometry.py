"""What is measured: sizes of model and batch, and the run configuration that they amount to."""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.data.options import DataOptions
from moe_train.model.options import ModelOptions, MoEOptions
from moe_train.routing.options import RouterOptions
from moe_train.training.options import OptimizerOptions, TrainOptions
from moe_train.training.run_config import RunConfig


@dataclass(frozen=True)
class Geometry:
    """Sizes that both implementations get; no auxiliary loss in either."""

    layers: int = 4
    hidden: int = 256
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 32
    expert_ffn: int = 64
    experts: int = 64
    top_k: int = 8
    vocab: int = 8192
    sequence: int = 256
    batch: int = 4
    """Sequences per step; one micro-batch."""

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence


PRESETS = {
    "small": Geometry(),
    "0.6b": Geometry(
        layers=6,
        hidden=1024,
        heads=16,
        kv_heads=4,
        head_dim=128,
        expert_ffn=128,
        experts=128,
        vocab=151936,
        sequence=1024,
        batch=32,
    ),
    "test": Geometry(
        layers=2,
        hidden=64,
        heads=4,
        kv_heads=2,
        head_dim=16,
        expert_ffn=32,
        experts=8,
        top_k=2,
        vocab=128,
        sequence=16,
        batch=2,
    ),
}
"""small: 17.5M parameters, for a CPU. 0.6b: the size that latent prototype routing was published at, for a GPU.
test: takes no time and says nothing."""

LEARNING_RATE = 1e-3


def run_config(geometry: Geometry, *, forced_balance: bool, precision: str) -> RunConfig:
    """The configuration that ``moe-train`` would train this geometry with."""
    g = geometry
    return RunConfig(
        name="benchmark",
        model=ModelOptions(
            num_layers=g.layers,
            hidden_size=g.hidden,
            num_attention_heads=g.heads,
            num_key_value_heads=g.kv_heads,
            head_dim=g.head_dim,
            vocab_size=g.vocab,
            moe=MoEOptions(num_experts=g.experts, expert_hidden_size=g.expert_ffn),
        ),
        router=RouterOptions("softmax_topk", {"top_k": g.top_k}, forced_balance=forced_balance),
        data=DataOptions(sequence_length=g.sequence),
        train=TrainOptions(
            global_batch_size=g.batch,
            micro_batch_size=g.batch,
            gradient_clipping=1.0,
            precision=precision,  # type: ignore[arg-type]
        ),
        optimizer=OptimizerOptions(lr=LEARNING_RATE),
    )
