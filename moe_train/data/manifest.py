"""What `prepare` writes next to the tokens of a prefix, and how to read it back."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from moe_train.data.tokenizers import IdArray, Tokenizer, load_tokenizer

_KINDS: dict[str, type] = {
    "sources": list,
    **dict.fromkeys(("tokenizer", "options", "domains", "skipped", "files"), dict),
    **dict.fromkeys(("documents", "tokens", "text_bytes"), int),
}
"""Of what the keys are that others than prepare read."""


def manifest_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.manifest.json")


def token_bytes_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.token_bytes.npy")


def read_manifest(prefix: str | Path) -> dict[str, Any]:
    """The manifest of a prefix (docs/data.md lists its keys).

    Errors: FileNotFoundError for data that `prepare` did not write, ValueError for a damaged file.
    """
    path = manifest_path(prefix)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; it is written by prepare")
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{path} is damaged: it holds no object")
    for key, kind in _KINDS.items():
        if key in manifest and not isinstance(manifest[key], kind):
            raise ValueError(f"{path} is damaged: {key} is {type(manifest[key]).__name__} in place of {kind.__name__}")
    if not all(isinstance(source, dict) for source in manifest.get("sources", [])):
        raise ValueError(f"{path} is damaged: sources does not list objects")
    return manifest


def recorded_tokenizer(prefix: str | Path) -> dict[str, Any]:
    """What the manifest of a prefix says about the tokenizer: file, checksum, vocab_size, eod_id, eod_token.

    Errors: as those of `read_manifest`; ValueError where one of these is missing.
    """
    recorded = read_manifest(prefix).get("tokenizer", {})
    wanted = ("file", "checksum", "vocab_size", "eod_id", "eod_token")
    missing = [key for key in wanted if key not in recorded]
    if missing:
        raise ValueError(
            f"{manifest_path(prefix)} does not name the tokenizer (no {', '.join(missing)} under tokenizer): it is "
            "damaged or not written by prepare. Prepare the data again, or take the manifest away to use the tokens "
            "without it"
        )
    return dict(recorded)


def content_of(stem: str | Path) -> str | None:
    """Changes with what a prepared data set holds: sources, options, tokenizer. None without a manifest."""
    if not manifest_path(stem).is_file():
        return None
    manifest = read_manifest(stem)
    facts = [manifest.get(key) for key in ("options", "tokenizer", "documents", "tokens", "text_bytes")]
    facts.append([{**source, "changed": None} for source in manifest.get("sources", [])])
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def read_token_bytes(prefix: str | Path) -> IdArray:
    """[V] int32: bytes of text per token id, V the tokenizer's vocabulary; 0 for special tokens.

    Errors: FileNotFoundError, ValueError for a damaged file, or one that is not of the tokenizer in the manifest.
    """
    path = token_bytes_path(prefix)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; it is written by prepare, and bits per byte need it")
    try:
        table = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if table.ndim != 1 or table.dtype != np.int32:
        raise ValueError(f"{path} is damaged: expected one row of int32, found {table.dtype} of shape {table.shape}")
    vocab_size = recorded_tokenizer(prefix)["vocab_size"] if manifest_path(prefix).is_file() else len(table)
    if len(table) != vocab_size:
        raise ValueError(
            f"{path} has {len(table)} entries, but the tokenizer that the manifest names has {vocab_size} tokens: the "
            "files are of different preparations; copy them again"
        )
    return table


def tokenizer_of(prefix: str | Path) -> Tokenizer:
    """The tokenizer that a prefix was written with, from the copy in its folder.

    Errors: FileNotFoundError where the copy is gone, ValueError where it is another one.
    """
    recorded = recorded_tokenizer(prefix)
    tokenizer = load_tokenizer(Path(prefix).parent / recorded["file"], recorded["eod_token"])
    if tokenizer.checksum != recorded["checksum"]:
        raise ValueError(f"{tokenizer.path} is not the tokenizer that {prefix} was written with")
    return tokenizer
