"""Which configurations tensor parallelism is right for; all others are refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from moe_train.config.errors import Problem
from moe_train.model.families import family_of

if TYPE_CHECKING:
    from moe_train.training.run_config import RunConfig

_TESTED = (2, 4)
"""Ranks; parity is proved for no other number."""


def tensor_problems(config: RunConfig) -> Iterator[Problem]:
    """What stands against ``parallel.tensor`` in this configuration."""
    ranks, model, family = config.parallel.tensor, config.model, family_of(config.model)
    if ranks <= 1:
        return
    if ranks not in _TESTED:
        yield Problem("parallel.tensor", f"is tested with 2 and 4 ranks, got {ranks}; set it to one of these, or to 1")
        return
    if family.latent_attention:
        yield Problem(
            "parallel.tensor",
            f"the latent attention of {model.family} is not divided (its small spaces are shared by all heads); set it "
            "to 1 and use parallel.expert and ZeRO",
        )
        return
    if family.query_key_norm == "all":
        yield Problem(
            "parallel.tensor",
            f"{model.family} normalises queries and keys over all heads, which would lie on several ranks; set it to 1 "
            "and use parallel.expert and ZeRO",
        )
        return
    sizes = {
        "model.num_key_value_heads": model.num_key_value_heads,
        "data.sequence_length": config.data.sequence_length,
    }
    if model.ffn_hidden_size is not None:
        sizes["model.ffn_hidden_size"] = model.ffn_hidden_size
    if family.experts and model.moe.shared_expert_hidden_size is not None:
        sizes["model.moe.shared_expert_hidden_size"] = model.moe.shared_expert_hidden_size
    for path, size in sizes.items():
        if size % ranks:
            yield Problem(path, f"{size} cannot be divided among {ranks} ranks; change it, or set parallel.tensor=1")
    section = config.deepspeed.get("zero_optimization", {})
    for key in sorted(section) if isinstance(section, dict) else []:
        if str(key).startswith("offload_"):
            yield Problem(
                f"deepspeed.zero_optimization.{key}",
                "is not tested with tensor parallelism; leave it out, or set parallel.tensor=1",
            )
