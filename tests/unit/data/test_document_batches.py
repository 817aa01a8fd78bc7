from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_train.data.batches import Batch
from moe_train.data.dataset import open_dataset, open_loss_mask
from moe_train.data.document_batches import DocumentSet
from moe_train.data.domains import Domains
from moe_train.data.indexed import IndexedDataset, IndexedWriter

EOD = 1


@pytest.fixture
def documents() -> list[np.ndarray]:
    """Ending with EOD but for two; some are longer than 9 tokens, some have no target."""
    rng = np.random.default_rng(31)
    lengths = [1, 5, 12, 9, 10, 2, 30, 3, 0, 7, 11, 1, 4]
    found = [np.append(rng.integers(2, 90, length), EOD) for length in lengths]
    found[3], found[11] = found[3][:-1], found[11][:-1]
    return found


@pytest.fixture
def dataset(tmp_path: Path, documents: list[np.ndarray]) -> IndexedDataset:
    with IndexedWriter(tmp_path / "d", 100) as writer:
        for document in documents:
            writer.add(document)
    return IndexedDataset(tmp_path / "d")


def seen(batches: list[Batch]) -> dict[int, list[int]]:
    """Document -> the tokens that its row holds, targets included; checks what is padding."""
    found = {}
    for batch in batches:
        assert torch.equal(batch.target_BS, ~batch.padding_BS)
        for row, sample in enumerate(batch.sample_B.tolist()):
            ids, labels, target = batch.ids_BS[row], batch.labels_BS[row], batch.target_BS[row]
            count = int(target.sum())
            assert target[:count].all() and (ids[count:] == 0).all() and (labels[count:] == 0).all()
            if sample < 0:
                assert count == 0
                continue
            assert sample not in found and torch.equal(ids[1:count], labels[: max(0, count - 1)])
            found[sample] = [*ids[:count].tolist(), *labels[max(0, count - 1) : count].tolist()]
    return found


@pytest.mark.parametrize("eod_id", [EOD, None])
@pytest.mark.parametrize(("dp_size", "micro_size"), [(1, 1), (1, 4), (2, 3), (4, 2), (5, 3)])
def test_every_document_once(
    documents: list[np.ndarray], dataset: IndexedDataset, dp_size: int, micro_size: int, eod_id: int | None
) -> None:
    chosen = DocumentSet(dataset, 9, eod_id=eod_id)
    texts = [d[:-1] if eod_id is not None and len(d) and d[-1] == EOD else d for d in documents]
    assert chosen.truncated == sum(len(text) > 9 for text in texts) > 2 and len(chosen) == len(documents)
    found: dict[int, list[int]] = {}
    per_rank = [list(chosen.batches(micro_size, rank=rank, dp_size=dp_size)) for rank in range(dp_size)]
    for together in zip(*per_rank, strict=True):
        assert len({batch.ids_BS.shape for batch in together}) == 1 and len(together[0].ids_BS) == micro_size
        # Not wider than the longest document of the ranks.
        assert max(int(batch.target_BS.sum(1).max()) for batch in together) in (0, together[0].ids_BS.shape[1])
    for batches in per_rank:
        mine = seen(batches)
        assert not found.keys() & mine.keys()
        found |= mine
    assert found == {i: text[:9].tolist() if len(text) > 1 else [] for i, text in enumerate(texts)}


@pytest.mark.parametrize("chunk", [3, 1 << 20])
@pytest.mark.parametrize("seed", range(4))
def test_documents_of_shards_are_those_read_one_by_one(
    tmp_path: Path, write_tokens: Callable[..., list[np.ndarray]], seed: int, chunk: int, monkeypatch
) -> None:
    """Shards without documents and documents without tokens among them; few ids, so that many end as documents do."""
    monkeypatch.setattr("moe_train.data.document_batches._CHUNK", chunk)
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 9, 41) * (rng.random(41) < 0.8)
    cuts = sorted(rng.integers(0, 42, 3).tolist())
    texts = [text.tolist() for text in write_tokens(tmp_path / "s", lengths.tolist(), seed=seed, vocab=3, cuts=cuts)]
    eod_id, limit = [(None, None), (1, None), (1, 17), (2, 100)][seed]
    chosen = DocumentSet(open_dataset(tmp_path / "s"), 5, eod_id=eod_id, limit=limit)
    count = min(41, limit or 41)
    assert chosen.index_D.tolist() == [i * 41 // count for i in range(count)]
    expected, truncated = {}, 0
    for number in chosen.index_D.tolist():
        text = texts[number][:-1] if texts[number] and texts[number][-1] == eod_id else texts[number]
        truncated += len(text) > 5
        expected[number] = text[:5] if len(text) > 1 else []
    assert chosen.truncated == truncated > 0
    found = {}
    for rank in range(2):
        found |= seen(list(chosen.batches(3, rank=rank, dp_size=2)))
    assert found == expected


def test_a_limit_takes_documents_from_everywhere(dataset: IndexedDataset) -> None:
    chosen = DocumentSet(dataset, 9, limit=4)
    assert chosen.index_D.tolist() == [0, 3, 6, 9] and len(chosen) == 4
    assert sorted(seen(list(chosen.batches(3)))) == [0, 3, 6, 9]
    assert len(DocumentSet(dataset, 9, limit=100)) == len(dataset)


def test_only_what_a_loss_mask_marks_is_a_target(
    documents: list[np.ndarray], dataset: IndexedDataset, tmp_path: Path
) -> None:
    rng = np.random.default_rng(32)
    masks = [rng.integers(0, 2, len(document)) for document in documents]
    with IndexedWriter(tmp_path / "d_loss_document", 2, np.uint8) as writer:
        for mask in masks:
            writer.add(mask)
    loss_mask = open_loss_mask(dataset)
    assert loss_mask is not None
    for batch in DocumentSet(dataset, 9, loss_mask=loss_mask).batches(4):
        for row, sample in enumerate(batch.sample_B.tolist()):
            if sample >= 0:
                used = max(0, min(9, len(documents[sample])) - 1)
                assert batch.target_BS[row, :used].tolist() == (masks[sample][1 : used + 1] == 1).tolist()
                assert (
                    not batch.target_BS[row, used:].any()
                    and (batch.padding_BS[row] == (np.arange(batch.padding_BS.shape[1]) >= used)).all()
                )


def test_domains(dataset: IndexedDataset, write_parquet) -> None:
    labels = [f"d{index % 3}" for index in range(len(dataset))]
    write_parquet(Path(f"{dataset.prefix}.documents.parquet"), [None] * len(labels), domain=labels)
    domains = Domains(dataset)
    for batch in DocumentSet(dataset, 9, eod_id=EOD).batches(4, domains=domains):
        assert batch.domain_BS is not None
        for row, sample in enumerate(batch.sample_B.tolist()):
            real = batch.domain_BS[row][batch.target_BS[row]]
            assert (real == sample % 3).all() and (batch.domain_BS[row][~batch.target_BS[row]] == -1).all()


def test_nothing_to_predict(dataset: IndexedDataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cut at 1 tokens nothing is left"):
        DocumentSet(dataset, 1)
    with IndexedWriter(tmp_path / "short", 100) as writer:
        for _ in range(3):
            writer.add([7, EOD])
    with pytest.raises(ValueError, match="no document of .*short has the 2 tokens"):
        DocumentSet(IndexedDataset(tmp_path / "short"), 9, eod_id=EOD)
    assert len(DocumentSet(IndexedDataset(tmp_path / "short"), 9)) == 3
