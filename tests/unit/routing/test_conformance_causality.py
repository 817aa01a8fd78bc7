"""What every registered gate owes, with its balancing: no output depends on a later token, or on another one."""

from __future__ import annotations

import torch

from tests.unit.routing.conformance import LENGTHS, SEQUENCE, outputs, tokens_of


@torch.no_grad()
def looks_ahead(gate, make_batch):
    """Whether what a token gets changes when a later token does; also that it changes with the token itself."""
    batch = make_batch([6, 6], 6)
    x_TH = tokens_of(batch)
    first = outputs(gate(x_TH, batch))
    changed_earlier = False
    for s in range(1, 6):
        y_TH = x_TH.clone()
        y_TH[s * 2] += 3 * torch.randn(16, generator=torch.Generator().manual_seed(s))  # sequence 0
        second = outputs(gate(y_TH, batch))
        early_T = (batch.position_T < s) | (batch.sample_T == 1)
        for name, value in first.items():
            changed_earlier |= not torch.equal(value[early_T], second[name][early_T])
        assert torch.equal(first["weights"][s * 2], second["weights"][s * 2]) != gate.gate.reads_hidden
    return changed_earlier


def test_causality_by_perturbation(case, make_batch):
    """Row 41 (DS#2517, OLMoE#46, MoSA#3, torchtune PR1902): a gate that looks ahead says so."""
    gate = case.balanced(bias=0.1)
    assert looks_ahead(gate, make_batch) != gate.gate.causal


def test_evaluation_is_causal_and_needs_no_company(case, make_batch):
    """Row 41: the declared rule of evaluation mode; every gate that looks ahead in training has one."""
    gate = case.balanced(bias=0.1, training=False)
    assert gate.gate.causal or gate.gate.inference_rule
    assert not looks_ahead(gate, make_batch)
    check_company(gate, make_batch)


@torch.no_grad()
def check_company(gate, make_batch):
    x_SBH = tokens_of(make_batch(LENGTHS, SEQUENCE)).view(SEQUENCE, 4, 16)
    whole = gate(x_SBH.reshape(-1, 16), make_batch(LENGTHS, SEQUENCE))
    alone = gate(x_SBH[:, 2].contiguous(), make_batch([LENGTHS[2]], SEQUENCE, samples=[2]))
    assert torch.equal(whole.selected_TE.view(SEQUENCE, 4, 8)[:, 2], alone.selected_TE)
    torch.testing.assert_close(whole.weights_TE.view(SEQUENCE, 4, 8)[:, 2], alone.weights_TE, rtol=1e-12, atol=1e-12)


def test_decisions_do_not_depend_on_the_company(token_pool_case, make_batch):
    """Invariant 1 for gates whose pool is the token: alone or among others, the same decision."""
    check_company(token_pool_case.balanced(bias=0.1), make_batch)
