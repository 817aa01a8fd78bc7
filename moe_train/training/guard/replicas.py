"""Whether what several ranks hold alike is alike: by hashes, without sending a tensor.

Compared are, bit for bit:
- under ZeRO 1 and 2 the parameters of the module: whole ones over all ranks, experts over the ranks that hold the same
  experts, matrices that tensor parallelism divides over the data-parallel ranks. Float32 masters and moments are there
  once only, in slices;
- under ZeRO 3 the small parameters that DeepSpeed keeps whole on every rank; the others are there once only;
- gate state (biases, averages, coefficients: persistent buffers) over all ranks;
- counters (steps, tokens, what the guard remembers) over all ranks.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from moe_train.parallel.shard import shard_of
from moe_train.training.engine import Engine
from moe_train.training.state import gate_buffers

COUNTERS = "counters"


class ReplicaMismatch(RuntimeError):
    """Ranks that must hold the same do not."""


@dataclass(frozen=True)
class Difference:
    name: str
    """Of the parameter, buffer or "counters"."""
    ranks: list[int]
    """That differ from most others; where there is no majority, all that hold it."""
    holders: int
    """Ranks that hold it."""

    def __str__(self) -> str:
        if len(self.ranks) == self.holders:
            return f"{self.name} is not the same on ranks {', '.join(map(str, self.ranks))}"
        return f"{self.name} is another on rank {', '.join(map(str, self.ranks))} than on the rest of {self.holders}"


def differences(engine: Engine, counters: str) -> list[Difference]:
    """What differs, by name; empty where nothing does, which costs two all-reduces of 16 bytes per tensor and one of
    a flag. Collective. ``counters``: anything else that must be equal, as text."""
    groups = engine.groups
    dense, experts, divided = hashes(engine)
    dense[COUNTERS] = xxhash.xxh3_64_intdigest(counters.encode())
    suspects = [
        *_unequal(dense, None, groups.device),
        *_unequal(experts, groups.expert_data, groups.device),
        *_unequal(divided, groups.data, groups.device),
    ]
    if not groups.largest(len(suspects)):
        return []
    mine = {_shown(name, engine): (dense | experts | divided)[name] for name in suspects}
    every: list[Any] = [None] * groups.world_size
    dist.all_gather_object(every, mine)
    names = sorted({name for part in every for name in part})
    return [_difference(name, {r: part[name] for r, part in enumerate(every) if name in part}) for name in names]


def hashes(engine: Engine) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """XXH3 of what this rank holds alike with all ranks, with those of the same experts, and with the data-parallel
    ones."""
    module = engine.module
    if engine.train.zero_stage < 3:
        held = list(module.named_parameters())
    else:
        held = [(engine.names[id(parameter)], parameter) for parameter in engine.zero.persistent_parameters]
    dense = {name: _hash(p) for name, p in held if getattr(p, "allreduce", True)}
    parts = [(name, p) for name, p in held if not getattr(p, "allreduce", True)]
    experts = {name: _hash(p) for name, p in parts if shard_of(p) is None}
    divided = {name: _hash(p) for name, p in parts if shard_of(p) is not None}
    return dense | {name: _hash(buffer) for name, buffer in gate_buffers(module)}, experts, divided


def _hash(tensor: Tensor) -> int:
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu()
    return xxhash.xxh3_64_intdigest(raw.numpy().data)


def _unequal(digests: dict[str, int], group: Any, device: torch.device) -> list[str]:
    """Names whose digest is not the same on all ranks of the group, which have the same names."""
    if not digests or dist.get_world_size(group) == 1:
        return []
    own = torch.tensor([digest >> 1 for digest in digests.values()], dtype=torch.int64, device=device)
    both = torch.stack([own, -own])
    dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
    equal = (both[0] == -both[1]).tolist()
    return [name for name, same in zip(digests, equal, strict=True) if not same]


def _shown(name: str, engine: Engine) -> str:
    """Experts of one name, and parts of a divided matrix, are others on other ranks."""
    parameter = dict(engine.module.named_parameters()).get(name)
    if parameter is None or getattr(parameter, "allreduce", True):
        return name
    if shard_of(parameter) is not None:
        return f"{name} (tensor-parallel rank {dist.get_rank(engine.groups.tensor)})"
    return f"{name} (expert-parallel rank {engine.groups.expert_rank})"


def _difference(name: str, digests: dict[int, int]) -> Difference:
    (most, count), *_ = Counter(digests.values()).most_common(1)
    majority = 2 * count > len(digests)
    ranks = [rank for rank, digest in digests.items() if not majority or digest != most]
    return Difference(name, ranks, len(digests))
