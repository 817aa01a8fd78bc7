"""How fast the ranks of a launch exchange data: a worker module that the doctor starts as a run would be started.

Rank 0 prints one line that begins with MARK. Rates are bytes per second and rank as the algorithm must move them at
least: 2 (n - 1) / n of the tensor for an all-reduce, (n - 1) / n for an all-to-all, all of it between two ranks.
"""

from __future__ import annotations

import datetime
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

MARK = "moe-train-bandwidth:"
GLOO_BYTES, NCCL_BYTES = 4 << 20, 64 << 20
REPEATS = 5
ALL_PAIRS = 8
"""Up to so many hosts every pair is measured; beyond, each with the next one."""


def rounds(hosts: int) -> Iterator[list[tuple[int, int]]]:
    """Pairs of hosts, in rounds in which no host stands twice.

    All pairs by the circle method of tournaments; of many hosts the neighbours on a ring.
    """
    if hosts < 2:
        return
    if hosts > ALL_PAIRS:
        edges = [(host, host + 1) for host in range(hosts - 1)]
        yield edges[0::2]
        yield edges[1::2]
        yield [(0, hosts - 1)]
        return
    places = [*range(hosts), *([-1] if hosts % 2 else [])]
    for _ in range(len(places) - 1):
        half = len(places) // 2
        pairs = zip(places[:half], reversed(places[half:]), strict=True)
        yield [(min(pair), max(pair)) for pair in pairs if -1 not in pair]
        places = [places[0], places[-1], *places[1:-1]]


def main() -> None:
    import torch
    import torch.distributed as dist

    from moe_train.parallel.device import local_device

    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=120))
    size = NCCL_BYTES if device.type == "cuda" else GLOO_BYTES
    found = measure(device, size, int(os.environ.get("CROSS_RANK", "0")))
    if dist.get_rank() == 0:
        print(MARK + json.dumps({"backend": backend, **found}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def measure(device: Any, size: int, node: int) -> dict[str, Any]:
    """Bytes per second of all-reduce, all-to-all and each pair of nodes; seconds of the smallest all-reduce.

    All ranks call it alike. device: of this rank.   size: bytes of the tensors.   node: of this rank, from 0.
    """
    import torch
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()

    def timed(work: Callable[[], object], repeats: int = REPEATS) -> float:
        """Median of the seconds that the slowest of those who take part needs."""
        seconds = []
        for repeat in range(repeats + 1):
            dist.barrier()
            begin = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            slowest = torch.tensor(time.perf_counter() - begin, dtype=torch.float64, device=device)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            seconds += [float(slowest)] if repeat else []
        return statistics.median(seconds)

    elements = max(world, size // 4 // world * world)
    x, y = torch.zeros(elements, device=device), torch.zeros(elements, device=device)
    share = (world - 1) / world
    one = torch.zeros(1, device=device)
    found: dict[str, Any] = {
        "world": world,
        "all_reduce": 2 * share * 4 * elements / timed(lambda: dist.all_reduce(x)),
        "all_to_all": share * 4 * elements / timed(lambda: dist.all_to_all_single(y, x)),
        "latency": timed(lambda: dist.all_reduce(one)),
        "pairs": [],
    }
    nodes: list[Any] = [None] * world
    dist.all_gather_object(nodes, node)
    first = {number: nodes.index(number) for number in sorted(set(nodes))}
    mine: list[tuple[int, int, float]] = []
    for pairs in rounds(len(first)):
        pair = next((pair for pair in pairs if rank in (first[pair[0]], first[pair[1]])), None)
        seconds = []
        for _ in range(REPEATS + 1):
            dist.barrier()
            if pair is not None:
                begin = time.perf_counter()
                _there_and_back(x, first[pair[0]], first[pair[1]], rank)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                seconds.append(time.perf_counter() - begin)
        if pair is not None and rank == first[pair[0]]:
            mine.append((*pair, 2 * 4 * elements / statistics.median(seconds[1:])))
    every: list[Any] = [None] * world
    dist.all_gather_object(every, mine)
    found["pairs"] = sorted(pair for pairs in every for pair in pairs)
    return found


def _there_and_back(x: Any, low: int, high: int, rank: int) -> None:
    import torch.distributed as dist

    if rank == low:
        dist.send(x, high)
        dist.recv(x, high)
    else:
        dist.recv(x, low)
        dist.send(x, low)


if __name__ == "__main__":
    main()
