"""From nested dictionaries to frozen dataclasses, strictly: unknown keys and wrong types are errors.

Nothing is converted silently: "12" is no integer and 1.5 is none either; an integer is accepted where a float is
expected, as JSON does. The dataclasses stay plain; pydantic checks them from outside.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

from moe_train.config.errors import ConfigError, Problem, listing, nearest

T = TypeVar("T")


def build(cls: type[T], data: Any, *, path: str = "", source: str = "configuration") -> T:
    """An instance of the dataclass ``cls`` from ``data``; raises ConfigError with every problem found.

    ``path`` is the dotted place of ``data`` in the whole configuration, for messages.
    """
    problems = unknown_keys(cls, data, path)
    value, wrong = _validated(cls, data, path)
    problems += wrong
    if problems:
        raise ConfigError(problems, source)
    return typing.cast(T, value)


def _validated(cls: type, data: Any, path: str) -> tuple[Any, list[Problem]]:
    from pydantic import TypeAdapter, ValidationError

    try:
        # JSON mode: objects become dataclasses and arrays become tuples while everything else stays strict.
        text = json.dumps(data)
    except (TypeError, ValueError) as error:
        return None, [Problem(path, f"holds a value that YAML cannot express here ({error})")]
    try:
        return TypeAdapter(cls).validate_json(text, strict=True), []
    except ValidationError as error:
        return None, [_problem(path, details) for details in _of_one_branch(error.errors(include_url=False))]


def _of_one_branch(errors: Sequence[Any]) -> list[Any]:
    """Errors with places in the configuration, of unions only those of the alternative that got furthest.

    pydantic reports every alternative, with its type as a part of the place. What two say about one place becomes one
    message.
    """
    plain = [details | {"loc": tuple(part for part in details["loc"] if not _is_branch(part))} for details in errors]
    kept: dict[tuple[Any, ...], Any] = {}
    for details, original in zip(plain, errors, strict=True):
        place, alternatives = details["loc"], len(original["loc"]) > len(details["loc"])
        deeper = any(len(other["loc"]) > len(place) and other["loc"][: len(place)] == place for other in plain)
        if alternatives and deeper:
            continue
        if place in kept and alternatives:
            ending = details["msg"].removeprefix("Input should be ")
            details = kept[place] | {"msg": f"{kept[place]['msg']} or {ending}"}
        kept[place] = details
    return list(kept.values())


def _is_branch(part: Any) -> bool:
    """Whether a part of pydantic's place is a type: `str`, `list[...]`, the name of a class."""
    return isinstance(part, str) and (part in ("str", "int", "float", "bool") or "[" in part or part[:1].isupper())


def _problem(path: str, details: Any) -> Problem:
    where = ".".join([path, *map(str, details["loc"])] if path else map(str, details["loc"]))
    message = details["msg"].replace("Input should be", "must be").replace("Field required", "is missing")
    message = message.removeprefix("Value error, ").replace("a valid ", "a ").replace("a integer", "an integer")
    message = message.replace("an object", "a section").replace("a array", "a list")
    message = message.replace("Unexpected keyword argument", "unknown key")
    if details["type"] in ("missing", "value_error"):
        return Problem(where, message)
    return Problem(where, f"{message}, got {json.dumps(details['input'])}")


def unknown_keys(cls: type, data: Any, path: str = "") -> list[Problem]:
    """A problem for each key, at every level, that the dataclass does not have."""
    return _unknown_keys(cls, data, path, places=_places(cls, path))


def _unknown_keys(cls: type, data: Any, path: str, places: dict[str, list[str]]) -> list[Problem]:
    if not isinstance(data, dict):
        return []
    sections = _sections(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    problems: list[Problem] = []
    for key, value in data.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in names:
            problems.append(Problem(where, "unknown key; " + _advice(str(key), where, names, places)))
        elif sections.get(key) is not None:
            problems += _unknown_keys(sections[key], value, where, places)
    return problems


def _advice(key: str, where: str, names: list[str], places: dict[str, list[str]]) -> str:
    if guess := nearest(key, names):
        return f"did you mean {where[: len(where) - len(key)]}{guess}?"
    if key in places:
        return f"did you mean {' or '.join(places[key])}?"
    if guess := nearest(key, places):
        return f"did you mean {' or '.join(places[guess])}?"
    return f"known here: {listing(names)}"


def _sections(cls: type) -> dict[str, type]:
    """The fields that are dataclasses themselves (also where null is allowed)."""
    found = {}
    for name, annotation in typing.get_type_hints(cls).items():
        options = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
        for option in options:
            if isinstance(option, type) and dataclasses.is_dataclass(option):
                found[name] = option
    return found


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _places(cls: type, path: str) -> dict[str, list[str]]:
    """Every key below ``cls`` -> the dotted paths where it exists, for a key that stands in the wrong section."""
    places: dict[str, list[str]] = {}
    sections = _sections(cls)
    for field in dataclasses.fields(cls):
        where = f"{path}.{field.name}" if path else field.name
        places.setdefault(field.name, []).append(where)
        if field.name in sections:
            for key, deeper in _places(sections[field.name], where).items():
                places.setdefault(key, []).extend(deeper)
    return places
