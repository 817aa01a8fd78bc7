"""What every registered gate owes, with its balancing; exceptions are declared on the gate and asserted."""

from __future__ import annotations

import pytest
import torch

from moe_train.routing.options import CapacityOptions
from moe_train.routing.pools import to_pools

LENGTHS = [6, 3, 5, 6]
SEQUENCE = 6


def assert_slots_agree(routing):
    """``experts_TK`` holds the kept experts of each row, each once, and E elsewhere."""
    for slots, kept_E in zip(routing.experts_TK.tolist(), routing.kept_TE, strict=True):
        chosen = [e for e in slots if e != kept_E.numel()]
        assert sorted(chosen) == kept_E.nonzero().flatten().tolist()


def outputs(routing):
    """Everything a token's output depends on, [T, ...]."""
    found = {"weights": routing.weights_TE, "selected": routing.selected_TE, "kept": routing.kept_TE}
    if routing.expert_input_shift_TH is not None:
        found["shift"] = routing.expert_input_shift_TH
    return found


def everything(routing):
    found = outputs(routing) | {"logits": routing.logits_TE, "probs": routing.probs_TE} | dict(routing.sums)
    if routing.experts_TK is not None:
        found["experts"] = routing.experts_TK
    return found | {f"loss {n}": t.sum for n, t in routing.losses.items()}


def tokens_of(batch, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    count = batch.padding_T.numel()
    return torch.randn(count, 16, generator=generator, dtype=torch.float64).to(dtype)


def gradients(gate, loss, *inputs):
    """Also of what depends on nothing (a gate without parameters): zeros."""
    wanted = [*gate.parameters(), *inputs]
    if not wanted or not loss.requires_grad:
        assert not list(gate.parameters())
        return [torch.zeros_like(x) for x in inputs]
    return torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True, materialize_grads=True)


def surrogate(routing):
    """Stands for the language loss: reaches weights and shift."""
    generator = torch.Generator().manual_seed(5)
    loss = (routing.weights_TE * torch.randn(routing.weights_TE.shape, generator=generator)).sum()
    if routing.expert_input_shift_TH is not None:
        noise = torch.randn(routing.expert_input_shift_TH.shape, generator=generator)
        loss = loss + (routing.expert_input_shift_TH * noise).sum()
    return loss


def test_shapes_dtypes_and_agreement_of_fields(case, make_batch):
    batch = make_batch(LENGTHS, SEQUENCE)
    gate = case.balanced(torch.float32)
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


def test_gradient_to_every_parameter(case, make_batch, step_loss):
    batch = make_batch(LENGTHS, SEQUENCE)
    gate = case.balanced()
    routing = gate(tokens_of(batch), batch)
    names = [name for name, _ in gate.named_parameters()]
    for name, gradient in zip(names, gradients(gate, surrogate(routing) + step_loss([routing])), strict=True):
        assert torch.isfinite(gradient).all() and bool((gradient != 0).any()), name


def test_language_gradient_alone_is_not_zero(learned_case, make_batch):
    """Balancing losses must not be all that a gate learns from."""
    batch = make_batch(LENGTHS, SEQUENCE)
    gate = learned_case.balanced()
    found = gradients(gate, surrogate(gate(tokens_of(batch), batch)))
    assert any(bool((gradient != 0).any()) for gradient in found)


def test_auxiliary_gradient_alone_is_not_zero(learned_case, make_batch, step_loss):
    """Row 1 (Automodel#1408): an auxiliary loss must have a gradient of its own."""
    batch = make_batch(LENGTHS, SEQUENCE)
    gate = learned_case.balanced()
    assert any(bool((g != 0).any()) for g in gradients(gate, step_loss([gate(tokens_of(batch), batch)])))


