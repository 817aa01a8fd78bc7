"""train.offload_optimizer: masters, moments and the optimizer's step in host memory change nothing.

Here both kinds of memory are the same, but DeepSpeed goes the way that it goes beside a GPU: gradients through its host
buffers, norms from its other sums, masters copied back. What differs is the last digit of the gradient's norm, which
clipping multiplies everything with; without clipping each bit must be equal.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from moe_train.training.options import OptimizerOptions
from tests.distributed.harness import bits, checkpointing, memory, training
from tests.distributed.harness.expected import Processes, away_from_ties, check
from tests.distributed.harness.training import SGD, Case
from tests.distributed.test_checkpoint import ROUTER, assert_same, same
from tests.distributed.test_families import MODELS
from tests.distributed.test_parity import ROUTERS

ADAMW = Case(router=ROUTER, optimizer=OptimizerOptions(lr=0.01), steps=2)
WAYS: list[tuple[int, int, int, Any, int]] = list(
    itertools.product([1, 2, 4], [1, 2], [1, 2, 3], ["float32", "bfloat16"], [1, 2])
)
"""(processes, EP, ZeRO stage, precision, accumulation)."""
FAST = [(2, 2, 1, "bfloat16", 2), (2, 2, 2, "float32", 2), (2, 2, 3, "bfloat16", 2)]
FAST += [(4, 2, 2, "bfloat16", 1), (1, 1, 1, "float32", 2)]
SLOW = [way for way in WAYS if way not in FAST and way[0] >= way[1]]


@pytest.mark.parametrize(
    ("size", "expert", "zero", "precision", "accumulation"),
    [*FAST, *(pytest.param(*w, marks=pytest.mark.slow) for w in SLOW)],
)
def test_without_clipping_each_bit_is_the_same(
    processes: Processes, size: int, expert: int, zero: int, precision: Any, accumulation: int
) -> None:
    case = ADAMW.with_(expert=expert, zero=zero, precision=precision, accumulation=accumulation)
    want = processes(size).run(training.train, case=case)
    got = processes(size).run(training.train, case=case.with_(offload=True))
    for records, others in zip(got, want, strict=True):
        for record, other in zip(records, others, strict=True):
            assert record.loss == other.loss
            assert same(record.weights, other.weights) and same(record.state, other.state)
            assert record.gradient_norm == pytest.approx(other.gradient_norm, rel=2e-7)
    assert got[0][0].weights and not same(got[0][0].weights, got[0][1].weights)


CLIPPED = [
    (2, ROUTERS["softmax_topk"], {"expert": 2, "zero": 1, "accumulation": 2}),
    (2, ROUTERS["lpr"], {"expert": 2, "zero": 2}),
    (4, ROUTERS["softmax_topk"], {"expert": 2, "zero": 3, "accumulation": 2, "recompute": True}),
    (4, ROUTERS["dynamic_k"], {"expert": 2, "zero": 1, "recompute": True}),
    (1, ROUTERS["softmax_topk"], {"zero": 3}),
]


@pytest.mark.parametrize(("size", "router", "way"), CLIPPED)
def test_clipping_is_that_of_the_reference(processes: Processes, size: int, router: Any, way: dict[str, Any]) -> None:
    """Gradients, norm and losses as everywhere (1e-6 with SGD): the norm of experts counts once, whoever holds them."""
    case = away_from_ties(processes, Case(router=router, optimizer=SGD, clip=0.5, **way))
    check(processes, case, processes(size).run(training.train, case=case.with_(offload=True)))


@pytest.mark.parametrize("name", ["deepseek_v3", "llama3"])
def test_other_families(processes: Processes, name: str) -> None:
    """Multi-token prediction, latent attention and dense layers; a model without experts."""
    case = ADAMW.with_(model=MODELS[name], zero=2, expert=2 if name == "deepseek_v3" else 1)
    want = processes(2).run(training.train, case=case)[0]
    got = processes(2).run(training.train, case=case.with_(offload=True))[0]
    assert all(same(record.weights, other.weights) for record, other in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("zero", "there"), [(1, True), (2, False), pytest.param(3, True, marks=pytest.mark.slow), (3, False)]
)
def test_a_checkpoint_does_not_know_of_it(processes: Processes, tmp_path: Path, zero: int, there: bool) -> None:
    """Written with offload and read without (``there``), and back: exact, and the same bits afterwards."""
    case = ADAMW.with_(expert=2, zero=zero)
    writer, reader = case.with_(offload=there), case.with_(offload=not there)
    run = checkpointing.train_and_save
    want = processes(2).run(run, case=writer, root=str(tmp_path), saves=[1], until=2)[0]
    directory = str(tmp_path / "step_00000001")
    plain = processes(2).run(run, case=reader, root=str(tmp_path / "other"), saves=[1], until=1)[0]
    loaded, after, _ = processes(2).run(checkpointing.resume, case=reader, directory=directory, until=2)[0]
    assert_same(loaded, plain)
    assert_same(after, want)
    assert [r.loss for r in after.records] == [r.loss for r in want.records[1:]]


def test_another_layout_without_offload_loads_it(processes: Processes, tmp_path: Path) -> None:
    case = ADAMW.with_(expert=2, zero=3, offload=True)
    run = checkpointing.train_and_save
    want = processes(4).run(run, case=case, root=str(tmp_path), saves=[2], until=2)[0]
    alone = case.with_(expert=1, zero=1, offload=False)
    directory = str(tmp_path / "step_00000002")
    assert_same(processes(1).run(checkpointing.resume, case=alone, directory=directory, until=2)[0][0], want)


@pytest.mark.parametrize(("zero", "clip"), [(1, 0.0), (2, 1.0), (3, 0.0)])
def test_a_gradient_that_is_not_finite_moves_nothing(processes: Processes, zero: int, clip: float) -> None:
    case = ADAMW.with_(expert=2, zero=zero, clip=clip, offload=True)
    for message, biases in processes(2).run(bits.step_with_infinite_gradient, case=case, rank=1):
        assert "gradient is not finite" in message
        assert not any(bias.any() for bias in biases)


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_lies_in_host_memory(processes: Processes, zero: int, precision: Any) -> None:
    """Masters and moments of the rank's share have memory of their own, apart from the module's parameters."""
    case = ADAMW.with_(expert=2, zero=zero, precision=precision, offload=True, steps=1)
    for rank in processes(2).run(memory.optimizer_storage, case=case):
        assert rank["dtypes"] == {"torch.float32"} and rank["shared_with_parameters"] == 0
        assert rank["kind"] == "AdamW"
