"""Token batches for tests, as plain tensors.

Suffixes: B sequences, S tokens per sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """A global batch."""

    ids_BS: Tensor
    labels_BS: Tensor
    target_BS: Tensor
    """True where the label counts."""
    padding_BS: Tensor
    """True = padding."""
    sample_B: Tensor

    def rows(self, rows: slice | list[int]) -> Tokens:
        return Tokens(
            self.ids_BS[rows], self.labels_BS[rows], self.target_BS[rows], self.padding_BS[rows], self.sample_B[rows]
        )


def global_batch(
    step: int, *, sequences: int, length: int, vocab: int, seed: int = 0, padding: bool = True, constant: bool = False
) -> Tokens:
    """Fresh tokens for every (seed, step). With ``padding``: two sequences end early, one is padding only, and some
    tokens that are no padding are no targets. ``constant``: the model reads the same id everywhere (labels differ)."""
    generator = torch.Generator().manual_seed(1000003 * seed + step)
    tokens = torch.randint(0, vocab, (sequences, length + 1), generator=generator)
    ids_BS = torch.full_like(tokens[:, :-1], 7) if constant else tokens[:, :-1].contiguous()
    padding_BS = torch.zeros(sequences, length, dtype=torch.bool)
    sample_B = torch.arange(step * sequences, (step + 1) * sequences)
    target_BS = torch.ones(sequences, length, dtype=torch.bool)
    if padding:
        padding_BS[1, length // 2 + 1 :] = True
        padding_BS[sequences - 2, 2:] = True
        padding_BS[sequences - 1] = True
        sample_B[sequences - 1] = -1
        target_BS[0, :3] = False
    return Tokens(
        ids_BS=ids_BS,
        labels_BS=tokens[:, 1:].contiguous(),
        target_BS=target_BS & ~padding_BS,
        padding_BS=padding_BS,
        sample_B=sample_B,
    )


def micro_batches(sequences: int, size: int) -> list[list[int]]:
    """Rows of each micro-batch when neighbouring sequences go together."""
    return [list(range(start, start + size)) for start in range(0, sequences, size)]
