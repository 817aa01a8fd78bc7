"""Losses of scope global_batch with ``exact``: loss and gradients are those of one process with one micro-batch under
every split of the step; importance loss; scheduled coefficients."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from moe_train.routing.options import (
    BalancingOptions,
    BiasOptions,
    CapacityOptions,
    ImportanceLossOptions,
    RouterOptions,
    SwitchLossOptions,
)
from moe_train.routing.schedule import Ramp
from tests.distributed.harness import training
from tests.distributed.harness.expected import Processes, away_from_ties, check, expected
from tests.distributed.harness.selection import every_second
from tests.distributed.harness.training import Case
from tests.distributed.test_families import DEEPSEEK

GLOBAL = BalancingOptions(
    SwitchLossOptions(0.1, "global_batch"),
    bias=BiasOptions(0.01),
    importance_loss=ImportanceLossOptions(0.2, "global_batch"),
    exact=True,
)
LPR = {"top_k": 2, "latent_dim": 8, "coefficient": 0.1, "kl_weight": 0.3, "align_weight": 0.5, "scope": "global_batch"}
ROUTERS = {
    "switch and importance": RouterOptions("softmax_topk", {"top_k": 2}, GLOBAL),
    "lpr": RouterOptions("lpr", LPR, BalancingOptions(exact=True)),
}
WAYS = [(1, 1, 4, 1, False), (2, 2, 2, 3, True), (2, 1, 4, 2, False), (4, 2, 2, 3, False), (4, 4, 4, 1, True)]
"""(processes, EP, accumulation, ZeRO, recomputation)."""


@pytest.mark.parametrize(("router", "size", "expert", "accumulation", "zero", "recompute"), every_second(ROUTERS, WAYS))
def test_equals_the_whole_batch_under_every_split(
    processes: Processes, router: str, size: int, expert: int, accumulation: int, zero: int, recompute: bool
) -> None:
    case = Case(router=ROUTERS[router], expert=expert, accumulation=accumulation, zero=zero, recompute=recompute)
    case = away_from_ties(processes, case)
    check(processes, case, processes(size).run(training.train, case=case))


@pytest.mark.parametrize("router", ROUTERS)
def test_without_exact_accumulation_is_an_approximation(processes: Processes, router: str) -> None:
    """Else the test above would show nothing."""
    options = ROUTERS[router]
    options = dataclasses.replace(options, balancing=dataclasses.replace(options.balancing, exact=False))
    case = away_from_ties(processes, Case(router=options, accumulation=4, steps=1))
    got, want = processes(1).run(training.train, case=case)[0][0], expected(processes, case)[0]
    name = "lpr_diversity" if router == "lpr" else "switch"
    assert abs(got.auxiliary[0][name] - want.auxiliary[0][name]) > 1e-4


def test_every_gate_of_a_model_with_multi_token_prediction(processes: Processes) -> None:
    """Its layer comes behind the head's input and has a gate too."""
    router = RouterOptions("sigmoid_topk", {"top_k": 2}, GLOBAL)
    case = away_from_ties(processes, Case(model=DEEPSEEK, router=router, accumulation=4, steps=2))
    check(processes, case, processes(1).run(training.train, case=case))


def test_with_capacity(processes: Processes) -> None:
    """The first pass drops what the real one drops."""
    router = RouterOptions("softmax_topk", {"top_k": 2}, GLOBAL, CapacityOptions(factor=0.6))
    case = away_from_ties(processes, Case(router=router, accumulation=2, expert=2, zero=3, steps=2))
    check(processes, case, processes(2).run(training.train, case=case))


@pytest.mark.parametrize("of", ["probabilities", "weights"])
@pytest.mark.parametrize("scope", ["sequence", "micro_batch", "global_batch"])
@pytest.mark.parametrize(("size", "expert"), [(1, 1), (2, 2)])
def test_importance_loss(processes: Processes, scope: Any, of: Any, size: int, expert: int) -> None:
    balancing = BalancingOptions(importance_loss=ImportanceLossOptions(0.3, scope, of))
    router = RouterOptions("softmax_topk", {"top_k": 2}, balancing)
    micro_size = 16 // size if scope == "micro_batch" else None
    case = away_from_ties(processes, Case(router=router, expert=expert, steps=2), micro_size)
    check(processes, case, processes(size).run(training.train, case=case), micro_size)


@pytest.mark.parametrize(("size", "expert", "accumulation"), [(1, 1, 2), (2, 2, 1)])
def test_scheduled_coefficients(processes: Processes, size: int, expert: int, accumulation: int) -> None:
    """The logged losses have no coefficient in them, and are there in steps where it is 0."""
    ramp = Ramp(start=0.0, end=0.4, steps=2, first_step=1)
    balancing = BalancingOptions(SwitchLossOptions(ramp, "sequence"), z_loss=Ramp(0.04, 0.01, 2))
    case = Case(
        router=RouterOptions("softmax_topk", {"top_k": 2}, balancing), expert=expert, accumulation=accumulation, steps=4
    )
    case = away_from_ties(processes, case)
    records = processes(size).run(training.train, case=case)
    assert all(set(record.auxiliary[0]) == {"switch", "z"} for record in records[0])
    check(processes, case, records)
