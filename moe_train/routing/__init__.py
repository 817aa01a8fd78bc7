"""Gates, balancing and statistics. Needs torch alone: take one gate into another project with
``from moe_train.routing import LatentPrototypeGate``."""

from moe_train.routing.balanced_gate import BalancedGate
from moe_train.routing.balancing import importance_loss
from moe_train.routing.capacity import apply_capacity, looks_ahead
from moe_train.routing.gates.base import BaseGate, BaseOptions
from moe_train.routing.gates.dense import DenseGate, DenseOptions
from moe_train.routing.gates.dynamic_k import DynamicKGate, DynamicKOptions
from moe_train.routing.gates.expert_choice import ExpertChoiceGate, ExpertChoiceOptions
from moe_train.routing.gates.forced_balance import ForcedBalanceGate, ForcedBalanceOptions
from moe_train.routing.gates.gshard import GShardGate, GShardOptions
from moe_train.routing.gates.hash import HashGate, HashOptions
from moe_train.routing.gates.lpr import LatentPrototypeGate
from moe_train.routing.gates.lpr_options import LatentPrototypeOptions
from moe_train.routing.gates.noisy_topk import NoisyTopKGate, NoisyTopKOptions
from moe_train.routing.gates.quantile_balancing import QuantileBalancingGate, QuantileBalancingOptions
from moe_train.routing.gates.relu import ReLUGate, ReLUOptions
from moe_train.routing.gates.sigmoid_topk import SigmoidTopKGate, SigmoidTopKOptions
from moe_train.routing.gates.simbal import SimBalGate, SimBalOptions
from moe_train.routing.gates.sinkhorn import SinkhornGate, SinkhornOptions
from moe_train.routing.gates.softmax_topk import SoftmaxTopKGate, SoftmaxTopKOptions
from moe_train.routing.gates.switch import SwitchGate, SwitchOptions
from moe_train.routing.gates.uniform_random import UniformRandomGate, UniformRandomOptions
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
    "BaseGate",
    "BaseOptions",
    "DenseGate",
    "DenseOptions",
    "DynamicKGate",
    "DynamicKOptions",
    "ExpertChoiceGate",
    "ExpertChoiceOptions",
    "ForcedBalanceGate",
    "ForcedBalanceOptions",
    "GShardGate",
    "GShardOptions",
    "Gate",
    "HashGate",
    "HashOptions",
    "LatentPrototypeGate",
    "LatentPrototypeOptions",
    "LossTerm",
    "NoisyTopKGate",
    "NoisyTopKOptions",
    "QuantileBalancingGate",
    "QuantileBalancingOptions",
    "ReLUGate",
    "ReLUOptions",
    "Routing",
    "SigmoidTopKGate",
    "SigmoidTopKOptions",
    "SimBalGate",
    "SimBalOptions",
    "SinkhornGate",
    "SinkhornOptions",
    "SoftmaxTopKGate",
    "SoftmaxTopKOptions",
    "SwitchGate",
    "SwitchOptions",
    "TokenBatch",
    "UniformRandomGate",
    "UniformRandomOptions",
    "apply_capacity",
    "available_gates",
    "balance_statistics",
    "blank_gate",
    "build_gate",
    "check_options",
    "gate_class",
    "gate_options",
    "gini_floor",
    "importance_loss",
    "keep_buffers_float32",
    "looks_ahead",
    "register_gate",
]
