"""The token set that a token loss is taken over: a sequence, a micro-batch, or the global batch.

Suffixes: T tokens (t = s * B + b), S sequence, B sequences, G token sets (B for ``sequence``, else 1), N and M columns.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from moe_train.routing.interface import LossTerm, TokenBatch
from moe_train.routing.options import Scope


class TokenSets:
    """Sums over the non-padding tokens of each set of a micro-batch, and the loss terms made of them.

    Units. ``sequence``: a loss per sequence, averaged over the sequences of the step that hold a token.
    ``micro_batch``: one per micro-batch that holds a token, averaged likewise. ``global_batch``: the statistics cover
    the ranks and the window so far, the loss is a sum over this micro-batch's tokens, divided by those of the step.
    """

    def __init__(self, batch: TokenBatch, scope: Scope) -> None:
        self.batch = batch
        self.scope = scope

    @cached_property
    def tokens_G(self) -> Tensor:
        """Non-padding tokens per set, int64."""
        valid_T = ~self.batch.padding_T
        if self.scope == "sequence":
            return valid_T.view(self.batch.sequence_length, self.batch.batch_size).sum(0)
        return valid_T.sum().view(1)

    def sums(self, x_TN: Tensor) -> Tensor:
        """[G, N]: sum of x over the tokens of each set."""
        x_TN = self._real(x_TN)
        if self.scope == "sequence":
            return x_TN.view(self.batch.sequence_length, self.batch.batch_size, -1).sum(0)
        return x_TN.sum(0, keepdim=True)

    def products(self, x_TN: Tensor, y_TM: Tensor) -> Tensor:
        """[G, N, M]: sum over the tokens of each set of the outer product of x and y."""
        x_TN, y_TM = self._real(x_TN), self._real(y_TM)
        if self.scope == "sequence":
            shape = (self.batch.sequence_length, self.batch.batch_size, -1)
            return torch.bmm(x_TN.view(shape).permute(1, 2, 0), y_TM.view(shape).transpose(0, 1))
        return torch.mm(x_TN.t(), y_TM)[None]

    def _real(self, x_TN: Tensor) -> Tensor:
        """x with 0 for padding, also where it is not finite there: a product with 0 would keep a NaN."""
        return x_TN.masked_fill(self.batch.padding_T[:, None], 0)

    def term_of_means(self, total_G: Tensor, coefficient: float) -> LossTerm:
        """The loss total_G / (tokens of the set): for losses that are linear in sums over this micro-batch's tokens
        (in ``global_batch`` everything else in ``total_G`` being a statistic of the window)."""
        if self.scope == "global_batch":
            return LossTerm(total_G.sum(), self.tokens_G.sum(), "token", coefficient)
        return self.term(total_G / self.tokens_G.clamp(min=1), coefficient)

    def term(self, loss_G: Tensor, coefficient: float) -> LossTerm:
        """The loss ``loss_G`` of each set; sets without a token count for nothing. In ``global_batch`` the one value is
        weighted with this micro-batch's tokens, so that a value which all ranks share counts once per step."""
        if self.scope == "global_batch":
            tokens = self.tokens_G.sum()
            return LossTerm(loss_G.sum() * tokens, tokens, "token", coefficient)
        present_G = self.tokens_G > 0
        return LossTerm(loss_G.masked_fill(~present_G, 0.0).sum(), present_G.sum(), self.scope, coefficient)
