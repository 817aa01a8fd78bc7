"""Tensor parallelism and what outlives it: checkpoints from and for other layouts, resuming, validation (invariant 8).

Rows of the heads, and of the gate and up projections, lie in several places of the global tensors; output projections
are divided by columns.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.distributed.harness import checkpointing, evaluating
from tests.distributed.harness.checkpointing import Snapshot
from tests.distributed.harness.expected import Processes
from tests.distributed.harness.training import Case
from tests.distributed.test_checkpoint import CASE as CHECKPOINT
from tests.distributed.test_checkpoint import assert_same, same
from tests.distributed.test_evaluation import numbers, prefix
from tests.distributed.test_families import MODELS
from tests.distributed.test_parity import ROUTERS
from tests.distributed.test_tensor import FOUR, SHARED

__all__ = ["prefix"]

CASE = CHECKPOINT.with_(model=SHARED)
"""AdamW with clipping and two micro-batches; two dense layers and one with experts and a shared one."""
SIZES = [(1, 1, 1), (2, 1, 1), (2, 2, 1), (4, 2, 1), (2, 1, 2), (2, 2, 2), (4, 2, 2)]
"""(processes, EP, TP)."""
TARGETS = list(itertools.product(SIZES, [1, 2, 3]))
FAST = [((1, 1, 1), 1), ((2, 2, 1), 3), ((2, 1, 2), 2), ((2, 2, 2), 3)]


def laid_out(layout: tuple[int, int, int], zero: int) -> Case:
    return CASE.with_(expert=layout[1], tensor=layout[2], zero=zero)


@pytest.fixture(scope="module")
def divided(processes: Processes, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Snapshot]:
    """A checkpoint of 4 processes, TP2 x EP2 x DP2, ZeRO 2, after two steps."""
    root = str(tmp_path_factory.mktemp("divided"))
    case = laid_out((4, 2, 2), zero=2)
    want = processes(4).run(checkpointing.train_and_save, case=case, root=root, saves=[2], until=2)[0]
    return f"{root}/step_00000002", want


@pytest.fixture(scope="module")
def whole(processes: Processes, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Snapshot]:
    """The same of one process."""
    root = str(tmp_path_factory.mktemp("whole"))
    want = processes(1).run(checkpointing.train_and_save, case=CASE, root=root, saves=[2], until=2)[0]
    return f"{root}/step_00000002", want


@pytest.mark.parametrize(
    ("layout", "zero"), [*FAST, *(pytest.param(*t, marks=pytest.mark.slow) for t in TARGETS if t not in FAST)], ids=str
)
def test_any_layout_loads_a_divided_one_exactly(
    processes: Processes, divided: tuple[str, Snapshot], layout: tuple[int, int, int], zero: int
) -> None:
    """Pitfall 25: DS#2898/#3810/#2921, #5716 (another number of ranks). Weights and moments, and then the same step."""
    directory, want = divided
    case = laid_out(layout, zero)
    loaded, after, _ = processes(layout[0]).run(checkpointing.resume, case=case, directory=directory, until=3)[0]
    assert_same(loaded, want)
    assert not same(after.weights, want.weights)


@pytest.mark.parametrize(
    ("size", "expert", "zero"),
    [(2, 1, 3), (2, 2, 1), *(pytest.param(*c, marks=pytest.mark.slow) for c in [(2, 2, 2), (4, 2, 3), (4, 4, 1)])],
)
def test_a_divided_layout_loads_a_whole_one_exactly(
    processes: Processes, whole: tuple[str, Snapshot], size: int, expert: int, zero: int
) -> None:
    directory, want = whole
    case = laid_out((size, expert, 2), zero)
    loaded, after, _ = processes(size).run(checkpointing.resume, case=case, directory=directory, until=4)[0]
    assert_same(loaded, want)
    _, there, _ = processes(1).run(checkpointing.resume, case=CASE, directory=directory, until=4)[0]
    assert [r.loss for r in after.records] == pytest.approx([r.loss for r in there.records], rel=1e-5)


