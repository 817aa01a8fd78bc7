"""Gates, balancing and statistics. Needs torch alone: take one gate into another project with
``from moe_train.routing import LatentPrototypeGate``."""

from moe_train.routing.balanced_gate import BalancedGate
from moe_train.routing.gates.dynamic_k import DynamicKGate, DynamicKOptions
from moe_train.routing.gates.gshard import GShardGate, GShardOptions
from moe_train.routing.gates.lpr import LatentPrototypeGate, LatentPrototypeOptions
from moe_train.routing.gates.noisy_topk import NoisyTopKGate, NoisyTopKOptions
from moe_train.routing.gates.relu import ReLUGate, ReLUOptions
from moe_train.routing.gates.sigmoid_topk import SigmoidTopKGate, SigmoidTopKOptions
from moe_train.routing.gates.simbal import SimBalGate, SimBalOptions
from moe_train.routing.gates.softmax_topk import SoftmaxTopKGate, SoftmaxTopKOptions
from moe_train.routing.gates.switch import SwitchGate, SwitchOptions
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
    "GShardGate",
    "GShardOptions",
    "Gate",
    "LatentPrototypeGate",
    "LatentPrototypeOptions",
    "LossTerm",
    "NoisyTopKGate",
    "NoisyTopKOptions",
    "ReLUGate",
    "ReLUOptions",
    "Routing",
    "SigmoidTopKGate",
    "SigmoidTopKOptions",
    "SimBalGate",
    "SimBalOptions",
    "SoftmaxTopKGate",
    "SoftmaxTopKOptions",
    "SwitchGate",
    "SwitchOptions",
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
