from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_train.data.dataset import ShardedDataset, open_dataset, open_loss_mask, sidecar_stem
from moe_train.data.indexed import IndexedDataset, IndexedWriter
from moe_train.data.manifest import manifest_path

Write = Callable[..., list[np.ndarray]]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=20).filter(sum),
    data=st.data(),
    seed=st.integers(0, 10**6),
)
def test_shards_read_as_the_one_file_that_they_were_cut_from(
    tmp_path_factory: pytest.TempPathFactory, write_tokens: Write, lengths: list[int], data: st.DataObject, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(lengths)), max_size=4)))
    write_tokens(folder / "one", lengths, seed=seed)
    documents = write_tokens(folder / "many", lengths, seed=seed, cuts=cuts)
    one, many = open_dataset(folder / "one"), open_dataset(folder / "many")
    many.verify()
    tokens = np.concatenate(documents)
    assert isinstance(one, IndexedDataset) and isinstance(many, ShardedDataset) == bool(cuts)
    assert len(one) == len(many) == len(lengths) and one.token_count == many.token_count == sum(lengths)
    assert one.dtype == many.dtype
    ends = np.cumsum(lengths)
    for number in range(len(lengths)):
        assert one.document_span(number) == many.document_span(number) == (ends[number] - lengths[number], ends[number])
    for position in range(len(tokens)):
        owner = int(np.searchsorted(ends, position, side="right"))
        assert one.document_at(position) == many.document_at(position) == owner
    for dataset in (one, many):
        start, stop = sorted(data.draw(st.tuples(st.integers(0, len(tokens)), st.integers(0, len(tokens)))))
        assert np.array_equal(dataset.read(start, stop), tokens[start:stop])
        length = data.draw(st.integers(1, len(tokens)))
        starts = np.array(data.draw(st.lists(st.integers(0, len(tokens) - length), max_size=8)), np.int64)
        expected = [tokens[s : s + length] for s in starts]
        assert np.array_equal(dataset.read_rows(starts, length), np.array(expected).reshape(len(starts), length))
        first, last = sorted(data.draw(st.tuples(st.integers(0, len(lengths)), st.integers(0, len(lengths)))))
        assert dataset.document_bounds(first, last).tolist() == [0, *ends][first : last + 1]
        numbers = data.draw(st.lists(st.integers(0, len(lengths)), max_size=8))
        assert dataset.document_starts(np.array(numbers, np.int64)).tolist() == [[0, *ends][n] for n in numbers]
        with pytest.raises(IndexError):
            dataset.document_at(len(tokens))
        with pytest.raises(IndexError):
            dataset.document_span(len(lengths))


def test_names(tmp_path: Path, write_tokens: Write) -> None:
    with IndexedWriter(tmp_path / "old", 100) as writer:
        writer.add([1, 2, 3])
    write_tokens(tmp_path / "new", [4])
    write_tokens(tmp_path / "many", [4, 5], cuts=[1])
    assert open_dataset(tmp_path / "old").token_count == 3
    assert open_dataset(tmp_path / "new").token_count == open_dataset(tmp_path / "new_text_document").token_count == 4
    assert open_dataset(tmp_path / "many").token_count == 9
    # One shard by its own name is a data set of its own.
    assert open_dataset(tmp_path / "many_00001_text_document").token_count == 5
    assert sidecar_stem("a/b_text_document") == sidecar_stem("a/b") == "a/b"
    with pytest.raises(FileNotFoundError, match="no data set .*absent .*data sets there: .*/many, .*/new, .*/old$"):
        open_dataset(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"shards of it\)$"):
        open_dataset(tmp_path / "nowhere" / "absent")


def test_missing_and_foreign_shards_are_refused(tmp_path: Path, write_tokens: Write) -> None:
    write_tokens(tmp_path / "p", [4, 5, 6], cuts=[1, 2])
    names = [f"p_{number:05d}_text_document" for number in range(3)]
    files = {f"{name}.{end}": (tmp_path / f"{name}.{end}").stat().st_size for name in names for end in ("bin", "idx")}
    manifest_path(tmp_path / "p").write_text(json.dumps({"files": files | {"p.documents.parquet": 1}}))
    assert open_dataset(tmp_path / "p").token_count == 15
    wrong = {**files, f"{names[1]}.bin": 1}
    manifest_path(tmp_path / "p").write_text(json.dumps({"files": wrong}))
    with pytest.raises(ValueError, match="p_00001_text_document.bin has 10 bytes, 1 by the manifest"):
        open_dataset(tmp_path / "p")
    manifest_path(tmp_path / "p").write_text(json.dumps({"files": {"q_text_document.idx": 1}}))
    with pytest.raises(ValueError, match="p_00000_text_document.idx is not of it"):
        open_dataset(tmp_path / "p")
    manifest_path(tmp_path / "p").write_text(json.dumps({"files": files}))
    for end in ("bin", "idx"):
        (tmp_path / f"{names[2]}.{end}").rename(tmp_path / f"away.{end}")
    with pytest.raises(ValueError, match=r"manifest names: p_00002_text_document.idx is missing$"):
        open_dataset(tmp_path / "p")
    (tmp_path / "away.idx").rename(tmp_path / f"{names[2]}.idx")
    (tmp_path / "away.bin").rename(tmp_path / f"{names[2]}.bin")
    (tmp_path / f"{names[1]}.idx").unlink()
    with pytest.raises(ValueError, match="2 shards, but shard 00001 is missing"):
        open_dataset(tmp_path / "p")
    # An earlier preparation in one file, left behind.
    write_tokens(tmp_path / "p", [4, 5, 6])
    with pytest.raises(ValueError, match="p_text_document.idx is not of it"):
        open_dataset(tmp_path / "p")


def test_shards_of_different_types_are_refused(tmp_path: Path) -> None:
    for number, vocab in enumerate((100, 100_000)):
        with IndexedWriter(f"{tmp_path}/p_{number:05d}_text_document", vocab) as writer:
            writer.add([1, 2])
    with pytest.raises(ValueError, match="different types .int32, uint16"):
        open_dataset(tmp_path / "p")


def write_mask(stem: str, masks: list[list[int]]) -> None:
    with IndexedWriter(f"{stem}_loss_document", 2, np.uint8) as writer:
        for mask in masks:
            writer.add(mask)


def test_loss_mask(tmp_path: Path, write_tokens: Write) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset as Theirs

    write_tokens(tmp_path / "p", [3, 2])
    dataset = open_dataset(tmp_path / "p")
    assert open_loss_mask(dataset) is None
    write_mask(f"{tmp_path}/p", [[0, 1, 1], [1, 0]])
    mask = open_loss_mask(dataset)
    assert mask is not None and mask.dtype == np.uint8 and mask.read(0, 5).tolist() == [0, 1, 1, 1, 0]
    assert [row.tolist() for row in Theirs(f"{tmp_path}/p_loss_document")] == [[0, 1, 1], [1, 0]]
    write_mask(f"{tmp_path}/p", [[0, 1], [1, 1, 0]])
    with pytest.raises(ValueError, match="other lengths"):
        open_loss_mask(dataset)
    with IndexedWriter(f"{tmp_path}/p_loss_document", 2) as writer:
        writer.add([0, 1, 1])
    with pytest.raises(ValueError, match="uint16; a loss mask has one byte"):
        open_loss_mask(dataset)
    with pytest.raises(ValueError, match="cannot be stored as uint8"):
        IndexedWriter(tmp_path / "q", 300, np.uint8)
