"""Names and shapes of everything that our model keeps, from its options alone: no model and no process group is made.

tests/unit/interop/test_shapes.py compares them with the real model's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from moe_train.model.families import family_of, head_width, moe_layer_numbers
from moe_train.model.options import ModelOptions
from moe_train.routing.options import RouterOptions
from moe_train.routing.registry import build_gate

Shapes = dict[str, tuple[int, ...]]


def weight_shapes(model: ModelOptions, router: RouterOptions) -> Shapes:
    """Name (as in checkpoints, without ``model.``) -> shape of every parameter and every state of a gate."""
    hidden = model.hidden_size
    vocab = math.ceil(model.vocab_size / model.vocab_multiple) * model.vocab_multiple
    shapes: Shapes = {"embedding.word_embeddings.weight": (vocab, hidden)}
    for number, prefix in layers(model):
        shapes |= {f"{prefix}.{name}": shape for name, shape in _layer(number, model, router)}
    shapes["decoder.final_layernorm.weight"] = (hidden,)
    if not model.tie_embeddings:
        shapes["output_layer.weight"] = (vocab, hidden)
    if model.multi_token.layers:
        shapes |= {f"mtp.{norm}.weight": (hidden,) for norm in ("embedding_norm", "hidden_norm", "final_layernorm")}
        shapes["mtp.linear_proj.weight"] = (hidden, 2 * hidden)
    return shapes


def state_names(model: ModelOptions, router: RouterOptions) -> frozenset[str]:
    """Names in ``weight_shapes`` of what moves by a rule, in steps too small for bfloat16: a gate's buffers."""
    with torch.device("meta"):
        gate = build_gate(router.gate, router.options, model.hidden_size, model.moe.num_experts)
    own = {"bias_E"} | {f"gate.{name}" for name, _ in gate.named_buffers()}
    ours = {f"{prefix}.mlp.router.{name}" for _, prefix in layers(model) for name in own}
    return frozenset(ours & weight_shapes(model, router).keys())


def layers(model: ModelOptions) -> Iterator[tuple[int, str]]:
    """Number and prefix of each layer; that of multi-token prediction comes behind the last one."""
    yield from ((number, f"decoder.layers.{number}") for number in range(model.num_layers))
    if model.multi_token.layers:
        yield model.num_layers, "mtp.layer"


def _layer(number: int, model: ModelOptions, router: RouterOptions) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, moe = model.hidden_size, model.moe
    yield "input_layernorm.weight", (hidden,)
    attention = _grouped_attention(model) if model.latent_attention is None else _latent_attention(model)
    yield from ((f"self_attention.{name}.weight", shape) for name, shape in attention)
    yield "pre_mlp_layernorm.weight", (hidden,)
    if number not in moe_layer_numbers(model):
        yield from _feed_forward("mlp", hidden, model.ffn_hidden_size or 0)
        return
    with torch.device("meta"):
        gate = build_gate(router.gate, router.options, hidden, moe.num_experts)
    yield from ((f"mlp.router.gate.{name}", tuple(value.shape)) for name, value in gate.state_dict().items())
    if router.balancing.bias.rate > 0:
        yield "mlp.router.bias_E", (moe.num_experts,)
    yield "mlp.experts.weight1", (moe.num_experts, 2 * moe.expert_hidden_size, hidden)
    yield "mlp.experts.weight2", (moe.num_experts, hidden, moe.expert_hidden_size)
    if moe.shared_expert_hidden_size is not None:
        yield from _feed_forward("mlp.shared_experts", hidden, moe.shared_expert_hidden_size)


def _feed_forward(name: str, hidden: int, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight1", (2 * width, hidden)
    yield f"{name}.weight2", (hidden, width)


def _grouped_attention(model: ModelOptions) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, heads, groups = head_width(model), model.num_attention_heads, model.num_key_value_heads
    yield "linear_qkv", ((heads + 2 * groups) * width, model.hidden_size)
    yield "linear_proj", (model.hidden_size, heads * width)
    norm = family_of(model).query_key_norm
    if norm != "none":
        yield "q_layernorm", (width if norm == "head" else heads * width,)
        yield "k_layernorm", (width if norm == "head" else groups * width,)


def _latent_attention(model: ModelOptions) -> Iterator[tuple[str, tuple[int, ...]]]:
    latent, heads, hidden = model.latent_attention, model.num_attention_heads, model.hidden_size
    assert latent is not None
    queries = heads * head_width(model)
    if latent.query_rank is None:
        yield "linear_q", (queries, hidden)
    else:
        yield "linear_q_down", (latent.query_rank, hidden)
        yield "q_layernorm", (latent.query_rank,)
        yield "linear_q_up", (queries, latent.query_rank)
    yield "linear_kv_down", (latent.key_value_rank + latent.rope_head_dim, hidden)
    yield "kv_layernorm", (latent.key_value_rank,)
    yield "linear_kv_up", (heads * (latent.nope_head_dim + latent.value_head_dim), latent.key_value_rank)
    yield "linear_proj", (hidden, heads * latent.value_head_dim)
