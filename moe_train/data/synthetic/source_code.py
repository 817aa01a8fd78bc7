"""Domain code: small Python modules that run, and whose assertions hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moe_train.data.synthetic.draw import Draw
from moe_train.data.synthetic.grammar import Writer

WORDS = {
    "noun": (
        "node edge packet token buffer record column pixel frame cell chunk bucket vector symbol event sample weight"
    ).split(),
    "verb": ("collect", "compute", "derive", "extract", "measure", "reduce", "resolve", "scan"),
    "adjective": ("sparse", "cached", "pending", "stale", "sorted", "nested", "atomic", "lazy", "shared", "virtual"),
    "purpose": ("the scheduler", "the parser", "the allocator", "the compiler", "the serializer", "the event loop"),
    "result": ("total", "count", "best", "output", "state"),
    "index": ("i", "j", "k", "n"),
    "note": (
        "TODO: handle overflow",
        "runs in linear time",
        "not thread-safe",
        "the caller owns the list",
        "must not raise",
        "keeps the input unchanged",
    ),
}


@dataclass(frozen=True)
class Template:
    """Source of a function with the slots `name`, `items`, `result`, `item`, `number`, and the same in Python."""

    source: str
    value: Callable[[list[int], int], Any]


TEMPLATES = (
    Template(
        """def {name}({items}: list[int]) -> int:
    \"\"\"Sum of the {noun}s, each {number} times.\"\"\"
    {result} = 0
    for {item} in {items}:
        {result} += {number} * {item}
    return {result}
""",
        lambda values, number: number * sum(values),
    ),
    Template(
        """def {name}({items}: list[int]) -> int:
    \"\"\"How many {noun}s are larger than {number}; {note}.\"\"\"
    {result} = 0
    for {item} in {items}:
        if {item} > {number}:
            {result} += 1
    return {result}
""",
        lambda values, number: sum(value > number for value in values),
    ),
    Template(
        """def {name}({items}: list[int]) -> list[int]:
    # {note}
    {result} = []
    for {item} in {items}:
        if {item} % {number} == 0:
            {result}.append({item})
    return {result}
""",
        lambda values, number: [value for value in values if value % number == 0],
    ),
    Template(
        """def {name}({items}: list[int]) -> int:
    \"\"\"The largest {adjective} {noun}, but never above {number}.\"\"\"
    {result} = {items}[0]
    {index} = 1
    while {index} < len({items}):
        {result} = max({result}, {items}[{index}])
        {index} += 1
    return min({result}, {number})
""",
        lambda values, number: min(max(values), number),
    ),
    Template(
        """def {name}({items}: list[int]) -> dict[int, int]:
    \"\"\"Counts each {noun} modulo {number} for {purpose}.\"\"\"
    {result}: dict[int, int] = {}
    for {item} in {items}:
        {result}[{item} % {number}] = {result}.get({item} % {number}, 0) + 1
    return {result}
""",
        lambda values, number: {
            rest: sum(value % number == rest for value in values) for rest in dict.fromkeys(v % number for v in values)
        },
    ),
    Template(
        """def {name}({items}: list[int]) -> list[tuple[int, int]]:
    # {note}
    return [({index}, {item}) for {index}, {item} in enumerate({items}) if {item} >= {number}]
""",
        lambda values, number: [(index, value) for index, value in enumerate(values) if value >= number],
    ),
)


def document(draw: Draw) -> str:
    writer = Writer(WORDS, draw)
    writer.fix(subject="{noun}", kind="{adjective}")
    parts = [writer.fill('"""Helpers for {kind} {subject}s in {purpose}; {note}."""') + "\n"]
    assertions: list[str] = []
    names: set[str] = set()
    for template in draw.some(TEMPLATES, draw.between(1, 3)):
        source, assertion, name = _function(writer, template, names)
        names.add(name)
        parts.append(source)
        assertions.append(assertion)
    if draw.below(2):
        parts.append(_class(writer))
    body = "\n".join(f"    {line}" for line in assertions)
    parts.append(writer.fill("def test_{subject}s() -> None:") + f"\n{body}\n")
    return "\n\n".join(parts)


def _function(writer: Writer, template: Template, taken: set[str]) -> tuple[str, str, str]:
    """Source of a function, an assertion about it, and its name, which is none of those taken."""
    draw = writer.draw
    writer.facts |= {"number": str(number := draw.between(2, 40))}
    for fact in ("noun", "index", "result"):
        writer.facts.pop(fact, None)
    writer.fix(noun="{noun}", index="{index}", result="{result}")
    writer.fix(items="{noun}s", item="{noun}")
    while (name := writer.fill("{verb}_{adjective}_{noun}s")) in taken:
        pass
    writer.facts["name"] = name
    values = [draw.between(0, 60) for _ in range(draw.between(2, 6))]
    return writer.fill(template.source), f"assert {name}({values}) == {template.value(values, number)}", name


def _class(writer: Writer) -> str:
    """A class whose methods use the attributes that its initialiser sets."""
    writer.facts.pop("noun", None)
    writer.fix(noun="{noun}")
    writer.facts |= {"class": writer.facts["noun"].capitalize(), "number": str(writer.draw.between(2, 512))}
    return writer.fill(
        "class {class}Pool:\n"
        '    """A(n) {adjective} pool of {noun}s for {purpose}."""\n\n'
        "    def __init__(self, limit: int = {number}) -> None:\n"
        "        self.limit = limit\n"
        "        self.{noun}s: list[int] = []\n\n"
        "    def push(self, {noun}: int) -> bool:\n"
        "        if len(self.{noun}s) >= self.limit:\n"
        "            return False  # {note}\n"
        "        self.{noun}s.append({noun})\n"
        "        return True\n"
    )
