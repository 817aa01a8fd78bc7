"""The MoE layer in float64 with the reference experts: the same under every EP, whatever the selection, with both
dispatchers, and equal to a loop over tokens."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from moe_train.model.options import MoEOptions
from moe_train.routing.options import RouterOptions
from tests.distributed.harness import layers, training
from tests.distributed.harness.expected import Processes, relative, router_of
from tests.distributed.harness.layers import LayerResult
from tests.distributed.harness.training import MODEL, Case
from tests.distributed.test_parity import ROUTERS
from tests.reference.gates import Decision, decide
from tests.reference.losses import auxiliary_losses, token_sets
from tests.reference.model import routed_experts, swiglu

_MOE = MoEOptions(num_experts=8, expert_hidden_size=20, shared_expert_hidden_size=12, experts="reference")
CASE = Case(model=dataclasses.replace(MODEL, num_layers=1, hidden_size=32, moe=_MOE), sequences=8)


def assert_equal(got: LayerResult, want: LayerResult, tolerance: float = 1e-13) -> None:
    assert relative(got.y_SBH, want.y_SBH) <= tolerance
    assert relative(got.dx_SBH, want.dx_SBH) <= tolerance
    assert got.gradients.keys() == want.gradients.keys()
    for name, gradient in want.gradients.items():
        error = (got.gradients[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-3)
        assert error <= tolerance * 10, f"{name}: {error:.1e}"


@pytest.mark.parametrize("kind", layers.KINDS)
@pytest.mark.parametrize(("size", "expert"), [(2, 2), (4, 4), (4, 2)])
def test_any_selection_under_every_layout(processes: Processes, kind: str, size: int, expert: int) -> None:
    """Pitfall 17: DS#5066, #5794, MoE-LLaVA#20, AM run_zero_active_experts_gradient_test.py (an expert, a rank or
    nobody gets a token). Invariant 6: also tokens without experts among others that have some."""
    want = processes(1).run(layers.moe_layer, case=CASE, kind=kind)[0]
    got = processes(size).run(layers.moe_layer, case=CASE.with_(expert=expert), kind=kind)[0]
    assert_equal(got, want)


@pytest.mark.parametrize("kind", layers.KINDS)
def test_own_dispatch_equals_megatrons(processes: Processes, kind: str) -> None:
    own = processes(1).run(layers.moe_layer, case=CASE, kind=kind)[0]
    upstream = processes(1).run(layers.moe_layer, case=CASE, kind=kind, own_dispatch=False)[0]
    assert_equal(own, upstream)


@pytest.mark.parametrize("kind", layers.KINDS)
def test_own_dispatch_equals_a_loop_over_tokens(processes: Processes, kind: str) -> None:
    want = _loop(processes, kind)
    assert_equal(processes(1).run(layers.moe_layer, case=CASE, kind=kind)[0], want)


@pytest.mark.parametrize("gate", ROUTERS)
@pytest.mark.parametrize(("size", "expert"), [(1, 1), (2, 2), (4, 2), (4, 4)])
def test_gates_in_float64(processes: Processes, gate: str, size: int, expert: int) -> None:
    """The whole layer with its losses against the reference, far below what float32 can show."""
    router = dataclasses.replace(
        ROUTERS[gate], balancing=dataclasses.replace(ROUTERS[gate].balancing, bias=type(ROUTERS[gate].balancing.bias)())
    )
    want = _gated(processes, router)
    got = processes(size).run(layers.moe_layer, case=CASE.with_(expert=expert, router=router), kind=None)[0]
    assert_equal(got, want, tolerance=1e-11)


def test_an_unused_expert_has_a_gradient_of_zeros(processes: Processes) -> None:
    got = processes(2).run(layers.moe_layer, case=CASE.with_(expert=2), kind="one_expert")[0]
    for name in ("experts.weight1", "experts.weight2"):
        used = got.gradients[name].flatten(1).abs().amax(1) > 0
        assert used.tolist() == [False, True] + [False] * 6


def _inputs(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shape = (case.length, case.sequences, case.model.hidden_size)
    x_SBH = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x_SBH.requires_grad_(), torch.randn(shape, generator=generator, dtype=torch.float64)


def _weights(processes: Processes, case: Case) -> dict[str, Tensor]:
    prefix = "decoder.layers.0.mlp."
    every = processes(1).run(training.initial_weights, case=case)[0]
    return {n.removeprefix(prefix): w.double().requires_grad_() for n, w in every.items() if n.startswith(prefix)}


def _result(y: Tensor, dy: Tensor, x: Tensor, auxiliary: Tensor, weights: dict[str, Tensor]) -> LayerResult:
    (y * dy).sum().add(auxiliary).backward()
    assert x.grad is not None
    gradients = {n: torch.zeros_like(w) if w.grad is None else w.grad for n, w in weights.items()}
    return LayerResult(y.detach(), x.grad, gradients)


def _loop(processes: Processes, kind: str) -> LayerResult:
    """Token by token, expert by expert."""
    weights = _weights(processes, CASE)
    gate = layers.ScriptedGate(kind, 32, 8)
    del weights["router.gate.weight"]
    weights["router.weight"] = gate.weight
    x_SBH, dy_SBH = _inputs(CASE)
    tokens = CASE.tokens(0)
    rows = []
    auxiliary = torch.zeros((), dtype=torch.float64)
    for s in range(CASE.length):
        for b in range(CASE.sequences):
            x_H = x_SBH[s, b]
            y_H = swiglu(x_H, weights["shared_experts.weight1"], weights["shared_experts.weight2"])
            if not tokens.padding_BS[b, s]:
                logits_E = gate.weight @ x_H
                auxiliary = auxiliary + 0.01 * logits_E.square().sum() / (~tokens.padding_BS).sum()
                for e in _chosen(kind, logits_E, s):
                    expert = swiglu(x_H, weights["experts.weight1"][e], weights["experts.weight2"][e])
                    y_H = y_H + torch.sigmoid(logits_E[e]) * expert
            rows.append(y_H)
    return _result(torch.stack(rows).view_as(x_SBH), dy_SBH, x_SBH, auxiliary, weights)


def _chosen(kind: str, logits_E: Tensor, position: int) -> list[int]:
    positive = [e for e, logit in enumerate(logits_E.tolist()) if logit > 0]
    return {
        "usual": positive,
        "some_tokens_without_experts": positive if position % 3 else [],
        "no_token_has_experts": [],
        "one_expert": [1],
        "last_experts_only": [e for e in positive if e >= 6],
        "all": list(range(8)),
    }[kind]


def _gated(processes: Processes, router: RouterOptions) -> LayerResult:
    """The reference's gate, experts and losses; its tokens are in the order [B, S]."""
    case = CASE.with_(router=router)
    weights = _weights(processes, case)
    x_SBH, dy_SBH = _inputs(case)
    x_NH = x_SBH.transpose(0, 1).reshape(-1, 32)
    padding_BS = case.tokens(0).padding_BS
    gate = {n.removeprefix("router.gate."): w for n, w in weights.items() if n.startswith("router.gate.")}
    decision: Decision = decide(router_of(router), gate, x_NH, padding_BS.flatten(), None)
    assert decision.margin > 1e-9
    y_NH = routed_experts(x_NH, decision, weights["experts.weight1"], weights["experts.weight2"])
    y_NH = y_NH + swiglu(x_NH, weights["shared_experts.weight1"], weights["shared_experts.weight2"])
    losses = auxiliary_losses(router_of(router), decision, padding_BS, token_sets(case.sequences, []))
    auxiliary = torch.stack([coefficient * value for coefficient, value in losses.values()]).sum()
    y_SBH = y_NH.view(case.sequences, case.length, 32).transpose(0, 1)
    return _result(y_SBH, dy_SBH, x_SBH, auxiliary, weights)
