"""Keys and values of what was read before, for generation.

Suffixes: S tokens that are read now, B sequences, L tokens of the longest sequence, X whatever a layer keeps per token.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """Sequences of different lengths side by side; each pass reads the same number of tokens of all of them.

    ``advance`` says how many of them were real: padding behind a shorter prompt is written over by the next pass.
    """

    def __init__(self, batch_size: int, capacity: int, device: torch.device | str = "cpu") -> None:
        self.capacity = capacity
        self.lengths_B = torch.zeros(batch_size, dtype=torch.int64, device=device)
        """Tokens that each sequence has."""
        self.longest = 0
        """Tokens of the longest, known without asking the device."""
        self._kept: dict[int, tuple[Tensor, ...]] = {}

    def positions(self, count: int) -> Tensor:
        """Of the next ``count`` tokens of each sequence, [S, B]."""
        return torch.arange(count, device=self.lengths_B.device)[:, None] + self.lengths_B

    def append(self, layer: int, *new_SBX: Tensor) -> tuple[Tensor, ...]:
        """Writes a layer's tensors of the tokens that are read now; returns all of them [L, B, X] up to the longest.

        Errors: ValueError where they do not fit.
        """
        count = new_SBX[0].shape[0]
        if self.longest + count > self.capacity:
            raise ValueError(f"{self.longest + count} tokens do not fit into a cache for {self.capacity}")
        if layer not in self._kept:
            self._kept[layer] = tuple(new.new_zeros(self.capacity, *new.shape[1:]) for new in new_SBX)
        position_SB = self.positions(count)
        row_B = torch.arange(position_SB.shape[1], device=position_SB.device)
        for kept, new in zip(self._kept[layer], new_SBX, strict=True):
            kept[position_SB, row_B] = new
        return tuple(kept[: self.longest + count] for kept in self._kept[layer])

    def visible(self, count: int) -> Tensor:
        """Which keys the tokens that are read now see, bool [B, S, L]: those up to their own position."""
        key_L = torch.arange(self.longest + count, device=self.lengths_B.device)
        return key_L <= self.positions(count).t()[:, :, None]

    def advance(self, real_B: Tensor) -> None:
        """After a pass: how many of the tokens that were read belong to each sequence."""
        self.lengths_B = self.lengths_B + real_B
        self.longest = int(self.lengths_B.max())
