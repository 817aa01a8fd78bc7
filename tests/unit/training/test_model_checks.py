"""Sizes that do not fit a family or each other are refused by name; options that a family does not use are ignored."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator
from typing import Any

import pytest

from moe_train.config.errors import ConfigError
from moe_train.model.families import FAMILIES
from moe_train.model.options import ModelOptions
from moe_train.training.run_config import RunConfig, check, from_dict

LATENT = {"query_rank": 8, "key_value_rank": 8, "nope_head_dim": 8, "rope_head_dim": 4, "value_head_dim": 8}
SIZES: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


def sizes(family: str) -> dict[str, Any]:
    model = {**SIZES, "family": family}
    if FAMILIES[family].latent_attention:
        model["latent_attention"] = dict(LATENT)
    if not FAMILIES[family].experts:
        model["ffn_hidden_size"] = 64
    return model


def load(family: str, sections: dict[str, Any] | None = None, **model: Any) -> RunConfig:
    return from_dict({"model": {**sizes(family), **model}, **(sections or {})})


def found(family: str, sections: dict[str, Any] | None = None, **model: Any) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        load(family, sections, **model)
    return {problem.path: problem.message for problem in caught.value.problems}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_fits_passes(family: str) -> None:
    check(load(family), 2)


@pytest.mark.parametrize(
    ("family", "model", "key"),
    [
        ("qwen3_moe", {"latent_attention": LATENT}, "latent_attention"),
        ("deepseek_v3", {"latent_attention": None}, "latent_attention"),
        ("deepseek_v3", {"latent_attention": {**LATENT, "rope_head_dim": 5}}, "latent_attention.rope_head_dim"),
        ("deepseek_v3", {"latent_attention": {**LATENT, "key_value_rank": 0}}, "latent_attention.key_value_rank"),
        ("deepseek_v3", {"latent_attention": {**LATENT, "query_rank": 0}}, "latent_attention.query_rank"),
        ("deepseek_v3", {"multi_token": {"layers": 1, "coefficient": -0.1}}, "multi_token.coefficient"),
        ("mixtral", {"multi_token": {"layers": 1}}, "multi_token.layers"),
        ("mixtral", {"clip_qkv": 8.0}, "clip_qkv"),
        ("olmoe", {"clip_qkv": 0.0}, "clip_qkv"),
        ("qwen3_moe", {"dense_layers": [3], "ffn_hidden_size": 8}, "dense_layers"),
        ("qwen3_moe", {"dense_layers": [1, 1], "ffn_hidden_size": 8}, "dense_layers"),
        ("qwen3_moe", {"dense_layers": [1]}, "ffn_hidden_size"),
        ("qwen3_moe", {"ffn_hidden_size": 8}, "ffn_hidden_size"),
        ("llama3", {"ffn_hidden_size": None}, "ffn_hidden_size"),
        ("llama3", {"ffn_hidden_size": 0}, "ffn_hidden_size"),
        ("llama3", {"dense_layers": [0]}, "dense_layers"),
        ("llama3", {"num_key_value_heads": 3}, "num_key_value_heads"),
        ("llama3", {"rope_scaling": {"kind": "linear", "factor": 0.5}}, "rope_scaling.factor"),
        ("llama3", {"rope_scaling": {"kind": "yarn", "original_length": 0}}, "rope_scaling.original_length"),
        (
            "llama3",
            {"rope_scaling": {"kind": "llama3", "low_frequency_factor": 4.0}},
            "rope_scaling.high_frequency_factor",
        ),
        ("olmoe", {"head_dim": 7}, "head_dim"),
        ("olmoe", {"moe": {"num_experts": 0}}, "moe.num_experts"),
    ],
)
def test_what_does_not_fit_is_named(family: str, model: dict[str, Any], key: str) -> None:
    assert list(found(family, **model)) == [f"model.{key}"]


YARN = {"kind": "yarn", "factor": 4.0, "original_length": 64}


@pytest.mark.parametrize(
    ("model", "key"),
    [
        ({"rope_theta": 1.0, "rope_scaling": YARN}, "rope_theta"),
        ({"rope_theta": 0.5, "rope_scaling": YARN}, "rope_theta"),
        ({"rope_scaling": {**YARN, "beta_fast": 0.0}}, "rope_scaling.beta_fast"),
        ({"rope_scaling": {**YARN, "beta_fast": 1.0}}, "rope_scaling.beta_fast"),
        ({"rope_scaling": {**YARN, "beta_slow": -1.0}}, "rope_scaling.beta_slow"),
        ({"rope_scaling": {**YARN, "beta_slow": 0.0}}, "rope_scaling.beta_slow"),
        ({"rope_scaling": {**YARN, "attention_factor": 0.0}}, "rope_scaling.attention_factor"),
        ({"rope_scaling": {**YARN, "attention_factor": -1.0}}, "rope_scaling.attention_factor"),
        ({"rope_scaling": {**YARN, "mscale": -1.0}}, "rope_scaling.mscale"),
        ({"rope_scaling": {**YARN, "mscale_all_dim": -1.0}}, "rope_scaling.mscale_all_dim"),
        (
            {"rope_scaling": {"kind": "llama3", "low_frequency_factor": 0.0}},
            "rope_scaling.low_frequency_factor",
        ),
    ],
)
def test_rotary_options_that_cannot_be_computed_with(model: dict[str, Any], key: str) -> None:
    assert list(found("llama3", **model)) == [f"model.{key}"]


def test_rotary_options_of_another_kind_are_ignored() -> None:
    load("llama3", rope_theta=1.0)
    load("llama3", rope_theta=1.0, rope_scaling={**YARN, "kind": "linear", "beta_fast": 0.0})
    load("llama3", rope_scaling={**YARN, "beta_fast": 2.0, "beta_slow": 1.5, "attention_factor": 0.9, "mscale": 0.0})


NUMBERS = [
    "norm_eps",
    "rope_theta",
    "clip_qkv",
    "init.std",
    "multi_token.coefficient",
    *(
        f"rope_scaling.{name}"
        for name in ("factor", "low_frequency_factor", "high_frequency_factor", "beta_fast", "beta_slow")
    ),
    *(f"rope_scaling.{name}" for name in ("attention_factor", "mscale", "mscale_all_dim")),
]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize("key", NUMBERS)
def test_numbers_are_finite(key: str, value: float) -> None:
    section, _, name = key.rpartition(".")
    given: dict[str, Any] = {name: value}
    if section:
        given = {section: {**(YARN if section == "rope_scaling" else {}), **given}}
    [(path, message)] = found("olmoe", **given).items()
    assert path == f"model.{key}" and message == f"must be a finite number, got {value}"


def test_every_number_of_the_model_is_tried() -> None:
    """A new one belongs into NUMBERS."""

    def floats(options: type, prefix: str = "") -> Iterator[str]:
        for name, kind in typing.get_type_hints(options).items():
            for part in typing.get_args(kind) or (kind,):
                if dataclasses.is_dataclass(part):
                    yield from floats(part, f"{prefix}{name}.")  # type: ignore[arg-type]
                elif part is float:
                    yield prefix + name

    assert sorted(floats(ModelOptions)) == sorted(NUMBERS)


def test_latent_attention_ignores_heads_of_keys_and_values() -> None:
    """They have no meaning there: 5 heads are not divisible by 3, and 32 is not by 5."""
    load("deepseek_v3", num_attention_heads=5, num_key_value_heads=3, head_dim=7)
    assert set(found("qwen3_moe", num_attention_heads=5, num_key_value_heads=3, head_dim=7)) == {
        "model.num_key_value_heads",
        "model.head_dim",
    }


@pytest.mark.parametrize("family", ["qwen3", "llama3"])
def test_dense_families_ignore_router_and_experts(family: str) -> None:
    router = {"router": {"gate": "softmax_topk", "options": {"top_k": 50}}}
    load(family, router, moe={"num_experts": 3, "expert_hidden_size": 0})
    assert "router.options" in found("mixtral", router)


@pytest.mark.parametrize("family", ["qwen3", "llama3"])
def test_dense_families_have_no_experts_to_spread(family: str) -> None:
    assert found(family, {"parallel": {"expert": 2}}) == {
        "parallel.expert": f"{family} has no experts to spread over 2 ranks; set it to 1"
    }


@pytest.mark.parametrize(("family", "why"), [("olmoe", "over all heads"), ("deepseek_v3", "latent attention")])
def test_tensor_parallelism_is_refused_where_it_would_be_wrong(family: str, why: str) -> None:
    """Of latent attention and of a norm over all heads above all, which megatron-core would silently compute
    otherwise."""
    problems = found(family, {"parallel": {"tensor": 2}})
    assert list(problems) == ["parallel.tensor"]
    assert why in problems["parallel.tensor"] and "parallel.expert" in problems["parallel.tensor"]
