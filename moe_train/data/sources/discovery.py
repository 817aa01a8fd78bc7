"""Which files a command's sources are, and of which kind."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from moe_train.data.sources.rows import Kind, SourceFile

COMPRESSIONS = (".gz", ".zst")
KINDS: dict[str, Kind] = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "document",
    ".npy": "tokens",
}
_SIDECARS = (".manifest.json", ".documents.parquet", ".token_bytes.npy")
"""What preparation writes itself."""
_EXTRAS = {"s3": "s3", "s3a": "s3", "hf": "hub"}


def find_sources(sources: Sequence[str | Path], plain_text: Kind | None = None) -> list[SourceFile]:
    """The files that files, folders (searched to their bottom) and globs stand for, sorted by name, each once.

    Also URLs that fsspec knows (``s3://bucket/folder``, ``hf://datasets/owner/name/**/*.parquet``). Known by their
    endings are `.parquet`, `.jsonl` and `.json` (a JSON object per line), `.txt`, these three also with `.gz` or `.zst`
    behind, and `.npy` (arrays of token ids). ``plain_text``: "lines" or "document" reads a document per line or file
    from `.txt` and from files of any other name that are given by file name or glob. In folders, hidden files and what
    preparation itself writes are passed over.
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
            found[path] = SourceFile("", path, wanted, size, version)
    if not found:
        raise ValueError("no source was given")
    parents = [str(PurePosixPath(_place(path)).parent) for path in found]
    root = os.path.commonpath(parents)
    named = [
        SourceFile(PurePosixPath(_place(f.path)).relative_to(root).as_posix(), f.path, f.kind, f.size, f.version)
        for f in found.values()
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


def _local(source: str) -> Iterator[tuple[str, int, str]]:
    path = Path(source)
    if path.is_dir():
        matches = [p for p in path.rglob("*") if p.is_file() and _is_wanted(p.relative_to(path).as_posix(), p)]
        if not matches:
            raise FileNotFoundError(f"{source} holds no file that ends in {', '.join(KINDS)}")
    elif path.is_file():
        matches = [path]
    else:
        matches = [Path(match) for match in glob.glob(source, recursive=True) if Path(match).is_file()]
    for match in matches:
        facts = match.stat()
        yield str(match.resolve()), facts.st_size, str(facts.st_mtime_ns)


def _remote(source: str) -> Iterator[tuple[str, int, str]]:
    protocol = source.partition("://")[0]
    try:
        import fsspec

        system, path = fsspec.core.url_to_fs(source)
    except (ImportError, ValueError) as error:
        extra = _EXTRAS.get(protocol)
        hint = f"pip install 'moe-train[{extra}]'" if extra else "fsspec needs a package for it"
        raise ValueError(f"{source} cannot be opened: {error} ({hint})") from error
    if any(sign in path for sign in "*?["):
        found: dict[str, Any] = system.glob(path, detail=True)
    elif system.isdir(path):
        everything: dict[str, Any] = system.find(path, detail=True)
        found = {name: info for name, info in everything.items() if _is_wanted(name[len(path) :].lstrip("/"), None)}
        if not found:
            raise FileNotFoundError(f"{source} holds no file that ends in {', '.join(KINDS)}")
    else:
        found = {path: system.info(path)} if system.exists(path) else {}
    for name, info in found.items():
        if info.get("type") != "directory":
            url = name if "://" in name else f"{protocol}://{name}"
            yield url, int(info["size"]), _version(info)


def _version(info: dict[str, Any]) -> str:
    for key in ("ETag", "etag", "checksum", "blob_id", "mtime", "LastModified", "last_modified", "created"):
        if info.get(key) is not None:
            return str(info[key])
    return ""


def _is_wanted(name: str, local: Path | None) -> bool:
    """Whether a file found in a folder is a source."""
    if kind_of(name) is None or name.endswith(_SIDECARS):
        return False
    if any(part.startswith(".") for part in PurePosixPath(name).parts):
        return False
    # The facts beside a generated corpus (corpus.py) are no text.
    return local is None or local.suffix != ".json" or not local.with_suffix(".parquet").is_file()
