"""Rotary positions in a config.json, in the form of transformers 5 (rope_parameters) and the older one."""

from __future__ import annotations

from typing import Any

from moe_train.model.options import RopeScaling

_KEYS = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_max_position_embeddings": "original_length",
        "low_freq_factor": "low_frequency_factor",
        "high_freq_factor": "high_frequency_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_length",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "truncate": "truncate",
        "attention_factor": "attention_factor",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
    },
}
"""Kind -> key in the file -> ours."""
_REQUIRED = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"), "yarn": ()}
ROPE_KEYS = ("rope_parameters", "rope_theta", "rope_scaling")


def read_rope(config: dict[str, Any], default_theta: float, max_length: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling of a config.json. ValueError for what our models cannot do, by key and value."""
    where = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"  # transformers' order
    given = dict(config.get(where) or {})
    kinds = {given.pop(key) for key in ("rope_type", "type") if given.get(key) is not None} or {"default"}
    kind = kinds.pop()
    if kinds:
        raise ValueError(f"config.json: {where} has rope_type and type with different values")
    theta = given.pop("rope_theta", None) or config.get("rope_theta") or default_theta
    if given.pop("partial_rotary_factor", None) not in (None, 1):
        raise ValueError(f"config.json: {where}.partial_rotary_factor: our models rotate whole heads only")
    if kind == "default":
        _refuse_others(where, kind, given, {})
        return float(theta), None
    if kind not in _KEYS:
        raise ValueError(
            f"config.json: {where}.rope_type is {kind!r}; our models know default, linear, llama3 and yarn"
        )
    _refuse_others(where, kind, given, _KEYS[kind])
    missing = [key for key in _REQUIRED[kind] if given.get(key) is None]
    if missing:
        raise ValueError(f"config.json: {where} lacks {missing[0]}, which {kind} needs")
    if kind != "linear" and given.get("original_max_position_embeddings") is None:
        given["original_max_position_embeddings"] = max_length
    if kind == "yarn" and given.get("factor") is None:
        given["factor"] = max_length / given["original_max_position_embeddings"]
    values = {ours: given[key] for key, ours in _KEYS[kind].items() if given.get(key) is not None}
    return float(theta), RopeScaling(kind=kind, **_numbers(values))  # type: ignore[arg-type]


def write_rope(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """The value of rope_parameters."""
    if scaling is None:
        return {"rope_type": "default", "rope_theta": theta}
    values = {key: getattr(scaling, ours) for key, ours in _KEYS[scaling.kind].items()}
    values = {key: value for key, value in values.items() if value is not None and (key, value) != ("truncate", True)}
    return {"rope_type": scaling.kind, "rope_theta": theta, **values}


def _refuse_others(where: str, kind: str, given: dict[str, Any], known: dict[str, str]) -> None:
    for key, value in given.items():
        if key not in known and value is not None:
            raise ValueError(f"config.json: {where}.{key} is {value!r}, which rope_type {kind} does not have")


def _numbers(values: dict[str, Any]) -> dict[str, Any]:
    whole = ("original_length", "truncate")
    return {key: value if key in whole else float(value) for key, value in values.items()}
