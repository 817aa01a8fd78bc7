"""What the model has read of each sequence of a batch, and the logits of what comes next.

Suffixes: B sequences (one that is padding only, where a rank has none), S tokens that are read now, T = S * B,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_train.model.cache import KeyValueCache
from moe_train.model.micro_batch import MicroBatch, use
from moe_train.routing.interface import TokenBatch


class Context(Protocol):
    def logits(self) -> Tensor:
        """Of the next token of each sequence, [B, V]; one pass of the model, collective over the ranks that share
        experts."""

    def append(self, ids: Sequence[int | None]) -> None:
        """The next token of each sequence; None for one that has ended."""


class CachedContext:
    """Reads each token once; what it leaves in attention is kept."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], samples: Sequence[int], capacity: int) -> None:
        """samples: numbers that tell the sequences of all ranks apart.   capacity: most tokens of a sequence, prompt
        included."""
        self._model, self._device = model, _device_of(model)
        self._samples = list(samples) or [0]
        self._new: list[Sequence[int]] = [list(prompt) for prompt in prompts] or [[]]
        self._cache = KeyValueCache(len(self._new), capacity, self._device)

    def logits(self) -> Tensor:
        ids_BS, real_B = _side_by_side(self._new, self._device)
        position_SB = self._cache.positions(ids_BS.shape[1])
        micro_batch = _micro_batch(ids_BS, real_B, self._samples, position_SB)
        micro_batch.cache = self._cache
        out_BV = _run(self._model, ids_BS, micro_batch)
        self._cache.advance(real_B)
        return out_BV

    def append(self, ids: Sequence[int | None]) -> None:
        self._new = [[] if token is None else [token] for token in ids] or [[]]


class WholeContext:
    """Reads everything again for each token."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], samples: Sequence[int]) -> None:
        self._model, self._device = model, _device_of(model)
        self._samples = list(samples) or [0]
        self._read: list[list[int]] = [list(prompt) for prompt in prompts] or [[]]

    def logits(self) -> Tensor:
        ids_BS, real_B = _side_by_side(self._read, self._device)
        position_SB = torch.arange(ids_BS.shape[1], device=self._device)[:, None].expand(ids_BS.t().shape)
        return _run(self._model, ids_BS, _micro_batch(ids_BS, real_B, self._samples, position_SB))

    def append(self, ids: Sequence[int | None]) -> None:
        # A sequence that has ended is padding from now on.
        self._read = [[] if token is None else [*read, token] for read, token in zip(self._read, ids, strict=False)]
        self._read = self._read or [[]]


def _side_by_side(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids [B, S] with zeros behind the shorter ones, and how many of each are real [B]."""
    length = max(1, *(len(ids) for ids in sequences))
    rows = [[*ids, *[0] * (length - len(ids))] for ids in sequences]
    return torch.tensor(rows, device=device), torch.tensor([len(ids) for ids in sequences], device=device)


def _micro_batch(ids_BS: Tensor, real_B: Tensor, samples: Sequence[int], position_SB: Tensor) -> MicroBatch:
    batch, length = ids_BS.shape
    device = ids_BS.device
    padding_BS = torch.arange(length, device=device) >= real_B[:, None]
    tokens = TokenBatch(
        ids_T=ids_BS.t().reshape(-1),
        sample_T=torch.tensor(samples, device=device).expand(length, batch).reshape(-1),
        position_T=position_SB.reshape(-1),
        padding_T=padding_BS.t().reshape(-1),
        sequence_length=length,
        batch_size=batch,
    )
    return MicroBatch(tokens=tokens, predict_B=(real_B - 1).clamp(min=0))


@torch.no_grad()
def _run(model: Any, ids_BS: Tensor, micro_batch: MicroBatch) -> Tensor:
    with use(micro_batch):
        logits_B1V = model(ids_BS)
    return logits_B1V[:, 0]


def _device_of(model: Any) -> torch.device:
    return next(model.parameters()).device
