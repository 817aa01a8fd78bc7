"""Bugs that other systems shipped and that need the whole engine to show (rows not covered elsewhere here)."""

from __future__ import annotations

import dataclasses
import datetime

import pytest
import torch

from moe_train.routing.options import BalancingOptions, RouterOptions, SwitchLossOptions
from tests.distributed.harness import bits, training
from tests.distributed.harness.expected import Processes, away_from_ties, check, expected, relative
from tests.distributed.harness.selection import every_second
from tests.distributed.harness.training import MODEL, Case, Record
from tests.distributed.test_parity import ROUTERS

BALANCED = RouterOptions(
    "softmax_topk", {"top_k": 2}, BalancingOptions(SwitchLossOptions(0.1, "sequence"), z_loss=0.01)
)
PLAIN = RouterOptions("softmax_topk", {"top_k": 2})


def same(got: list[Record], want: list[Record]) -> bool:
    return all(
        a.loss == b.loss
        and a.gradient_norm == b.gradient_norm
        and torch.equal(a.load_LE, b.load_LE)
        and a.auxiliary == b.auxiliary
        and all(torch.equal(a.weights[n], b.weights[n]) for n in b.weights)
        for a, b in zip(got, want, strict=True)
    )


@pytest.mark.parametrize(("size", "expert", "zero"), [(1, 1, 1), (2, 2, 3), (4, 4, 2)])
def test_auxiliary_gradient_alone(processes: Processes, size: int, expert: int, zero: int) -> None:
    """Pitfall 1: AM#1408/PR1412 (the auxiliary gradient was zero, or scaled with the layout). The change that the
    auxiliary losses make to the gates' step, not hidden behind the gradient of the language loss."""
    layout = {"expert": expert, "zero": zero, "accumulation": 2, "steps": 1}
    cases = [Case(router=router, **layout) for router in (BALANCED, PLAIN)]  # type: ignore[arg-type]
    got = [processes(size).run(training.train, case=case)[0][0].weights for case in cases]
    want = [expected(processes, case)[0].weights for case in cases]
    for layer in range(2):
        name = f"decoder.layers.{layer}.mlp.router.gate.weight"
        difference = want[0][name] - want[1][name]
        assert difference.abs().max() > 1e-3
        assert relative(got[0][name] - got[1][name], difference) <= 1e-4


@pytest.mark.parametrize(("size", "expert", "accumulation"), [(1, 1, 16), (2, 2, 8), (4, 2, 4)])
def test_micro_batches_of_one_sequence(processes: Processes, size: int, expert: int, accumulation: int) -> None:
    """Pitfall 2: AM PR3359 (auxiliary losses times the number of micro-batches)."""
    case = Case(router=BALANCED, expert=expert, accumulation=accumulation, zero=2)
    case = away_from_ties(processes, case)
    check(processes, case, processes(size).run(training.train, case=case))


@pytest.mark.parametrize("gate", ROUTERS)
@pytest.mark.parametrize(("size", "expert"), [(1, 1), (4, 2)])
def test_contents_of_padding_change_nothing(processes: Processes, gate: str, size: int, expert: int) -> None:
    """Pitfall 5: M PR2121/#1984, TT PR4594, HF#28505 (padding counted in the balancing loss). Pitfall 6: M#1513,
    M#1617 (counts taken with padding). To the bit: losses, counts, bias, weights."""
    case = Case(router=ROUTERS[gate], expert=expert)
    runs = [processes(size).run(training.train, case=case.with_(other_padding=other)) for other in (False, True)]
    assert (case.tokens(0).ids_BS != case.with_(other_padding=True).tokens(0).ids_BS).any()
    for first, second in zip(*runs, strict=True):
        assert same(first, second)
        for x, y in zip(first, second, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(x.biases, y.biases, strict=True))
    real = int((~case.tokens(0).padding_BS).sum())
    loads = runs[0][0][0].load_LE.sum(1)
    assert gate == "dynamic_k" or loads.tolist() == [2 * real] * 2


