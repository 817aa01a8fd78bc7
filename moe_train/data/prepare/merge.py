"""The parts of a job as its result: tokens joined by the kernel, one table of documents, the index, the manifest.

Memory holds one part's table at a time.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_train.data.domains import documents_path
from moe_train.data.files import partial_path, publish, write_atomically
from moe_train.data.files import sha256_of as sha256_of_path
from moe_train.data.index_file import write_index
from moe_train.data.indexed import bin_path, idx_path, token_dtype
from moe_train.data.manifest import manifest_path, token_bytes_path
from moe_train.data.prepare.copying import FileRange, join_ranges
from moe_train.data.prepare.encoding import streams
from moe_train.data.prepare.limits import Limits
from moe_train.data.prepare.names import token_prefix
from moe_train.data.prepare.part import CHECKSUM, Part, PartFacts
from moe_train.data.prepare.problems import note
from moe_train.data.prepare.runs import TOKENS, fill_shards
from moe_train.data.prepare.work import Context
from moe_train.data.tokenizers import Tokenizer

_ROW_GROUP = 1 << 16


class EmptySplit(ValueError):
    """The sources and options give a set no document: nothing is to be gone on with."""


@dataclass
class _Shard:
    documents: int = 0
    tokens: int = 0
    pieces: list[tuple[int, int, int]] = field(default_factory=list)
    """(place of the part, its first document of the split, the one behind its last)."""


def merge(
    context: Context,
    limits: Limits,
    job: dict[str, Any],
    stems: dict[str, Path],
    tokenizer: Tokenizer,
    workers: int,
) -> dict[str, dict[str, Any]]:
    """Publishes the result of a job whose pieces are done, and returns the manifest of each split; so many parts are
    copied at a time.

    Errors: EmptySplit where a split got no document; ValueError where the output folder holds another tokenizer.
    """
    merging = _Merging(context, limits, workers)
    keep_tokenizer = tokenizer_copy(next(iter(stems.values())).parent, tokenizer)
    sources = [facts | {CHECKSUM: merging.checksum(i)} for i, facts in enumerate(job["sources"])]
    token_bytes_V = tokenizer.token_bytes()
    manifests: dict[str, dict[str, Any]] = {}
    paths: list[Path] = []
    try:
        for place, (split, stem) in enumerate(stems.items()):
            if not merging.total(place)["documents"]:
                raise EmptySplit(_empty_split(split, merging.skipped))
            stem.parent.mkdir(parents=True, exist_ok=True)
            shards = merging.shards(place)
            numbers = [None] if context.options.shard_tokens is None else list(range(len(shards)))
            written: list[Path] = []
            for number, shard in zip(numbers, shards, strict=True):
                for stream in streams(context.options):
                    prefix = token_prefix(stem, number, "text" if stream == TOKENS else "loss")
                    dtype = token_dtype(tokenizer.vocab_size) if stream == TOKENS else np.dtype(np.uint8)
                    paths += [bin_path(prefix), idx_path(prefix)]
                    written += [bin_path(prefix), idx_path(prefix)]
                    merging.write_shard(place, shard, prefix, dtype, stream)
            paths += [documents_path(stem), token_bytes_path(stem), manifest_path(stem)]
            merging.write_documents(place, partial_path(documents_path(stem)))
            with open(partial_path(token_bytes_path(stem)), "wb") as table:
                np.save(table, token_bytes_V)
            written += [documents_path(stem), token_bytes_path(stem)]
            manifests[split] = (
                job
                | {"sources": sources}
                | {
                    "split": split,
                    **merging.total(place),
                    "domains": merging.domains(place),
                    "skipped": dict(sorted(merging.skipped.items())),
                    "problems": merging.problems,
                    "shards": [{"documents": shard.documents, "tokens": shard.tokens} for shard in shards],
                    "files": {path.name: partial_path(path).stat().st_size for path in written},
                }
            )
            partial_path(manifest_path(stem)).write_text(json.dumps(manifests[split], indent=2) + "\n")
        if keep_tokenizer is not None:
            write_atomically(keep_tokenizer, tokenizer.path.read_bytes())
        publish(sorted(paths, key=lambda path: (path.name.endswith(".manifest.json"), path.suffix == ".idx")))
    finally:
        for path in paths:
            partial_path(path).unlink(missing_ok=True)
    return manifests


class _Merging:
    """The parts in source order, with what is known of them."""

    def __init__(self, context: Context, limits: Limits, workers: int) -> None:
        self.context, self.workers = context, workers
        cut = None if limits.cut is None else limits.cut[0]
        self.parts: list[Part] = [context.part(number, cut=number == cut) for number in range(limits.end)]
        self.facts: list[PartFacts] = []
        self.first_rows: list[dict[int, int]] = []
        """Of each part: source -> row of it that the part begins with."""
        self._checksums: dict[str, str] = {}
        rows: Counter[int] = Counter()
        for number, part in enumerate(self.parts):
            facts = part.facts()
            assert facts is not None, f"{part.facts_path} is missing"
            self.facts.append(facts)
            self._checksums |= facts.checksums
            self.first_rows.append({file: rows[file] for file in context.pieces[number].files})
            rows.update({int(file): count for file, count in facts.rows.items()})
        self._last_file = len(context.files) - 1 if limits.cut is None else self._file_of_last()
        self.skipped: Counter[str] = Counter()
        self.problems: list[dict[str, Any]] = []
        for facts, first in zip(self.facts, self.first_rows, strict=True):
            self.skipped.update(facts.skipped)
            for problem in facts.problems:
                name = context.files[problem["file"]].name
                note(self.problems, problem | {"file": name, "row": first[problem["file"]] + problem["row"]})

    def total(self, split: int) -> dict[str, int]:
        names = ("documents", "tokens", "text_bytes")
        return {name: sum(facts.by_split[split][name] for facts in self.facts) for name in names}

    def domains(self, split: int) -> dict[str, dict[str, int]]:
        found: dict[str, Counter[str]] = {}
        for facts in self.facts:
            for label, counts in facts.domains[split].items():
                found.setdefault(label, Counter()).update(counts)
        return {label: dict(counts) for label, counts in sorted(found.items())}

    def checksum(self, file: int) -> str | None:
        """None for a source behind a limit, and for one without rows, as an empty file."""
        if file > self._last_file:
            return None
        path = self.context.checksum_path(file)
        known = json.loads(path.read_text()) if path.is_file() else {}
        return self._checksums.get(str(file), known.get(CHECKSUM))

    def _file_of_last(self) -> int:
        """The source of the last document."""
        files = self.parts[-1].table(["file"]).column("file")
        return int(files[-1].as_py()) if len(files) else -1

    def shards(self, split: int) -> list[_Shard]:
        """Documents in order; another shard begins before a document that would bring one above its limit."""
        limit = self.context.options.shard_tokens
        if limit is None:
            pieces = [(n, 0, facts.by_split[split]["documents"]) for n, facts in enumerate(self.facts)]
            total = self.total(split)
            return [_Shard(total["documents"], total["tokens"], pieces)]
        shards = [_Shard()]
        for number in range(len(self.parts)):
            ends = np.cumsum(self._lengths(number, split).astype(np.int64))
            for place, (begin, stop) in enumerate(
                fill_shards(ends, shards[-1].tokens if shards[-1].documents else None, limit)
            ):
                if place:
                    shards.append(_Shard())
                if stop > begin:
                    shards[-1].pieces.append((number, begin, stop))
                    shards[-1].documents += stop - begin
                    shards[-1].tokens += int(ends[stop - 1] - (ends[begin - 1] if begin else 0))
        return shards

    def write_shard(self, split: int, shard: _Shard, prefix: Path, dtype: np.dtype[Any], stream: str) -> None:
        """The temporary files of a shard."""
        ranges: list[FileRange] = []
        for number, begin, stop in shard.pieces:
            start, end = 0, self.facts[number].by_split[split]["tokens"]
            if (begin, stop) != (0, self.facts[number].by_split[split]["documents"]):
                ends = np.cumsum(self._lengths(number, split).astype(np.int64))
                start, end = (int(ends[place - 1]) if place else 0 for place in (begin, stop))
            where = (start * dtype.itemsize, (end - start) * dtype.itemsize)
            ranges += self.parts[number].ranges(self.facts[number], split, stream, *where)
        join_ranges(ranges, partial_path(bin_path(prefix)), self.workers)
        lengths = (self._lengths(number, split)[begin:stop] for number, begin, stop in shard.pieces)
        write_index(partial_path(idx_path(prefix)), dtype, shard.documents, lengths)

    def write_documents(self, split: int, path: Path) -> None:
        """The table of documents: source, row, id, domain."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = pa.schema(
            [("source", pa.string()), ("row", pa.int64()), ("id", pa.large_string()), ("domain", pa.large_string())]
        )
        encoding = {"row": "DELTA_BINARY_PACKED", "id": "DELTA_BYTE_ARRAY"}
        with pq.ParquetWriter(
            path, schema, compression="zstd", use_dictionary=["source", "domain"], column_encoding=encoding
        ) as writer:
            waiting = schema.empty_table()
            for columns in self._document_tables(split):
                waiting = pa.concat_tables([waiting, pa.table(columns, schema=schema)])
                # Row groups of one size, so that the file does not depend on how the work was cut.
                while len(waiting) >= _ROW_GROUP:
                    writer.write_table(waiting[:_ROW_GROUP].combine_chunks())
                    waiting = waiting[_ROW_GROUP:]
            writer.write_table(waiting.combine_chunks())

    def _document_tables(self, split: int) -> Iterator[list[Any]]:
        """Columns source, row, id, domain of each part."""
        import pyarrow as pa
        import pyarrow.compute as pc

        for number, part in enumerate(self.parts):
            if self.facts[number].by_split[split]["documents"]:
                table = part.table(["split", "file", "row", "id", "domain"])
                table = table.filter(pc.equal(table.column("split"), split))
                files = table.column("file").to_numpy()
                sources = self.context.pieces[number].files
                places = np.searchsorted(sources, files)
                first = np.array([self.first_rows[number][file] for file in sources])
                names = pa.array([self.context.files[file].name for file in sources], pa.string())
                rows = pa.array(table.column("row").to_numpy() + first[places])
                yield [names.take(pa.array(places)), rows, table.column("id"), table.column("domain")]

    def _lengths(self, number: int, split: int) -> npt.NDArray[np.int32]:
        """Of the documents of a part in a split."""
        table = self.parts[number].table(["split", "length"])
        lengths: npt.NDArray[np.int32] = table.column("length").to_numpy()
        return lengths[table.column("split").to_numpy() == split]


def _empty_split(split: str, skipped: Counter[str]) -> str:
    left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()) if count) or "none"
    where = f"no document fell to {split}" if split else "no document is left"
    return f"{where} (left out: {left_out}); use more text, or other filters, fractions or seeds"


def tokenizer_copy(folder: Path, tokenizer: Tokenizer) -> Path | None:
    """Where to copy the tokenizer so that the folder explains itself; None where it is there already.

    ValueError where another one is.
    """
    path = folder / tokenizer.copy_name
    if not path.exists():
        return path
    if sha256_of_path(path) != tokenizer.checksum:
        raise ValueError(f"{path} is another tokenizer than {tokenizer.path}; choose another output or delete it")
    return None
