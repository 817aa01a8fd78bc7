"""Text to tokens: OUT/train.* and OUT/validation.*, each document in one of them, exactly once.

Rows are read a few hundred at a time in source order (file name, then row), so memory stays flat but for 4 bytes per
document. All files are written under temporary names and published together at the end, the .idx files last.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import moe_train
from moe_train.data.files import partial_path, publish, sha256_of, write_atomically
from moe_train.data.indexed import idx_path
from moe_train.data.manifest import manifest_path, read_manifest
from moe_train.data.sources import Rows, SourceFile, column_names, find_sources, read_rows, text_column
from moe_train.data.split_writer import SplitWriter
from moe_train.data.tokenizers import Tokenizer

_FORMAT = 1
_PROBLEMS = 100
"""So many rows that could not be read are named in the manifest; all are counted."""


@dataclass(frozen=True)
class PrepareOptions:
    text_column: str = "text"
    id_column: str = "id"
    """Name of a document in the provenance table; rows without one are named after file and row."""
    domain_column: str = "dump"
    """Label of a document; empty where a file has no such column."""
    split_column: str = "url"
    """Documents with the same value stay on one side. The id stands in for a null."""
    validation_fraction: float = 0.05
    """Share of the documents (by hash of the split column) for validation; 0 writes no validation set."""
    split_seed: int = 0
    """Another seed gives another split."""
    on_bad: Literal["stop", "skip"] = "stop"
    """What to do about a row that cannot be read: bad JSON, invalid UTF-8, no text. ``skip`` counts it and goes on."""


@dataclass
class Progress:
    files: int
    """Files begun, of `total_files`."""
    total_files: int
    documents: int
    text_bytes: int
    tokens: int
    seconds: float


def prepare(
    sources: Sequence[str | Path],
    output: str | Path,
    tokenizer: Tokenizer,
    options: PrepareOptions | None = None,
    progress: Callable[[Progress], None] | None = None,
    plain_text: Literal["lines", "document"] | None = None,
) -> dict[str, dict[str, Any]]:
    """Tokenizes sources into `output`; does nothing where the same job has already finished there.

    progress: called after each batch of rows.   plain_text: see `find_sources`.
    Returns the manifest of each split that was written ("train", "validation").
    Errors: FileNotFoundError, ValueError: unreadable sources, missing columns, an empty result, or an output folder
    that holds the result of a different job (the message says what differs).
    """
    options = options or PrepareOptions()
    _check_options(options)
    files = find_sources(sources, plain_text)
    output = Path(output)
    job = _job(files, tokenizer, options)
    splits = ["train", "validation"] if options.validation_fraction > 0 else ["train"]
    finished = _finished(output, splits, job)
    if finished is not None:
        return finished
    keep_tokenizer = _tokenizer_copy(output, tokenizer)
    writers = {split: SplitWriter(output / split, tokenizer) for split in splits}
    try:
        skipped, problems = _tokenize(files, tokenizer, options, writers, progress)
        manifests: dict[str, dict[str, Any]] = {}
        paths: list[Path] = []
        for split, writer in writers.items():
            if writer.documents == 0:
                raise ValueError(_empty_split(split, skipped))
            written = writer.complete()
            sizes = {path.name: partial_path(path).stat().st_size for path in written}
            left_out = {"skipped": dict(skipped), "problems": problems}
            manifests[split] = job | {"split": split} | left_out | writer.facts() | {"files": sizes}
            path = manifest_path(output / split)
            partial_path(path).write_text(json.dumps(manifests[split], indent=2) + "\n")
            paths += [path, *written]
        if keep_tokenizer is not None:
            write_atomically(keep_tokenizer, tokenizer.path.read_bytes())
        publish(sorted(paths, key=lambda path: path.suffix == ".idx"))
    finally:
        for split, writer in writers.items():
            writer.close()
            partial_path(manifest_path(output / split)).unlink(missing_ok=True)
    return manifests


def is_validation(key: str, options: PrepareOptions) -> bool:
    """The side of a document, from the value of its split column alone."""
    digest = hashlib.blake2b(f"{options.split_seed}:{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < options.validation_fraction * 2**64


def _tokenize(
    files: Sequence[SourceFile],
    tokenizer: Tokenizer,
    options: PrepareOptions,
    writers: dict[str, SplitWriter],
    progress: Callable[[Progress], None] | None,
) -> tuple[Counter[str], list[dict[str, Any]]]:
    """Counts of what was skipped by reason, and the first of what could not be read."""
    skipped: Counter[str] = Counter({"null": 0, "empty": 0})
    problems: list[dict[str, Any]] = []
    begin = time.monotonic()
    for number, file in enumerate(files, start=1):
        for rows in read_rows(file, _columns(file, options)):
            values = rows.values
            texts = values[text_column(file, options.text_column)]
            bad = _bad_rows(file, rows, texts, options)
            for i, reason in sorted(bad.items()):
                skipped[reason] += 1
                if len(problems) < _PROBLEMS:
                    problems.append({"file": file.name, "row": rows.first_row + i, "reason": reason})
            kept = [i for i, text in enumerate(texts) if text and i not in bad]
            skipped["null"] += sum(text is None and i not in bad for i, text in enumerate(texts))
            skipped["empty"] += sum(text == "" for text in texts)
            encoded = tokenizer.encode_batch([texts[i] for i in kept])
            for i, ids in zip(kept, encoded, strict=True):
                row = rows.first_row + i
                name = _value(values, options.id_column, i) or f"{file.name}:{row}"
                key = _value(values, options.split_column, i) or name
                side = "validation" if is_validation(key, options) else "train"
                domain = _value(values, options.domain_column, i)
                writers[side].add(ids, texts[i], source=file.name, row=row, id=name, domain=domain)
            for writer in writers.values():
                writer.flush()
            if progress is not None:
                documents, size, tokens = (
                    sum(getattr(writer, name) for writer in writers.values())
                    for name in ("documents", "text_bytes", "tokens")
                )
                progress(Progress(number, len(files), documents, size, tokens, time.monotonic() - begin))
    return skipped, problems


def _columns(file: SourceFile, options: PrepareOptions) -> list[str]:
    """What to read of a file. Parquet must have the split column; elsewhere a document's name stands in for it."""
    have = column_names(file)
    wanted = {text_column(file, options.text_column)}
    if file.kind == "parquet":
        wanted.add(options.split_column)
    others = (options.id_column, options.domain_column, options.split_column)
    return sorted(wanted | {name for name in others if have is None or name in have})