@pytest.mark.slow
def test_two_ranks_go_on_with_what_four_wrote(processes: Processes, tmp_path: Path) -> None:
    case = CASE.with_(model=FOUR, tensor=4, zero=3)
    want = processes(4).run(checkpointing.train_and_save, case=case, root=str(tmp_path), saves=[2], until=2)[0]
    two = case.with_(tensor=2, expert=2, zero=1)
    directory = str(tmp_path / "step_00000002")
    loaded, _, _ = processes(2).run(checkpointing.resume, case=two, directory=directory, until=3)[0]
    assert_same(loaded, want)


@pytest.mark.parametrize(("size", "expert", "tensor"), [(1, 1, 1), (2, 1, 2), (4, 2, 2)])
def test_a_plain_model_loads_the_weights(
    processes: Processes, divided: tuple[str, Snapshot], size: int, expert: int, tensor: int
) -> None:
    directory, want = divided
    differing = processes(size).run(
        checkpointing.weights_of_model,
        case=CASE.with_(expert=expert, tensor=tensor),
        directory=directory,
        whole=want.weights,
    )
    assert differing == [[]] * size


@pytest.mark.parametrize("zero", [1, 3])
def test_a_new_run_begins_with_its_weights(processes: Processes, divided: tuple[str, Snapshot], zero: int) -> None:
    directory, want = divided
    case = laid_out((2, 1, 2), zero)
    assert same(processes(2).run(checkpointing.begin_with, case=case, directory=directory)[0][0], want.weights)


RESUMES = [
    (2, laid_out((2, 1, 2), 1)),
    (2, laid_out((2, 2, 2), 3).with_(recompute=True)),
    (4, laid_out((4, 2, 2), 2)),
    (2, laid_out((2, 2, 2), 2).with_(precision="bfloat16")),
    (4, laid_out((4, 1, 2), 3).with_(persistent=True, precision="bfloat16")),
    (2, CHECKPOINT.with_(model=MODELS["llama3"], tensor=2, zero=2)),
]


@pytest.mark.parametrize(
    ("size", "case"), [pytest.param(*r, marks=pytest.mark.slow if i > 1 else []) for i, r in enumerate(RESUMES)]
)
def test_resume_is_bit_for_bit(processes: Processes, tmp_path: Path, size: int, case: Case) -> None:
    """Pitfall 20: M#761, DS#8147/PR8198 (stale moments: here also those of divided tensors)."""
    pool = processes(size)
    want = pool.run(checkpointing.train_and_save, case=case, root=str(tmp_path), saves=[2], until=4)
    directory = str(tmp_path / "step_00000002")
    for rank, (loaded, after, _) in enumerate(pool.run(checkpointing.resume, case=case, directory=directory, until=4)):
        assert loaded.optimizer_steps == 2
        assert same(after.weights, want[rank].weights) and same(after.buffers, want[rank].buffers)
        for kind in ("exp_avg", "exp_avg_sq"):
            assert same(after.moments[kind], want[rank].moments[kind])
        for got, record in zip(after.records, want[rank].records[2:], strict=True):
            assert (got.loss, got.gradient_norm) == (record.loss, record.gradient_norm)
    assert want[0].weights and want[0].moments["exp_avg"]


REST = [("softmax_topk", True), ("dynamic_k", True), ("lpr", False), ("dynamic_k", False)]


@pytest.mark.parametrize(
    ("gate", "in_engine"), [("lpr", True), *(pytest.param(*r, marks=pytest.mark.slow) for r in REST)]
)
@pytest.mark.parametrize(("size", "expert", "micro_batch"), [(2, 2, 3), pytest.param(4, 2, 2, marks=pytest.mark.slow)])
def test_validation(
    processes: Processes, prefix: str, gate: str, in_engine: bool, size: int, expert: int, micro_batch: int
) -> None:
    """As one process that takes the samples one by one; ranks that share tensors see the same samples."""
    case = Case(model=SHARED, router=ROUTERS[gate], zero=3)
    want = processes(1).run(evaluating.evaluate, case=case, prefix=prefix, micro_batch=1)[0]
    there = case.with_(expert=expert, tensor=2)
    for got in processes(size).run(
        evaluating.evaluate, case=there, prefix=prefix, micro_batch=micro_batch, in_engine=in_engine
    ):
        assert numbers(got) == numbers(want) and want.tokens == 50
        assert abs(got.loss - want.loss) <= 1e-6 * want.loss
