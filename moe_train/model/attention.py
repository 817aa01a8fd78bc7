"""Core attention through torch's scaled_dot_product_attention, as megatron-core's specs build it.

Suffixes: S sequence, B batch, L tokens in a cache, N query heads, G key/value heads, D width of a head's query and key,
V of its value.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moe_train.model.kernels import attend_visible, causal_attention
from moe_train.model.micro_batch import current
from moe_train.model.texts import Texts, attend
from moe_train.model.upstream import MegatronModule


class ScaledDotProductAttention(MegatronModule):
    """Causal attention; each group of N / G query heads shares one key/value head. Where the micro-batch has texts that
    do not see each other, a token sees its own text only; with a cache, what was read before too."""

    def __init__(self, config: Any, *, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale

    def forward(self, query_SBND: Tensor, key_LBGD: Tensor, value_LBGV: Tensor) -> Tensor:
        """Returns [S, B, N * V]. More keys than queries: those of a cache come first."""
        micro_batch = current()
        texts, cache = micro_batch.texts, micro_batch.cache
        if texts is not None:
            assert cache is None, "a cache holds one text per sequence"
            return self._inside_texts(query_SBND, key_LBGD, value_LBGV, texts)
        q_BNSD, k_BGLD, v_BGLV = (x.permute(1, 2, 0, 3) for x in (query_SBND, key_LBGD, value_LBGV))
        if cache is None or not cache.longest:
            out_BNSV = causal_attention(q_BNSD, k_BGLD, v_BGLV, self.softmax_scale)
        else:
            out_BNSV = attend_visible(q_BNSD, k_BGLD, v_BGLV, cache.visible(query_SBND.shape[0]), self.softmax_scale)
        out_SBNV = out_BNSV.permute(2, 0, 1, 3)
        return out_SBNV.reshape(*out_SBNV.shape[:2], -1)

    def _inside_texts(self, query_SBND: Tensor, key_SBGD: Tensor, value_SBGV: Tensor, texts: Texts) -> Tensor:
        q_TND, k_TGD, v_TGV = (x.transpose(0, 1).flatten(0, 1) for x in (query_SBND, key_SBGD, value_SBGV))
        out_TNV = attend(q_TND, k_TGD, v_TGV, texts, self.softmax_scale)
        sequence, batch = query_SBND.shape[:2]
        return out_TNV.reshape(batch, sequence, -1).transpose(0, 1)
