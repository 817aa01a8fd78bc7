"""Options from a configuration file into a dataclass, strictly, with the standard library alone."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

O = TypeVar("O")  # noqa: E741


def parse_options(kind: type[O], values: dict[str, Any], where: str) -> O:
    """``kind(**values)``; ValueError naming the option for an unknown key or a value of the wrong type.

    An int is taken for a float, and a dictionary for a dataclass; nothing else is converted; in particular a bool is
    not a number.
    """
    hints = get_type_hints(kind)
    known = {f.name: hints[f.name] for f in fields(kind)}  # type: ignore[arg-type]
    checked: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{where} has no option {name!r}; {listing(name, known, 'its options are')}")
        if (inner := _dataclass_in(known[name])) is not None and isinstance(value, dict):
            checked[name] = parse_options(inner, value, f"option {name!r} of {where}")
            continue
        if not _fits(value, known[name]):
            raise ValueError(f"option {name!r} of {where} must be {_describe(known[name])}, not {value!r}")
        kinds = _alternatives(known[name])
        checked[name] = float(value) if float in kinds and int not in kinds and isinstance(value, int) else value
    return kind(**checked)


def listing(name: str, known: Iterable[str], introduction: str) -> str:
    """What exists, with the nearest name for a typo."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}{introduction} {', '.join(names) or 'none'}"


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin is Literal:
        return any(type(value) is type(a) and value == a for a in get_args(hint))
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass that a hint allows, alone or among others."""
    return next((h for h in _alternatives(hint) if isinstance(h, type) and is_dataclass(h)), None)


def _describe(hint: Any) -> str:
    origin = get_origin(hint)
    if origin is Literal:
        return " or ".join(repr(a) for a in get_args(hint))
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in get_args(hint))
    if isinstance(hint, type) and is_dataclass(hint):
        return f"a {hint.__name__.lower()} ({', '.join(f.name for f in fields(hint))})"
    return "null" if hint is type(None) else {float: "a number", int: "an integer"}.get(hint, hint.__name__)
