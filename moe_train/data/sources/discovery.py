"""Which files a command's sources are, and of which kind."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from moe_train.data.sources.rows import Kind, SourceFile

COMPRESSIONS = (".gz", ".zst")
KINDS: dict[str, Kind] = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "document",
}


def find_sources(sources: Sequence[str | Path], plain_text: Kind | None = None) -> list[SourceFile]:
    """The files that files, folders (searched to their bottom) and globs stand for, sorted by name, each once.

    Known by their endings are `.parquet`, `.jsonl` and `.json` (a JSON object per line) and `.txt`, the last three also
    with `.gz` or `.zst` behind. ``plain_text``: "lines" or "document" reads a document per line or per file from `.txt`
    and from files of any other name that are given by file name or glob.
    Errors: FileNotFoundError for something that does not exist, or a folder or glob without such a file; ValueError for
    a file of another kind.
    """
    found: dict[Path, Kind] = {}
    for source in sources:
        path = Path(source)
        if path.is_dir():
            matches = [match for match in path.rglob("*") if match.is_file() and kind_of(match) and not _is_side(match)]
        elif path.is_file():
            matches = [path]
        else:
            matches = [Path(match) for match in glob.glob(str(source), recursive=True) if Path(match).is_file()]
        if not matches:
            kinds = ", ".join(KINDS)
            kind = f"holds no file that ends in {kinds}" if path.is_dir() else "does not exist and matches no file"
            raise FileNotFoundError(f"{source} {kind}")
        for match in matches:
            known = kind_of(match)
            wanted = plain_text if plain_text is not None and known in (None, "document") else known
            if wanted is None:
                raise ValueError(
                    f"{match} is of no known kind ({', '.join(KINDS)}, {' or '.join(COMPRESSIONS)} behind them); "
                    "--text-format lines or document reads it as plain text"
                )
            found[match.resolve()] = wanted
    if not found:
        raise ValueError("no source was given")
    root = os.path.commonpath([path.parent for path in found])
    files = [SourceFile(path.relative_to(root).as_posix(), path, kind) for path, kind in found.items()]
    return sorted(files, key=lambda file: file.name)


def kind_of(path: Path) -> Kind | None:
    """The kind that a file's name tells."""
    suffixes = path.suffixes
    if suffixes and suffixes[-1] in COMPRESSIONS:
        inner = KINDS.get(suffixes[-2]) if len(suffixes) > 1 else None
        return None if inner == "parquet" else inner
    return KINDS.get(path.suffix)


def _is_side(path: Path) -> bool:
    """The facts beside a generated corpus (corpus.py) are no text."""
    return path.suffix == ".json" and path.with_suffix(".parquet").is_file()
