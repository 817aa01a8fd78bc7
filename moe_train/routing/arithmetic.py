"""What all gates compute with: float32 arithmetic and softmax over a selection.

Suffixes: T tokens, E experts.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def gate_dtype(*tensors: Tensor) -> torch.dtype:
    """float32 whatever comes in, except that float64 stays float64."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def full_precision(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Context in which autocast does not turn the gate's products into bfloat16."""
    if not torch.amp.is_autocast_available(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(device_type=x.device.type, enabled=False)


def softmax_over(logits_TE: Tensor, selected_TE: Tensor) -> Tensor:
    """Softmax of the selected logits of each row, zero elsewhere and in rows without a selection.

    Equals renormalised probabilities p_e / sum of selected p, without their underflow. Finite forward and backward.
    """
    lowest = torch.finfo(logits_TE.dtype).min  # not -inf: a row without a selection must not become NaN
    return torch.softmax(torch.where(selected_TE, logits_TE, lowest), dim=-1) * selected_TE
