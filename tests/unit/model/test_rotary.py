"""Frequencies, amplitudes and rotation: against transformers, and by what they must keep."""

from __future__ import annotations

import dataclasses
import math
import secrets

import pytest
import torch

from moe_train.model.options import LatentAttentionOptions, ModelOptions, RopeScaling
from moe_train.model.rotary import Rotary, amplitude, angles, frequencies, latent_score_scale, rotate

LATENT = LatentAttentionOptions(nope_head_dim=16, rope_head_dim=64, value_head_dim=16)
PLAIN = ModelOptions(family="llama3", hidden_size=512, num_attention_heads=8, rope_theta=10000.0)
DEEPSEEK = ModelOptions(family="deepseek_v3", num_attention_heads=8, latent_attention=LATENT)


def published(options: ModelOptions, parameters: dict[str, object]) -> tuple[torch.Tensor, float]:
    """Inverse frequencies and attention factor of transformers for the same settings."""
    from transformers import DeepseekV3Config, LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_theta": options.rope_theta, **parameters}
    length = int(parameters.get("original_max_position_embeddings", 4096))  # type: ignore[call-overload]
    config = (
        LlamaConfig(hidden_size=512, num_attention_heads=8, max_position_embeddings=length, rope_parameters=rope)
        if options.latent_attention is None
        else DeepseekV3Config(qk_rope_head_dim=64, max_position_embeddings=length, rope_parameters=rope)
    )
    found, factor = ROPE_INIT_FUNCTIONS[str(parameters["rope_type"])](config, torch.device("cpu"))
    return found, float(factor)


CASES = {
    "linear": (PLAIN, RopeScaling("linear", factor=4.0), {"rope_type": "linear", "factor": 4.0}),
    "llama3": (
        PLAIN,
        RopeScaling("llama3", factor=8.0, original_length=8192),
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "yarn": (
        PLAIN,
        RopeScaling("yarn", factor=4.0, original_length=2048),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
    ),
    "yarn not truncated": (
        PLAIN,
        RopeScaling("yarn", factor=4.0, original_length=2048, truncate=False, beta_fast=16.0, beta_slow=2.0),
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 2048,
            "truncate": False,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
        },
    ),
    "yarn with a factor": (
        PLAIN,
        RopeScaling("yarn", factor=4.0, original_length=2048, attention_factor=1.3),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048, "attention_factor": 1.3},
    ),
    "deepseek": (
        DEEPSEEK,
        RopeScaling("yarn", factor=40.0, original_length=4096, mscale=1.0, mscale_all_dim=1.0),
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    ),
    "deepseek with two scales": (
        DEEPSEEK,
        RopeScaling("yarn", factor=40.0, original_length=4096, mscale=1.0, mscale_all_dim=0.707),
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.707,
        },
    ),
}


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("name", CASES)
def test_scalings_are_those_of_transformers(name: str, theta: float) -> None:
    options, scaling, parameters = CASES[name]
    options = dataclasses.replace(options, rope_theta=theta, rope_scaling=scaling)
    want_P, factor = published(options, parameters)
    got_P = frequencies(options)
    assert got_P.dtype == torch.float32 and got_P.shape == want_P.shape == (32,)
    torch.testing.assert_close(got_P, want_P, rtol=3e-7, atol=0)
    assert amplitude(scaling) == pytest.approx(factor, rel=1e-9)
    plain_P = frequencies(dataclasses.replace(options, rope_scaling=None))
    assert not torch.allclose(got_P, plain_P)


def test_deepseek_scales_its_scores() -> None:
    """As transformers' DeepseekV3Attention does; without mscale_all_dim nothing but the width counts."""
    assert latent_score_scale(DEEPSEEK, 80) == 80**-0.5
    scaled = dataclasses.replace(DEEPSEEK, rope_scaling=CASES["deepseek"][1])
    assert latent_score_scale(scaled, 80) == pytest.approx(80**-0.5 * (0.1 * math.log(40) + 1) ** 2)


def test_a_factor_of_one_changes_nothing() -> None:
    for kind in ("linear", "llama3", "yarn"):
        scaling = RopeScaling(kind, factor=1.0, original_length=2048)  # type: ignore[arg-type]
        options = dataclasses.replace(PLAIN, rope_scaling=scaling)
        torch.testing.assert_close(frequencies(options), frequencies(PLAIN), rtol=2e-7, atol=0)
        assert amplitude(scaling) == 1.0


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_distance_alone(interleaved: bool) -> None:
    """And lengths stay; position 0 is the identity up to the order of elements."""
    seed = secrets.randbits(32)
    print("seed", seed)
    rng = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 1, 5, 64, generator=rng, dtype=torch.float64)
    rotary = Rotary(PLAIN)

    def turned(x: torch.Tensor, position: int) -> torch.Tensor:
        return rotate(x, rotary(torch.tensor([[position]]), torch.float64), interleaved)

    scores = (turned(q, 9) * turned(k, 4)).sum(-1)
    assert torch.allclose(scores, (turned(q, 1009) * turned(k, 1004)).sum(-1), rtol=1e-9, atol=1e-9)
    # Of all five: one alone may be nearly the same by chance.
    assert not torch.allclose(scores, (turned(q, 9) * turned(k, 5)).sum(-1), rtol=1e-3, atol=1e-3)
    assert torch.allclose(turned(q, 77).norm(), q.norm())
    assert torch.equal(turned(q, 0).flatten().sort().values, q.flatten().sort().values)


def test_interleaved_is_a_change_of_order() -> None:
    rng = torch.Generator().manual_seed(5)
    x = torch.randn(7, 2, 3, 64, generator=rng)
    turn = angles(frequencies(PLAIN), torch.arange(7)[:, None], 1.0, torch.float32)
    order = torch.cat([torch.arange(0, 64, 2), torch.arange(1, 64, 2)])
    torch.testing.assert_close(rotate(x, turn, interleaved=True), rotate(x[..., order], turn))


def test_angles_in_short_types_are_computed_in_float32() -> None:
    """bfloat16 knows no integers above 256 apart."""
    position = torch.tensor([[3000], [3001]])
    short = angles(frequencies(PLAIN), position, 1.0, torch.bfloat16)
    exact = angles(frequencies(PLAIN).double(), position, 1.0, torch.float64)
    assert (short.double() - exact).abs().max() < 2**-8
    assert not torch.equal(short[:, 0], short[:, 1])
