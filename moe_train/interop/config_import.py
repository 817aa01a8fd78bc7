"""config.json -> our options. What our model cannot do is an error that names key and value; nothing is passed over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe_train.interop.fp8 import check_quantization
from moe_train.interop.keys import CLASSES, DEFAULTS, FAMILY_OF_TYPE, ONLY, WITHOUT_EFFECT
from moe_train.interop.rope import ROPE_KEYS, read_rope
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


class _Config:
    """The file's values, noting which were asked for."""

    def __init__(self, content: dict[str, Any], family: str) -> None:
        self.content, self.family = content, family
        self.seen = set(WITHOUT_EFFECT) | set(ROPE_KEYS)

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        value = self.content.get(key)
        return DEFAULTS[self.family].get(key, default) if value is None and key not in self.content else value

    def whole(self, key: str) -> int:
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"config.json: {key} is {value!r}; a positive whole number is needed")
        return value

    def check_rest(self) -> None:
        own = CLASSES[self.family].removesuffix("ForCausalLM")
        for part, name in (self.get("auto_map") or {}).items():
            # Some carry the code that they had before transformers had it; code under other names is another model.
            if not str(name).rpartition(".")[2].startswith(own):
                raise ValueError(f"config.json: auto_map.{part} is {name!r}: a model with code of its own")
        for key, values in ONLY.items():
            self.seen.add(key)
            if key in self.content and self.content[key] not in values:
                raise ValueError(f"config.json: {key} is {self.content[key]!r}, which our {self.family} cannot do")
        unknown = sorted(self.content.keys() - self.seen)
        if unknown:
            raise ValueError(
                f"config.json: {unknown[0]} is {self.content[unknown[0]]!r}, a key that is not known for "
                f"{self.content['model_type']}: it may change what the model computes. Where it does not, take it out"
            )


def from_hub(content: dict[str, Any], *, multi_token: bool = True) -> HubModel:
    """Our options for a config.json; ``multi_token``: with DeepSeek's layer for it, where the file speaks of one."""
    kind = content.get("model_type")
    if kind not in FAMILY_OF_TYPE:
        known = ", ".join(FAMILY_OF_TYPE)
        raise ValueError(f"config.json: model_type is {kind!r}; known are {known}")
    family = FAMILY_OF_TYPE[kind]
    config = _Config(content, family)
    quantized = check_quantization(content)
    heads, hidden = config.whole("num_attention_heads"), config.whole("hidden_size")
    max_length = config.whole("max_position_embeddings")
    theta, scaling = read_rope(content, DEFAULTS[family]["rope_theta"], max_length)
    _check_windows(config, max_length)
    latent = _latent_attention(config) if family == "deepseek_v3" else None
    head_dim, groups = None, heads
    if latent is None:
        head_dim = config.get("head_dim")
        groups = config.get("num_key_value_heads") or heads
    else:
        _check_latent_heads(config, latent, heads)
    predicted = (config.get("num_nextn_predict_layers") or 0) if family == "deepseek_v3" else 0
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
        tie_embeddings=bool(config.get("tie_word_embeddings")),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=float(config.get("rms_norm_eps")),
        clip_qkv=config.get("clip_qkv") if family == "olmoe" else None,
        latent_attention=latent,
        multi_token=MultiTokenOptions(layers=1 if predicted and multi_token else 0),
        moe=moe,
    )
    config.check_rest()
    return HubModel(model, router, max_length, quantized, predicted)


def _check_windows(config: _Config, max_length: int) -> None:
    """Attention to the nearest tokens only is not ours; a window that nothing goes beyond is none."""
    window = config.get("sliding_window") if config.family in ("mixtral", "qwen3_moe", "qwen3") else None
    used = config.family == "mixtral" or config.get("use_sliding_window")
    if used and window is not None and window < max_length:
        raise ValueError(f"config.json: sliding_window is {window}; our attention has no window")
    kinds = (config.get("layer_types") if config.family in ("qwen3", "qwen3_moe", "llama3", "mixtral") else None) or []
    other = [kind for kind in kinds if kind != "full_attention"]
    if other:
        raise ValueError(f"config.json: layer_types has {other[0]!r}; our attention is full_attention in all layers")


def _latent_attention(config: _Config) -> LatentAttentionOptions:
    return LatentAttentionOptions(
        query_rank=config.get("q_lora_rank"),
        key_value_rank=config.whole("kv_lora_rank"),
        nope_head_dim=config.whole("qk_nope_head_dim"),
        rope_head_dim=config.whole("qk_rope_head_dim"),
        value_head_dim=config.whole("v_head_dim"),
        interleaved=config.get("rope_interleave") is not False,
    )


def _check_latent_heads(config: _Config, latent: LatentAttentionOptions, heads: int) -> None:
    """What a config.json repeats about the heads must agree with the rest."""
    whole = latent.nope_head_dim + latent.rope_head_dim
    expected = {"num_key_value_heads": (heads,), "qk_head_dim": (whole,), "head_dim": (latent.rope_head_dim, whole)}
    for key, values in expected.items():
        value = config.get(key)
        if value is not None and value not in values:
            raise ValueError(f"config.json: {key} is {value!r}; latent attention with these widths has {values[0]}")


def _dense_layers(config: _Config, layers: int) -> list[int]:
    if config.family == "qwen3_moe":
        step, without = config.whole("decoder_sparse_step"), config.get("mlp_only_layers") or []
        wrong = [layer for layer in without if not 0 <= layer < layers]
        if wrong:
            raise ValueError(f"config.json: mlp_only_layers names {wrong[0]}, but layers are 0 to {layers - 1}")
        return [layer for layer in range(layers) if layer in without or (layer + 1) % step]
    if config.family == "deepseek_v3":
        return list(range(min(layers, config.get("first_k_dense_replace") or 0)))
    return []


def _experts(config: _Config, width: int) -> tuple[MoEOptions, RouterOptions]:
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
        shared = (config.get("n_shared_experts") or 0) * width
        groups = config.get("n_group") or 1
        options = {
            "top_k": top_k,
            "num_groups": groups,
            "groups_per_token": config.get("topk_group") or groups,
            "renormalize": bool(config.get("norm_topk_prob")),
            "scaling": float(config.get("routed_scaling_factor")),
        }
        balancing = BalancingOptions(bias=BiasOptions(rate=BIAS_RATE))
        return MoEOptions(count, width, shared or None), RouterOptions("sigmoid_topk", options, balancing)
    after = family == "mixtral"
    renormalize = after or bool(config.get("norm_topk_prob"))
    options = {"top_k": top_k, "softmax": "after" if after else "before", "renormalize": renormalize}
    return MoEOptions(count, width), RouterOptions("softmax_topk", options)
