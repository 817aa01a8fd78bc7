"""Files that run code when they are unpickled: they make a file, the canary."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path

from moe_train.checkpoint.index import INDEX, Index, StoredBox, StoredFile, index_bytes, read_index
from moe_train.checkpoint.state import STATE, read_state, state_bytes
from moe_train.checkpoint.torch_index import METADATA
from moe_train.data.files import xxh3_of


class _Payload:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.canary),)


def payload(canary: Path) -> bytes:
    return pickle.dumps(_Payload(canary))


def poison(directory: Path, canary: Path) -> None:
    """A checkpoint whose every pickle is the payload: torch's index, and the one inside of each stored tensor. Sizes,
    places and checksums are right, so that nothing is refused as damaged."""
    (directory / METADATA).write_bytes(payload(canary))
    old, new = read_index(directory), Index()
    new.tensors = old.tensors
    for name in old.files:
        content, written = (directory / name).read_bytes(), b""
        for box in (box for box in old.boxes if box.file == name):
            archive = _poisoned(content[box.start : box.start + box.length], canary)
            new.boxes.append(StoredBox(box.key, box.offsets, box.sizes, name, len(written), len(archive)))
            written += archive
        (directory / name).write_bytes(written)
        new.files[name] = StoredFile(len(written), xxh3_of(io.BytesIO(written)))
    state = read_state(directory)
    state.pop("index_checksum", None)
    (directory / INDEX).write_bytes(index_bytes(new))
    (directory / STATE).write_bytes(state_bytes(state, index_bytes(new)))


def _poisoned(archive: bytes, canary: Path) -> bytes:
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(result, "w", zipfile.ZIP_STORED) as new:
        for record in old.infolist():
            with old.open(record) as stream:
                stream._expected_crc = None  # type: ignore[attr-defined]  # they are written without
                content = stream.read()
            is_pickle = record.filename.endswith("/data.pkl")
            new.writestr(record.filename, payload(canary) if is_pickle else content)
    return result.getvalue()
