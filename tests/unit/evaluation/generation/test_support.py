"""Which gates may generate text."""

from __future__ import annotations

import pytest
from torch import nn

from moe_train.evaluation.generation.loop import TextGenerator
from moe_train.evaluation.generation.support import check_generates
from moe_train.parallel.groups import Groups
from moe_train.routing import available_gates, gate_class
from moe_train.routing.gates.softmax_topk import SoftmaxTopKGate
from moe_train.routing.options import CapacityOptions, RouterOptions
from tests.unit.evaluation.generation.conftest import BASE, MODELS, build


def with_gate(monkeypatch: pytest.MonkeyPatch, **declared: object) -> nn.Module:
    """A model whose gate declares these things of itself."""
    for name, value in declared.items():
        monkeypatch.setattr(SoftmaxTopKGate, name, value)
    return build(BASE)


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        ({"causal": False}, "depends on later tokens"),
        ({"causal": False, "pool": "micro_batch"}, "depends on later tokens"),
        ({"pool": "sequence"}, "the tokens of a sequence compete"),
        ({"pool": "micro_batch"}, "the tokens of a micro-batch compete"),
    ],
)
def test_a_gate_that_looks_at_other_tokens_is_refused(
    groups: Groups, monkeypatch: pytest.MonkeyPatch, declared: dict[str, object], words: str
) -> None:
    """Pitfall 41: DS#2517, OLMoE#46, MoSA#3, torchtune PR1902 (expert choice sees the future, and its inference is
    another one than its training)."""
    model = with_gate(monkeypatch, **declared)
    with pytest.raises(ValueError, match=f"the gate softmax_topk cannot generate text: .*{words}"):
        check_generates(model)
    with pytest.raises(ValueError, match="cannot generate"):
        TextGenerator(model, groups)


def test_one_with_a_rule_for_inference_is_not(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = "experts take the tokens above the threshold that training has averaged"
    check_generates(with_gate(monkeypatch, causal=False, pool="micro_batch", inference_rule=rule))


def test_a_capacity_in_evaluation_is_refused(groups: Groups) -> None:
    """In training it does not matter."""
    check_generates(build(BASE, RouterOptions(capacity=CapacityOptions(1.25, drop="probability"))))
    model = build(BASE, RouterOptions(capacity=CapacityOptions(1.25, 2.0)))
    with pytest.raises(ValueError, match="router.capacity.evaluation_factor.* cannot generate text"):
        check_generates(model)


def test_the_gates_that_there_are(groups: Groups) -> None:
    for name in available_gates():
        gate = gate_class(name)
        assert gate.inference_rule is None or gate.pool != "token" or not gate.causal, f"{name} needs no rule"
    check_generates(build(BASE))
    check_generates(build(MODELS["llama3"]))
