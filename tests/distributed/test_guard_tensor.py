"""Bad numbers and replicas under tensor parallelism."""

from __future__ import annotations

import pytest

from tests.distributed.harness import guarding
from tests.distributed.harness.expected import Processes
from tests.distributed.test_guard import assert_as_before, case_of, moved
from tests.distributed.test_tensor import SHARED


@pytest.mark.parametrize(
    ("size", "expert", "zero"), [(2, 2, 2), *(pytest.param(*c, marks=pytest.mark.slow) for c in [(2, 1, 3), (4, 2, 1)])]
)
@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_a_bad_number_on_one_rank(processes: Processes, size: int, expert: int, zero: int, what: str) -> None:
    """Of those that share tensors: all skip, whichever of them has it."""
    case = case_of(expert, zero, 1.0, "float32").with_(model=SHARED, tensor=2)
    found = processes(size).run(guarding.skip_a_step, case=case, bad=1, rank=size - 1, what=what)
    never = processes(size).run(guarding.skip_a_step, case=case, bad=None)
    for rank, (mine, other) in enumerate(zip(found, never, strict=True)):
        assert mine.taken == [True, False, True]
        assert_as_before(mine.after, mine.before, rank)
        assert_as_before(mine.end, other.end, rank)
        assert mine.place.ranks == ([] if what == "gradient" else [size // 2 - 1])
        assert mine.place == found[0].place
    assert moved(found[0].end, found[0].before)


@pytest.mark.parametrize(("size", "zero"), [(4, 2), pytest.param(4, 1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("where", ["layers.1.self_attention.linear_qkv.weight", "final_layernorm.weight"])
def test_a_flipped_bit_is_found(processes: Processes, size: int, zero: int, where: str) -> None:
    """Parts of a divided matrix are compared with the same parts of the other data-parallel ranks."""
    case = case_of(2, zero, 1.0, "float32").with_(model=SHARED, tensor=2)
    for clean, flipped, _ in processes(size).run(guarding.flip_a_bit, case=case, rank=3, where=where):
        assert clean == []
        ((name, ranks),) = flipped
        divided = "linear_qkv" in where
        assert where in name and ("tensor-parallel rank 1" in name) == divided
        assert ranks == ([1, 3] if divided else [3])
