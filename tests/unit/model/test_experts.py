"""The grouped experts against the plain ones and against a loop over rows.

Suffixes: R rows sorted by expert, E experts, H hidden, F expert width.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_train.model.experts.grouped import experts_grouped
from moe_train.model.experts.module import Experts
from moe_train.model.experts.reference import experts_reference

HIDDEN = 24
COUNTS = {
    "even": [4, 4, 4, 4],
    "uneven": [1, 9, 2, 4],
    "some without rows": [0, 7, 0, 9],
    "last without rows": [9, 7, 0, 0],
    "all on one": [0, 0, 16, 0],
}


def inputs(counts: list[int], width: int, extra: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    rows = sum(counts) + extra
    x_RH = torch.randn(rows, HIDDEN, generator=generator)
    weights_R = torch.rand(rows, generator=generator)
    w1 = torch.randn(len(counts), 2 * width, HIDDEN, generator=generator) * 0.2
    w2 = torch.randn(len(counts), HIDDEN, width, generator=generator) * 0.2
    floats = [t.to(dtype).requires_grad_() for t in (x_RH, weights_R, w1, w2)]
    return floats[0], torch.tensor(counts), *floats[1:]


def loop(x_RH: Tensor, counts_E: Tensor, weights_R: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Row by row."""
    expert_R = [e for e, count in enumerate(counts_E.tolist()) for _ in range(count)]
    rows = []
    for row, e in enumerate(expert_R):
        both = w1[e] @ x_RH[row]
        gate, up = both[: len(both) // 2], both[len(both) // 2 :]
        rows.append(weights_R[row] * (w2[e] @ (gate / (1 + torch.exp(-gate)) * up)))
    return torch.stack(rows)


def gradients(y: Tensor, dy: Tensor, arguments: tuple[Tensor, ...]) -> list[Tensor]:
    wanted = [a for a in arguments if a.requires_grad]
    return list(torch.autograd.grad((y * dy).sum(), wanted))


def close(got: Tensor, want: Tensor, tolerance: float) -> bool:
    return float((got - want).abs().max()) <= tolerance * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("kind", COUNTS)
def test_reference_equals_a_loop_in_float64(kind: str) -> None:
    arguments = inputs(COUNTS[kind], width=20, dtype=torch.float64)
    dy = torch.randn(16, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    got, want = experts_reference(*arguments), loop(*arguments)
    assert close(got, want, 1e-14)
    for g, w in zip(gradients(got, dy, arguments), gradients(want, dy, arguments), strict=True):
        assert close(g, w, 1e-13)


@pytest.mark.parametrize("kind", COUNTS)
@pytest.mark.parametrize("width", [16, 20, 110, 7, 1])
def test_grouped_equals_reference(kind: str, width: int) -> None:
    """110 and 7: rows that are no multiple of 16 bytes, which the kernel refuses."""
    arguments = inputs(COUNTS[kind], width)
    dy = torch.randn(16, HIDDEN, generator=torch.Generator().manual_seed(2))
    got, want = experts_grouped(*arguments), experts_reference(*arguments)
    assert close(got, want, 2e-6)
    for g, w in zip(gradients(got, dy, arguments), gradients(want, dy, arguments), strict=True):
        assert g.shape == w.shape and close(g, w, 5e-6)


def test_an_expert_without_rows_has_gradients_of_exactly_zero() -> None:
    arguments = inputs(COUNTS["some without rows"], width=16)
    _, _, d1, d2 = gradients(experts_grouped(*arguments), torch.ones(16, HIDDEN), arguments)
    for gradient in (d1, d2):
        assert (gradient.flatten(1).abs().amax(1) > 0).tolist() == [False, True, False, True]


def test_no_rows_at_all() -> None:
    """A rank that receives nothing still takes part."""
    arguments = inputs([0, 0, 0], width=16)
    y = experts_grouped(*arguments)
    assert y.shape == (0, HIDDEN)
    assert not any(g.any() for g in gradients(y, torch.zeros(0, HIDDEN), arguments))


def test_an_expanded_gradient() -> None:
    """That of ``y.sum()``, which the kernel's backward refuses."""
    arguments = inputs(COUNTS["uneven"], width=16)
    wanted = [a for a in arguments if a.requires_grad]
    got = torch.autograd.grad(experts_grouped(*arguments).sum(), wanted)
    want = torch.autograd.grad(experts_reference(*arguments).sum(), wanted)
    assert all(close(g, w, 5e-6) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("width", [16, 110])
def test_rows_beyond_the_last_expert_reach_nothing(width: int) -> None:
    """Pitfall 16: transformers PR48205, pytorch#193633, #154557. Their inputs and incoming gradients are NaN here; the
    rows that experts own, and the weights' gradients, do not see it."""
    arguments = inputs(COUNTS["uneven"], width, extra=5)
    x_RH, counts_E, weights_R, w1, w2 = arguments
    poison = torch.zeros(21, 1)
    poison[16:] = float("nan")
    dy = torch.randn(21, HIDDEN, generator=torch.Generator().manual_seed(2))
    y = experts_grouped(x_RH + poison, counts_E, weights_R, w1, w2)
    got = torch.autograd.grad(y, (x_RH, weights_R, w1, w2), dy + poison)
    clean = inputs(COUNTS["uneven"], width, extra=5)
    want_y = experts_grouped(*clean)
    want = torch.autograd.grad(want_y, (clean[0], *clean[2:]), dy)
    assert torch.equal(y[:16], want_y[:16])
    assert torch.equal(got[0][:16], want[0][:16]) and torch.equal(got[1][:16], want[1][:16])
    assert torch.equal(got[2], want[2]) and torch.equal(got[3], want[3])
    assert want[2].isfinite().all() and want[3].isfinite().all()


def test_reference_gives_zero_beyond_the_last_expert() -> None:
    assert not experts_reference(*inputs(COUNTS["even"], width=16, extra=3))[16:].any()


def test_bfloat16() -> None:
    arguments = inputs(COUNTS["uneven"], width=16, dtype=torch.bfloat16)
    got = experts_grouped(*arguments)
    want = experts_reference(*(a.detach().double() if a.is_floating_point() else a for a in arguments))
    assert got.dtype == torch.bfloat16
    assert close(got.double(), want, 0.02)


def test_the_module_uses_what_it_was_asked_for() -> None:
    for name, function in (("grouped", experts_grouped), ("reference", experts_reference)):
        experts = Experts(num_local=4, first=4, hidden_size=HIDDEN, width=16, implementation=name)
        assert experts.function is function
        assert experts.weight1.shape == (4, 32, HIDDEN) and experts.weight2.shape == (4, HIDDEN, 16)
        assert experts.weight1.allreduce is experts.weight2.allreduce is False


def test_the_kernel_still_refuses_odd_widths() -> None:
    """What the padding is for; once this fails, it can go."""
    x, w = torch.randn(4, HIDDEN), torch.randn(2, HIDDEN, 7)
    with pytest.raises(RuntimeError):
        F.grouped_mm(x, w, offs=torch.tensor([2, 4], dtype=torch.int32))
