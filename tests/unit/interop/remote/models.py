"""Small models of every family, as runs and as exports with a modelling file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moe_train.checkpoint.streaming import write_weights
from moe_train.checkpoint.writing import LazyBox
from moe_train.model.language_model import LanguageModel, build_language_model
from moe_train.model.options import (
    InitOptions,
    LatentAttentionOptions,
    ModelOptions,
    MoEOptions,
    MultiTokenOptions,
    RopeScaling,
)
from moe_train.routing import available_gates, gate_class
from moe_train.routing.options import BalancingOptions, BiasOptions, RouterOptions
from moe_train.training.convert import Report
from moe_train.training.options import TrainOptions
from moe_train.training.run_config import RunConfig, to_dict

VOCAB = 101
MODEL = ModelOptions(
    num_layers=3,
    hidden_size=48,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    vocab_size=VOCAB,
    init=InitOptions(std=0.2, scaled_residual=False),
    moe=MoEOptions(num_experts=8, expert_hidden_size=24),
)
LATENT = LatentAttentionOptions(20, 16, 12, 6, 10)
FAMILIES = {
    "qwen3_moe": replace(MODEL, dense_layers=[1], ffn_hidden_size=40),
    "mixtral": replace(MODEL, family="mixtral", tie_embeddings=True, rope_scaling=RopeScaling("llama3", 8.0, 32)),
    "olmoe": replace(
        MODEL,
        family="olmoe",
        clip_qkv=0.7,
        head_dim=None,
        moe=replace(MODEL.moe, shared_expert_hidden_size=12),
        rope_scaling=RopeScaling("linear", 4.0),
    ),
    "deepseek_v3": replace(
        MODEL,
        family="deepseek_v3",
        latent_attention=LATENT,
        rope_scaling=RopeScaling("yarn", 8.0, 64, mscale=0.7, mscale_all_dim=0.6),
        multi_token=MultiTokenOptions(layers=1),
    ),
    "deepseek_v3, direct queries": replace(
        MODEL, family="deepseek_v3", latent_attention=LatentAttentionOptions(None, 16, 6, 8, 20, False)
    ),
}
DENSE = {
    "qwen3": replace(MODEL, family="qwen3", ffn_hidden_size=40),
    "llama3": replace(MODEL, family="llama3", ffn_hidden_size=40, rope_scaling=RopeScaling("llama3", 8.0, 32)),
}
BIAS = BalancingOptions(bias=BiasOptions(rate=0.001))
ROUTERS: dict[str, RouterOptions] = {name: RouterOptions(name) for name in available_gates()} | {
    "softmax_topk": RouterOptions("softmax_topk", {"top_k": 2}, BIAS),
    "switch": RouterOptions("switch", {"jitter": 0.1}, BIAS),
    "gshard": RouterOptions("gshard", {}, BIAS),
    "simbal": RouterOptions("simbal", {"top_k": 2}, BIAS),
    "relu": RouterOptions("relu"),
    "noisy_topk": RouterOptions("noisy_topk", {"top_k": 2}, BIAS),
    "lpr": RouterOptions("lpr", {"top_k": 2, "latent_dim": 4}, BIAS),
    "dynamic_k": RouterOptions("dynamic_k", {"threshold": {"start": 0.9, "end": 0.6, "steps": 4}}),
    "hash": RouterOptions("hash", {"vocab_size": VOCAB, "top_k": 2}),
    "sigmoid_topk": RouterOptions("sigmoid_topk", {"top_k": 2, "num_groups": 4, "groups_per_token": 2}, BIAS),
}


Exported = Callable[..., tuple[LanguageModel, Path, Report]]


def random_model(model: ModelOptions, router: RouterOptions) -> LanguageModel:
    built = build_language_model(model, router, sequence_length=32, seed=int(torch.randint(1000, ()))).eval()
    with torch.no_grad():
        for name, value in (*built.named_parameters(), *built.named_buffers()):
            if name.endswith("bias_E"):
                value.normal_(std=0.3)
            elif not value.is_floating_point():
                if value.dim() == 1:
                    value.fill_(3)  # a number of steps
            elif value.dim() == 2 and not value.any():
                value.normal_(std=0.2)
            elif value.dim() == 1:
                value.copy_(1 + 0.3 * torch.randn_like(value))
    return built


def saved(
    run: Path, built: LanguageModel, model: ModelOptions, router: RouterOptions, precision: Any = "float32"
) -> Path:
    """A run's folder with the weights of a model."""
    state = {name: value.detach() for name, value in built.state_dict().items() if value is not None}
    boxes = [
        LazyBox(f"model.{n}", tuple(v.shape), (0,) * v.dim(), tuple(v.shape), v.dtype, lambda v=v: v.contiguous())
        for n, v in state.items()
        if not (model.tie_embeddings and n == "output_layer.weight")
    ]
    exceptions = [] if gate_class(router.gate).causal else [router.gate]
    train = TrainOptions(precision=precision)
    config = RunConfig(name="a_run", model=model, router=router, train=train, causal_exceptions=exceptions)
    write_weights(run / "checkpoints", 7, boxes, {"config": to_dict(config)})
    return run


def load(folder: Path) -> Any:
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values()), info
    return model.eval()
