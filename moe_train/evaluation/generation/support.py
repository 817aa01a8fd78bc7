"""Whether a model can generate token by token."""

from __future__ import annotations

from torch import nn

from moe_train.model.moe_layer import moe_layers
from moe_train.routing.interface import Gate


def check_generates(model: nn.Module) -> None:
    """ValueError where a token's routing depends on other tokens: later ones are not there yet, and neighbours in a
    batch must not change a text. A gate that declares what it does at inference instead is accepted."""
    for layer in moe_layers(model):
        if problem := _problem(layer.router.gate):
            name = layer.router.options.gate
            raise ValueError(
                f"the gate {name} cannot generate text: {problem}, and it declares no rule for inference "
                "(Gate.inference_rule). `moe-train evaluate` measures the loss of such a model"
            )
        if layer.router.options.capacity.evaluation_factor is not None:
            raise ValueError(
                "a model that drops tokens in evaluation (router.capacity.evaluation_factor) cannot generate text: how "
                "many an expert takes depends on the length of the text, which is not known yet. `moe-train evaluate` "
                "measures the loss of such a model"
            )


def _problem(gate: Gate) -> str | None:
    if gate.inference_rule is not None:
        return None
    if not gate.causal:
        return "its routing of a token depends on later tokens"
    if gate.pool != "token":
        return f"the tokens of a {gate.pool.replace('_', '-')} compete for its experts"
    return None
