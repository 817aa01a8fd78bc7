"""Gates, balancing and statistics. Needs torch alone: take one gate into another project with
``from moe_train.routing import LatentPrototypeGate``."""

from moe_train.routing.balanced_gate import BalancedGate
from moe_train.routing.gates.dynamic_k import DynamicKGate, DynamicKOptions
from moe_train.routing.gates.lpr import LatentPrototypeGate
from moe_train.routing.gates.lpr_options import LatentPrototypeOptions
from moe_train.routing.gates.sigmoid_topk import SigmoidTopKGate, SigmoidTopKOptions
from moe_train.routing.gates.softmax_topk import SoftmaxTopKGate, SoftmaxTopKOptions
from moe_train.routing.interface import Gate, LossTerm, Routing, TokenBatch, keep_buffers_float32
from moe_train.routing.registry import (
    available_gates,
    blank_gate,
    build_gate,
    check_options,
    gate_class,
    gate_options,
    register_gate,
)
from moe_train.routing.statistics import balance_statistics, gini_floor

__all__ = [
    "BalancedGate",
    "DynamicKGate",
    "DynamicKOptions",
    "Gate",
    "LatentPrototypeGate",
    "LatentPrototypeOptions",
    "LossTerm",
    "Routing",
    "SigmoidTopKGate",
    "SigmoidTopKOptions",
    "SoftmaxTopKGate",
    "SoftmaxTopKOptions",
    "TokenBatch",
    "available_gates",
    "balance_statistics",
    "blank_gate",
    "build_gate",
    "check_options",
    "gate_class",
    "gate_options",
    "gini_floor",
    "keep_buffers_float32",
    "register_gate",
]
