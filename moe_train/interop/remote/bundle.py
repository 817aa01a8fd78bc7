"""A gate with all that it needs of the room `routing`, as one file that needs torch alone."""

from __future__ import annotations

import ast
import inspect
from importlib import import_module
from types import ModuleType

from moe_train.routing.registry import gate_class

_ROOM = "moe_train.routing."
_ALWAYS = (_ROOM + "interface", _ROOM + "registry")
"""What the modelling file itself uses."""


def bundle(gate: str) -> str:
    """Python source of a module that defines and registers the gate, with ``build_gate`` and ``TokenBatch``.

    The files of the room stand one behind the other, each behind those that it imports; imports between them are left
    out. Errors: ValueError for an unknown gate, for one that lives outside of the room, and where two files give one
    name to different things.
    """
    home = gate_class(gate).__module__
    if not home.startswith(_ROOM):
        raise ValueError(
            f"gate {gate!r} is defined in {home}, outside of moe_train.routing: put it there to export models with it"
        )
    ordered: dict[str, ModuleType] = {}
    for name in (*_ALWAYS, home):
        _add(name, ordered)
    owners: dict[str, str] = {}
    parts = [f'"""Gate {gate!r} of moe_train, written by `moe-train convert export`; needs torch alone."""\n']
    parts.append("from __future__ import annotations\n")
    for name, module in ordered.items():
        source = inspect.getsource(module)
        for defined in _defined(source):
            other = owners.setdefault(defined, name)
            if other != name:
                raise ValueError(f"{defined} is defined in both {other} and {name}: rename one to export gate {gate!r}")
        parts.append(f"# {name.removeprefix('moe_train.')}\n\n" + _without_own_imports(source, name))
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _add(name: str, ordered: dict[str, ModuleType]) -> None:
    """The module behind those that it imports from the room."""
    if name in ordered:
        return
    module = import_module(name)
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(_ROOM):
            assert node.module is not None
            for alias in node.names:
                imported = getattr(import_module(node.module), alias.name)
                if alias.asname is not None or isinstance(imported, ModuleType):
                    raise ValueError(f"{name} imports the module {alias.name}, or renames it: import its functions")
            _add(node.module, ordered)
    ordered[name] = module


def _defined(source: str) -> set[str]:
    """Names that a file defines at its top level."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def _without_own_imports(source: str, name: str) -> str:
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module == "__future__" or node.module.startswith(_ROOM)):  # type: ignore[union-attr]
            assert node.col_offset == 0, f"{name}, line {node.lineno}: an import inside of a function"
            lines[node.lineno - 1 : node.end_lineno] = [""] * ((node.end_lineno or node.lineno) - node.lineno + 1)
    return "\n".join(lines)
