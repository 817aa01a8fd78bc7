"""Which layouts are proposed, in which order, and why others are not."""

from __future__ import annotations

import dataclasses

import pytest

from moe_train.launch.advice import advice
from moe_train.launch.cost_model import Hardware
from moe_train.launch.layouts import KEYS, START, Proposal, propose
from moe_train.training.checks import problems
from moe_train.training.memory import memory_per_rank
from moe_train.training.run_config import RunConfig, load_run_config

NODE = Hardware(gpus=8, memory=80)


def config_of(*overrides: str, name: str = "qwen3_30b_a3b") -> RunConfig:
    return load_run_config(name, ["train.global_batch_size=64", *overrides])


def groups(proposal: Proposal) -> set[tuple[int, int]]:
    return {(plan.layout.tensor, plan.layout.expert) for plan in proposal.plans}


@pytest.fixture(scope="module")
def on_one_node() -> Proposal:
    return propose(config_of(), NODE)


def test_every_plan_is_a_run_that_the_checks_accept(on_one_node: Proposal) -> None:
    assert on_one_node.plans
    for plan in on_one_node.plans:
        assert plan.layout.data * plan.layout.tensor == 8
        assert plan.accumulation * plan.layout.micro_batch * plan.layout.data == 64
        assert plan.need <= 0.9 * 80 * 2**30
        assert plan.memory == memory_per_rank(plan.config, 8, "cuda")
    for plan in on_one_node.plans[:3]:
        assert problems(plan.config, 8) == []
        said = load_run_config("qwen3_30b_a3b", ["train.global_batch_size=64", *plan.layout.overrides()])
        assert (said.parallel, said.train) == (plan.config.parallel, plan.config.train)


def test_shortest_step_first(on_one_node: Proposal) -> None:
    times = [plan.times.total for plan in on_one_node.plans]
    assert times == pytest.approx(sorted(times), rel=0.01)


def test_nothing_is_lost(on_one_node: Proposal) -> None:
    """Each way of each group that the checks accept is a plan, or is ruled out with its reason."""
    refused = [item for item in on_one_node.ruled_out if "ZeRO" not in item.layout]
    ways = len(on_one_node.plans) + len(on_one_node.ruled_out) - len(refused)
    # 4 sizes for experts and 3 for tensors; 12 ways each.
    assert ways == 12 * (3 * 4 - len(refused))
    assert all(item.reason for item in on_one_node.ruled_out)
    short = [item for item in on_one_node.ruled_out if "does not fit" in item.reason]
    assert short and all(item.need is not None and item.need > 0.9 * 80 * 2**30 for item in short)


def test_experts_that_cannot_be_spread() -> None:
    proposal = propose(config_of("train.global_batch_size=60"), dataclasses.replace(NODE, gpus=6))
    assert {expert for _, expert in groups(proposal)} <= {1, 2}
    reasons = {item.layout: item.reason for item in proposal.ruled_out}
    assert "128 experts (model.moe.num_experts) cannot be spread over 3 ranks" in reasons["TP 1, EP 3"]


def test_tensor_parallelism_is_what_the_checks_say() -> None:
    """Ruled out with their message, or proposed."""
    config = config_of()
    tried = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, tensor=2))
    proposal = propose(config, NODE)
    refused = [item.reason for item in proposal.ruled_out if item.layout.startswith("TP 2, EP 1")]
    found = problems(tried, 8)
    assert bool(found) == (not any(tensor == 2 for tensor, _ in groups(proposal)))
    assert all(problem.message in refused[0] for problem in found)


def test_every_size_that_is_supported_is_tried(on_one_node: Proposal) -> None:
    """Where heads or ranks cannot be divided by one it is ruled out."""
    assert {tensor for tensor, _ in groups(on_one_node)} == {1, 2, 4}
    assert {tensor for tensor, _ in groups(propose(config_of(*START, name="demo"), NODE))} == {1, 2}
    six = propose(config_of("train.global_batch_size=48"), dataclasses.replace(NODE, gpus=6))
    [reason] = [item.reason for item in six.ruled_out if item.layout == "TP 4, EP 2"]
    assert "6 processes cannot hold this layout" in reason


def test_a_dense_family_has_no_expert_parallelism() -> None:
    assert {expert for _, expert in groups(propose(config_of(name="qwen3_0.6b"), NODE))} == {1}


