"""Multi-token prediction: one more layer that sees the next token and predicts the one behind it.

Suffixes: S sequence, B batch, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_train.model.norm import RMSNorm
from moe_train.model.upstream import MegatronModule

UNIT = "multi_token"
"""What its loss is divided by: the positions that `multi_token_targets` names, over the whole optimizer step."""


class MultiTokenPrediction(MegatronModule):
    """h'_i = norm(layer(P [norm(Emb(t_{i+1})); norm(h_i)])), from which the model's own head predicts t_{i+2}; h_i is
    what comes out of the model's final norm. Source: DeepSeek-V3 (arXiv 2412.19437), section 2.2, depth 1."""

    def __init__(self, config: Any, layer: nn.Module, number: int) -> None:
        """``layer``: a decoder layer; ``number``: its place among all layers, from 0, by which its statistics go."""
        super().__init__(config=config)
        hidden, eps = config.hidden_size, config.layernorm_epsilon
        self.number = number
        self.embedding_norm = RMSNorm(config, hidden, eps)
        self.hidden_norm = RMSNorm(config, hidden, eps)
        self.linear_proj = nn.Linear(2 * hidden, hidden, bias=False)
        self.layer = layer
        self.final_layernorm = RMSNorm(config, hidden, eps)

    def forward(self, next_SBH: Tensor, hidden_SBH: Tensor, angles_2SB1P: Tensor) -> Tensor:
        """[S, B, H] for the head, from the embeddings of the next tokens, the model's last hidden states, and cosines
        and sines of the positions."""
        both = torch.cat([self.embedding_norm(next_SBH), self.hidden_norm(hidden_SBH)], dim=-1)
        out_SBH, _ = self.layer(self.linear_proj(both), attention_mask=None, rotary_pos_emb=angles_2SB1P)
        return self.final_layernorm(out_SBH)  # type: ignore[no-any-return]


def multi_token_targets(target_BS: Tensor, position_BS: Tensor | None) -> Tensor:
    """Positions whose next token and the one behind it are both targets, bool [B, S].

    ``position_BS``: offsets inside the texts that do not see each other, None where each sequence is one text.
    """
    both_BS = target_BS[:, :-1] & target_BS[:, 1:]
    if position_BS is not None:
        both_BS = both_BS & (position_BS[:, 1:] > 0)
    return F.pad(both_BS, (0, 1))


def multi_token_labels(labels_BS: Tensor) -> Tensor:
    """The token behind the next one; 0 at the end of a sequence, which has none."""
    return F.pad(labels_BS[:, 1:], (0, 1))
