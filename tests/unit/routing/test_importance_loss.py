"""The squared coefficient of variation of the experts' importance, against loops."""

from __future__ import annotations

import pytest
import torch

from moe_train.routing import BalancedGate
from moe_train.routing.balancing import importance_loss, squared_cv
from moe_train.routing.options import BalancingOptions, ImportanceLossOptions, RouterOptions
from moe_train.routing.registry import check_options
from moe_train.routing.scopes import TokenSets

LENGTHS, SEQUENCE, EXPERTS = [5, 2, 4], 5, 6


class TestImportanceLoss:
    def sets_of(self, scope, batch):
        valid = (~batch.padding_T).nonzero().flatten().tolist()
        return [[t for t in valid if t % 3 == b] for b in range(3)] if scope == "sequence" else [valid]

    @pytest.mark.parametrize("scope", ["sequence", "micro_batch", "global_batch"])
    def test_equals_the_formula(self, scope, make_batch, fresh_seed):
        """Shazeer et al. 2017, eq. 6 and 7, by loops; the gradient by autograd through them."""
        batch = make_batch(LENGTHS, SEQUENCE)
        amounts_TE = torch.rand(15, EXPERTS, dtype=torch.float64).requires_grad_()
        term = importance_loss(amounts_TE, TokenSets(batch, scope), 0, 0.7)
        values = []
        for tokens in self.sets_of(scope, batch):
            importance = [sum(amounts_TE[t, e] for t in tokens) for e in range(EXPERTS)]
            mean = sum(importance) / EXPERTS
            values.append(sum((x - mean) ** 2 for x in importance) / EXPERTS / mean**2)
        want = sum(values) / len(values)
        loss = term.sum / term.count
        assert float(loss.detach()) == pytest.approx(float(want.detach()), rel=1e-12)
        got, wanted = (torch.autograd.grad(x, amounts_TE, retain_graph=True)[0] for x in (loss, want))
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-14)
        assert term.coefficient == 0.7 and term.unit == {"sequence": "sequence", "micro_batch": "micro_batch"}.get(
            scope, "token"
        )

    @pytest.mark.parametrize("scope", ["sequence", "micro_batch", "global_batch"])
    def test_zero_with_a_gradient_of_zero_at_perfect_balance(self, scope, make_batch):
        """Pitfall 8 (vmoe PR218): the root of a variance of 0 has no gradient; there is none here."""
        batch = make_batch([8, 8], 8)
        amounts_TE = torch.full((16, 8), 0.125, requires_grad=True)
        term = importance_loss(amounts_TE, TokenSets(batch, scope), 0, 1.0)
        assert float(term.sum.detach()) == 0.0
        assert not bool(torch.autograd.grad(term.sum, amounts_TE)[0].any())

    def test_cv_squared_at_perfect_balance(self):
        """Row 8 again, for the function that noisy_topk's two losses share; a set without anything has 0."""
        total_GE = torch.tensor([[0.1] * 7, [0.0] * 7, [3.0] * 7]).requires_grad_()
        value_G = squared_cv(total_GE)
        assert bool((value_G < 1e-12).all())
        value_G.sum().backward()
        assert bool((total_GE.grad.abs() < 1e-5).all())
        assert float(squared_cv(torch.tensor([[4.0, 0, 0, 0]]))) == 3.0

    @pytest.mark.parametrize("scope", ["sequence", "micro_batch", "global_batch"])
    @pytest.mark.parametrize("amount", [0.0, 1e-38, 1e30])
    def test_is_finite_where_nothing_or_much_is_given(self, scope, amount, make_batch):
        amounts_TE = (torch.rand(15, EXPERTS) * amount).requires_grad_()
        term = importance_loss(amounts_TE, TokenSets(make_batch(LENGTHS, SEQUENCE), scope), 0, 1.0)
        assert bool(torch.isfinite(term.sum)) and bool(
            torch.isfinite(torch.autograd.grad(term.sum, amounts_TE)[0]).all()
        )

    def test_everything_on_one_expert(self, make_batch):
        amounts_TE = torch.zeros(15, EXPERTS)
        amounts_TE[:, 3] = 0.3
        term = importance_loss(amounts_TE, TokenSets(make_batch(LENGTHS, SEQUENCE), "sequence"), 0, 1.0)
        assert float(term.sum / term.count) == pytest.approx(EXPERTS - 1, rel=1e-6)

    @pytest.mark.parametrize("of", ["probabilities", "weights"])
    def test_of_what(self, of, make_batch):
        batch, options = make_batch(LENGTHS, SEQUENCE), ImportanceLossOptions(0.5, of=of)
        gate = BalancedGate(RouterOptions(balancing=BalancingOptions(importance_loss=options)), 4, EXPERTS)
        routing = gate(torch.randn(15, 4), batch)
        amounts_TE = routing.probs_TE if of == "probabilities" else routing.weights_TE
        want = importance_loss(amounts_TE, TokenSets(batch, "sequence"), 0, 0.5)
        assert (
            torch.equal(routing.losses["importance"].sum, want.sum) and routing.losses["importance"].coefficient == 0.5
        )

    def test_probabilities_are_refused_where_there_are_none(self, monkeypatch):
        from moe_train.routing import SoftmaxTopKGate

        monkeypatch.setattr(SoftmaxTopKGate, "takes_switch_loss", False)
        with pytest.raises(ValueError, match="importance_loss makes no sense"):
            check_options(RouterOptions(balancing=BalancingOptions(importance_loss=ImportanceLossOptions(0.1))), 8)
        weights = ImportanceLossOptions(0.1, of="weights")
        check_options(RouterOptions(balancing=BalancingOptions(importance_loss=weights)), 8)
