"""How many accelerators the workers of this machine will see."""

from __future__ import annotations

from collections.abc import Mapping


def accelerator_count(environment: Mapping[str, str]) -> int:
    """0 where there is none, or where DS_ACCELERATOR=cpu asks for the processor."""
    if environment.get("DS_ACCELERATOR", "").lower() == "cpu":
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
