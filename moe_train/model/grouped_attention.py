"""Attention with grouped key/value heads on megatron-core's projections: qwen3, llama3, mixtral, olmoe.

Under tensor parallelism each rank has an equal share of the key/value heads and the query heads that go with them. It
attends over whole sequences, while what comes in and goes out are its own positions.

Suffixes: S sequence, s positions of this rank, B batch, H hidden, N query heads, G key/value heads (of this rank),
D width of a head, P pairs = D / 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_train.model.families import family_of
from moe_train.model.micro_batch import current
from moe_train.model.norm import RMSNorm
from moe_train.model.options import ModelOptions
from moe_train.model.rotary import rotate
from moe_train.model.upstream import SelfAttention
from moe_train.parallel.shard import divide


class GroupedAttention(SelfAttention):
    """Rows of ``linear_qkv``: for each key/value head its query heads, its key, its value."""

    def __init__(self, *args: Any, options: ModelOptions, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        divide(self.linear_qkv.weight, 0, self.pg_collection.tp)
        divide(self.linear_proj.weight, 1, self.pg_collection.tp)
        self.clip = options.clip_qkv
        self.norm_all_heads = family_of(options).query_key_norm == "all"
        if self.norm_all_heads:
            # Upstream knows norms of single heads only.
            self.q_layernorm = RMSNorm(self.config, self.query_projection_size, options.norm_eps)
            self.k_layernorm = RMSNorm(self.config, self.kv_projection_size, options.norm_eps)

    def forward(self, hidden_sBH: Tensor, *_: Any, rotary_pos_emb: Tensor, **__: Any) -> tuple[Tensor, None]:
        """Returns [s, B, H] and no bias; ``rotary_pos_emb`` [2, S, B, 1, P] are cosines and sines."""
        q_SBND, k_SBGD, v_SBGD = self._projected(hidden_sBH)
        q_SBND, k_SBGD = rotate(q_SBND, rotary_pos_emb), rotate(k_SBGD, rotary_pos_emb)
        cache = current().cache
        if cache is not None:
            k_SBGD, v_SBGD = cache.append(self.layer_number, k_SBGD, v_SBGD)
        out, _bias = self.linear_proj(self.core_attention(q_SBND, k_SBGD, v_SBGD))
        return out, None

    def _projected(self, hidden_sBH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads, groups, width = (
            self.num_attention_heads_per_partition,
            self.num_query_groups_per_partition,
            self.hidden_size_per_attention_head,
        )
        mixed, _bias = self.linear_qkv(hidden_sBH)
        sequence, batch = mixed.shape[:2]
        mixed = mixed.view(sequence, batch, groups, -1)
        q, k, v = torch.split(mixed, [heads // groups * width, width, width], dim=3)
        if self.norm_all_heads:
            q, k = self.q_layernorm(q.flatten(2)), self.k_layernorm(k.flatten(2))
        if self.clip is not None:
            q, k, v = (x.clamp(-self.clip, self.clip) for x in (q, k, v))
        q_SBND, k_SBGD, v_SBGD = (x.reshape(sequence, batch, -1, width) for x in (q, k, v))
        if self.q_layernorm is not None and not self.norm_all_heads:
            q_SBND, k_SBGD = self.q_layernorm(q_SBND), self.k_layernorm(k_SBGD)
        return q_SBND, k_SBGD, v_SBGD
