"""Rotary positions in a config.json, in the form of transformers 5 (rope_parameters) and the older one."""

from __future__ import annotations

from typing import Any

from moe_train.interop.typed import mapping, number, whole
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
    parts = {key: dict(mapping(key, config.get(key))) for key in ("rope_scaling", "rope_parameters")}
    where = "rope_scaling" if parts["rope_scaling"] else "rope_parameters"  # transformers' order
    given = parts[where]
    kinds = [given.pop(key) for key in ("rope_type", "type") if given.get(key) is not None] or ["default"]
    kind = kinds[0]
    if kind != kinds[-1]:
        raise ValueError(f"config.json: {where} has rope_type {kind!r} and type {kinds[-1]!r}, different values")
    inside = given.pop("rope_theta", None)
    theta = number(f"{where}.rope_theta", inside) if inside is not None else None
    theta = theta or number("rope_theta", config.get("rope_theta") or default_theta)
    part = given.pop("partial_rotary_factor", None)
    if part not in (None, 1):
        raise ValueError(f"config.json: {where}.partial_rotary_factor is {part!r}; our models rotate whole heads only")
    if kind == "default":
        _refuse_others(where, kind, given, {})
        return theta, None
    if not isinstance(kind, str) or kind not in _KEYS:
        raise ValueError(
            f"config.json: {where}.rope_type is {kind!r}; our models know default, linear, llama3 and yarn"
        )
    _refuse_others(where, kind, given, _KEYS[kind])
    missing = [key for key in _REQUIRED[kind] if given.get(key) is None]
    if missing:
        raise ValueError(f"config.json: {where} lacks {missing[0]}, which {kind} needs")
    if kind != "linear" and given.get("original_max_position_embeddings") is None:
        given["original_max_position_embeddings"] = max_length
    for key in _KEYS[kind]:
        if given.get(key) is not None:
            given[key] = _checked(where, key, given[key])
    if kind == "yarn" and given.get("factor") is None:
        given["factor"] = max_length / given["original_max_position_embeddings"]
    values = {ours: given[key] for key, ours in _KEYS[kind].items() if given.get(key) is not None}
    return theta, RopeScaling(kind=kind, **values)  # type: ignore[arg-type]


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


def _checked(where: str, key: str, value: Any) -> float | bool:
    if key == "truncate" and not isinstance(value, bool):
        raise ValueError(f"config.json: {where}.{key} is {value!r}; true or false is needed")
    if key == "truncate":
        return bool(value)
    check = whole if key == "original_max_position_embeddings" else number
    return check(f"{where}.{key}", value)
