"""Which job it is: the facts that decide the result, what has finished, what was begun."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import moe_train
from moe_train.data.files import write_atomically
from moe_train.data.manifest import manifest_path, read_manifest
from moe_train.data.prepare.names import stem_of
from moe_train.data.prepare.options import SPLITS, PrepareOptions
from moe_train.data.prepare.part import CHECKSUM
from moe_train.data.prepare.work import checksum_name, checksum_of
from moe_train.data.sources import SourceFile
from moe_train.data.sources.discovery import corpus_facts
from moe_train.data.tokenizers import Tokenizer

FORMAT = 3
PARTS = 2
"""How unfinished work is kept."""


def job_facts(files: Sequence[SourceFile], tokenizer: Tokenizer, options: PrepareOptions) -> dict[str, Any]:
    """What decides the result. Two jobs are the same where these facts are equal."""
    return {
        "format": FORMAT,
        "version": moe_train.__version__,
        "sources": [{"name": f.name, "kind": f.kind, "size": f.size, "changed": f.version} for f in files],
        "tokenizer": {
            "file": tokenizer.copy_name,
            "checksum": tokenizer.checksum,
            "vocab_size": tokenizer.vocab_size,
            "eod_id": tokenizer.eod_id,
            "eod_token": tokenizer.piece(tokenizer.eod_id),
        },
        "options": json.loads(json.dumps(asdict(options))),
        "corpora": {
            f.name: facts
            for f in files
            if f.is_local and f.kind == "parquet" and (facts := corpus_facts(Path(f.path))) is not None
        },
    }


def finished(
    prefix: str, files: Sequence[SourceFile], job: dict[str, Any], options: PrepareOptions
) -> dict[str, dict[str, Any]] | None:
    """The manifest of each split where this job has finished; None where none has.

    Errors: ValueError where another job has; the message says what differs.
    """
    found = {}
    for split in ("", *SPLITS):
        if not split and not os.path.basename(prefix):
            continue
        stem = stem_of(prefix, split)
        if not manifest_path(stem).is_file() or read_manifest(stem).get("split") != split:
            continue
        manifest = read_manifest(stem)
        differences = _differences(manifest, job, files)
        if differences:
            raise ValueError(
                f"{stem} holds the result of a different job; choose another output or delete it. Different are "
                + "; ".join(differences)
            )
        found[split] = manifest
    complete = set(found) == set(options.splits) and all(_whole(stem_of(prefix, s), m) for s, m in found.items())
    return found if complete else None


def check_free(stems: Iterable[Path]) -> None:
    """ValueError where files of another program, or of a result whose manifest is gone, are in the way."""
    for stem in stems:
        if manifest_path(stem).is_file() or not stem.parent.is_dir():
            continue
        name = re.escape(stem.name)
        own = re.compile(
            rf"{name}((_\d{{5}})?_(text|loss)_document\.(bin|idx)|\.documents\.parquet|\.token_bytes\.npy)"
        )
        there = sorted(path.name for path in stem.parent.iterdir() if own.fullmatch(path.name))
        if there:
            raise ValueError(
                f"{stem.parent / there[0]} is in the way ({len(there)} such files), and no manifest says that this job "
                "wrote it; choose another output or delete it"
            )


def begin(folder: Path, job: dict[str, Any], engine: str, files: Sequence[SourceFile]) -> None:
    """Notes in the work folder which job it is for.

    Errors: ValueError where it is for another one, and some of that is done.
    """
    path = folder / "job.json"
    state = job | {"engine": engine, "parts": PARTS}
    before = json.loads(path.read_text()) if path.is_file() else None
    if before == state:
        return
    if before is not None and next(folder.glob("[0-9]*.json"), None) is not None:
        # What is done has met nothing that is to stop the job, and was read from what is still there.
        compared = before | {"options": before["options"] | _harmless(before["options"], state["options"])}
        same = len(before["sources"]) == len(state["sources"]) and all(
            _same(b | {CHECKSUM: _checksum_of(folder, number)}, now, file)
            for number, (b, now, file) in enumerate(zip(before["sources"], state["sources"], files, strict=False))
        )
        compared |= {"sources": state["sources"]} if same else {}
        differences = [
            _difference(key, compared.get(key), state[key]) for key in state if compared.get(key) != state[key]
        ]
        if differences:
            raise ValueError(
                f"{folder} holds an unfinished job that differs; finish that one, or delete the folder. Different are "
                + "; ".join(differences)
            )
    write_atomically(path, json.dumps(state).encode())


def _harmless(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Options that may change under way: to leave out what would have stopped the job."""
    changed = {"on_bad": now["on_bad"]} if before["on_bad"] == "stop" else {}
    return changed | ({"stop_on": now["stop_on"]} if set(now["stop_on"]) <= set(before["stop_on"]) else {})


def _checksum_of(folder: Path, source: int) -> str | None:
    path = folder / checksum_name(source)
    return json.loads(path.read_text()).get(CHECKSUM) if path.is_file() else None


def _differences(manifest: dict[str, Any], job: dict[str, Any], files: Sequence[SourceFile]) -> list[str]:
    different = [
        _difference(key, manifest.get(key), job[key])
        for key in job
        if key not in ("version", "sources") and manifest.get(key) != job[key]
    ]
    before, now = manifest.get("sources", []), job["sources"]
    unread = {CHECKSUM: None}  # nothing was taken from it, so it may be another one of this size
    same = len(before) == len(now) and all(
        _same(b, n, f) or (b | unread == b and {**b, "changed": 0} == {**n, **unread, "changed": 0})
        for b, n, f in zip(before, now, files, strict=True)
    )
    return different if same else [*different, _difference("sources", before, now)]


def _same(before: dict[str, Any], now: dict[str, Any], file: SourceFile) -> bool:
    """A file that was only touched or copied is the same: its checksum is read where times differ."""
    if any(before.get(key) != now[key] for key in ("name", "kind", "size")):
        return False
    if before.get("changed") == now["changed"]:
        return True
    return before.get(CHECKSUM) is not None and before[CHECKSUM] == checksum_of(file)


def _difference(key: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
        return ", ".join(f"{key}.{n}: {_short(before.get(n))} there, {_short(now.get(n))} now" for n in changed)
    if isinstance(before, list) and isinstance(now, list):
        gone, new = [one for one in before if one not in now], [one for one in now if one not in before]
        return f"{key}: {_short(gone)} there, {_short(new)} now"
    return f"{key}: {_short(before)} there, {_short(now)} now"


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 300 else text[:297] + "..."


def _whole(stem: Path, manifest: dict[str, Any]) -> bool:
    files = manifest["files"]
    return all((path := stem.parent / name).is_file() and path.stat().st_size == size for name, size in files.items())
