"""Small models of every family in this process."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from moe_train.model.language_model import LanguageModel, build_language_model
from moe_train.model.options import InitOptions, LatentAttentionOptions, ModelOptions, MoEOptions, RopeScaling
from moe_train.parallel.groups import Groups, single_process
from moe_train.routing.options import RouterOptions

BASE = ModelOptions(
    num_layers=3,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=100,  # padded to 128 rows
    moe=MoEOptions(num_experts=8, expert_hidden_size=16),
    init=InitOptions(std=0.2),
)
_LATENT = LatentAttentionOptions(query_rank=12, key_value_rank=16, nope_head_dim=8, rope_head_dim=4, value_head_dim=6)
_YARN = RopeScaling("yarn", factor=4.0, original_length=8, mscale=1.0, mscale_all_dim=1.0)


def _model(**changes: object) -> ModelOptions:
    return dataclasses.replace(BASE, **changes)  # type: ignore[arg-type]


_SHARED = dataclasses.replace(BASE.moe, shared_expert_hidden_size=16)
MODELS = {
    "qwen3_moe": BASE,
    "qwen3_moe_tied": _model(tie_embeddings=True, moe=_SHARED, head_dim=16),
    "mixtral": _model(family="mixtral", rope_scaling=RopeScaling("linear", factor=2.0)),
    "olmoe": _model(family="olmoe", clip_qkv=0.5, num_key_value_heads=4),
    "olmoe_grouped": _model(family="olmoe", dense_layers=[1], ffn_hidden_size=48),
    "deepseek_v3": _model(
        family="deepseek_v3",
        latent_attention=_LATENT,
        moe=_SHARED,
        dense_layers=[0],
        ffn_hidden_size=48,
        rope_scaling=_YARN,
    ),
    "deepseek_v3_plain": _model(
        family="deepseek_v3",
        latent_attention=dataclasses.replace(_LATENT, query_rank=None, value_head_dim=20, interleaved=False),
    ),
    "qwen3": _model(family="qwen3", ffn_hidden_size=48, tie_embeddings=True),
    "llama3": _model(
        family="llama3", ffn_hidden_size=48, rope_scaling=RopeScaling("llama3", factor=8.0, original_length=8)
    ),
}


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    """Of a single process, which other tests of this process must not find."""
    torch.set_num_threads(1)
    yield single_process(torch.device("cpu"))
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def build(options: ModelOptions, router: RouterOptions | None = None, seed: int = 1) -> LanguageModel:
    """In evaluation mode; a selection bias as large as the scores, so that it matters."""
    model = build_language_model(options, router or RouterOptions(), sequence_length=32, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in model.named_buffers():
        if name.endswith("bias_E"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return model