def _bad_rows(file: SourceFile, rows: Rows, texts: list[Any], options: PrepareOptions) -> dict[int, str]:
    """Place -> reason. ValueError for the first one, unless such rows are to be skipped."""
    if file.kind == "parquet":
        _check_texts(texts, file, options)
    bad = rows.bad | {i: "no text" for i, text in enumerate(texts) if not isinstance(text, str | None)}
    if bad and options.on_bad == "stop":
        first = min(bad)
        raise ValueError(
            f"{file.path}, row {rows.first_row + first}: {bad[first]}; --on-bad skip counts and leaves out such rows"
        )
    return bad


def _value(values: dict[str, list[Any]], column: str, row: int) -> str:
    value = values[column][row] if column in values else None
    return "" if value is None else str(value)


def _check_texts(texts: list[Any], file: SourceFile, options: PrepareOptions) -> None:
    if any(not isinstance(text, str | None) for text in texts):
        raise ValueError(f"column {options.text_column} of {file.path} does not hold text")


def _check_options(options: PrepareOptions) -> None:
    if not 0 <= options.validation_fraction < 1:
        raise ValueError(f"validation fraction must be at least 0 and below 1, not {options.validation_fraction}")


def _empty_split(split: str, skipped: Counter[str]) -> str:
    left_out = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
    return (
        f"no document fell to {split} (skipped: {left_out}); use more text, another validation fraction or split seed"
    )


def _job(files: Sequence[SourceFile], tokenizer: Tokenizer, options: PrepareOptions) -> dict[str, Any]:
    """What decides the result. Two jobs are the same where these facts are equal."""
    return {
        "format": _FORMAT,
        "version": moe_train.__version__,
        "sources": [{"name": f.name, "kind": f.kind, "size": f.size, "sha256": sha256_of(f.path)} for f in files],
        "tokenizer": {
            "file": f"tokenizer{tokenizer.path.suffix}",
            "checksum": tokenizer.checksum,
            "vocab_size": tokenizer.vocab_size,
            "eod_id": tokenizer.eod_id,
            "eod_token": tokenizer.piece(tokenizer.eod_id),
        },
        "options": asdict(options),
        "corpora": {f.name: facts for f in files if (facts := _corpus_facts(f)) is not None},
    }


def _corpus_facts(file: SourceFile) -> dict[str, Any] | None:
    """What the JSON file next to a generated corpus says about it."""
    side = file.path.with_suffix(".json")
    if not side.is_file():
        return None
    try:
        facts = json.loads(side.read_text())
    except ValueError as error:
        raise ValueError(f"{side} is damaged: {error}") from error
    return facts if isinstance(facts, dict) and "content_sha256" in facts else None


def _finished(output: Path, splits: list[str], job: dict[str, Any]) -> dict[str, dict[str, Any]] | None:
    """The manifests of this job where it has finished in `output`; None where nothing has.

    Errors: ValueError where another job has.
    """
    there = [split for split in ("train", "validation") if idx_path(output / split).exists()]
    manifests = {}
    for split in there:
        manifest = read_manifest(output / split)
        differences = [
            f"{key}: {_short(manifest.get(key))} there, {_short(job[key])} now"
            for key in job
            if key != "version" and manifest.get(key) != job[key]
        ]
        if differences:
            raise ValueError(
                f"{output / split} holds the result of a different job; choose another output or delete it. "
                + "Different are "
                + "; ".join(differences)
            )
        manifests[split] = manifest
    complete = there == splits and all(_whole(output / split) for split in splits)
    return manifests if complete else None


def _whole(prefix: Path) -> bool:
    sizes = read_manifest(prefix)["files"]
    return all((path := prefix.parent / name).is_file() and path.stat().st_size == size for name, size in sizes.items())


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 300 else text[:297] + "..."


def _tokenizer_copy(output: Path, tokenizer: Tokenizer) -> Path | None:
    """Where to copy the tokenizer so that the folder explains itself; None where it is there already."""
    path = output / f"tokenizer{tokenizer.path.suffix}"
    if not path.exists():
        return path
    if sha256_of(path) != tokenizer.checksum:
        raise ValueError(f"{path} is another tokenizer than {tokenizer.path}; choose another output or delete it")
    return None
