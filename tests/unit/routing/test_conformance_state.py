"""What every registered gate owes, with its balancing: state that moves by rule outlives a save, a cast and a load."""

from __future__ import annotations

import copy
import io

import torch

from moe_train.routing.interface import FOLLOWS
from tests.unit.routing.conformance import LENGTHS, SEQUENCE, everything, surrogate, tokens_of


def steps(gate, optimizer, first, last, make_batch, step_loss):
    """Optimizer steps of a micro-batch each; everything that the last forward pass gave."""
    found = {}
    for step in range(first, last):
        batch = make_batch(LENGTHS, SEQUENCE, step=step)
        routing = gate(tokens_of(batch, torch.float32, seed=step), batch)
        if optimizer is not None:
            optimizer.zero_grad()
            (surrogate(routing) + step_loss([routing])).backward()
            optimizer.step()
        gate.after_step(routing.sums)
        found = everything(routing)
    return found


def made(case, seed):
    gate = case.balanced(torch.float32, seed=seed, bias=0.1)
    parameters = list(gate.parameters())
    return gate, torch.optim.AdamW(parameters, lr=0.01) if parameters else None


def test_resume_is_bit_for_bit(case, make_batch, step_loss):
    """Invariant 8, row 13 (FlagScale PR412, ms-swift#6793), for the gate alone: two steps, a save, and one more in
    another gate that began elsewhere. Whole runs: tests/distributed/test_gate_state.py."""
    gate, optimizer = made(case, seed=0)
    started = copy.deepcopy(dict(gate.named_buffers()))
    steps(gate, optimizer, 0, 1, make_batch, step_loss)
    once = copy.deepcopy(dict(gate.named_buffers()))
    steps(gate, optimizer, 1, 2, make_batch, step_loss)
    file = io.BytesIO()
    torch.save([gate.state_dict(), optimizer and optimizer.state_dict()], file)
    want = steps(gate, optimizer, 2, 3, make_batch, step_loss)
    for name, value in once.items():
        assert torch.equal(value, started[name]) == (gate.state_follows[name] == "nothing"), name

    other, again = made(case, seed=1)
    file.seek(0)
    state, moments = torch.load(file)
    assert dict(gate.named_buffers()).keys() <= state.keys(), "state that is not saved"
    other.load_state_dict(state)
    if again is not None:
        again.load_state_dict(moments)
    got = steps(other, again, 2, 3, make_batch, step_loss)
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in got)
    for name, value in gate.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_what_state_follows_is_declared(case, make_batch, step_loss):
    """Every buffer, in a word that the interface knows; what counts steps begins at 0 and grows by 1 whatever the data
    are. That counts lead to the same bits: test_conformance_splits.py, tests/distributed/test_gates.py."""
    gate, _ = made(case, seed=0)
    assert dict(gate.named_buffers()).keys() <= gate.state_follows.keys()
    assert set(gate.state_follows.values()) <= set(FOLLOWS)
    counters = [b for name, b in gate.named_buffers() if gate.state_follows[name] == "steps"]
    for step in range(3):
        assert all(not b.is_floating_point() and b.eq(step).all() for b in counters)
        steps(gate, None, step, step + 1, make_batch, step_loss)
    sums = gate(tokens_of(batch := make_batch(LENGTHS, SEQUENCE), torch.float32), batch).sums
    assert all(not sums[name].is_floating_point() for name in gate.gate.sum_units)


def test_state_keeps_its_type_and_bits_under_a_cast(case, make_batch, step_loss):
    """Rows 9 and 10 (Megatron-LM#1482, PR7081): the engine casts modules to bfloat16, state stays what it is."""
    gate, _ = made(case, seed=0)
    steps(gate, None, 0, 1, make_batch, step_loss)
    before = copy.deepcopy(dict(gate.named_buffers()))
    gate.bfloat16()
    assert all(p.dtype == torch.bfloat16 for p in gate.parameters())
    for name, value in gate.named_buffers():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name]), name