@pytest.mark.parametrize(("size", "expert", "zero"), [(2, 2, 1), (2, 2, 3), (4, 4, 2), (4, 4, 3), (4, 2, 1)])
def test_everything_on_two_experts(processes: Processes, size: int, expert: int, zero: int) -> None:
    """Pitfall 17: DS#5066, #5794, MoE-LLaVA#20 (an expert or a rank without tokens: hang, missing gradient).
    Pitfall 15: DS#8469/#8475, PR8478, AM#3816, M PR5916, ColossalAI#2192, fastmoe#29, DS PR8613 (norm where a rank has
    no expert gradient). All tokens are alike, so they all choose the same two of eight experts."""
    case = Case(router=BALANCED, expert=expert, zero=zero, constant=True, clip=0.5, recompute=zero == 3)
    case = away_from_ties(processes, case)
    records = processes(size).run(training.train, case=case)
    assert (records[0][0].load_LE > 0).sum(1).tolist() == [2, 2]
    check(processes, case, records)


@pytest.mark.parametrize(
    ("gate", "size", "expert", "zero", "recompute"),
    every_second(ROUTERS, [(1, 1, 1, True), (2, 2, 3, True), (4, 2, 2, False)]),
)
def test_exact_ties(processes: Processes, gate: str, size: int, expert: int, zero: int, recompute: bool) -> None:
    """Pitfall 27 and 28: equal logits everywhere choose the lower indices. Pitfall 8: vmoe PR218 (a balancing loss with
    NaN gradient at perfect balance): probabilities are exactly uniform here."""
    case = Case(
        router=ROUTERS[gate], expert=expert, zero=zero, recompute=recompute, zero_gate=True, steps=1, accumulation=2
    )
    records = processes(size).run(training.train, case=case)
    chosen = 5 if gate == "dynamic_k" else 2
    assert (records[0][0].load_LE[:, :chosen] > 0).all() and not records[0][0].load_LE[:, chosen:].any()
    check(processes, case, records)


@pytest.mark.parametrize(("gate", "size", "expert", "zero"), every_second(ROUTERS, [(1, 1, 1), (2, 2, 3)]))
def test_recomputation_replays_the_selection(
    processes: Processes, gate: str, size: int, expert: int, zero: int
) -> None:
    """Pitfall 27: AM PR2635/3140/3156/3247/3743, TT#1117/PR3146, NeMo-RL#1203, unsloth-zoo PR1008 (recomputation flips
    a tie: CheckpointError, or wrong gradients). Here a recomputation that selected again would choose otherwise."""
    case = Case(router=ROUTERS[gate], expert=expert, zero=zero, zero_gate=True, steps=2, recompute=True)
    want = processes(size).run(training.train, case=case.with_(recompute=False))[0]
    (records, asked), *_ = processes(size).run(bits.train_with_other_ties_in_recomputation, case=case)
    assert asked == (0 if gate == "dynamic_k" else 4)
    for record, wanted in zip(records, want, strict=True):
        assert torch.equal(record.load_LE, wanted.load_LE)
        for name, weight in wanted.weights.items():
            assert relative(record.weights[name], weight) <= 2e-6, name


@pytest.mark.parametrize("gate", [*ROUTERS, "bounded dynamic_k"])
@pytest.mark.parametrize("recompute", [False, True])
def test_rows_that_the_kernel_leaves_uninitialised(processes: Processes, gate: str, recompute: bool) -> None:
    """Pitfall 16: transformers PR48205, pytorch#193633, #154557 (rows beyond the last offset are garbage in forward
    and in dX; step 1 clean, step 2 NaN). They hold NaN here."""
    router = ROUTERS.get(gate) or RouterOptions("dynamic_k", {"threshold": 0.6, "max_k": 4})
    case = Case(router=router, recompute=recompute, steps=2)
    want = processes(1).run(training.train, case=case)[0]
    records, poisoned = processes(1).run(bits.train_with_poisoned_rows, case=case)[0]
    # Without a bound on k the slots are as many as the busiest token needs, so most tokens leave some unused.
    assert poisoned > 100
    assert same(records, want)
    assert all(w.isfinite().all() for record in records for w in record.weights.values())


@pytest.mark.parametrize(
    "gate", [g if g == "softmax_topk" else pytest.param(g, marks=pytest.mark.slow) for g in ROUTERS]
)
def test_the_same_bits_every_time(processes: Processes, gate: str) -> None:
    """Pitfall 28: M docs/developer/determinism PR5718, sglang PR33511, vllm PR55514 (scatter_add, unsorted top-k)."""
    case = Case(router=ROUTERS[gate], expert=2, zero=3, accumulation=2)
    first, second = (processes(2).run(training.train, case=case)[0] for _ in range(2))
    assert same(first, second)
    assert processes(2).run(bits.repeated_layer, case=case, times=20) == [True, True]


