"""What differs between two runs' samples is said in few words, however many data sets there are."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_train.data.identity import differences
from moe_train.data.options import BlendMember, DataOptions, Stage
from moe_train.data.training_set import open_training_set, read_before

MANY = 300


def member(name: str, **facts: Any) -> dict[str, Any]:
    return {"name": name, "documents": 1000, "tokens": 54321, "content": "ab12", "sampler": "packed"} | facts


def identity(**changes: Any) -> dict[str, Any]:
    names = range(MANY)
    stages = [
        {"first": 0, "members": list(names), "shares": [1 + n % 3 for n in names]},
        {"first": 800, "members": [0, 1], "shares": [3, 1]},
    ]
    members = [member(f"set_{number}") for number in names]
    return {"seed": 1, "sequence_length": 32, "shuffle": True, "members": members, "stages": stages} | changes


def changed(change: Callable[[dict[str, Any]], Any]) -> list[str]:
    now = copy.deepcopy(identity())
    change(now)
    lines = differences(identity(), now)
    assert sum(map(len, lines)) < 500
    return lines


def test_nothing_differs() -> None:
    assert differences(identity(), identity()) == []


def test_single_options() -> None:
    assert differences(identity(), identity(seed=9, shuffle=False)) == [
        "seed: 1 then, 9 now",
        "shuffle: True then, False now",
    ]


def test_one_data_set_is_named_with_its_facts() -> None:
    lines = changed(lambda now: now["members"][7].update(documents=1001, content=None))
    facts = "documents 1,000 then, 1,001 now, checksum of sources, options and tokenizer ab12 then, none now"
    assert lines == [f"data set set_7: {facts}"]


def test_of_many_data_sets_the_first_few() -> None:
    lines = changed(lambda now: [m.update(tokens=9) for m in now["members"]])
    assert lines[:3] == [f"data set set_{n}: tokens 54,321 then, 9 now" for n in range(3)]
    assert lines[3:] == ["297 more data sets differ"]


def test_other_data_sets() -> None:
    def swap(now: dict[str, Any]) -> None:
        now["members"] = [*now["members"][5:], member("new"), member("set_7")]

    assert changed(swap) == [
        "data sets left out: set_0, set_1, set_2 and 2 more",
        "data sets added: set_7, new",
    ]
    assert changed(lambda now: now["members"].reverse()) == ["the data sets stand in another order"]


def test_shares_and_stages() -> None:
    assert changed(lambda now: now["stages"].pop()) == ["stages: 2 then, 1 now"]
    assert changed(lambda now: now["stages"][1].update(first=900)) == ["stage 1: began at sample 800 then, at 900 now"]
    assert changed(lambda now: now["stages"][1].update(shares=[1, 1])) == [
        "shares of stage 1: set_0 0.75 then, 0.5 now, set_1 0.25 then, 0.5 now"
    ]
    [line] = changed(lambda now: now["stages"][0].update(shares=[1] * MANY))
    assert line.startswith("shares of data.train: set_0 0.001667 then, 0.003333 now") and line.endswith(" more")


def test_what_an_earlier_version_did_not_write_is_no_difference() -> None:
    before = identity()
    for entry in before["members"]:
        del entry["content"]
    assert differences(before, identity()) == []
    assert differences({"seed": 1}, identity()) == []
    assert differences({"seed": 2}, identity()) == ["seed: 2 then, 1 now"]


def test_every_change_of_real_data_is_said(tmp_path: Path, write_tokens: Callable[..., object]) -> None:
    """Two sets of options give the same lines only where the samples read so far are the same."""
    for seed, name in enumerate(("a", "b", "c")):
        write_tokens(tmp_path / name, [20] * (20 + seed), seed=seed)
    a, b, c = (str(tmp_path / name) for name in ("a", "b", "c"))
    weighted: list[Any] = [BlendMember(a, 1), BlendMember(b, 2)]
    plans = [
        DataOptions(train=a, sequence_length=8),
        DataOptions(train=[a, b], sequence_length=8),
        DataOptions(train=weighted, sequence_length=8),
        DataOptions(train=weighted, sequence_length=8, sampler="documents"),
        DataOptions(train=weighted, sequence_length=8, stages=[Stage(3, c)]),
        DataOptions(train=weighted, sequence_length=8, stages=[Stage(4, c)]),
        DataOptions(train=weighted, sequence_length=8, stages=[Stage(90, c)]),
    ]
    read = [
        read_before(
            open_training_set(plan, seed=1, batch_size=4, cache=tmp_path, once=lambda work: work()).identity(), 40
        )
        for plan in plans
    ]
    for (i, before), (j, now) in itertools.product(enumerate(read), repeat=2):
        same = i == j or {i, j} == {2, 6}  # a stage that has not begun
        assert bool(differences(before, now)) != same, (i, j)


@pytest.mark.parametrize("value", [0, 12345, None, "text", True])
def test_values_are_readable(value: Any) -> None:
    [line] = differences(
        identity(members=[member("a", tokens=7)], stages=[]), identity(members=[member("a", tokens=value)], stages=[])
    )
    shown = {0: "0", 12345: "12,345", None: "none", "text": "text"}.get(value, "True") if value is not True else "True"
    assert line == f"data set a: tokens 7 then, {shown} now"
