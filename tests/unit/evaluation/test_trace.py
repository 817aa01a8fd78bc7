"""The routing of given tokens: what the gates decided, and what the layer's output follows from."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moe_train.evaluation.trace import read, trace
from moe_train.model.moe_layer import moe_layers
from moe_train.parallel.groups import Groups
from moe_train.routing.options import BalancingOptions, BiasOptions, RouterOptions
from tests.unit.evaluation.generation.conftest import BASE, build, groups

__all__ = ["groups"]
CPU = torch.device("cpu")


def test_layers_with_experts_are_traced(groups: Groups) -> None:
    """Pitfall 40: HF#48911/PR48920, HF#39203, vllm#19342 (router logits are hard to get out)."""
    model = build(dataclasses.replace(BASE, dense_layers=[1], ffn_hidden_size=16))
    sequences = [[1, 2, 3, 4], [9, 8]]
    found = trace(model, sequences, CPU)
    assert [t.ids_S.tolist() for t in found] == sequences
    for sequence, one in zip(sequences, found, strict=True):
        assert [layer.layer for layer in one.layers] == [0, 2]
        for layer in one.layers:
            for x in (layer.logits_SE, layer.probs_SE, layer.weights_SE, layer.selected_SE):
                assert x.shape == (len(sequence), 8) and x.device == CPU
            assert layer.logits_SE.dtype == layer.weights_SE.dtype == torch.float32
            torch.testing.assert_close(layer.probs_SE, layer.logits_SE.softmax(-1))
            for token in range(len(sequence)):
                experts = layer.experts(token)
                assert experts == layer.logits_SE[token].topk(2).indices.tolist()
                assert set(experts) == set(layer.weights_SE[token].nonzero().flatten().tolist())


def test_the_trace_is_of_the_forward_pass(groups: Groups) -> None:
    """The gate's own hidden states, caught on the way, give the traced logits."""
    model = build(BASE)
    seen: dict[int, torch.Tensor] = {}
    for layer in moe_layers(model):
        layer.register_forward_pre_hook(lambda module, args: seen.update({module.layer: args[0][:, 0]}))
    [one] = trace(model, [[5, 50, 7]], CPU)
    for layer, traced in zip(moe_layers(model), one.layers, strict=True):
        torch.testing.assert_close(traced.logits_SE, seen[traced.layer] @ layer.router.gate.weight.t())


@pytest.mark.parametrize("gate", ["softmax_topk", "dynamic_k"])
def test_a_bias_selects_and_is_in_no_score(groups: Groups, gate: str) -> None:
    bias = BiasOptions(rate=0.1 if gate == "softmax_topk" else 0.0)
    model = build(BASE, RouterOptions(gate, balancing=BalancingOptions(bias=bias)))
    for layer in moe_layers(model):
        if layer.router.bias_E is not None:
            layer.router.bias_E[3] = 100.0
    for layer_trace in trace(model, [[5, 50, 7]], CPU)[0].layers:
        assert layer_trace.logits_SE.abs().max() < 50
        if gate == "softmax_topk":
            assert layer_trace.selected_SE[:, 3].all()
        sums = layer_trace.weights_SE.sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums))


def test_logits_without_a_trace(groups: Groups) -> None:
    logits_BSV, micro_batch = read(build(BASE), torch.tensor([[1, 2], [3, 4]]))
    assert logits_BSV.shape == (2, 2, 100) and not logits_BSV.requires_grad and not micro_batch.routings


def test_bad_sequences(groups: Groups) -> None:
    """The ids of padding rows (100 to 127) are none of the model's either."""
    model = build(BASE)
    with pytest.raises(ValueError, match="prompt 1 has no token"):
        trace(model, [[1], []], CPU)
    for token in (-1, 100, 128):
        with pytest.raises(ValueError, match=rf"prompt 0 holds an id outside .* of 100 \({token};"):
            trace(model, [[1, token]], CPU)
    assert trace(model, [], CPU) == []