@pytest.mark.parametrize(
    ("gate", "dense", "recompute", "size", "expert", "accumulation"),
    every_second(["softmax_topk", "sigmoid_topk in groups"], [[], [0], [1]], [False, True], [(1, 1, 4), (2, 2, 2)]),
)
def test_bias_moves_once_per_step(
    processes: Processes, size: int, expert: int, accumulation: int, recompute: bool, dense: list[int], gate: str
) -> None:
    """Pitfall 11: TT PR1304/1593/3686/#1506 (bias moved per micro-batch, or twice under recomputation, or not at all
    behind a layer without one; mean drifts)."""
    model = MODEL
    if dense:
        model = dataclasses.replace(MODEL, num_layers=3, dense_layers=dense, ffn_hidden_size=48)
    case = Case(model=model, router=ROUTERS[gate], expert=expert, accumulation=accumulation, recompute=recompute)
    target_E = torch.tensor(ROUTERS[gate].balancing.bias.target_load or [1.0] * 8, dtype=torch.float64)
    for records in processes(size).run(training.train, case=case.with_(steps=2)):
        want_LE = torch.zeros(2, 8, dtype=torch.float64)
        for record in records:
            wanted_LE = record.load_LE.sum(1, keepdim=True) * target_E / target_E.sum()
            sign_LE = torch.sign(wanted_LE - record.load_LE)
            want_LE += 0.01 * (sign_LE - sign_LE.mean(1, keepdim=True))
            assert len(record.biases) == 2 and want_LE.abs().sum(1).min() > 0.01
            torch.testing.assert_close(torch.stack(record.biases).double(), want_LE, rtol=0, atol=1e-8)


@pytest.mark.parametrize("load", [40_840, 2**24 + 1, 2**40 + 1])
def test_counts_over_ranks_are_exact(processes: Processes, load: int) -> None:
    """Pitfall 10: M PR7081 (counters in bfloat16: 40,840 becomes 40,704 or 41,216)."""
    assert processes(2).run(bits.collected_counts, load=load) == [(4 * load, 4.0 * load)] * 2


@pytest.mark.parametrize(("size", "expert"), [(2, 2), (4, 2)])
def test_every_group_carries_the_timeout(processes: Processes, size: int, expert: int) -> None:
    """Pitfall 18: M#2238 (the expert group was made without the user's timeout)."""
    for timeouts in processes(size).run(bits.group_timeouts, expert=expert, seconds=424.5):
        assert {"_EXPERT_MODEL_PARALLEL_GROUP", "_DATA_PARALLEL_GROUP"} <= timeouts.keys()
        assert set(timeouts.values()) == {datetime.timedelta(seconds=424.5)}, timeouts


@pytest.mark.parametrize(("size", "expert", "tensor"), [(1, 1, 1), (2, 2, 1), (4, 2, 1), (4, 2, 2)])
def test_a_set_of_ranks_has_one_group(processes: Processes, size: int, expert: int, tensor: int) -> None:
    """Dozens of gloo's groups of the same ranks slow a machine with few cores down."""
    for ranks in processes(size).run(bits.ranks_of_groups, expert=expert, tensor=tensor):
        assert ranks and len(ranks) == len({tuple(found) for found in ranks})


@pytest.mark.parametrize("size", [1, 2])
def test_a_step_without_targets(processes: Processes, size: int) -> None:
    """As with prompts that are all longer than a sequence: it must not go on with a loss of nan."""
    messages = processes(size).run(bits.step_without_targets, case=Case(router=ROUTERS["softmax_topk"]))
    assert all("step 5 has no token that counts in the loss" in message for message in messages)


@pytest.mark.parametrize(("size", "expert", "clip"), [(1, 1, 0.0), (1, 1, 1.0), (2, 2, 0.0), (4, 2, 1.0)])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_gradient_that_is_not_finite(processes: Processes, size: int, expert: int, clip: float, zero: int) -> None:
    """Invariant 4: gate state moves in steps that were taken only. DeepSpeed skips such a step without a word, or
    takes it; one rank's infinite gradient must end the run on all, with biases as they were."""
    case = Case(router=ROUTERS["softmax_topk"], expert=expert, zero=zero, clip=clip)
    for message, biases in processes(size).run(bits.step_with_infinite_gradient, case=case, rank=size - 1):
        assert "a gradient is not finite" in message
        assert biases and not any(bias.any() for bias in biases)