def test_forward_is_pure_and_repeats_bitwise(case, make_batch):
    """Row 28 (Megatron-LM PR5718, sglang PR33511, vllm PR55514): identical calls give identical bits."""
    batch = make_batch(LENGTHS, SEQUENCE, seed=3, step=4)
    gate = case.balanced(torch.float32, bias=0.1)
    before = {name: value.clone() for name, value in gate.state_dict().items()}
    x_TH = tokens_of(batch, torch.float32)
    first = everything(gate(x_TH, batch))
    for _ in range(20):
        again = everything(gate(x_TH.clone(), batch))
        assert first.keys() == again.keys()
        assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(value, before[name]) for name, value in gate.state_dict().items())


def test_contents_of_padding_change_nothing(case, make_batch):
    """Row 5 (Megatron-LM PR2121, #1984, torchtitan PR4594, transformers#28505)."""
    batch = make_batch(LENGTHS, SEQUENCE)
    gate = case.balanced(bias=0.1)
    x_TH = tokens_of(batch)
    other_TH = torch.where(batch.padding_T[:, None], 100 * tokens_of(batch, seed=9), x_TH)
    first, second = gate(x_TH, batch), gate(other_TH, batch)
    valid_T = ~batch.padding_T
    for name, value in outputs(first).items():
        assert torch.equal(value[valid_T], outputs(second)[name][valid_T]), name
    for name, term in first.losses.items():
        torch.testing.assert_close(term.sum, second.losses[name].sum, rtol=1e-12, atol=1e-12)
        assert torch.equal(term.count, second.losses[name].count)
    assert all(torch.equal(first.sums[name], second.sums[name]) for name in first.sums)
    assert not any(bool(w.any()) for w in (first.weights_TE[~valid_T], first.selected_TE[~valid_T]))


def test_padding_gets_no_gradient(learned_case, make_batch, step_loss):
    """Row 5, backward: what stands in a padding position learns nothing from auxiliary losses."""
    batch = make_batch(LENGTHS, SEQUENCE)
    gate = learned_case.balanced()
    x_TH = tokens_of(batch).requires_grad_()
    gradient_TH = gradients(gate, step_loss([gate(x_TH, batch)]), x_TH)[-1]
    assert not bool(gradient_TH[batch.padding_T].any())
    assert bool(gradient_TH[~batch.padding_T].any())


def test_more_padding_changes_no_loss_and_no_count(case, make_batch, step_loss):
    """Row 5: longer rows of padding and a row of nothing else."""
    batch, gate = make_batch(LENGTHS, SEQUENCE), case.balanced()
    longer = make_batch([*LENGTHS, 0], SEQUENCE + 3)
    x_SBH = tokens_of(batch).view(SEQUENCE, 4, 16)
    y_SBH = torch.randn(SEQUENCE + 3, 5, 16, dtype=torch.float64)
    y_SBH[:SEQUENCE, :4] = x_SBH
    first, second = gate(x_SBH.reshape(-1, 16), batch), gate(y_SBH.reshape(-1, 16), longer)
    torch.testing.assert_close(step_loss([first]), step_loss([second]), rtol=1e-12, atol=1e-12)
    for name, value in first.sums.items():  # counts exactly
        tolerance = 1e-12 if value.is_floating_point() else 0
        torch.testing.assert_close(second.sums[name], value, rtol=tolerance, atol=tolerance)


def test_nothing_but_padding(case, make_batch):
    batch, gate = make_batch([0, 0], 3), case.balanced()
    routing = gate(tokens_of(batch), batch)
    assert all(int(value.sum()) == 0 for value in routing.sums.values())
    for name, term in routing.losses.items():
        assert float(term.sum.detach()) == 0 and int(term.count) == 0, name
    loss = surrogate(routing) + sum(term.sum for term in routing.losses.values())
    assert all(torch.isfinite(g).all() for g in gradients(gate, loss))
    assert not bool(routing.weights_TE.any())


def selects_the_first(routing):
    """Whether each token has the experts from 0 on."""
    return all(row == sorted(row, reverse=True) for row in routing.selected_TE.int().tolist())


