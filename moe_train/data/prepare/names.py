"""The names of what a preparation writes.

A stem is PREFIX, or PREFIX_train, PREFIX_validation, PREFIX_test where there is a split; a PREFIX that ends in a slash
adds nothing to the names in that folder. Tokens are in STEM_text_document.bin and .idx, as Megatron names them, or in
STEM_00000_text_document.bin, STEM_00001_text_document.bin, … where there are shards.
"""

from __future__ import annotations

import os
from pathlib import Path


def stem_of(prefix: str, split: str) -> Path:
    """ValueError for a prefix without a name where no split gives one."""
    folder, name = os.path.split(prefix)
    parts = [part for part in (name, split) if part]
    if not parts:
        raise ValueError(f"{prefix} is a folder: name the files in it, as {prefix}fineweb")
    return Path(folder) / "_".join(parts)


def token_prefix(stem: Path, shard: int | None, stream: str = "text") -> Path:
    number = "" if shard is None else f"_{shard:05d}"
    return Path(f"{stem}{number}_{stream}_document")


def work_folder(prefix: str) -> Path:
    """Where the parts of an unfinished job are."""
    folder, name = os.path.split(prefix)
    return Path(folder) / f"{name or 'prepare'}.work"
