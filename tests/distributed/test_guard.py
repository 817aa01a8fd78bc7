"""Steps with bad numbers are refused on every rank alike, and leave nothing behind; replicas that differ are found."""

from __future__ import annotations

import pytest

from tests.distributed.harness import guarding
from tests.distributed.harness.checkpointing import Snapshot
from tests.distributed.harness.expected import Processes
from tests.distributed.harness.training import Case
from tests.distributed.test_checkpoint import CASE, assert_same, same

slow = pytest.mark.slow
LAYOUTS = [
    (1, 1, 1, 0.0, "float32"),
    (2, 1, 2, 1.0, "float32"),
    (2, 2, 1, 0.0, "float32"),
    (2, 2, 2, 0.0, "bfloat16"),
    (2, 2, 3, 1.0, "float32"),
    pytest.param(1, 1, 2, 1.0, "bfloat16", marks=slow),
    pytest.param(2, 1, 1, 1.0, "bfloat16", marks=slow),
    pytest.param(2, 2, 3, 0.0, "bfloat16", marks=slow),
    pytest.param(4, 2, 1, 1.0, "bfloat16", marks=slow),
    pytest.param(4, 2, 2, 0.0, "float32", marks=slow),
    pytest.param(4, 2, 3, 0.0, "float32", marks=slow),
]


def case_of(expert: int, zero: int, clip: float, precision: str) -> Case:
    return CASE.with_(expert=expert, zero=zero, clip=clip, precision=precision, accumulation=2)


@pytest.mark.parametrize(("size", "expert", "zero", "clip", "precision"), LAYOUTS)
def test_a_bad_gradient_on_one_rank(
    processes: Processes, size: int, expert: int, zero: int, clip: float, precision: str
) -> None:
    """Every rank skips; parameters, moments and gate state are those of before, and the run goes on as one that never
    had the step."""
    case = case_of(expert, zero, clip, precision)
    pool = processes(size)
    found = pool.run(guarding.skip_a_step, case=case, bad=1, rank=size - 1)
    never = pool.run(guarding.skip_a_step, case=case, bad=None)
    for rank, (mine, other) in enumerate(zip(found, never, strict=True)):
        assert mine.taken == [True, False, True]
        assert_as_before(mine.after, mine.before, rank)
        assert_as_before(mine.end, other.end, rank)
        assert mine.norms[1] == mine.norms[0] > 0 and mine.norms[2] == other.norms[1]
        assert mine.place.ranks == [] and mine.place.parameters == ["decoder.final_layernorm.weight"]
    assert moved(found[0].end, found[0].before)


@pytest.mark.parametrize(
    ("size", "expert", "zero", "clip", "precision"),
    [
        (2, 2, 1, 0.0, "bfloat16"),
        (2, 1, 2, 1.0, "float32"),
        (2, 2, 3, 0.0, "bfloat16"),
        pytest.param(2, 2, 2, 0.0, "bfloat16", marks=slow),
        pytest.param(2, 2, 1, 1.0, "float32", marks=slow),
        pytest.param(2, 2, 3, 1.0, "float32", marks=slow),
    ],
)
def test_a_bad_gradient_with_the_optimizer_in_host_memory(
    processes: Processes, size: int, expert: int, zero: int, clip: float, precision: str
) -> None:
    case = case_of(expert, zero, clip, precision).with_(offload=True)
    pool = processes(size)
    found = pool.run(guarding.skip_a_step, case=case, bad=1, rank=size - 1)
    never = pool.run(guarding.skip_a_step, case=case, bad=None)
    for rank, (mine, other) in enumerate(zip(found, never, strict=True)):
        assert mine.taken == [True, False, True]
        assert_as_before(mine.after, mine.before, rank)
        assert_as_before(mine.end, other.end, rank)


@pytest.mark.parametrize(("size", "expert", "zero"), [(1, 1, 2), (2, 2, 3), pytest.param(2, 2, 1, marks=slow)])
def test_a_spike_is_refused_before_anything_moves(processes: Processes, size: int, expert: int, zero: int) -> None:
    case = case_of(expert, zero, 1.0, "bfloat16" if size == 1 else "float32")
    pool = processes(size)
    found = pool.run(guarding.skip_a_step, case=case, bad=1, what="spike")
    never = pool.run(guarding.skip_a_step, case=case, bad=None)
    for rank, (mine, other) in enumerate(zip(found, never, strict=True)):
        assert mine.taken == [True, False, True] and mine.place.parameters == []
        assert_as_before(mine.after, mine.before, rank)
        assert_as_before(mine.end, other.end, rank)


@pytest.mark.parametrize(("size", "expert", "zero"), [(2, 2, 2), pytest.param(4, 2, 3, marks=slow)])
def test_a_bad_loss_on_one_rank(processes: Processes, size: int, expert: int, zero: int) -> None:
    """Its gradients are not finite on any rank then; the explanation names the rank, and the head first."""
    case = case_of(expert, zero, 1.0, "float32")
    for rank, mine in enumerate(processes(size).run(guarding.skip_a_step, case=case, bad=1, rank=1, what="loss")):
        assert mine.taken == [True, False, True]
        assert_as_before(mine.after, mine.before, rank)
        assert mine.place.ranks == [1]
        assert "final_layernorm" in mine.place.parameters[1] and "embedding" in mine.place.parameters[-1]


def assert_as_before(got: Snapshot, want: Snapshot, rank: int) -> None:
    """Global tensors are on rank 0, gate state is each rank's own."""
    if rank == 0:
        assert_same(got, want)
    assert same(got.buffers, want.buffers) and got.optimizer_steps == want.optimizer_steps


def moved(after: Snapshot, before: Snapshot) -> bool:
    return all(not after.weights[name].equal(before.weights[name]) for name in after.weights if "router" not in name)


@pytest.mark.parametrize(
    ("size", "expert", "zero", "precision", "rank", "where"),
    [
        (2, 1, 1, "float32", 1, "experts.weight1"),
        (2, 2, 2, "bfloat16", 0, "final_layernorm.weight"),
        (2, 2, 3, "float32", 1, "bias_E"),
        (2, 1, 3, "bfloat16", 1, "final_layernorm.weight"),
        pytest.param(4, 2, 1, "float32", 3, "experts.weight1", marks=slow),
        pytest.param(4, 1, 2, "float32", 2, "final_layernorm.weight", marks=slow),
    ],
)
def test_a_flipped_bit_is_found(
    processes: Processes, size: int, expert: int, zero: int, precision: str, rank: int, where: str
) -> None:
    """By the name of the tensor and, where there are more than two replicas, by rank."""
    case = CASE.with_(expert=expert, zero=zero, precision=precision, persistent=True)
    for clean, flipped, counters in processes(size).run(guarding.flip_a_bit, case=case, rank=rank, where=where):
        assert clean == []
        holders = size // expert if "experts" in where else size
        ((name, ranks),) = flipped
        assert where in name and ("expert-parallel rank" in name) == ("experts" in where)
        group = [r for r in range(size) if "experts" not in where or r % expert == rank % expert]
        assert ranks == ([rank] if holders > 2 else group)
        assert counters == [("counters", [rank] if size > 2 else [0, 1])]
