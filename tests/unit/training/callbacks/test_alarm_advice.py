"""What the collapse alarm says to try: things that exist, and that can help with the gate at hand."""

from __future__ import annotations

import dataclasses
import re
import typing
from typing import Any

import pytest
import yaml

from moe_train.model.options import ModelOptions, MoEOptions
from moe_train.routing import available_gates
from moe_train.routing.options import BalancingOptions, BiasOptions, ImportanceLossOptions, RouterOptions
from moe_train.routing.registry import blank_gate, check_options, gate_options
from moe_train.training.callbacks.alarms import advice
from moe_train.training.callbacks.layer_watch import CAUSES
from moe_train.training.options import TrainOptions
from moe_train.training.run_config import RunConfig
from tests.gate_variants import VARIANTS

LOAD = ("dead_experts", "load_share", "entropy")
EVEN_BY_RULE = {"dense", "expert_choice", "forced_balance", "uniform_random"}
"""Nothing can make their load more even than it is."""
CASES = [(name, options) for name in available_gates() for options in [{}, *VARIANTS.get(name, [])]]


def with_gate(name: str, options: dict[str, Any] | None = None, **balancing: Any) -> RunConfig:
    return RunConfig(router=RouterOptions(name, options or {}, BalancingOptions(**balancing)))


def test_advice_names_what_the_gate_can_take() -> None:
    plain = advice(RunConfig())
    assert set(plain) == set(CAUSES)
    assert "router.balancing.switch_loss.coefficient=0.01" in plain["dead_experts"]
    assert (
        "router.balancing.bias.rate=0.001" in plain["entropy"] and "router.balancing.z_loss=0.001" in plain["z_growth"]
    )
    has_bias = RouterOptions(balancing=BalancingOptions(bias=BiasOptions(rate=0.01)))
    assert "a larger router.balancing.bias.rate (it is 0.01)" in advice(RunConfig(router=has_bias))["load_share"]
    assert "bias" not in advice(RunConfig(router=RouterOptions("dynamic_k")))["load_share"]


def test_advice_names_the_gates_own_losses() -> None:
    lpr = advice(RunConfig(router=RouterOptions("lpr", {"coefficient": 0.27})))
    assert "a larger router.options.coefficient (it is 0.27)" in lpr["load_share"]
    noisy = advice(RunConfig(router=RouterOptions("noisy_topk", {"load": {"start": 0.2, "end": 0.1, "steps": 5}})))
    assert (
        "a larger router.options.importance (it is 0.1), or a larger router.options.load (it is 0.2)"
        in noisy["entropy"]
    )


def test_advice_names_only_what_can_be_set() -> None:
    """0 is no clipping, so that there is nothing smaller; with all experts there is no load to even out."""
    assert "a smaller train.gradient_clipping (it is 1)" in advice(RunConfig())["z_growth"]
    unclipped = advice(RunConfig(train=TrainOptions(gradient_clipping=0.0)))["z_growth"]
    assert "train.gradient_clipping=1" in unclipped and "smaller train.gradient_clipping" not in unclipped
    every = RunConfig(
        router=RouterOptions("noisy_topk", {"top_k": 8, "load": 0.0}), model=ModelOptions(moe=MoEOptions(8))
    )
    assert "router.options.importance" in advice(every)["load_share"]
    assert "router.options.load" not in advice(every)["load_share"]


def exists(path: str, gate: str) -> bool:
    """Whether a configuration has that key; below router.options whether the gate has it."""
    kind: Any = RunConfig
    for key in path.replace("router.options.", "router.", 1).split("."):
        if path.startswith("router.options.") and kind is RouterOptions:
            kind = gate_options(gate)
        if key not in {field.name for field in dataclasses.fields(kind)}:
            return False
        kind = typing.get_type_hints(kind)[key]
    return True


def test_a_key_that_does_not_exist_is_seen() -> None:
    assert exists("router.options.counts", "hash") and exists("router.balancing.switch_loss.coefficient", "hash")
    assert not exists("router.options.counts", "relu") and not exists("router.balancing.switch.coefficient", "relu")


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_every_gate_is_advised_what_exists(name: str, options: dict[str, Any]) -> None:
    config = with_gate(name, options)
    gate, given = blank_gate(name, options, 8), advice(config)
    assert set(given) == (set(CAUSES) if gate.takes_z_loss else set(LOAD)), "without a z there is no z_growth"
    for text in given.values():
        paths = re.findall(r"\b(?:router|train|optimizer|schedule|alarm|model)(?:\.\w+)+", text)
        assert paths and all(exists(path, name) for path in paths), text
        for option, value in re.findall(r"router\.options\.(\w+)=(\w+)", text):
            blank_gate(name, options | {option: yaml.safe_load(value)}, 8)
    assert ("alarm." in given["load_share"]) == (name in EVEN_BY_RULE), "where nothing of the run can help"


def test_the_remedies_of_the_gate_itself_come_first() -> None:
    expected = {
        "hash": "a new run with router.options.counts, the number",
        "relu": "an importance loss of the combine weights",
        "quantile_balancing": "a larger router.options.ema (it is 0)",
        "sinkhorn": "a smaller router.options.temperature (it is 1) with more router.options.iterations (now 20)",
        "base": "pools of more tokens than experts (router.options.pool=micro_batch)",
    }
    for name, text in expected.items():
        assert advice(with_gate(name))["load_share"].startswith(text), name


def test_remedies_follow_the_options() -> None:
    def load(name: str, **options: Any) -> str:
        return advice(with_gate(name, options))["load_share"]

    assert load("hash", counts="c.json").startswith("another file")
    assert load("relu", balanced=False).startswith("router.options.balanced=true, or an importance loss")
    assert "scope=micro_batch" in load("quantile_balancing")
    assert "scope=micro_batch" not in load("quantile_balancing", scope="micro_batch")
    assert load("base", pool="micro_batch").startswith("pools of more tokens than experts (a larger train.micro_batch")
    assert "router.options.prototypes: learned" in load("lpr", prototypes="ema")
    assert "router.options.prototypes" not in load("lpr", prototypes="frozen")


@pytest.mark.parametrize("name", available_gates())
def test_slower_learning_is_for_routing_that_learns(name: str) -> None:
    text = advice(with_gate(name))["load_share"]
    learns = blank_gate(name, {}, 8).reads_hidden and name not in EVEN_BY_RULE
    assert ("optimizer.lr" in text) == ("schedule.warmup_steps" in text) == learns
    if name in EVEN_BY_RULE:
        assert text.startswith("a larger alarm.window or alarm.min_slots")


def test_what_relu_is_told_can_be_set() -> None:
    loss = ImportanceLossOptions(coefficient=0.1, of="weights")
    config = with_gate("relu", importance_loss=loss)
    check_options(config.router, 8)
    assert "a larger router.balancing.importance_loss.coefficient (it is 0.1)" in advice(config)["entropy"]
    assert "importance" not in advice(with_gate("softmax_topk"))["entropy"]
