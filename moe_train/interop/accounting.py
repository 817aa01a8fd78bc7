"""What a model folder holds against what its config.json promises: nothing unexpected, missing or of another shape."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from moe_train.interop.fp8 import SCALE, scale_shape
from moe_train.interop.layout import HubTensor, Layout
from moe_train.interop.safetensors_file import StoredTensor
from moe_train.interop.tables import COMPUTED, OTHER_LAYOUTS, Copy

Stored = dict[str, StoredTensor]
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_FP8 = (torch.float8_e4m3fn,)
_COMPARE_BYTES = 2**26
_SHOWN = 10


@dataclass
class Account:
    """Every tensor of the folder in one of its places."""

    weights: dict[str, HubTensor]
    copies: list[Copy] = field(default_factory=list)
    scales: set[str] = field(default_factory=set)
    left_out: list[str] = field(default_factory=list)
    """Known and not needed."""


def account(stored: Stored, layout: Layout, folder: Path, *, quantized: bool, drop: str | None) -> Account:
    """``drop``: beginning of the names of a layer that is not wanted.

    Errors: ValueError that names the first tensors that are missing, unexpected, or of another shape or type.
    """
    found = Account({tensor.name: tensor for tensor in layout.tensors})
    found.copies = [copy for copy in layout.copies if copy.hub in stored or not copy.optional]
    expected = found.weights.keys() | {copy.hub for copy in found.copies}
    if quantized:
        found.scales = {n + SCALE for n in expected if n in stored and stored[n].dtype in _FP8}
    extra = stored.keys() - expected - found.scales
    found.left_out = sorted(n for n in extra if n.endswith(COMPUTED) or (drop is not None and n.startswith(drop)))
    problems = [f"missing: {name}" for name in sorted((expected | found.scales) - stored.keys())]
    unexpected = sorted(extra - set(found.left_out))
    problems += [f"unexpected: {name}{_layout_of(name)}" for name in unexpected]
    problems += [
        problem for name in sorted(found.weights.keys() & stored.keys()) for problem in _wrong(name, found, stored)
    ]
    problems += _mixed_types(found, stored)
    if not problems:
        problems = [f"{c.hub} should repeat {c.of}, but differs" for c in found.copies if not _equal(stored, c)]
    if problems:
        shown = problems[:_SHOWN] + ([f"… and {len(problems) - _SHOWN} more"] if problems[_SHOWN:] else [])
        raise ValueError(f"{folder} does not hold the model that its config.json describes:\n  " + "\n  ".join(shown))
    return found


def _layout_of(name: str) -> str:
    kinds = [meaning for part, meaning in OTHER_LAYOUTS.items() if part in f"{name}."]
    return (
        f" ({kinds[0]}; read are files as the hub has them, written by transformers' save_pretrained)" if kinds else ""
    )


def _wrong(name: str, found: Account, stored: Stored) -> list[str]:
    have, want = stored[name], found.weights[name].shape
    scale = stored.get(name + SCALE) if name + SCALE in found.scales else None
    if have.shape != want:
        return [f"{name} has shape {list(have.shape)}, expected {list(want)}"]
    if have.dtype not in _FLOATS and scale is None:
        return [f"{name} has type {have.dtype}, which is no weight's"]
    if scale is not None and (scale.shape != scale_shape(have) or scale.dtype not in _FLOATS):
        return [f"{name + SCALE} has shape {list(scale.shape)} and type {scale.dtype}"]
    return []


def _mixed_types(found: Account, stored: Stored) -> list[str]:
    """One tensor of ours has one type."""
    first: dict[str, str] = {}
    problems = []
    for name, tensor in found.weights.items():
        for key in {piece.key for piece in tensor.pieces} if name in stored else ():
            other = first.setdefault(key, name)
            if _kind(stored[other]) != _kind(stored[name]):
                problems.append(
                    f"{name} is {stored[name].dtype}, {other} {stored[other].dtype}, and both belong into one tensor"
                )
    return problems


def _kind(stored: StoredTensor) -> torch.dtype:
    return torch.bfloat16 if stored.dtype in _FP8 else stored.dtype


def _equal(stored: Stored, copy: Copy) -> bool:
    """Whether two tensors hold the same bytes; read in parts."""
    a, b = stored[copy.hub], stored[copy.of]
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    rows = max(1, _COMPARE_BYTES * a.shape[0] // max(1, a.nbytes))
    return all(
        torch.equal(*(x.rows(first, min(first + rows, a.shape[0])).view(torch.uint8) for x in (a, b)))
        for first in range(0, a.shape[0], rows)
    )
