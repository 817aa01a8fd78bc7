"""Core attention through torch's scaled_dot_product_attention, as megatron-core's specs build it.

Suffixes: S sequence, B batch, N query heads, G key/value heads, D width of a head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moe_train.model.kernels import causal_attention
from moe_train.model.micro_batch import current
from moe_train.model.texts import Texts, attend
from moe_train.model.upstream import MegatronModule


class ScaledDotProductAttention(MegatronModule):
    """Causal attention; each group of N / G query heads shares one key/value head. Where the micro-batch has texts that
    do not see each other, a token sees its own text only."""

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
        texts = current().texts
        if texts is not None:
            return self._inside_texts(query_SBND, key_SBGD, value_SBGD, texts)
        q_BNSD, k_BGSD, v_BGSD = (x.permute(1, 2, 0, 3) for x in (query_SBND, key_SBGD, value_SBGD))
        out_BNSD = causal_attention(q_BNSD, k_BGSD, v_BGSD, self.softmax_scale)
        out_SBND = out_BNSD.permute(2, 0, 1, 3)
        return out_SBND.reshape(*out_SBND.shape[:2], -1)

    def _inside_texts(self, query_SBND: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, texts: Texts) -> Tensor:
        q_TND, k_TGD, v_TGD = (x.transpose(0, 1).flatten(0, 1) for x in (query_SBND, key_SBGD, value_SBGD))
        out_TND = attend(q_TND, k_TGD, v_TGD, texts, self.softmax_scale)
        sequence, batch = query_SBND.shape[:2]
        return out_TND.reshape(batch, sequence, -1).transpose(0, 1)
