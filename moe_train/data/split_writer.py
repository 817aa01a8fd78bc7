"""One split on its way to the disk: tokens, provenance table, token bytes and counts, kept in step.

Suffixes: V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moe_train.data.domains import documents_path
from moe_train.data.files import partial_path
from moe_train.data.indexed import IndexedWriter
from moe_train.data.manifest import token_bytes_path
from moe_train.data.tokenizers import IdArray, Tokenizer

_COLUMNS = ("source", "row", "id", "domain")


class SplitWriter:
    """Appends documents in order; `complete` ends the temporary files, `close` removes what was not published."""

    def __init__(self, prefix: str | Path, tokenizer: Tokenizer) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.tokens_writer = IndexedWriter(prefix, tokenizer.vocab_size)
        self._eod_id = tokenizer.eod_id
        self._token_bytes_V = tokenizer.token_bytes()
        self._counts_V = np.zeros(tokenizer.vocab_size, np.int64)
        self._uncounted: list[IdArray] = []
        self._table_path, self._bytes_path = documents_path(prefix), token_bytes_path(prefix)
        self._schema = pa.schema(
            [("source", pa.string()), ("row", pa.int64()), ("id", pa.string()), ("domain", pa.string())]
        )
        self._rows: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
        self._table = pq.ParquetWriter(partial_path(self._table_path), self._schema)
        self.text_bytes = 0
        self.inexact_documents = 0
        self.domains: dict[str, dict[str, int]] = {}

    @property
    def documents(self) -> int:
        return self.tokens_writer.document_count

    @property
    def tokens(self) -> int:
        return self.tokens_writer.token_count

    def add(self, ids: IdArray, text: str, *, source: str, row: int, id: str, domain: str) -> None:
        """Appends a document and its end-of-document token. ids: [tokens] without it."""
        ended = np.append(ids, np.int32(self._eod_id))
        self.tokens_writer.add(ended)
        self._uncounted.append(ended)
        size = len(text.encode())
        self.text_bytes += size
        self.inexact_documents += int(self._token_bytes_V[ended].sum()) != size
        counts = self.domains.setdefault(domain, {"documents": 0, "tokens": 0, "text_bytes": 0})
        counts["documents"] += 1
        counts["tokens"] += len(ended)
        counts["text_bytes"] += size
        for name, value in zip(_COLUMNS, (source, row, id, domain), strict=True):
            self._rows[name].append(value)

    def flush(self) -> None:
        """Counts the tokens of the last documents, all at once; writes provenance rows when there are many."""
        import pyarrow as pa

        if self._uncounted:
            self._counts_V += np.bincount(np.concatenate(self._uncounted), minlength=len(self._counts_V))
            self._uncounted = []
        if len(self._rows["row"]) >= 4096:
            self._table.write_table(pa.table(self._rows, schema=self._schema))
            self._rows = {name: [] for name in _COLUMNS}

    def facts(self) -> dict[str, Any]:
        """What the manifest says about the result, as of the last `flush`."""
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
            # Documents whose token bytes do not add up to their text: a tokenizer that normalises.
            "inexact_documents": self.inexact_documents,
            "unigram_entropy_nats": entropy_nats(self._counts_V),
            "domains": self.domains,
        }

    def complete(self) -> list[Path]:
        """Ends all temporary files. Returns their final paths, the .idx last."""
        import pyarrow as pa

        self._table.write_table(pa.table(self._rows, schema=self._schema))
        self._table.close()
        with open(partial_path(self._bytes_path), "wb") as stream:
            np.save(stream, self._token_bytes_V)
        return [self._bytes_path, self._table_path, *self.tokens_writer.complete()]

    def close(self) -> None:
        """Removes temporary files that are left; does nothing after they were published."""
        self._table.close()
        self.tokens_writer.close()
        for path in (self._table_path, self._bytes_path):
            partial_path(path).unlink(missing_ok=True)


def entropy_nats(counts_V: np.ndarray) -> float:
    """Entropy of the distribution with these counts, in nats: the loss of the best model that ignores context.

    counts_V: [V] integers, not all zero.
    """
    shares = counts_V[counts_V > 0] / counts_V.sum()
    return float(-(shares * np.log(shares)).sum())
