from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from moe_train.data.batches import evaluation_batches, evaluation_samples
from moe_train.data.domains import Domains, documents_path
from moe_train.data.indexed import IndexedDataset, IndexedWriter
from moe_train.data.readers import WindowReader
from moe_train.data.sampling import Sampler
from moe_train.data.training_set import TrainingSet

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
    sampler = Sampler(WindowReader(dataset, 8), seed=1)
    batch = TrainingSet({"p": sampler}, [(0, {"p": 1.0})]).batch(start=30, count=3)
    assert batch.ids_BS.shape == batch.labels_BS.shape == (3, 8)
    assert batch.ids_BS.dtype == batch.labels_BS.dtype == batch.sample_B.dtype == torch.int64
    assert batch.sample_B.tolist() == [30, 31, 32]
    assert batch.target_BS.all() and not batch.padding_BS.any()
    assert batch.domain_BS is None and batch.position_BS is None
    for row, index in enumerate(range(30, 33)):
        start = 8 * sampler.place(index)
        assert batch.ids_BS[row].tolist() == dataset.tokens[start : start + 8].tolist()
        assert batch.labels_BS[row].tolist() == dataset.tokens[start + 1 : start + 9].tolist()


def test_domains_per_token(tmp_path: Path) -> None:
    dataset, labels = labelled(tmp_path / "p", 203)
    domains = Domains(dataset)
    assert domains.names == ["", "code", "law", "prose"]
    for start, count in [(0, 203), (0, 0), (1, 1), (60, 100), (202, 1)]:
        found = [domains.names[code] for code in domains.of_tokens(start, count)]
        assert found == labels[start : start + count]
    sampler = Sampler(WindowReader(dataset, 8, domains=domains), seed=1)
    batch = TrainingSet({"p": sampler}, [(0, {"p": 1.0})]).batch(5, 4)
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
    reader = WindowReader(dataset, 8, domains=domains)
    targets: list[int] = []
    windows: list[int] = []
    counts = []
    for rank in range(dp_size):
        batches = list(evaluation_batches([reader], micro_size, rank=rank, dp_size=dp_size))
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
    assert sorted(windows) == list(range(reader.evaluation_count))
    assert len(set(counts)) == 1


def test_evaluation_of_a_part(tmp_path: Path) -> None:
    dataset, _ = labelled(tmp_path / "p", 200)
    readers = [WindowReader(dataset, 8)]
    per_rank = [list(evaluation_batches(readers, 2, rank=rank, dp_size=2, max_batches=3)) for rank in range(2)]
    assert [len(batches) for batches in per_rank] == [3, 3]
    seen = sorted(sample for batches in per_rank for batch in batches for sample in batch.sample_B.tolist())
    # 25 windows, 12 of them: spread over the whole stream, and the same ones whatever the layout.
    assert seen == [row * 25 // 12 for row in range(12)]
    alone = [sample for batch in evaluation_batches(readers, 4, max_batches=3) for sample in batch.sample_B.tolist()]
    assert alone == seen


def test_evaluation_without_targets_is_refused(tmp_path: Path) -> None:
    dataset, _ = labelled(tmp_path / "p", 1)
    with pytest.raises(ValueError, match="at least 2"):
        next(evaluation_batches([WindowReader(dataset, 8)], 2))


def test_evaluation_of_several_data_sets(tmp_path: Path) -> None:
    readers = [WindowReader(labelled(tmp_path / name, tokens)[0], 8) for name, tokens in (("a", 200), ("b", 61))]
    assert [reader.evaluation_count for reader in readers] == [25, 8]
    for dp_size, micro_size in ((1, 4), (2, 3)):
        seen = [
            (int(sample), int(batch.target_BS[row].sum()))
            for rank in range(dp_size)
            for batch in evaluation_batches(readers, micro_size, rank=rank, dp_size=dp_size)
            for row, sample in enumerate(batch.sample_B.tolist())
            if sample >= 0
        ]
        assert sorted(sample for sample, _ in seen) == list(range(33))
        assert sum(targets for _, targets in seen) == 199 + 60
    assert evaluation_samples(readers, None, 11) == [8, 3]
    # As many as there are in these shares.
    for weights in ([1, 1], [3, 1], [1, 9], [100, 1]):
        counts = np.array(evaluation_samples(readers, weights, None))
        assert (counts <= [25, 8]).all() and (counts == [25, 8]).any()
        assert np.abs(counts - counts.sum() * np.array(weights) / sum(weights)).max() < 1
    assert evaluation_samples(readers, [3, 1], 8) == [6, 2]
