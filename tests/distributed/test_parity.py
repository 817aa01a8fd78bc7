"""Training steps under every layout against the independent single-process reference (invariants 1 to 4, 6).

With SGD at learning rate 1 the weights after a step show the gradients themselves, so a gradient that is too large by
the number of ranks or micro-batches is off by orders of magnitude more than what is allowed.
"""

from __future__ import annotations

import itertools

import pytest

from moe_train.routing.options import BalancingOptions, BiasOptions, RouterOptions, SwitchLossOptions
from tests.distributed.harness import training
from tests.distributed.harness.expected import Processes, away_from_ties, check
from tests.distributed.harness.training import Case

ROUTERS = {
    "softmax_topk": RouterOptions(
        "softmax_topk",
        {"top_k": 2},
        BalancingOptions(SwitchLossOptions(0.1, "sequence"), z_loss=0.01, bias=BiasOptions(0.01)),
    ),
    "sigmoid_topk": RouterOptions(
        "sigmoid_topk",
        {"top_k": 2, "renormalize": False},
        BalancingOptions(SwitchLossOptions(0.1, "sequence"), z_loss=0.01),
    ),
    "sigmoid_topk in groups": RouterOptions(
        "sigmoid_topk",
        {"top_k": 2, "num_groups": 4, "groups_per_token": 2, "scaling": 2.5},
        BalancingOptions(
            SwitchLossOptions(0.1, "sequence"),
            bias=BiasOptions(0.01, target_load=[2, 1, 1, 1, 1, 1, 0.5, 0.5]),
        ),
    ),
    "lpr": RouterOptions(
        "lpr",
        {"top_k": 2, "latent_dim": 8, "coefficient": 0.1, "kl_weight": 0.3, "align_weight": 0.5},
        BalancingOptions(z_loss=0.01),
    ),
    "dynamic_k": RouterOptions(
        "dynamic_k", {"threshold": 0.6}, BalancingOptions(SwitchLossOptions(0.1, "sequence"), z_loss=0.01)
    ),
}
LAYOUTS = [(1, 1), (2, 2), (2, 1), (4, 4), (4, 2)]
"""(processes, EP); data parallelism spans all processes, so (4, 2) is EP2 x expert-DP 2."""
WAYS = list(itertools.product([1, 2, 3], [1, 2, 4], [False, True]))
"""(ZeRO stage, accumulation, recomputation)."""


def _selection() -> list[tuple[str, tuple[int, int], tuple[int, int, bool]]]:
    """Every gate with every layout, in two ways, with four processes in one. The stride walks through all ways; what
    else it covers is asserted below."""
    chosen: list[tuple[str, tuple[int, int], tuple[int, int, bool]]] = []
    for gate, layout in itertools.product(ROUTERS, LAYOUTS):
        for _ in range(1 if layout[0] == 4 else 2):
            chosen.append((gate, layout, WAYS[13 * len(chosen) % len(WAYS)]))
    return chosen


FAST = _selection()
SLOW = [c for c in itertools.product(ROUTERS, LAYOUTS, WAYS) if c not in FAST]


def test_selection_covers() -> None:
    """All ways; every ZeRO stage with every layout; on several processes every gate with every value of each."""
    assert {way for _, _, way in FAST} == set(WAYS)
    assert {(way[0], layout) for _, layout, way in FAST} == set(itertools.product([1, 2, 3], LAYOUTS))
    for gate in ROUTERS:
        several = [way for g, layout, way in FAST if g == gate and layout[0] > 1]
        assert [set(values) for values in zip(*several, strict=True)] == [{1, 2, 3}, {1, 2, 4}, {False, True}]


@pytest.mark.parametrize(("gate", "layout", "way"), [*FAST, *(pytest.param(*c, marks=pytest.mark.slow) for c in SLOW)])
def test_equals_reference(processes: Processes, gate: str, layout: tuple[int, int], way: tuple[int, int, bool]) -> None:
    """Pitfall 1: AM#1408/PR1412 (auxiliary gradient zero, then scaled by parallelism). Pitfall 2: AM PR3359 (times
    accumulation). Pitfall 3: M PR5047 (depends on the layout). Pitfall 14: DS#6545, #5618, PR5259, M#5956 (expert
    gradients times EP). Pitfall 15: DS#8469/#8475, PR8478, AM#3816, M PR5916 (gradient norm without experts).
    Pitfall 5: M PR2121/#1984, TT PR4594, HF#28505 (padding counts): the reference leaves padding out, and one
    sequence, hence a whole micro-batch of one rank, is nothing else. Pitfall 7: megablocks#85/#64, M#3199, SkyRL PR1701
    (logged auxiliary losses that are others than those of the step, or lack layers). Pitfall 11: TT PR1304/1593/3686/
    #1506 (bias moved per micro-batch or twice under recomputation). Pitfall 26: DS PR8379, DS#7848 (ZeRO 3 and routers
    above its threshold, stacked experts): here its threshold is 0, so that all are in pieces."""
    size, expert = layout
    zero, accumulation, recompute = way
    case = Case(
        router=ROUTERS[gate],
        expert=expert,
        zero=zero,
        accumulation=accumulation,
        recompute=recompute,
    )
    case = away_from_ties(processes, case)
    check(processes, case, processes(size).run(training.train, case=case))
