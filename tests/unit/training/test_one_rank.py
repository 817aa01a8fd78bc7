"""What replaces DeepSpeed's reduction on one CPU rank: its norm and its flat gradient."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from moe_train.training import one_rank


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_norm_is_that_of_float64(scale: float) -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(shape) * scale for shape in ((4096 * 3 + 5,), (7, 11), (2, 64, 64))]
    exact = torch.cat([g.flatten().double() for g in gradients]).norm()
    assert abs(float(one_rank.norm(gradients).double() / exact) - 1) < 2e-7


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_norm_of_what_is_not_finite_is_minus_one(bad: float) -> None:
    gradient = torch.ones(5000)
    gradient[17] = bad
    assert float(one_rank.norm([torch.ones(3), gradient])) == -1.0


def test_padding_takes_no_part_in_the_norm() -> None:
    padding = torch.full((4,), 3.0)
    padding._zero_padding = True  # type: ignore[attr-defined]
    assert float(one_rank.norm([torch.tensor([3.0, 4.0]), padding])) == 5.0


def _zero() -> SimpleNamespace:
    return SimpleNamespace(
        dtype=torch.float32,
        gradient_accumulation_dtype=torch.float32,
        cpu_offload=False,
        overlap_comm=False,
        single_partition_of_fp32_groups=[torch.zeros(1)],
        contiguous_gradients=True,
        partition_size=[6, 3],
        averaged_gradients={0: [torch.arange(4.0).view(2, 2), torch.zeros(2)], 1: [torch.full((3,), 7.0)]},
    )


def test_flat_gradients_take_turns_in_one_buffer() -> None:
    zero = _zero()
    one_rank.skip_reduction(zero)
    first = zero._get_preflattened_grad_partition(0)
    assert first.tolist() == [0.0, 1.0, 2.0, 3.0, 0.0, 0.0]
    second = zero._get_preflattened_grad_partition(1)
    assert second.tolist() == [7.0] * 3
    assert second.data_ptr() == first.data_ptr()


@pytest.mark.parametrize(
    ("change", "ranks", "stage"),
    [
        ({}, 2, 1),
        ({}, 1, 3),
        ({"dtype": torch.bfloat16}, 1, 1),
        ({"overlap_comm": True}, 1, 2),
        ({"cpu_offload": True}, 1, 2),
    ],
)
def test_applies_to_nothing_else(change: dict[str, object], ranks: int, stage: int) -> None:
    assert one_rank.applies(_zero(), 1, 1) and one_rank.applies(_zero(), 1, 2)
    zero = _zero()
    vars(zero).update(change)
    assert not one_rank.applies(zero, ranks, stage)
