"""What DeepSpeed's ZeRO 1 and 2 (0.19.8, private API) need not do for one rank on a CPU in float32.

Upstream copies every gradient into a bucket, reduces it over the ranks, copies it out, converts a copy to float64 for
the norm and copies it once more into the flat gradient that the optimizer reads, each time into fresh memory. With one
rank there is nothing to reduce: gradients stay where autograd left them until the one copy into the flat gradient,
whose memory is kept. The results are the same; training/engine.py applies this where it holds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ROW = 4096


def applies(zero: Any, ranks: int, stage: int) -> bool:
    """Whether gradients are float32 on the CPU of the only data-parallel rank under ZeRO 1 or 2."""
    return (
        ranks == 1
        and stage < 3
        and zero.dtype == torch.float32
        and zero.gradient_accumulation_dtype == torch.float32
        and not zero.cpu_offload
        and not zero.overlap_comm
        and all(flat.device.type == "cpu" for flat in zero.single_partition_of_fp32_groups)
    )


def skip_reduction(zero: Any) -> None:
    """Takes reduction and its copies out of a ZeRO-1 or -2 optimizer of one rank."""
    # The constructor of ZeRO 2 with experts insists on it; nothing after that does.
    zero.contiguous_gradients = False
    zero.buffered_reduce_fallback = lambda *_, **__: None
    zero.get_grad_norm_direct = lambda gradients, params, norm_type=2: norm(gradients)
    largest = max(int(size) for size in zero.partition_size)
    buffer = torch.empty(largest, dtype=torch.float32)

    def flat_gradient(group: int) -> Tensor:
        """This group's gradients in a row. The groups take turns: each is stepped before the next is asked for."""
        flat = buffer[: int(zero.partition_size[group])]
        return torch.cat([g.detach().reshape(-1) for g in zero.averaged_gradients[group]], out=flat)

    zero._get_preflattened_grad_partition = flat_gradient


def norm(gradients: list[Tensor]) -> Tensor:
    """Root of the sum of squares as a float32 scalar; -1 where it is not finite, which the caller takes for overflow.

    Squares are added in float32 along short rows and in float64 beyond: as exact as float64 throughout in float32's
    digits, without the copies.
    """
    total = torch.zeros((), dtype=torch.float64)
    for gradient in gradients:
        if getattr(gradient, "_zero_padding", False):
            continue
        flat = gradient.detach().reshape(-1)
        whole = flat.numel() // _ROW * _ROW
        rows = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1).double()
        total += rows.square().sum() + flat[whole:].double().square().sum()
    result = total.sqrt().float()
    return result if bool(torch.isfinite(result)) else torch.full_like(result, -1.0)
