"""The collapse alarm that a configuration asks for, and what to try, in the words of that configuration."""

from __future__ import annotations

from moe_train.model.families import family_of
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
    """By cause. Only what the run's gate can take is named."""
    gate = blank_gate(config.router.gate, config.router.options, config.model.moe.num_experts)
    balancing = config.router.balancing
    balance: list[str] = []
    if gate.takes_switch_loss:
        coefficient = bounds(balancing.switch_loss.coefficient)[1]
        name = "router.balancing.switch_loss.coefficient"
        balance.append(f"a larger {name} (it is {coefficient:g})" if coefficient else f"{name}=0.01")
    if gate.takes_bias:
        rate, name = balancing.bias.rate, "router.balancing.bias.rate"
        balance.append(f"a larger {name} (it is {rate:g})" if rate else f"{name}=0.001")
    for option in gate.balance_options:
        if not _can_grow(config, option):
            continue
        value = bounds(getattr(gate.options, option))[1]
        balance.append(f"a larger router.options.{option} (it is {value:g})")
    if not balance:
        balance.append("the gate's own options (docs/routing/index.md)")
    slower = [
        f"a smaller optimizer.lr (it is {config.optimizer.lr:g})",
        f"more schedule.warmup_steps (now {config.schedule.warmup_steps:,})",
    ]
    calmer: list[str] = []
    if gate.takes_z_loss:
        coefficient, name = bounds(balancing.z_loss)[1], "router.balancing.z_loss"
        calmer.append(f"a larger {name} (it is {coefficient:g})" if coefficient else f"{name}=0.001")
    clipping, name = config.train.gradient_clipping, "train.gradient_clipping"
    calmer += [*slower, f"a smaller {name} (it is {clipping:g})" if clipping else f"{name}=1"]
    against_imbalance = ", or ".join([*balance, *slower])
    return {
        "dead_experts": against_imbalance,
        "load_share": against_imbalance,
        "entropy": against_imbalance,
        "z_growth": ", or ".join(calmer),
    }


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
