"""Ranges of files straight into the memory of tensors."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

_AT_ONCE = 2**30
"""The system reads at most 2 GiB per call."""


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU; writing into them changes it."""
    values: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(values)


def read_range(descriptor: int, position: int, memory: memoryview) -> None:
    """Fills ``memory`` from a file. Errors: OSError; EOFError where the file ends too early."""
    done = 0
    while done < len(memory):
        count = os.preadv(descriptor, [memory[done : done + _AT_ONCE]], position + done)
        if not count:
            raise EOFError
        done += count
