"""Token files in Megatron's indexed format: a memory-mapped reader and a streaming writer.

`<prefix>.bin` holds the tokens of all documents one after the other, without gaps. `<prefix>.idx` holds, in
little-endian order: 9 bytes magic, uint64 version 1, uint8 type code, uint64 number of sequences N, uint64 length D of
the document list, int32[N] sequence lengths in tokens, int64[N] sequence starts in bytes, int64[D] first sequence
of each document followed by N. (Format: megatron/core/datasets/indexed_dataset.py of megatron-core 0.16.)

Suffixes: N rows, L tokens of a row, D documents.
"""

from __future__ import annotations

import bisect
from array import array
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_train.data.files import partial_path, publish
from moe_train.data.index_file import CODE_OF_DTYPE, HEADER, MAGIC, VERSION, write_index

_DTYPE_OF_CODE = {code: dtype for dtype, code in CODE_OF_DTYPE.items()}
_CHUNK = 1 << 20

TokenArray = npt.NDArray[Any]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type that Megatron stores tokens of such a vocabulary in: uint16 below 65,500 entries, else int32."""
    return np.dtype(np.uint16) if vocab_size < 65500 else np.dtype(np.int32)


def bin_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


class IndexedDataset:
    """Documents of a prefix, and the stream of their tokens, without reading the files into memory.

    tokens: [N] uint16 or int32 (uint8 in the files of a loss mask), all documents joined, read-only.
    Errors on opening: FileNotFoundError for a missing file, ValueError for one that is truncated or not in the format.
    Opening looks at headers and sizes only; `verify` reads all of the index.
    """

    def __init__(self, prefix: str | Path, stem: str | None = None) -> None:
        """stem: where manifest, documents table and token bytes are; else it follows from the prefix."""
        self.prefix = str(prefix)
        self.stem = self.prefix.removesuffix("_text_document") if stem is None else stem
        index, data = idx_path(prefix), bin_path(prefix)
        for path in (index, data):
            if not path.is_file():
                raise FileNotFoundError(f"{path} does not exist (a data set is a pair of files, {index} and {data})")
        self.dtype, sequence_count, document_count = _read_header(index)
        sizes = (4 * sequence_count, 8 * sequence_count, 8 * document_count)
        expected, found = HEADER.size + sum(sizes), index.stat().st_size
        if found != expected:
            raise ValueError(
                f"{index} is damaged or truncated: its header announces {sequence_count} sequences and "
                f"{document_count} document marks, that is {expected} bytes, but the file has {found}"
            )
        raw = np.asarray(np.memmap(index, mode="r"))  # a plain array is faster to index
        parts = np.split(raw[HEADER.size :], np.cumsum(sizes)[:-1])
        self.sequence_lengths: npt.NDArray[np.int32] = parts[0].view("<i4")
        self._sequence_starts = parts[1].view("<i8")  # in bytes
        self._document_marks = parts[2].view("<i8")
        self._check_ends(index, data)
        size = data.stat().st_size
        # An empty file cannot be mapped.
        self.tokens: TokenArray = (
            np.asarray(np.memmap(data, dtype=self.dtype, mode="r")) if size else np.zeros(0, self.dtype)
        )
        self._windows: TokenArray = np.zeros((0, 0), self.dtype)

    def __len__(self) -> int:
        """Number of documents."""
        return len(self._document_marks) - 1

    @property
    def sequence_count(self) -> int:
        return len(self.sequence_lengths)

    @property
    def token_count(self) -> int:
        return len(self.tokens)

    def read(self, start: int, stop: int) -> TokenArray:
        """Tokens start <= position < stop of the stream, read-only."""
        assert 0 <= start <= stop <= self.token_count
        return self.tokens[start:stop]

    def read_rows(self, starts_N: npt.NDArray[np.int64], length: int) -> TokenArray:
        """[N, L] tokens: row i has the `length` tokens from starts_N[i] on, all of which must exist."""
        # Making the view costs more than copying the rows of a micro-batch, and the length is always the same.
        if self._windows.shape[1] != length:
            self._windows = np.lib.stride_tricks.sliding_window_view(self.tokens, length)
        return self._windows[starts_N]

    def document_bounds(self, first: int, stop: int) -> npt.NDArray[np.int64]:
        """[D + 1] first tokens of the documents first <= index < stop, and the one after the last of them."""
        assert 0 <= first <= stop <= len(self)
        return self._starts_of(np.asarray(self._document_marks[first : stop + 1]))

    def document_starts(self, numbers_D: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """[D] first tokens of any documents; of number len(self) the end. A document ends where the next one starts."""
        return self._starts_of(self._document_marks[numbers_D])

    def document(self, index: int) -> TokenArray:
        """Tokens of one document. IndexError outside 0 <= index < len(self)."""
        start, stop = self.document_span(index)
        return self.tokens[start:stop]

    def document_span(self, index: int) -> tuple[int, int]:
        """First token of a document in the stream, and the one after its last. IndexError if there is no such one."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.prefix} has documents 0 to {len(self) - 1}, not {index}")
        return self._start_of(int(self._document_marks[index])), self._start_of(int(self._document_marks[index + 1]))

    def document_at(self, position: int) -> int:
        """The document that the token at a position of the stream belongs to."""
        if not 0 <= position < self.token_count:
            raise IndexError(f"{self.prefix} has tokens 0 to {self.token_count - 1}, not {position}")
        # bisect reads a few elements only; np.searchsorted would copy the unaligned mapping as a whole.
        sequence = bisect.bisect_right(self._sequence_starts, position * self.dtype.itemsize) - 1
        return bisect.bisect_right(self._document_marks, sequence, hi=len(self)) - 1

    def verify(self) -> None:
        """Reads the whole index and checks that sequences and documents follow each other without gaps.

        Errors: ValueError naming the file and the first wrong entry.
        """
        path, position = idx_path(self.prefix), 0
        for begin in range(0, self.sequence_count, _CHUNK):
            lengths = self.sequence_lengths[begin : begin + _CHUNK].astype(np.int64) * self.dtype.itemsize
            starts = position + np.cumsum(lengths) - lengths
            wrong = np.flatnonzero((self._sequence_starts[begin : begin + _CHUNK] != starts) | (lengths < 0))
            if wrong.size:
                raise ValueError(f"{path} is damaged: sequence {begin + int(wrong[0])} does not follow its predecessor")
            position += int(lengths.sum())
        for begin in range(0, len(self), _CHUNK):
            wrong = np.flatnonzero(np.diff(self._document_marks[begin : begin + _CHUNK + 1]) < 0)
            if wrong.size:
                raise ValueError(f"{path} is damaged: document {begin + int(wrong[0])} ends before it starts")

    def _starts_of(self, sequences_D: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        starts = np.full(len(sequences_D), self.token_count, np.int64)
        inside = sequences_D < self.sequence_count
        starts[inside] = self._sequence_starts[sequences_D[inside]] // self.dtype.itemsize
        return starts

    def _start_of(self, sequence: int) -> int:
        if sequence == self.sequence_count:
            return self.token_count
        return int(self._sequence_starts[sequence]) // self.dtype.itemsize

    def _check_ends(self, index: Path, data: Path) -> None:
        marks, count = self._document_marks, self.sequence_count
        if len(marks) == 0 or marks[0] != 0 or marks[-1] != count:
            raise ValueError(f"{index} is damaged: its documents do not cover its {count} sequences")
        expected = 0
        if count:
            expected = int(self._sequence_starts[-1]) + int(self.sequence_lengths[-1]) * self.dtype.itemsize
        found = data.stat().st_size
        if found != expected:
            raise ValueError(f"{data} is damaged or truncated: {index} describes {expected} bytes, found {found}")


class IndexedWriter:
    """Writes documents in order; memory grows by 4 bytes per document.

    The files are byte for byte those of megatron-core's IndexedDatasetBuilder with one sequence per document. They
    are written under temporary names; `finish` (or leaving the `with` block without an error) publishes them, the
    .idx last. `close` without `finish` leaves no file under a final name.

    vocab_size: bounds the ids that `add` accepts and decides the stored type unless `dtype` does (np.uint8 for the
    files of a loss mask, with a vocabulary of 2).
    """

    def __init__(self, prefix: str | Path, vocab_size: int, dtype: npt.DTypeLike | None = None) -> None:
        self.paths = (bin_path(prefix), idx_path(prefix))
        self.vocab_size, self.dtype = vocab_size, token_dtype(vocab_size) if dtype is None else np.dtype(dtype)
        if self.dtype not in CODE_OF_DTYPE or vocab_size - 1 > np.iinfo(self.dtype).max:
            raise ValueError(f"a vocabulary of {vocab_size} cannot be stored as {self.dtype} in {self.paths[0]}")
        self.token_count = 0
        self._lengths = array("i")
        self.paths[0].parent.mkdir(parents=True, exist_ok=True)
        self._stream = open(partial_path(self.paths[0]), "wb")

    @property
    def document_count(self) -> int:
        return len(self._lengths)

    def add(self, ids: npt.ArrayLike) -> None:
        """Appends one document, [length] integers. ValueError for an id outside the vocabulary."""
        tokens = np.asarray(ids)
        assert tokens.ndim == 1, f"a document is one row of ids, not {tokens.shape}"
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            raise ValueError(
                f"document {self.document_count} for {self.paths[0]} has a token id outside 0 <= id < {self.vocab_size}"
            )
        self._stream.write(tokens.astype(self.dtype).tobytes())
        self._lengths.append(tokens.size)
        self.token_count += tokens.size

    def complete(self) -> list[Path]:
        """Ends writing: both temporary files are whole. Returns the final paths, for `files.publish`, .idx last."""
        self._stream.close()
        lengths = np.frombuffer(self._lengths, dtype=np.int32) if self._lengths else np.zeros(0, np.int32)
        write_index(partial_path(self.paths[1]), self.dtype, self.document_count, [lengths])
        return list(self.paths)

    def finish(self) -> None:
        publish(self.complete())

    def close(self) -> None:
        """Gives up: closes and removes the temporary files. Does nothing after `finish`."""
        self._stream.close()
        for path in self.paths:
            partial_path(path).unlink(missing_ok=True)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
        self.close()


def _read_header(path: Path) -> tuple[np.dtype[Any], int, int]:
    with open(path, "rb") as stream:
        header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        raise ValueError(f"{path} is truncated: expected at least {HEADER.size} bytes, found {len(header)}")
    magic, version, code, sequences, documents = HEADER.unpack(header)
    if magic != MAGIC or version != VERSION:
        raise ValueError(f"{path} is not a Megatron index of version {VERSION} (wrong first bytes)")
    if code not in _DTYPE_OF_CODE:
        known = ", ".join(f"{code} ({dtype})" for code, dtype in _DTYPE_OF_CODE.items())
        raise ValueError(f"{path} stores tokens as type {code}; supported are {known}")
    return _DTYPE_OF_CODE[code], sequences, documents
