"""Shares of ranks add up to the model; figures of tensor parallelism by hand."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import pytest

from moe_train.training.account import multi_token_parameters, parameters
from moe_train.training.partition import parts, units
from moe_train.training.run_config import RunConfig, load_run_config
from moe_train.training.traffic import traffic

MODELS = ["deepseek_v3", "olmoe_1b_7b", "mixtral_8x7b", "qwen3_30b_a3b", "qwen3_0.6b", "llama3_8b", "lpr_mixtral_small"]


def config_of(model: str, *overrides: str) -> RunConfig:
    return load_run_config("tiny", [f"parts.model={model}", "train.micro_batch_size=1", *overrides])


@pytest.mark.parametrize("model", MODELS)
def test_shares_add_up_to_the_model(model: str) -> None:
    config = config_of(model)
    whole = sum(p.total + p.vocab_padding for p in (parameters(config), multi_token_parameters(config)))
    assert sum(part.elements for part in parts(config, 8)) == whole
    assert sum(part.shard * 8 for part in parts(config, 8)) == pytest.approx(whole)
    if config.model.moe.num_experts % 2 == 0 and any(part.kind == "experts" for part in parts(config, 8)):
        spread = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, expert=2))
        # Replicas times shards is what there is: twice the experts of one rank.
        held = {part.kind: part for part in parts(spread, 8)}
        assert 2 * held["experts"].elements == parameters(config).experts + multi_token_parameters(config).experts
        assert (held["experts"].replicas, held["whole"].replicas) == (4, 8)


@pytest.mark.parametrize("model", MODELS)
def test_units_are_the_model_in_order(model: str) -> None:
    config = config_of(model)
    found: Counter[str] = Counter()
    for _, unit in units(config, 8):
        found.update({part.kind: part.elements for part in unit})
    assert found == Counter({part.kind: part.elements for part in parts(config, 8)})
    layers = [layer for layer, _ in units(config, 8)]
    assert layers == [False, *[True] * (config.model.num_layers + config.model.multi_token.layers), False]


def test_tensor_parallelism_divides_matrices_only() -> None:
    config = config_of("mixtral_8x7b")
    two = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, tensor=2, expert=4))
    one, divided = ({part.kind: part for part in parts(c, 8)} for c in (config, two))
    assert divided["whole"] == one["whole"] and divided["whole"].replicas == 8
    assert 2 * divided["divided"].elements == one["divided"].elements
    assert (divided["divided"].replicas, divided["experts"].replicas) == (4, 2)


@pytest.mark.parametrize("recompute", [False, True])
def test_bytes_of_sequence_parallelism(recompute: bool) -> None:
    """Mixtral: attention and gate gather in each layer, attention scatters. Backward the other way round, with one
    more gather; recomputation repeats the forward pass."""
    config = config_of("mixtral_8x7b", f"train.recompute={str(recompute).lower()}", "train.precision=bfloat16")
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, tensor=2))
    model, tokens = config.model, config.data.sequence_length * config.accumulation_steps(8)
    size = model.num_layers * tokens * model.hidden_size * 2
    forward = 2 if recompute else 1
    found = {item.operation: item for item in traffic(config, 8) if item.group == "tensor"}
    assert found["all_gather"].payload == (2 * forward + 1 + 1) * size
    assert found["reduce_scatter"].payload == (forward + 2) * size
    assert math.isclose(found["all_gather"].sent, found["all_gather"].payload / 2)