def test_what_is_pinned_stands() -> None:
    config = config_of("parallel.expert=4", "train.zero_stage=3", "train.micro_batch_size=2")
    pinned = ["parallel.expert", "train.zero_stage", "train.micro_batch_size"]
    plans = propose(config, NODE, pinned).plans
    assert plans
    assert {(p.layout.expert, p.layout.zero, p.layout.micro_batch) for p in plans} == {(4, 3, 2)}
    assert set(KEYS) >= set(pinned)


def test_larger_micro_batches_where_they_cost_nothing() -> None:
    """ZeRO 1 sends as much with any; starting the kernels takes less."""
    config = config_of("parallel.expert=1", "parallel.tensor=1", "train.zero_stage=1", *START, name="lpr_0.6b")
    plans = propose(config, NODE, ["parallel.expert", "parallel.tensor", "train.zero_stage"]).plans
    assert max(plan.layout.micro_batch for plan in plans) == 8


def test_host_memory_rules_out_offload() -> None:
    config = config_of("train.offload_optimizer=cpu")
    roomy = propose(config, NODE, ["train.offload_optimizer"])
    tight = propose(config, dataclasses.replace(NODE, host_memory=64.0), ["train.offload_optimizer"])
    assert roomy.plans and not tight.plans
    assert any("does not fit into host memory" in item.reason for item in tight.ruled_out)


@pytest.mark.parametrize(("offload", "host_memory", "copy"), [("none", 300.0, 85.3), ("cpu", 600.0, 42.7)])
def test_the_copy_for_background_saves_needs_host_memory(offload: str, host_memory: float, copy: float) -> None:
    """12 bytes per parameter of a rank's share: 43 GiB of these 30.5 billion; twice that where it is pinned memory."""
    config = config_of(f"train.offload_optimizer={offload}", "parallel.expert=8")
    pinned = ["train.offload_optimizer", "parallel.expert"]
    roomy, node = propose(config, NODE, pinned), dataclasses.replace(NODE, host_memory=host_memory)
    assert {round(plan.host.save_copy / 2**30, 1) for plan in roomy.plans} == {copy}
    tight = propose(config, node, pinned)
    assert not tight.plans
    assert any(f"copy for background saves {copy} for each rank" in item.reason for item in tight.ruled_out)
    assert any(text.startswith("checkpoint.asynchronous=false") for text in advice(config, node, tight, pinned))
    waits = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, asynchronous=False))
    assert propose(waits, node, pinned).plans


def test_more_memory_rules_out_nothing() -> None:
    ways = []
    config = config_of("parallel.expert=8")
    for memory in (60.0, 120.0):
        proposal = propose(config, dataclasses.replace(NODE, memory=memory), ["parallel.expert"])
        ways.append({dataclasses.replace(plan.layout, micro_batch=0) for plan in proposal.plans})
    assert ways[0] < ways[1]


def test_one_gpu_sends_nothing() -> None:
    plans = propose(config_of(name="lab_3m"), Hardware(gpus=1, memory=80)).plans
    assert plans and all(plan.times.experts == plan.times.zero == plan.times.tensor == 0 for plan in plans)


def test_what_would_help_does_help() -> None:
    config = config_of("train.precision=float32", "parallel.expert=8")
    small, pinned = dataclasses.replace(NODE, memory=24.0), ["parallel.expert"]
    proposal = propose(config, small, pinned)
    assert not proposal.plans
    texts = advice(config, small, proposal, pinned)
    [memory] = [text for text in texts if text.startswith("--memory")]
    enough = float(memory.split()[1].rstrip(":")) + 1
    assert propose(config, dataclasses.replace(small, memory=enough), pinned).plans
    assert not propose(config, dataclasses.replace(small, memory=enough - 4), pinned).plans
    [gpus] = [text for text in texts if text.startswith("--gpus")]
    number = int(gpus.split()[1])
    batch = max(64, number)
    larger = config_of("train.precision=float32", "parallel.expert=8", f"train.global_batch_size={batch}")
    assert propose(larger, dataclasses.replace(small, gpus=number), pinned).plans
    for text in texts:
        if text.startswith(("train.", "data.", "deepspeed.")):
            changed = config_of("train.precision=float32", "parallel.expert=8", text.split(":")[0])
            assert propose(changed, small, pinned).plans


def test_pinned_keys_that_rule_out_what_fits() -> None:
    config = config_of("train.zero_stage=1", "parallel.expert=1")
    pinned = ["train.zero_stage", "parallel.expert"]
    proposal = propose(config, NODE, pinned)
    assert not proposal.plans
    assert any("without train.zero_stage and parallel.expert" in t for t in advice(config, NODE, proposal, pinned))
