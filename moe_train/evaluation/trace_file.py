"""The experts of every token of an evaluation, as a parquet file that pyarrow and pandas read.

One row per token and MoE layer, padding left out:
sample int64, position int32 (offset in the sample), token int32, data (name of the data set), domain (its label, null
where none is known), layer int16, experts list<int16> by falling weight, weights list<float32> (combine weights),
dropped list<bool> (True where capacity took the slot away).

Suffixes: B sequences, T tokens of a batch (token t = s * B + b), R tokens without padding, N slots, E experts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_train.data.batches import Batch
from moe_train.evaluation.loss import Forward
from moe_train.routing.interface import Routing

ROWS = 1 << 17
"""Rows of a row group, about: what is held before it is written."""
UNFINISHED = ".unfinished"


class TraceWriter:
    """Writes what passes a forward function; in memory there are never more than one row group and one batch.

    path: file of this rank; it appears under this name when everything is written.   layers: numbers of the MoE layers.
    names: of the data sets.   members: samples [B] to the number of their data set.   domains: labels by code.
    """

    def __init__(
        self,
        path: Path,
        layers: Sequence[int],
        names: Sequence[str],
        members: Callable[[Tensor], Tensor],
        domains: Sequence[str] | None = None,
        rows: int = ROWS,
    ) -> None:
        import pyarrow.parquet as pq

        self.path, self.layers, self.names = path, list(layers), list(names)
        self.members, self.domains, self.rows = members, domains, rows
        self._held: list[Any] = []
        self._count = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = pq.ParquetWriter(_unfinished(path), schema(), compression="zstd")

    def watch(self, forward: Forward) -> Forward:
        """The same function, whose routings are written on the way."""

        def watched(batch: Batch) -> tuple[Tensor, list[Routing]]:
            nll_BS, routings = forward(batch)
            self.add(batch, routings)
            return nll_BS, routings

        return watched

    def add(self, batch: Batch, routings: Sequence[Routing]) -> None:
        """Writes the routings of one batch, one for each of ``layers``."""
        for table in self._tables(batch, routings):
            self._held.append(table)
            self._count += table.num_rows
            if self._count >= self.rows:
                self._write()

    def close(self) -> Path:
        """Finishes the file; returns where it is."""
        self._write()
        self._writer.close()
        os.replace(_unfinished(self.path), self.path)
        return self.path

    def _write(self) -> None:
        import pyarrow as pa

        if self._count:
            self._writer.write_table(pa.concat_tables(self._held), row_group_size=max(self._count, 1))
        self._held, self._count = [], 0

    def _tables(self, batch: Batch, routings: Sequence[Routing]) -> list[Any]:
        import pyarrow as pa

        real_T = ~batch.padding_BS.t().reshape(-1)
        length, size = batch.ids_BS.t().shape

        def per_token(values_BS: Tensor, kind: str) -> np.ndarray:
            return values_BS.t().reshape(-1)[real_T].numpy().astype(kind)

        sample_BS = batch.sample_B[:, None].expand(size, length)
        position_BS = torch.arange(length)[None].expand(size, length)
        member_BS = self.members(batch.sample_B)[:, None].expand(size, length)
        domain = pa.nulls(int(real_T.sum()), pa.string())
        if self.domains and batch.domain_BS is not None:
            domain = _labels(per_token(batch.domain_BS, "int32"), self.domains)
        common = [
            pa.array(per_token(sample_BS, "int64")),
            pa.array(per_token(position_BS, "int32")),
            pa.array(per_token(batch.ids_BS, "int32")),
            _labels(per_token(member_BS, "int32"), self.names),
            domain,
        ]
        tables = []
        for layer, routing in zip(self.layers, routings, strict=True):
            number = pa.array(np.full(int(real_T.sum()), layer, np.int16))
            columns = [*common, number, *slots_of(routing, real_T)]
            columns = [column.cast(field.type) for column, field in zip(columns, schema(), strict=True)]
            tables.append(pa.Table.from_arrays(columns, schema=schema()))
        return tables


def schema() -> Any:
    """Columns of the file."""
    import pyarrow as pa

    return pa.schema(
        [
            ("sample", pa.int64()),
            ("position", pa.int32()),
            ("token", pa.int32()),
            ("data", pa.string()),
            ("domain", pa.string()),
            ("layer", pa.int16()),
            ("experts", pa.list_(pa.int16())),
            ("weights", pa.list_(pa.float32())),
            ("dropped", pa.list_(pa.bool_())),
        ]
    )


def slots_of(routing: Routing, real_T: Tensor) -> tuple[Any, Any, Any]:
    """Experts, weights and dropped of each real token, by falling weight, among equals by rising number."""
    import pyarrow as pa

    selected_RE = routing.selected_TE.cpu()[real_T]
    token_N, expert_N = (index.numpy() for index in selected_RE.nonzero(as_tuple=True))
    weight_N = routing.weights_TE.detach().float().cpu()[real_T][selected_RE].numpy()
    dropped_N = ~routing.kept_TE.cpu()[real_T][selected_RE].numpy()
    order_N = np.lexsort((expert_N, -weight_N, token_N))
    ends_R = np.concatenate([[0], np.cumsum(selected_RE.sum(1).numpy())]).astype(np.int32)
    columns = (expert_N.astype(np.int16), weight_N, dropped_N)
    lists = [pa.ListArray.from_arrays(pa.array(ends_R), pa.array(values[order_N])) for values in columns]
    return lists[0], lists[1], lists[2]


def part_of(path: Path, rank: int, ranks: int) -> Path:
    """The file that a rank writes: the trace itself where there is one rank, else a part beside it."""
    return path if ranks == 1 else path.with_name(f"{path.name}.rank{rank:04d}")


def join(path: Path, ranks: int) -> None:
    """One file of the parts of all ranks, those of rank 0 first, row group by row group; the parts are removed."""
    import pyarrow.parquet as pq

    if ranks == 1:
        return
    parts = [part_of(path, rank, ranks) for rank in range(ranks)]
    with pq.ParquetWriter(_unfinished(path), schema(), compression="zstd") as writer:
        for part in parts:
            with pq.ParquetFile(part) as file:
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group)
                    writer.write_table(table, row_group_size=max(table.num_rows, 1))
    os.replace(_unfinished(path), path)
    for part in parts:
        part.unlink()


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + UNFINISHED)


def _labels(code_R: np.ndarray, names: Sequence[str]) -> Any:
    """Strings by code; null for a code without a name."""
    import pyarrow as pa

    known_R = (code_R >= 0) & (code_R < len(names))
    codes = pa.array(np.where(known_R, code_R, 0), mask=~known_R)
    return pa.DictionaryArray.from_arrays(codes, pa.array(list(names), pa.string()))
