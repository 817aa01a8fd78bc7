"""Multi-head latent attention: deepseek_v3.

Suffixes: S sequence, B batch, L tokens in a cache, H hidden, N heads, Q rank of queries, R rank of keys and values,
D = nope + rope width of a head's query and key, V width of its value, P pairs = rope / 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_train.model.families import head_width
from moe_train.model.micro_batch import current
from moe_train.model.norm import RMSNorm
from moe_train.model.options import ModelOptions
from moe_train.model.rotary import latent_score_scale, rotate
from moe_train.model.upstream import MegatronModule

_NORM_EPS = 1e-6
"""Of the norms inside, whatever that of the others is: as in DeepSeek's published models."""


class LatentAttention(MegatronModule):
    """q = W_up norm(W_down x) (or W x); (c, k_rope) = W_kv x; (k_nope, v) of each head = W_kv_up norm(c); heads attend
    with [nope, rope] of both, the key's rope part being the same for all. Source: DeepSeek-V2 (arXiv 2405.04434),
    section 2.1. The cache keeps c and k_rope."""

    def __init__(self, config: Any, *, options: ModelOptions, core: type, layer_number: int, **_: Any) -> None:
        super().__init__(config=config)
        latent = options.latent_attention
        assert latent is not None
        self.latent, self.layer_number, self.heads = latent, layer_number, options.num_attention_heads
        hidden, width = options.hidden_size, head_width(options)

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False)

        self.linear_q: nn.Linear | None = None
        if latent.query_rank is None:
            self.linear_q = linear(hidden, self.heads * width)
        else:
            self.linear_q_down = linear(hidden, latent.query_rank)
            self.q_layernorm = RMSNorm(config, latent.query_rank, _NORM_EPS)
            self.linear_q_up = linear(latent.query_rank, self.heads * width)
        self.linear_kv_down = linear(hidden, latent.key_value_rank + latent.rope_head_dim)
        self.kv_layernorm = RMSNorm(config, latent.key_value_rank, _NORM_EPS)
        self.linear_kv_up = linear(latent.key_value_rank, self.heads * (latent.nope_head_dim + latent.value_head_dim))
        self.core_attention = core(config, softmax_scale=latent_score_scale(options, width))
        self.linear_proj = linear(self.heads * latent.value_head_dim, hidden)

    def forward(self, hidden_SBH: Tensor, *_: Any, rotary_pos_emb: Tensor, **__: Any) -> tuple[Tensor, None]:
        """Returns [S, B, H] and no bias; ``rotary_pos_emb`` [2, S, B, 1, P] are cosines and sines."""
        latent = self.latent
        sequence, batch = hidden_SBH.shape[:2]
        q_SBND = self._queries(hidden_SBH).view(sequence, batch, self.heads, -1)
        q_nope, q_rope = q_SBND.split([latent.nope_head_dim, latent.rope_head_dim], dim=-1)
        q_SBND = torch.cat([q_nope, rotate(q_rope, rotary_pos_emb, latent.interleaved)], dim=-1)
        c_SBR, k_rope = self.linear_kv_down(hidden_SBH).split([latent.key_value_rank, latent.rope_head_dim], dim=-1)
        c_SBR, k_rope_SB1 = self.kv_layernorm(c_SBR), rotate(k_rope.unsqueeze(2), rotary_pos_emb, latent.interleaved)
        cache = current().cache
        if cache is not None:
            c_SBR, k_rope_SB1 = cache.append(self.layer_number, c_SBR, k_rope_SB1)
        kv_LBN = self.linear_kv_up(c_SBR).view(*c_SBR.shape[:2], self.heads, -1)
        k_nope, v_LBNV = kv_LBN.split([latent.nope_head_dim, latent.value_head_dim], dim=-1)
        k_LBND = torch.cat([k_nope, k_rope_SB1.expand(-1, -1, self.heads, -1)], dim=-1)
        return self.linear_proj(self.core_attention(q_SBND, k_LBND, v_LBNV)), None

    def _queries(self, hidden_SBH: Tensor) -> Tensor:
        if self.linear_q is not None:
            return self.linear_q(hidden_SBH)  # type: ignore[no-any-return]
        return self.linear_q_up(self.q_layernorm(self.linear_q_down(hidden_SBH)))  # type: ignore[no-any-return]
