"""Which tensor of the hub is which part of which parameter of ours: one table per family.

``{layer}`` is the number of a layer on the hub's side and its prefix on ours, ``{expert}`` the number of an expert and
our first index, ``{next}`` the number of the layer of multi-token prediction. A row stands for as many tensors as we
have parameters of that name; each value of ours is in exactly one row.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Part(Enum):
    WHOLE = "whole"
    GATE = "the upper half of the rows"
    UP = "the lower half of the rows"
    QUERY = "of each key/value head's rows its query heads"
    KEY = "of each key/value head's rows its key"
    VALUE = "of each key/value head's rows its value"
    VOCABULARY = "the rows of tokens, without those of padding"


@dataclass(frozen=True)
class Row:
    hub: str
    ours: str
    part: Part = Part.WHOLE
    zeros: bool = False
    """Whether the hub's tensor is zero where our model has layers with experts without this parameter."""


@dataclass(frozen=True)
class Copy:
    """A tensor of the hub that repeats another one."""

    hub: str
    of: str
    optional: bool = False
    """Whether it may be missing; that it was there is remembered."""


def _feed_forward(
    hub: str, ours: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> list[Row]:
    return [
        Row(f"{hub}.{gate}.weight", f"{ours}.weight1", Part.GATE),
        Row(f"{hub}.{up}.weight", f"{ours}.weight1", Part.UP),
        Row(f"{hub}.{down}.weight", f"{ours}.weight2"),
    ]


_EMBEDDING = [Row("model.embed_tokens.weight", "embedding.word_embeddings.weight", Part.VOCABULARY)]
_END = [
    Row("model.norm.weight", "decoder.final_layernorm.weight"),
    Row("lm_head.weight", "output_layer.weight", Part.VOCABULARY),
]
_NORMS = [
    Row("model.layers.{layer}.input_layernorm.weight", "{layer}.input_layernorm.weight"),
    Row("model.layers.{layer}.post_attention_layernorm.weight", "{layer}.pre_mlp_layernorm.weight"),
]
_ATTENTION = [
    Row("model.layers.{layer}.self_attn.q_proj.weight", "{layer}.self_attention.linear_qkv.weight", Part.QUERY),
    Row("model.layers.{layer}.self_attn.k_proj.weight", "{layer}.self_attention.linear_qkv.weight", Part.KEY),
    Row("model.layers.{layer}.self_attn.v_proj.weight", "{layer}.self_attention.linear_qkv.weight", Part.VALUE),
    Row("model.layers.{layer}.self_attn.o_proj.weight", "{layer}.self_attention.linear_proj.weight"),
]
_QUERY_KEY_NORM = [
    Row("model.layers.{layer}.self_attn.q_norm.weight", "{layer}.self_attention.q_layernorm.weight"),
    Row("model.layers.{layer}.self_attn.k_norm.weight", "{layer}.self_attention.k_layernorm.weight"),
]
_DENSE = _feed_forward("model.layers.{layer}.mlp", "{layer}.mlp")
_EXPERTS = [
    Row("model.layers.{layer}.mlp.gate.weight", "{layer}.mlp.router.gate.weight"),
    *_feed_forward("model.layers.{layer}.mlp.experts.{expert}", "{layer}.mlp.experts"),
]
_LLAMA3 = [*_EMBEDDING, *_NORMS, *_ATTENTION, *_DENSE, *_END]

TABLES: dict[str, list[Row]] = {
    "llama3": _LLAMA3,
    "qwen3": [*_LLAMA3, *_QUERY_KEY_NORM],
    "qwen3_moe": [*_EMBEDDING, *_NORMS, *_ATTENTION, *_QUERY_KEY_NORM, *_DENSE, *_EXPERTS, *_END],
    "olmoe": [*_EMBEDDING, *_NORMS, *_ATTENTION, *_QUERY_KEY_NORM, *_EXPERTS, *_END],
    "mixtral": [
        *_EMBEDDING,
        *_NORMS,
        *_ATTENTION,
        Row("model.layers.{layer}.block_sparse_moe.gate.weight", "{layer}.mlp.router.gate.weight"),
        *_feed_forward(
            "model.layers.{layer}.block_sparse_moe.experts.{expert}", "{layer}.mlp.experts", "w1", "w3", "w2"
        ),
        *_END,
    ],
    "deepseek_v3": [
        *_EMBEDDING,
        *_NORMS,
        Row("model.layers.{layer}.self_attn.q_proj.weight", "{layer}.self_attention.linear_q.weight"),
        Row("model.layers.{layer}.self_attn.q_a_proj.weight", "{layer}.self_attention.linear_q_down.weight"),
        Row("model.layers.{layer}.self_attn.q_a_layernorm.weight", "{layer}.self_attention.q_layernorm.weight"),
        Row("model.layers.{layer}.self_attn.q_b_proj.weight", "{layer}.self_attention.linear_q_up.weight"),
        Row("model.layers.{layer}.self_attn.kv_a_proj_with_mqa.weight", "{layer}.self_attention.linear_kv_down.weight"),
        Row("model.layers.{layer}.self_attn.kv_a_layernorm.weight", "{layer}.self_attention.kv_layernorm.weight"),
        Row("model.layers.{layer}.self_attn.kv_b_proj.weight", "{layer}.self_attention.linear_kv_up.weight"),
        Row("model.layers.{layer}.self_attn.o_proj.weight", "{layer}.self_attention.linear_proj.weight"),
        *_DENSE,
        *_EXPERTS,
        Row("model.layers.{layer}.mlp.gate.e_score_correction_bias", "{layer}.mlp.router.bias_E", zeros=True),
        *_feed_forward("model.layers.{layer}.mlp.shared_experts", "{layer}.mlp.shared_experts"),
        Row("model.layers.{next}.enorm.weight", "mtp.embedding_norm.weight"),
        Row("model.layers.{next}.hnorm.weight", "mtp.hidden_norm.weight"),
        Row("model.layers.{next}.eh_proj.weight", "mtp.linear_proj.weight"),
        Row("model.layers.{next}.shared_head.norm.weight", "mtp.final_layernorm.weight"),
        *_END,
    ],
}

TIED = Copy("lm_head.weight", of="model.embed_tokens.weight", optional=True)
"""Where the embedding is the head."""
NEXT_TOKEN = [
    Copy("model.layers.{next}.embed_tokens.weight", of="model.embed_tokens.weight"),
    Copy("model.layers.{next}.shared_head.head.weight", of="lm_head.weight"),
]
"""Where there is multi-token prediction."""
COMPUTED = ".self_attn.rotary_emb.inv_freq"
"""End of the name of what some older files hold and no model reads: the frequencies follow from config.json."""
OTHER_LAYOUTS = {
    ".experts.gate_up_proj": "experts in one tensor, as in transformers' memory",
    ".experts.down_proj": "experts in one tensor, as in transformers' memory",
    ".mlp.gate_up_proj.": "gate and up projection in one tensor",
    ".qkv_proj.": "query, key and value projection in one tensor",
    ".mlp.gate.wg.": "another name of the gate",
}
"""Part of a name, and what it means."""
