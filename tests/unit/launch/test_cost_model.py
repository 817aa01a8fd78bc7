"""The cost model against figures worked out by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest

from moe_train.launch.cost_model import LAYER_SECONDS, Hardware, seconds_of, step_times
from moe_train.training.account import flops_per_token
from moe_train.training.partition import parts
from moe_train.training.run_config import RunConfig, load_run_config
from moe_train.training.traffic import Traffic, traffic

HARDWARE = Hardware(gpus=64, memory=80, node_bandwidth=100, network_bandwidth=10, host_bandwidth=20)


def config_of(*overrides: str) -> RunConfig:
    """Large enough that arithmetic takes longer than starting kernels."""
    return load_run_config("qwen3_30b_a3b", ["train.global_batch_size=512", "parallel.expert=8", *overrides])


@pytest.mark.parametrize(
    ("item", "seconds"),
    [
        # A ring inside a node: 2 * 7/8 of 8 GB at 100 GB/s.
        (Traffic("x", "all_reduce", "tensor", 8, 8e9), 0.14),
        # 64 ranks, 8 of them on each node: together they have 80 GB/s to the next node.
        (Traffic("x", "all_gather", "data", 64, 64e9), 63 / 80),
        # Every 8th rank: each node has one of the group.
        (Traffic("x", "reduce_scatter", "expert_data", 8, 8e9), 0.7),
        # Every 2nd rank: 4 on each node.
        (Traffic("x", "reduce_scatter", "expert_data", 32, 32e9), 31 / 40),
        # 16 neighbours on two nodes: 8 of the 15 others are on the other node.
        (Traffic("x", "all_to_all", "expert", 16, 16e9), 15 * (8 / 15) / 10),
        (Traffic("x", "all_to_all", "expert", 8, 8e9), 0.07),
    ],
)
def test_seconds_of_a_collective(item: Traffic, seconds: float) -> None:
    assert seconds_of(item, HARDWARE) == pytest.approx(seconds)


def test_computation() -> None:
    config = config_of()
    flops = flops_per_token(config)
    tokens = 512 * 4096 / 64
    rate = HARDWARE.peak * 1e12 * HARDWARE.efficiency
    assert step_times(config, HARDWARE).compute == pytest.approx(tokens * flops.total / rate)
    again = config_of("train.recompute=true")
    forward = flops.forward - flops.head
    assert step_times(again, HARDWARE).compute == pytest.approx(tokens * (flops.total + forward) / rate)
    slow = config_of("train.precision=float32")
    assert step_times(slow, HARDWARE).compute == pytest.approx(16 * tokens * flops.total / rate)
    # Padding of experts is computed, too.
    padded = config_of("router.capacity.factor=2", "router.capacity.pad=true", "causal_exceptions=[capacity]")
    assert step_times(padded, HARDWARE).compute > 1.2 * step_times(config, HARDWARE).compute


def test_small_layers_cost_what_starting_them_costs() -> None:
    config = load_run_config("tiny", ["train.global_batch_size=64", "train.micro_batch_size=1"])
    layers = config.model.num_layers
    one = Hardware(gpus=1, memory=80)
    assert step_times(config, one).compute == pytest.approx(64 * layers * LAYER_SECONDS)


def test_what_is_sent_is_added_and_overlap_hides_zero() -> None:
    config = config_of()
    times = step_times(config, HARDWARE)
    by_group = {
        group: sum(seconds_of(i, HARDWARE) for i in traffic(config, 64) if i.group in group)
        for group in (("expert",), ("data", "expert_data"))
    }
    assert times.experts == pytest.approx(by_group["expert",])
    assert times.zero == pytest.approx(by_group["data", "expert_data"])
    assert times.total == pytest.approx(times.compute + times.experts + times.zero)
    hidden = config_of("deepspeed.zero_optimization.overlap_comm=true")
    assert step_times(hidden, HARDWARE).zero == pytest.approx(max(0.0, times.zero - times.compute))


def test_offload() -> None:
    config = config_of("train.offload_optimizer=cpu", "train.zero_stage=2")
    shard = sum(part.shard for part in parts(config, 64))
    # Gradients in float32 and parameters in bfloat16 at 20 GB/s, 28 bytes at 20 GB/s.
    assert step_times(config, HARDWARE).offload == pytest.approx(shard * (6 / 20e9 + 28 / 20e9))
    assert step_times(config_of(), HARDWARE).offload == 0


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"gpus": 0}, "at least one GPU"),
        ({"gpus": 12}, "no whole number of nodes of 8"),
        ({"memory": 0.0}, "memory must be"),
        ({"memory": math.nan}, "memory must be"),
        ({"network_bandwidth": -1.0}, "network bandwidth must be"),
        ({"efficiency": 1.5}, "efficiency"),
        ({"reserve": 1.0}, "reserve"),
        ({"host_memory": 0.0}, "host memory"),
    ],
)
def test_machines_that_cannot_be(changes: dict[str, float], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(HARDWARE, **changes)  # type: ignore[arg-type]


def test_fewer_gpus_than_a_node_has() -> None:
    assert Hardware(gpus=6, memory=80).ranks_per_node == 6
