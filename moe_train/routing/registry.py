"""Gates by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from moe_train.routing.capacity import bound_advice, check_capacity
from moe_train.routing.interface import Gate
from moe_train.routing.options import BalancingOptions, BiasOptions, RouterOptions
from moe_train.routing.schedule import bounds, is_on
from moe_train.routing.strict import listing, parse_options

G = TypeVar("G", bound=type[Gate])
_GATES: dict[str, tuple[type[Gate], type]] = {}


def register_gate(name: str, options: type) -> Callable[[G], G]:
    """Class decorator. The gate is built as ``cls(hidden_size, num_experts, options)``; its options dataclass has a
    default for every field and raises ValueError on values that make no sense, the gate on those that do not fit
    ``num_experts``."""

    def add(cls: G) -> G:
        if name in _GATES:
            raise ValueError(f"a gate named {name!r} is registered already: {_GATES[name][0].__qualname__}")
        _GATES[name] = (cls, options)
        return cls

    return add


def available_gates() -> list[str]:
    """Names of all registered gates, sorted."""
    return sorted(_GATES)


def gate_class(name: str) -> type[Gate]:
    """The class behind a name; ValueError for an unknown one."""
    return _entry(name)[0]


def gate_options(name: str) -> type:
    """The options dataclass of a gate; ValueError for an unknown name."""
    return _entry(name)[1]


def build_gate(name: str, options: dict[str, Any], hidden_size: int, num_experts: int) -> Gate:
    """A gate from its name and its options as they stand in a configuration file.

    ValueError for an unknown name or option, a wrong type, or a value that does not fit ``num_experts``.
    """
    cls, kind = _entry(name)
    build: Any = cls
    return build(hidden_size, num_experts, parse_options(kind, options, f"gate {name!r}"))


def blank_gate(name: str, options: dict[str, Any], num_experts: int) -> Gate:
    """A gate without memory, to ask what it declares. Errors: as ``build_gate``."""
    with torch.device("meta"):
        return build_gate(name, options, hidden_size=8, num_experts=num_experts)


def check_options(router: RouterOptions, num_experts: int) -> None:
    """ValueError on a router that cannot work, before anything is allocated."""
    gate = blank_gate(router.gate, router.options, num_experts)
    balancing = router.balancing
    figures = {
        "balancing.switch_loss.coefficient": balancing.switch_loss.coefficient,
        "balancing.importance_loss.coefficient": balancing.importance_loss.coefficient,
        "balancing.z_loss": balancing.z_loss,
        "balancing.bias.rate": balancing.bias.rate,
    }
    for name, value in figures.items():
        if not bounds(value)[0] >= 0:
            raise ValueError(f"router.{name} is {value}; it must not be negative")
    if balancing.bias.rate > 0 and not gate.takes_bias:
        raise ValueError(f"router.balancing.bias.rate is {balancing.bias.rate}, but gate {router.gate!r} takes no bias")
    if balancing.bias.target_load is not None:
        _check_target_load(balancing.bias, num_experts, gate.max_k)
    if is_on(balancing.switch_loss.coefficient) and not gate.takes_switch_loss:
        raise ValueError(f"router.balancing.switch_loss makes no sense for gate {router.gate!r}: set coefficient 0")
    if is_on(balancing.importance_loss.coefficient) and not gate.reads_hidden:
        raise ValueError(
            f"router.balancing.importance_loss makes no sense for gate {router.gate!r}, which it teaches nothing: set"
            " coefficient 0"
        )
    if is_on(balancing.importance_loss.coefficient) and not gate.takes_switch_loss:
        if balancing.importance_loss.of == "probabilities":
            raise ValueError(
                f"router.balancing.importance_loss makes no sense for gate {router.gate!r}, which has no probabilities:"
                " set coefficient 0, or of: weights"
            )
    if is_on(balancing.z_loss) and not gate.takes_z_loss:
        raise ValueError(f"router.balancing.z_loss makes no sense for gate {router.gate!r}: set it to 0")
    if balancing.exact and not _has_global_batch_loss(balancing, gate):
        raise ValueError(
            "router.balancing.exact is for losses of scope global_batch, and there is none: choose that scope for one,"
            " or leave exact out"
        )
    check_capacity(router.capacity, gate, router.gate)
    if router.forced_balance and gate.max_k is None:
        raise ValueError(
            f"router.forced_balance needs a fixed number of experts per token, and gate {router.gate!r} has none:"
            f" {bound_advice(gate)}choose another gate"
        )


def own_scope(gate: Gate) -> str | None:
    """Token set of the gate's own losses: its option ``scope``, where it has one."""
    return getattr(getattr(gate, "options", None), "scope", None)


def _has_global_batch_loss(balancing: BalancingOptions, gate: Gate) -> bool:
    """A loss of the gate's own counts where its options have that scope."""
    losses = (balancing.switch_loss, balancing.importance_loss)
    return own_scope(gate) == "global_batch" or any(is_on(x.coefficient) and x.scope == "global_batch" for x in losses)


def _check_target_load(bias: BiasOptions, num_experts: int, k: int | None) -> None:
    target, name = bias.target_load or [], "router.balancing.bias.target_load"
    if len(target) != num_experts:
        raise ValueError(f"{name} has {len(target)} shares; give one for each of the {num_experts} experts")
    for expert, share in enumerate(target):
        if not 0 < share < math.inf:
            raise ValueError(f"{name}[{expert}] is {share}; a share must be above 0 and finite")
        # An expert is selected at most once per token. Without this the bias would grow for ever.
        if k is not None and share * k > sum(target) * (1 + 1e-9):
            raise ValueError(
                f"{name}[{expert}] is {share} of {sum(target):g}; with {k} experts per token none can have more than"
                f" 1/{k} of the load"
            )
    if bias.rate == 0:
        raise ValueError(f"{name} does nothing while router.balancing.bias.rate is 0: set a rate, or leave it out")


def _entry(name: str) -> tuple[type[Gate], type]:
    if name not in _GATES:
        raise ValueError(f"there is no gate {name!r}; {listing(name, _GATES, 'registered are')}")
    return _GATES[name]
