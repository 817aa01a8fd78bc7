"""Which device a worker computes on."""

from __future__ import annotations

import os

import torch


def use_cuda() -> bool:
    """Whether there is an accelerator, and DS_ACCELERATOR=cpu does not ask for the processor."""
    return os.environ.get("DS_ACCELERATOR", "").lower() != "cpu" and torch.cuda.is_available()


def local_device() -> torch.device:
    """The accelerator of this local rank, or the CPU."""
    if use_cuda():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")
