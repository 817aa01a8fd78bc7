"""Which device a worker computes on, and how much of its memory."""

from __future__ import annotations

import os
import resource

import torch


def use_cuda() -> bool:
    """Whether there is an accelerator, and DS_ACCELERATOR=cpu does not ask for the processor."""
    return os.environ.get("DS_ACCELERATOR", "").lower() != "cpu" and torch.cuda.is_available()


def local_device() -> torch.device:
    """The accelerator of this local rank, or the CPU."""
    if use_cuda():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def memory_used(device: torch.device) -> int:
    """Bytes, the most by this rank so far: allocated memory on CUDA, resident memory of the process on CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
