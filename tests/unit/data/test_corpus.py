from __future__ import annotations

import json
import platform
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from moe_train.data import corpus
from moe_train.data.corpus import write_stdlib_corpus

FINEWEB = [
    "text",
    "id",
    "dump",
    "url",
    "date",
    "file_path",
    "language",
    "language_score",
    "token_count",
]


def module(seed: int, functions: int = 30) -> str:
    rng = random.Random(seed)
    lines = [f'"""Module {seed} of a small library, with a longer description {rng.random()}."""\n\n']
    for i in range(functions):
        name = f"f{rng.randrange(10**6)}"
        lines.append(
            f'def {name}(x):\n    """Adds {rng.random()} to what {name} was given."""\n    return x + {i}\n\n\n'
        )
    return "".join(lines)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small standard library without a `test` package, with files that must be left out."""
    root = tmp_path / "python"
    files = {f"m{i}.py": module(i).encode() for i in range(6)}
    files["package/__init__.py"] = module(100).encode()
    files["package/copy_of_m3.py"] = module(3).replace("x + 1", "x + 2").encode()
    files["latin.py"] = b"# -*- coding: latin-1 -*-\n# caf\xe9\n" + module(7).encode()
    files["broken.py"] = module(8).encode() + b"def oops(:\n"
    files["tiny.py"] = b"# licence\n"
    files["windows.py"] = module(9).replace("\n", "\r\n").encode()
    for left_out in ("site-packages/a.py", "test/a.py", "m/tests/a.py", "config-3.11-x/a.py", "_sysconfigdata_a.py"):
        files[left_out] = module(200).encode()
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(root))
    return root


def rows(output: Path) -> list[dict]:
    return pq.read_table(output / "stdlib.parquet").to_pylist()


def test_columns_domains_and_origin(library: Path, tmp_path: Path) -> None:
    facts = write_stdlib_corpus(tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / "stdlib.parquet")
    assert table.column_names == FINEWEB
    found = {(row["dump"], row["file_path"]): row for row in table.to_pylist()}
    names = {name for domain, name in found if domain == "source"}
    assert names == {f"m{i}.py" for i in range(6)} | {
        "package/__init__.py",
        "package/copy_of_m3.py",
        "broken.py",
        "windows.py",
    }
    assert {domain for domain, _ in found} == {"source", "docstring", "topic"}
    # Nothing is done to the text, not even to its line ends.
    assert found["source", "windows.py"]["text"].encode() == (library / "windows.py").read_bytes()
    text = found["docstring", "package/__init__.py"]["text"]
    assert (
        text.startswith("package\n\nModule 100 of a small library") and "package.f" in text and "return x" not in text
    )
    assert ("docstring", "broken.py") not in found
    assert len({row["id"] for row in found.values()}) == len(found)
    assert facts["python"] == platform.python_version()
    assert sum(counts["documents"] for counts in facts["domains"].values()) == len(found)
    assert facts == json.loads((tmp_path / "out" / "stdlib.json").read_text())


def test_docstrings_and_near_duplicates_share_a_group(library: Path, tmp_path: Path) -> None:
    write_stdlib_corpus(tmp_path / "out")
    group = {row["id"]: row["url"] for row in rows(tmp_path / "out")}
    together = {
        group[f"{domain}/{n}"] for domain in ("source", "docstring") for n in ("m3.py", "package/copy_of_m3.py")
    }
    assert len(together) == 1
    assert len({group[f"source/m{i}.py"] for i in range(6)}) == 6


def test_is_deterministic_and_follows_the_text(library: Path, tmp_path: Path) -> None:
    first = write_stdlib_corpus(tmp_path / "a")
    assert write_stdlib_corpus(tmp_path / "b") == first
    assert (tmp_path / "a/stdlib.parquet").read_bytes() == (tmp_path / "b/stdlib.parquet").read_bytes()
    before = (tmp_path / "a/stdlib.parquet").stat()
    write_stdlib_corpus(tmp_path / "a")
    assert (tmp_path / "a/stdlib.parquet").stat() == before
    (library / "m0.py").write_text(module(1000))
    assert write_stdlib_corpus(tmp_path / "a")["content_sha256"] != first["content_sha256"]
    assert (tmp_path / "a/stdlib.parquet").stat() != before


def test_size_cap_keeps_whole_groups(library: Path, tmp_path: Path) -> None:
    everything = write_stdlib_corpus(tmp_path / "all")
    facts = write_stdlib_corpus(tmp_path / "some", max_bytes=15_000)
    total = sum(len(row["text"].encode()) for row in rows(tmp_path / "some"))
    assert 7_000 < total <= 15_000 and facts["domains"] != everything["domains"]
    groups = {row["url"] for row in rows(tmp_path / "some")}
    expected = {row["id"] for row in rows(tmp_path / "all") if row["url"] in groups}
    assert {row["id"] for row in rows(tmp_path / "some")} == expected


def test_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path / "nowhere"))
    monkeypatch.setattr(corpus, "_topics", list)
    with pytest.raises(ValueError, match="no text of the standard library found in .*nowhere"):
        write_stdlib_corpus(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_of_this_interpreter(tmp_path: Path) -> None:
    facts = write_stdlib_corpus(tmp_path)
    assert facts["domains"]["source"]["documents"] > 200
    assert facts["domains"]["docstring"]["bytes"] > 500_000
    assert sum(counts["bytes"] for counts in facts["domains"].values()) <= 12_000_000
