"""Every registered gate under expert parallelism, accumulation and recomputation gives what one process gives.

What one process must give is checked elsewhere: against the reference of whole training steps (test_parity.py) and of
single gates (tests/unit/routing).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_train.routing import available_gates, build_gate
from moe_train.routing.balanced_gate import BalancedGate
from moe_train.routing.options import (
    BalancingOptions,
    BiasOptions,
    ImportanceLossOptions,
    RouterOptions,
    SwitchLossOptions,
)
from moe_train.routing.registry import own_scope
from tests.distributed.harness import training
from tests.distributed.harness.expected import Processes, initial_weights, weight_errors
from tests.distributed.harness.training import MODEL, Case, Record
from tests.gate_variants import VARIANTS

DEFAULTS = [(name, {}) for name in available_gates()]
FURTHER = [(name, options) for name, variants in sorted(VARIANTS.items()) for options in variants]
WAYS = [(1, 1, 1, False), (2, 2, 2, True), (4, 2, 1, False), (4, 4, 1, True)]
"""(processes, EP, accumulation, recomputation)."""


def router(name: str, options: dict[str, Any]) -> RouterOptions:
    """The gate with every balancing piece that it takes."""
    gate = build_gate(name, options, MODEL.hidden_size, MODEL.moe.num_experts)
    return RouterOptions(
        name,
        options,
        BalancingOptions(
            SwitchLossOptions(0.1 if gate.takes_switch_loss else 0.0, "sequence"),
            z_loss=0.01 if gate.takes_z_loss else 0.0,
            bias=BiasOptions(0.01 if gate.takes_bias else 0.0),
            importance_loss=ImportanceLossOptions(
                0.05 if gate.reads_hidden else 0.0,
                "sequence",
                "probabilities" if gate.takes_switch_loss else "weights",
            ),
            exact=own_scope(gate) == "global_batch",
        ),
    )


def by_micro_batch(case: Case) -> bool:
    """Whether something is taken over a micro-batch, so that its contents must stay what they are."""
    gate = build_gate(case.router.gate, case.router.options, MODEL.hidden_size, MODEL.moe.num_experts)
    return "micro_batch" in (gate.pool, own_scope(gate))


AMPLIFIED = 10.0
"""How many times of what is allowed rounding may become with unlucky data (near what a loss divides by, for one)."""


def same(processes: Processes, case: Case, way: tuple[int, int, int, bool]) -> None:
    """Steps of SGD with learning rate 1, so that gradients show. A near-tie can fall either way by rounding: then
    the loads differ, and other data is taken. So it is where rounding grows; what is wrong is so with all data, or by
    more."""
    size, expert, accumulation, recompute = way
    if by_micro_batch(case):
        accumulation, case = 4 * case.tensor // size, case.with_(accumulation=4)
    started, unlucky = initial_weights(processes, case), "loads differ from those of one process with every seed"
    for seed in range(4):
        case = case.with_(data_seed=seed)
        want = processes(1).run(training.train, case=case.with_(tensor=1))[0]
        laid_out = case.with_(expert=expert, accumulation=accumulation, recompute=recompute, zero=1 + size // 2)
        ranks = processes(size).run(training.train, case=laid_out)
        if not all(torch.equal(a.load_LE, b.load_LE) for got in ranks for a, b in zip(got, want, strict=True)):
            continue
        compare_ranks(case, ranks, want, started, AMPLIFIED)
        try:
            return compare_ranks(case, ranks, want, started, 1.0)
        except AssertionError as error:
            unlucky = str(error)
    raise AssertionError(unlucky)


def compare_ranks(
    case: Case, ranks: list[list[Record]], want: list[Record], started: dict[str, torch.Tensor], times: float
) -> None:
    for rank, got in enumerate(ranks):
        for step, (a, b) in enumerate(zip(got, want, strict=True)):
            compare(case, a, b, started if rank == 0 else None, f"step {step}, rank {rank}", times)


def compare(
    case: Case, got: Record, want: Record, started: dict[str, torch.Tensor] | None, where: str, times: float
) -> None:
    """times: of what is allowed."""
    assert abs(got.loss - want.loss) <= times * 2e-6 * abs(want.loss), where
    assert abs(got.gradient_norm - want.gradient_norm) <= times * 2e-6 * want.gradient_norm, where
    for one, other in zip(got.auxiliary, want.auxiliary, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            allowed = times * 4e-6 * abs(value) + 1e-12
            assert abs(one[name] - value) <= allowed, f"{where}: {name} {one[name]}, not {value}"
    compare_state(case, got, want, where, times)
    if started is not None:
        errors = weight_errors(got.weights, want.weights, started)
        worst = max(errors, key=lambda name: errors[name])
        assert errors[worst] <= times * 2, f"{where}: {worst} is off by {errors[worst]:.2f} times what is allowed"


FLOATS = 4e-6
"""How far state that is declared to follow floats may differ."""
DIFFERENCES = {"gate.prototype_logvar": 1e-4}
"""Where it is the small difference of larger numbers: variances are what is left of squares."""


def compare_state(case: Case, got: Record, want: Record, where: str, times: float) -> None:
    """Counts exactly, and so the state that they move; what the gate declares to follow floats as far as float32
    goes."""
    gate = BalancedGate(case.router, MODEL.hidden_size, MODEL.moe.num_experts)
    for layer, (one, other) in enumerate(zip(got.sums, want.sums, strict=True)):
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert one[name].dtype == value.dtype
            if name in gate.gate.sum_units:  # of as many floats as there are sequences, or fewer
                difference = (one[name] - value).abs().max() * gate.gate.sum_units[name] / case.sequences
                assert float(difference) <= times * FLOATS, f"{where}, layer {layer}: {name} is off by {difference}"
            elif value.is_floating_point():
                error = float((one[name] - value).abs().max() / value.abs().max().clamp(min=1e-30))
                assert error <= times * FLOATS, f"{where}, layer {layer}: {name} is off by {error}"
            else:
                assert torch.equal(one[name], value), f"{where}, layer {layer}: {name}"
    assert got.state.keys() == want.state.keys()
    for name, value in want.state.items():
        own = name.partition(".router.")[2]
        tolerance = times * DIFFERENCES.get(own, FLOATS) if gate.state_follows[own] == "floats" else 0.0
        difference = (got.state[name].double() - value.double()).abs().max()
        assert got.state[name].dtype == value.dtype and float(difference) <= tolerance, f"{where}: {name} {difference}"


def identity(value: Any) -> str:
    return "-".join(f"{k}={v}" for k, v in value.items()) or "defaults" if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(("name", "options"), DEFAULTS, ids=identity)
@pytest.mark.parametrize("way", WAYS[1:2], ids=str)
def test_defaults(processes: Processes, name: str, options: dict[str, Any], way: tuple[int, int, int, bool]) -> None:
    same(processes, Case(router=router(name, options), steps=2), way)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), [*DEFAULTS, *FURTHER], ids=identity)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_matrix(processes: Processes, name: str, options: dict[str, Any], way: tuple[int, int, int, bool]) -> None:
    same(processes, Case(router=router(name, options), steps=2), way)
