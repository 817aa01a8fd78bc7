from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from moe_train.data.indexed import IndexedDataset, IndexedWriter, bin_path, idx_path, token_dtype


def random_documents(seed: int, vocab_size: int, count: int = 40) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, rng.integers(0, 30)) for _ in range(count)]


def write(prefix: Path, documents: list[np.ndarray], vocab_size: int) -> IndexedDataset:
    with IndexedWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add(document)
    return IndexedDataset(prefix)


@pytest.mark.parametrize("vocab_size", [300, 65499, 65500, 200_000])
def test_files_are_those_of_megatron_core(tmp_path: Path, vocab_size: int) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    documents = random_documents(vocab_size, vocab_size)
    write(tmp_path / "ours", documents, vocab_size)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(vocab_size))
    for document in documents:
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert token_dtype(vocab_size) == DType.optimal_dtype(vocab_size)
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()


def test_megatron_core_reads_what_we_write(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset as Theirs

    documents = [document for document in random_documents(1, 500) if len(document)]
    write(tmp_path / "p", documents, 500)
    theirs = Theirs(str(tmp_path / "p"))
    assert len(theirs) == len(documents)
    for found, document in zip(theirs, documents, strict=True):
        assert np.array_equal(found, document)


def test_reads_documents_of_several_sequences(tmp_path: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "p.bin"))
    builder.add_document(torch.arange(6), [2, 0, 4])
    builder.add_document(torch.arange(6, 9), [3])
    builder.finalize(str(tmp_path / "p.idx"))
    ours = IndexedDataset(tmp_path / "p")
    assert len(ours) == 2 and ours.sequence_count == 4
    assert ours.document(0).tolist() == [0, 1, 2, 3, 4, 5] and ours.document(1).tolist() == [6, 7, 8]
    assert [ours.document_at(i) for i in range(9)] == [0] * 6 + [1] * 3
    ours.verify()


def test_documents_and_stream(tmp_path: Path) -> None:
    documents = random_documents(2, 70_000)
    dataset = write(tmp_path / "p", documents, 70_000)
    assert len(dataset) == len(documents) and dataset.dtype == np.int32
    assert np.array_equal(dataset.tokens, np.concatenate(documents))
    owners = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    assert [dataset.document_at(i) for i in range(dataset.token_count)] == owners.tolist()
    for index, document in enumerate(documents):
        assert np.array_equal(dataset.document(index), document)
    dataset.verify()
    with pytest.raises(IndexError, match="not 40"):
        dataset.document(len(documents))
    with pytest.raises(IndexError):
        dataset.document_at(dataset.token_count)


def test_empty_data_set(tmp_path: Path) -> None:
    dataset = write(tmp_path / "p", [], 300)
    assert len(dataset) == 0 and dataset.token_count == 0
    dataset.verify()


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_missing_file_is_named(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "p", random_documents(3, 300), 300)
    (tmp_path / f"p.{suffix}").unlink()
    with pytest.raises(FileNotFoundError, match=rf"p\.{suffix} does not exist"):
        IndexedDataset(tmp_path / "p")


@pytest.mark.parametrize("suffix", ["bin", "idx"])
@pytest.mark.parametrize("change", [-1, -40, 3])
def test_wrong_size_is_named_with_both_sizes(tmp_path: Path, suffix: str, change: int) -> None:
    write(tmp_path / "p", random_documents(4, 300), 300)
    path = tmp_path / f"p.{suffix}"
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + b"\0" * change)
    with pytest.raises(ValueError) as caught:
        IndexedDataset(tmp_path / "p")
    message = str(caught.value)
    assert f"p.{suffix} is damaged" in message
    assert str(len(content)) in message and str(len(content) + change) in message


@pytest.mark.parametrize("length", [0, 5, 33])
def test_truncated_header(tmp_path: Path, length: int) -> None:
    write(tmp_path / "p", random_documents(4, 300), 300)
    idx_path(tmp_path / "p").write_bytes(idx_path(tmp_path / "p").read_bytes()[:length])
    with pytest.raises(ValueError, match=rf"p\.idx is truncated.*found {length}"):
        IndexedDataset(tmp_path / "p")


def test_foreign_index_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "p", random_documents(5, 300), 300)
    content = idx_path(tmp_path / "p").read_bytes()
    idx_path(tmp_path / "p").write_bytes(b"NOTINDEX\0" + content[9:])
    with pytest.raises(ValueError, match="not a Megatron index"):
        IndexedDataset(tmp_path / "p")
    idx_path(tmp_path / "p").write_bytes(content[:17] + b"\x07" + content[18:])
    with pytest.raises(ValueError, match="stores tokens as type 7"):
        IndexedDataset(tmp_path / "p")


def test_verify_finds_a_wrong_entry(tmp_path: Path) -> None:
    write(tmp_path / "p", random_documents(6, 300), 300)
    content = bytearray(idx_path(tmp_path / "p").read_bytes())
    start_of_sequence_7 = 34 + 4 * 40 + 8 * 7
    content[start_of_sequence_7 : start_of_sequence_7 + 8] = struct.pack("<q", 1)
    idx_path(tmp_path / "p").write_bytes(content)
    with pytest.raises(ValueError, match="sequence 7"):
        IndexedDataset(tmp_path / "p").verify()


def test_nothing_under_final_names_before_the_end(tmp_path: Path) -> None:
    class Failed(Exception):
        pass

    with pytest.raises(Failed), IndexedWriter(tmp_path / "p", 300) as writer:
        writer.add([1, 2, 3])
        assert not bin_path(tmp_path / "p").exists()
        raise Failed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ids", [[1, 300], [-1]])
def test_id_outside_the_vocabulary(tmp_path: Path, ids: list[int]) -> None:
    with pytest.raises(ValueError, match="outside 0 <= id < 300"), IndexedWriter(tmp_path / "p", 300) as writer:
        writer.add(ids)
    assert list(tmp_path.iterdir()) == []
