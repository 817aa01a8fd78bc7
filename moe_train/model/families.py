"""What the families are: what tells their attention apart, and which layers have experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from moe_train.model.options import ModelOptions


@dataclass(frozen=True)
class Family:
    experts: bool
    query_key_norm: Literal["head", "all", "none"] = "none"
    """RMSNorm of queries and keys: of each head by itself, of all heads as one vector, or none."""
    latent_attention: bool = False
    clips: bool = False
    """Whether model.clip_qkv is known."""


FAMILIES = {
    "qwen3_moe": Family(experts=True, query_key_norm="head"),
    "mixtral": Family(experts=True),
    "olmoe": Family(experts=True, query_key_norm="all", clips=True),
    "deepseek_v3": Family(experts=True, latent_attention=True),
    "qwen3": Family(experts=False, query_key_norm="head"),
    "llama3": Family(experts=False),
}


def family_of(options: ModelOptions) -> Family:
    return FAMILIES[options.family]


def moe_layer_numbers(options: ModelOptions) -> list[int]:
    """Layers with experts, from 0; the layer of multi-token prediction comes behind the last one."""
    if not family_of(options).experts:
        return []
    layers = range(options.num_layers + options.multi_token.layers)
    return [layer for layer in layers if layer not in options.dense_layers]


def evaluated_moe_layers(options: ModelOptions) -> list[int]:
    """Those that every pass of the model goes through: multi-token prediction belongs to training only."""
    return [layer for layer in moe_layer_numbers(options) if layer < options.num_layers]


def head_width(options: ModelOptions) -> int:
    """Width of a head's query and key."""
    if options.latent_attention is not None:
        return options.latent_attention.nope_head_dim + options.latent_attention.rope_head_dim
    return options.head_dim or options.hidden_size // options.num_attention_heads


def rope_width(options: ModelOptions) -> int:
    """Elements of a head that are rotated."""
    return head_width(options) if options.latent_attention is None else options.latent_attention.rope_head_dim


def family_problems(options: ModelOptions) -> Iterator[tuple[str, str]]:
    """(key under ``model``, what is wrong) of options that this family does not have, or lacks."""
    family, name = family_of(options), options.family
    if family.latent_attention != (options.latent_attention is not None):
        yield "latent_attention", f"{name} {'needs' if family.latent_attention else 'has no'} latent attention"
    if options.clip_qkv is not None and not family.clips:
        yield "clip_qkv", f"{name} clips nothing; olmoe does"
    if options.clip_qkv is not None and not options.clip_qkv > 0:
        yield "clip_qkv", "must be above 0"
    wrong = [layer for layer in options.dense_layers if not 0 <= layer < options.num_layers]
    if wrong:
        yield "dense_layers", f"there is no layer {wrong[0]}; layers are 0 to {options.num_layers - 1}"
    if len(set(options.dense_layers)) < len(options.dense_layers):
        yield "dense_layers", "a layer is named twice"
    if options.dense_layers and not family.experts:
        yield "dense_layers", f"all layers of {name} are dense: leave the list empty"
    dense = options.dense_layers or not family.experts
    if dense and options.ffn_hidden_size is None:
        yield "ffn_hidden_size", "is needed for layers without experts"
    if not dense and options.ffn_hidden_size is not None:
        yield "ffn_hidden_size", "there is no layer without experts that could have it"
    if options.multi_token.layers and name != "deepseek_v3":
        yield "multi_token.layers", f"{name} has no multi-token prediction; deepseek_v3 does"
    scaling = options.rope_scaling
    if scaling is not None and not scaling.factor >= 1:
        yield "rope_scaling.factor", "must be at least 1"
    if rope_width(options) % 2:
        yield "head_dim", f"{rope_width(options)} elements are rotated in pairs: choose an even number"
