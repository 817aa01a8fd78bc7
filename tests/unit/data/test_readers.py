from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_train.data.dataset import Dataset, open_dataset, open_loss_mask
from moe_train.data.index import write_index
from moe_train.data.indexed import IndexedWriter
from moe_train.data.readers import DocumentReader, PackedDocumentReader, Reader, WindowReader
from moe_train.data.rows import Batch, Rows

Write = Callable[..., list[np.ndarray]]
LENGTHS = st.lists(st.integers(0, 14), min_size=1, max_size=15).filter(lambda lengths: sum(lengths) > 8)
FAST = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)


def index_of(dataset: Dataset, length: int, pack: bool) -> np.ndarray:
    stream = BytesIO()
    write_index(stream, dataset, length, pack=pack)
    return np.frombuffer(stream.getvalue(), "<i8")


def read(reader: Reader, places: list[int]) -> Batch:
    rows = Rows(len(places), reader.sequence_length, positions=reader.cuts)
    reader.fill(rows, np.arange(len(places)), np.array(places, np.int64))
    return rows.batch()


def targets(batch: Batch, row: int) -> list[tuple[int, int]]:
    """(input, label) at each target of a row."""
    ids, labels, target = batch.ids_BS[row].tolist(), batch.labels_BS[row].tolist(), batch.target_BS[row].tolist()
    return [(i, label) for i, label, t in zip(ids, labels, target, strict=True) if t]


@FAST
@given(lengths=LENGTHS, seed=st.integers(0, 10**6), length=st.integers(1, 9), data=st.data())
def test_windows_have_every_token_but_the_first_as_target_once(
    tmp_path_factory: pytest.TempPathFactory,
    write_tokens: Write,
    lengths: list[int],
    seed: int,
    length: int,
    data: st.DataObject,
) -> None:
    """With reset, every token that does not begin a document; in shards as in one file."""
    folder = tmp_path_factory.mktemp("p")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(lengths)), max_size=2))) or None
    write_tokens(folder / "p", lengths, seed=seed, cuts=cuts)
    dataset = open_dataset(folder / "p")
    tokens = dataset.read(0, dataset.token_count).tolist()
    firsts = set((np.cumsum([0, *lengths[:-1]])).tolist())
    for reset in (False, True):
        reader = WindowReader(dataset, length, reset=reset)
        assert reader.count == (len(tokens) - 1) // length
        batch = read(reader, list(range(reader.evaluation_count)))
        seen = []
        for row in range(reader.evaluation_count):
            start = row * length
            assert reader.spans(row) == [(start, min(start + length + 1, len(tokens)))]
            for s in range(length):
                position = start + s
                if position + 1 >= len(tokens):
                    assert batch.padding_BS[row, s] and not batch.target_BS[row, s]
                    continue
                assert not batch.padding_BS[row, s]
                assert (batch.ids_BS[row, s], batch.labels_BS[row, s]) == (tokens[position], tokens[position + 1])
                if batch.target_BS[row, s]:
                    seen.append(position + 1)
                if batch.position_BS is not None:
                    begin = max([start, *(f for f in firsts if f <= position)])
                    assert batch.position_BS[row, s] == position - begin
        assert seen == [p for p in range(1, len(tokens)) if not (reset and p in firsts)]
        assert (batch.position_BS is None) == (not reset)