def test_ties_go_to_the_lower_index(case, make_batch):
    """Rows 27 and 28: exact ties (constant input, zero parameters) select the first experts, in order."""
    batch, gate = make_batch([2, 2], 2), case.balanced(torch.float32)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.zero_()
        for name in gate.gate.expert_rows:
            gate.gate.state_dict(keep_vars=True)[name].zero_()  # a parameter, or state
    routing = gate(torch.ones(4, 16), batch)
    if gate.gate.ties == "token":
        for column in to_pools(routing.selected_TE, batch, gate.gate.pool).unbind(0):
            assert bool((column[:-1] >= column[1:]).all()), "a later token before an earlier one"
        return
    if gate.gate.ties == "none":
        assert not selects_the_first(routing), "declared to be no rule, but the lower expert came first"
        return
    for t in range(4):
        chosen = routing.selected_TE[t].nonzero().flatten().tolist()
        assert chosen == list(range(len(chosen)))
        if routing.experts_TK is not None:
            assert routing.experts_TK[t].tolist()[: len(chosen)] == chosen


def test_balancing_gradient_is_finite_at_perfect_balance(case, make_batch):
    """Row 8 (vmoe PR218): zero router, uniform logits."""
    batch, gate = make_batch(LENGTHS, SEQUENCE), case.balanced(torch.float32)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.zero_()
    x_TH = tokens_of(batch, torch.float32).requires_grad_()
    routing = gate(x_TH, batch)
    for term in routing.losses.values():
        assert all(torch.isfinite(g).all() for g in gradients(gate, term.sum, x_TH))


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


def test_inference_rule_is_causal_and_needs_no_company(inference_case, make_batch):
    """Row 41: the declared rule of evaluation mode."""
    gate = inference_case.balanced(bias=0.1).eval()
    assert not looks_ahead(gate, make_batch)
    check_company(gate, make_batch)


def split(batch_of, x_SBH, groups):
    """Micro-batches of the sequences in ``groups``."""
    for group in groups:
        batch = batch_of([LENGTHS[b] for b in group], SEQUENCE, samples=group)
        yield x_SBH[:, group].reshape(-1, 16), batch


@pytest.mark.parametrize("groups", [[[2, 0, 3, 1]], [[0, 1], [2, 3]], [[3], [1, 0, 2]], [[0], [1], [2], [3]]], ids=str)
def test_split_into_micro_batches_gives_the_same_step(sequence_case, groups, make_batch, step_loss):
    """Row 2 (Automodel PR3359): sequence scope and token losses are equal under every split and order, in value and
    gradient, with sequences of unequal length."""
    gate, x_SBH = sequence_case.balanced(bias=0.1), tokens_of(make_batch(LENGTHS, SEQUENCE)).view(SEQUENCE, 4, 16)
    x_SBH.requires_grad_()
    whole = step_loss([gate(x, b) for x, b in split(make_batch, x_SBH, [[0, 1, 2, 3]])])
    parts = step_loss([gate(x, b) for x, b in split(make_batch, x_SBH, groups)])
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(gate, parts, x_SBH), gradients(gate, whole, x_SBH), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


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


@pytest.mark.parametrize("groups", [[[0, 1], [2, 3]], [[3], [1, 0, 2]], [[0], [1], [2], [3]]], ids=str)
def test_global_batch_over_ranks_equals_the_whole_batch(not_micro_batch_case, groups, make_batch, step_loss):
    """Row 4 (arXiv 2501.11873): with one micro-batch per rank the step has the loss and gradient of the whole batch.

    One rank also holds nothing but padding."""
    gate = not_micro_batch_case.balanced(scope="global_batch", bias=0.1)
    x_SBH = tokens_of(make_batch(LENGTHS, SEQUENCE)).view(SEQUENCE, 4, 16).requires_grad_()
    ((x_TH, batch),) = split(make_batch, x_SBH, [[0, 1, 2, 3]])
    whole = step_loss([gate(x_TH, batch)])
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


