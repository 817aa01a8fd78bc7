"""The language-model head: owns (or shares) the projection onto the vocabulary, turns hidden states into the loss."""

from __future__ import annotations

from torch import Tensor, nn

from moe_train.model.cross_entropy import linear_cross_entropy

_CHUNK_BYTES = {"cpu": 2**22, "cuda": 2**29}
"""Size of one chunk's float32 logits: what stays in a core's cache, or keeps a large multiplication busy."""
_CHUNK_BYTES_ELSEWHERE = 2**26
_SMALLEST_CHUNK = 32


def default_chunk_tokens(vocab_size: int, device_type: str) -> int:
    """Tokens whose logits exist at one time where model.loss_chunk_tokens is null."""
    size = _CHUNK_BYTES.get(device_type, _CHUNK_BYTES_ELSEWHERE)
    return max(_SMALLEST_CHUNK, size // (4 * vocab_size))


class LanguageModelHead(nn.Module):
    """The loss is computed here, inside the forward of the module that owns the weight, because ZeRO-3 gathers a
    parameter only there. Rows of the weight beyond ``vocab_size`` are padding and take no part."""

    def __init__(self, weight_VH: nn.Parameter, vocab_size: int, chunk_tokens: int | None) -> None:
        super().__init__()
        self.weight = weight_VH
        self.vocab_size = vocab_size
        self.chunk_tokens = chunk_tokens

    def forward(
        self, hidden_SBH: Tensor, labels_BS: Tensor | None = None, target_BS: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | Tensor:
        """With labels: sum of the negative log-likelihoods over the targets, and each token's own [B, S] (detached).
        Without: logits [B, S, V]."""
        # The gradient of a slice is a copy of the whole weight, so there is none without padding.
        whole = self.weight.shape[0] == self.vocab_size
        weight_VH = self.weight if whole else self.weight[: self.vocab_size]
        if labels_BS is None:
            return (hidden_SBH @ weight_VH.t()).transpose(0, 1)
        assert target_BS is not None
        sequence, batch, hidden = hidden_SBH.shape
        nll_sum, nll_T = linear_cross_entropy(
            hidden_SBH.reshape(-1, hidden),
            weight_VH,
            labels_BS.t().reshape(-1),
            target_BS.t().reshape(-1),
            self.chunk_tokens or default_chunk_tokens(self.vocab_size, hidden_SBH.device.type),
        )
        return nll_sum, nll_T.detach().view(sequence, batch).t()
