"""The files beside the weights: tokenizers, and what a model came with."""

from __future__ import annotations

import shutil
from pathlib import Path

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "spiece.model",
)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".index.json")
_LARGEST = 64 * 2**20


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copies the files of a tokenizer; returns their names."""
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def copy_others(source: Path, target: Path, without: tuple[str, ...] = ()) -> list[str]:
    """Copies the small files of a folder that are neither weights nor a tokenizer's, nor named ``without``."""
    names = []
    for path in sorted(source.iterdir()):
        skip = path.name in (*TOKENIZER_FILES, *without) or path.name.startswith(".") or path.name.endswith(_WEIGHTS)
        if path.is_file() and not skip and path.stat().st_size <= _LARGEST:
            shutil.copyfile(path, target / path.name)
            names.append(path.name)
    return names
