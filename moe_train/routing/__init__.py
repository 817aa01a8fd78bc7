"""Gates, balancing and statistics. Needs torch alone: take one gate into another project with
``from moe_train.routing import SoftmaxTopKGate``."""

from moe_train.routing.balanced_gate import BalancedGate
from moe_train.routing.gates.softmax_topk import SoftmaxTopKGate, SoftmaxTopKOptions
from moe_train.routing.interface import Gate, LossTerm, Routing, TokenBatch
from moe_train.routing.registry import (
    available_gates,
    build_gate,
    check_options,
    gate_class,
    gate_options,
    register_gate,
)

__all__ = [
    "BalancedGate",
    "Gate",
    "LossTerm",
    "Routing",
    "SoftmaxTopKGate",
    "SoftmaxTopKOptions",
    "TokenBatch",
    "available_gates",
    "build_gate",
    "check_options",
    "gate_class",
    "gate_options",
    "register_gate",
]
