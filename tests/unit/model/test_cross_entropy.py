"""Chunked linear cross-entropy against plain formulas in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_train.model.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

TOKENS, HIDDEN, VOCABULARY = 37, 24, 53


def inputs(dtype: torch.dtype = torch.float64, scale: float = 1.0, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    target = torch.rand(TOKENS, generator=generator) > 0.3
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels, target


def by_hand(hidden: Tensor, weight: Tensor, labels: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logits = hidden @ weight.T
    probabilities = torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)
    nll = -torch.log(probabilities[torch.arange(len(labels)), labels])
    return nll[target].sum(), torch.where(target, nll, 0.0)


@pytest.mark.parametrize("chunk", [1, 5, 36, 37, 38, 1000])
def test_values_and_gradients_for_every_chunk_size(chunk: int) -> None:
    hidden, weight, labels, target = inputs()
    assert 5 < target.sum() < TOKENS - 5
    want_sum, want_tokens = by_hand(hidden, weight, labels, target)
    want = torch.autograd.grad(want_sum * 0.37, (hidden, weight))
    got_sum, got_tokens = linear_cross_entropy(hidden, weight, labels, target, chunk)
    got = torch.autograd.grad(got_sum * 0.37, (hidden, weight))
    torch.testing.assert_close(got_sum, want_sum, rtol=1e-13, atol=0)
    torch.testing.assert_close(got_tokens, want_tokens.detach(), rtol=1e-11, atol=1e-13)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-13)


def test_the_reference_is_the_formula() -> None:
    hidden, weight, labels, target = inputs()
    want, want_tokens = by_hand(hidden, weight, labels, target)
    got, tokens = linear_cross_entropy_reference(hidden, weight, labels, target)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=0)
    torch.testing.assert_close(tokens, want_tokens.detach(), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_shorter_types(dtype: torch.dtype, tolerance: float) -> None:
    """Against the formula in float64 on the same rounded inputs: what is left are the 24 or 8 bits of the products."""
    hidden, weight, labels, target = inputs(dtype)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    want_sum, _ = by_hand(*exact, labels, target)
    want = torch.autograd.grad(want_sum, exact)
    got_sum, got_tokens = linear_cross_entropy(hidden, weight, labels, target, 8)
    got = torch.autograd.grad(got_sum, (hidden, weight))
    assert got_sum.dtype == got_tokens.dtype == torch.float32
    assert abs(got_sum.item() - want_sum.item()) <= tolerance * want_sum.item()
    for g, w in zip(got, want, strict=True):
        assert g.dtype == dtype
        assert float((g.double() - w).abs().max()) <= tolerance * float(w.abs().max())


def test_bfloat16_weight_gradients_are_summed_in_float32() -> None:
    """Many chunks add to the same rows: bfloat16 sums would lose what the number of chunks is large against."""
    hidden, weight, labels, target = inputs(torch.bfloat16)
    _, few = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, target, TOKENS)[0], (hidden, weight))
    _, many = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, target, 1)[0], (hidden, weight))
    assert float((few.float() - many.float()).abs().max()) <= 2**-7 * float(few.float().abs().max())


def test_tokens_that_are_no_targets_count_for_nothing() -> None:
    hidden, weight, labels, target = inputs()
    got, tokens = linear_cross_entropy(hidden, weight, labels, target, 8)
    gradient, weight_gradient = torch.autograd.grad(got, (hidden, weight))
    assert not gradient[~target].any() and not tokens[~target].any()
    other, other_tokens = linear_cross_entropy(hidden, weight, torch.where(target, labels, 0), target, 8)
    assert torch.equal(got, other) and torch.equal(tokens, other_tokens)
    assert torch.equal(weight_gradient, torch.autograd.grad(other, weight)[0])


def test_no_target_at_all_is_zero() -> None:
    hidden, weight, labels, _ = inputs()
    got, _ = linear_cross_entropy(hidden, weight, labels, torch.zeros(TOKENS, dtype=torch.bool), 8)
    gradients = torch.autograd.grad(got, (hidden, weight))
    assert float(got) == 0 and not any(g.any() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_logits_do_not_overflow(dtype: torch.dtype) -> None:
    hidden, weight, labels, target = inputs(dtype, scale=100.0)
    got, tokens = linear_cross_entropy(hidden, weight, labels, target, 8)
    want, _ = linear_cross_entropy_reference(hidden, weight, labels, target)
    assert float(want) > 1000
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    assert all(g.isfinite().all() for g in torch.autograd.grad(got, (hidden, weight)))


def test_without_gradients_nothing_is_kept() -> None:
    hidden, weight, labels, target = inputs()
    with torch.no_grad():
        got, tokens = linear_cross_entropy(hidden, weight, labels, target, 8)
    assert not got.requires_grad and not tokens.requires_grad
    torch.testing.assert_close(got, by_hand(hidden, weight, labels, target)[0].detach(), rtol=1e-13, atol=0)


def test_per_token_values_carry_no_gradient() -> None:
    _, tokens = linear_cross_entropy(*inputs(), 8)
    assert not tokens.requires_grad
