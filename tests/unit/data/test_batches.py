from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from moe_train.data.batches import evaluation_batches, evaluation_windows, micro_batch, rank_slice
from moe_train.data.domains import Domains, documents_path
from moe_train.data.indexed import IndexedDataset, IndexedWriter
from moe_train.data.sampling import PackedSampler

LABELS = ["law", "code", "", "code", "law", "law", "prose"]


def labelled(prefix: Path, tokens: int) -> tuple[IndexedDataset, list[str]]:
    """A data set of consecutive token ids, one empty document among them; and the label of each token."""
    rng = np.random.default_rng(tokens)
    lengths = rng.multinomial(tokens, [1 / (len(LABELS) - 1)] * (len(LABELS) - 1))
    lengths = np.insert(lengths, 2, 0)
    with IndexedWriter(prefix, 5000) as writer:
        for part in np.split(np.arange(tokens), np.cumsum(lengths)[:-1]):
            writer.add(part)
    pq.write_table(pa.table({"domain": LABELS}), documents_path(prefix))
    return IndexedDataset(prefix), [name for name, n in zip(LABELS, lengths, strict=True) for _ in range(n)]


def test_micro_batch(tmp_path: Path) -> None:
    dataset, _ = labelled(tmp_path / "p", 200)
    sampler = PackedSampler(dataset, 8, seed=1)
    batch = micro_batch(sampler, start=30, count=3)
    assert batch.ids_BS.shape == batch.labels_BS.shape == (3, 8)
    assert batch.ids_BS.dtype == batch.labels_BS.dtype == batch.sample_B.dtype == torch.int64
    assert batch.sample_B.tolist() == [30, 31, 32]
    assert batch.target_BS.all() and not batch.padding_BS.any() and batch.domain_BS is None
    for row, index in enumerate(range(30, 33)):
        sample = sampler.sample(index)
        assert batch.ids_BS[row].tolist() == sample[:-1].tolist()
        assert batch.labels_BS[row].tolist() == sample[1:].tolist()


@pytest.mark.parametrize(("dp_size", "micro_size"), [(1, 8), (2, 4), (2, 1), (4, 2), (8, 1)])
def test_a_step_reads_the_same_samples_on_any_number_of_ranks(tmp_path: Path, dp_size: int, micro_size: int) -> None:
    """pitfalls row 33 (litgpt PR1160, lhotse#1080): also with another data-parallel size."""
    dataset, _ = labelled(tmp_path / "p", 200)
    sampler = PackedSampler(dataset, 8, seed=1)
    rows = {}
    for rank in range(dp_size):
        for micro_index in range(8 // (dp_size * micro_size)):
            start = rank_slice(16, micro_index, rank, dp_size, micro_size)
            batch = micro_batch(sampler, start, micro_size)
            for sample, ids in zip(batch.sample_B.tolist(), batch.ids_BS.tolist(), strict=True):
                assert sample not in rows
                rows[sample] = ids
    assert rows == {index: sampler.sample(index)[:-1].tolist() for index in range(16, 24)}


def test_domains_per_token(tmp_path: Path) -> None:
    dataset, labels = labelled(tmp_path / "p", 203)
    domains = Domains(dataset)
    assert domains.names == ["", "code", "law", "prose"]
    for start, count in [(0, 203), (0, 0), (1, 1), (60, 100), (202, 1)]:
        found = [domains.names[code] for code in domains.of_tokens(start, count)]
        assert found == labels[start : start + count]
    sampler = PackedSampler(dataset, 8, seed=1)
    batch = micro_batch(sampler, 5, 4, domains)
    assert batch.domain_BS is not None
    # Token ids are positions here.
    assert [[domains.names[c] for c in row] for row in batch.domain_BS.tolist()] == [
        [labels[i] for i in row] for row in batch.ids_BS.tolist()
    ]


def test_domains_of_another_data_set_are_refused(tmp_path: Path) -> None:
    dataset, _ = labelled(tmp_path / "p", 50)
    pq.write_table(pa.table({"domain": ["one"]}), documents_path(tmp_path / "p"))
    with pytest.raises(ValueError, match="describes 1 documents"):
        Domains(dataset)
    documents_path(tmp_path / "p").unlink()
    with pytest.raises(FileNotFoundError, match="written by prepare"):
        Domains(dataset)


@pytest.mark.parametrize("tokens", [2, 8, 9, 10, 200, 201])
@pytest.mark.parametrize(("dp_size", "micro_size"), [(1, 1), (1, 4), (2, 3), (4, 2)])
def test_evaluation_has_each_target_once(tmp_path: Path, tokens: int, dp_size: int, micro_size: int) -> None:
    dataset, labels = labelled(tmp_path / "p", tokens)
    domains = Domains(dataset)
    targets: list[int] = []
    windows: list[int] = []
    counts = []
    for rank in range(dp_size):
        batches = list(evaluation_batches(dataset, 8, micro_size, rank=rank, dp_size=dp_size, domains=domains))
        counts.append(len(batches))
        for batch in batches:
            assert batch.ids_BS.shape == (micro_size, 8) and batch.domain_BS is not None
            assert torch.equal(batch.padding_BS, ~batch.target_BS)
            ids, following = batch.ids_BS[batch.target_BS], batch.labels_BS[batch.target_BS]
            assert torch.equal(ids + 1, following)
            targets += following.tolist()
            assert torch.equal(batch.sample_B >= 0, batch.target_BS.any(dim=1))
            windows += batch.sample_B[batch.sample_B >= 0].tolist()
            assert [domains.names[c] for c in batch.domain_BS[batch.target_BS].tolist()] == [labels[i] for i in ids]
            assert (batch.domain_BS[batch.padding_BS] == -1).all()
    assert sorted(targets) == list(range(1, tokens))
    assert sorted(windows) == list(range(evaluation_windows(dataset, 8)))
    assert len(set(counts)) == 1


def test_evaluation_of_a_part(tmp_path: Path) -> None:
    dataset, _ = labelled(tmp_path / "p", 200)
    per_rank = [list(evaluation_batches(dataset, 8, 2, rank=rank, dp_size=2, max_batches=3)) for rank in range(2)]
    assert [len(batches) for batches in per_rank] == [3, 3]
    seen = sorted(sample for batches in per_rank for batch in batches for sample in batch.sample_B.tolist())
    # 25 windows, 12 of them: spread over the whole stream, and the same ones whatever the layout.
    assert seen == [row * 25 // 12 for row in range(12)]
    alone = [sample for batch in evaluation_batches(dataset, 8, 4, max_batches=3) for sample in batch.sample_B.tolist()]
    assert alone == seen


def test_evaluation_without_targets_is_refused(tmp_path: Path) -> None:
    dataset, _ = labelled(tmp_path / "p", 1)
    with pytest.raises(ValueError, match="at least 2"):
        next(evaluation_batches(dataset, 8, 2))
