"""state.json: everything of a checkpoint that is no tensor. A folder is a checkpoint when it holds this file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

from moe_train.parallel.passing import may_pass

FORMAT = 3
STATE = "state.json"
_CHECKSUM = "checksum"
_INDEX = "index_checksum"


def state_bytes(state: dict[str, Any], index: bytes) -> bytes:
    """The content of state.json; ``index``: that of index.json."""
    # As it will be read: JSON has no tuples and no numbers as keys.
    content = json.loads(json.dumps({"format": FORMAT, **state, _INDEX: xxhash.xxh3_128_hexdigest(index)}))
    return json.dumps({**content, _CHECKSUM: _checksum(content)}, indent=1).encode()


def read_state(directory: Path) -> dict[str, Any]:
    """The non-tensor state of a checkpoint. ValueError when it is not one of ours, damaged, or of another format;
    OSError where that cannot be said now, as the disk is away."""
    try:
        state = json.loads((directory / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if may_pass(error):
            raise
        raise ValueError(f"{directory} is not a checkpoint of moe_train ({error})") from error
    if not isinstance(state, dict):
        raise ValueError(f"{directory} is not a checkpoint of moe_train ({STATE} holds no object)")
    if state.get("format") != FORMAT:
        raise ValueError(
            f"{directory} has checkpoint format {state.get('format')}; this version reads {FORMAT}: go on with the "
            "version of moe_train that wrote it, or export the model with that one and import it here"
        )
    if state.pop(_CHECKSUM, None) != _checksum(state):
        raise ValueError(f"{directory / STATE} is damaged: its checksum is another one")
    return state


def read_state_with_config(directory: Path) -> dict[str, Any]:
    """Likewise, for who needs the step and the configuration only: ValueError too where these are missing."""
    state = read_state(directory)
    for key, kind in {"config": dict, "step": int}.items():
        if not isinstance(state.get(key), kind):
            raise ValueError(f"{directory / STATE} is damaged: {key} is {state.get(key)!r}")
    return state


def has_index(state: dict[str, Any], index: bytes) -> bool:
    """Whether this index.json is the one that the state was written with."""
    return state.get(_INDEX) == xxhash.xxh3_128_hexdigest(index)


def _checksum(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
