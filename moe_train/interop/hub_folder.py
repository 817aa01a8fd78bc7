"""A model folder as the hub has it: config.json and safetensors files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_train.interop.safetensors_file import StoredTensor, read_header

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
_PICKLES = ("*.bin", "*.pt", "*.pth")


def read_json(path: Path) -> dict[str, Any]:
    """Errors: ValueError where it is no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no object")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """Errors: ValueError where the folder is no model's."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; download a model first, for example with `hf download`")
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is no model of Hugging Face's: it has no {CONFIG}")
    return read_json(folder / CONFIG)


def tensors_of(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a model folder by name, in the order in which they lie in the files.

    Errors: ValueError where files are missing or damaged, where a name is in two files, or where the index and the
    files disagree.
    """
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise ValueError(
                f"{folder} has its weights as pickles only ({pickles[0]}), which may run any code when they are read: "
                "take a version of the model with safetensors, or convert them by transformers' save_pretrained"
            )
        raise ValueError(f"{folder} has no weights: neither {SINGLE} nor {INDEX}")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX} is damaged: it has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or Path(file).name != file:
            raise ValueError(f"{folder / INDEX} is damaged: {name} is in {file!r}, which is no file of the folder")
    found: dict[str, StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        if not (folder / file).is_file():
            raise ValueError(f"{folder} lacks {file}, which {INDEX} names: download the rest of the model")
        for name, tensor in read_header(folder / file).items():
            if name in found:
                raise ValueError(f"{name} is in {found[name].path.name} and in {file}")
            found[name] = tensor
    wrong = [name for name, file in weight_map.items() if name not in found or found[name].path.name != file]
    if wrong or len(found) != len(weight_map):
        name = wrong[0] if wrong else next(name for name in found if name not in weight_map)
        raise ValueError(f"{folder / INDEX} and the files disagree about {name}: they are of different versions")
    return found
