"""Which files a command's sources are, and of which kind."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from moe_train.data.sources.rows import Kind, SourceFile, file_version, version_of

COMPRESSIONS = (".gz", ".zst")
KINDS: dict[str, Kind] = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "document",
    ".npy": "tokens",
}
_OWN = (".manifest.json", ".documents.parquet", ".token_bytes.npy", "/tokenizer.json", "/tokenizer_config.json")
"""What preparation writes itself, or reads beside the text."""
_EXTRAS = {"s3": "s3", "s3a": "s3", "hf": "hub"}

Found = tuple[str, int, str]
"""Path or URL, size, version."""


def find_sources(sources: Sequence[str | Path], plain_text: Kind | None = None) -> list[SourceFile]:
    """The files that files, folders (searched to their bottom) and globs stand for, sorted by name, each once.

    Also URLs that fsspec knows (``s3://bucket/folder``, ``hf://datasets/owner/name/**/*.parquet``). Known by their
    endings are `.parquet`, `.jsonl` and `.json` (a JSON object per line), `.txt`, these three also with `.gz` or `.zst`
    behind, and `.npy` (arrays of token ids). ``plain_text``: "lines" or "document" reads a document per line or file
    from `.txt` and from files of any other name that are given by file name or glob. In folders and globs, hidden files
    and what preparation itself writes are passed over. Links are followed; a file that several lead to is read once.
    Errors: FileNotFoundError for something that does not exist, or a folder or glob without such a file; ValueError for
    a file of another kind, or a URL whose package is missing.
    """
    found: dict[str, SourceFile] = {}
    for source in sources:
        matches = list(_remote(str(source)) if "://" in str(source) else _local(str(source)))
        if not matches:
            raise FileNotFoundError(f"{source} does not exist and matches no file")
        for path, size, version in matches:
            known = kind_of(path)
            wanted = plain_text if plain_text is not None and known in (None, "document") else known
            if wanted is None:
                raise ValueError(
                    f"{path} is of no known kind ({', '.join(KINDS)}, {' or '.join(COMPRESSIONS)} behind them); "
                    "--text-format lines or document reads it as plain text"
                )
            try:
                path.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"the name of a source is not UTF-8: {path!r}; rename it") from error
            identity = path if "://" in path else os.path.realpath(path)
            known_as = found.get(identity)
            if known_as is None or (path.count("/"), path) < (known_as.path.count("/"), known_as.path):
                found[identity] = SourceFile("", path, wanted, size, version)
    if not found:
        raise ValueError("no source was given")
    files = sorted(found.values(), key=lambda file: file.path)
    root = os.path.commonpath([str(PurePosixPath(_place(file.path)).parent) for file in files])
    named = [
        SourceFile(PurePosixPath(_place(f.path)).relative_to(root).as_posix(), f.path, f.kind, f.size, f.version)
        for f in files
    ]
    return sorted(named, key=lambda file: (file.name, file.path))


def kind_of(path: str) -> Kind | None:
    """The kind that a file's name tells."""
    suffixes = PurePosixPath(path).suffixes
    if suffixes and suffixes[-1] in COMPRESSIONS:
        inner = KINDS.get(suffixes[-2]) if len(suffixes) > 1 else None
        return None if inner in ("parquet", "tokens") else inner
    return KINDS.get(suffixes[-1]) if suffixes else None


def _place(path: str) -> str:
    """A path from the root that sources of all places can be compared by."""
    protocol, mark, rest = path.partition("://")
    return f"/{protocol}/{rest.lstrip('/')}" if mark else path


def corpus_facts(parquet: Path) -> dict[str, Any] | None:
    """What the JSON file beside a generated corpus says about it; None where there is no such file."""
    side = parquet.with_suffix(".json")
    if not side.is_file() or side.stat().st_size > 1 << 20:
        return None
    try:
        facts = json.loads(side.read_text())
    except ValueError:
        return None
    return facts if isinstance(facts, dict) and "content_sha256" in facts else None


def _local(source: str) -> Iterator[Found]:
    path = Path(os.path.abspath(source))
    if path.is_file():
        matches = [path]
    elif path.is_dir():
        matches = list(_inside(path))
        if not matches:
            raise FileNotFoundError(f"{source} holds no file that ends in {', '.join(KINDS)}")
    else:
        matches = []
        for found in sorted(glob.glob(source, recursive=True)):
            match = Path(os.path.abspath(found))
            if match.is_dir():
                matches += [] if _is_work(match) else _inside(match)
            elif not _is_own(f"/{match.name}", match):
                matches.append(match)
    for match in matches:
        yield str(match), *file_version(str(match))


def _inside(folder: Path) -> Iterator[Path]:
    """The sources of a folder; folders that links lead to are entered once."""
    entered = {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, followlinks=True):
        keep = []
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(parent, name))
            if not name.startswith(".") and not _is_work(Path(parent) / name) and real not in entered:
                entered.add(real)
                keep.append(name)
        folders[:] = keep
        for name in names:
            path = Path(parent) / name
            if kind_of(name) and not name.startswith(".") and path.is_file() and not _is_own(f"/{name}", path):
                yield path


def _is_work(folder: Path) -> bool:
    """The parts of an unfinished preparation."""
    return folder.suffix == ".work" and (folder / "job.json").is_file()


def _is_own(name: str, path: Path | None) -> bool:
    if name.endswith(_OWN):
        return True
    # The facts beside a generated corpus (corpus.py) are no text.
    is_side = path is not None and path.suffix == ".json" and path.with_suffix(".parquet").is_file()
    return is_side and path is not None and corpus_facts(path) is not None


def _remote(source: str) -> Iterator[Found]:
    protocol = source.partition("://")[0]
    try:
        import fsspec

        system, path = fsspec.core.url_to_fs(source)
    except (ImportError, ValueError) as error:
        extra = _EXTRAS.get(protocol)
        hint = f"pip install 'moe-train[{extra}]'" if extra else "fsspec needs a package for it"
        raise ValueError(f"{source} cannot be opened: {error} ({hint})") from error
    try:
        found = _listed(system, path)
    except Exception as error:  # each store has its own: no key, no network, no such bucket
        raise ValueError(f"{source} cannot be listed: {type(error).__name__}: {error}") from error
    for name, info in found.items():
        url = name if "://" in name else f"{protocol}://{name}"
        yield url, *version_of(info)


def _listed(system: Any, path: str) -> dict[str, Any]:
    """Files of a URL's path: itself, what a folder holds, or what a glob matches, folders among that included."""
    if any(sign in path for sign in "*?["):
        matches = system.glob(path, detail=True)
    else:
        matches = {path: system.info(path)} if system.exists(path) else {}
    found: dict[str, Any] = {}
    for name, info in matches.items():
        if info.get("type") != "directory":
            found[name] = info
            continue
        for inner, facts in system.find(name, detail=True).items():
            rest = inner[len(name) :].lstrip("/")
            hidden = any(part.startswith(".") or part.endswith(".work") for part in PurePosixPath(rest).parts)
            if kind_of(inner) and not hidden and not _is_own(f"/{rest}", None):
                found[inner] = facts
    return found
