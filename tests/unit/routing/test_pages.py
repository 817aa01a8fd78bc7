"""What the pages list is what the code has."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from moe_train.routing import Gate, available_gates, balance_statistics, blank_gate
from moe_train.routing.registry import gate_options

ROOT = Path(__file__).resolve().parents[3]


def quoted(text: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", text))


def test_the_page_on_adding_a_gate_names_every_declaration() -> None:
    page = (ROOT / "docs" / "routing" / "index.md").read_text(encoding="utf-8").partition("## Adding a gate")[2]
    declared = {name for name in Gate.__annotations__ if not name.startswith("_")}
    declared |= {name for name, value in vars(Gate).items() if isinstance(value, property)}
    assert {"takes_bias", "state_follows", "mean_k"} <= declared <= quoted(page)
    for text in (page, (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        assert "configs/experiments/gates_small.yaml" in text and "tests/gate_variants.py" in text


def test_every_gate_has_a_row_and_a_page_with_its_options() -> None:
    folder = ROOT / "docs" / "routing"
    index = (folder / "index.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`\w+`.*?) \|.*\[\w+\.md\]\((\w+\.md)\) \|$", index, re.MULTILINE)
    pages = {gate: page for names, page in rows for gate in quoted(names)}
    assert pages.keys() == set(available_gates())
    for gate, page in pages.items():
        text = (folder / page).read_text(encoding="utf-8")
        assert gate in text.splitlines()[0], "its heading"
        missing = {field.name for field in dataclasses.fields(gate_options(gate))} - quoted(text)
        assert not missing, f"{page} says nothing about {missing}"


def test_the_page_on_balancing_names_who_refuses_a_bias() -> None:
    page = (ROOT / "docs" / "routing" / "balancing.md").read_text(encoding="utf-8")
    (sentence,) = re.findall(r"Where nothing is ranked(.*?)it is refused", page, re.DOTALL)
    assert quoted(sentence) == {name for name in available_gates() if not blank_gate(name, {}, 8).takes_bias}


def test_the_page_on_balancing_has_every_statistic() -> None:
    page = (ROOT / "docs" / "routing" / "balancing.md").read_text(encoding="utf-8").partition("## Statistics")[2]
    assert set(re.findall(r"^\| `(\w+)` ", page, re.MULTILINE)) == balance_statistics([1], [1], 1).keys()
