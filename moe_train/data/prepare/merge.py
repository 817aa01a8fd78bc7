"""The parts of a job as its result: tokens joined by the kernel, one table of documents, the index, the manifest.

Memory holds one part's table at a time.
"""

from __future__ import annotations

import io
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
from moe_train.data.prepare.copying import append_range
from moe_train.data.prepare.encoding import streams
from moe_train.data.prepare.limits import Limits
from moe_train.data.prepare.names import token_prefix
from moe_train.data.prepare.part import TOKENS, Part, PartFacts
from moe_train.data.prepare.work import Context
from moe_train.data.tokenizers import Tokenizer

_PROBLEMS = 100
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
    context: Context, limits: Limits, job: dict[str, Any], stems: dict[str, Path], tokenizer: Tokenizer
) -> dict[str, dict[str, Any]]:
    """Publishes the result of a job whose pieces are done, and returns the manifest of each split.

    Errors: EmptySplit where a split got no document; ValueError where the output folder holds another tokenizer.
    """
    merging = _Merging(context, limits)
    keep_tokenizer = _tokenizer_copy(next(iter(stems.values())).parent, tokenizer)
    sources = [facts | {"sha256": merging.checksum(i)} for i, facts in enumerate(job["sources"])]
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
                    "skipped": {reason: count for reason, count in merging.skipped.items() if count},
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

    def __init__(self, context: Context, limits: Limits) -> None:
        self.context = context
        cut = None if limits.cut is None else limits.cut[0]
        self.parts: list[Part] = [context.part(number, cut=number == cut) for number in range(limits.end)]
        self.facts: list[PartFacts] = []
        self.first_rows: list[int] = []
        """Row of the file that a part begins with."""
        rows: Counter[int] = Counter()
        for number, part in enumerate(self.parts):
            facts = part.facts()
            assert facts is not None, f"{part.facts_path} is missing"
            self.facts.append(facts)
            self.first_rows.append(rows[context.pieces[number].file])
            rows[context.pieces[number].file] += facts.rows
        self.skipped: Counter[str] = sum((Counter(facts.skipped) for facts in self.facts), Counter())
        self.problems = [
            {"file": self._source(number), "row": self.first_rows[number] + problem["row"]}
            | {key: problem[key] for key in ("rows", "reason")}
            for number, facts in enumerate(self.facts)
            for problem in facts.problems
        ][:_PROBLEMS]

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
        """None for a source that nothing was taken from."""
        if file not in {piece.file for piece in self.context.pieces[: len(self.parts)]}:
            return None
        return str(json.loads(self.context.checksum_path(file).read_text())["sha256"])

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
            begin, before = 0, 0
            while begin < len(ends):
                room = limit - shards[-1].tokens
                stop = int(np.searchsorted(ends, before + room, side="right"))
                if stop == begin and not shards[-1].documents:
                    stop += 1  # a document that is larger than a shard
                if stop > begin:
                    shards[-1].pieces.append((number, begin, stop))
                    shards[-1].documents += stop - begin
                    shards[-1].tokens += int(ends[stop - 1]) - before
                    begin, before = stop, int(ends[stop - 1])
                if begin < len(ends):
                    shards.append(_Shard())
        return shards

    def write_shard(self, split: int, shard: _Shard, prefix: Path, dtype: np.dtype[Any], stream: str) -> None:
        """The temporary files of a shard."""
        with open(partial_path(bin_path(prefix)), "wb", buffering=0) as target:
            assert isinstance(target, io.RawIOBase)
            for number, begin, stop in shard.pieces:
                start, end = 0, self.facts[number].by_split[split]["tokens"]
                if (begin, stop) != (0, self.facts[number].by_split[split]["documents"]):
                    ends = np.cumsum(self._lengths(number, split).astype(np.int64))
                    start, end = (int(ends[place - 1]) if place else 0 for place in (begin, stop))
                with open(self.parts[number].stream_path(split, stream), "rb") as source:
                    append_range(source, target, start * dtype.itemsize, (end - start) * dtype.itemsize)
        lengths = (self._lengths(number, split)[begin:stop] for number, begin, stop in shard.pieces)
        write_index(partial_path(idx_path(prefix)), dtype, shard.documents, lengths)

    def write_documents(self, split: int, path: Path) -> None:
        """The table of documents: source, row, id, domain."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = pa.schema(
            [("source", pa.string()), ("row", pa.int64()), ("id", pa.large_string()), ("domain", pa.large_string())]
        )
        encoding = {"row": "DELTA_BINARY_PACKED"}
        with pq.ParquetWriter(
            path, schema, compression="zstd", use_dictionary=["source", "domain"], column_encoding=encoding
        ) as writer:
            waiting = schema.empty_table()
            for names, rows, ids, domains in self._document_tables(split):
                columns = [pa.array(names, pa.string()), pa.array(rows), ids, domains]
                waiting = pa.concat_tables([waiting, pa.table(columns, schema=schema)])
                # Row groups of one size, so that the file does not depend on how the work was cut.
                while len(waiting) >= _ROW_GROUP:
                    writer.write_table(waiting[:_ROW_GROUP].combine_chunks())
                    waiting = waiting[_ROW_GROUP:]
            writer.write_table(waiting.combine_chunks())

    def _document_tables(self, split: int) -> Iterator[tuple[list[str], npt.NDArray[np.int64], Any, Any]]:
        for number, part in enumerate(self.parts):
            if self.facts[number].by_split[split]["documents"]:
                table = part.table(["split", "row", "id", "domain"])
                table = table.filter(_equal(table.column("split"), split))
                rows = table.column("row").to_numpy() + self.first_rows[number]
                names = [self._source(number)] * len(table)
                yield names, rows, table.column("id"), table.column("domain")

    def _lengths(self, number: int, split: int) -> npt.NDArray[np.int32]:
        """Of the documents of a part in a split."""
        table = self.parts[number].table(["split", "length"])
        lengths: npt.NDArray[np.int32] = table.column("length").to_numpy()
        return lengths[table.column("split").to_numpy() == split]

    def _source(self, number: int) -> str:
        return self.context.files[self.context.pieces[number].file].name


def _equal(column: Any, value: int) -> Any:
    import pyarrow.compute as pc

    return pc.equal(column, value)


def _empty_split(split: str, skipped: Counter[str]) -> str:
    left_out = ", ".join(f"{count} {reason}" for reason, count in skipped.items() if count) or "none"
    where = f"no document fell to {split}" if split else "no document is left"
    return f"{where} (left out: {left_out}); use more text, or other filters, fractions or seeds"


def _tokenizer_copy(folder: Path, tokenizer: Tokenizer) -> Path | None:
    """Where to copy the tokenizer so that the folder explains itself; None where it is there already."""
    path = folder / f"tokenizer{tokenizer.path.suffix}"
    if not path.exists():
        return path
    if sha256_of_path(path) != tokenizer.checksum:
        raise ValueError(f"{path} is another tokenizer than {tokenizer.path}; choose another output or delete it")
    return None
