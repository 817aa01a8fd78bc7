"""Whether a run computes with the weights of a checkpoint what they were trained for; loading checks their shapes."""

from __future__ import annotations

import dataclasses
from typing import Any

from moe_train.model.families import FAMILIES
from moe_train.model.options import LatentAttentionOptions, ModelOptions, RopeScaling
from moe_train.routing.options import RouterOptions
from moe_train.routing.registry import gate_options
from moe_train.routing.strict import parse_options
from moe_train.training.run_config import RunConfig, to_dict

_FUNCTION = (
    "family",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rope_theta",
    "rope_scaling",
    "norm_eps",
    "clip_qkv",
    "latent_attention",
)
"""Keys of ``model`` that change what the same tensors compute."""
_LONGER_TEXTS = (
    ".\nTo train it on with other rotary positions, for longer texts, allow that by "
    "'train.init_may_change=[rope_theta,rope_scaling]'"
)
_GROUPS: dict[str, type] = {"rope_scaling": RopeScaling, "latent_attention": LatentAttentionOptions}


def check_function(recorded: dict[str, Any], config: RunConfig, path: str) -> str | None:
    """Compares the configuration in a checkpoint's state with that of the run that goes on or begins with its weights.

    ``path``: of the checkpoint, for messages. Returns a note where experts are chosen otherwise, to which training can
    adapt a model, and of what ``train.init_may_change`` names. Errors: ValueError that lists what else would compute
    something different.
    """
    now = to_dict(config)
    old, new = _function(recorded.get("model") or {}), _function(now["model"])
    changed = {
        key: f"model.{key}: {_text(old[key])} there, {_text(new[key])} now" for key in _FUNCTION if old[key] != new[key]
    }
    wanted = [changed.pop(key) for key in config.train.init_may_change if key in changed]
    notes = [f"note: the model computes something else than {path}, as asked: {'; '.join(wanted)}"] if wanted else []
    if changed:
        differ = "\n  ".join(changed.values())
        raise ValueError(
            f"the weights of {path} were made for a model that computes something else:\n  {differ}\n"
            "Take these values from the config.yaml in the folder of the checkpoint's run, for example: "
            "moe-train train PATH/config.yaml data.train=…"
            + (_LONGER_TEXTS if changed.keys() & {"rope_theta", "rope_scaling"} else "")
        )
    if not FAMILIES[config.model.family].experts:
        return notes[0] if notes else None
    old, new = _choice(recorded.get("router") or {}), _choice(now["router"])
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    changes = [f"router.{key} {_text(old.get(key))} there, {_text(new.get(key))} now" for key in keys]
    notes += [f"note: experts are not chosen as in {path}: {'; '.join(changes)}"] if changes else []
    return "\n".join(notes) or None


def _function(model: dict[str, Any]) -> dict[str, Any]:
    """With defaults for what an older version did not record, and without what has no effect."""
    values = dataclasses.asdict(ModelOptions()) | model
    for key, options in _GROUPS.items():
        if values[key] is not None:
            values[key] = dataclasses.asdict(options()) | values[key]
    if values["latent_attention"] is not None:
        values |= {"num_key_value_heads": None, "head_dim": None}
    elif values["head_dim"] is None:
        values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
    return values


def _choice(router: dict[str, Any]) -> dict[str, Any]:
    """Gate and its options with their defaults, where this version still has that gate with these options."""
    values = dataclasses.asdict(RouterOptions()) | router
    options = values["options"]
    try:
        options = dataclasses.asdict(parse_options(gate_options(values["gate"]), options, "gate"))
    except ValueError:
        pass
    return {"gate": values["gate"], **{f"options.{key}": value for key, value in options.items()}}


def _text(value: Any) -> str:
    return "null" if value is None else str(value)
