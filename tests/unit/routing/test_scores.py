"""Sums over scores against plain loops over tokens."""

from __future__ import annotations

import math

import pytest
import torch

from moe_train.routing import BalancedGate, SoftmaxTopKGate
from moe_train.routing.options import RouterOptions
from moe_train.routing.scores import entropy_sum, margin_sum, z_sum


def test_against_loops():
    tokens, experts = 17, 6
    logits_TE = torch.randn(tokens, experts) * 3
    probs_TE = torch.softmax(logits_TE, -1)
    selected_TE = torch.rand(tokens, experts) < 0.5
    selected_TE[0], selected_TE[1] = False, True
    padding_T = torch.rand(tokens) < 0.3
    padding_T[2] = False
    z = entropy = margin = 0.0
    with_margin = 0
    for t in range(tokens):
        if padding_T[t]:
            continue
        row, p = logits_TE[t].double().tolist(), probs_TE[t].double().tolist()
        z += math.log(sum(math.exp(x) for x in row)) ** 2
        entropy += -sum(x / sum(p) * math.log(x / sum(p)) for x in p) / math.log(experts)
        chosen = [row[e] for e in range(experts) if selected_TE[t, e]]
        others = [row[e] for e in range(experts) if not selected_TE[t, e]]
        if chosen and others:
            margin += min(chosen) - max(others)
            with_margin += 1
    assert math.isclose(float(z_sum(logits_TE, padding_T)), z, rel_tol=1e-5)
    total, counted = entropy_sum(probs_TE, ~padding_T)
    assert math.isclose(float(total), entropy, rel_tol=1e-5) and int(counted) == int((~padding_T).sum())
    total, counted = margin_sum(logits_TE, selected_TE, ~padding_T)
    assert math.isclose(float(total), margin, rel_tol=1e-5, abs_tol=1e-5) and int(counted) == with_margin


def test_ends_of_the_entropy():
    counted_T = torch.ones(1, dtype=torch.bool)
    assert float(entropy_sum(torch.full((1, 8), 0.125), counted_T)[0]) == 1.0
    assert float(entropy_sum(torch.eye(8)[:1], counted_T)[0]) == 0.0
    assert float(entropy_sum(torch.full((1, 8), 0.5), counted_T)[0]) == 1.0, "sigmoids need not sum to one"
    total, counted = entropy_sum(torch.zeros(1, 8), counted_T)
    assert float(total) == 0 and int(counted) == 0, "a token without a probability has none"
    assert float(entropy_sum(torch.ones(3, 1), torch.ones(3, dtype=torch.bool))[0]) == 0.0


def test_padding_may_hold_anything():
    """Row 5 (Megatron-LM PR2121): padding changes no statistic."""
    bad_TE = torch.tensor([[0.0, 1.0], [math.nan, math.inf]])
    padding_T = torch.tensor([False, True])
    selected_TE = torch.tensor([[True, False], [False, False]])
    assert math.isfinite(float(z_sum(bad_TE, padding_T)))
    assert float(entropy_sum(torch.nan_to_num(bad_TE).softmax(-1) * bad_TE, ~padding_T)[0]) == 0.0
    assert float(margin_sum(bad_TE, selected_TE, ~padding_T)[0]) == -1.0


def test_a_masked_expert_is_no_runner_up():
    logits_TE = torch.tensor([[1.0, -math.inf]])
    total, counted = margin_sum(logits_TE, torch.tensor([[True, False]]), torch.tensor([True]))
    assert float(total) == 0 and int(counted) == 0


def test_a_gate_without_learned_scores_has_no_z(make_batch, monkeypatch: pytest.MonkeyPatch):
    batch, x_TH = make_batch([3, 5], 5), torch.randn(10, 16)
    routing = BalancedGate(RouterOptions("softmax_topk", {"top_k": 2}), 16, 8)(x_TH, batch)
    assert float(routing.sums["z"]) == pytest.approx(float(z_sum(routing.logits_TE, batch.padding_T)))
    monkeypatch.setattr(SoftmaxTopKGate, "takes_z_loss", False)
    assert "z" not in BalancedGate(RouterOptions("softmax_topk", {"top_k": 2}), 16, 8)(x_TH, batch).sums
