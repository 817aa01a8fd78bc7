"""What every registered gate owes, with its balancing: micro-batches and ranks."""

from __future__ import annotations

import pytest
import torch

from tests.unit.routing.conformance import LENGTHS, SEQUENCE, gradients, tokens_of

SPLITS = [[[2, 0, 3, 1]], [[0, 1], [2, 3]], [[3], [1, 0, 2]], [[0], [1], [2], [3]]]


def split(batch_of, x_SBH, groups):
    """Micro-batches of the sequences in ``groups``."""
    for group in groups:
        batch = batch_of([LENGTHS[b] for b in group], SEQUENCE, samples=group)
        yield x_SBH[:, group].reshape(-1, 16), batch


@pytest.mark.parametrize("groups", SPLITS, ids=str)
def test_split_into_micro_batches_gives_the_same_step(sequence_case, groups, make_batch, step_loss):
    """Row 2 (Automodel PR3359): sequence scope and token losses are equal under every split and order, in value and
    gradient, with sequences of unequal length; so are sums and the state that they move (invariants 2 and 4)."""
    gate, other = (with_bias(sequence_case.balanced(bias=0.1)) for _ in range(2))
    x_SBH = tokens_of(make_batch(LENGTHS, SEQUENCE)).view(SEQUENCE, 4, 16).requires_grad_()
    alone, routings = ([gate(x, b) for x, b in split(make_batch, x_SBH, wanted)] for wanted in ([[0, 1, 2, 3]], groups))
    whole, parts = step_loss(alone), step_loss(routings)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(gate, parts, x_SBH), gradients(gate, whole, x_SBH), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert_same_state(gate, alone, other, routings)


def with_bias(gate):
    """A selection bias that is not zero, where there is one."""
    if gate.bias_E is not None:
        gate.bias_E.copy_(torch.linspace(-0.2, 0.3, 8))
    return gate


def whole_step(routings):
    """The sums of the micro-batches, as a step adds them up."""
    return {name: sum(r.sums[name] for r in routings) for name in routings[0].sums}


def assert_same_state(gate, routings, other, other_routings):
    """The sums of a step and the state that they lead to: integers exactly, and also what only integers move."""
    sums, other_sums = whole_step(routings), whole_step(other_routings)
    assert sums.keys() == other_sums.keys()
    for name, value in sums.items():
        assert value.dtype == other_sums[name].dtype
        if value.is_floating_point():
            torch.testing.assert_close(value, other_sums[name], rtol=1e-12, atol=1e-12)
        else:
            assert torch.equal(value, other_sums[name]), name
    before = {name: value.clone() for name, value in gate.named_buffers()}
    gate.after_step(sums)
    other.after_step(other_sums)
    state, by_integers = dict(other.named_buffers()), not any("lpr_" in name for name in sums)
    for name, value in gate.named_buffers():
        assert torch.equal(value, state[name]) if by_integers else torch.allclose(value, state[name], 1e-6, 1e-7), name
    moving = [name for name in before if name not in ("gate.table", "gate.prototypes") or "lpr_mass" in sums]
    assert all(not torch.equal(before[name], state[name]) for name in moving)


class Ranks:
    """Simulates the sum over ranks: a first pass writes down what each contributes, a second hears the sum."""

    def __init__(self):
        self.given = {}
        self.listening = True

    def window_sum(self, rank):
        def answer(name, layer, x):
            assert not x.requires_grad
            if self.listening:
                self.given[rank, name, layer] = x
                return x
            return sum(value for key, value in self.given.items() if key[1:] == (name, layer))

        return answer


@pytest.mark.parametrize("groups", SPLITS[1:], ids=str)
def test_global_batch_over_ranks_equals_the_whole_batch(not_micro_batch_case, groups, make_batch, step_loss):
    """Row 4 (arXiv 2501.11873): with one micro-batch per rank the step has the loss and gradient of the whole batch.

    One rank also holds nothing but padding."""
    gate, other = (with_bias(not_micro_batch_case.balanced(scope="global_batch", bias=0.1)) for _ in range(2))
    x_SBH = tokens_of(make_batch(LENGTHS, SEQUENCE)).view(SEQUENCE, 4, 16).requires_grad_()
    ((x_TH, batch),) = split(make_batch, x_SBH, [[0, 1, 2, 3]])
    alone = gate(x_TH, batch)
    whole = step_loss([alone])
    ranks, routings = Ranks(), []
    for ranks.listening in (True, False):
        batch_of = lambda *a, samples, **k: make_batch(  # noqa: E731
            *a, samples=samples, window_sum=ranks.window_sum(tuple(samples)), **k
        )
        routings = [gate(x, b) for x, b in split(batch_of, x_SBH, groups)]
        empty = make_batch([0], SEQUENCE, samples=[-1], window_sum=ranks.window_sum("empty"))
        routings.append(gate(torch.randn(SEQUENCE, 16, dtype=torch.float64), empty))
    parts = step_loss(routings)
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-12)
    for a, b in zip(gradients(gate, parts, x_SBH), gradients(gate, whole, x_SBH), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)
    assert_same_state(gate, [alone], other, routings)


def test_micro_batch_scope_at_fixed_contents(not_global_batch_case, make_batch, step_loss):
    """The order of the sequences inside a micro-batch and of the micro-batches does not matter."""
    gate = not_global_batch_case.balanced(scope="micro_batch")
    x_SBH = tokens_of(make_batch(LENGTHS, SEQUENCE)).view(SEQUENCE, 4, 16).requires_grad_()
    one, two = (
        [gate(x, b) for x, b in split(make_batch, x_SBH, groups)] for groups in ([[0, 1], [2, 3]], [[3, 2], [1, 0]])
    )
    a, b = step_loss(one), step_loss(two)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for u, v in zip(gradients(gate, a, x_SBH), gradients(gate, b, x_SBH), strict=True):
        torch.testing.assert_close(u, v, rtol=1e-10, atol=1e-12)
    assert_same_state(gate, one, not_global_batch_case.balanced(scope="micro_batch"), two)
