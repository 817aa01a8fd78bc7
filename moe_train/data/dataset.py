"""From the name of a data set to its tokens, whether they lie in one pair of files or in many.

Names: `<stem>` (files `<stem>_text_document.bin/.idx`, or `<stem>.bin/.idx`, or the shards
`<stem>_00000_text_document.bin/.idx`, `<stem>_00001_...`), or `<stem>_text_document` as Megatron's tools say it.
Manifest, documents table and token bytes lie beside them under the stem, once for all shards.

Suffixes: N rows, L tokens of a row, D documents.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moe_train.data.indexed import IndexedDataset, TokenArray, idx_path
from moe_train.data.manifest import manifest_path, read_manifest

TEXT, LOSS_MASK = "_text_document", "_loss_document"
_DIGITS = 5


class ShardedDataset:
    """Several token files read as one stream: documents and positions are numbered through all of them.

    The interface is that of IndexedDataset, and so is what it returns for shards that were cut from one file.
    Errors: ValueError where the shards store tokens in different types.
    """

    def __init__(self, name: str, shards: Sequence[IndexedDataset]) -> None:
        assert shards
        types = {str(shard.dtype) for shard in shards}
        if len(types) > 1:
            raise ValueError(f"the shards of {name} store tokens in different types ({', '.join(sorted(types))})")
        self.prefix, self.shards, self.dtype = name, list(shards), shards[0].dtype
        self.stem = sidecar_stem(name)
        self._tokens = [0, *accumulate(shard.token_count for shard in shards)]
        self._documents = [0, *accumulate(len(shard) for shard in shards)]

    def __len__(self) -> int:
        """Number of documents."""
        return self._documents[-1]

    @property
    def token_count(self) -> int:
        return self._tokens[-1]

    def read(self, start: int, stop: int) -> TokenArray:
        """Tokens start <= position < stop of the stream."""
        assert 0 <= start <= stop <= self.token_count
        parts = []
        for number in range(self._holder(self._tokens, start), len(self.shards)):
            begin, end = self._tokens[number], self._tokens[number + 1]
            if begin >= stop:
                break
            parts.append(self.shards[number].read(max(start, begin) - begin, min(stop, end) - begin))
        if not parts:
            return np.zeros(0, self.dtype)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def read_rows(self, starts_N: npt.NDArray[np.int64], length: int) -> TokenArray:
        """[N, L] tokens: row i has the `length` tokens from starts_N[i] on, all of which must exist."""
        ends = np.array(self._tokens)
        first_N = np.searchsorted(ends, starts_N, side="right") - 1
        whole_N = starts_N + length <= ends[first_N + 1]
        out_NL = np.empty((len(starts_N), length), self.dtype)
        for number in np.unique(first_N[whole_N]).tolist():
            chosen_N = whole_N & (first_N == number)
            out_NL[chosen_N] = self.shards[number].read_rows(starts_N[chosen_N] - ends[number], length)
        for row in np.flatnonzero(~whole_N).tolist():
            out_NL[row] = self.read(int(starts_N[row]), int(starts_N[row]) + length)
        return out_NL

    def document_span(self, index: int) -> tuple[int, int]:
        """First token of a document in the stream, and the one after its last. IndexError if there is no such one."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.prefix} has documents 0 to {len(self) - 1}, not {index}")
        number = self._holder(self._documents, index)
        start, stop = self.shards[number].document_span(index - self._documents[number])
        return self._tokens[number] + start, self._tokens[number] + stop

    def document_bounds(self, first: int, stop: int) -> npt.NDArray[np.int64]:
        """[D + 1] first tokens of the documents first <= index < stop, and the one after the last of them."""
        assert 0 <= first <= stop <= len(self)
        parts = []
        for number, shard in enumerate(self.shards):
            begin = self._documents[number]
            low, high = max(first - begin, 0), min(stop - begin, len(shard))
            if low < high:
                parts.append(shard.document_bounds(low, high)[:-1] + self._tokens[number])
        end = self.document_span(stop - 1)[1] if stop > first else self._start_of(first)
        return np.concatenate([*parts, np.array([end], np.int64)])

    def document_starts(self, numbers_D: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """[D] first tokens of any documents; of number len(self) the end. A document ends where the next one starts."""
        starts = np.full(len(numbers_D), self.token_count, np.int64)
        shard_D = np.searchsorted(self._documents, numbers_D, side="right") - 1
        for number in np.unique(shard_D[numbers_D < len(self)]).tolist():
            chosen = shard_D == number
            local = numbers_D[chosen] - self._documents[number]
            starts[chosen] = self._tokens[number] + self.shards[number].document_starts(local)
        return starts

    def document_at(self, position: int) -> int:
        """The document that the token at a position of the stream belongs to."""
        if not 0 <= position < self.token_count:
            raise IndexError(f"{self.prefix} has tokens 0 to {self.token_count - 1}, not {position}")
        number = self._holder(self._tokens, position)
        return self._documents[number] + self.shards[number].document_at(position - self._tokens[number])

    def verify(self) -> None:
        """As IndexedDataset.verify, for every shard."""
        for shard in self.shards:
            shard.verify()

    def _start_of(self, document: int) -> int:
        return self.document_span(document)[0] if document < len(self) else self.token_count

    @staticmethod
    def _holder(bounds: list[int], place: int) -> int:
        """The shard with bounds[shard] <= place < bounds[shard + 1]; empty shards hold nothing."""
        return min(bisect.bisect_right(bounds, place), len(bounds) - 1) - 1


Dataset = IndexedDataset | ShardedDataset


def sidecar_stem(name: str | Path) -> str:
    """Where manifest, documents table and token bytes of a data set are: its name without Megatron's ending."""
    return str(name).removesuffix(TEXT)


def open_dataset(name: str | Path) -> Dataset:
    """The data set of a name: an exact prefix, else `<name>_text_document`, else its shards.

    Errors: FileNotFoundError with what there is instead; ValueError where shards are missing or a file is damaged.
    """
    found = data_prefixes(name)
    if len(found) == 1:
        return IndexedDataset(found[0], sidecar_stem(name))
    return ShardedDataset(str(name), [IndexedDataset(prefix) for prefix in found])


def data_prefixes(name: str | Path) -> list[str]:
    """The prefixes of the files of a data set, in the order of its stream. Errors as those of `open_dataset`."""
    name, stem = str(name), sidecar_stem(name)
    found = _resolve(name, TEXT) or _resolve(stem, TEXT)
    if not found:
        there = datasets_in(Path(stem).parent)
        known = f"; data sets there: {', '.join(there)}" if there else ""
        raise FileNotFoundError(
            f"there is no data set {name} (neither {name}.idx nor {stem}{TEXT}.idx nor shards of it){known}"
        )
    if manifest_path(stem).is_file():
        _check_manifest(stem, found)
    return found


def open_loss_mask(dataset: Dataset) -> Dataset | None:
    """The loss mask that lies beside a data set (`<stem>_loss_document`, in as many shards), or None without one.

    It has one byte per token of the data set, 1 where the token counts as a target.
    Errors: ValueError where its documents are not those of the data set; FileNotFoundError where the manifest names one
    that is not there.
    """
    stem = dataset.stem
    found = _resolve(stem, LOSS_MASK, exact=False)
    named = read_manifest(stem).get("files", {}) if manifest_path(stem).is_file() else {}
    missing = {file for file in named if f"{LOSS_MASK}." in file} - {
        Path(prefix).name + ending for prefix in found for ending in (".bin", ".idx")
    }
    if missing:
        raise FileNotFoundError(
            f"the loss mask of {stem} is not whole: {min(missing)}, which its manifest names, cannot be found"
        )
    if not found:
        return None
    parts = [IndexedDataset(prefix) for prefix in found]
    mask = parts[0] if len(parts) == 1 else ShardedDataset(stem + LOSS_MASK, parts)
    if mask.dtype != np.uint8:
        raise ValueError(f"{stem}{LOSS_MASK} stores {mask.dtype}; a loss mask has one byte (uint8) per token")
    same = len(mask) == len(dataset) and mask.token_count == dataset.token_count
    if not same or not _same_bounds(mask.document_bounds, dataset.document_bounds, len(dataset)):
        raise ValueError(
            f"the loss mask {stem}{LOSS_MASK} does not belong to {dataset.prefix}: "
            f"its {len(mask)} documents have other lengths; write both in one go"
        )
    return mask


_Bounds = Callable[[int, int], npt.NDArray[np.int64]]


def _same_bounds(left: _Bounds, right: _Bounds, documents: int, chunk: int = 1 << 20) -> bool:
    pieces = ((first, min(first + chunk, documents)) for first in range(0, documents, chunk))
    return all(np.array_equal(left(*piece), right(*piece)) for piece in pieces)


def _resolve(name: str, ending: str, exact: bool = True) -> list[str]:
    if exact and idx_path(name).is_file():
        return [name]
    if idx_path(name + ending).is_file():
        return [name + ending]
    folder, stem = Path(name).parent, Path(name).name
    pattern = re.compile(re.escape(stem) + rf"_(\d{{{_DIGITS}}})" + re.escape(ending + ".idx"))
    paths = folder.iterdir() if folder.is_dir() else ()
    numbers = sorted(int(match[1]) for path in paths if (match := pattern.fullmatch(path.name)))
    missing = set(range(numbers[-1] + 1)).difference(numbers) if numbers else set()
    if missing:
        raise ValueError(f"{name} has {len(numbers)} shards, but shard {min(missing):0{_DIGITS}d} is missing")
    return [f"{name}_{number:0{_DIGITS}d}{ending}" for number in numbers]


def _check_manifest(stem: str, found: list[str]) -> None:
    """Files from an earlier preparation, or copied in part, must not be taken for the data set."""
    files = read_manifest(stem).get("files", {})
    name = re.escape(Path(stem).name)
    pattern = re.compile(rf"{name}((_\d{{{_DIGITS}}})?{TEXT})?\.idx")
    named = {file for file in files if pattern.fullmatch(file)}
    there = {Path(prefix).name + ".idx" for prefix in found}
    if files and named != there:
        wrong = [f"{file} is missing" for file in sorted(named - there)]
        wrong += [f"{file} is not of it" for file in sorted(there - named)]
        raise ValueError(f"the files of {stem} are not those that its manifest names: {'; '.join(wrong)}")
    for file in sorted(named):
        for part in (file, file.removesuffix(".idx") + ".bin"):
            path = Path(stem).parent / part
            if path.is_file() and part in files and path.stat().st_size != files[part]:
                raise ValueError(
                    f"{path} has {path.stat().st_size} bytes, {files[part]} by the manifest of {stem}: it is damaged, "
                    "or of another preparation"
                )


def datasets_in(folder: Path) -> list[str]:
    """Names of the data sets in a folder."""
    if not folder.is_dir():
        return []
    stems = {str(path).removesuffix(".idx") for path in folder.glob("*.idx")}
    return sorted({re.sub(rf"(_\d{{{_DIGITS}}})?{TEXT}$", "", stem) for stem in stems if not stem.endswith(LOSS_MASK)})
