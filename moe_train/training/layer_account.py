"""Arithmetic of single layers, of every family: pure functions of ModelOptions."""

from __future__ import annotations

from moe_train.model.families import family_of, head_width, moe_layer_numbers
from moe_train.model.options import LatentAttentionOptions, ModelOptions


def expert_layers(model: ModelOptions) -> int:
    """Layers with a gate and experts; that of multi-token prediction, which has them too, not counted."""
    return sum(number < model.num_layers for number in moe_layer_numbers(model))


def dense_layers(model: ModelOptions) -> int:
    """Layers whose feed-forward part every token passes whole."""
    return model.num_layers - expert_layers(model)


def swiglu(hidden: int, width: int | None) -> int:
    """Elements of gate, up and down projection of one expert or feed-forward part; 0 where there is none."""
    return 3 * hidden * (width or 0)


def attention_matrices(model: ModelOptions) -> int:
    """Elements of the projections of one layer's attention; each is used once per token."""
    hidden, heads, width = model.hidden_size, model.num_attention_heads, head_width(model)
    if (latent := model.latent_attention) is None:
        # Query, output; key, value.
        return 2 * hidden * heads * width + 2 * hidden * model.num_key_value_heads * width
    key_value = hidden * (latent.key_value_rank + latent.rope_head_dim)
    key_value += latent.key_value_rank * heads * (latent.nope_head_dim + latent.value_head_dim)
    return _latent_queries(model, latent) + key_value + heads * latent.value_head_dim * hidden


def _latent_queries(model: ModelOptions, latent: LatentAttentionOptions) -> int:
    queries = model.num_attention_heads * head_width(model)
    if latent.query_rank is None:
        return model.hidden_size * queries
    return latent.query_rank * (model.hidden_size + queries)


def attention_norms(model: ModelOptions) -> int:
    """Weights of the norms inside one layer's attention: of queries and keys, or of the latent ranks."""
    if (latent := model.latent_attention) is not None:
        return (latent.query_rank or 0) + latent.key_value_rank
    kind, width = family_of(model).query_key_norm, head_width(model)
    heads = {"none": 0, "head": 2, "all": model.num_attention_heads + model.num_key_value_heads}[kind]
    return heads * width


def score_width(model: ModelOptions) -> int:
    """Multiply-adds of one layer for one query and one key: the score, and its share of the weighted sum."""
    latent, width = model.latent_attention, head_width(model)
    return model.num_attention_heads * (width + (width if latent is None else latent.value_head_dim))


def attention_activations(model: ModelOptions) -> int:
    """Elements that attention keeps for the backward pass, per token and layer."""
    heads, width, latent = model.num_attention_heads, head_width(model), model.latent_attention
    if latent is None:
        query, key_value = heads * width, model.num_key_value_heads * width
        # The projection, of which the value is a part; query and key rotated; output; what norms and clipping saw, and
        # the clipped value.
        normed = query + key_value if family_of(model).query_key_norm != "none" else 0
        clipped = query + 2 * key_value if model.clip_qkv is not None else 0
        return (query + 2 * key_value) + (query + key_value) + query + normed + clipped
    # Ranks before and after their norms.
    ranks = 2 * (latent.query_rank or 0) + 2 * latent.key_value_rank
    value = latent.value_head_dim
    if width == value:
        # Query and key, the projection of which the value is a part, output.
        return ranks + heads * (2 * width + (latent.nope_head_dim + value) + value)
    # Query, key, value and output of one width, as the kernels want them, and the output of its own.
    return ranks + heads * (4 * max(width, value) + value)
