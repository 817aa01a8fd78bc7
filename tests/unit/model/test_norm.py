"""RMSNorm: the CPU path against torch's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from moe_train.model.norm import RMSNorm, rms_norm_cpu, rms_norm_reference

EPS = 1e-6


@pytest.mark.parametrize("shape", [(5, 3, 16), (7, 8), (4, 2, 3, 32)])
def test_value_and_gradients_equal_the_reference(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape[-1], dtype=torch.float64, requires_grad=True)
    dy = torch.randn(shape, dtype=torch.float64)
    fast, slow = rms_norm_cpu(x, weight, EPS), rms_norm_reference(x, weight, EPS)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(fast, (x, weight), dy), torch.autograd.grad(slow, (x, weight), dy), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_part_of_a_wider_tensor() -> None:
    """Query and key are slices of one projection: not contiguous."""
    wide = torch.randn(6, 2, 3, 24, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    gradients = []
    for function in (rms_norm_cpu, rms_norm_reference):
        y = function(wide[..., 8:16], weight, EPS).transpose(0, 1)
        gradients.append(torch.autograd.grad(y.square().sum(), (wide, weight)))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_row_of_zeros_has_a_finite_gradient() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    rms_norm_cpu(x, torch.ones(4), EPS).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full((2, 4), EPS**-0.5))


def test_the_module_takes_short_types_to_the_reference() -> None:
    module = RMSNorm(SimpleNamespace(params_dtype=torch.bfloat16), 16, EPS)
    x = torch.randn(3, 16, dtype=torch.bfloat16)
    assert torch.equal(module(x), rms_norm_reference(x, module.weight, EPS))
