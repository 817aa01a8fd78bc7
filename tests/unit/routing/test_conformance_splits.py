"""What every registered gate owes, with its balancing: micro-batches and ranks."""

from __future__ import annotations

import copy

import torch

from tests.unit.routing.conformance import LENGTHS, SEQUENCE, gradients, tokens_of

SPLITS = [[[2, 0, 3, 1]], [[0, 1], [2, 3]], [[3], [1, 0, 2]], [[0], [1], [2], [3]]]


def split(batch_of, x_SBH, groups):
    """Micro-batches of the sequences in ``groups``."""
    for group in groups:
        batch = batch_of([LENGTHS[b] for b in group], SEQUENCE, samples=group)
        yield x_SBH[:, group].reshape(-1, 16), batch


def test_split_into_micro_batches_gives_the_same_step(sequence_case, make_batch, step_loss):
    """Row 2 (Automodel PR3359): sequence scope and token losses are equal under every split and order, in value and
    gradient, with sequences of unequal length; so are sums and the state that they move (invariants 2 and 4)."""
    gate = with_bias(sequence_case.balanced(bias=0.1))
    x_SBH = tokens_of(make_batch(LENGTHS, SEQUENCE)).view(SEQUENCE, 4, 16).requires_grad_()
    alone = [gate(x, b) for x, b in split(make_batch, x_SBH, [[0, 1, 2, 3]])]
    whole = step_loss(alone)
    wanted = gradients(gate, whole, x_SBH)
    for groups in SPLITS:
        print(groups)
        routings = [gate(x, b) for x, b in split(make_batch, x_SBH, groups)]
        parts = step_loss(routings)
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
        for a, b in zip(gradients(gate, parts, x_SBH), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        assert_same_state(gate, alone, routings)


def with_bias(gate):
    """A selection bias that is not zero, where there is one."""
    if gate.bias_E is not None:
        gate.bias_E.copy_(torch.linspace(-0.2, 0.3, 8))
    return gate


def whole_step(routings):
    """The sums of the micro-batches, as a step adds them up."""
    return {name: sum(r.sums[name] for r in routings) for name in routings[0].sums}


def assert_same_state(gate, routings, other_routings):
    """The sums of a step and the state that they lead to: integers exactly, and so what follows them."""
    sums, other_sums = whole_step(routings), whole_step(other_routings)
    assert sums.keys() == other_sums.keys()
    for name, value in sums.items():
        assert value.dtype == other_sums[name].dtype
        if value.is_floating_point():
            torch.testing.assert_close(value, other_sums[name], rtol=1e-12, atol=1e-12)
        else:
            assert torch.equal(value, other_sums[name]), name
    one, other = copy.deepcopy(gate), copy.deepcopy(gate)
    one.after_step(sums)
    other.after_step(other_sums)
    state, before = dict(other.named_buffers()), dict(gate.named_buffers())
    for name, value in one.named_buffers():
        follows = gate.state_follows[name]
        same = (
            torch.allclose(value, state[name], 1e-6, 1e-7) if follows == "floats" else torch.equal(value, state[name])
        )
        assert same, name
        assert torch.equal(value, before[name]) == (follows == "nothing"), name


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


def test_global_batch_over_ranks_equals_the_whole_batch(not_micro_batch_case, make_batch, step_loss):
    """Row 4 (arXiv 2501.11873): with one micro-batch per rank the step has the loss and gradient of the whole batch,
    and its sums and state. One rank also holds nothing but padding."""
    gate = with_bias(not_micro_batch_case.balanced(scope="global_batch", bias=0.1))
    x_SBH = tokens_of(make_batch(LENGTHS, SEQUENCE)).view(SEQUENCE, 4, 16).requires_grad_()
    ((x_TH, batch),) = split(make_batch, x_SBH, [[0, 1, 2, 3]])
    alone = gate(x_TH, batch)
    whole = step_loss([alone])
    wanted = gradients(gate, whole, x_SBH)
    for groups in SPLITS[1:]:
        print(groups)
        routings = over_ranks(gate, x_SBH, groups, make_batch)
        parts = step_loss(routings)
        torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-12)
        for a, b in zip(gradients(gate, parts, x_SBH), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)
        assert_same_state(gate, [alone], routings)


def over_ranks(gate, x_SBH, groups, make_batch):
    """What each rank's micro-batch gets, and that of a rank with nothing but padding."""
    ranks, routings = Ranks(), []
    empty_TH = torch.randn(SEQUENCE, 16, dtype=torch.float64)
    for ranks.listening in (True, False):
        batch_of = lambda *a, samples, **k: make_batch(  # noqa: E731
            *a, samples=samples, window_sum=ranks.window_sum(tuple(samples)), **k
        )
        with torch.set_grad_enabled(not ranks.listening):
            routings = [gate(x, b) for x, b in split(batch_of, x_SBH, groups)]
            empty = make_batch([0], SEQUENCE, samples=[-1], window_sum=ranks.window_sum("empty"))
            routings.append(gate(empty_TH, empty))
    return routings


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
    assert_same_state(gate, one, two)
