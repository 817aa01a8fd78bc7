"""Parquet in FineWeb's layout, as large as wanted, made of the sentences of a smaller text.

In the unique part no document occurs twice, and a share of the words is new, as in real text; in the repeated part a
few documents occur over and over.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

DOCUMENT_BYTES = 3000
"""About the mean of FineWeb."""
NEW_WORDS = 0.01
ROWS_PER_GROUP = 1000
_FILE_BYTES = 100_000_000


def write_corpus(folder: Path, source: str, size: int, unique: bool, seed: int = 0) -> list[Path]:
    """About ``size`` bytes of text in files of 100 MB."""
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    sentences = [part for part in re.split(r"(?<=[.!?\n])\s+", source) if part]
    letters = [word for word in re.findall(r"[a-z]{4,}", source)]
    pool = [_document(rng, sentences, letters, new=False) for _ in range(2000)]
    paths: list[Path] = []
    left = size
    while left > 0:
        path = folder / f"{len(paths):03d}_00000.parquet"
        left -= _write_file(path, rng, sentences, letters, None if unique else pool, min(left, _FILE_BYTES))
        paths.append(path)
    return paths


def new_word_share(texts: Sequence[str]) -> float:
    """Of the words in the second half of texts, how many do not occur in the first."""
    half = len(texts) // 2
    known = {word for text in texts[:half] for word in text.split()}
    later = [word for text in texts[half:] for word in text.split()]
    return sum(word not in known for word in later) / max(1, len(later))


def _write_file(
    path: Path, rng: random.Random, sentences: list[str], letters: list[str], pool: list[str] | None, size: int
) -> int:
    written = row = 0
    schema = pa.schema(
        [(name, pa.string()) for name in ("text", "id", "dump", "url", "date", "file_path", "language")]
        + [("language_score", pa.float64()), ("token_count", pa.int64())]
    )
    with pq.ParquetWriter(path, schema) as writer:
        while written < size:
            texts = []
            while len(texts) < ROWS_PER_GROUP and written < size:
                texts.append(rng.choice(pool) if pool else _document(rng, sentences, letters, new=True))
                written += len(texts[-1].encode())
            writer.write_table(pa.table(list(_columns(path, rng, row, texts)), schema=schema), ROWS_PER_GROUP)
            row += len(texts)
    return written


def _columns(path: Path, rng: random.Random, row: int, texts: list[str]) -> Iterator[pa.Array]:
    count = len(texts)
    hexadecimal = [f"{rng.getrandbits(128):032x}" for _ in range(count)]
    yield pa.array(texts)
    yield pa.array([f"<urn:uuid:{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}>" for h in hexadecimal])
    yield pa.array(["CC-MAIN-2024-10"] * count)
    yield pa.array([f"https://www.example-{h[:6]}.org/articles/{h[6:20]}/{row + i}" for i, h in enumerate(hexadecimal)])
    yield pa.array(["2024-03-01T00:00:00Z"] * count)
    yield pa.array([f"s3://crawl/{path.stem}/{h[:12]}.warc.gz" for h in hexadecimal])
    yield pa.array(["en"] * count)
    yield pa.array([0.65 + 0.35 * rng.random() for _ in range(count)])
    yield pa.array([len(text) // 4 for text in texts])


def _document(rng: random.Random, sentences: list[str], letters: list[str], new: bool) -> str:
    length = rng.lognormvariate(0, 0.8) * DOCUMENT_BYTES * 0.73  # the mean is DOCUMENT_BYTES
    parts: list[str] = []
    size = 0
    while size < length:
        part = rng.choice(sentences)
        if new:
            words = len(part) // 6
            for _ in range(sum(rng.random() < NEW_WORDS for _ in range(words))):
                part += " " + _new_word(rng, letters)
        parts.append(part)
        size += len(part) + 1
    return " ".join(parts) + f" {rng.getrandbits(60):x}" * new


def _new_word(rng: random.Random, letters: list[str]) -> str:
    """Halves of two words, with a letter between."""
    left, right = rng.choice(letters), rng.choice(letters)
    return left[: len(left) // 2 + 1] + rng.choice("aeioulnrst") + right[len(right) // 2 :]
