"""The trace file against a loop over tokens; bounded memory; parts of several ranks.

Suffixes: B sequences, S tokens, T = S * B, E experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from moe_train.data.batches import Batch
from moe_train.evaluation.trace_file import TraceWriter, join, part_of
from moe_train.routing.interface import Routing

S, E = 4, 5
LAYERS = [1, 3]


def batch(samples: list[int], lengths: list[int]) -> Batch:
    size = len(samples)
    padding_BS = torch.arange(S) >= torch.tensor(lengths)[:, None]
    ids_BS = torch.randint(0, 100, (size, S))
    domain_BS = torch.randint(-1, 3, (size, S))
    return Batch(ids_BS, ids_BS, ~padding_BS, padding_BS, torch.tensor(samples), domain_BS)


def routing(size: int) -> Routing:
    selected_TE = torch.rand(S * size, E) < 0.4
    kept_TE = selected_TE & (torch.rand(S * size, E) < 0.7)
    weights_TE = torch.randint(1, 4, (S * size, E)) / 4 * selected_TE  # with ties
    return Routing(torch.zeros(S * size, E), torch.zeros(S * size, E), weights_TE, selected_TE, kept_TE)


def members(sample_B: torch.Tensor) -> torch.Tensor:
    return (sample_B >= 10).long()


def expected(given: Batch, routings: list[Routing]) -> list[dict[str, Any]]:
    rows = []
    for b, sample in enumerate(given.sample_B.tolist()):
        for s in range(S):
            if given.padding_BS[b, s]:
                continue
            for layer, one in zip(LAYERS, routings, strict=True):
                t = s * len(given.sample_B) + b
                chosen = [e for e in range(E) if one.selected_TE[t, e]]
                chosen.sort(key=lambda e: (-float(one.weights_TE[t, e]), e))
                domain = int(given.domain_BS[b, s])  # type: ignore[index]
                rows.append(
                    {
                        "sample": sample,
                        "position": s,
                        "token": int(given.ids_BS[b, s]),
                        "data": "second" if sample >= 10 else "first",
                        "domain": ["x", "y"][domain] if 0 <= domain < 2 else None,
                        "layer": layer,
                        "experts": chosen,
                        "weights": [float(one.weights_TE[t, e]) for e in chosen],
                        "dropped": [not bool(one.kept_TE[t, e]) for e in chosen],
                    }
                )
    return rows


def ordered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: (row["sample"], row["position"], row["layer"]))


def write(path: Path, batches: list[Batch], routings: list[list[Routing]], rows: int = 1 << 17) -> None:
    writer = TraceWriter(path, LAYERS, ["first", "second"], members, ["x", "y"], rows=rows)
    answers = iter(routings)
    forward = writer.watch(lambda given: (torch.zeros(given.ids_BS.shape), next(answers)))
    for given in batches:
        forward(given)
    assert not path.exists(), "an unfinished trace does not look like a finished one"
    writer.close()


def test_rows_against_a_loop(tmp_path: Path) -> None:
    batches = [batch([0, 11, -1], [4, 2, 0]), batch([1, 12], [1, 3]), batch([-1, -1], [0, 0])]
    routings = [[routing(len(b.sample_B)) for _ in LAYERS] for b in batches]
    write(tmp_path / "t.parquet", batches, routings)
    found = pq.read_table(tmp_path / "t.parquet").to_pylist()
    want = [row for b, r in zip(batches, routings, strict=True) for row in expected(b, r)]
    assert len(want) == 10 * len(LAYERS) and ordered(found) == ordered(want)
    assert [path.name for path in tmp_path.iterdir()] == ["t.parquet"]


def test_row_groups_are_written_as_they_come(tmp_path: Path) -> None:
    batches = [batch([n], [S]) for n in range(10)]
    routings = [[routing(1) for _ in LAYERS] for _ in batches]
    write(tmp_path / "t.parquet", batches, routings, rows=12)
    with pq.ParquetFile(tmp_path / "t.parquet") as file:
        groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert sum(groups) == 10 * S * len(LAYERS) and max(groups) <= 12 + S
    assert len(groups) == 7


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_parts_of_ranks_become_one_file(tmp_path: Path, ranks: int) -> None:
    batches = [batch([n, n + 10], [S, 2]) for n in range(6)]
    routings = [[routing(2) for _ in LAYERS] for _ in batches]
    path = tmp_path / "folder" / "t.parquet"
    for rank in range(ranks):
        write(part_of(path, rank, ranks), batches[rank::ranks], routings[rank::ranks], rows=5)
    join(path, ranks)
    want = [row for b, r in zip(batches, routings, strict=True) for row in expected(b, r)]
    assert ordered(pq.read_table(path).to_pylist()) == ordered(want)
    assert [file.name for file in path.parent.iterdir()] == ["t.parquet"]


def test_a_rank_without_a_token(tmp_path: Path) -> None:
    write(tmp_path / "t.parquet", [batch([-1], [0])], [[routing(1) for _ in LAYERS]])
    table = pq.read_table(tmp_path / "t.parquet")
    assert table.num_rows == 0 and table.column_names[:3] == ["sample", "position", "token"]
