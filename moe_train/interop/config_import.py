"""config.json -> our options. What our model cannot do is an error that names key and value; nothing is passed over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe_train.interop.config_values import ConfigValues
from moe_train.interop.fp8 import check_quantization
from moe_train.interop.keys import DEFAULTS, FAMILY_OF_TYPE
from moe_train.interop.rope import read_rope
from moe_train.interop.typed import whole
from moe_train.model.options import LatentAttentionOptions, ModelOptions, MoEOptions, MultiTokenOptions
from moe_train.routing.options import BalancingOptions, BiasOptions, RouterOptions

BIAS_RATE = 0.001
"""How far DeepSeek-V3's selection bias moves per step (arXiv 2412.19437, section 4.2); no config.json says it."""


@dataclass(frozen=True)
class HubModel:
    """What a config.json says."""

    model: ModelOptions
    router: RouterOptions
    max_length: int
    """Tokens of the longest text that the model is made for."""
    quantized: bool
    """Whether weights are stored in 8-bit blocks."""
    multi_token_layers: int
    """That the file speaks of; ``model.multi_token.layers`` is what was asked for."""


def from_hub(content: dict[str, Any], *, multi_token: bool = True) -> HubModel:
    """Our options for a config.json; ``multi_token``: with DeepSeek's layer for it, where the file speaks of one."""
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILY_OF_TYPE:
        known = ", ".join(FAMILY_OF_TYPE)
        raise ValueError(f"config.json: model_type is {kind!r}; known are {known}")
    family = FAMILY_OF_TYPE[kind]
    config = ConfigValues(content, family)
    quantized = check_quantization(content)
    heads, hidden = config.whole("num_attention_heads"), config.whole("hidden_size")
    max_length = config.whole("max_position_embeddings")
    theta, scaling = read_rope(content, DEFAULTS[family]["rope_theta"], max_length)
    _check_windows(config, max_length)
    latent = _latent_attention(config) if family == "deepseek_v3" else None
    head_dim, groups = None, heads
    if latent is None:
        head_dim = config.whole_or_none("head_dim")
        groups = config.whole_or_none("num_key_value_heads") or heads
    else:
        _check_latent_heads(config, latent, heads)
    predicted = config.count("num_nextn_predict_layers") if family == "deepseek_v3" else 0
    if predicted > 1:
        raise ValueError(
            f"config.json: num_nextn_predict_layers is {predicted}; our models predict one more token only"
        )
    layers = config.whole("num_hidden_layers")
    dense = _dense_layers(config, layers)
    experts = family not in ("qwen3", "llama3")
    # Mixtral and OLMoE call the width of an expert by the name that others have for dense layers.
    own = family in ("mixtral", "olmoe")
    intermediate = config.whole("intermediate_size") if own or dense or not experts else config.get("intermediate_size")
    moe, router = MoEOptions(), RouterOptions()
    if experts:
        width = intermediate if own else config.whole("moe_intermediate_size")
        moe, router = _experts(config, width)
    model = ModelOptions(
        family=family,  # type: ignore[arg-type]
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        ffn_hidden_size=intermediate if dense or not experts else None,
        dense_layers=dense,
        vocab_size=config.whole("vocab_size"),
        tie_embeddings=config.flag("tie_word_embeddings"),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=config.number("rms_norm_eps"),
        clip_qkv=config.number_or_none("clip_qkv") if family == "olmoe" else None,
        latent_attention=latent,
        multi_token=MultiTokenOptions(layers=1 if predicted and multi_token else 0),
        moe=moe,
    )
    config.check_rest()
    return HubModel(model, router, max_length, quantized, predicted)


def _check_windows(config: ConfigValues, max_length: int) -> None:
    """Attention to the nearest tokens only is not ours; a window that nothing goes beyond is none."""
    window = config.get("sliding_window") if config.family in ("mixtral", "qwen3_moe", "qwen3") else None
    used = config.family == "mixtral" or config.get("use_sliding_window")
    if used and window is not None and config.whole("sliding_window") < max_length:
        raise ValueError(f"config.json: sliding_window is {window}; our attention has no window")
    kinds = config.sequence("layer_types") if config.family in ("qwen3", "qwen3_moe", "llama3", "mixtral") else []
    other = [kind for kind in kinds if kind != "full_attention"]
    if other:
        raise ValueError(f"config.json: layer_types has {other[0]!r}; our attention is full_attention in all layers")


def _latent_attention(config: ConfigValues) -> LatentAttentionOptions:
    return LatentAttentionOptions(
        query_rank=config.whole_or_none("q_lora_rank"),
        key_value_rank=config.whole("kv_lora_rank"),
        nope_head_dim=config.whole("qk_nope_head_dim"),
        rope_head_dim=config.whole("qk_rope_head_dim"),
        value_head_dim=config.whole("v_head_dim"),
        interleaved=config.flag("rope_interleave"),
    )


def _check_latent_heads(config: ConfigValues, latent: LatentAttentionOptions, heads: int) -> None:
    """What a config.json repeats about the heads must agree with the rest."""
    whole = latent.nope_head_dim + latent.rope_head_dim
    expected = {"num_key_value_heads": (heads,), "qk_head_dim": (whole,), "head_dim": (latent.rope_head_dim, whole)}
    for key, values in expected.items():
        value = config.get(key)
        if value is not None and value not in values:
            raise ValueError(f"config.json: {key} is {value!r}; latent attention with these widths has {values[0]}")


def _dense_layers(config: ConfigValues, layers: int) -> list[int]:
    if config.family == "qwen3_moe":
        step, without = config.whole("decoder_sparse_step"), config.sequence("mlp_only_layers")
        without = [whole("mlp_only_layers", layer, least=0) for layer in without]
        wrong = [layer for layer in without if layer >= layers]
        if wrong:
            raise ValueError(f"config.json: mlp_only_layers names {wrong[0]}, but layers are 0 to {layers - 1}")
        return [layer for layer in range(layers) if layer in without or (layer + 1) % step]
    if config.family == "deepseek_v3":
        return list(range(min(layers, config.count("first_k_dense_replace"))))
    return []


def _experts(config: ConfigValues, width: int) -> tuple[MoEOptions, RouterOptions]:
    family = config.family
    key = {"mixtral": "num_local_experts", "deepseek_v3": "n_routed_experts"}.get(family, "num_experts")
    # transformers has two names for it, and may write either.
    other = "num_experts" if key == "num_local_experts" else "num_local_experts"
    named = key if key in config.content or other not in config.content else other
    count, top_k = config.whole(named), config.whole("num_experts_per_tok")
    for name in (key, other):
        if config.get(name) not in (None, count) and name in config.content:
            raise ValueError(f"config.json: {key} is {count}, but {name} is {config.content[name]!r}")
    if family == "deepseek_v3":
        shared = config.count("n_shared_experts") * width
        groups = config.whole_or_none("n_group") or 1
        options: dict[str, Any] = {
            "top_k": top_k,
            "num_groups": groups,
            "groups_per_token": config.whole_or_none("topk_group") or groups,
            "renormalize": config.flag("norm_topk_prob"),
            "scaling": config.number("routed_scaling_factor"),
        }
        balancing = BalancingOptions(bias=BiasOptions(rate=BIAS_RATE))
        return MoEOptions(count, width, shared or None), RouterOptions("sigmoid_topk", options, balancing)
    after = family == "mixtral"
    renormalize = after or config.flag("norm_topk_prob")
    options = {"top_k": top_k, "softmax": "after" if after else "before", "renormalize": renormalize}
    return MoEOptions(count, width), RouterOptions("softmax_topk", options)