def test_micro_batch_scope_at_fixed_contents(not_global_batch_case, make_batch, step_loss):
    """The order of the sequences inside a micro-batch and of the micro-batches does not matter."""
    gate = not_global_batch_case.balanced(scope="micro_batch")
    x_SBH = tokens_of(make_batch(LENGTHS, SEQUENCE)).view(SEQUENCE, 4, 16).requires_grad_()
    a = step_loss([gate(x, b) for x, b in split(make_batch, x_SBH, [[0, 1], [2, 3]])])
    b = step_loss([gate(x, b) for x, b in split(make_batch, x_SBH, [[3, 2], [1, 0]])])
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for u, v in zip(gradients(gate, a, x_SBH), gradients(gate, b, x_SBH), strict=True):
        torch.testing.assert_close(u, v, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replay_is_bitwise_the_first_pass(case, dtype, make_batch):
    """Row 27 (Automodel PR2635, torchtitan#1117, NeMo-RL#1203): recomputation from the saved selection, with ties."""
    batch, gate = make_batch(LENGTHS, SEQUENCE, step=7), case.balanced(torch.float32, bias=0.1)
    x_TH = tokens_of(batch, dtype)
    x_TH[:8] = 1.0
    first = gate(x_TH, batch)
    second = gate(x_TH, batch, replay_TE=first.selected_TE.clone())
    assert everything(first).keys() == everything(second).keys()
    for name, value in everything(first).items():
        assert torch.equal(value, everything(second)[name]), name


def test_replay_is_obeyed(case, make_batch):
    """Row 27: a selection that the gate would not make now is used as it is."""
    batch, gate = make_batch(LENGTHS, SEQUENCE), case.balanced(torch.float32)
    x_TH = tokens_of(batch, torch.float32)
    replay_TE = gate(x_TH, batch).selected_TE.roll(3, dims=1)
    routing = gate(x_TH, batch, replay_TE=replay_TE)
    assert torch.equal(routing.selected_TE, replay_TE)
    assert torch.equal(routing.weights_TE != 0, replay_TE)
    assert torch.equal(routing.sums["load"], replay_TE.sum(0))
    if routing.experts_TK is not None:
        assert_slots_agree(routing)


def test_extreme_inputs_stay_finite(case, make_batch):
    batch, gate = make_batch(LENGTHS, SEQUENCE), case.balanced(torch.float32)
    for scale in (1e4, 1e-30, 0.0):
        x_TH = (tokens_of(batch, torch.float32) * scale).requires_grad_()
        routing = gate(x_TH, batch)
        loss = surrogate(routing) + sum(term.sum for term in routing.losses.values())
        assert all(torch.isfinite(g).all() for g in gradients(gate, loss, x_TH)), scale
        assert torch.isfinite(routing.weights_TE).all()


def test_bfloat16_inputs_and_weights_compute_in_float32(case, make_batch):
    """Row 29 (Megatron-LM#1421, vllm PR14027): a near-tie is resolved as float64 does, from the same bfloat16 values.
    Autocast does not change that."""
    batch = make_batch([32] * 4, 32)
    gate = case.balanced(torch.float32).to(torch.bfloat16)
    exact = case.balanced(torch.float32).to(torch.bfloat16).double()
    x_TH = tokens_of(batch, torch.bfloat16)
    routing = gate(x_TH, batch)
    assert routing.logits_TE.dtype == routing.weights_TE.dtype == torch.float32
    assert torch.equal(routing.selected_TE, exact(x_TH.double(), batch).selected_TE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(routing.logits_TE, gate(x_TH, batch).logits_TE)


def test_no_host_synchronisation(case, make_batch):
    """On the meta device .item(), nonzero and boolean indexing fail, as they would wait for the device on CUDA. A gate
    that declares that it waits must fail here."""
    if case.gate.synchronises:
        with pytest.raises((RuntimeError, NotImplementedError)):
            run_on_meta(case, make_batch)
    else:
        run_on_meta(case, make_batch)


def run_on_meta(case, make_batch):
    batch = make_batch(LENGTHS, SEQUENCE)
    meta = {name: getattr(batch, name).to("meta") for name in ("ids_T", "sample_T", "position_T", "padding_T")}
    batch = type(batch)(**meta, sequence_length=SEQUENCE, batch_size=4)
    gate = case.balanced(torch.float32, bias=0.1).to("meta")
    x_TH = torch.randn(24, 16, device="meta", requires_grad=True)
    routing = gate(x_TH, batch)
    if routing.losses and list(gate.parameters()):
        sum(term.sum for term in routing.losses.values()).backward()
    gate.after_step(routing.sums)
    assert routing.weights_TE.device.type == "meta"


def check_company(gate, make_batch):
    x_SBH = tokens_of(make_batch(LENGTHS, SEQUENCE)).view(SEQUENCE, 4, 16)
    whole = gate(x_SBH.reshape(-1, 16), make_batch(LENGTHS, SEQUENCE))
    alone = gate(x_SBH[:, 2].contiguous(), make_batch([LENGTHS[2]], SEQUENCE, samples=[2]))
    assert torch.equal(whole.selected_TE.view(SEQUENCE, 4, 8)[:, 2], alone.selected_TE)
    torch.testing.assert_close(whole.weights_TE.view(SEQUENCE, 4, 8)[:, 2], alone.weights_TE, rtol=1e-12, atol=1e-12)


def test_decisions_do_not_depend_on_the_company(token_pool_case, make_batch):
    """Invariant 1 for gates whose pool is the token: alone or among others, the same decision."""
    check_company(token_pool_case.balanced(bias=0.1), make_batch)


def test_initial_values(case):
    """Drawn from the generator alone, float32 on the CPU, for names that exist."""
    gate = case.balanced().gate
    assert gate.no_decay_parameters() <= dict(gate.named_parameters()).keys()
    names = {**dict(gate.named_parameters()), **dict(gate.named_buffers())}
    for name, parameter in names.items():
        shape = tuple(parameter.shape)
        one = gate.initial(name, shape, torch.Generator().manual_seed(3))
        two = gate.initial(name, shape, torch.Generator().manual_seed(3))
        if one is not None:
            assert one.shape == shape and one.dtype == torch.float32 and torch.equal(one, two)


def test_declared_sum_of_weights(case, make_batch):
    batch = make_batch(LENGTHS, SEQUENCE)
    gate = case.balanced()
    sums_T = gate(tokens_of(batch), batch).weights_TE.sum(1)[~batch.padding_T]
    declared = gate.gate.weight_sum
    if declared is None:
        assert (sums_T - sums_T[0]).abs().max() > 1e-3
    else:
        torch.testing.assert_close(sums_T, torch.full_like(sums_T, declared))


def test_experts_with_equal_rows_have_equal_scores(learned_case, make_batch):
    batch = make_batch(LENGTHS, SEQUENCE)
    gate = learned_case.balanced()
    assert gate.gate.expert_rows
    with torch.no_grad():
        for name in gate.gate.expert_rows:
            rows = gate.gate.state_dict(keep_vars=True)[name]  # a parameter, or state
            rows[5] = rows[2]
    logits_TE = gate(tokens_of(batch), batch).logits_TE
    assert torch.equal(logits_TE[:, 5], logits_TE[:, 2])
    assert not torch.equal(logits_TE[:, 5], logits_TE[:, 3])


def test_declared_parameters_of_the_shift(case, make_batch):
    batch = make_batch(LENGTHS, SEQUENCE)
    gate = case.balanced()
    assert bool(gate.gate.shift_parameters) == (gate(tokens_of(batch), batch).expert_input_shift_TH is not None)
    with torch.no_grad():
        for name in gate.gate.shift_parameters:
            gate.gate.get_parameter(name).zero_()
    shift_TH = gate(tokens_of(batch), batch).expert_input_shift_TH
    assert shift_TH is None or not shift_TH.any()


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
