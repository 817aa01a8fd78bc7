"""Strictness: unknown keys at every level, wrong types, all problems in one error."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from moe_train.config.errors import ConfigError
from moe_train.config.validate import build


@dataclass(frozen=True)
class Inner:
    count: int = 1
    rate: float = 0.5
    flag: bool = False
    kind: Literal["a", "b"] = "a"
    pair: tuple[float, float] = (0.0, 1.0)
    maybe: int | None = None
    free: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outer:
    name: str = "x"
    inner: Inner = field(default_factory=Inner)
    optional: Inner | None = None
    words: list[str] = field(default_factory=list)


def problems(data: Any) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        build(Outer, data)
    return {problem.path: problem.message for problem in caught.value.problems}


def test_values_arrive() -> None:
    built = build(Outer, {"inner": {"count": 3, "pair": [1, 2], "free": {"any": [1]}}, "optional": {"maybe": 4}})
    assert built == Outer(inner=Inner(count=3, pair=(1.0, 2.0), free={"any": [1]}), optional=Inner(maybe=4))


def test_an_integer_is_a_float() -> None:
    rate = build(Inner, {"rate": 2}).rate
    assert rate == 2.0 and isinstance(rate, float)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("count", "12"),
        ("count", 1.5),
        ("count", 1.0),
        ("count", True),
        ("count", None),
        ("rate", "0.1"),
        ("flag", 1),
        ("flag", "true"),
        ("kind", "c"),
        ("pair", [1.0]),
        ("pair", [1.0, 2.0, 3.0]),
        ("maybe", "none"),
        ("free", 3),
    ],
)
def test_nothing_is_converted(key: str, value: Any) -> None:
    found = problems({"inner": {key: value}})
    assert all(path.startswith(f"inner.{key}") for path in found) and found


def test_the_message_says_what_was_found() -> None:
    assert problems({"inner": {"count": "12"}}) == {"inner.count": 'must be an integer, got "12"'}
    assert problems({"inner": {"kind": "c"}}) == {"inner.kind": "must be 'a' or 'b', got \"c\""}


def test_a_typo_gets_the_nearest_name() -> None:
    assert problems({"inner": {"cuont": 1}}) == {"inner.cuont": "unknown key; did you mean inner.count?"}


def test_a_typo_below_an_optional_section() -> None:
    assert problems({"optional": {"rat": 1}}) == {"optional.rat": "unknown key; did you mean optional.rate?"}


def test_a_key_in_the_wrong_section_is_pointed_home() -> None:
    assert problems({"maybe": 1}) == {"maybe": "unknown key; did you mean inner.maybe or optional.maybe?"}


def test_a_key_like_nothing_lists_what_there_is() -> None:
    assert problems({"zzzzz": 1})["zzzzz"] == "unknown key; known here: inner, name, optional, words"


def test_every_problem_is_in_one_error() -> None:
    with pytest.raises(ConfigError) as caught:
        build(Outer, {"nmae": "y", "inner": {"count": "1", "rate": []}, "words": [1]}, source="my.yaml")
    text = str(caught.value)
    assert text.splitlines()[0] == "my.yaml: 4 problems"
    for path in ("nmae", "inner.count", "inner.rate", "words.0"):
        assert f"  {path}: " in text


def test_a_section_that_is_a_value() -> None:
    assert problems({"inner": 3}) == {"inner": "must be a section, got 3"}


def test_the_path_prefix_is_in_the_message() -> None:
    with pytest.raises(ConfigError, match=r"router\.options\.cuont: .*router\.options\.count"):
        build(Inner, {"cuont": 1}, path="router.options")
