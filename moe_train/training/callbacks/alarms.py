"""The collapse alarm that a configuration asks for, and what to try, in the words of that configuration."""

from __future__ import annotations

from moe_train.model.families import family_of
from moe_train.routing.interface import Gate
from moe_train.routing.registry import blank_gate
from moe_train.routing.schedule import bounds
from moe_train.training.callbacks.collapse import CollapseAlarm
from moe_train.training.run_config import RunConfig


def alarms(config: RunConfig) -> list[CollapseAlarm]:
    """The alarm, or none where it is off or the model has no experts."""
    if not config.alarm.enabled or not family_of(config.model).experts:
        return []
    return [CollapseAlarm(config.alarm, advice(config), config.router.balancing.bias.target_load)]


def advice(config: RunConfig) -> dict[str, str]:
    """By cause, without those that the run's gate cannot ring. Only what it can take is named."""
    gate = blank_gate(config.router.gate, config.router.options, config.model.moe.num_experts)
    slower = [
        f"a smaller optimizer.lr (it is {config.optimizer.lr:g})",
        f"more schedule.warmup_steps (now {config.schedule.warmup_steps:,})",
    ]
    balance = [*gate.remedies, *_balancing(config, gate)]
    if not balance:
        balance = ["a larger alarm.window or alarm.min_slots: nothing but chance makes the load of this gate uneven"]
    elif gate.reads_hidden:  # else nothing of its routing learns
        balance += slower
    found = dict.fromkeys(("dead_experts", "load_share", "entropy"), ", or ".join(balance))
    if gate.takes_z_loss:
        coefficient, name = bounds(config.router.balancing.z_loss)[1], "router.balancing.z_loss"
        calmer = [_larger(name, coefficient, 0.001), *slower]
        clipping, name = config.train.gradient_clipping, "train.gradient_clipping"
        calmer.append(f"a smaller {name} (it is {clipping:g})" if clipping else f"{name}=1")
        found["z_growth"] = ", or ".join(calmer)
    return found


def _balancing(config: RunConfig, gate: Gate) -> list[str]:
    """What of the balancing of any gate, and of the gate's own losses, can be larger."""
    balancing, found = config.router.balancing, []
    if gate.takes_switch_loss:
        coefficient = bounds(balancing.switch_loss.coefficient)[1]
        found.append(_larger("router.balancing.switch_loss.coefficient", coefficient, 0.01))
    if importance := bounds(balancing.importance_loss.coefficient)[1]:
        found.append(_larger("router.balancing.importance_loss.coefficient", importance, importance))
    if gate.takes_bias:
        found.append(_larger("router.balancing.bias.rate", balancing.bias.rate, 0.001))
    for option in gate.balance_options:
        if _can_grow(config, option):
            value = bounds(getattr(gate.options, option))[1]
            found.append(f"a larger router.options.{option} (it is {value:g})")
    return found


def _larger(name: str, value: float, first: float) -> str:
    """first: what to begin with where the value is 0."""
    return f"a larger {name} (it is {value:g})" if value else f"{name}={first:g}"


def _can_grow(config: RunConfig, option: str) -> bool:
    """Whether the gate takes a larger value of its option beside the others: where every token has all experts, say,
    there is no load to even out."""
    options = config.router.options
    value = bounds(getattr(blank_gate(config.router.gate, options, config.model.moe.num_experts).options, option))[1]
    larger = options | {option: 2 * value or 0.01}
    try:
        blank_gate(config.router.gate, larger, config.model.moe.num_experts)
    except ValueError:
        return False
    return True
