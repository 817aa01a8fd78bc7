"""What every registered gate owes, with its balancing: shapes, purity, ties, no waiting for the device, capacity."""

from __future__ import annotations

import pytest
import torch

from moe_train.routing.options import CapacityOptions
from moe_train.routing.pools import to_pools
from tests.unit.routing.conformance import LENGTHS, SEQUENCE, assert_slots_agree, both_modes, everything, tokens_of


@both_modes
def test_shapes_dtypes_and_agreement_of_fields(case, training, make_batch):
    batch = make_batch(LENGTHS, SEQUENCE)
    gate = case.balanced(torch.float32, training=training)
    routing = gate(tokens_of(batch, torch.float32), batch)
    shape = (24, 8)
    for name in ("logits_TE", "probs_TE", "weights_TE"):
        assert getattr(routing, name).shape == shape and getattr(routing, name).dtype == torch.float32
    assert routing.selected_TE.shape == shape and routing.selected_TE.dtype == torch.bool
    assert bool((routing.kept_TE <= routing.selected_TE).all())
    assert bool((routing.weights_TE[~routing.selected_TE] == 0).all())
    assert not bool(routing.selected_TE[batch.padding_T].any())
    if gate.gate.takes_switch_loss:
        torch.testing.assert_close(routing.probs_TE.sum(1), torch.ones(24))
    for name in ("load", "kept", "tokens"):
        assert routing.sums[name].dtype == torch.int64
    assert torch.equal(routing.sums["load"], routing.selected_TE.sum(0))
    assert torch.equal(routing.sums["kept"], routing.kept_TE.sum(0))
    assert int(routing.sums["tokens"]) == sum(LENGTHS)
    if gate.gate.max_k is None:
        assert routing.experts_TK is None
    else:
        assert routing.experts_TK.dtype == torch.int64 and routing.experts_TK.shape == (24, gate.gate.max_k)
        assert_slots_agree(routing)


@both_modes
def test_forward_is_pure_and_repeats_bitwise(case, training, make_batch):
    """Row 28 (Megatron-LM PR5718, sglang PR33511, vllm PR55514): identical calls give identical bits."""
    batch = make_batch(LENGTHS, SEQUENCE, seed=3, step=4)
    gate = case.balanced(torch.float32, bias=0.1, training=training)
    before = {name: value.clone() for name, value in gate.state_dict().items()}
    x_TH = tokens_of(batch, torch.float32)
    first = everything(gate(x_TH, batch))
    for number in range(20 if training else 2):
        with torch.set_grad_enabled(number % 2 == 0):  # the same bits also where nothing is to be learned
            again = everything(gate(x_TH.clone(), batch))
        assert first.keys() == again.keys()
        assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(value, before[name]) for name, value in gate.state_dict().items())


def selects_the_first(routing):
    """Whether each token has the experts from 0 on."""
    return all(row == sorted(row, reverse=True) for row in routing.selected_TE.int().tolist())


@both_modes
def test_ties_go_to_the_lower_index(case, training, make_batch):
    """Rows 27 and 28: exact ties (constant input, zero parameters) select the first experts, in order; so do, in
    evaluation, gates that declare it for there only."""
    batch, gate = make_batch([2, 2], 2), case.balanced(torch.float32, training=training)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.zero_()
        for name in gate.gate.expert_rows:
            gate.gate.state_dict(keep_vars=True)[name].zero_()  # a parameter, or state
    routing = gate(torch.ones(4, 16), batch)
    ties = gate.gate.ties if training else gate.gate.evaluation_ties or gate.gate.ties
    if ties == "token":
        for column in to_pools(routing.selected_TE, batch, gate.gate.pool).unbind(0):
            assert bool((column[:-1] >= column[1:]).all()), "a later token before an earlier one"
        return
    if ties == "none":
        assert not selects_the_first(routing), "declared to be no rule, but the lower expert came first"
        return
    for t in range(4):
        chosen = routing.selected_TE[t].nonzero().flatten().tolist()
        assert chosen == list(range(len(chosen)))
        if routing.experts_TK is not None:
            assert routing.experts_TK[t].tolist()[: len(chosen)] == chosen


@both_modes
def test_no_host_synchronisation(case, training, make_batch):
    """On the meta device .item(), nonzero and boolean indexing fail, as they would wait for the device on CUDA. A gate
    that declares that it waits must fail here, unless it does something else in evaluation."""
    if case.gate.synchronises and (training or case.gate.inference_rule is None):
        with pytest.raises((RuntimeError, NotImplementedError)):
            run_on_meta(case, make_batch, training)
    else:
        run_on_meta(case, make_batch, training)


def run_on_meta(case, make_batch, training):
    batch = make_batch(LENGTHS, SEQUENCE)
    meta = {name: getattr(batch, name).to("meta") for name in ("ids_T", "sample_T", "position_T", "padding_T")}
    batch = type(batch)(**meta, sequence_length=SEQUENCE, batch_size=4)
    gate = case.balanced(torch.float32, bias=0.1, training=training).to("meta")
    x_TH = torch.randn(24, 16, device="meta", requires_grad=True)
    with torch.set_grad_enabled(training):
        routing = gate(x_TH, batch)
    if training:
        if routing.losses and list(gate.parameters()):
            sum(term.sum for term in routing.losses.values()).backward()
        gate.after_step(routing.sums)
    assert routing.weights_TE.device.type == "meta"


@torch.no_grad()
def test_capacity_or_a_refusal_that_is_declared(case, make_batch):
    """A gate that refuses a capacity spreads its slots evenly by itself; every other one gets what it asks for."""
    batch = make_batch([6, 6], 6)
    if not case.gate.takes_capacity:
        with pytest.raises(ValueError, match="capacity makes no sense"):
            case.balanced(capacity=CapacityOptions(1.0))
        for selected_ME in to_pools(case.balanced()(tokens_of(batch), batch).selected_TE, batch, case.gate.pool):
            load_E = selected_ME.sum(0)
            assert int(load_E.max()) <= -(-int(load_E.sum()) // 8)
        return
    for drop in ("position", "probability"):
        gate = case.balanced(capacity=CapacityOptions(0.4, drop=drop))
        x_TH, plain = tokens_of(batch), case.balanced()
        routing, before = gate(x_TH, batch), plain(x_TH, batch)
        places_B = (6 * gate.gate.max_k if gate.gate.max_k else before.selected_TE.view(6, 2, 8).sum((0, 2))) * 0.4 / 8
        kept_BE = routing.kept_TE.view(6, 2, 8).sum(0)
        places_B = torch.as_tensor(places_B).expand(2).ceil().clamp(1, 6)
        assert torch.equal(kept_BE, torch.minimum(before.selected_TE.view(6, 2, 8).sum(0), places_B[:, None].long()))
        assert torch.equal(routing.selected_TE, before.selected_TE)
        assert torch.equal(routing.weights_TE, before.weights_TE * routing.kept_TE)
        if routing.experts_TK is not None:
            assert_slots_agree(routing)
        for name, term in before.losses.items():
            assert torch.equal(routing.losses[name].sum, term.sum)
        again = gate.eval()(x_TH, batch)
        assert torch.equal(again.kept_TE, again.selected_TE), "null in evaluation: nothing is dropped"
