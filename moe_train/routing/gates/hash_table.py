"""Tables from token id to experts that give every expert the same share.

Suffixes: V token ids, K experts per id, E experts, N blocks of E ids.
"""

from __future__ import annotations

import heapq
import json
from pathlib import Path

import torch
from torch import Tensor


def even_table(ids: int, k: int, num_experts: int, generator: torch.Generator) -> Tensor:
    """int64 [V, K] on the CPU, k different experts per id by lot; every expert stands in it equally often, to within k.

    Ids are taken in random order, E at a time. In a block each id has k random distances from its own place on a circle
    of the experts in random order, the same distances for the whole block, so that all experts get k ids of it.
    """
    blocks = -(-ids // num_experts)
    order_NE = _shuffled(blocks, num_experts, generator)
    distance_NK = _shuffled(blocks, num_experts, generator)[:, :k]
    place_E = torch.arange(num_experts, device="cpu")
    place_NEK = (place_E[None, :, None] + distance_NK[:, None, :]) % num_experts
    experts_NEK = torch.gather(order_NE, 1, place_NEK.flatten(1)).view(blocks, num_experts, k)
    shuffled_V = torch.randperm(ids, generator=generator, device="cpu")
    table_VK = torch.empty(ids, k, dtype=torch.int64, device="cpu")
    table_VK[shuffled_V] = experts_NEK.flatten(0, 1)[:ids]
    return table_VK


def _shuffled(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """int64 [rows, columns], each row a random order of 0 .. columns - 1."""
    return torch.rand(rows, columns, generator=generator, device="cpu").argsort(dim=1)


def counted_table(counts_V: list[int], k: int, num_experts: int, generator: torch.Generator) -> Tensor:
    """int64 [V, K]: id by id from the most frequent on, the k experts with the smallest load so far, that is the sum of
    the counts of their ids. Ids that never occur are dealt evenly. Lots decide between equal counts and equal loads.
    Time O(V k log E), on the host."""
    lots_V = torch.randperm(len(counts_V), generator=generator, device="cpu").tolist()
    seen = sorted((v for v, count in enumerate(counts_V) if count), key=lambda v: (-counts_V[v], lots_V[v]))
    lots_E = torch.randperm(num_experts, generator=generator, device="cpu").tolist()
    heap = [(0, lot, expert) for expert, lot in enumerate(lots_E)]
    heapq.heapify(heap)
    rows: list[list[int]] = []
    for v in seen:
        taken = [heapq.heappop(heap) for _ in range(k)]
        rows.append([expert for _, _, expert in taken])
        for load, lot, expert in taken:
            heapq.heappush(heap, (load + counts_V[v], lot, expert))
    table_VK = torch.empty(len(counts_V), k, dtype=torch.int64, device="cpu")
    table_VK[torch.tensor(seen, dtype=torch.int64, device="cpu")] = torch.tensor(rows, device="cpu").view(-1, k)
    unseen = [v for v, count in enumerate(counts_V) if not count]
    table_VK[torch.tensor(unseen, dtype=torch.int64, device="cpu")] = even_table(len(unseen), k, num_experts, generator)
    return table_VK


def read_counts(path: str, vocab_size: int) -> list[int]:
    """How often each id occurs, from a JSON list; ids behind its end do not occur. ValueError for anything else, a list
    with more than ``vocab_size`` entries, or one of zeros."""
    try:
        counts = json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not JSON ({error}): write it by moe-train inspect DATA --token-counts FILE"
        ) from None
    if not isinstance(counts, list) or not all(type(c) is int and c >= 0 for c in counts) or not any(counts):
        raise ValueError(f"{path} must hold a JSON list of whole numbers, the count of each token id, not all zero")
    if len(counts) > vocab_size:
        raise ValueError(f"{path} counts {len(counts)} token ids, but vocab_size is {vocab_size}: another tokenizer?")
    return counts + [0] * (vocab_size - len(counts))
