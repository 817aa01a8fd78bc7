"""Which configurations a class of transformers can hold. Pitfall 13: FlagScale PR412, ms-swift#6793 (a clear error
where the class has no place for the bias)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_train.interop.config_export import to_hub
from moe_train.interop.forms import hub_form
from moe_train.interop.stock import stock_class_problems
from moe_train.model.options import ModelOptions, MoEOptions
from moe_train.routing.options import BalancingOptions, BiasOptions, CapacityOptions, RouterOptions

BIAS = BalancingOptions(bias=BiasOptions(0.001))
MODEL = ModelOptions()
EIGHT_GROUPS = {"num_groups": 8, "groups_per_token": 3}


@pytest.mark.parametrize(
    ("model", "router", "problem"),
    [
        (MODEL, RouterOptions(), None),
        (MODEL, RouterOptions(options={"softmax": "after"}), None),
        (replace(MODEL, family="mixtral"), RouterOptions(), None),
        (replace(MODEL, family="mixtral"), RouterOptions(options={"renormalize": False}), "renormalize"),
        (MODEL, RouterOptions(options={"scaling": 2.5}), "router.options.scaling is 2.5"),
        (replace(MODEL, family="mixtral"), RouterOptions(options={"scaling": 2.5}), "router.options.scaling is 2.5"),
        (MODEL, RouterOptions(options={"num_groups": 4, "groups_per_token": 2}), "groups_per_token is 2 of 4"),
        (MODEL, RouterOptions(options={"num_groups": 4, "groups_per_token": 4}), None),
        (replace(MODEL, family="deepseek_v3"), RouterOptions("sigmoid_topk", EIGHT_GROUPS), "a group for each expert"),
        (replace(MODEL, family="qwen3"), RouterOptions("lpr"), None),
        (MODEL, RouterOptions("lpr"), "router.gate is lpr"),
        (MODEL, RouterOptions("sigmoid_topk"), "router.gate is sigmoid_topk"),
        (MODEL, RouterOptions(balancing=BIAS), "e_score_correction_bias"),
        (MODEL, RouterOptions(forced_balance=True), "forced_balance"),
        (replace(MODEL, moe=MoEOptions(shared_expert_hidden_size=64)), RouterOptions(), "no shared expert"),
        (replace(MODEL, family="olmoe", dense_layers=[0]), RouterOptions(), "dense_layers"),
        (replace(MODEL, family="deepseek_v3", dense_layers=[1]), RouterOptions("sigmoid_topk"), "the first ones"),
        (replace(MODEL, family="deepseek_v3", dense_layers=[0]), RouterOptions("sigmoid_topk", balancing=BIAS), None),
    ],
)
def test_problems_are_told_by_key(model: ModelOptions, router: RouterOptions, problem: str | None) -> None:
    found = stock_class_problems(model, router)
    if problem is None:
        assert found == []
        return
    assert len(found) == 1 and problem in found[0]
    with pytest.raises(ValueError, match="modelling file of its own"):
        to_hub(model, router, max_length=64, dtype=torch.float32)


def test_a_capacity_in_evaluation_is_exported_in_no_form() -> None:
    """In training it does not matter."""
    for form in ("auto", "stock", "custom"):
        hub_form(MODEL, RouterOptions(capacity=CapacityOptions(1.25)), form, max_length=64, dtype=torch.float32)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="evaluation_factor is 2.0: this model drops tokens in evaluation"):
            router = RouterOptions(capacity=CapacityOptions(1.25, 2.0))
            hub_form(MODEL, router, form, max_length=64, dtype=torch.float32)  # type: ignore[arg-type]
    dense = replace(MODEL, family="qwen3", ffn_hidden_size=64)
    router = RouterOptions(capacity=CapacityOptions(1.25, 2.0), forced_balance=True)
    assert hub_form(dense, router, "auto", max_length=64, dtype=torch.float32).custom is None


def test_forced_experts_are_exported_in_no_form() -> None:
    """The modelling file asks the gate alone; the gate of that name is one."""
    for form in ("auto", "stock", "custom"):
        with pytest.raises(ValueError, match="forced_balance is true: this model takes its experts by turn"):
            hub_form(MODEL, RouterOptions(forced_balance=True), form, max_length=64, dtype=torch.float32)  # type: ignore[arg-type]
    assert hub_form(MODEL, RouterOptions("forced_balance"), "auto", max_length=64, dtype=torch.float32).custom
