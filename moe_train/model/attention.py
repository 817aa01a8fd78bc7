"""Core attention through torch's scaled_dot_product_attention, as megatron-core's specs build it.

Suffixes: S sequence, B batch, N query heads, G key/value heads, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from moe_train.model.upstream import MegatronModule


class ScaledDotProductAttention(MegatronModule):
    """Causal attention; each group of N / G query heads shares one key/value head."""

    def __init__(self, config: Any, *, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query_SBND: Tensor,
        key_SBGD: Tensor,
        value_SBGD: Tensor,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Returns [S, B, N * D]."""
        assert attention_mask is None, "only causal attention is built"
        q_BNSD, k_BGSD, v_BGSD = (x.permute(1, 2, 0, 3) for x in (query_SBND, key_SBGD, value_SBGD))
        out_BNSD = F.scaled_dot_product_attention(
            q_BNSD,
            k_BGSD,
            v_BGSD,
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=q_BNSD.shape[1] != k_BGSD.shape[1],
        )
        out_SBND = out_BNSD.permute(2, 0, 1, 3)
        return out_SBND.reshape(*out_SBND.shape[:2], -1)
