from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import pytest
import torch

from moe_train.routing import (
    DynamicKGate,
    LatentPrototypeGate,
    SoftmaxTopKGate,
    available_gates,
    build_gate,
    check_options,
    gate_class,
    gate_options,
    register_gate,
    registry,
)
from moe_train.routing.linear_gate import LinearGate
from moe_train.routing.options import (
    BalancingOptions,
    BiasOptions,
    ImportanceLossOptions,
    RouterOptions,
    SwitchLossOptions,
)
from moe_train.routing.registry import blank_gate
from moe_train.routing.schedule import Ramp, bounds
from moe_train.routing.strict import parse_options
from tests.unit.routing.conftest import Case


def test_what_exists():
    assert {"softmax_topk", "sigmoid_topk", "lpr", "dynamic_k"} <= set(available_gates())
    assert available_gates() == sorted(available_gates())
    assert gate_class("lpr") is LatentPrototypeGate and gate_class("dynamic_k") is DynamicKGate
    assert gate_options("softmax_topk")().top_k == 2
    assert isinstance(build_gate("softmax_topk", {"top_k": 3}, 4, 8), SoftmaxTopKGate)


def test_unknown_names_list_what_exists_and_the_nearest():
    for call in (gate_options, gate_class, lambda name: build_gate(name, {}, 4, 8)):
        with pytest.raises(ValueError, match="no gate 'softmax_tokp'.*did you mean 'softmax_topk'.*dynamic_k, .*lpr, "):
            call("softmax_tokp")
    with pytest.raises(ValueError, match="no option 'topk'; did you mean 'top_k'.*scaling, softmax, top_k"):
        build_gate("softmax_topk", {"topk": 3}, 4, 8)


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="registered already"):
        register_gate("lpr", object)(SoftmaxTopKGate)
    assert gate_class("lpr") is LatentPrototypeGate


@dataclass(frozen=True)
class Sample:
    number: float = 1.0
    count: int = 1
    bound: int | None = None
    flag: bool = False
    kind: Literal["a", "b"] = "a"
    text: str = ""


@pytest.mark.parametrize(
    ("name", "value"),
    [("number", 2.5), ("count", 3), ("bound", None), ("bound", 4), ("flag", True), ("kind", "b"), ("text", "x")],
)
def test_right_types_pass(name, value):
    assert getattr(parse_options(Sample, {name: value}, "sample"), name) == value


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("number", "1", "must be a number"),
        ("number", True, "must be a number"),
        ("count", 2.0, "must be an integer"),
        ("count", True, "must be an integer"),
        ("bound", "4", "must be an integer or null"),
        ("flag", 1, "must be bool"),
        ("kind", "c", "must be 'a' or 'b'"),
        ("text", None, "must be str"),
    ],
)
def test_wrong_types_are_refused_by_name(name, value, message):
    with pytest.raises(ValueError, match=f"{name!r} of sample {message}"):
        parse_options(Sample, {name: value}, "sample")


def test_an_integer_is_taken_for_a_float():
    assert isinstance(parse_options(Sample, {"number": 2}, "sample").number, float)


def balancing(**kwargs):
    return BalancingOptions(**kwargs)


OF_WEIGHTS = ImportanceLossOptions(0.1, of="weights")


def with_target(target, rate=0.1):
    return RouterOptions(balancing=balancing(bias=BiasOptions(rate, target_load=target)))


def test_targets_that_can_be_reached_pass():
    check_options(with_target([7.0] + [1.0] * 7), 8)
    check_options(with_target([0.1] * 8), 8)
    check_options(RouterOptions(options={"top_k": 8}, balancing=with_target([0.1] * 8).balancing), 8)


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (RouterOptions(options={"top_k": 9}), "only 8 experts"),
        (RouterOptions("lpr", {"top_k": 9}), "only 8 experts"),
        (RouterOptions("dynamic_k", balancing=balancing(bias=BiasOptions(1e-3))), "takes no bias"),
        (RouterOptions(balancing=balancing(bias=BiasOptions(-1.0))), "bias.rate is -1.0"),
        (with_target([1.0] * 7), "target_load has 7 shares; give one for each of the 8 experts"),
        (with_target([]), "target_load has 0 shares"),
        (with_target([1.0] * 7 + [0.0]), r"target_load\[7\] is 0.0; a share must be above 0"),
        (with_target([-1.0] * 8), r"target_load\[0\] is -1.0"),
        (with_target([1.0, float("nan")] + [1.0] * 6), r"target_load\[1\] is nan"),
        (with_target([float("inf")] * 8), r"target_load\[0\] is inf"),
        (with_target([8.0] + [1.0] * 7), r"is 8.0 of 15; with 2 experts per token none can have more than 1/2"),
        (with_target([1.0] * 8, rate=0.0), "does nothing while router.balancing.bias.rate is 0"),
        (RouterOptions(balancing=balancing(z_loss=-1.0)), "z_loss is -1.0"),
        (RouterOptions(balancing=balancing(z_loss=float("nan"))), "z_loss is nan"),
        (RouterOptions(balancing=balancing(switch_loss=SwitchLossOptions(-0.1))), "switch_loss.coefficient is -0.1"),
        (RouterOptions("dynamic_k", forced_balance=True), "'dynamic_k' has none: set router.options.max_k, or choose"),
        (RouterOptions("relu", forced_balance=True), "'relu' has none: choose another gate"),
        (RouterOptions("expert_choice", forced_balance=True), "'expert_choice' has none: choose another gate"),
        (
            RouterOptions("hash", balancing=balancing(importance_loss=OF_WEIGHTS)),
            "gate 'hash', which it teaches nothing: set",
        ),
        (
            RouterOptions("uniform_random", balancing=balancing(importance_loss=OF_WEIGHTS)),
            "nothing: set coefficient 0",
        ),
        (RouterOptions("hash", balancing=balancing(importance_loss=ImportanceLossOptions(0.1))), "set coefficient 0$"),
        (RouterOptions("nothing"), "no gate 'nothing'"),
    ],
)
def test_impossible_combinations(router, message):
    with pytest.raises(ValueError, match=message):
        check_options(router, 8)


