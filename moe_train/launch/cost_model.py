"""Expected time of an optimizer step, by a simple model that is all said here. It ranks layouts; it is no measurement.

- Computation: FLOPs of the model (training/account.py), once more the forward pass of the layers with recomputation,
  divided by peak x ``efficiency``. The peak is that of dense bfloat16; float32 has 1/16 of it (67 of 989 TFLOP/s on
  the data sheet of the H100). A layer takes at least ``LAYER_SECONDS`` for each micro-batch, to start its kernels.
- Communication: bytes of training/traffic.py. Inside a node each GPU sends ``node_bandwidth``. Across nodes each GPU
  has its own network port of ``network_bandwidth``: rings cross from node to node once, so that the ports of a group's
  ranks on one node share a ring's bytes; of an all-to-all the rows for other nodes go through the rank's own port.
- Nothing overlaps, as is the default here. With ``deepspeed.zero_optimization.overlap_comm`` the collectives of ZeRO
  hide behind the computation as long as it lasts.
- Offload: gradients go to the host and parameters come back at ``host_bandwidth``; the optimizer reads and writes host
  memory at ``host_memory_bandwidth``. Its step on a GPU is left out (a millisecond for 100 million parameters).
- Left out: latency of collectives, imbalance of experts, evaluation, saving, reading data.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.training.account import flops_per_slot, flops_per_token, flops_without_experts
from moe_train.training.layer_account import expert_layers
from moe_train.training.memory import FLOAT32, rows_per_token, weight_bytes
from moe_train.training.partition import parts
from moe_train.training.run_config import RunConfig
from moe_train.training.traffic import Traffic, traffic, zero_keys

FLOAT32_SHARE = 1 / 16
"""Of the peak, in float32."""
LAYER_SECONDS = 1e-3
"""Of one layer and micro-batch, forward and backward, however small: some 200 kernels of 5 microseconds."""
ADAMW_BYTES = 28
"""Read and written for one parameter: master, moments (both twice) and gradient."""
GIGA = 1e9


@dataclass(frozen=True)
class Hardware:
    """Machines of one kind. Bandwidths in GB/s, per GPU and direction, as programs reach them, below the data sheet."""

    gpus: int
    memory: float
    """GiB per GPU."""
    gpus_per_node: int = 8
    reserve: float = 0.1
    """Part of the memory that is left free: libraries, fragmentation, experts that are not balanced."""
    host_memory: float | None = None
    """GiB per node; None: not looked at."""
    peak: float = 989.4
    """TFLOP/s of dense bfloat16; default H100 SXM."""
    efficiency: float = 0.4
    node_bandwidth: float = 300.0
    network_bandwidth: float = 40.0
    host_bandwidth: float = 25.0
    host_memory_bandwidth: float = 20.0

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.gpus_per_node < 1:
            raise ValueError(f"at least one GPU is needed, got {self.gpus} with {self.gpus_per_node} in each node")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise ValueError(
                f"{self.gpus} GPUs are no whole number of nodes of {self.gpus_per_node}; give --gpus-per-node"
            )
        if not 0 < self.efficiency <= 1 or not 0 <= self.reserve < 1:
            raise ValueError(f"efficiency {self.efficiency:g} must lie in (0, 1], reserve {self.reserve:g} in [0, 1)")
        for name in (
            "memory",
            "peak",
            "node_bandwidth",
            "network_bandwidth",
            "host_bandwidth",
            "host_memory_bandwidth",
        ):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name.replace('_', ' ')} must be a number above 0, got {getattr(self, name):g}")
        if self.host_memory is not None and not self.host_memory > 0:
            raise ValueError(f"host memory must be above 0 GiB, got {self.host_memory:g}")

    @property
    def usable(self) -> float:
        """Bytes of one GPU."""
        return self.memory * 2**30 * (1 - self.reserve)

    @property
    def ranks_per_node(self) -> int:
        return min(self.gpus, self.gpus_per_node)


@dataclass(frozen=True)
class Times:
    """Seconds of one optimizer step."""

    compute: float
    experts: float
    """All-to-all."""
    zero: float
    """What overlap does not hide."""
    tensor: float
    offload: float

    @property
    def total(self) -> float:
        return self.compute + self.experts + self.zero + self.tensor + self.offload


def step_times(config: RunConfig, hardware: Hardware) -> Times:
    """By the model above; the configuration says the layout."""
    compute = _compute(config, hardware)
    seconds = {"expert": 0.0, "tensor": 0.0, "zero": 0.0}
    for item in traffic(config, hardware.gpus):
        purpose = item.group if item.group in seconds else "zero"
        seconds[purpose] += seconds_of(item, hardware)
    hidden = compute if zero_keys(config).get("overlap_comm") else 0.0
    return Times(
        compute=compute,
        experts=seconds["expert"],
        zero=max(0.0, seconds["zero"] - hidden),
        tensor=seconds["tensor"],
        offload=_offload(config, hardware),
    )


def _compute(config: RunConfig, hardware: Hardware) -> float:
    model, flops = config.model, flops_per_token(config)
    layers, rows = expert_layers(model) + model.multi_token.layers, rows_per_token(config, worst=False)
    total = flops_without_experts(config) + layers * rows * flops_per_slot(config)
    if config.train.recompute:
        total += total / 3 - flops.head * (1 + model.multi_token.layers)
    tokens = config.train.global_batch_size * config.data.sequence_length / hardware.gpus
    share = 1.0 if config.train.precision == "bfloat16" else FLOAT32_SHARE
    seconds = tokens * total / (hardware.peak * 1e12 * hardware.efficiency * share)
    every = model.num_layers + model.multi_token.layers
    kernels = (
        LAYER_SECONDS * every * config.accumulation_steps(hardware.gpus) * (4 / 3 if config.train.recompute else 1)
    )
    return max(seconds, kernels)


def seconds_of(item: Traffic, hardware: Hardware) -> float:
    """Of all collectives of one purpose. Ranks lie as megatron-core lays them: TP and EP among neighbours."""
    stride = 1 if item.group in ("expert", "tensor") else hardware.gpus // item.ranks
    # Ranks of the group on one node.
    local = max(1, min(item.ranks, hardware.ranks_per_node // stride))
    if local == item.ranks:
        return item.sent / (hardware.node_bandwidth * GIGA)
    if item.operation == "all_to_all":
        away = (item.ranks - local) / (item.ranks - 1)
        inside = (1 - away) * item.sent / hardware.node_bandwidth
        return max(away * item.sent / hardware.network_bandwidth, inside) / GIGA
    return item.sent / (min(hardware.node_bandwidth, local * hardware.network_bandwidth) * GIGA)


def _offload(config: RunConfig, hardware: Hardware) -> float:
    if config.train.offload_optimizer == "none":
        return 0.0
    shard = sum(part.shard for part in parts(config, hardware.gpus))
    # ZeRO 3 adds up the gradients of micro-batches on the device, from and to the host.
    more = 2 * (config.accumulation_steps(hardware.gpus) - 1) if config.train.zero_stage == 3 else 0
    moved = ((1 + more) * FLOAT32 + weight_bytes(config)) * shard
    stepped = ADAMW_BYTES * shard if config.optimizer.name == "adamw" else 3 * FLOAT32 * shard
    return (moved / hardware.host_bandwidth + stepped / hardware.host_memory_bandwidth) / GIGA
