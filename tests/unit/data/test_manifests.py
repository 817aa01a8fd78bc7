"""Manifests that say less than prepare writes, none at all, and sidecars of another preparation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_train.cli import main
from moe_train.data.manifest import (
    content_of,
    manifest_path,
    read_manifest,
    read_token_bytes,
    token_bytes_path,
    tokenizer_of,
)
from moe_train.data.members import check_one_tokenizer
from moe_train.data.prepare import prepare
from moe_train.data.sources import find_sources


@pytest.fixture
def prepared(tmp_path: Path, tokenizer: Any, write_parquet: Callable[..., Path], make_texts: Any) -> Path:
    source = write_parquet(tmp_path / "in.parquet", make_texts(1, 12))
    prepare(find_sources([source]), tmp_path / "x", tokenizer)
    return tmp_path / "x"


def without(prefix: Path, *keys: str) -> None:
    manifest = read_manifest(prefix)
    place = manifest
    for key in keys[:-1]:
        place = place[key]
    del place[keys[-1]]
    manifest_path(prefix).write_text(json.dumps(manifest))


@pytest.mark.parametrize("keys", [("tokenizer",), ("tokenizer", "checksum"), ("tokenizer", "vocab_size")])
def test_a_manifest_that_does_not_name_the_tokenizer(prepared: Path, keys: tuple[str, ...]) -> None:
    """Whether data sets fit each other or the model cannot be said then: refused, with what is missing."""
    without(prepared, *keys)
    words = (
        f"x.manifest.json does not name the tokenizer.*{keys[-1] if len(keys) > 1 else 'checksum'}.*take the manifest"
    )
    for read in (lambda: check_one_tokenizer([str(prepared)]), lambda: tokenizer_of(prepared)):
        with pytest.raises(ValueError, match=words):
            read()
    with pytest.raises(ValueError, match=words):
        read_token_bytes(prepared)


@pytest.mark.parametrize("key", ["text_bytes", "tokenizer", "sources", "skipped", "domains", "documents", "options"])
def test_inspect_shows_what_a_manifest_does_say(prepared: Path, capsys: pytest.CaptureFixture[str], key: str) -> None:
    before = content_of(prepared)
    assert main(["inspect", str(prepared)]) == 0
    whole = capsys.readouterr().out
    assert "(the manifest does not say)" not in whole
    without(prepared, key)
    assert main(["inspect", str(prepared)]) == 0
    out = capsys.readouterr().out
    said = key in ("text_bytes", "tokenizer", "sources")
    assert out.count("(the manifest does not say)") == said and out.splitlines()[0] == whole.splitlines()[0]
    after = content_of(prepared)
    assert after is not None and (after == before) == (key in ("skipped", "domains"))


@pytest.mark.parametrize(
    "content",
    ['{"sources": [1, 2]}', '{"sources": 3}', '{"tokenizer": "a"}', '{"files": ["x.idx"]}', '{"domains": [1]}'],
)
def test_a_manifest_of_something_else(prepared: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    manifest_path(prepared).write_text(content)
    [key] = json.loads(content)
    with pytest.raises(ValueError, match=f"x.manifest.json is damaged: {key}"):
        content_of(prepared)
    assert main(["inspect", str(prepared)]) == 2
    assert f"x.manifest.json is damaged: {key}" in capsys.readouterr().err


@pytest.mark.parametrize("change", [-1, 1])
def test_token_bytes_of_another_tokenizer(prepared: Path, change: int) -> None:
    table = read_token_bytes(prepared)
    np.save(token_bytes_path(prepared), np.resize(table, len(table) + change))
    with pytest.raises(ValueError, match=f"{len(table) + change} entries, but the tokenizer.* has {len(table)} tokens"):
        read_token_bytes(prepared)


def test_data_without_a_manifest(tmp_path: Path, write_tokens: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """As Megatron's own tools write it."""
    write_tokens(tmp_path / "p", [5, 9])
    check_one_tokenizer([str(tmp_path / "p")])
    assert content_of(tmp_path / "p") is None
    assert main(["inspect", str(tmp_path / "p")]) == 0
    assert "tokenizer and domains are not known" in capsys.readouterr().out
