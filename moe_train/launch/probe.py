"""One of the processes that doctor starts: joins a gloo group and sums a tensor over it."""

from __future__ import annotations

import datetime


def main() -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
    x = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(x)
    size = dist.get_world_size()
    assert x.item() == size * (size + 1) / 2, f"the sum over the processes is wrong: {x.item()}"
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
