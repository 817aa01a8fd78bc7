"""Random small models of each family, and the configuration that transformers builds the same shapes from."""

from __future__ import annotations

import random
import zlib
from typing import Any

from moe_train.data.options import DataOptions
from moe_train.model.families import FAMILIES, family_of, head_width
from moe_train.model.options import LatentAttentionOptions, ModelOptions, MoEOptions
from moe_train.routing.options import RouterOptions
from moe_train.training.run_config import RunConfig

TOP_K = 2
NAMES = {
    "qwen3_moe": "qwen3_moe",
    "mixtral": "mixtral",
    "olmoe": "olmoe",
    "deepseek_v3": "deepseek_v3",
    "qwen3": "qwen3",
    "llama3": "llama",
}
"""Family -> model type of transformers."""


def random_model(name: str, draw: int) -> ModelOptions:
    """Shapes that transformers can express as well; the same for the same draw."""
    rng = random.Random(zlib.crc32(f"{name}/{draw}".encode()))
    family, layers = FAMILIES[name], rng.randint(2, 4)
    groups, width = rng.choice([1, 2, 3]), 2 * rng.randint(2, 6)
    heads = groups * rng.randint(1, 4)
    # transformers' olmoe has heads of hidden_size / heads.
    hidden = heads * width if name == "olmoe" else 4 * rng.randint(4, 12)
    hidden = hidden * 2 if hidden % 4 else hidden
    dense: list[int] = []
    if name == "qwen3_moe":
        dense = sorted(rng.sample(range(layers), rng.randint(0, layers - 1)))
    if name == "deepseek_v3":
        dense = list(range(rng.randint(0, layers - 1)))
    latent = None
    if family.latent_attention:
        latent = LatentAttentionOptions(
            query_rank=None if draw % 2 else rng.randint(3, 20),
            key_value_rank=rng.randint(3, 20),
            nope_head_dim=2 * rng.randint(1, 6),
            rope_head_dim=2 * rng.randint(1, 4),
            value_head_dim=2 * rng.randint(1, 6),
        )
    expert = rng.randint(5, 20)
    return ModelOptions(
        family=name,  # type: ignore[arg-type]
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=None if name == "olmoe" else width,
        ffn_hidden_size=rng.randint(10, 50) if dense or not family.experts else None,
        dense_layers=dense,
        vocab_size=rng.randint(50, 200),
        tie_embeddings=bool(draw % 3 == 0),
        latent_attention=latent,
        moe=MoEOptions(
            num_experts=rng.randint(3, 7),
            expert_hidden_size=expert,
            shared_expert_hidden_size=expert * rng.randint(1, 3) if family.latent_attention else None,
            # torch's counter of FLOPs does not know the grouped multiplication.
            experts="reference",
        ),
    )


def run_config(model: ModelOptions, sequence_length: int = 16) -> RunConfig:
    router = RouterOptions(gate="softmax_topk", options={"top_k": TOP_K})
    return RunConfig(model=model, router=router, data=DataOptions(sequence_length=sequence_length))


def transformers_fields(model: ModelOptions) -> dict[str, Any]:
    """Keyword arguments of the family's configuration class."""
    moe, latent = model.moe, model.latent_attention
    fields: dict[str, Any] = {
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tie_embeddings,
        "num_experts_per_tok": TOP_K,
        "intermediate_size": model.ffn_hidden_size or moe.expert_hidden_size,
        "moe_intermediate_size": moe.expert_hidden_size,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "eager",
        "experts_implementation": "eager",
    }
    if latent is not None:
        shared = (moe.shared_expert_hidden_size or 0) // moe.expert_hidden_size
        return fields | {
            "num_key_value_heads": model.num_attention_heads,
            "q_lora_rank": latent.query_rank,
            "kv_lora_rank": latent.key_value_rank,
            "qk_nope_head_dim": latent.nope_head_dim,
            "qk_rope_head_dim": latent.rope_head_dim,
            "v_head_dim": latent.value_head_dim,
            "n_routed_experts": moe.num_experts,
            "n_shared_experts": shared,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": len(model.dense_layers),
        }
    if model.family != "olmoe":
        fields["head_dim"] = head_width(model)
    if family_of(model).experts:
        fields["num_local_experts" if model.family == "mixtral" else "num_experts"] = moe.num_experts
    if model.family == "qwen3_moe":
        fields |= {"mlp_only_layers": model.dense_layers, "decoder_sparse_step": 1}
    return fields
