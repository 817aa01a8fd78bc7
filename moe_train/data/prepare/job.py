"""Which job it is: the facts that decide the result, what has finished, what was begun."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import moe_train
from moe_train.data.files import write_atomically
from moe_train.data.manifest import manifest_path, read_manifest
from moe_train.data.prepare.names import stem_of
from moe_train.data.prepare.options import PrepareOptions
from moe_train.data.prepare.work import sha256_of
from moe_train.data.sources import SourceFile
from moe_train.data.tokenizers import Tokenizer

FORMAT = 2


def job_facts(files: Sequence[SourceFile], tokenizer: Tokenizer, options: PrepareOptions) -> dict[str, Any]:
    """What decides the result. Two jobs are the same where these facts are equal."""
    return {
        "format": FORMAT,
        "version": moe_train.__version__,
        "sources": [{"name": f.name, "kind": f.kind, "size": f.size, "changed": f.version} for f in files],
        "tokenizer": {
            "file": f"tokenizer{tokenizer.path.suffix}",
            "checksum": tokenizer.checksum,
            "vocab_size": tokenizer.vocab_size,
            "eod_id": tokenizer.eod_id,
            "eod_token": tokenizer.piece(tokenizer.eod_id),
        },
        "options": json.loads(json.dumps(asdict(options))),
        "corpora": {f.name: facts for f in files if (facts := _corpus_facts(f)) is not None},
    }


def finished(
    prefix: str, files: Sequence[SourceFile], job: dict[str, Any], options: PrepareOptions
) -> dict[str, dict[str, Any]] | None:
    """The manifest of each split where this job has finished; None where none has.

    Errors: ValueError where another job has; the message says what differs.
    """
    found = {}
    for split in options.splits:
        stem = stem_of(prefix, split)
        if manifest_path(stem).is_file():
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


def begin(folder: Path, job: dict[str, Any], engine: str) -> None:
    """Notes in the work folder which job it is for.

    Errors: ValueError where it is for another one.
    """
    path = folder / "job.json"
    state = job | {"engine": engine}
    if path.is_file():
        before = json.loads(path.read_text())
        if before["options"]["on_bad"] == "stop":
            # What is done has met nothing bad.
            before["options"]["on_bad"] = state["options"]["on_bad"]
        differences = [_difference(key, before.get(key), state[key]) for key in state if before.get(key) != state[key]]
        if differences:
            raise ValueError(
                f"{folder} holds an unfinished job that differs; finish that one, or delete the folder. Different are "
                + "; ".join(differences)
            )
    write_atomically(path, json.dumps(state).encode())


def _differences(manifest: dict[str, Any], job: dict[str, Any], files: Sequence[SourceFile]) -> list[str]:
    different = [
        _difference(key, manifest.get(key), job[key])
        for key in job
        if key not in ("version", "sources") and manifest.get(key) != job[key]
    ]
    before, now = manifest.get("sources", []), job["sources"]
    same = len(before) == len(now) and all(_same(b, n, f) for b, n, f in zip(before, now, files, strict=True))
    return different if same else [*different, _difference("sources", before, now)]


def _same(before: dict[str, Any], now: dict[str, Any], file: SourceFile) -> bool:
    """A file that was only touched or copied is the same: its checksum is read where times differ."""
    if any(before.get(key) != now[key] for key in ("name", "kind", "size")):
        return False
    if before.get("changed") == now["changed"]:
        return True
    return before.get("sha256") is not None and before["sha256"] == sha256_of(file)


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


def _corpus_facts(file: SourceFile) -> dict[str, Any] | None:
    """What the JSON file next to a generated corpus says about it."""
    side = Path(file.path).with_suffix(".json")
    if not file.is_local or file.kind != "parquet" or not side.is_file():
        return None
    try:
        facts = json.loads(side.read_text())
    except ValueError as error:
        raise ValueError(f"{side} is damaged: {error}") from error
    return facts if isinstance(facts, dict) and "content_sha256" in facts else None
