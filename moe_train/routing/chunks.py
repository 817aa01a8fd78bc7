"""Pairwise functions whose intermediates would not fit into memory at once.

Suffixes: N rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_ELEMENTS = 2**22
"""Of the largest intermediate of a chunk: 16 MiB in float32."""


def over_rows(
    function: Callable[..., Tensor], rows: Sequence[Tensor], others: Sequence[Tensor], elements: int
) -> Tensor:
    """``function(*rows, *others)``, whose row n depends on row n of each of ``rows`` and on ``others``.

    ``elements``: of its largest intermediate, per row. Where all rows together have more than 2^22, they are taken in
    chunks, and each chunk is computed again in the backward pass, so that memory is that of one chunk.
    """
    size, count = max(1, _ELEMENTS // max(1, elements)), rows[0].shape[0]
    if count <= size:
        return function(*rows, *others)
    parts = []
    for first in range(0, count, size):
        chunk = [x_N[first : first + size] for x_N in rows]
        if torch.is_grad_enabled():
            parts.append(checkpoint(function, *chunk, *others, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(function(*chunk, *others))
    return torch.cat(parts)
