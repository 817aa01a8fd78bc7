"""What the pages list is what the code has."""

from __future__ import annotations

import re
from pathlib import Path

from moe_train.routing import Gate, available_gates, balance_statistics, blank_gate

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


def test_the_page_on_balancing_names_who_refuses_a_bias() -> None:
    page = (ROOT / "docs" / "routing" / "balancing.md").read_text(encoding="utf-8")
    (sentence,) = re.findall(r"Where nothing is ranked(.*?)it is refused", page, re.DOTALL)
    assert quoted(sentence) == {name for name in available_gates() if not blank_gate(name, {}, 8).takes_bias}


def test_the_page_on_balancing_has_every_statistic() -> None:
    page = (ROOT / "docs" / "routing" / "balancing.md").read_text(encoding="utf-8").partition("## Statistics")[2]
    assert set(re.findall(r"^\| `(\w+)` ", page, re.MULTILINE)) == balance_statistics([1], [1], 1).keys()
