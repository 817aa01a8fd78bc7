"""Capacity under every layout, with and without padding, against the reference that drops token by token."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from moe_train.model.options import MoEOptions
from moe_train.routing.options import BalancingOptions, BiasOptions, CapacityOptions, RouterOptions, SwitchLossOptions
from tests.distributed.harness import capacity, layers, training
from tests.distributed.harness.expected import Processes, away_from_ties, check, relative
from tests.distributed.harness.training import MODEL, Case

BALANCING = BalancingOptions(SwitchLossOptions(0.1, "sequence"), z_loss=0.01, bias=BiasOptions(0.01))
GATES: dict[str, tuple[str, dict[str, Any], BalancingOptions]] = {
    "softmax_topk": ("softmax_topk", {"top_k": 2}, BALANCING),
    "lpr": ("lpr", {"top_k": 2, "latent_dim": 8, "coefficient": 0.1, "align_weight": 0.5}, BalancingOptions()),
    "dynamic_k": ("dynamic_k", {"threshold": 0.6}, BalancingOptions(SwitchLossOptions(0.1, "sequence"))),
}
WAYS = [
    ("softmax_topk", "position", True, (1, 1, 2, 1, True)),
    ("softmax_topk", "probability", False, (2, 2, 2, 3, True)),
    ("softmax_topk", "probability", True, (4, 2, 1, 2, False)),
    ("softmax_topk", "position", True, (4, 4, 2, 3, True)),
    ("lpr", "probability", True, (2, 2, 1, 1, True)),
    ("lpr", "position", False, (4, 4, 1, 2, False)),
    ("dynamic_k", "position", False, (2, 1, 2, 1, True)),
    ("dynamic_k", "probability", False, (4, 2, 2, 3, False)),
]
"""(gate, who keeps a place, pad, (processes, EP, accumulation, ZeRO, recomputation))."""


@pytest.mark.parametrize(("gate", "drop", "pad", "way"), WAYS, ids=str)
def test_equals_reference(processes: Processes, gate: str, drop: Any, pad: bool, way: Any) -> None:
    size, expert, accumulation, zero, recompute = way
    name, options, balancing = GATES[gate]
    router = RouterOptions(name, options, balancing, CapacityOptions(0.6, drop=drop, minimum=2, pad=pad))
    case = Case(
        router=router, expert=expert, accumulation=accumulation, zero=zero, recompute=recompute, steps=2, sequences=16
    )
    case = away_from_ties(processes, case)
    records = processes(size).run(training.train, case=case)
    check(processes, case, records)
    assert all(bool((r.kept_LE < r.load_LE).any()) and bool((r.kept_LE <= r.load_LE).all()) for r in records[0])


_MOE = MoEOptions(num_experts=8, expert_hidden_size=20, experts="reference")
LAYER = Case(model=dataclasses.replace(MODEL, num_layers=1, hidden_size=32, moe=_MOE), sequences=8)


@pytest.mark.parametrize("pool", ["sequence", "micro_batch"])
@pytest.mark.parametrize(("size", "expert"), [(1, 1), (2, 2), (4, 2), (4, 4)])
def test_padding_to_capacity_changes_nothing(processes: Processes, size: int, expert: int, pool: Any) -> None:
    """In float64, output and all gradients; of a micro-batch's pool each rank has its own."""

    def layer(pad: bool) -> Any:
        router = RouterOptions(options={"top_k": 2}, capacity=CapacityOptions(0.7, pool=pool, pad=pad))
        case = LAYER.with_(expert=expert, router=router)
        return processes(size).run(layers.moe_layer, case=case, kind=None)[0]

    got, want = layer(True), layer(False)
    assert relative(got.y_SBH, want.y_SBH) <= 1e-13 and relative(got.dx_SBH, want.dx_SBH) <= 1e-13
    for name, gradient in want.gradients.items():
        assert relative(got.gradients[name], gradient) <= 1e-12, name


@pytest.mark.parametrize(("size", "expert", "pad"), [(1, 1, False), (1, 1, True), (2, 2, False), (2, 2, True)])
def test_a_token_without_a_place_passes_by(processes: Processes, size: int, expert: int, pad: bool) -> None:
    """All tokens are alike and want the same two experts, each with one place in a sequence: the layer gives zero to
    all but the first token, and their residual passes unchanged."""
    router = RouterOptions(options={"top_k": 2}, capacity=CapacityOptions(0.25, pad=pad))
    case = LAYER.with_(expert=expert, router=router, padding=False)
    for y_SBH, through_SBH, kept_TE, rows in processes(size).run(capacity.constant_tokens, case=case):
        assert kept_TE.sum().item() == 2 * y_SBH.shape[1]
        assert bool(y_SBH[0].any()) and not y_SBH[1:].any()
        torch.testing.assert_close(through_SBH[1:], torch.zeros_like(through_SBH[1:]), rtol=0, atol=0)
        assert bool(through_SBH[0].any())
        # 8 sequences in all; capacity ceil(0.25 * 8 * 2 / 8) = 1 of each.
        assert not pad or rows == 8 // size * expert


def test_padded_shapes_are_those_of_the_configuration(processes: Processes) -> None:
    """Every expert computes as many rows, whatever the data; without padding they differ."""
    for pad in (True, False):
        router = RouterOptions(options={"top_k": 2}, capacity=CapacityOptions(1.25, pad=pad))
        counts = processes(2).run(capacity.rows_of_experts, case=LAYER.with_(expert=2, router=router))
        rows = torch.tensor(counts).flatten()
        # 4 sequences of 8 tokens on each of two ranks: ceil(1.25 * 8 * 2 / 8) = 3 of each sequence.
        assert (rows.tolist() == [24] * 8) == pad
