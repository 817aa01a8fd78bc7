"""The rooms of the house: imports go downward only, and routing needs nothing but torch."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "moe_train"
ROOMS = (
    "cli",
    "commands",
    "api",
    "lab",
    "launch",
    "training",
    "evaluation",
    "interop",
    "checkpoint",
    "model",
    "routing",
    "data",
    "parallel",
    "config",
)
"""From top to bottom; a room imports itself and rooms below it."""
HEAVY = {"torch", "deepspeed", "megatron", "transformers", "numpy", "pyarrow", "pydantic", "omegaconf"}


def files(room: str) -> list[Path]:
    single = PACKAGE / f"{room}.py"
    return [single] if single.exists() else sorted((PACKAGE / room).rglob("*.py"))


def imports(source: str, top_level_only: bool = False) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import, also inside functions; those for type checkers alone count as well."""
    tree = ast.parse(source)
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import hides the room"
            yield node.lineno, node.module or ""
            if node.module == "moe_train":
                yield from ((node.lineno, f"moe_train.{alias.name}") for alias in node.names)


def upward(room: str, source: str) -> list[tuple[int, str]]:
    """Imports of ``source`` in ``room`` that go to a higher room."""
    found = []
    for line, name in imports(source):
        parts = name.split(".")
        if parts[0] == "moe_train" and len(parts) > 1 and parts[1] in ROOMS:
            if ROOMS.index(parts[1]) < ROOMS.index(room):
                found.append((line, name))
    return found


def test_every_folder_is_a_room() -> None:
    there = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix in ("", ".py")}
    assert there - {"__init__", "__main__", "__pycache__"} <= set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_downward(room: str) -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{line} imports {name}"
        for path in files(room)
        for line, name in upward(room, path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


def test_an_upward_import_would_be_seen() -> None:
    source = "import os\ndef f():\n    from moe_train.training.engine import Engine\n"
    assert upward("model", source) == [(3, "moe_train.training.engine")]
    assert upward("launch", source) == []
    assert upward("config", "from moe_train import data") == [(1, "moe_train.data")]


def test_routing_needs_torch_alone() -> None:
    """So that one gate can be taken into another project."""
    foreign = [
        f"{path.relative_to(PACKAGE)}:{line} imports {name}"
        for path in files("routing")
        for line, name in imports(path.read_text(encoding="utf-8"))
        if name.split(".")[0] not in {"torch", *sys.stdlib_module_names} and not name.startswith("moe_train.routing")
    ]
    assert not foreign, "\n".join(foreign)


@pytest.mark.parametrize("room", ["cli", "commands", "api"])
def test_commands_are_cheap_to_import(room: str) -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{line} imports {name}"
        for path in files(room)
        for line, name in imports(path.read_text(encoding="utf-8"), top_level_only=True)
        if name.split(".")[0] in HEAVY or (name.startswith("moe_train.") and name.split(".")[1] in ROOMS[2:])
    ]
    assert not found, "\n".join(found)
