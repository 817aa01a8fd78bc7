"""Whether the sizes of a model fit its family and each other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from moe_train.config.errors import Problem
from moe_train.model.families import family_of, family_problems
from moe_train.model.options import ModelOptions, RopeScaling

if TYPE_CHECKING:
    from moe_train.training.run_config import RunConfig


def model_problems(config: RunConfig) -> Iterator[Problem]:
    """What is wrong with ``config.model``. Options that a family does not use and that always have a value are ignored:
    those of experts in a dense family, heads of keys and values with latent attention."""
    model = config.model
    bad = [*_not_finite(model)]
    named = {key for key, _ in bad}
    bad += [(key, message) for key, message in _not_positive(model) if key not in named]
    for key, message in bad:
        yield Problem(f"model.{key}", message)
    coefficient = model.multi_token.coefficient
    if coefficient < 0 and "multi_token.coefficient" not in named:
        yield Problem("model.multi_token.coefficient", f"must be a number of at least 0, got {coefficient}")
    if bad:
        return
    for key, message in (*family_problems(model), *_heads(model), *_scaling(model)):
        yield Problem(f"model.{key}", message)
    # Rows of experts and of their inputs start at multiples of 16 bytes, which grouped_mm asks for.
    step = 8 if config.train.precision == "bfloat16" else 4
    if model.hidden_size % step and family_of(model).experts:
        yield Problem("model.hidden_size", f"{model.hidden_size} is not a multiple of {step}")


def _not_finite(options: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Infinite numbers and NaN, which no option has a use for, also not in what a family ignores."""
    for field in fields(options):
        key, value = prefix + field.name, getattr(options, field.name)
        if is_dataclass(value):
            yield from _not_finite(value, f"{key}.")
        elif isinstance(value, float) and not math.isfinite(value):
            yield key, f"must be a finite number, got {value}"


def _not_positive(model: ModelOptions) -> Iterator[tuple[str, str]]:
    sizes: dict[str, float] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "vocab_size": model.vocab_size,
        "vocab_multiple": model.vocab_multiple,
        "init.std": model.init.std,
        "norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
    }
    optional: dict[str, float | None] = {
        "ffn_hidden_size": model.ffn_hidden_size,
        "loss_chunk_tokens": model.loss_chunk_tokens,
    }
    if (latent := model.latent_attention) is None:
        sizes["num_key_value_heads"] = model.num_key_value_heads
        optional["head_dim"] = model.head_dim
    else:
        for name in ("key_value_rank", "nope_head_dim", "rope_head_dim", "value_head_dim"):
            sizes[f"latent_attention.{name}"] = getattr(latent, name)
        optional["latent_attention.query_rank"] = latent.query_rank
    if family_of(model).experts:
        sizes["moe.num_experts"] = model.moe.num_experts
        sizes["moe.expert_hidden_size"] = model.moe.expert_hidden_size
        optional["moe.shared_expert_hidden_size"] = model.moe.shared_expert_hidden_size
    if (scaling := model.rope_scaling) is not None:
        sizes["rope_scaling.original_length"] = scaling.original_length
        sizes["rope_scaling.low_frequency_factor"] = scaling.low_frequency_factor
        sizes["rope_scaling.high_frequency_factor"] = scaling.high_frequency_factor
    values = {**sizes, **{key: value for key, value in optional.items() if value is not None}}
    for key, value in values.items():
        if not value > 0:
            yield key, f"must be greater than 0, got {value}" + ("; write null for none" if key in optional else "")


def _heads(model: ModelOptions) -> Iterator[tuple[str, str]]:
    if model.latent_attention is not None:
        return
    heads, kv = model.num_attention_heads, model.num_key_value_heads
    if heads % kv:
        yield "num_key_value_heads", f"{heads} attention heads are not divisible by {kv}"
    if model.head_dim is None and model.hidden_size % heads:
        yield "hidden_size", f"{model.hidden_size} is not divisible by {heads} attention heads; set model.head_dim"


def _scaling(model: ModelOptions) -> Iterator[tuple[str, str]]:
    scaling = model.rope_scaling
    if scaling is None:
        return
    if scaling.kind == "llama3":
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        if not high > low:
            yield "rope_scaling.high_frequency_factor", f"must be above low_frequency_factor ({low}), got {high}"
    if scaling.kind == "yarn":
        yield from _yarn(model.rope_theta, scaling)


def _yarn(theta: float, scaling: RopeScaling) -> Iterator[tuple[str, str]]:
    if not theta > 1:
        yield "rope_theta", f"must be above 1 with yarn, got {theta}: pairs would not turn more slowly one by one"
    slow, fast = scaling.beta_slow, scaling.beta_fast
    if not slow > 0:
        yield "rope_scaling.beta_slow", f"must be greater than 0, got {slow}"
    elif not fast > slow:
        yield "rope_scaling.beta_fast", f"must be above beta_slow ({slow}), got {fast}"
    if scaling.attention_factor is not None and not scaling.attention_factor > 0:
        yield (
            "rope_scaling.attention_factor",
            f"must be greater than 0, got {scaling.attention_factor}; write null to compute it",
        )
    for name in ("mscale", "mscale_all_dim"):
        value = getattr(scaling, name)
        if value is not None and value < 0:
            yield f"rope_scaling.{name}", f"must be at least 0, got {value}; write null for none"
