"""Time and memory of a preparation's own state, which grows with documents and files, and of merging alone.

    python benchmarks/prepare_scale.py --tokenizer GPT2/tokenizer.json [--files 1 2 4] [--documents 1000000] [--words 4]

Files have the layout of FineWeb's 100BT sample (about 150 files of a million documents, row groups of 1000), but
documents of a few words, so that what remains is what a document costs whatever its length (more words show
how fast tokens are merged). Each job is done as an
array of one task (planning and parts, no merging) and then merged, in processes of their own. The last lines
extrapolate along the straight line through the smallest and the largest job. "Grown" is how far the peak of resident
memory rose above that at the beginning of the work (imports, tokenizer, self-check).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

_PIECES_PER_FILE = 46
"""Of a file with 3 GB of text in pieces of 64 MB."""
_DESIGN_FILES = 150


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--files", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--documents", type=int, default=1_000_000, help="per file")
    parser.add_argument("--words", type=int, default=4, help="per document")
    parser.add_argument("--workers", type=int, default=1, help="of the merge")
    parser.add_argument("--scratch", type=Path, help="folder for the files (default: a temporary one)")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(_measure(arguments.scratch, arguments.tokenizer, arguments.only, arguments.workers)))
        return
    found = {}
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        for count in arguments.files:
            folder = Path(scratch) / str(count)
            folder.mkdir()
            for number in range(count):
                _write_file(folder / f"{number:03d}.parquet", number, arguments.documents, arguments.words)
            found[count] = {step: _run(folder, arguments, step) for step in ("parts", "merge")}
    _report(found, f"{arguments.documents:,} documents of {arguments.words} words")


def _write_file(path: Path, number: int, documents: int, length: int) -> None:
    random = np.random.default_rng(number)
    words = pa.array(["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"])
    with pq.ParquetWriter(path, pa.schema([(name, pa.string()) for name in ("text", "id", "dump")])) as writer:
        for begin in range(0, documents, 1000):
            count = min(1000, documents - begin)
            ids = [f"<urn:uuid:{random.bytes(16).hex()}>" for _ in range(count)]
            texts = [" ".join(words.take(pa.array(random.integers(0, 8, length))).to_pylist())] * count
            writer.write_table(pa.table([texts, ids, ["CC-MAIN-2024-10"] * count], schema=writer.schema), 1000)


def _run(folder: Path, arguments: argparse.Namespace, step: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--tokenizer", arguments.tokenizer, "--scratch", folder, "--only", step]
    command += ["--workers", arguments.workers]
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(result.stderr)
    facts: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return facts


def _measure(folder: Path, tokenizer_path: Path, step: str, workers: int) -> dict[str, float]:
    from moe_train.data.prepare import How, prepare
    from moe_train.data.sources import find_sources, first_texts, text_bytes
    from moe_train.data.tokenizers import load_tokenizer
    from moe_train.data.tokenizers.gigatoken_engine import with_fast_engine

    files = find_sources(sorted(folder.glob("*.parquet")))
    tokenizer = with_fast_engine(load_tokenizer(tokenizer_path), first_texts(files, ["text"], 50), print)
    piece_bytes = text_bytes(files[0], ["text"]) // _PIECES_PER_FILE
    merge = step == "merge"
    how = How(
        task=None if merge else (1, 1), merge_only=merge, workers=workers if merge else 1, piece_bytes=piece_bytes
    )
    before = _peak_mb()
    wall, cpu = time.perf_counter(), time.process_time()
    prepare(files, folder / "x", tokenizer, how=how)
    return {
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "grown_mb": _peak_mb() - before,
        "tokens_mb": sum(path.stat().st_size for path in folder.glob("x*.bin")) / 1e6,
    }


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _report(found: dict[int, dict[str, dict[str, float]]], content: str) -> None:
    table = Table(title=f"files of {content}, {_PIECES_PER_FILE} pieces each")
    parts = ("parts: wall s", "CPU s", "grown by MB")
    for heading in ("files", *parts, "merge: wall s", "CPU s", "grown by MB", "MB of tokens"):
        table.add_column(heading, justify="right")
    rows = {
        count: [steps[step][key] for step in ("parts", "merge") for key in ("wall_s", "cpu_s", "grown_mb")]
        + [steps["merge"]["tokens_mb"]]
        for count, steps in found.items()
    }
    for count, values in rows.items():
        table.add_row(str(count), *(f"{value:.1f}" for value in values))
    few, many = min(rows), max(rows)
    if few < many:
        slopes = [(b - a) / (many - few) for a, b in zip(rows[few], rows[many], strict=True)]
        table.add_row("per file", *(f"{slope:.2f}" for slope in slopes))
        # Memory that does not grow is not less at scale.
        further = [max(slope, 0) * (_DESIGN_FILES - many) for slope in slopes]
        at_scale = [value + more for value, more in zip(rows[many], further, strict=True)]
        table.add_row(f"{_DESIGN_FILES} (extrapolated)", *(f"{value:.0f}" for value in at_scale))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