@FAST
@given(lengths=LENGTHS, seed=st.integers(0, 10**6), length=st.integers(1, 9))
def test_documents_and_whole_documents(
    tmp_path_factory: pytest.TempPathFactory, write_tokens: Write, lengths: list[int], seed: int, length: int
) -> None:
    folder = tmp_path_factory.mktemp("p")
    documents = [d.tolist() for d in write_tokens(folder / "p", lengths, seed=seed)]
    dataset = open_dataset(folder / "p")
    usable = [number for number, document in enumerate(documents) if len(document) >= 2]
    index = index_of(dataset, length, pack=False)
    assert index.tolist() == usable
    reader = DocumentReader(dataset, length, index)
    batch = read(reader, list(range(reader.count)))
    pairs = [list(zip(d[:length], d[1 : length + 1], strict=False)) for d in (documents[n] for n in usable)]
    for row in range(reader.count):
        assert targets(batch, row) == pairs[row]
        # On the right.
        assert batch.padding_BS[row].tolist() == [s >= len(pairs[row]) for s in range(length)]
    assert batch.position_BS is None

    # Next fit, one document at a time.
    sequences: list[list[int]] = []
    for number, pair in enumerate(pairs):
        if not sequences or sum(len(pairs[n]) for n in sequences[-1]) + len(pair) > length:
            sequences.append([])
        sequences[-1].append(number)
    firsts = index_of(dataset, length, pack=True)
    assert firsts.tolist() == [usable[sequence[0]] for sequence in sequences]
    packed = PackedDocumentReader(dataset, length, firsts)
    batch = read(packed, list(range(packed.count)))
    assert batch.position_BS is not None
    for row, sequence in enumerate(sequences):
        assert targets(batch, row) == [pair for n in sequence for pair in pairs[n]]
        positions = [i for n in sequence for i in range(len(pairs[n]))]
        positions += range(length - len(positions))
        assert batch.position_BS[row].tolist() == positions


def test_index_does_not_depend_on_chunks(tmp_path: Path, write_tokens: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tokens(tmp_path / "p", np.random.default_rng(1).integers(0, 9, 200).tolist())
    dataset = open_dataset(tmp_path / "p")
    whole = [index_of(dataset, 10, pack) for pack in (False, True)]
    monkeypatch.setattr("moe_train.data.index._CHUNK", 7)
    for pack in (False, True):
        assert np.array_equal(index_of(dataset, 10, pack), whole[pack])


@pytest.mark.parametrize("kind", ["packed", "reset", "documents", "pack"])
def test_loss_mask_takes_labels_out(tmp_path: Path, write_tokens: Write, kind: str) -> None:
    rng = np.random.default_rng(3)
    lengths = [7, 1, 12, 5, 9]
    write_tokens(tmp_path / "p", lengths, vocab=60_000)
    masks = [rng.integers(0, 2, n) for n in lengths]
    dataset = open_dataset(tmp_path / "p")

    def batch_of(mask: Dataset | None) -> Batch:
        reader: Reader
        if kind in ("packed", "reset"):
            reader = WindowReader(dataset, 8, reset=kind == "reset", mask=mask)
        elif kind == "documents":
            reader = DocumentReader(dataset, 8, index_of(dataset, 8, False), mask=mask)
        else:
            reader = PackedDocumentReader(dataset, 8, index_of(dataset, 8, True), mask=mask)
        return read(reader, list(range(reader.evaluation_count)))

    without = batch_of(None)
    with IndexedWriter(tmp_path / "p_loss_document", 2, np.uint8) as writer:
        for mask in masks:
            writer.add(mask)
    batch = batch_of(open_loss_mask(dataset))
    wanted = {int(token) for token, m in zip(dataset.read(0, 34), np.concatenate(masks), strict=True) if m}
    assert len(set(dataset.read(0, 34).tolist())) == 34, "the labels below are known by their ids"
    expected = without.target_BS & np.isin(without.labels_BS, list(wanted))
    assert batch.target_BS.tolist() == expected.tolist() and 0 < int(expected.sum()) < int(without.target_BS.sum())
    assert batch.padding_BS.tolist() == without.padding_BS.tolist()


def test_a_data_set_without_a_target_is_too_small(tmp_path: Path, write_tokens: Write) -> None:
    write_tokens(tmp_path / "p", [1, 1, 0, 1])
    dataset = open_dataset(tmp_path / "p")
    for pack in (False, True):
        assert index_of(dataset, 8, pack).size == 0
    assert "none of its 4 documents has the two tokens" in DocumentReader(dataset, 8, np.zeros(0, np.int64)).too_small()
