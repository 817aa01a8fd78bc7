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
    position_BS: Tensor | None = None
    """Offsets in texts that do not see each other, 0 where one begins; None where each sequence is one."""

    def rows(self, rows: slice | list[int]) -> Tokens:
        columns = (self.ids_BS, self.labels_BS, self.target_BS, self.padding_BS, self.sample_B, self.position_BS)
        return Tokens(*(None if column is None else column[rows] for column in columns))  # type: ignore[arg-type]


def global_batch(
    step: int,
    *,
    sequences: int,
    length: int,
    vocab: int,
    seed: int = 0,
    padding: bool = True,
    constant: bool = False,
    texts: bool = False,
) -> Tokens:
    """Fresh tokens for every (seed, step). With ``padding``: two sequences end early, one is padding only, and some
    tokens that are no padding are no targets. ``constant``: the model reads the same id everywhere (labels differ).
    ``texts``: every sequence consists of two or three that do not see each other."""
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
    position_BS = None
    if texts:
        begins_BS = torch.rand(sequences, length, generator=generator) < 2 / length
        begins_BS[:, 0] = begins_BS[0, length // 3] = True
        index_S = torch.arange(length)
        position_BS = index_S - torch.where(begins_BS, index_S, 0).cummax(dim=1).values
        # Nothing predicts the first token of a text.
        target_BS[:, :-1] &= ~begins_BS[:, 1:]
    return Tokens(
        ids_BS=ids_BS,
        labels_BS=tokens[:, 1:].contiguous(),
        target_BS=target_BS & ~padding_BS,
        padding_BS=padding_BS,
        sample_B=sample_B,
        position_BS=position_BS,
    )


def micro_batches(sequences: int, size: int) -> list[list[int]]:
    """Rows of each micro-batch when neighbouring sequences go together."""
    return [list(range(start, start + size)) for start in range(0, sequences, size)]