def test_a_switch_loss_is_refused_where_it_makes_no_sense(monkeypatch):
    monkeypatch.setattr(DynamicKGate, "takes_switch_loss", False)
    with pytest.raises(ValueError, match="switch_loss makes no sense"):
        check_options(RouterOptions("dynamic_k", balancing=balancing(switch_loss=SwitchLossOptions(0.1))), 8)


def test_a_gate_may_keep_no_options(monkeypatch):
    """As the skeleton in CONTRIBUTING.md: nothing asks for an attribute that the interface does not name."""

    class Bare(LinearGate):
        max_k = 1

        def __init__(self, hidden_size, num_experts, options=None):
            super().__init__(hidden_size, num_experts)

    @dataclass(frozen=True)
    class NoOptions:
        pass

    monkeypatch.setitem(registry._GATES, "bare", (Bare, NoOptions))
    case = Case("bare")
    assert case.scope == "sequence"
    check_options(case.router(bias=0.1), 8)


def test_every_registered_gate_passes_with_its_defaults(case):
    check_options(case.router(bias=0.1), 8)


def test_building_on_the_meta_device_allocates_nothing(case):
    with torch.device("meta"):
        gate = build_gate(case.name, case.options, 4, 8)
    assert all(p.device.type == "meta" for p in gate.parameters())


_BLOCKED = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        root = name.split(".")[0]
        rooms = name.startswith("moe_train.") and not name.startswith("moe_train.routing")
        if rooms or root in {"megatron", "deepspeed", "pydantic", "transformers", "omegaconf", "yaml", "rich"}:
            raise ImportError(f"{name} is not for this room")

sys.meta_path.insert(0, Refuse())
import torch
from moe_train.routing import BalancedGate, LatentPrototypeGate, TokenBatch, available_gates
from moe_train.routing.options import RouterOptions
t = torch.arange(12)
batch = TokenBatch(t, t % 2, t // 2, t < 0, sequence_length=6, batch_size=2)
assert LatentPrototypeGate(4, 8)(torch.randn(12, 4), batch).weights_TE.shape == (12, 8)
for name in available_gates():
    gate = BalancedGate(RouterOptions(name), 4, 8)
    x = torch.randn(12, 4, requires_grad=True)
    routing = gate(x, batch)
    assert routing.weights_TE.shape == (12, 8)
    learned = [p for p in gate.parameters() if p.requires_grad]
    if learned:
        losses = sum(term.coefficient * term.sum / term.count for term in routing.losses.values())
        (routing.weights_TE.square().sum() + losses).backward()
        assert any(p.grad is not None and bool(p.grad.any()) for p in learned), name
    gate.after_step(routing.sums)
    gate.eval()(x, batch)
    print(name)
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {"megatron", "deepspeed", "pydantic", "transformers", "omegaconf", "yaml", "rich"}, loaded
"""


def test_needs_torch_alone():
    """The whole room imports, and every gate works, forward and backward, where neither our other rooms nor
    megatron-core, deepspeed, pydantic and the like can be imported."""
    result = subprocess.run([sys.executable, "-c", _BLOCKED], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == available_gates()


@dataclass(frozen=True)
class Scheduled:
    value: float | Ramp = 1.0


def test_a_ramp_in_the_place_of_a_number():
    assert parse_options(Scheduled, {"value": 2}, "sample").value == 2.0
    assert isinstance(parse_options(Scheduled, {"value": 2}, "sample").value, float)
    ramp = parse_options(Scheduled, {"value": {"start": 1, "end": 0, "steps": 5}}, "sample").value
    assert ramp == Ramp(1.0, 0.0, 5)
    with pytest.raises(ValueError, match="option 'value' of sample has no option 'stop'; .*end, first_step"):
        parse_options(Scheduled, {"value": {"stop": 1}}, "sample")
    with pytest.raises(ValueError, match="must be a number or a ramp .start, end, steps"):
        parse_options(Scheduled, {"value": "1"}, "sample")


@pytest.mark.parametrize("name", available_gates())
def test_options_that_balance_are_numbers_of_the_gate(name: str) -> None:
    gate = blank_gate(name, {}, 8)
    for option in gate.balance_options:
        assert bounds(getattr(gate.options, option))[1] >= 0
