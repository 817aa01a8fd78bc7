"""The average of batch means: the loss that trainers report which average per batch, beside the exact one.

Each batch of documents has the mean negative log likelihood of its target tokens; these means are averaged, weighted
by the documents of the batch. So a token counts for more in a batch of short documents. Hugging Face's Trainer reports
this as `eval_loss`.

Suffixes: B sequences, S tokens per sequence, D documents, G batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_train.data.batches import Batch
from moe_train.evaluation.loss import Forward
from moe_train.routing.interface import Routing


class BatchAverage:
    """Sums over batches of consecutive documents, however documents are spread over ranks and forward passes.

    index_D: the documents' sample numbers, in increasing order.   batch_documents: documents of a batch; the last may
    have fewer.
    """

    def __init__(self, index_D: npt.NDArray[np.int64], batch_documents: int, device: torch.device | str) -> None:
        self.batch_documents = batch_documents
        self._index_D = torch.from_numpy(index_D)
        batches = -(-len(index_D) // batch_documents)
        self._nll_G = torch.zeros(batches, dtype=torch.float64, device=device)
        self._targets_G = torch.zeros(batches, dtype=torch.int64, device=device)

    def watch(self, forward: Forward) -> Forward:
        """The same function, whose results are added up here on the way."""

        def watched(batch: Batch) -> tuple[Tensor, list[Routing]]:
            nll_BS, routings = forward(batch)
            self.add(batch, nll_BS)
            return nll_BS, routings

        return watched

    def add(self, batch: Batch, nll_BS: Tensor) -> None:
        """nll_BS: of each label, in nats; what stands at a position without a target does not matter."""
        device = self._nll_G.device
        real_B = batch.sample_B >= 0
        place_B = torch.searchsorted(self._index_D, batch.sample_B[real_B])
        batch_B = (place_B // self.batch_documents).to(device)
        target_BS = batch.target_BS[real_B].to(device)
        nll_BS = nll_BS.detach().to(device, torch.float64)[real_B.to(device)].masked_fill(~target_BS, 0.0)
        self._nll_G.index_add_(0, batch_B, nll_BS.sum(1))
        self._targets_G.index_add_(0, batch_B, target_BS.sum(1))

    def loss(self, reduce: Callable[[Tensor], Tensor]) -> float:
        """The average; a batch without any target is left out. ``reduce`` sums a tensor over the ranks."""
        nll_G, targets_G = reduce(self._nll_G).cpu(), reduce(self._targets_G).cpu()
        documents_G = torch.full_like(nll_G, self.batch_documents)
        documents_G[-1] = len(self._index_D) - self.batch_documents * (len(documents_G) - 1)
        there_G = targets_G > 0
        means_G = nll_G[there_G] / targets_G[there_G]
        return float((means_G * documents_G[there_G]).sum() / documents_G[there_G].sum())

    def to_json(self, loss: float) -> dict[str, float | int]:
        """Keys of docs/evaluation.md."""
        return {
            "batch_documents": self.batch_documents,
            "loss_batch_average": loss,
            "perplexity_batch_average": math.exp(loss) if loss < 700 else math.inf,
        }
