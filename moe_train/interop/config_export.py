"""Our options -> config.json of a class that transformers ships."""

from __future__ import annotations

from typing import Any

import torch

from moe_train.interop.config_import import from_hub
from moe_train.interop.keys import CLASSES, DTYPE_KEYS, TYPE_OF_FAMILY
from moe_train.interop.rope import write_rope
from moe_train.interop.stock import stock_class_problems
from moe_train.model.families import family_of, head_width
from moe_train.model.options import ModelOptions
from moe_train.routing.options import RouterOptions
from moe_train.routing.registry import gate_options
from moe_train.routing.strict import parse_options


def to_hub(model: ModelOptions, router: RouterOptions, *, max_length: int, dtype: torch.dtype) -> dict[str, Any]:
    """The content of config.json, with the names of transformers 5 and the older ones of rope and dtype.

    Errors: ValueError where no class of transformers computes what this configuration computes.
    """
    if problems := stock_class_problems(model, router):
        raise ValueError(
            f"no class of transformers can hold this model: {'; '.join(problems)}. It needs a modelling file of its own"
        )
    rope = write_rope(model.rope_theta, model.rope_scaling)
    content: dict[str, Any] = {
        "architectures": [CLASSES[model.family]],
        "model_type": TYPE_OF_FAMILY[model.family],
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "hidden_act": "silu",
        "max_position_embeddings": max_length,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": False,
        "rope_parameters": rope,
        "rope_theta": model.rope_theta,
        "rope_scaling": None if model.rope_scaling is None else {k: v for k, v in rope.items() if k != "rope_theta"},
        **dict.fromkeys(DTYPE_KEYS, type_name(dtype)),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if model.latent_attention is None and model.family != "olmoe":
        content["head_dim"] = head_width(model)
    if model.family == "olmoe":
        content["clip_qkv"] = model.clip_qkv
    if model.ffn_hidden_size is not None:
        content["intermediate_size"] = model.ffn_hidden_size
    if model.latent_attention is not None:
        content |= _latent_attention(model)
    return content | (_experts(model, router) if family_of(model).experts else {})


def carried(
    original: dict[str, Any], model: ModelOptions, router: RouterOptions, *, dtype: torch.dtype | None
) -> dict[str, Any] | None:
    """The config.json that a model came with, in place of one of ours, where it still says the same; else None.

    Changed are the type of the weights, where another one is asked for, and ``quantization_config``, as they are not
    quantised any more.
    """
    came = from_hub(original, multi_token=bool(model.multi_token.layers))
    same: dict[str, Any] = {"max_length": came.max_length, "dtype": torch.float32}
    if to_hub(came.model, came.router, **same) != to_hub(model, router, **same):
        return None
    content = {key: value for key, value in original.items() if key != "quantization_config"}
    if dtype is not None:
        content |= {key: type_name(dtype) for key in DTYPE_KEYS if key in content}
    return content


def type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _latent_attention(model: ModelOptions) -> dict[str, Any]:
    latent = model.latent_attention
    assert latent is not None
    return {
        "num_key_value_heads": model.num_attention_heads,
        "q_lora_rank": latent.query_rank,
        "kv_lora_rank": latent.key_value_rank,
        "qk_nope_head_dim": latent.nope_head_dim,
        "qk_rope_head_dim": latent.rope_head_dim,
        "v_head_dim": latent.value_head_dim,
        "rope_interleave": latent.interleaved,
    }


def _experts(model: ModelOptions, router: RouterOptions) -> dict[str, Any]:
    moe = model.moe
    options: Any = parse_options(gate_options(router.gate), router.options, f"gate {router.gate!r}")
    content: dict[str, Any] = {"num_experts_per_tok": options.top_k}
    if model.family == "mixtral":
        return content | {
            "num_local_experts": moe.num_experts,
            "intermediate_size": moe.expert_hidden_size,
            "sliding_window": None,
        }
    if model.family == "deepseek_v3":
        return content | {
            "n_routed_experts": moe.num_experts,
            "moe_intermediate_size": moe.expert_hidden_size,
            "n_shared_experts": (moe.shared_expert_hidden_size or 0) // moe.expert_hidden_size,
            "n_group": options.num_groups,
            "topk_group": options.groups_per_token,
            "norm_topk_prob": options.renormalize,
            "routed_scaling_factor": options.scaling,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "moe_layer_freq": 1,
            "first_k_dense_replace": len(model.dense_layers),
            "num_nextn_predict_layers": model.multi_token.layers,
        }
    content |= {"num_experts": moe.num_experts, "norm_topk_prob": options.sums_to_one}
    if model.family == "olmoe":
        return content | {"intermediate_size": moe.expert_hidden_size}
    return content | {
        "moe_intermediate_size": moe.expert_hidden_size,
        "mlp_only_layers": sorted(model.dense_layers),
        "decoder_sparse_step": 1,
        "use_sliding_window": False,
    }
