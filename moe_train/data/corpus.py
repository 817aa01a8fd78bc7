"""Real text on every machine without a download: the running interpreter's standard library as parquet.

Three domains: `source` (the modules), `docstring` (what is documented in them, read as prose) and `topic` (the
language reference that pydoc shows). Columns are FineWeb's; `dump` holds the domain and `url` the group of a
document. A module's docstrings and its near-duplicates have its group, so that splitting by `url` keeps them together.
"""

from __future__ import annotations

import ast
import hashlib
import json
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_train.data.files import partial_path, publish
from moe_train.data.near_duplicates import Groups, join_near_duplicates

CORPUS_FILE = "stdlib.parquet"
_ROW_GROUP = 256
_SHORTEST = 200  # bytes; below, a document is little more than a licence line
_LEFT_OUT_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "__pycache__", "idle_test", "lib-dynload"}
_LEFT_OUT_FOLDERS |= {"encodings"}  # character tables, all alike
_LEFT_OUT_FILES = {"sitecustomize.py", "usercustomize.py", "topics.py"}  # local files, and the text of the third domain


@dataclass(frozen=True)
class Document:
    domain: str
    name: str
    """Path of the file below the library's folder, or the topic."""
    text: str


def write_stdlib_corpus(output: str | Path, max_bytes: int = 12_000_000) -> dict[str, Any]:
    """Writes OUTPUT/stdlib.parquet and OUTPUT/stdlib.json unless they are there and up to date.

    max_bytes: most bytes of text; groups are taken in the order of a hash of their name as long as they fit.
    Returns the content of the JSON file: hash of ids and texts, interpreter, documents and bytes by domain.
    Errors: ValueError where the interpreter has no readable library.
    """
    documents = stdlib_documents()
    names = group_names(documents)
    chosen = _within(documents, names, max_bytes)
    if not chosen:
        folder = sysconfig.get_path("stdlib")
        raise ValueError(f"no text of the standard library found in {folder} that fits in {max_bytes} bytes")
    facts = _facts([documents[i] for i in chosen], max_bytes)
    parquet = Path(output) / CORPUS_FILE
    side = parquet.with_suffix(".json")
    if parquet.is_file() and side.is_file() and json.loads(side.read_text()) == facts:
        return facts
    parquet.parent.mkdir(parents=True, exist_ok=True)
    _write_parquet(partial_path(parquet), [(documents[i], names[i]) for i in chosen])
    partial_path(side).write_text(json.dumps(facts, indent=2) + "\n")
    publish([parquet, side])
    return facts


def stdlib_documents() -> list[Document]:
    """All documents in the order (domain, name); files that are not UTF-8 or no Python are left out."""
    documents: list[Document] = []
    for name, text in _modules(Path(sysconfig.get_path("stdlib"))):
        documents.append(Document("source", name, text))
        documents.append(Document("docstring", name, _docstrings(name, text)))
    documents += [Document("topic", name, text) for name, text in _topics()]
    documents = [one for one in documents if len(one.text.encode()) >= _SHORTEST]
    return sorted(documents, key=lambda one: (one.domain, one.name))


def group_names(documents: list[Document]) -> list[str]:
    """The group of each document, named after its first member."""
    groups, first_of_module = Groups(len(documents)), dict[str, int]()
    for index, document in enumerate(documents):
        if document.domain != "topic":
            groups.join(index, first_of_module.setdefault(document.name, index))
    join_near_duplicates([document.text for document in documents], groups)
    members = [documents[groups.find(index)] for index in range(len(documents))]
    return [f"stdlib:{member.domain}/{member.name}" for member in members]


def _modules(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        folders = set(name.parts[:-1])
        # `config-*` and `_sysconfigdata*` describe the machine that built the interpreter.
        local = any(part.startswith("config-") for part in folders) or name.name.startswith("_sysconfigdata")
        if local or folders & _LEFT_OUT_FOLDERS or name.name in _LEFT_OUT_FILES:
            continue
        try:
            yield name.as_posix(), path.read_bytes().decode("utf-8")
        except (UnicodeDecodeError, OSError):
            continue


def _docstrings(name: str, source: str) -> str:
    """The docstrings of a module under the names of what they describe; empty where it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the library's authors, not ours
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return "\n".join(_described(tree, module))


def _described(node: ast.AST, name: str) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text and text.strip():
            yield f"{name}\n\n{text}\n"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _described(child, f"{name}.{child.name}")


def _topics() -> list[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return []
    return sorted(topics.items())


def _within(documents: list[Document], names: list[str], max_bytes: int) -> list[int]:
    members: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        members.setdefault(name, []).append(index)
    chosen: list[int] = []
    total = 0
    for name in sorted(members, key=lambda name: hashlib.sha256(name.encode()).digest()):
        size = sum(len(documents[i].text.encode()) for i in members[name])
        if total + size <= max_bytes:
            total += size
            chosen += members[name]
    return sorted(chosen)


def _facts(documents: list[Document], max_bytes: int) -> dict[str, Any]:
    content = hashlib.sha256()
    domains: dict[str, dict[str, int]] = {}
    for one in documents:
        text = one.text.encode()
        content.update(f"{one.domain}/{one.name}\0{len(text)}\0".encode() + text)
        counts = domains.setdefault(one.domain, {"documents": 0, "bytes": 0})
        counts["documents"] += 1
        counts["bytes"] += len(text)
    return {
        "corpus": "standard library",
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "content_sha256": content.hexdigest(),
        "max_bytes": max_bytes,
        "domains": domains,
    }


def _write_parquet(path: Path, rows: list[tuple[Document, str]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {
        "text": pa.array([one.text for one, _ in rows], pa.string()),
        "id": pa.array([f"{one.domain}/{one.name}" for one, _ in rows], pa.string()),
        "dump": pa.array([one.domain for one, _ in rows], pa.string()),
        "url": pa.array([group for _, group in rows], pa.string()),
        "date": pa.array([""] * len(rows), pa.string()),
        "file_path": pa.array([one.name for one, _ in rows], pa.string()),
        "language": pa.array(["en"] * len(rows), pa.string()),
        "language_score": pa.array([1.0] * len(rows), pa.float64()),
        # FineWeb counts GPT-2 tokens; no tokenizer is needed here, so these are words.
        "token_count": pa.array([len(one.text.split()) for one, _ in rows], pa.int64()),
    }
    pq.write_table(pa.table(columns), path, row_group_size=_ROW_GROUP)
